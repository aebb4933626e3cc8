"""A tensor as alternating methods see it: two products, and the dimension tree that they feed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    frobenius,
    namespace,
    slices,
    standard_normal,
)
from lowrank_sp._threads import matmul
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.hosvd import st_hosvd
from lowrank_sp.tensors.modes import mode_dot, session
from lowrank_sp.tensors.mttkrp import Rows, conjugate, contracted, khatri_rao_rows
from lowrank_sp.tensors.subspace import gram_is_cheap, improved, leading_subspace

# From an axis, its MTTKRP (R, n) and its rows to its new rows.
Update = Callable[[int, Array, Array], Array]

# Entries of a residual that are formed at a time.
_BLOCK = 2**20
# Improvements of a sketch for a subspace to start from.
_STEPS = 3


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

    def session(self) -> AbstractContextManager[Any]:
        """Context for all that is done to the tensor."""
        return nullcontext()

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
        return matmul(conjugate(rows), self.matrix.mT if last else self.matrix)

    def session(self) -> AbstractContextManager[Any]:
        return session(self.matrix)

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
    def of(cls, stack: LowRank, norm: float | None = None) -> FactoredStack:
        """From factors of shapes ``(L, m, r)`` and ``(L, r, n)``, and its norm if that is known."""
        norm = frobenius(stack.norm()[:, None]) if norm is None else norm
        return cls(stack, stack.shape, (0, 1, 2), 2, norm)

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
        unit = namespace(weights).eye(left.shape[0], dtype=left.dtype, device=device(left))
        return frobenius(self.distances(left.mT, weights.mT[:, None, :] * unit, right))

    def distances(self, left: Array, cores: Array, right: Array) -> Array:
        """Frobenius norms of the matrices minus ``left @ cores[l] @ right``, of shape ``(L,)``.

        Inside and outside of the two shared spaces differences are formed apart, so that those of
        near matrices keep their digits; by blocks of matrices, ``O((m + n) r k)`` flops each.
        """
        xp = namespace(left, cores, right)
        (u, r_u), (v, r_v) = xp.linalg.qr(left), xp.linalg.qr(adjoint(right))
        (count, m, r), n = self.stack.left.shape, right.shape[1]
        found = []
        for part in slices(count, max(1, _BLOCK // ((m + n) * r))):
            b, a = self.stack.left[part, ...], self.stack.right[part, ...]
            b_in, a_in = adjoint(u) @ b, a @ v
            _, b_out = xp.linalg.qr(b - u @ b_in)
            _, a_out = xp.linalg.qr(adjoint(a - a_in @ adjoint(v)))
            a_out = adjoint(a_out)
            inside = b_in @ a_in - r_u @ cores[part, ...] @ adjoint(r_v)
            blocks = (inside, b_in @ a_out, b_out @ a_in, b_out @ a_out)
            norms = [xp.linalg.vector_norm(block, axis=(-2, -1)) for block in blocks]
            found.append(xp.linalg.vector_norm(xp.stack(norms), axis=0))
        return xp.concat(found)

    def subspace(
        self, other: Array | None, rank: int, start: Array | None = None, rng: RNG = None
    ) -> Array:
        """Leading left subspace of the matrices times ``other (n, k)``, or of them themselves.

        The matrices are never multiplied out: ``W other`` has the Gram matrix of ``left R^H``, with
        the triangular factor ``R`` of ``(right other)^H``, of no more columns than ``left``.

        Parameters
        ----------
        other : array, shape (n, k), or None
        rank : int
        start : array, shape (m, rank), optional
            Where an exact subspace is too dear, this one is improved.
        rng : int, Generator or None
            For a start from a sketch, where none is given.
        """
        xp = namespace(self.stack.left)
        left, small = self.stack.left, self.stack.right
        small = small if other is None else small @ other
        if small.shape[1] < small.shape[2]:
            small = adjoint(xp.linalg.qr(adjoint(small))[1])
        x = left @ small
        if gram_is_cheap(x, 1, rank):
            return leading_subspace(x, 1, rank=rank)[0]
        if start is not None:
            return improved(x, start)
        omega = standard_normal((*x.shape[::2], rank), like=x, rng=rng)
        start, _ = xp.linalg.qr(xp.sum(x @ omega, axis=0))
        return reduce(lambda u, _: improved(x, u), range(_STEPS), start)

    @property
    def mT(self) -> FactoredStack:
        """The stack of the transposed matrices."""
        (count, m, n), modes = self.shape, self.modes
        return FactoredStack(self.stack.mT, (count, n, m), modes, self.split, self.norm)

    def core(self, sizes: Sequence[int]) -> tuple[Array, tuple[Array, ...]]:
        xp = namespace(self.stack.left)
        # What follows refines the core, so that any sketch will do.
        u = self.subspace(None, sizes[1], rng=0)
        v = self.mT.subspace(conjugate(u), sizes[2], rng=1)
        core = (adjoint(u) @ self.stack.left) @ (self.stack.right @ conjugate(v))
        unit = xp.eye(self.shape[0], dtype=u.dtype, device=device(u))
        if sizes[0] < self.shape[0]:
            unit, _ = leading_subspace(core, 0, rank=sizes[0])
            core = mode_dot(core, adjoint(unit), 0)
        return core, (unit, u, v)
