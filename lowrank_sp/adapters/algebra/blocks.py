"""Matrices that exist only by blocks of rows: differences, order statistics, distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    as_compute,
    compute_dtype,
    device,
    frobenius,
    is_array,
    namespace,
    slices,
    to_host,
)
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.operators import LinearOperator, Rows, as_operator

#: ``read(start, stop)`` gives rows ``start`` to ``stop`` of a matrix.
Read = Callable[[int, int], Array]

# Entries of a block. A few of them fit into the cache of a core.
_ENTRIES = 2**18


def height(n: int) -> int:
    """Rows of ``n`` entries in a block."""
    return max(1, _ENTRIES // max(1, n))


def blocks_of(read: Read, shape: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """Pairs ``(start, rows)`` that cover a matrix in order."""
    for rows in slices(shape[0], height(shape[1])):
        yield rows.start, read(rows.start, rows.stop)


def rows_of(delta: LowRank) -> Read:
    """Rows of a product of factors."""
    return lambda start, stop: delta.left[start:stop, :] @ delta.right


def difference(a: Any, b: Any) -> LinearOperator:
    """``a - b`` of two matrices.

    Arrays are subtracted entry by entry, block by block: where they are close, no digit is lost,
    while a difference of products with each of them has lost those that they share.
    """
    shapes = tuple(a.shape), tuple(b.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"matrices must have one shape, got {shapes[0]} and {shapes[1]}")
    if not (is_array(a) and is_array(b)):
        return as_operator(a) - as_operator(b)
    if a.ndim != 2:
        raise ValueError(f"a difference needs matrices, got arrays of shape {shapes[0]}")
    xp = namespace(a, b)
    dtype = xp.result_type(*(compute_dtype(xp, x.dtype) for x in (a, b)))

    def read(start: int, stop: int) -> Array:
        return xp.astype(as_compute(a[start:stop, :]), dtype) - as_compute(b[start:stop, :])

    rows = Rows(shapes[0], read, like=xp.empty((0, 0), dtype=dtype, device=device(a)))
    rows.in_memory = not (isinstance(a, np.memmap) or isinstance(b, np.memmap))
    return rows


def distance(rows: Rows, f: Factored) -> float:
    """``||rows - f||_F`` in one read."""
    left, right = f.factors()
    return math.hypot(
        *(
            frobenius(block - left[start : start + block.shape[0], :] @ right)
            for start, block in rows.row_blocks()
        )
    )


def kth_largest(read: Read, shape: tuple[int, ...], k: int) -> float:
    """The ``k``-th largest magnitude of the entries of a matrix, exactly.

    Floating-point numbers that are not negative are ordered as the integers of the same bits are.
    Every read of the matrix counts the next 16 bits of those that agree with the answer so far: two
    reads in single precision, four in double.
    """
    dtype = np.abs(to_host(read(0, 1))).dtype
    integer = np.dtype(f"u{dtype.itemsize}")
    bits = 8 * dtype.itemsize
    answer = 0
    for shift in range(bits - 16, -1, -16):
        counts = np.zeros(2**16, dtype=np.int64)
        for _, block in blocks_of(read, shape):
            keys = np.abs(to_host(block)).reshape(-1).view(integer)
            if shift < bits - 16:
                keys = keys[keys >> (shift + 16) == answer]
            digits = (keys >> shift) & 0xFFFF
            counts += np.bincount(digits.astype(np.int64), minlength=2**16)
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, k))
        k -= int(from_top[place] - counts[::-1][place])
        answer = answer << 16 | (2**16 - 1 - place)
    return float(np.array([answer], dtype=integer).view(dtype)[0])
