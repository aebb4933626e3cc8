"""CP decompositions by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG, Array, eps, from_host
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.alternating import Problem, State, inverse, started, sweep, with_degeneracy
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.cp_start import (
    Core,
    algebraic_rows,
    core_shape,
    given_factors,
    has_pencils,
    random_factors,
)
from lowrank_sp.tensors.line_search import extrapolated
from lowrank_sp.tensors.ranks import cp_rank

# A core is iterated on first if it is this much smaller, of a tensor of at least so many entries,
# and there are this many sweeps to save; so many follow on the tensor itself at least.
_SHRINKS, _ENTRIES, _SWEEPS, _POLISH = 8, 2**15, 12, 2


def cp_als(
    x: Array,
    *,
    rank: int | float,
    init: CP | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, CP], Any] | None = None,
    regularization: float = 0.0,
    line_search: bool = True,
    compress: bool | None = None,
) -> Solution:
    r"""CP decomposition by alternating least squares.

    .. math:: \min \; \Bigl\lVert X - \sum_{r=1}^R a_r^{(1)} \circ \dots \circ a_r^{(N)}
              \Bigr\rVert_F^2 + \rho \sum_k \lVert A_k \rVert_F^2

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        Any floating, complex, integer or boolean dtype; finite. Entries that are missing are a
        matter for :func:`~lowrank_sp.tensors.cp_completion.cp_completion`.
    rank : int or float
        Number of terms ``R``, which may be above the sizes; or a fraction in (0, 1] of the number
        of entries that the factors may hold.
    init : CP, optional
        Where to start, of this shape and rank. By default generalized eigenvectors of the slices of
        the core, which are exact for an exact tensor, where two modes are as large as ``rank``; and
        Gaussian factors otherwise. A matrix starts at its SVD.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change is ``sqrt(fall of the objective) / ||X||``, which is the length of the path,
        factor by factor, that the tensor moved in a sweep.
    callback : callable, optional
        Called as ``callback(k, change, cp)`` after every sweep.
    regularization : float
        ``rho`` for a tensor of unit norm, so that it has no units. A positive one keeps the factors
        bounded where no best approximation exists.
    line_search : bool
        Whether to start a sweep at the lowest point of the line through the last two results.
    compress : bool, optional
        Whether to sweep over the core of a truncated HOSVD first, and over ``x`` from there on. By
        default where it pays.

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.tensors.cp.CP` in canonical gauge with its ``error``. An
        answer whose terms cancel each other is not converged: the ``reason`` says "degenerate".

    Raises
    ------
    TypeError, ValueError
        If ``x`` is not a finite array, ``rank`` is no number of terms, or ``init`` does not fit.

    Notes
    -----
    ``4 R`` flops an entry and two reads of ``x`` a sweep, by a dimension tree
    :cite:p:`phan2013fast`, with ``R`` flops more in the first product for the line search, whose
    step minimizes the exact polynomial of degree ``2 N`` :cite:p:`rajih2008enhanced`. The core has
    ``min(R + 5, n_k)`` in every mode :cite:p:`bro1998improving`, and the generalized eigenvectors
    are those of :cite:t:`sanchez1990tensorial`. Modes are updated in the order
    ``1, ..., N`` if ``x`` lies in C or Fortran order.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = CP(np.ones(3), [rng.standard_normal((n, 3)) for n in (8, 7, 6)])
    >>> solution = cp_als(truth.to_dense(), rank=3, rng=0)
    >>> solution.value, bool((solution.value - truth).norm() < 1e-10)
    (CP(8 x 7 x 6, rank 3, float64), True)
    """
    problem = Problem.of(x)
    shape = tuple(x.shape)
    rank = cp_rank(rank, shape)
    if not regularization >= 0:
        raise ValueError(f"regularization must be at least 0, got {regularization}")
    return decompose(
        problem,
        rank,
        None if init is None else given_factors(init, shape, rank),
        rng=rng,
        stop=stop,
        callback=callback,
        step=least_squares_step(problem.source.norm, regularization, line_search),
        compress=compress,
    )


def decompose(
    problem: Problem,
    rank: int,
    factors: list[Array] | None,
    *,
    rng: RNG,
    stop: Stop,
    callback: Callable[[int, float, CP], Any] | None,
    step: Callable[[State], tuple[State, float]],
    compress: bool | None,
) -> Solution:
    """:func:`cp_als` of whatever gives two products, its arguments checked."""
    source, generator = problem.source, np.random.default_rng(rng)
    if compress is None:
        compress = stop.max_iter >= _SWEEPS and _pays(source.shape, rank)
    algebraic = factors is None and has_pencils(source.shape, rank)
    core = Core.of(source, rank) if compress or algebraic else None
    rows = None if factors is None else problem.rows(factors)
    if core is not None and algebraic:
        rows = algebraic_rows(core, rank, generator)
    if rows is None:
        shape = tuple(source.shape[source.modes.index(k)] for k in range(len(source.shape)))
        rows = problem.rows(random_factors(problem.like, shape, rank, generator))
    if compress and core is not None:
        stage = _Stage(core.started(rows), core)
    else:
        stage = _Stage(started(source, rows), None)
    tol, last = stop.resolve(source.like.dtype), stop.max_iter - _POLISH

    def advance(stage: _Stage) -> tuple[_Stage, float]:
        state, change = step(stage.state)
        if stage.core is None:
            return _Stage(state, None), change
        if tol is not None and change <= tol:
            state, change = step(stage.core.lifted(state, source))
        elif state.sweeps < last:
            return _Stage(state, stage.core), change
        else:
            state = stage.core.lifted(state, source)
        return _Stage(state, None), change

    def value(stage: _Stage) -> CP:
        state, core = stage
        return problem.answer(state if core is None else core.lifted(state, source))

    with source.session():
        solution = iterate(
            advance, stage, stop=stop, dtype=source.like.dtype, callback=callback, value=value
        )
    return with_degeneracy(solution)


def _pays(shape: tuple[int, ...], rank: int) -> bool:
    """Whether sweeps over the core are worth its making."""
    smaller = math.prod(core_shape(shape, rank))
    return math.prod(shape) >= max(_ENTRIES, _SHRINKS * smaller)


class _Stage(NamedTuple):
    """A state, on the core of a tensor or, without one, on the tensor itself."""

    state: State
    core: Core | None


# A line search is made where a change is more than this part of the one before.
_SLOW = 0.5


def least_squares_step(
    norm: float, regularization: float, line_search: bool
) -> Callable[[State], tuple[State, float]]:
    """Step of :func:`~lowrank_sp.iterate.iterate`: one sweep of exact solves, after a line search.

    The change is ``sqrt(fall of the objective) / norm``. Without a line search that is the length
    of the path, mode by mode, that the tensor has moved.
    """

    def solve(rows: Array, gradient: Array, gram: np.ndarray) -> Array:
        return from_host(inverse(gram, 10 * eps(rows.dtype)), rows) @ gradient

    def step(state: State) -> tuple[State, float]:
        ridge = regularization * norm ** (2 - 2 / len(state.rows))
        first, gained = None, 0.0
        if line_search and state.slow:
            state, first, gained = extrapolated(state, ridge)
        following = sweep(state, solve, ridge, first)
        fall = following.fall + gained
        # Sweeps that gain much need no line search, which costs as much as half a sweep.
        slow = state.sweeps > 0 and fall > _SLOW**2 * state.fall
        return following._replace(fall=fall, slow=slow), math.sqrt(max(0.0, fall)) / (norm or 1.0)

    return step
