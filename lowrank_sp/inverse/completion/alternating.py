"""Alternating least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, device, from_host, inner, is_complex, namespace
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.gauge import balance
from lowrank_sp.inverse.completion.problem import Callback, Problem
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.iterate import Solution, Stop


class _State(NamedTuple):
    """The model ``left @ right``; with biases, ``[L b 1] @ [R; 1; c]``."""

    left: Array
    right: Array


def als(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    regularization: float = 0.0,
    weighted: bool = True,
    biases: bool = False,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by alternating least squares.

    .. math:: \min_{L, R} \sum_{(i,j) \in \Omega} |X_{ij} - (L R)_{ij}|^2
              + \rho \Big( \sum_i w_i \lVert L_i \rVert^2 + \sum_j w_j \lVert R_j \rVert^2 \Big)

    Parameters
    ----------
    entries : Entries
    rank : int
    init : SVD or LowRank, optional
        Where to start; by default a spectral start.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change monitored is that of ``L R`` in a sweep, relative to its norm.
    callback : callable, optional
    regularization : float
        ``rho``, in units of the root mean square of the entries.
    weighted : bool
        Whether the weight ``w`` of a line is its number of entries :cite:p:`zhou2008als`. Otherwise
        all are ``M / sqrt(m n)``; then the penalty is a multiple of the nuclear norm of ``L R``.
    biases : bool
        Fit ``mean + b_i + c_j + (L R)_ij``, with ``b`` and ``c`` penalized like factors. The
        answer, of rank ``rank + 2``, holds all four terms. ``init`` is the last one.
    allow_unidentified : bool
        Give NaN in lines that the entries do not determine, instead of an error.

    Returns
    -------
    Solution
        ``value`` is an :class:`~lowrank_sp.factors.SVD`.

    Raises
    ------
    ValueError
        If lines have fewer than ``rank`` entries (one, with regularization), or no entries connect
        them; they are named.

    Notes
    -----
    A sweep costs ``2 M (r^2 + 4 r) + (m + n) r^3 / 3`` multiplications, and memory for the entries
    in both orders and a few factors. It depends on the spans of the factors only, so the condition
    of the matrix does not slow it down much. A half step that fits all of a noiseless matrix well
    converges linearly, at a rate that worsens as the oversampling falls towards about 2.5.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=4, rng=0)
    >>> solution = als(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-6 * p.truth.norm())
    (True, True)
    """
    if not regularization >= 0:
        raise ValueError(f"regularization must be at least 0, got {regularization}")
    problem = Problem.of(
        entries, rank, allow_unidentified=allow_unidentified, regularized=regularization > 0
    )
    mean = _mean(problem.entries.values) if biases else 0.0
    by_rows = problem.entries.with_values(problem.entries.values - mean)
    by_columns = by_rows.mT
    ridges = [_ridge(e, regularization, weighted) for e in (by_rows, by_columns)]
    offset = abs(mean) * (by_rows.shape[0] * by_rows.shape[1]) ** 0.5

    def step(state: _State) -> tuple[_State, float]:
        left, right = state
        new = _half(by_rows, left, right, ridges[0], biases)
        change = _norm(new - left, right)
        left, right = _turned(new, right, biases)
        new = _half(by_columns, left, right, ridges[1], biases)
        change += _norm(new - left, right)
        size = _norm(new, right) + offset
        return _balanced(*_turned(new, right, biases), biases), change / size

    f = replace(problem, entries=by_rows).start(init, rng).split("left")
    return problem.solve(
        step,
        _with_biases(f) if biases else _State(f.left, f.right),
        value=lambda state: _model(state, mean, biases),
        stop=stop,
        callback=callback,
    )


def _half(entries: Entries, left: Array, right: Array, ridge: Array, biases: bool) -> Array:
    """The left factor that is best for the right one; with biases its last column is given."""
    if not biases:
        return entries.least_squares(left, right, ridge)[0]
    given = entries.sampled(left[:, -1:], right[-1:, :])
    others = entries.with_values(entries.values - given)
    new, _ = others.least_squares(left[:, :-1], right[:-1, :], ridge)
    return namespace(left).concat([new, left[:, -1:]], axis=1)


def _turned(left: Array, right: Array, biases: bool) -> tuple[Array, Array]:
    """Factors of the transposed model, in which the biases change places."""
    if not biases:
        return right.mT, left.mT
    xp = namespace(left)
    order = [*range(left.shape[1] - 2), left.shape[1] - 1, left.shape[1] - 2]
    index = xp.asarray(order, device=device(left))
    return xp.take(right.mT, index, axis=1), xp.take(left.mT, index, axis=0)


def _balanced(left: Array, right: Array, biases: bool) -> _State:
    # The penalty is least in this gauge, and rounding is as well.
    if not biases:
        return _State(*balance(left, right))
    xp = namespace(left)
    new_left, new_right = balance(left[:, :-2], right[:-2, :])
    return _State(
        xp.concat([new_left, left[:, -2:]], axis=1), xp.concat([new_right, right[-2:, :]], axis=0)
    )


def _with_biases(f: LowRank) -> _State:
    xp = namespace(f.left)
    one, zero = xp.ones_like(f.left[:, :1]), xp.zeros_like(f.left[:, :1])
    left = xp.concat([f.left, zero, one], axis=1)
    one, zero = xp.ones_like(f.right[:1, :]), xp.zeros_like(f.right[:1, :])
    return _State(left, xp.concat([f.right, one, zero], axis=0))


def _model(state: _State, mean: Any, biases: bool) -> LowRank:
    left, right = state
    if biases:
        parts = [left[:, :-2], left[:, -2:-1] + mean, left[:, -1:]]
        left = namespace(left).concat(parts, axis=1)
    return LowRank(left, right)


def _mean(values: Array) -> Any:
    mean = namespace(values).mean(values)
    return complex(mean) if is_complex(values.dtype) else float(mean)


def _ridge(entries: Entries, regularization: float, weighted: bool) -> Array:
    """The weights of the penalty of every row."""
    m, n = entries.shape
    mean_square = entries.norm() / max(entries.size, 1) ** 0.5
    counts = entries.pattern.row_counts if weighted else np.full(m, entries.size / (m * n) ** 0.5)
    return from_host(regularization * mean_square * counts.astype(np.float64), entries.values)


def _norm(left: Array, right: Array) -> float:
    """``||left @ right||_F`` from two Gram matrices, of which no entry can cancel."""
    xp = namespace(left)
    gram = inner(left, left) * inner(adjoint(right), adjoint(right)).mT
    return max(0.0, complex(xp.sum(gram)).real) ** 0.5
