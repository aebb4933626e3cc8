"""A tensor as alternating methods see it: two products, and the dimension tree that they feed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_sp._arrays import Array, adjoint, device, frobenius, namespace, slices
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.hosvd import st_hosvd
from lowrank_sp.tensors.modes import mode_dot
from lowrank_sp.tensors.mttkrp import Rows, conjugate, contracted, khatri_rao_rows
from lowrank_sp.tensors.subspace import leading_subspace

# From an axis, its MTTKRP (R, n) and its rows to its new rows.
Update = Callable[[int, Array, Array], Array]

# Entries of a residual that are formed at a time.
_BLOCK = 2**20


class Source(ABC):
    """A tensor as a matrix: the axes before ``split`` are its rows, the others its columns.

    ``modes`` names the mode of every axis. What alternating methods need of a tensor are two
    products, each of which reads it once.
    """

    shape: tuple[int, ...]
    modes: tuple[int, ...]
    split: int
    norm: float

    @abstractmethod
    def product(self, rows: Array, *, last: bool) -> Array:
        """``conj(rows)`` times the columns of the matrix (``last``) or its rows: ``(R, rest)``."""

    @abstractmethod
    def distance(self, rows: Rows) -> float:
        """Frobenius norm of this tensor minus the sum of the outer products of ``rows``."""

    @abstractmethod
    def core(self, sizes: Sequence[int]) -> tuple[Array, tuple[Array, ...]]:
        """Core and orthonormal bases of a sequentially truncated HOSVD, one an axis."""

    @property
    def halves(self) -> list[range]:
        """Axes of the rows and of the columns, in the order in which they are visited."""
        return self._ordered(range(self.split), range(self.split, len(self.shape)))

    def _ordered(self, *groups: range) -> list[range]:
        groups = tuple(group for group in groups if group)
        return sorted(groups, key=lambda group: min(self.modes[axis] for axis in group))

    def partial(self, kept: range, rows: Rows) -> Array:
        """One of the two products: all axes but the ``kept`` half are contracted."""
        last = kept.start == 0
        gone = rows[kept.stop :] if last else rows[: kept.start]
        return self.product(khatri_rao_rows(gone, like=rows[kept.start]), last=last)

    @property
    @abstractmethod
    def like(self) -> Array:
        """An array of the library, dtype and device of the products."""

    def sweep(self, rows: Rows, update: Update, first: Array | None = None) -> list[Array]:
        """Give every axis its MTTKRP and new rows in turn, in two reads of the tensor.

        A dimension tree: each product serves one half of the axes, and is contracted further with
        the newest rows of that half, so that the result is that of one MTTKRP a mode.

        Parameters
        ----------
        rows : sequence of N arrays of shape (R, n_k)
        update : callable
        first : array, optional
            The partial product of the first half, where it is known.
        """
        rows = list(rows)

        def visit(partial: Array, axes: range) -> None:
            if len(axes) == 1:
                rows[axes.start] = update(axes.start, partial, rows[axes.start])
                return
            middle = halfway([self.shape[axis] for axis in axes]) + axes.start
            size = math.prod(self.shape[axes.start : middle])
            before, after = range(axes.start, middle), range(middle, axes.stop)
            for kept in self._ordered(before, after):
                gone = after if kept is before else before
                product = khatri_rao_rows([rows[axis] for axis in gone], like=rows[0])
                visit(contracted(partial, size, product, last=kept is before), kept)

        for k, half in enumerate(self.halves):
            known = first if k == 0 else None
            visit(self.partial(half, rows) if known is None else known, half)
        return rows


def halfway(shape: Sequence[int]) -> int:
    """Where to split a shape so that both groups have the smallest total size; 1 for one mode."""
    sizes = [math.prod(shape[:k]) + math.prod(shape[k:]) for k in range(1, len(shape))]
    # Of equal splits the later one: the columns of the matrix are then fewer.
    return len(sizes) - int(np.argmin(sizes[::-1])) if sizes else 1


@dataclass(frozen=True)
class Dense(Source):
    """A tensor in memory, its axes in the order in which they lie there."""

    matrix: Array
    shape: tuple[int, ...]
    modes: tuple[int, ...]
    split: int
    norm: float

    @classmethod
    def of(cls, x: Array, norm: float) -> Dense:
        """A view of ``x`` in C or Fortran order, or any permutation; a copy if it has gaps."""
        modes = tuple(range(x.ndim))
        if isinstance(x, np.ndarray) and not x.flags.c_contiguous:
            steps = [-abs(step) for step in x.strides]
            modes = tuple(int(axis) for axis in np.argsort(steps, kind="stable"))
            x = np.ascontiguousarray(x.transpose(modes))
        split = halfway(x.shape)
        matrix = namespace(x).reshape(x, (math.prod(x.shape[:split]), -1))
        return cls(matrix, tuple(x.shape), modes, split, norm)

    @property
    def like(self) -> Array:
        return self.matrix

    @property
    def tensor(self) -> Array:
        """The tensor, its modes in the order of the axes."""
        return namespace(self.matrix).reshape(self.matrix, self.shape)

    def core(self, sizes: Sequence[int]) -> tuple[Array, tuple[Array, ...]]:
        core, bases = st_hosvd(self.tensor, tuple(sizes))
        return core, tuple(bases)

    def product(self, rows: Array, *, last: bool) -> Array:
        return conjugate(rows) @ (self.matrix.mT if last else self.matrix)

    def distance(self, rows: Rows) -> float:
        left = khatri_rao_rows(rows[: self.split], like=rows[0])
        right = khatri_rao_rows(rows[self.split :], like=rows[0])
        total = 0.0
        for part in slices(self.matrix.shape[0], max(1, _BLOCK // self.matrix.shape[1])):
            total = math.hypot(total, frobenius(self.matrix[part, :] - left[:, part].mT @ right))
        return total


@dataclass(frozen=True)
class FactoredStack(Source):
    """A stack of ``L`` matrices as a tensor of shape ``(L, m, n)`` that is never formed."""

    stack: LowRank
    shape: tuple[int, ...]
    modes: tuple[int, ...]
    split: int
    norm: float

    @classmethod
    def of(cls, stack: LowRank) -> FactoredStack:
        """From factors of shapes ``(L, m, r)`` and ``(L, r, n)``."""
        return cls(stack, stack.shape, (0, 1, 2), 2, frobenius(stack.norm()[:, None]))

    @property
    def like(self) -> Array:
        return self.stack.left

    def product(self, rows: Array, *, last: bool) -> Array:
        xp = namespace(rows)
        rows, (left, right) = conjugate(rows), self.stack.factors()
        if last:
            products = (rows @ right.mT) @ left.mT
            return xp.reshape(xp.permute_dims(products, (1, 0, 2)), (rows.shape[0], -1))
        cube = xp.reshape(rows, (rows.shape[0], *left.shape[:2]))
        return xp.sum((xp.permute_dims(cube, (1, 0, 2)) @ left) @ right, axis=0)

    def distance(self, rows: Rows) -> float:
        weights, left, right = rows
        return self.distance_to(left.mT[None, :, :] * weights.mT[:, None, :], right)

    def distance_to(self, left: Array, right: Array) -> float:
        """Frobenius norm of this stack minus ``left[l] @ right``."""
        xp = namespace(left, right)
        model = LowRank(left, xp.broadcast_to(right, (left.shape[0], *right.shape)))
        return frobenius((self.stack - model).norm()[:, None])

    def core(self, sizes: Sequence[int]) -> tuple[Array, tuple[Array, ...]]:
        xp = namespace(self.stack.left)
        left, right = self.stack.factors()
        _, r = xp.linalg.qr(right.mT)
        u, _ = leading_subspace(left @ r.mT, 1, rank=sizes[1])
        left = adjoint(u) @ left
        _, r = xp.linalg.qr(left)
        v, _ = leading_subspace(r @ right, 2, rank=sizes[2])
        core = left @ (right @ conjugate(v))
        unit = xp.eye(self.shape[0], dtype=u.dtype, device=device(u))
        if sizes[0] < self.shape[0]:
            unit, _ = leading_subspace(core, 0, rank=sizes[0])
            core = mode_dot(core, adjoint(unit), 0)
        return core, (unit, u, v)
