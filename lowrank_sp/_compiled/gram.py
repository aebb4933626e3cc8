"""Compiled Gram matrices of few rows or columns, accumulated in float64 (needs numba).

Panels of the vectors are read where they lie, or copied side by side, widened, into a buffer that
stays in the L2 cache; only tiles on and above the diagonal are computed. docs/benchmarks.md has the
measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import partial

import numpy as np

from lowrank_sp._compiled.tile import COLS, FORWARD, LINE, NONE, ROWS, VEC, jit, tile
from lowrank_sp._threads import run, shares

PANEL = 256  # entries of every vector that are taken at a time
GROUP = 8  # tiles of rows that stay in L1 while the columns pass
FLUSH = 16  # panels after which sums go elsewhere, which keeps the rounding error small
LANES = VEC // 8


@jit
def _part(x, tall, start, stop, panel, sums, gram):
    """The share of entries [start, stop) of all vectors."""
    n = x.shape[1] if tall else x.shape[0]
    tiles, blocks = sums.shape[:2]
    into, size = sums.ctypes.data, sums.strides[1]
    lines = PANEL * panel.itemsize // LINE
    gram[:] = 0
    sums[:] = 0
    for e0 in range(start, stop, PANEL):
        width = min(PANEL, stop - e0)
        if not tall and x.itemsize == panel.itemsize and width == PANEL:
            first, ld = x.ctypes.data + e0 * x.itemsize, x.strides[0]
        else:
            _copy(x, tall, e0, width, panel)
            first, ld = panel.ctypes.data, panel.strides[0]
        for group in range(0, tiles, GROUP):
            for b in range(blocks):
                column = first + _start(b, COLS, n) * ld
                end = min(group + GROUP, tiles, (COLS * b + COLS - 1) // ROWS + 1)
                for k in range(group, end):
                    row = first + _start(k, ROWS, n) * ld
                    out = into + (k * blocks + b) * size
                    tile(FORWARD, NONE, panel, row, ld, column, VEC, ld, out, lines, 0)
        if (e0 - start) // PANEL % FLUSH == FLUSH - 1 or e0 + PANEL >= stop:
            for i in range(n):
                k = i // ROWS
                for j in range(i, n):
                    b = j // COLS
                    found = sums[k, b, i - _start(k, ROWS, n), j - _start(b, COLS, n)]
                    for e in range(LANES):
                        gram[i, j] += found[e]
            sums[:] = 0


@jit
def _start(k, count, n):
    """The first vector of block ``k`` of ``count``: the last block overlaps the one before it."""
    return min(k * count, n - count)


@jit
def _copy(x, tall, e0, width, panel):
    n = len(panel)
    if tall:
        for e in range(width):
            for i in range(n):
                panel[i, e] = x[e0 + e, i]
    else:
        for i in range(n):
            for e in range(width):
                panel[i, e] = x[i, e0 + e]
    panel[:, width:] = 0


def gram(x: np.ndarray, *, tall: bool) -> np.ndarray:
    """``x.T @ x`` of tall ``x``, else ``x @ x.T``, in float64.

    Parameters
    ----------
    x : array, shape (m, n)
        Real, in C order; at least four vectors.

    Notes
    -----
    Partial sums are added in a fixed order: the same threads give the same bits.
    """
    length, n = x.shape if tall else x.shape[::-1]
    parts = shares(-(-length // PANEL))
    tiles, blocks = -(-n // ROWS), -(-n // COLS)
    # A line more than a power of two, lest the rows share sets of the cache.
    panel = np.empty((len(parts), n, PANEL + LINE // 8))
    sums = np.empty((len(parts), tiles, blocks, ROWS, COLS, LANES))
    grams = np.empty((len(parts), n, n))
    run(
        [
            partial(_part, x, tall, first * PANEL, min(last * PANEL, length), *own)
            for (first, last), *own in zip(parts, panel, sums, grams, strict=True)
        ]
    )
    upper = grams.sum(axis=0)
    return upper + np.triu(upper, 1).T
