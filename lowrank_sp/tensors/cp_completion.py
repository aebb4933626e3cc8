"""CP completion: a tensor of few terms from some of its entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    device,
    eps,
    frobenius,
    from_host,
    inner,
    namespace,
    slices,
    to_host,
)
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.alternating import balanced, gram_of, moved, with_degeneracy
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.cp_start import given_factors, random_factors
from lowrank_sp.tensors.entries import TensorEntries, check_enough, of_unit_size, with_gaps
from lowrank_sp.tensors.line_search import lowest, squares_along, times_line
from lowrank_sp.tensors.ranks import cp_rank

# Numbers gathered at a time.
_CHUNK = 2**22


class _State(NamedTuple):
    """Factors, those of the sweep before, and the entries of their tensor that were observed."""

    factors: list[Array]
    before: list[Array] | None
    fitted: Array


def cp_completion(
    entries: TensorEntries,
    *,
    rank: int | float,
    init: CP | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, CP], Any] | None = None,
    regularization: float = 0.0,
    line_search: bool = True,
) -> Solution:
    r"""CP decomposition of a tensor with missing entries, by alternating least squares.

    .. math:: \min \; \sum_{i \in \Omega} \Bigl| x_i - \sum_{r=1}^R \prod_k (A_k)_{i_k r} \Bigr|^2
              + \rho \sum_k \lVert A_k \rVert_F^2

    Only the observed entries are read: none is imputed, and the tensor is not formed.

    Parameters
    ----------
    entries : TensorEntries
        For an array with missing entries, ``TensorEntries.from_nan(x)`` or ``from_mask(x, mask)``.
    rank : int or float
        As in :func:`~lowrank_sp.tensors.cp_als.cp_als`.
    init : CP, optional
        Where to start, of this shape and rank; by default Gaussian factors.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change is that of the tensor at the observed positions, relative to the data.
    callback : callable, optional
        Called as ``callback(k, change, cp)`` after every sweep.
    regularization : float
        ``rho`` for entries of unit norm, so that it has no units.
    line_search : bool
        Whether to start a sweep at the lowest point of the line through the last two results.

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.tensors.cp.CP` in canonical gauge. It is zero, and
        ``converged`` is False, where an index has no entry; the ``reason`` names it.

    Raises
    ------
    ValueError
        If there are no entries, ``rank`` is no number of terms, or ``init`` does not fit. Without
        regularization also if the terms have more degrees of freedom than there are entries.

    Notes
    -----
    ``N M (R^2 + 4 R)`` multiplications a sweep for ``M`` entries :cite:p:`tomasi2005parafac`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = CP(np.ones(2), [rng.standard_normal((n, 2)) for n in (10, 9, 8)])
    >>> entries = TensorEntries.from_mask(truth.to_dense(), rng.random((10, 9, 8)) < 0.3)
    >>> solution = cp_completion(entries, rank=2, rng=1)
    >>> bool((solution.value - truth).norm() < 1e-5 * truth.norm())
    True
    """
    data, unit = of_unit_size(entries)
    rank = cp_rank(rank, entries.shape)
    if entries.size == 0:
        raise ValueError("completion needs observed entries, got none")
    if not regularization >= 0:
        raise ValueError(f"regularization must be at least 0, got {regularization}")
    if regularization == 0:
        check_enough(data, rank * (sum(data.shape) - data.ndim + 1))
    norm = data.norm()
    ridge = regularization * norm ** (2 - 2 / data.ndim)

    def step(state: _State) -> tuple[_State, float]:
        factors = state.factors
        if line_search and state.before is not None:
            factors = _extrapolated(data, state, ridge)
        factors = _sweep(data, factors, ridge)
        fitted = CP.of_factors(factors).sample(data.indices)
        change = frobenius(fitted - state.fitted) / norm if norm else 0.0
        return _State(factors, state.factors, fitted), change

    def value(state: _State) -> CP:
        factors = [moved(f, entries.values) for f in state.factors]
        weights, factors = CP.of_factors(factors).canonical()
        return CP(weights * unit, factors)

    solution = iterate(
        step,
        _start(data, rank, init, rng, norm, unit),
        stop=stop,
        dtype=data.values.dtype,
        callback=callback,
        value=value,
    )
    return with_gaps(with_degeneracy(solution), data)


def _start(
    data: TensorEntries, rank: int, init: CP | None, rng: RNG, norm: float, unit: float
) -> _State:
    if init is None:
        factors = random_factors(data.values, data.shape, rank, rng)
    else:
        given = given_factors(init, data.shape, rank)
        factors = [moved(f, data.values) * unit ** (-1 / data.ndim) for f in given]
    for mode, lines in data.unobserved():
        kept = np.ones((data.shape[mode], 1))
        kept[lines] = 0.0
        factors[mode] = factors[mode] * from_host(kept, factors[mode])
    fitted = CP.of_factors(factors).sample(data.indices)
    size = frobenius(fitted)
    if init is None and size > 0:
        factors = [f * (norm / size) ** (1 / data.ndim) for f in factors]
        fitted = fitted * (norm / size)
    return _State(factors, None, fitted)


def _sweep(data: TensorEntries, factors: Sequence[Array], ridge: float) -> list[Array]:
    factors = list(factors)
    for mode in range(data.ndim):
        cp = CP.of_factors(factors)

        def design(chosen: np.ndarray, cp: CP = cp, mode: int = mode) -> Array:
            return cp.contracted(data.indices[chosen], mode)

        factors[mode], _ = data.least_squares(mode, design, factors[mode], ridge)
    rows = [f.mT for f in factors]
    return [r.mT for r in balanced(rows, [gram_of(r) for r in rows])[0]]


def _extrapolated(data: TensorEntries, state: _State, ridge: float) -> list[Array]:
    """Factors at the lowest point of the line through the last two results."""
    steps = [new - old for new, old in zip(state.factors, state.before or [], strict=True)]
    xp, rank = namespace(data.values), state.factors[0].shape[1]
    gram = 0.0
    for part in slices(data.size, max(1, _CHUNK // rank)):
        powers = [xp.ones((1, 1), dtype=data.values.dtype, device=device(data.values))]
        for mode, (factor, move) in enumerate(zip(state.factors, steps, strict=True)):
            index = xp.asarray(data.indices[part, mode], device=device(factor), copy=True)
            rows, step = xp.take(factor, index, axis=0), xp.take(move, index, axis=0)
            powers = times_line(powers, rows, step, lambda a, b: a * b)
        fitted = [-xp.sum(p, axis=1) for p in powers]
        columns = xp.stack([data.values[part] + fitted[0], *fitted[1:]], axis=1)
        gram = gram + np.real(to_host(inner(columns, columns)))
    objective = [np.trace(np.fliplr(gram), k) for k in range(data.ndim, -data.ndim - 1, -1)]
    objective = np.array(objective)
    objective[:3] += ridge * squares_along(state.factors, steps)
    t = lowest(objective)
    fall = objective[0] - np.polynomial.polynomial.polyval(t, objective)
    if not fall > 100 * eps(data.values.dtype) * objective[0]:
        return state.factors
    return [f + t * step for f, step in zip(state.factors, steps, strict=True)]
