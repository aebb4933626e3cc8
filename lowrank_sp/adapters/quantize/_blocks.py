"""The type of a quantized matrix, and the coding of entries by the nearest level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    as_compute,
    compute_dtype,
    detached,
    device,
    dtype_name,
    from_host,
    is_complex,
    is_inexact,
    max_abs,
    namespace,
    slices,
)
from lowrank_sp.operators import Rows

# Entries that are coded or decoded at a time.
_CHUNK = 2**20


@dataclass(frozen=True, repr=False)
class Quantized(Rows):
    """A quantized matrix, multiplied by decoding a block of rows at a time.

    Attributes
    ----------
    codes : array of uint8, shape (m, c)
        Indices of levels, ``8 // bits`` of them in a byte, the first in the lowest bits.
    scales : array, shape (m, b), or Quantized
        One for every block. Quantized themselves, they fill rows of another length.
    levels : array, shape (2^bits,) or fewer
        In the dtype of the products.
    columns : int
        ``n``; the last block of a row may be short.
    block : int
        Entries of a row that share a scale.
    bits : int
        Width of a code.
    offsets : array, shape (m, b), or None
        Added to the entries of a block.
    """

    codes: Array
    scales: Any
    levels: Array
    columns: int
    block: int
    bits: int
    offsets: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        return self.codes.shape[0], self.columns

    @property
    def like(self) -> Array:
        return self.levels

    @property
    def bits_per_entry(self) -> float:
        """Bits in storage, codes, scales and offsets, for each entry of the matrix."""
        return 8 * self._bytes() / max(1, math.prod(self.shape))

    def row_blocks(self) -> Iterator[tuple[int, Array]]:
        """Pairs ``(start, rows)``, decoded, in order."""
        xp = namespace(self.levels)
        scales = self.scales
        if isinstance(scales, Quantized):
            scales = xp.reshape(scales.to_dense(), (self.shape[0], -1))
        table = _bytes_table(self.levels, self.bits)
        width = scales.shape[1] * self.block
        for rows in slices(self.shape[0], max(1, _CHUNK // max(1, self.columns))):
            codes = self.codes[rows, :]
            index = xp.astype(xp.reshape(codes, (-1,)), xp.int32)
            values = xp.reshape(xp.take(table, index, axis=0), (codes.shape[0], -1))[:, :width]
            values = xp.reshape(values, (codes.shape[0], -1, self.block)) * scales[rows, :, None]
            if self.offsets is not None:
                values = values + self.offsets[rows, :, None]
            yield rows.start, xp.reshape(values, (codes.shape[0], -1))[:, : self.columns]

    def _bytes(self) -> int:
        total = math.prod(self.codes.shape)
        if isinstance(self.scales, Quantized):
            total += self.scales._bytes()
        parts = [self.scales, self.offsets]
        arrays = [a for a in parts if a is not None and not isinstance(a, Quantized)]
        width = 8 if dtype_name(self.levels.dtype) == "float64" else 4
        return total + sum(width * math.prod(a.shape) for a in arrays)


def nearest(
    a: Array,
    levels: np.ndarray,
    boundaries: np.ndarray,
    grid: Callable[[Array], tuple[Array, Array | None]],
    *,
    block: int,
    bits: int,
) -> Quantized:
    """``a`` at the nearest levels; ``grid`` gives scales and offsets of ``(rows, b, block)``."""
    check_real(a)
    a = detached(a)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    xp = namespace(a)
    m, n = a.shape
    block = min(block, n)
    dtype = compute_dtype(xp, a.dtype)
    edges = from_host(boundaries, a, dtype)
    parts = []
    for rows in slices(m, max(1, _CHUNK // n)):  # wide copies of a chunk only
        blocks = _blocks(as_compute(a[rows, :]), block)
        scales, offsets = grid(blocks)
        if not math.isfinite(max_abs(blocks) + max_abs(scales)):
            raise ValueError("entries must be finite, and the range of a block must not overflow")
        unit = blocks if offsets is None else blocks - offsets[..., None]
        unit = unit / xp.where(scales > 0, scales, xp.ones_like(scales))[..., None]
        codes = xp.searchsorted(edges, xp.reshape(unit, (-1,)))
        codes = xp.reshape(xp.astype(codes, xp.uint8), (blocks.shape[0], -1))
        parts.append((_packed(codes, bits), scales, offsets))
    codes, scales, offsets = (
        None if column[0] is None else xp.concat(column, axis=0)
        for column in zip(*parts, strict=True)
    )
    return Quantized(codes, scales, from_host(levels, a, dtype), n, block, bits, offsets)


def _blocks(rows: Array, block: int) -> Array:
    """Rows as ``(rows, b, block)``; the last entry of each is repeated to fill its last block."""
    xp = namespace(rows)
    padding = -rows.shape[1] % block
    if padding:
        last = xp.broadcast_to(rows[:, -1:], (rows.shape[0], padding))
        rows = xp.concat([rows, last], axis=1)
    return xp.reshape(rows, (rows.shape[0], -1, block))


def _packed(codes: Array, bits: int) -> Array:
    """``8 // bits`` codes in a byte."""
    xp = namespace(codes)
    count = 8 // bits
    padding = xp.zeros(
        (codes.shape[0], -codes.shape[1] % count), dtype=codes.dtype, device=device(codes)
    )
    grouped = xp.reshape(xp.concat([codes, padding], axis=1), (codes.shape[0], -1, count))
    packed = grouped[..., 0]
    for k in range(1, count):
        packed = packed | (grouped[..., k] << (bits * k))
    return packed


def _bytes_table(levels: Array, bits: int) -> Array:
    """Levels of the ``8 // bits`` codes of every byte, of shape ``(256, 8 // bits)``."""
    codes = np.arange(256)[:, None] >> (bits * np.arange(8 // bits)) & (2**bits - 1)
    # The last codes of a format may have no level.
    codes = np.minimum(codes, levels.shape[0] - 1)
    xp = namespace(levels)
    index = from_host(codes.reshape(-1), levels, xp.int32)
    return xp.reshape(xp.take(levels, index, axis=0), codes.shape)


def check_real(a: Array) -> None:
    """Raise unless ``a`` is a real floating matrix."""
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"a quantizer needs a matrix, not empty, got shape {tuple(a.shape)}")
    if not is_inexact(a.dtype) or is_complex(a.dtype):
        raise TypeError(f"a quantizer needs real floating entries, got {dtype_name(a.dtype)}")
