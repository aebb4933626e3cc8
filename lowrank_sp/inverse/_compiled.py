"""Compiled kernels of sparse observations on host arrays (needs numba).

Every kernel treats a range of lines of a matrix in compressed rows on its own, so that ranges are
shared among threads. Entries of a line are gathered panel by panel into a buffer that stays in
cache; docs/benchmarks.md has the measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank_sp._arrays import eps
from lowrank_sp._compiled.panels import PANEL, add_gram, jit, workspace
from lowrank_sp._threads import blas_on_one_thread, count, run

# Multiplications below which threads do not pay.
_SERIAL = 2**21
# Entries from which kernels take most of the time.
_LARGE = 2**18


@jit
def _sampled(first, last, starts, cols, left, right, out):
    r = left.shape[1]
    for i in range(first, last):
        for e in range(starts[i], starts[i + 1]):
            j = cols[e]
            total = left[i, 0] * right[j, 0]
            for k in range(1, r):
                total += left[i, k] * right[j, k]
            out[e] = total


@jit
def _product(first, last, starts, cols, values, x, out):
    k = x.shape[1]
    for i in range(first, last):
        for c in range(k):
            out[i, c] = 0
        for e in range(starts[i], starts[i + 1]):
            v, j = values[e], cols[e]
            for c in range(k):
                out[i, c] += v * x[j, c]


@jit
def _adjoint_product(first, last, starts, cols, values, x, out):
    k = x.shape[1]
    for i in range(first, last):
        for e in range(starts[i], starts[i + 1]):
            v, j = np.conj(values[e]), cols[e]
            for c in range(k):
                out[j, c] += v * x[i, c]


@jit
def _gather(start, stop, cols, right, x):
    """``x[k, e]`` from ``right[cols[e], k]``: contiguous along the entries, for vector code."""
    for e in range(start, stop):
        j = cols[e]
        for k in range(right.shape[1]):
            x[k, e - start] = right[j, k]


@jit
def _grams(first, last, starts, cols, right, out):
    r = right.shape[1]
    x, gram = workspace(r, right)
    for i in range(first, last):
        gram[:] = 0
        for start in range(starts[i], starts[i + 1], PANEL):
            stop = min(start + PANEL, starts[i + 1])
            _gather(start, stop, cols, right, x)
            add_gram(x, stop - start, gram)
        for a in range(r):
            for b in range(a, r):
                out[i, a, b] = gram[a, b]
                out[i, b, a] = np.conj(gram[a, b])


@jit
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


@jit
def _residual(values, row, x, count, residual):
    """``residual = values - row @ x`` and the sum of its squares, by four rows at a time."""
    for e in range(count):
        residual[e] = values[e]
    for k in range(0, len(x), 4):
        f0, f1, f2, f3 = row[k], row[k + 1], row[k + 2], row[k + 3]
        for e in range(count):
            residual[e] -= f0 * x[k, e] + f1 * x[k + 1, e] + f2 * x[k + 2, e] + f3 * x[k + 3, e]
    squares = 0.0
    for e in range(count):
        squares += residual[e].real * residual[e].real + residual[e].imag * residual[e].imag
    return squares


@jit
def _add_correlations(x, residual, count, out):
    """``out += conj(x) @ residual``, by four rows at a time."""
    for k in range(0, len(x), 4):
        s0, s1, s2, s3 = out[k], out[k + 1], out[k + 2], out[k + 3]
        for e in range(count):
            y = residual[e]
            s0 += np.conj(x[k, e]) * y
            s1 += np.conj(x[k + 1, e]) * y
            s2 += np.conj(x[k + 2, e]) * y
            s3 += np.conj(x[k + 3, e]) * y
        out[k], out[k + 1], out[k + 2], out[k + 3] = s0, s1, s2, s3


@jit
def _least_squares(first, last, starts, cols, values, left, right, ridge, jitter, tiny, out, sums):
    r = right.shape[1]
    x, gram = workspace(r, right)
    row, step = np.zeros(len(x), right.dtype), np.empty(len(x), right.dtype)
    residual = np.empty(PANEL, right.dtype)
    for i in range(first, last):
        gram[:], step[:], row[:r] = 0, 0, left[i]
        squares = 0.0
        for start in range(starts[i], starts[i + 1], PANEL):
            stop = min(start + PANEL, starts[i + 1])
            count = stop - start
            _gather(start, stop, cols, right, x)
            squares += _residual(values[start:stop], row, x, count, residual)
            _add_correlations(x, residual, count, step)
            add_gram(x, count, gram)
        trace = 0.0
        for k in range(r):
            trace += gram[k, k].real
        for k in range(r):
            step[k] -= ridge[i] * row[k]
            gram[k, k] += ridge[i] + jitter * trace + tiny
        _solve(gram, step[:r])
        for k in range(r):
            out[i, k] = row[k] + step[k]
        sums[i] = squares


class Compiled:
    """The kernels of :class:`~lowrank_sp.inverse._kernels.Portable`, on NumPy arrays."""

    def __init__(self, pattern: Any):
        self.pattern = pattern

    def session(self) -> AbstractContextManager[Any]:
        return blas_on_one_thread if self.pattern.size > _LARGE else nullcontext()

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
        # Lines of the result are added to from everywhere, so every range has a copy.
        ranges = _ranges(p.row_starts, x.shape[1], 1)
        out = np.zeros((len(ranges), p.shape[1], x.shape[1]), x.dtype)
        _run(_adjoint_product, ranges, (p.row_starts, p.cols, values, x), out)
        return out[0] if len(ranges) == 1 else np.sum(out, axis=0)

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
    """``kernel(first, last, starts, *arrays)`` on all lines, shared among threads."""
    # More ranges than threads, since their speed varies.
    _run(kernel, _ranges(starts, work, 4), (starts, *arrays))


def _ranges(starts: np.ndarray, work: int, per_thread: int) -> list[tuple[int, int]]:
    """Ranges of lines with equally many entries."""
    size, lines = int(starts[-1]), len(starts) - 1
    threads = count() if size * work > _SERIAL else 1
    parts = 1 if threads == 1 else per_thread * threads
    edges = np.searchsorted(starts, np.arange(1, parts) * (size / parts))
    return list(pairwise([0, *(int(edge) for edge in edges), lines]))


def _run(kernel: Callable, ranges: list[tuple[int, int]], arrays: tuple, outs: Any = None) -> None:
    """The kernel on every range, with a result array of its own where ``outs`` has them."""
    own = [()] * len(ranges) if outs is None else [(out,) for out in outs]
    run([partial(kernel, *lines, *arrays, *out) for lines, out in zip(ranges, own, strict=True)])
