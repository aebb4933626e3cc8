"""Operators on data: arrays, row blocks, sparse matrices, SciPy operators, Dask arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    compute_dtype,
    detached,
    device,
    frobenius,
    has_numba,
    is_array,
    is_complex,
    namespace,
    standard_normal,
)
from lowrank_sp._threads import blas_on_one_thread
from lowrank_sp.operators._base import LinearOperator

# Rows read at a time from data that is not multiplied in place.
_BLOCK_BYTES = 2**25
# Entries from which the compiled product pays: BLAS multiplies a matrix in the L2 cache as fast.
_FUSED_SIZE = 2**19


def as_operator(a: Any) -> LinearOperator:
    """``a`` as a :class:`LinearOperator`.

    Parameters
    ----------
    a : array of shape (m, n), SciPy sparse matrix, SciPy or lowrank_sp linear operator, Dask array
        A memory-mapped or half-precision array is multiplied row block by row block, so that no
        whole copy of it is made.

    Raises
    ------
    TypeError
        If ``a`` is none of these.
    ValueError
        If an array is not two-dimensional.
    """
    if isinstance(a, LinearOperator):
        return a
    if is_array(a):
        if a.ndim != 2:
            raise ValueError(f"an operator needs a matrix, got an array of shape {tuple(a.shape)}")
        a = detached(a)
        in_place = a.dtype == compute_dtype(namespace(a), a.dtype)
        return Dense(a) if in_place and not isinstance(a, np.memmap) else Rows.of_array(a)
    library = type(a).__module__.partition(".")[0]
    if library == "dask":
        return Dask(a)
    if library == "scipy":
        from scipy.sparse import issparse

        return Sparse(a) if issparse(a) else SciPy(a)
    raise TypeError(
        f"expected an array, a sparse matrix or a linear operator, got {type(a).__name__}; "
        "wrap lists with numpy.asarray"
    )


class Dense(LinearOperator):
    """A matrix in memory, in its compute dtype."""

    in_memory = True

    def __init__(self, a: Array):
        xp = namespace(a)
        super().__init__(a.shape, xp.empty((0, 0), dtype=a.dtype, device=device(a)))
        self.array = a
        self.one_read = _has_fused_product(a)
        if self.one_read:
            self.block_columns = 4

    def matmul(self, x: Array) -> Array:
        return self.array @ x

    def rmatmul(self, x: Array) -> Array:
        if self.one_read and 1 < x.shape[1] <= 8:
            from lowrank_sp._compiled import products

            return products.rmatmul(self.array, x)
        # x^H A reads A along its rows, which BLAS libraries do faster than A^H x.
        return adjoint(adjoint(x) @ self.array)

    def normal(self, x: Array) -> tuple[Array, Array]:
        if self.one_read and 0 < x.shape[1] <= 16:
            from lowrank_sp._compiled import products

            return products.normal(self.array, x)
        return super().normal(x)

    def session(self) -> AbstractContextManager[Any]:
        if not self.one_read:
            return super().session()
        return blas_on_one_thread

    def norm(self) -> float:
        return frobenius(self.array)

    def to_dense(self) -> Array:
        return self.array

    @property
    def mH(self) -> LinearOperator:
        return super().mH if is_complex(self.dtype) else Dense(self.array.mT)


def _has_fused_product(a: Array) -> bool:
    """Whether the compiled product pays and takes ``a``, and numba, not loaded here, is at hand."""
    return (
        isinstance(a, np.ndarray)
        and a.size >= _FUSED_SIZE
        and a.dtype in (np.float32, np.float64)
        and a.strides[1] == a.itemsize
        and a.shape[0] >= 3
        and a.shape[1] * a.itemsize >= 64
        and has_numba()
    )


class Rows(LinearOperator):
    """A matrix that is read by blocks of rows: on disk, in half precision, or generated.

    Parameters
    ----------
    shape : (int, int)
    read : callable
        ``read(start, stop)`` returns rows ``start`` to ``stop`` in any dtype.
    like : array
        Gives the library, compute dtype and device of the results.
    rows : int, optional
        Rows to read at a time; by default as many as fill 32 MiB in the compute dtype.
    """

    # A read costs more than the arithmetic of a few dozen columns.
    block_columns = 32
    one_read = True

    def __init__(
        self,
        shape: tuple[int, int],
        read: Callable[[int, int], Array],
        *,
        like: Array,
        rows: int | None = None,
    ):
        super().__init__(shape, like)
        self._read = read
        self._rows = rows or max(1, _BLOCK_BYTES // (8 * max(1, shape[1])))

    @classmethod
    def of_array(cls, a: Array) -> Rows:
        """Rows of an array, converted to the compute dtype block by block."""
        xp = namespace(a)
        like = xp.empty((0, 0), dtype=compute_dtype(xp, a.dtype), device=device(a))
        rows = cls(tuple(a.shape), lambda start, stop: a[start:stop, :], like=like)
        rows.in_memory = not isinstance(a, np.memmap)
        return rows

    def row_blocks(self) -> Iterator[tuple[int, Array]]:
        """Pairs ``(start, rows)`` in the compute dtype, in order."""
        for start in range(0, self.shape[0], self._rows):
            yield start, as_compute(self._read(start, min(start + self._rows, self.shape[0])))

    def matmul(self, x: Array) -> Array:
        return self._stack([block @ x for _, block in self.row_blocks()], x.shape[1])

    def rmatmul(self, x: Array) -> Array:
        z = namespace(x).zeros((self.shape[1], x.shape[1]), dtype=self.dtype, device=self.device)
        for start, block in self.row_blocks():
            z = z + adjoint(adjoint(x[start : start + block.shape[0], :]) @ block)
        return z

    def normal(self, x: Array) -> tuple[Array, Array]:
        z = namespace(x).zeros((self.shape[1], x.shape[1]), dtype=self.dtype, device=self.device)
        parts = []
        for _, block in self.row_blocks():
            parts.append(block @ x)
            z = z + adjoint(adjoint(parts[-1]) @ block)
        return self._stack(parts, x.shape[1]), z

    def two_sided(self, x: Array, y: Array) -> tuple[Array, Array]:
        z = namespace(x).zeros((self.shape[1], y.shape[1]), dtype=self.dtype, device=self.device)
        parts = []
        for start, block in self.row_blocks():
            parts.append(block @ x)
            z = z + adjoint(adjoint(y[start : start + block.shape[0], :]) @ block)
        return self._stack(parts, x.shape[1]), z

    def _stack(self, parts: list[Array], width: int) -> Array:
        xp = namespace(self.like)
        empty = xp.zeros((0, width), dtype=self.dtype, device=self.device)
        return xp.concat([empty, *parts], axis=0)

    def norm(self) -> float:
        return math.hypot(*(frobenius(block) for _, block in self.row_blocks()))

    def to_dense(self) -> Array:
        return self._stack([block for _, block in self.row_blocks()], self.shape[1])


class Sparse(LinearOperator):
    """A SciPy sparse matrix or array."""

    def __init__(self, a: Any):
        super().__init__(a.shape, np.empty((0, 0), dtype=compute_dtype(np, a.dtype)))
        matrix = a.tocsr().astype(self.dtype, copy=False)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        self.matrix = matrix

    def matmul(self, x: Array) -> Array:
        return self.matrix @ x

    def rmatmul(self, x: Array) -> Array:
        # conj() copies, of real matrices too.
        return (self.matrix.conj() if is_complex(self.dtype) else self.matrix).T @ x

    def norm(self) -> float:
        return frobenius(self.matrix.data)

    def to_dense(self) -> Array:
        return self.matrix.toarray()


class SciPy(LinearOperator):
    """A ``scipy.sparse.linalg.LinearOperator``."""

    def __init__(self, operator: Any):
        super().__init__(operator.shape, np.empty((0, 0), dtype=compute_dtype(np, operator.dtype)))
        self.operator = operator

    def matmul(self, x: Array) -> Array:
        return np.asarray(self.operator.matmat(x), dtype=self.dtype)

    def rmatmul(self, x: Array) -> Array:
        return np.asarray(self.operator.rmatmat(x), dtype=self.dtype)


class Dask(LinearOperator):
    """A two-dimensional Dask array, multiplied where its blocks live.

    Each product is one task per row block and a tree of sums; only blocks of columns of width
    ``k`` travel. The array is rechunked so that a block holds whole rows.
    """

    block_columns = 32
    one_read = True

    def __init__(self, a: Any):
        if a.ndim != 2:
            raise ValueError(f"an operator needs a matrix, got an array of shape {a.shape}")
        if any(math.isnan(size) for size in a.shape):
            raise ValueError(
                f"a Dask array must know the sizes of its chunks, got shape {a.shape}; call "
                "compute_chunk_sizes() on it first"
            )
        super().__init__(a.shape, np.empty((0, 0), dtype=compute_dtype(np, a.dtype)))
        self.array = a.rechunk({1: -1}) if len(a.chunks[1]) > 1 else a

    def matmul(self, x: Array) -> Array:
        parts, _ = self._compute(_block_matmul, [x] * self.array.numblocks[0])
        return np.concatenate(parts)

    def rmatmul(self, x: Array) -> Array:
        return self._compute(_block_rmatmul, self._rows_of(x))[1]

    def normal(self, x: Array) -> tuple[Array, Array]:
        parts, z = self._compute(_block_normal, [x] * self.array.numblocks[0])
        return np.concatenate(parts), z

    def two_sided(self, x: Array, y: Array) -> tuple[Array, Array]:
        columns = [x] * self.array.numblocks[0]
        parts, z = self._compute(_block_two_sided, columns, self._rows_of(y))
        return np.concatenate(parts), z

    def sketch(self, width: int, rng: RNG = None) -> Array:
        # Every block draws its own rows of omega, so that they need not travel.
        children = np.random.default_rng(rng).spawn(self.array.numblocks[0])
        return self._compute(_block_sketch, [(width, child) for child in children])[1]

    def norm(self) -> float:
        from dask.base import compute
        from dask.delayed import delayed

        return math.hypot(*compute(*map(delayed(_block_norm), self._blocks())))

    def to_dense(self) -> Array:
        return self.array.compute().astype(self.dtype, copy=False)

    def _blocks(self) -> list[Any]:
        return list(self.array.to_delayed()[:, 0])

    def _rows_of(self, x: Array) -> list[Array]:
        return [x[a:b] for a, b in pairwise(np.cumsum((0, *self.array.chunks[0])))]

    def _compute(self, product: Callable, *inputs: list[Any]) -> tuple[list[Array], Array]:
        """``product(block, *input)`` of every block: first results, sum of the second."""
        from dask.base import compute
        from dask.delayed import delayed

        # One task for an input that all blocks share.
        shared = {id(x): delayed(x) for values in inputs for x in values}
        pairs = [
            delayed(product, nout=2)(block, *(shared[id(x)] for x in values))
            for block, *values in zip(self._blocks(), *inputs, strict=True)
        ]
        total = _tree_sum([z for _, z in pairs], delayed(_add))
        *parts, z = compute(*[y for y, _ in pairs], total)
        return parts, z


def _tree_sum(terms: list[Any], add: Callable) -> Any:
    while len(terms) > 1:
        pairs = [add(*terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def _add(a: Any, b: Any) -> Any:
    return None if a is None else a + b


def _block_matmul(block: Array, x: Array) -> tuple[Array, None]:
    return as_compute(block) @ x, None


def _block_rmatmul(block: Array, x: Array) -> tuple[None, Array]:
    return None, adjoint(adjoint(x) @ as_compute(block))


def _block_sketch(block: Array, draw: tuple[int, np.random.Generator]) -> tuple[None, Array]:
    width, rng = draw
    block = as_compute(block)
    omega = standard_normal((block.shape[0], width), like=block, rng=rng)
    return None, adjoint(adjoint(omega) @ block)


def _block_normal(block: Array, x: Array) -> tuple[Array, Array]:
    block = as_compute(block)
    y = block @ x
    return y, adjoint(adjoint(y) @ block)


def _block_two_sided(block: Array, x: Array, y: Array) -> tuple[Array, Array]:
    block = as_compute(block)
    return block @ x, adjoint(adjoint(y) @ block)


def _block_norm(block: Array) -> float:
    return frobenius(block)
