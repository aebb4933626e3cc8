"""Gram matrices of rows that are taken panel by panel into the L1 cache, compiled (needs numba)."""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np

# Rows that are taken at a time: with 16 columns they fit in the cache.
PANEL = 256
# Sums may be reordered, so that they become vector code; NaN stays NaN.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def jit(kernel: Callable) -> Any:
    """Compile a kernel that runs without the interpreter's lock."""
    return nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)(kernel)


@jit
def workspace(columns, like):
    """Buffers for a panel and its Gram matrix, with rows of zeros up to fours."""
    rows = (columns + 3) // 4 * 4
    # Eight more than a power of two, lest the rows of ``x`` share sets of the cache.
    return np.zeros((rows, PANEL + 8), like.dtype), np.zeros((rows, rows), like.dtype)


@jit
def add_gram(x, count, gram):
    """Blocks on and above the diagonal of ``gram += conj(x) x^T``, two by four at a time."""
    r = len(gram)
    for a in range(0, r, 2):
        for b in range(a // 4 * 4, r, 4):
            s00, s01, s02, s03 = gram[a, b], gram[a, b + 1], gram[a, b + 2], gram[a, b + 3]
            s10, s11 = gram[a + 1, b], gram[a + 1, b + 1]
            s12, s13 = gram[a + 1, b + 2], gram[a + 1, b + 3]
            for e in range(count):
                x0, x1 = np.conj(x[a, e]), np.conj(x[a + 1, e])
                y0, y1, y2, y3 = x[b, e], x[b + 1, e], x[b + 2, e], x[b + 3, e]
                s00 += x0 * y0
                s01 += x0 * y1
                s02 += x0 * y2
                s03 += x0 * y3
                s10 += x1 * y0
                s11 += x1 * y1
                s12 += x1 * y2
                s13 += x1 * y3
            gram[a, b], gram[a, b + 1], gram[a, b + 2], gram[a, b + 3] = s00, s01, s02, s03
            gram[a + 1, b], gram[a + 1, b + 1] = s10, s11
            gram[a + 1, b + 2], gram[a + 1, b + 3] = s12, s13
