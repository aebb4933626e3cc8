"""Alternating least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    eps,
    from_host,
    inner,
    is_complex,
    namespace,
)
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.gauge import balance
from lowrank_sp.inverse.completion.problem import Callback, Problem, spread
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.iterate import Solution, Stop

# Sweeps from which the over-relaxation is estimated anew.
_PERIOD = 3
_MOST = 1.95


class _State(NamedTuple):
    """The model ``left @ right``; with biases, ``[L b 1] @ [R; 1; c]``.

    ``ridge`` is what the continuation adds to the penalty, relative to the data; ``changes`` are
    those of the sweeps with the present over-relaxation.
    """

    left: Array
    right: Array
    factor: float
    ridge: float
    relaxation: float = 1.0
    changes: tuple[float, ...] = ()


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
    continuation: float = 0.5,
    biases: bool = False,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by alternating least squares.

    .. math:: \min_{L, R} \sum_{(i,j) \in \Omega} |X_{ij} - (L R)_{ij}|^2
              + \rho \Big( \sum_i w_i \lVert L_i \rVert^2 + \sum_j w_j \lVert R_j \rVert^2 \Big)

    What is said here of parameters, answer and errors holds for all completion solvers, but for
    what they say themselves.

    Parameters
    ----------
    entries : Entries
    rank : int
        In ``1..min(m, n)``.
    init : SVD or LowRank, optional
        Where to start; by default a spectral start.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change monitored is that of ``L R`` in a sweep, relative to its norm.
    callback : callable, optional
        Called after every step, as by :func:`~lowrank_sp.iterate.iterate`.
    regularization : float
        ``rho``, in units of the root mean square of the entries.
    weighted : bool
        Whether the weight ``w`` of a line is its number of entries :cite:p:`zhou2008als`. Otherwise
        all are ``M / sqrt(m n)``; then the penalty is a multiple of the nuclear norm of ``L R``.
    continuation : float
        In [0, 1). The sweeps ``k = 1, 2, ...`` have a further, unweighted penalty of
        ``continuation^k`` times the relative residual. It leads to the solution of least nuclear
        norm while the entries leave the factors open, and is gone when they are not. From an
        oversampling of about 3 on the default will do; near the information limit, or where the
        matrix is ill-conditioned, 0.9 recovers far more, in several times the sweeps.
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
        them; they are named. Also if ``rank`` has more degrees of freedom than there are entries.

    Notes
    -----
    A sweep costs ``2 M (r^2 + 4 r) + (m + n) r^3 / 3`` multiplications. Memory is that of the
    entries in both orders, and some factors. Sweeps are block Gauss-Seidel steps, over-relaxed as
    their rate suggests :cite:p:`young1954iterative`: a rate of 0.99 becomes one of about 0.8. They
    depend on the spans of the factors only, not on the condition of the matrix; what suffers from
    it is the start.

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
    if not 0 <= continuation < 1:
        raise ValueError(f"continuation must be in [0, 1), got {continuation}")
    problem = Problem.of(
        entries, rank, allow_unidentified=allow_unidentified, regularized=regularization > 0
    )
    mean = _mean(problem.entries.values) if biases else 0.0
    by_rows = problem.entries
    if biases:
        by_rows = by_rows.with_values(by_rows.values - mean)
    by_columns = by_rows.mT
    ridges = [_ridge(e, regularization, weighted) for e in (by_rows, by_columns)]
    extras = [_ridge(e, 1.0, False) for e in (by_rows, by_columns)]
    weights = [
        (r if weighted and regularization else e) ** 0.5
        for r, e in zip(ridges, extras, strict=True)
    ]
    data = by_rows.norm()
    offset = abs(mean) * (by_rows.shape[0] * by_rows.shape[1]) ** 0.5

    def step(state: _State) -> tuple[_State, float]:
        left, right, factor, ridge, relaxation, changes = state
        new, residual = _half(by_rows, left, right, ridges[0] + ridge * extras[0], biases)
        move = new - left
        change = _norm(move, right)
        left, right = _turned(left + relaxation * move, right, biases)
        new, _ = _half(by_columns, left, right, ridges[1] + ridge * extras[1], biases)
        move = new - left
        change += _norm(move, right)
        left = left + relaxation * move
        # Where the penalty leaves nothing, relative to the rounding of the data.
        change /= max(_norm(left, right) + offset, eps(left.dtype) * data)
        left, right = _balanced(*_turned(left, right, biases), weights, biases)
        factor *= continuation
        relaxed = _relaxed(relaxation, (*changes, change))
        return _State(left, right, factor, factor * residual / data, *relaxed), change

    f = replace(problem, entries=by_rows).start(init, rng)
    root, rest = spread(f)
    start = LowRank(f.u * rest, root[:, None] * f.vh)
    return problem.solve(
        step,
        _State(*(_with_biases(start) if biases else start.factors()), continuation, continuation),
        value=lambda state: _model(state, mean, biases),
        stop=stop,
        callback=callback,
    )


def _half(
    entries: Entries, left: Array, right: Array, ridge: Array, biases: bool
) -> tuple[Array, float]:
    """The best left factor for the right one, and the residual before; a last bias is given."""
    if not biases:
        new, squares = entries.least_squares(left, right, ridge)
        return new, squares**0.5
    given = entries.sampled(left[:, -1:], right[-1:, :])
    others = entries.with_values(entries.values - given)
    new, squares = others.least_squares(left[:, :-1], right[:-1, :], ridge)
    return namespace(left).concat([new, left[:, -1:]], axis=1), squares**0.5


def _relaxed(relaxation: float, changes: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """Over-relaxation for the coming sweeps, from the rate at which changes fell.

    Near a solution the sweeps are block Gauss-Seidel steps for two blocks. With relaxation ``w``
    the rate ``q`` satisfies ``(q + w - 1)^2 = q w^2 m^2``, where ``m^2`` is the rate without, and
    ``2 / (1 + sqrt(1 - m^2))`` is best :cite:p:`young1954iterative`.
    """
    if len(changes) < _PERIOD or not changes[0] > 0.0:
        return relaxation, changes[-_PERIOD:]
    q = (changes[-1] / changes[0]) ** (1 / (len(changes) - 1))
    if not 0.0 < q < 1.0:
        return 1.0 + (relaxation - 1.0) / 2, ()
    squared = min((q + relaxation - 1.0) ** 2 / (q * relaxation**2), 1.0)
    return min(2.0 / (1.0 + (1.0 - squared) ** 0.5), _MOST), ()


def _turned(left: Array, right: Array, biases: bool) -> tuple[Array, Array]:
    """Factors of the transposed model, in which the biases change places."""
    if not biases:
        return right.mT, left.mT
    xp = namespace(left)
    order = [*range(left.shape[1] - 2), left.shape[1] - 1, left.shape[1] - 2]
    index = xp.asarray(order, device=device(left))
    return xp.take(right.mT, index, axis=1), xp.take(left.mT, index, axis=0)


def _balanced(left: Array, right: Array, weights: list[Array], biases: bool) -> tuple[Array, Array]:
    """The same model in the gauge of least penalty."""
    xp = namespace(left)
    rows, cols = (xp.astype(w, left.dtype) for w in weights)
    r = left.shape[1] - 2 * biases
    new_left, new_right = balance(rows[:, None] * left[:, :r], right[:r, :] * cols)
    new_left, new_right = new_left / rows[:, None], new_right / cols
    if not biases:
        return new_left, new_right
    left = xp.concat([new_left, left[:, -2:]], axis=1)
    return left, xp.concat([new_right, right[-2:, :]], axis=0)


def _with_biases(f: LowRank) -> tuple[Array, Array]:
    xp = namespace(f.left)
    one, zero = xp.ones_like(f.left[:, :1]), xp.zeros_like(f.left[:, :1])
    left = xp.concat([f.left, zero, one], axis=1)
    one, zero = xp.ones_like(f.right[:1, :]), xp.zeros_like(f.right[:1, :])
    return left, xp.concat([f.right, one, zero], axis=0)


def _model(state: _State, mean: Any, biases: bool) -> LowRank:
    left, right = state.left, state.right
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
