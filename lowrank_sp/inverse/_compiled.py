"""Compiled kernels of sparse observations on host arrays (needs numba).

Every kernel treats the lines ``first..last`` of a matrix in compressed rows on its own, so lines
are shared among threads and the result does not depend on how many there are. Fused loops keep the
residual of a line in cache; docs/benchmarks.md has the measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba as nb
import numpy as np

from lowrank_sp._arrays import eps

# Multiplications below which threads do not pay.
_SERIAL = 2**21
# Sums may be reordered, so that they become vector code; NaN stays NaN.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def _jit(kernel: Callable) -> Any:
    return nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)(kernel)


@_jit
def _sampled(first, last, starts, cols, left, right, out):
    r = left.shape[1]
    for i in range(first, last):
        for e in range(starts[i], starts[i + 1]):
            j = cols[e]
            total = left[i, 0] * right[j, 0]
            for k in range(1, r):
                total += left[i, k] * right[j, k]
            out[e] = total


@_jit
def _product(first, last, starts, cols, values, x, out):
    k = x.shape[1]
    for i in range(first, last):
        for c in range(k):
            out[i, c] = 0
        for e in range(starts[i], starts[i + 1]):
            v, j = values[e], cols[e]
            for c in range(k):
                out[i, c] += v * x[j, c]


@_jit
def _adjoint_product(first, last, starts, rows, order, values, x, out):
    k = x.shape[1]
    for i in range(first, last):
        for c in range(k):
            out[i, c] = 0
        for e in range(starts[i], starts[i + 1]):
            v, j = np.conj(values[order[e]]), rows[e]
            for c in range(k):
                out[i, c] += v * x[j, c]


@_jit
def _gram(start, stop, cols, right, gram):
    """Upper triangle of ``gram += sum_e conj(x_e) x_e^T``, four entries to a pass."""
    r = right.shape[1]
    e = start
    while e + 4 <= stop:
        j0, j1, j2, j3 = cols[e], cols[e + 1], cols[e + 2], cols[e + 3]
        for a in range(r):
            x0, x1 = np.conj(right[j0, a]), np.conj(right[j1, a])
            x2, x3 = np.conj(right[j2, a]), np.conj(right[j3, a])
            for b in range(a // 4 * 4, r):
                gram[a, b] += (
                    x0 * right[j0, b] + x1 * right[j1, b] + x2 * right[j2, b] + x3 * right[j3, b]
                )
        e += 4
    while e < stop:
        j = cols[e]
        for a in range(r):
            x = np.conj(right[j, a])
            for b in range(a // 4 * 4, r):
                gram[a, b] += x * right[j, b]
        e += 1


@_jit
def _grams(first, last, starts, cols, right, out):
    r = right.shape[1]
    for i in range(first, last):
        gram = out[i]
        gram[:] = 0
        _gram(starts[i], starts[i + 1], cols, right, gram)
        for a in range(r):
            for b in range(a):
                gram[a, b] = np.conj(gram[b, a])


@_jit
def _solve(gram, x):
    """Solve ``gram x = x`` in place for a positive definite matrix, by its upper triangle."""
    r = len(x)
    for a in range(r):
        pivot = np.sqrt(gram[a, a].real)
        for b in range(a, r):
            gram[a, b] /= pivot
        for c in range(a + 1, r):
            factor = np.conj(gram[a, c])
            for b in range(c, r):
                gram[c, b] -= factor * gram[a, b]
    for a in range(r):
        x[a] /= gram[a, a]
        for b in range(a + 1, r):
            x[b] -= np.conj(gram[a, b]) * x[a]
    for a in range(r - 1, -1, -1):
        for b in range(a + 1, r):
            x[a] -= gram[a, b] * x[b]
        x[a] /= gram[a, a]


@_jit
def _least_squares(first, last, starts, cols, values, left, right, ridge, jitter, tiny, out, sums):
    r = right.shape[1]
    gram, step = np.empty((r, r), right.dtype), np.empty(r, right.dtype)
    for i in range(first, last):
        gram[:], step[:] = 0, 0
        squares = 0.0
        for e in range(starts[i], starts[i + 1]):
            j = cols[e]
            residual = values[e]
            for k in range(r):
                residual -= left[i, k] * right[j, k]
            squares += residual.real * residual.real + residual.imag * residual.imag
            for k in range(r):
                step[k] += np.conj(right[j, k]) * residual
        _gram(starts[i], starts[i + 1], cols, right, gram)
        trace = 0.0
        for k in range(r):
            trace += gram[k, k].real
        for k in range(r):
            step[k] -= ridge[i] * left[i, k]
            gram[k, k] += ridge[i] + jitter * trace + tiny
        _solve(gram, step)
        for k in range(r):
            out[i, k] = left[i, k] + step[k]
        sums[i] = squares


class Compiled:
    """The kernels of :class:`~lowrank_sp.inverse._kernels.Portable`, on NumPy arrays."""

    def __init__(self, pattern: Any):
        self.pattern = pattern

    def sampled(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        p, left, right = self.pattern, _plain(left), _plain(right.T)
        out = np.empty(p.size, left.dtype)
        if left.shape[1] == 0:
            return np.zeros_like(out)
        _by_lines(_sampled, p.row_starts, left.shape[1], p.cols, left, right, out)
        return out

    def matmul(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        p, values, x = self.pattern, _plain(values), _plain(x)
        out = np.empty((p.shape[0], x.shape[1]), x.dtype)
        _by_lines(_product, p.row_starts, x.shape[1], p.cols, values, x, out)
        return out

    def rmatmul(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        p, values, x = self.pattern, _plain(values), _plain(x)
        out = np.empty((p.shape[1], x.shape[1]), x.dtype)
        rows, order = p.mT.cols, p.column_order
        _by_lines(_adjoint_product, p.column_starts, x.shape[1], rows, order, values, x, out)
        return out

    def grams(self, right: np.ndarray) -> np.ndarray:
        p, right = self.pattern, _plain(right.T)
        r = right.shape[1]
        out = np.empty((p.shape[0], r, r), right.dtype)
        _by_lines(_grams, p.row_starts, r * r, p.cols, right, out)
        return out

    def least_squares(
        self, values: np.ndarray, left: np.ndarray, right: np.ndarray, ridge: np.ndarray
    ) -> tuple[np.ndarray, float]:
        p, values, left, right = self.pattern, _plain(values), _plain(left), _plain(right.T)
        out, sums = np.empty_like(left), np.empty(p.shape[0])
        accuracy = eps(left.dtype)
        jitter, tiny = (ridge.dtype.type(x) for x in (accuracy, accuracy**2))
        r = left.shape[1]
        _by_lines(
            _least_squares, p.row_starts, r * r,
            p.cols, values, left, right, _plain(ridge), jitter, tiny, out, sums,
        )  # fmt: skip
        return out, float(np.sum(sums))


def _plain(a: np.ndarray) -> np.ndarray:
    # One layout, so that one compilation a dtype is enough.
    return np.require(a, requirements=["C", "W", "A"])


def _by_lines(kernel: Callable, starts: np.ndarray, work: int, *arrays: Any) -> None:
    """``kernel(first, last, starts, *arrays)`` on ranges of lines of equally many entries."""
    size, lines = int(starts[-1]), len(starts) - 1
    threads = nb.get_num_threads() if size * work > _SERIAL else 1
    # More ranges than threads, since their speed varies.
    parts = 1 if threads == 1 else 4 * threads
    edges = np.searchsorted(starts, np.arange(1, parts) * (size / parts))
    edges = [0, *(int(e) for e in edges), lines]
    if parts == 1:
        kernel(0, lines, starts, *arrays)
        return
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(kernel, a, b, starts, *arrays) for a, b in pairwise(edges)]
        for job in jobs:
            job.result()
