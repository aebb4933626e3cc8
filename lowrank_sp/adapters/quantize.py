r"""Matrices in a few bits an entry: blocks of NF4, integers or small floats.

A row is cut into blocks. A block keeps a scale (and an offset, in the affine format), an entry the
index of a level:

.. math:: \hat w_{ij} = \text{scale}_{ib}\, \text{levels}[\text{code}_{ij}] + \text{offset}_{ib},
          \qquad b = \lfloor j / \text{block} \rfloor

and every quantizer chooses the nearest level, so the error of an entry is at most half the distance
of the levels around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    as_compute,
    compute_dtype,
    device,
    dtype_name,
    from_host,
    is_complex,
    is_inexact,
    max_abs,
    namespace,
    slices,
    to_host,
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


def nf4(a: Array, *, block: int = 64) -> Quantized:
    """Blocks of sixteen normal quantiles, scaled by their largest entry.

    For Gaussian entries every level is used about equally often :cite:p:`dettmers2023qlora`.

    Parameters
    ----------
    a : array, shape (m, n)
        Real floating. Half precision is coded from float32.
    block : int
        Entries that share a scale.

    Returns
    -------
    Quantized
        4 bits an entry, and a scale for every block: see :func:`double` to shrink those.

    Examples
    --------
    >>> import numpy as np
    >>> q = nf4(np.array([[2.0, -2.0, 0.0, 0.2]]), block=4)
    >>> q.codes, np.round(q.to_dense(), 3)
    (array([[ 15, 135]], dtype=uint8), array([[ 2.   , -2.   ,  0.   ,  0.159]]))
    """
    return _by_largest(a, nf4_levels(), block, bits=4)


def int_symmetric(a: Array, bits: int = 4, *, block: int = 64) -> Quantized:
    """Blocks of ``2^bits - 1`` equidistant levels around zero, scaled by the largest entry.

    The error of an entry is at most half a step, ``max |a_block| / (2^bits - 2)``.

    Parameters
    ----------
    a : array, shape (m, n)
        Real floating.
    bits : int
        In ``2..8``.
    block : int
        Entries that share a scale.
    """
    _check_bits(bits, 2)
    largest = 2 ** (bits - 1) - 1
    return _by_largest(a, np.arange(-largest, largest + 1) / largest, block, bits=bits)


def int_affine(a: Array, bits: int = 4, *, block: int = 64) -> Quantized:
    """Blocks of ``2^bits`` equidistant levels from the smallest entry to the largest.

    The error of an entry is at most half a step, ``(max - min) / (2^bits - 1) / 2``.

    Parameters
    ----------
    a : array, shape (m, n)
        Real floating.
    bits : int
        In ``1..8``.
    block : int
        Entries that share a scale and an offset.
    """
    _check_bits(bits, 1)
    levels = np.arange(2**bits) / (2**bits - 1)

    def grid(blocks: Array) -> tuple[Array, Array]:
        xp = namespace(blocks)
        low = xp.min(blocks, axis=-1)
        return xp.max(blocks, axis=-1) - low, low

    return _nearest(a, levels, _middles(levels), grid, block=block, bits=bits)


def fp8_e4m3(a: Array, *, block: int | None = None) -> Quantized:
    """Eight-bit floats of 4 exponent and 3 mantissa bits: up to 448, subnormal below ``2^-6``.

    Rounded to nearest, ties to even; what is larger becomes the largest. Without ``block`` this is
    the cast; with it, a block is scaled so that its largest entry becomes 448
    :cite:p:`micikevicius2022fp8`.

    Parameters
    ----------
    a : array, shape (m, n)
        Real floating.
    block : int, optional
        Entries that share a scale.

    Examples
    --------
    >>> import numpy as np
    >>> fp8_e4m3(np.array([[1.06, 300.0, 1e3, 0.001]])).to_dense()
    array([[1.000000e+00, 2.880000e+02, 4.480000e+02, 1.953125e-03]])
    """
    return _float8(a, 4, 3, 448.0, block)


def fp8_e5m2(a: Array, *, block: int | None = None) -> Quantized:
    """Eight-bit floats of 5 exponent and 2 mantissa bits: up to 57344, subnormal below ``2^-14``.

    Parameters are those of :func:`fp8_e4m3`.
    """
    return _float8(a, 5, 2, 57344.0, block)


def double(q: Quantized, *, bits: int = 8, block: int = 256) -> Quantized:
    """``q`` with its scales quantized as well, in blocks of their own.

    32 bits for every 64 entries become 8: half a bit an entry becomes an eighth. The scales, all
    of one sign, are coded by :func:`int_affine`, so that the error of an entry grows by at most
    the range of 256 scales over ``2 (2^bits - 1)``.

    Parameters
    ----------
    q : Quantized
    bits : int
        Of a scale.
    block : int
        Scales that share a scale.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    >>> nf4(w).bits_per_entry, double(nf4(w)).bits_per_entry
    (4.5, 4.12890625)
    """
    if isinstance(q.scales, Quantized):
        raise ValueError("the scales are quantized already")
    flat = namespace(q.scales).reshape(q.scales, (1, -1))
    return replace(q, scales=int_affine(flat, bits, block=block))


@cache
def nf4_levels() -> np.ndarray:
    """The sixteen levels of NF4, from -1 to 1, in float64.

    Eight quantiles of the normal distribution above zero, seven below, and zero, with probabilities
    from 1/2 to the mean of ``1 - 1/30`` and ``1 - 1/32``, over the largest.
    """
    most = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    above, below = (quantile(np.linspace(most, 0.5, k)[:-1]) for k in (9, 8))
    levels = np.sort(np.concatenate([-below, [0.0], above]))
    levels /= levels[-1]
    levels.flags.writeable = False
    return levels


@cache
def _float8_levels(
    exponent_bits: int, mantissa_bits: int, largest: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Finite values from small to large, and boundaries between them that send ties to even."""
    steps, bias = 2**mantissa_bits, 2 ** (exponent_bits - 1) - 1
    mantissa = np.arange(steps) / steps
    exponents = np.arange(1, 2**exponent_bits)
    normal = 2.0 ** (exponents[:, None] - bias) * (1 + mantissa)
    positive = np.concatenate([2.0 ** (1 - bias) * mantissa, normal.ravel()])
    positive = positive[positive <= largest].astype(dtype)
    middle = _middles(positive)
    # An entry on a boundary takes the lower level; next to an odd one it has to take the upper.
    odd = np.arange(len(middle)) % 2 == 1
    above = np.where(odd, np.nextafter(middle, np.zeros_like(middle)), middle)
    below = np.where(odd, -middle, np.nextafter(-middle, -np.ones_like(middle) * np.inf))
    return np.concatenate([-positive[:0:-1], positive]), np.concatenate([below[::-1], above])


def _middles(levels: np.ndarray) -> np.ndarray:
    return (levels[1:] + levels[:-1]) / 2


def _float8(
    a: Array, exponent_bits: int, mantissa_bits: int, largest: float, block: int | None
) -> Quantized:
    _check_real(a)
    dtype = dtype_name(compute_dtype(namespace(a), a.dtype))
    levels, boundaries = _float8_levels(exponent_bits, mantissa_bits, largest, dtype)

    def grid(blocks: Array) -> tuple[Array, None]:
        xp = namespace(blocks)
        size = xp.max(abs(blocks), axis=-1)
        return xp.ones_like(size) if block is None else size / largest, None

    return _nearest(a, levels, boundaries, grid, block=block or a.shape[1], bits=8)


def _by_largest(a: Array, levels: np.ndarray, block: int, *, bits: int) -> Quantized:
    def grid(blocks: Array) -> tuple[Array, None]:
        return namespace(blocks).max(abs(blocks), axis=-1), None

    return _nearest(a, levels, _middles(levels), grid, block=block, bits=bits)


def _nearest(
    a: Array,
    levels: np.ndarray,
    boundaries: np.ndarray,
    grid: Callable[[Array], tuple[Array, Array | None]],
    *,
    block: int,
    bits: int,
) -> Quantized:
    """``a`` at the nearest levels; ``grid`` gives scales and offsets of ``(rows, b, block)``."""
    _check_real(a)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    xp = namespace(a)
    m, n = a.shape
    block = min(block, n)
    dtype = compute_dtype(xp, a.dtype)
    edges = from_host(boundaries, a, dtype)
    parts = []
    for rows in slices(m, max(1, _CHUNK // n)):
        blocks = _blocks(as_compute(a[rows, :]), block)
        scales, offsets = grid(blocks)
        unit = blocks if offsets is None else blocks - offsets[..., None]
        unit = unit / xp.where(scales > 0, scales, xp.ones_like(scales))[..., None]
        codes = xp.searchsorted(edges, xp.reshape(unit, (-1,)))
        codes = xp.reshape(xp.astype(codes, xp.uint8), (blocks.shape[0], -1))
        parts.append((_packed(codes, bits), scales, offsets))
    codes, scales, offsets = (
        None if column[0] is None else xp.concat(column, axis=0)
        for column in zip(*parts, strict=True)
    )
    if not math.isfinite(max_abs(scales)):
        raise ValueError("entries must be finite and their range must not overflow, got NaN or inf")
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
    host = to_host(levels)[np.minimum(codes, levels.shape[0] - 1)]
    return from_host(host, levels)


def _check_real(a: Array) -> None:
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"a quantizer needs a matrix, not empty, got shape {tuple(a.shape)}")
    if not is_inexact(a.dtype) or is_complex(a.dtype):
        raise TypeError(f"a quantizer needs real floating entries, got {dtype_name(a.dtype)}")


def _check_bits(bits: int, least: int) -> None:
    if not least <= bits <= 8:
        raise ValueError(f"bits must be in {least}..8, got {bits}")
