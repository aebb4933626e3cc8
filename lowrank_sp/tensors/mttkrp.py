"""Products of a tensor with Khatri-Rao products, and the dimension tree that shares them.

Factors are held here as *rows*, of shape ``(R, n_k)``: every partial product then has the rank as
its leading axis, so that all but the two products that read the tensor are matrix-vector products
on contiguous memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, device, frobenius, is_complex, namespace, slices
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.modes import around, check_mode

Rows = Sequence[Array]
# From an axis, its MTTKRP (R, n) and its rows to its new rows.
Update = Callable[[int, Array, Array], Array]

# Entries of a residual that are formed at a time.
_BLOCK = 2**20


def mttkrp(x: Array, factors: Sequence[Array], mode: int) -> Array:
    r"""Matricized tensor times Khatri-Rao product.

    .. math:: M = X_{(n)} \, \overline{A_1 \odot \dots \odot A_{n-1} \odot A_{n+1} \dots \odot A_N}

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    factors : sequence of N arrays of shape (n_k, R)
        The one at ``mode`` gives ``R`` only.
    mode : int

    Returns
    -------
    array, shape (n_mode, R)
        One product of ``2 R`` flops an entry on a view of ``x``, which contracts the larger of the
        groups of modes before and after ``mode``, and matrix-vector products for the other one.

    Examples
    --------
    >>> import numpy as np
    >>> mttkrp(np.ones((2, 3, 4)), [np.ones((n, 1)) for n in (2, 3, 4)], 1).T
    array([[8., 8., 8.]])
    """
    xp = namespace(x, *factors)
    mode = check_mode(mode, x.ndim)
    rows = [f.mT for f in factors]
    leading, n, trailing = around(x.shape, mode)
    before = khatri_rao_rows(rows[:mode], like=rows[mode])
    after = khatri_rao_rows(rows[mode + 1 :], like=rows[mode])
    if trailing >= leading:
        partial = conjugate(after) @ xp.reshape(x, (leading * n, trailing)).mT
        return contracted(partial, leading, before, last=False).mT
    partial = conjugate(before) @ xp.reshape(x, (leading, n * trailing))
    return contracted(partial, n, after, last=True).mT


def khatri_rao_rows(rows: Rows, *, like: Array) -> Array:
    """Khatri-Rao product of rows, ``(R, n_1), (R, n_2), ... -> (R, n_1 n_2 ...)``; ones if none."""
    xp = namespace(like)
    if not rows:
        return xp.ones((like.shape[0], 1), dtype=like.dtype, device=device(like))
    return reduce(lambda a, b: xp.reshape(a[:, :, None] * b[:, None, :], (a.shape[0], -1)), rows)


def conjugate(a: Array) -> Array:
    """Complex conjugate; real arrays as they are."""
    return namespace(a).conj(a) if is_complex(a.dtype) else a


def contracted(partial: Array, first: int, rows: Array, *, last: bool) -> Array:
    """Term by term, ``(R, first, rest)`` without its last group of modes, or its first one."""
    xp = namespace(partial, rows)
    cube = xp.reshape(partial, (partial.shape[0], first, -1))
    rows = conjugate(rows)
    return (cube @ rows[:, :, None])[:, :, 0] if last else (rows[:, None, :] @ cube)[:, 0, :]


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
    def dtype(self) -> Any:
        """Dtype of the tensor."""

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
    def dtype(self) -> Any:
        return self.matrix.dtype

    def tensor(self) -> Array:
        """The tensor, its modes in the order of the axes."""
        return namespace(self.matrix).reshape(self.matrix, self.shape)

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
    def dtype(self) -> Any:
        return self.stack.dtype

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
        scaled = left.mT[None, :, :] * weights.mT[:, None, :]
        xp = namespace(scaled)
        model = LowRank(scaled, xp.broadcast_to(right, (weights.shape[1], *right.shape)))
        return frobenius((self.stack - model).norm()[:, None])
