"""Formats: which levels, and which scale a block gets."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np

from lowrank_sp._arrays import Array, compute_dtype, dtype_name, namespace
from lowrank_sp.adapters.quantize._blocks import Quantized, check_real, nearest


def nf4(a: Array, *, block: int = 64) -> Quantized:
    """Blocks of sixteen normal quantiles, scaled by their largest entry.

    The levels are dense where Gaussian entries are :cite:p:`dettmers2023qlora`.

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

    return nearest(a, levels, _middles(levels), grid, block=block, bits=bits)


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
    the range of 256 scales over ``2 (2^bits - 1)``, times the largest level.

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
    check_real(a)
    dtype = dtype_name(compute_dtype(namespace(a), a.dtype))
    levels, boundaries = _float8_levels(exponent_bits, mantissa_bits, largest, dtype)

    def grid(blocks: Array) -> tuple[Array, None]:
        xp = namespace(blocks)
        size = xp.max(abs(blocks), axis=-1)
        return xp.ones_like(size) if block is None else size / largest, None

    return nearest(
        a, levels, boundaries, grid, block=a.shape[1] if block is None else block, bits=8
    )


def _by_largest(a: Array, levels: np.ndarray, block: int, *, bits: int) -> Quantized:
    def grid(blocks: Array) -> tuple[Array, None]:
        return namespace(blocks).max(abs(blocks), axis=-1), None

    return nearest(a, levels, _middles(levels), grid, block=block, bits=bits)


def _check_bits(bits: int, least: int) -> None:
    if not least <= bits <= 8:
        raise ValueError(f"bits must be in {least}..8, got {bits}")
