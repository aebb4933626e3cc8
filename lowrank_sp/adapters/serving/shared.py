"""Adapters as small cores between shared bases, and the normalized stack that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import Array, device, from_host, namespace, power_of_two, to_host
from lowrank_sp.adapters._products import check_alike, products_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.serving.rows import assembled, host_ids, in_dtype_of, segments, take
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.alternating import moved
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.factored import on_host
from lowrank_sp.tensors.joint import stacked
from lowrank_sp.tensors.source import FactoredStack
from lowrank_sp.tensors.tucker import Tucker


@dataclass(frozen=True, repr=False)
class SharedAdapters:
    """Adapters as small cores between shared bases: ``left[c] @ core_i @ right[c]``, ``c`` that of
    the cluster of ``i``.

    Attributes
    ----------
    left : array, shape (C, m, k)
    right : array, shape (C, k, n)
        Orthonormal, but where cores are diagonal.
    cores : array, shape (N, k, k), or (N, k) for diagonal ones
        Scales included.
    clusters : tuple of int
        In ``0..C - 1``, one an adapter.
    errors, norms : tuple of float
        Frobenius norms of the adapters minus what :meth:`adapter` gives, and of the adapters.
    """  # noqa: D205

    left: Array
    right: Array
    cores: Array
    clusters: tuple[int, ...]
    errors: tuple[float, ...]
    norms: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.clusters)

    def __repr__(self) -> str:
        m, n = self.shape
        kind = "diagonal" if self.cores.ndim == 2 else "dense"
        return (
            f"SharedAdapters({len(self)} adapters of {m} x {n}, {kind} cores of "
            f"{self.left.shape[2]}, {self.left.shape[0]} clusters, {self.left.dtype})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight."""
        return self.left.shape[1], self.right.shape[2]

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return sum(int(np.prod(a.shape)) for a in (self.left, self.right, self.cores))

    @property
    def error(self) -> float:
        """Root of the mean square of the relative errors, which is what was minimized."""
        return float(np.sqrt(np.mean(self.relative_errors**2)))

    @property
    def relative_errors(self) -> np.ndarray:
        """Errors over norms, one an adapter; 0 for one that is zero."""
        norms = np.array(self.norms)
        return np.array(self.errors) / np.where(norms > 0, norms, 1.0)

    def adapter(self, i: int) -> LowRank:
        """One adapter as a product of two factors, of rank ``k``."""
        c = self.clusters[i]
        left, core = self.left[c, ...], self.cores[i, ...]
        return LowRank(left * core if core.ndim == 1 else left @ core, self.right[c, ...])

    def apply(self, x: Array, ids: Any) -> Array:
        """``y[t] = left @ (core_i @ (right @ x[t]))`` with the adapter ``i = ids[t]`` of every row.

        Parameters
        ----------
        x : array, shape (T, n)
        ids : array or sequence of int, shape (T,)
            In ``0..N - 1``; -1 where a row uses no adapter, whose ``y`` is 0.

        Returns
        -------
        array, shape (T, m)
            Of the dtype of ``x``, if floating. One product of all rows of a cluster with each
            basis, and of every row with its core: ``2 (m + n) k + 2 k^2`` flops a row, one read of
            the bases.
        """
        xp = namespace(x, self.left)
        if x.ndim != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"x must have shape (T, {self.shape[1]}), got {tuple(x.shape)}")
        found = host_ids(ids, x.shape[0], len(self))
        dtype = xp.result_type(x.dtype, self.left.dtype)
        left, right, all_cores, rows = (
            xp.astype(a, dtype, copy=False) for a in (self.left, self.right, self.cores, x)
        )
        of_row = np.array([*self.clusters, -1])[found]
        order, same = segments(of_row)

        def part(c: int, places: np.ndarray) -> Array:
            inner = take(rows, places) @ right[c, ...].mT
            cores = take(all_cores, found[places])
            middle = cores * inner if cores.ndim == 2 else (cores @ inner[..., None])[..., 0]
            return middle @ left[c, ...].mT

        parts = ((order[a:b], part(c, order[a:b])) for c, a, b in same)
        y = assembled(parts, (x.shape[0], self.shape[0]), rows, dtype)
        return in_dtype_of(x, y)


class Stack(NamedTuple):
    """What is decomposed: ``matrices`` times ``scales``, whose norms are ``norms``.

    Computed on the host where ``like``, an array of the adapters, lies there.
    """

    matrices: LowRank
    scales: np.ndarray
    norms: np.ndarray
    like: Array

    @classmethod
    def of(cls, adapters: Sequence[Any], normalize: bool) -> Stack:
        pairs = products_of(list(adapters), "adapter")
        check_alike(pairs, "adapter", ("shape",))
        parts, sizes = zip(*map(_of_unit_size, pairs), strict=True)
        w = stacked(parts)
        norms = to_host(w.norm()).astype(np.float64) * sizes
        representable = norms <= float(namespace(w.left).finfo(w.dtype).max)
        if not np.all(representable):
            wrong = int(np.argmin(representable))
            raise ValueError(
                f"adapters must be finite, got NaN or infinite entries in adapter {wrong}"
            )
        largest = np.max(norms) or 1.0
        scales = np.where(norms > 0, norms, 1.0) if normalize else np.full(len(pairs), largest)
        unit = LowRank(w.left * column(sizes / scales, w.left), w.right)
        return cls(unit, scales, norms, pairs[0].up)

    @property
    def source(self) -> FactoredStack:
        """The matrices, as methods for tensors take them."""
        return FactoredStack.of(self.matrices, float(np.linalg.norm(self.norms / self.scales)))

    def unscaled(self, cores: Array) -> Array:
        """Cores of adapters as cores of the matrices."""
        return cores / column(self.scales, cores)

    def tucker(self, t: Tucker) -> SharedAdapters:
        """The answer of dense cores between one pair of bases."""
        core, (_, left, right) = t
        errors = self.source.distances(left, core, right.mT)
        return self.answer(left[None, ...], right.mT[None, ...], core, errors)

    def cp(self, cp: CP) -> SharedAdapters:
        """The answer of diagonal cores."""
        cores, left, right = cp.unweighted()
        dense = cores[:, None, :] * identity(cores.shape[1], cores)
        errors = self.source.distances(left, dense, right.mT)
        return self.answer(left[None, ...], right.mT[None, ...], cores, errors)

    def answer(
        self,
        left: Array,
        right: Array,
        cores: Array,
        errors: Any,
        clusters: np.ndarray | None = None,
    ) -> SharedAdapters:
        """In the library of the adapters, and in their scales."""
        count = len(self.scales)
        clusters = np.zeros(count, dtype=int) if clusters is None else clusters
        parts = (left, right, cores * column(self.scales, cores))
        errors = to_host(errors).astype(np.float64) * self.scales
        left, right, cores = (moved(part, self.like) for part in parts)
        return SharedAdapters(
            left,
            right,
            cores,
            tuple(clusters.tolist()),
            tuple(errors.tolist()),
            tuple(self.norms.tolist()),
        )


def _of_unit_size(product: Product) -> tuple[LowRank, float]:
    """A product with factors of about one, and the number it is to be multiplied by.

    Squares of norms in between would leave the range of single precision from 1e19 on, and from
    1e-19 down.
    """
    sides = on_host(product.up), on_host(product.down)
    powers = [power_of_two(side) for side in sides]
    left, right = (side / power for side, power in zip(sides, powers, strict=True))
    sign = float(np.sign(product.scale))
    return LowRank(left * sign, right), abs(product.scale) * powers[0] * powers[1]


def identity(size: int, like: Array) -> Array:
    """Identity in the library, dtype and device of ``like``."""
    return namespace(like).eye(size, dtype=like.dtype, device=device(like))


def column(norms: np.ndarray, like: Array) -> Array:
    """Norms along the first axis of ``like``."""
    return from_host(norms.reshape(-1, *[1] * (like.ndim - 1)), like)
