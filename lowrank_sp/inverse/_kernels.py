"""Kernels of sparse observations for arrays of any library, and the choice of the compiled ones.

The array standard has gathers but no scatter. Lines of similar numbers of entries are padded to one
length and stacked into a bucket, so that a kernel is a gather and a batched product a bucket.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    Array,
    adjoint,
    as_compute,
    device,
    eps,
    from_host,
    has_numba,
    host_view,
    is_complex,
    namespace,
    real_dtype,
    slices,
    to_host,
)
from lowrank_sp.inverse.pattern import Pattern

# Numbers gathered at a time.
_CHUNK = 2**22
# Entries in a bucket, padding included: its tables stay on the device.
_BUCKET = 2**19


class Bucket(NamedTuple):
    """Lines padded to ``length`` entries, as flat tables on the device of the data."""

    lines: Array  # (b,) which lines
    entries: Array  # (b * length,) into the values, with one zero appended to them
    others: Array  # (b * length,) the line of the other side that an entry lies in
    inside: Array  # (b, length, 1) one, and zero for padding
    length: int


class Portable:
    """Products, samples and least squares on a pattern, for arrays of the library of ``like``."""

    def __init__(self, pattern: Pattern, like: Array):
        self.pattern, self._like = pattern, like[:0]

    @cached_property
    def _by_rows(self) -> tuple[list[Bucket], Array]:
        return self._buckets(self.pattern, None)

    @cached_property
    def _by_columns(self) -> tuple[list[Bucket], Array]:
        return self._buckets(self.pattern.mT, self.pattern.column_order)

    @cached_property
    def _positions(self) -> tuple[Array, Array]:
        return self._indices(self.pattern.rows), self._indices(self.pattern.cols)

    def session(self) -> AbstractContextManager[Any]:
        """Context to enter around a series of calls."""
        return nullcontext()

    def sampled(self, left: Array, right: Array) -> Array:
        """``(left @ right)[i, j]`` at every position, of shape ``(M,)``."""
        xp, right = namespace(left, right), right.mT
        rows, cols = self._positions
        parts = [xp.zeros(0, dtype=left.dtype, device=device(left))]
        for part in slices(self.pattern.size, max(1, _CHUNK // max(1, left.shape[1]))):
            x, y = xp.take(left, rows[part], axis=0), xp.take(right, cols[part], axis=0)
            parts.append(xp.sum(x * y, axis=1))
        return xp.concat(parts)

    def matmul(self, values: Array, x: Array) -> Array:
        """``S @ x`` of the sparse matrix ``S`` of ``values``."""
        return self._product(self._by_rows, values, x, self.pattern.shape[0])

    def rmatmul(self, values: Array, x: Array) -> Array:
        """``S^H @ x``."""
        if is_complex(values.dtype):
            values = namespace(values).conj(values)
        return self._product(self._by_columns, values, x, self.pattern.shape[1])

    def grams(self, right: Array) -> Array:
        """``sum_j conj(x_j) x_j^T`` over the columns ``x_j`` that a row was observed in."""
        xp, x = namespace(right), right.mT
        buckets, place = self._by_rows
        r = x.shape[1]
        parts = []
        for bucket in buckets:
            picked = self._picked(bucket, x)
            parts.append(xp.reshape(adjoint(picked) @ picked, (-1, r * r)))
        return xp.reshape(self._collected(parts, place, r * r, x), (-1, r, r))

    def least_squares(
        self, values: Array, left: Array, right: Array, ridge: Array
    ) -> tuple[Array, float]:
        """See :meth:`~lowrank_sp.inverse.entries.Entries.least_squares`."""
        xp, x = namespace(left, right), right.mT
        buckets, place = self._by_rows
        r = x.shape[1]
        unit = xp.eye(r, dtype=x.dtype, device=device(x))
        padded = self._padded(values)
        parts, squares = [], 0.0
        for bucket in buckets:
            picked = self._picked(bucket, x)
            old = xp.take(left, bucket.lines, axis=0)[:, :, None]
            data = xp.reshape(xp.take(padded, bucket.entries), (-1, bucket.length, 1))
            residual = data - picked @ old
            squares += float(xp.sum(abs(residual) ** 2))
            weight = xp.astype(xp.take(ridge, bucket.lines), x.dtype)[:, None, None]
            gram = adjoint(picked) @ picked
            shift = eps(x.dtype) * xp.linalg.trace(gram)[:, None, None] + eps(x.dtype) ** 2
            side = adjoint(picked) @ residual - weight * old
            parts.append(xp.linalg.solve(gram + (weight + shift) * unit, side)[:, :, 0])
        # Where nothing was observed, the penalty decides, if there is one.
        shift = eps(x.dtype) ** 2
        unseen = -left * xp.astype(ridge / (ridge + shift), x.dtype)[:, None]
        empty = xp.asarray(self.pattern.row_counts == 0, device=device(x))[:, None]
        return left + xp.where(empty, unseen, self._collected(parts, place, r, x)), squares

    def _product(self, table: Any, values: Array, x: Array, size: int) -> Array:
        xp = namespace(values, x)
        (buckets, place), width = table, x.shape[1]
        padded = self._padded(values)
        step = max(1, _CHUNK // _BUCKET)
        blocks = []
        for part in slices(width, step):
            columns, parts = x[:, part], []
            for bucket in buckets:
                gathered = xp.take(columns, bucket.others, axis=0)
                gathered = xp.reshape(gathered, (-1, bucket.length, gathered.shape[1]))
                weights = xp.reshape(xp.take(padded, bucket.entries), (-1, 1, bucket.length))
                parts.append((weights @ gathered)[:, 0, :])
            blocks.append(self._collected(parts, place, columns.shape[1], x))
        empty = xp.zeros((size, 0), dtype=x.dtype, device=device(x))
        return xp.concat([empty, *blocks], axis=1)

    def _padded(self, values: Array) -> Array:
        xp = namespace(values)
        return xp.concat([values, xp.zeros(1, dtype=values.dtype, device=device(values))])

    def _picked(self, bucket: Bucket, x: Array) -> Array:
        """Rows of ``x`` at the entries of every line, zero where padded: ``(b, length, r)``."""
        xp = namespace(x)
        picked = xp.reshape(xp.take(x, bucket.others, axis=0), (-1, bucket.length, x.shape[1]))
        return picked * xp.astype(bucket.inside, x.dtype)

    def _collected(self, parts: list[Array], place: Array, width: int, like: Array) -> Array:
        """Results of all buckets in the order of lines, zero for lines without entries."""
        xp = namespace(like)
        zero = xp.zeros((1, width), dtype=like.dtype, device=device(like))
        return xp.take(xp.concat([*parts, zero], axis=0), place, axis=0)

    def _buckets(self, pattern: Pattern, order: np.ndarray | None) -> tuple[list[Bucket], Array]:
        """Buckets of the rows of ``pattern``, and where each row stands among their results."""
        starts, counts = pattern.row_starts, pattern.row_counts
        lines = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        buckets, xp = [], namespace(self._like)
        real = real_dtype(xp, self._like.dtype)
        first = 0
        while first < len(lines):
            length = int(counts[lines[first]])
            similar = np.searchsorted(-counts[lines], -(2 * length // 3), side="left")
            last = max(first + 1, min(int(similar), first + max(1, _BUCKET // length)))
            group = lines[first:last]
            offset = np.arange(length)
            inside = offset < counts[group][:, None]
            at = np.where(inside, starts[group][:, None] + offset, 0)
            others = np.where(inside, pattern.cols[at], 0)
            entries = np.where(inside, at if order is None else order[at], pattern.size)
            buckets.append(
                Bucket(
                    self._indices(group),
                    self._indices(entries.ravel()),
                    self._indices(others.ravel()),
                    from_host(inside[:, :, None].astype(np.float64), self._like, real),
                    length,
                )
            )
            first = last
        place = np.full(len(counts), len(lines), dtype=np.int64)
        place[lines] = np.arange(len(lines))
        return buckets, self._indices(place)

    def _indices(self, indices: np.ndarray) -> Array:
        xp = namespace(self._like)
        fits = len(indices) == 0 or int(indices.max()) < 2**31
        return xp.asarray(
            indices.astype(np.int32 if fits else np.int64), device=device(self._like), copy=True
        )


class OnHost:
    """The compiled kernels for arrays of another library that lie in host memory."""

    def __init__(self, compiled: Any, like: Array):
        self._compiled, self._like = compiled, like[:0]

    def session(self) -> AbstractContextManager[Any]:
        return self._compiled.session()

    def sampled(self, left: Array, right: Array) -> Array:
        return self._moved(self._compiled.sampled(to_host(left), to_host(right)))

    def matmul(self, values: Array, x: Array) -> Array:
        return self._moved(self._compiled.matmul(to_host(values), to_host(x)))

    def rmatmul(self, values: Array, x: Array) -> Array:
        return self._moved(self._compiled.rmatmul(to_host(values), to_host(x)))

    def grams(self, right: Array) -> Array:
        return self._moved(self._compiled.grams(to_host(right)))

    def least_squares(
        self, values: Array, left: Array, right: Array, ridge: Array
    ) -> tuple[Array, float]:
        arrays = (to_host(a) for a in (values, left, right, ridge))
        out, squares = self._compiled.least_squares(*arrays)
        return self._moved(out), squares

    def _moved(self, a: np.ndarray) -> Array:
        return from_host(a, self._like)


def kernels(pattern: Pattern, like: Array) -> Any:
    """The fastest kernels for arrays like ``like``."""
    if host_view(as_compute(like[:0])) is None or not has_numba():
        return Portable(pattern, like)
    from lowrank_sp.inverse._compiled import Compiled

    compiled = Compiled(pattern)
    return compiled if isinstance(like, np.ndarray) else OnHost(compiled, like)
