"""Compiled products with few columns: ``y = W p, z = W^T y`` by one read of ``W`` (needs numba).

Rows of ``W`` are taken in groups that fit in the L2 cache. A group is first multiplied by ``p``
and, once its rows of ``y`` are complete, added into ``z`` while it is still in the cache. Columns
are walked in panels, so that the panels of ``p`` and ``z`` stay in L1. docs/benchmarks.md has the
measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import partial
from typing import Any

import numba as nb
import numpy as np

from lowrank_sp._compiled.tile import (
    ADJOINT,
    COLS,
    FORWARD,
    L1,
    L2,
    LINE,
    NONE,
    ROWS,
    TURN,
    VEC,
    jit,
    tile,
)
from lowrank_sp._threads import count, run, shares

NEXT = COLS * VEC  # bytes between the vectors of a packed column
GROUP_BYTES = 300_000  # rows of W kept in L2 between the two passes


@jit
def _part(w, ld, width, tail, packed, y, sums, first, last, forward, back):
    """Row tiles [first, last): their rows of y = W P, and sums = their share of W.T y, packed.

    `w` is an address, `ld` a row stride in bytes, `width` the bytes of a row in whole cache lines;
    the columns after those are in the line that begins at `tail`, together with some before them
    (no line when `tail` is negative). Without `forward`, y is given and P not used; without `back`,
    sums are not.
    """
    blocks, vecs, _, lanes = packed.shape
    m, b = y.shape
    slab = vecs * COLS * VEC  # bytes of one column block of P or Z
    panel = 2048 if blocks == 1 else 1024  # bytes of a row of W per panel
    whole = (width + panel - 1) // panel
    panels = whole + (tail >= 0)
    group = min(16, max(1, GROUP_BYTES // (ROWS * (width + LINE))))
    part = np.empty((group, blocks, ROWS, COLS, lanes), packed.dtype)
    coef = np.empty((group, blocks, ROWS, COLS), packed.dtype)
    tpart, tcoef = ROWS * COLS * VEC, ROWS * COLS * packed.itemsize
    pack, out, pp, pc = packed.ctypes.data, sums.ctypes.data, part.ctypes.data, coef.ctypes.data
    sums[:] = 0
    for k0 in range(first, last, group):
        k1 = min(last, k0 + group)
        part[:] = 0
        for q in range(panels * forward):
            j = min(q * panel, width)
            base, lines = w + j, (min(width, j + panel) - j) // LINE
            if q == whole:
                base, lines = w + tail, 1
            for k in range(k0, k1):
                row = base + min(k * ROWS, m - ROWS) * ld
                ahead = row + ROWS * ld if k + 1 < k1 else base + k0 * ROWS * ld + panel
                acc = pp + (k - k0) * blocks * tpart
                tile(
                    FORWARD,
                    L1,
                    packed,
                    row,
                    ld,
                    pack + j * COLS,
                    COLS * VEC,
                    VEC,
                    acc,
                    lines,
                    ahead,
                )
                for g in range(1, blocks):
                    shift = g * slab + j * COLS
                    acc += tpart
                    tile(FORWARD, NONE, packed, row, ld, pack + shift, NEXT, VEC, acc, lines, 0)
        for k in range(k0, k1):
            for r in range(ROWS):
                i = min(k * ROWS, m - ROWS) + r
                for c in range(blocks * COLS):
                    v = packed.dtype.type(0)
                    if i >= k * ROWS and c < b:  # the last tile may repeat rows: count them once
                        if forward:
                            for e in range(lanes):
                                v += part[k - k0, c // COLS, r, c % COLS, e]
                            y[i, c] = v
                        v = y[i, c]
                    coef[k - k0, c // COLS, r, c % COLS] = v
        for q in range(panels * back):
            j = min(q * panel, width)
            base, lines = w + j, (min(width, j + panel) - j) // LINE
            if q == whole:
                base, lines = w + tail, 1
            for k in range(k0, k1):
                row = base + min(k * ROWS, m - ROWS) * ld
                ahead = row + group * ROWS * ld  # the next group: memory to L2
                yk = pc + (k - k0) * blocks * tcoef
                tile(ADJOINT, L2, packed, row, ld, out + j * COLS, NEXT, VEC, yk, lines, ahead)
                for g in range(1, blocks):
                    shift = g * slab + j * COLS
                    yk += tcoef
                    tile(ADJOINT, NONE, packed, row, ld, out + shift, NEXT, VEC, yk, lines, 0)


@jit
def _places(columns, vecs, lanes):
    """Columns that fill whole lines, and how much further along the others are packed."""
    shift = vecs * lanes - columns
    return columns if shift == 0 else (vecs - LINE // VEC) * lanes, shift


@jit
def _pack(p, packed):
    (n, b), (_, vecs, _, lanes) = p.shape, packed.shape
    whole, shift = _places(n, vecs, lanes)
    for v in range(vecs):
        for e in range(lanes):
            at = v * lanes + e
            j = at if at < whole else at - shift
            if at < whole or j >= whole:
                for c in range(b):
                    packed[c // COLS, v, c % COLS, e] = p[j, c]


@jit
def _unpack(sums, z):
    (n, b), (parts, _, vecs, _, lanes) = z.shape, sums.shape
    whole, shift = _places(n, vecs, lanes)
    for v in range(vecs):
        for e in range(lanes):
            at = v * lanes + e
            j = at if at < whole else at - shift
            if at < whole or j >= whole:
                for c in range(b):
                    total = sums[0, c // COLS, v, c % COLS, e]
                    for t in range(1, parts):  # fixed order: same bits every run
                        total += sums[t, c // COLS, v, c % COLS, e]
                    z[j, c] = total


@nb.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _rows(w, ld, width, tail, p, packed, y, sums, z, forward, back):
    """Rows of one matrix, shared among threads of numba: they answer at once, call after call."""
    _pack(p, packed)
    parts, tiles = len(sums), (len(y) + ROWS - 1) // ROWS
    for t in nb.prange(parts):
        first, last = tiles * t // parts, tiles * (t + 1) // parts
        _part(w, ld, width, tail, packed, y, sums[t], first, last, forward, back)
    if back:
        _unpack(sums, z)


@jit
def _stacked(x, slab, ld, width, tail, packed, y, sums, z, first, last):
    """``y.T @ x[k]`` for k in [first, last); `slab` bytes lie between the matrices."""
    tiles = (len(y) + ROWS - 1) // ROWS
    for k in range(first, last):
        _part(x + k * slab, ld, width, tail, packed, y, sums, 0, tiles, False, True)
        _unpack(sums.reshape((1, *sums.shape)), z[k].T)


def normal(w: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(w @ p, w.T @ w @ p)``.

    Parameters
    ----------
    w : array, shape (m, n)
        Real, contiguous along its rows, with at least 3 rows of at least 64 bytes.
    p : array, shape (n, b), of the dtype of ``w``
        With ``1 <= b <= 16``; the cost is that of the next multiple of 4.

    Notes
    -----
    Partial sums are added in a fixed order: the same threads give the same bits.
    """
    y, z = np.empty((len(w), p.shape[1]), w.dtype), np.empty(p.shape, w.dtype)
    _run(w, p, y, z, forward=True, back=True)
    return y, z


def matmul(w: np.ndarray, p: np.ndarray) -> np.ndarray:
    """``w @ p``, under the same conditions as :func:`normal`."""
    y = np.empty((len(w), p.shape[1]), w.dtype)
    _run(w, p, y, y[:0], forward=True, back=False)
    return y


def rmatmul(w: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``w.T @ y`` for ``y`` of shape ``(m, b)``, under the same conditions as :func:`normal`."""
    z = np.empty((w.shape[1], y.shape[1]), w.dtype)
    _run(w, y[:0], np.ascontiguousarray(y), z, forward=False, back=True)
    return z


def stacked_product(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``y @ x`` for a stack ``x`` of matrices that are each as in :func:`normal`, and few rows."""
    slab, ld, width, tail, shape = _layout(x, len(y))
    z = np.empty((len(x), len(y), x.shape[2]), x.dtype)
    parts = shares(len(x))
    sums = np.empty((len(parts), *shape), x.dtype)
    args = x.ctypes.data, slab, ld, width, tail, np.empty(shape, x.dtype), np.ascontiguousarray(y.T)
    run([partial(_stacked, *args, own, z, *part) for own, part in zip(sums, parts, strict=True)])
    return z


def _run(
    w: np.ndarray, p: np.ndarray, y: np.ndarray, z: np.ndarray, *, forward: bool, back: bool
) -> None:
    ld, width, tail, shape = _layout(w, y.shape[1])
    packed, before = np.zeros(shape, w.dtype), nb.get_num_threads()
    sums = np.empty((min(count(), before), *shape), w.dtype)
    args = w.ctypes.data, ld, width, tail, np.ascontiguousarray(p), packed, y, sums, z
    with TURN:
        nb.set_num_threads(len(sums))
        try:
            _rows(*args, forward, back)
        finally:
            nb.set_num_threads(before)


def _layout(w: np.ndarray, columns: int) -> tuple[Any, ...]:
    """Strides, bytes of whole lines, where the last line begins, shape of ``columns`` packed."""
    length = w.shape[-1] * w.itemsize
    width = length // LINE * LINE
    tail = length - LINE if width < length else -1
    vectors = -(-length // LINE) * (LINE // VEC)
    shape = (-(-columns // COLS), vectors, COLS, VEC // w.itemsize)
    return *w.strides[:-1], width, tail, shape
