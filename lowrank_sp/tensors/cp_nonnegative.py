"""Non-negative CP decompositions by hierarchical alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, from_host, is_complex, namespace
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.alternating import Problem, State, started, sweep
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.cp_start import given_factors, random_factors
from lowrank_sp.tensors.ranks import cp_rank


def cp_hals(
    x: Array,
    *,
    rank: int | float,
    init: CP | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, CP], Any] | None = None,
    passes: int = 3,
) -> Solution:
    r"""Non-negative CP decomposition by hierarchical alternating least squares.

    .. math:: \min_{A_k \ge 0} \; \Bigl\lVert X - \sum_{r=1}^R a_r^{(1)} \circ \dots \circ
              a_r^{(N)} \Bigr\rVert_F^2

    One column after the other is set to its non-negative minimizer, which is known in closed form.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        Real and finite; it need not be non-negative itself.
    rank : int or float
        As in :func:`~lowrank_sp.tensors.cp_als.cp_als`.
    init : CP, optional
        Where to start, of this shape and rank, with non-negative weights and factors. By default
        magnitudes of Gaussian factors of the norm of ``x``.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change is ``sqrt(fall of the squared error) / ||X||``.
    callback : callable, optional
        Called as ``callback(k, change, cp)`` after every sweep.
    passes : int
        Times that the columns of a factor are gone through for one product with the tensor.

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.tensors.cp.CP` in canonical gauge with its ``error``. The
        error never rises.

    Raises
    ------
    TypeError, ValueError
        If ``x`` is complex or not finite, ``rank`` is no number of terms, or ``init`` does not fit.

    Notes
    -----
    ``4 R`` flops an entry and two reads of ``x`` a sweep, as for
    :func:`~lowrank_sp.tensors.cp_als.cp_als`, and ``2 (passes + 1) (n_1 + ... + n_N) R^2`` flops
    for the columns :cite:p:`cichocki2009fast`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = CP(np.ones(2), [rng.random((n, 2)) for n in (8, 7, 6)])
    >>> solution = cp_hals(truth.to_dense(), rank=2, rng=0)
    >>> bool(min(f.min() for f in solution.value.factors) >= 0)
    True
    >>> bool(solution.value.error < 1e-3 * truth.norm())
    True
    """
    problem = Problem.of(x)
    source, shape = problem.source, tuple(x.shape)
    if is_complex(source.like.dtype):
        raise TypeError(f"x must be real, got {x.dtype}; non-negative factors have no phases")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    rank = cp_rank(rank, shape)
    if init is None:
        drawn = [abs(f) for f in random_factors(problem.like, shape, rank, rng)]
        start = _of_norm(started(source, problem.rows(drawn)), source.norm)
    else:
        if any(float(namespace(a).min(a)) < 0 for a in init.arrays()):
            raise ValueError("init must have non-negative weights and factors; take their abs()")
        start = started(source, problem.rows(given_factors(init, shape, rank)))

    def solve(rows: Array, gradient: Array, gram: np.ndarray) -> Array:
        return _columns_in_turn(rows, gradient, gram, passes)

    def step(state: State) -> tuple[State, float]:
        state = sweep(state, solve)
        return state, math.sqrt(max(0.0, state.fall)) / (source.norm or 1.0)

    return iterate(
        step,
        start,
        stop=stop,
        dtype=source.like.dtype,
        callback=callback,
        value=problem.answer,
    )


def _of_norm(state: State, norm: float) -> State:
    """The state with its tensor scaled to ``norm``."""
    if norm == 0.0:
        return state
    size = math.sqrt(float(np.sum(math.prod(state.grams, start=np.ones(())))))
    scale = (norm / size) ** (1 / len(state.rows))
    return started(state.source, [rows * scale for rows in state.rows])


def _columns_in_turn(rows: Array, gradient: Array, gram: np.ndarray, passes: int) -> Array:
    """Step of the rows of one mode: each in turn to its minimizer, or to zero below."""
    xp = namespace(rows)
    columns = from_host(gram, rows)
    lines = [rows[r : r + 1, :] for r in range(len(gram))]
    for _ in range(passes):
        for r, line in enumerate(lines):
            if gram[r, r] > 0:
                best = line + gradient[r : r + 1, :] / float(gram[r, r])
                lines[r] = xp.where(best > 0, best, xp.zeros_like(best))
                gradient = gradient - columns[:, r : r + 1] * (lines[r] - line)
    return xp.concat(lines, axis=0) - rows
