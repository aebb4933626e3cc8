"""A few pairs of bases for many adapters, each for those that it fits best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, namespace, to_host
from lowrank_sp.adapters.serving.rows import take
from lowrank_sp.adapters.serving.shared import SharedAdapters, Stack, identity
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.joint import joint_svd
from lowrank_sp.tensors.source import FactoredStack
from lowrank_sp.tensors.tucker import Tucker


class _State(NamedTuple):
    """Clusters of the adapters, the bases of every cluster, and what these keep of the stack."""

    clusters: np.ndarray
    bases: tuple[tuple[Array, Array], ...]
    kept: float


def jd_clustered(
    adapters: Sequence[Any],
    *,
    rank: int,
    clusters: int,
    init: Sequence[int] | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, SharedAdapters], Any] | None = None,
    normalize: bool = True,
) -> Solution:
    """A few pairs of bases, each for the adapters that it fits best: JD-Full by clusters.

    Bases for given clusters and clusters for given bases take turns, as in k-means, and neither
    raises the error. The result depends on the start.

    Parameters
    ----------
    adapters, rank, rng, stop, callback, normalize
        As in :func:`~lowrank_sp.adapters.serving.compress.jd_full`.
    clusters : int
        Number of clusters, at most that of adapters. None of them is empty.
    init : sequence of int, optional
        Cluster of every adapter. By default adapters are drawn as seeds, those that are fitted
        badly by the seeds so far with a higher probability.

    Returns
    -------
    Solution
        As of JD-Full, at ``clusters`` times the cost of a sweep.
    """
    stack = Stack.of(adapters, normalize)
    w = stack.matrices
    count, *shape = w.shape
    check_rank(rank, min(shape), tuple(shape))
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters must be in 1..{count} for {count} adapters, got {clusters}")
    generator = np.random.default_rng(rng)
    squares = (stack.norms / stack.scales) ** 2
    norm = float(np.sum(squares)) ** 0.5 or 1.0
    if init is None:
        labels = _seeded(w, squares, clusters, generator)
    else:
        labels = np.asarray(init)
        if labels.shape != (count,) or set(labels.tolist()) != set(range(clusters)):
            raise ValueError(
                f"init must give one of the clusters 0..{clusters - 1} to each of {count} "
                "adapters, and leave no cluster empty"
            )

    def fitted(members: np.ndarray, bases: tuple[Array, Array] | None) -> tuple[Array, Array]:
        part = LowRank(take(w.left, members), take(w.right, members))
        start = None
        if bases is not None:
            core = namespace(w.left).zeros(
                (len(members), *(basis.shape[1] for basis in bases)), dtype=w.dtype, device=w.device
            )
            start = Tucker(core, (identity(len(members), core), *bases))
        sweeps = Stop(1, tol=None) if bases is not None else Stop(0)
        _, left, right = joint_svd(
            part, rank=rank, init=start, rng=generator, stop=sweeps
        ).value.factors
        return left, right

    def step(state: _State) -> tuple[_State, float]:
        bases = tuple(
            fitted(np.flatnonzero(state.clusters == c), state.bases[c] if state.bases else None)
            for c in range(clusters)
        )
        kept = np.stack([_kept(w, left, right) for left, right in bases])
        best = np.max(kept, axis=0)
        labels, refilled = _without_empty(np.argmax(kept, axis=0), squares - best, clusters)
        bases = tuple(
            fitted(np.flatnonzero(labels == c), None) if c in refilled else pair
            for c, pair in enumerate(bases)
        )
        total = float(np.sum(best))
        change = abs(total**0.5 - state.kept**0.5)
        return _State(labels, bases, total), change / norm

    def value(state: _State) -> SharedAdapters:
        xp = namespace(w.left)
        bases = state.bases or tuple(
            fitted(np.flatnonzero(state.clusters == c), None) for c in range(clusters)
        )
        cores, errors = [None] * count, np.zeros(count)
        for c, (left, right) in enumerate(bases):
            members = np.flatnonzero(state.clusters == c)
            part = LowRank(take(w.left, members), take(w.right, members))
            core = _cores(part, left, right)
            found = FactoredStack.of(part, norm).distances(left, core, right.mT)
            errors[members] = to_host(found)
            for i, k in enumerate(members):
                cores[k] = core[i, ...]
        return stack.answer(
            xp.stack([left for left, _ in bases]),
            xp.stack([right.mT for _, right in bases]),
            xp.stack(cores),
            errors,
            state.clusters,
        )

    start = _State(labels, (), 0.0)
    return iterate(step, start, stop=stop, dtype=w.dtype, callback=callback, value=value)


def _cores(w: LowRank, left: Array, right: Array) -> Array:
    """``left^H W_i conj(right)``, for a model ``left @ core @ right^T``."""
    return (adjoint(left) @ w.left) @ (w.right @ adjoint(right.mT))


def _kept(w: LowRank, left: Array, right: Array) -> np.ndarray:
    """Squared norms of what a pair of bases keeps of every matrix."""
    cores = _cores(w, left, right)
    norms = namespace(cores).linalg.vector_norm(cores, axis=(-2, -1))
    return to_host(norms).astype(np.float64) ** 2


def _seeded(
    w: LowRank, squares: np.ndarray, clusters: int, generator: np.random.Generator
) -> np.ndarray:
    """Clusters around adapters that are drawn by how badly the ones before fit them."""
    xp = namespace(w.left)
    best, labels = np.full(len(squares), -np.inf), np.zeros(len(squares), dtype=int)
    lost, free = squares.copy(), np.ones(len(squares), dtype=bool)
    for c in range(clusters):
        weight = np.where(free, np.maximum(lost, 0.0) + 1e-12 * np.mean(squares) + 1e-300, 0.0)
        seed = int(generator.choice(len(squares), p=weight / weight.sum()))
        left, _ = xp.linalg.qr(w.left[seed, ...])
        right, _ = xp.linalg.qr(w.right[seed, ...].mT)
        kept = _kept(w, left, right)
        better = kept > best
        better[seed] = True
        better &= free
        best, labels = np.where(better, kept, best), np.where(better, c, labels)
        best[seed], free[seed] = np.inf, False
        lost = squares - np.where(np.isfinite(best), best, squares)
    return labels


def _without_empty(
    labels: np.ndarray, lost: np.ndarray, clusters: int
) -> tuple[np.ndarray, set[int]]:
    """Fill empty clusters by the adapters that lose most, out of clusters of more than one."""
    labels = labels.copy()
    empty = set(range(clusters)) - set(labels.tolist())
    for k in np.argsort(-lost, kind="stable"):
        sizes = np.bincount(labels, minlength=clusters)
        if sizes.min() > 0:
            break
        if sizes[labels[k]] > 1:
            labels[k] = int(np.argmin(sizes))
    return labels, empty
