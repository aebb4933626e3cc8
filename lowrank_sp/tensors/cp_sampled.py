"""CP decompositions by least squares on sampled fibres."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    eps,
    frobenius,
    from_host,
    namespace,
    to_host,
)
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.alternating import Problem, balanced, gram_of, inverse, started
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.cp_start import given_factors, random_factors
from lowrank_sp.tensors.modes import around
from lowrank_sp.tensors.mttkrp import Rows
from lowrank_sp.tensors.ranks import cp_rank

# Sweeps between two estimates of the error, the entries that these are made from, and the epochs
# within which it has to fall.
_EPOCH, _PROBES, _PATIENCE = 5, 2**14, 3


class _State(NamedTuple):
    """Rows after an epoch, the best so far, and the estimates of its error in recent epochs."""

    rows: list[Array]
    best: list[Array]
    errors: tuple[float, ...]
    epoch: int


def cp_arls(
    x: Array,
    *,
    rank: int | float,
    init: CP | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, CP], Any] | None = None,
    samples: int | None = None,
) -> Solution:
    r"""CP decomposition by alternating least squares on fibres drawn by leverage scores.

    Every least-squares problem of :func:`~lowrank_sp.tensors.cp_als.cp_als` is solved on ``S`` of
    its equations, drawn with the product of the leverage scores of the factors, and weighted. The
    tensor is read in the sampled fibres only: for tensors of which a pass is dear.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        As in :func:`~lowrank_sp.tensors.cp_als.cp_als`.
    rank : int or float
        As there.
    init : CP, optional
        Where to start, of this shape and rank; by default Gaussian factors.
    rng : int, Generator or None
        Seed of the start and of the samples.
    stop : Stop
        A step is an epoch of five sweeps. The change is by how much the error relative to ``x``,
        estimated from the same :math:`2^{14}` entries throughout, fell in the last three epochs.
    callback : callable, optional
        Called as ``callback(k, change, cp)`` after every epoch.
    samples : int, optional
        ``S``, by default ``20 R (1 + log R)``.

    Returns
    -------
    Solution
        ``value`` is the best :class:`~lowrank_sp.tensors.cp.CP` by that estimate, in canonical
        gauge, with its exact ``error``. Like the samples it is random.

    Raises
    ------
    TypeError, ValueError
        As in :func:`~lowrank_sp.tensors.cp_als.cp_als`.

    Notes
    -----
    ``2 S R (n_k + R)`` flops a mode and ``S n_k`` entries gathered :cite:p:`larsen2022practical`.
    ``x`` itself is read once at the start, for its norm, and once at the end, for the error.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = CP.of_factors([rng.standard_normal((n, 3)) for n in (30, 40, 50)])
    >>> solution = cp_arls(truth.to_dense(), rank=3, rng=0)
    >>> bool(solution.value.error < 1e-5 * truth.norm())
    True
    """
    problem = Problem.of(x)
    source, shape = problem.source, tuple(x.shape)
    rank = cp_rank(rank, shape)
    count = samples or math.ceil(20 * rank * (1 + math.log(rank)))
    if count < rank:
        raise ValueError(f"samples must be at least the rank, {rank}, got {count}")
    generator = np.random.default_rng(rng)
    if init is None:
        factors = random_factors(problem.like, shape, rank, generator)
    else:
        factors = given_factors(init, shape, rank)
    seed = int(generator.integers(2**62))
    entries = _Entries(source.like, source.shape)
    probes = np.stack([generator.integers(n, size=_PROBES) for n in source.shape])
    known = entries.at(probes)
    size = frobenius(known[:, None])

    def estimate(rows: Rows) -> float:
        fitted = CP.of_factors([r.mT for r in rows]).sample(probes.T)
        return frobenius((known - fitted)[:, None]) / size if size else 0.0

    def step(state: _State) -> tuple[_State, float]:
        draws, rows = np.random.default_rng((seed, state.epoch)), state.rows
        for _ in range(_EPOCH):
            rows = _sampled_sweep(entries, rows, count, draws)
        error, least = estimate(rows), state.errors[-1]
        best = rows if error < least else state.best
        errors = (*state.errors[-_PATIENCE:], min(error, least))
        return _State(rows, best, errors, state.epoch + 1), errors[0] - errors[-1]

    def value(state: _State) -> CP:
        return problem.answer(started(source, state.best))

    rows = problem.rows(factors)
    return iterate(
        step,
        _State(rows, rows, (estimate(rows),) * _PATIENCE, 0),
        stop=stop,
        dtype=source.like.dtype,
        callback=callback,
        value=value,
    )


class _Entries:
    """A tensor in memory, by its entries and fibres."""

    def __init__(self, matrix: Array, shape: tuple[int, ...]):
        self.flat, self.shape = namespace(matrix).reshape(matrix, (-1,)), shape

    def at(self, positions: np.ndarray) -> Array:
        """Entries at host positions of shape ``(N, ...)``."""
        index = np.ravel_multi_index(tuple(positions), self.shape)
        taken = self._taken(index.reshape(-1))
        return namespace(taken).reshape(taken, index.shape)

    def fibres(self, axis: int, positions: np.ndarray) -> Array:
        """Fibres along an axis through host positions ``(N, S)``: shape ``(S, n_axis)``."""
        _, n, trailing = around(self.shape, axis)
        positions = positions.copy()
        positions[axis] = 0
        first = np.asarray(np.ravel_multi_index(tuple(positions), self.shape))
        taken = self._taken((first[:, None] + trailing * np.arange(n)).reshape(-1))
        return namespace(taken).reshape(taken, (len(first), n))

    def _taken(self, index: np.ndarray) -> Array:
        xp = namespace(self.flat)
        return xp.take(self.flat, xp.asarray(index, device=device(self.flat)))


def _sampled_sweep(
    entries: _Entries, rows: Rows, count: int, rng: np.random.Generator
) -> list[Array]:
    rows = list(rows)
    grams = [gram_of(r) for r in rows]
    floor = 10 * eps(rows[0].dtype)
    chances = [_leverage(r, g, floor) for r, g in zip(rows, grams, strict=True)]
    for axis in range(len(rows)):
        xp = namespace(rows[axis])
        positions = np.zeros((len(rows), count), dtype=np.int64)
        weights = np.full(count, 1.0 / count)
        terms = xp.ones_like(rows[axis][:, :1])
        for k, chance in enumerate(chances):
            if k != axis:
                positions[k] = rng.choice(len(chance), size=count, p=chance)
                weights /= chance[positions[k]]
                index = xp.asarray(positions[k], device=device(rows[k]))
                terms = terms * xp.take(rows[k], index, axis=1)
        # Equations design @ A^T = fibres, weighted by the roots of their chances.
        roots = from_host(np.sqrt(weights / np.max(weights)), rows[axis])[:, None]
        design = terms.mT * roots
        residual = entries.fibres(axis, positions) * roots - design @ rows[axis]
        gram = inverse(gram_of(design.mT), floor)
        rows[axis] = rows[axis] + from_host(gram, design) @ (adjoint(design) @ residual)
        chances[axis] = _leverage(rows[axis], gram_of(rows[axis]), floor)
    return balanced(rows, [gram_of(r) for r in rows])[0]


def _leverage(rows: Array, gram: np.ndarray, floor: float) -> np.ndarray:
    """Leverage scores of the rows of a factor, normalized to chances."""
    xp = namespace(rows)
    products = from_host(inverse(gram, floor), rows) @ rows
    scores = to_host(xp.sum(xp.real(xp.conj(rows) * products), axis=0)).astype(np.float64)
    scores = np.maximum(scores, 0.0) + 1e-3 / len(scores)
    return scores / np.sum(scores)
