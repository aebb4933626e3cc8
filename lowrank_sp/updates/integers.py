"""Arrays that are kept as integers of a few bits, and roundings that are right on average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowrank_sp._arrays import Array, device, is_complex, namespace, real_dtype
from lowrank_sp.updates.rule import State, over


@dataclass(frozen=True)
class Integers:
    r"""How an array is kept in a few bits an entry: integers, and a scale for every block of a row.

    .. math:: \hat x_j = c_b\, k_j / L, \qquad c_b = \max_{j \in b} |x_j|, \qquad
              k_j \in \{-L, \dots, L\}, \qquad L = 2^{\text{bits} - 1} - 1

    Codes and values are those of :func:`~lowrank_sp.adapters.quantize.int_symmetric`, for stacks of
    matrices and by functions that can be traced. What is decoded has the same codes again.

    Parameters
    ----------
    bits : int
        In ``2..8``; ``8 // bits`` integers share a byte.
    block : int
        Entries that share a scale; the last block of a row may be short.

    Examples
    --------
    >>> import numpy as np
    >>> kept = Integers(bits=4, block=4).encode(np.array([[7.0, -3.2, 0.4, 0.0]]))
    >>> kept["codes"], kept["scales"]
    (array([[ 78, 119]], dtype=uint8), array([[7.]]))
    >>> Integers(bits=4, block=4).decode(kept, 4)
    array([[ 7., -3.,  0.,  0.]])
    """

    bits: int = 8
    block: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    @property
    def largest(self) -> int:
        """``L``."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, x: Array, *, noise: Array | None = None) -> State:
        """Integers and scales.

        Parameters
        ----------
        x : array, shape (..., m, n)
            Real.
        noise : array of numbers in [0, 1), of shape (..., m, n), optional
            An entry between two integers takes the upper one where its distance to the lower is
            more than ``1 - noise``: uniform noise makes the mean exact. By default the nearer one.

        Returns
        -------
        dict of arrays
            ``"codes"``, uint8, and ``"scales"`` of shape (..., m, number of blocks).
        """
        xp = namespace(x)
        if is_complex(x.dtype):
            raise TypeError(f"integers are for real entries, got {x.dtype}")
        blocks = self._blocks(x)
        scales = xp.max(abs(blocks), axis=-1)
        unit = blocks / xp.where(scales > 0, scales, xp.ones_like(scales))[..., None]
        shift = 0.5 if noise is None else self._blocks(noise)
        rounded = xp.clip(xp.floor(unit * self.largest + shift), -self.largest, self.largest)
        codes = xp.astype(rounded + self.largest, xp.uint8)
        codes = xp.reshape(codes, (*codes.shape[:-2], -1))[..., : x.shape[-1]]
        return {"codes": self._packed(codes), "scales": scales}

    def decode(self, kept: State, columns: int) -> Array:
        """The array of ``columns`` columns that integers and scales stand for."""
        xp, scales = namespace(kept["codes"]), kept["scales"]
        packed = kept["codes"][..., None]
        shifts = self.bits * xp.arange(8 // self.bits, dtype=xp.uint8, device=device(packed))
        codes = (packed >> shifts) & (2**self.bits - 1)
        codes = xp.reshape(codes, (*codes.shape[:-2], -1))[..., :columns]
        integers = self._blocks(xp.astype(codes, scales.dtype) - self.largest)
        values = integers / self.largest * scales[..., None]
        return xp.reshape(values, (*values.shape[:-2], -1))[..., :columns]

    def round(self, x: Array, *, noise: Array | None = None) -> Array:
        """What :meth:`decode` gives of what :meth:`encode` keeps."""
        return self.decode(self.encode(x, noise=noise), x.shape[-1])

    def _blocks(self, x: Array) -> Array:
        """``(..., m, b, block)``, filled up with zeros."""
        block = min(self.block, x.shape[-1])
        x = _filled(x, block)
        return namespace(x).reshape(x, (*x.shape[:-1], -1, block))

    def _packed(self, codes: Array) -> Array:
        xp, count = namespace(codes), 8 // self.bits
        codes = _filled(codes, count)
        grouped = xp.reshape(codes, (*codes.shape[:-1], -1, count))
        packed = grouped[..., 0]
        for k in range(1, count):
            packed = packed | (grouped[..., k] << (self.bits * k))
        return packed


def _filled(x: Array, block: int) -> Array:
    """``x`` with columns of zeros up to a multiple of ``block``."""
    xp, missing = namespace(x), -x.shape[-1] % block
    if missing == 0:
        return x
    zeros = xp.zeros((*x.shape[:-1], missing), dtype=x.dtype, device=device(x))
    return xp.concat([x, zeros], axis=-1)


def uniform_at(shape: tuple[int, int], *keys: Any, like: Array) -> Array:
    """Numbers in [0, 1) that follow from their place and integer keys: no generator, no state.

    The keys, arrays of shape (...) or numbers, are hashed with the place of each entry. One key
    gives one draw on every library, device and number of processes, in a compiled function too.

    Parameters
    ----------
    shape : (int, int)
    keys : int, or int32 array of shape (...)
    like : array
        Gives library, device and precision.

    Returns
    -------
    array, shape (..., m, n)
        Multiples of ``2^-24``.
    """
    xp = namespace(like)
    zero = xp.zeros((1, 1), dtype=xp.int32, device=device(like))
    mixed = zero
    for key in keys:
        # With two axes more, for numbers that overflow alone are warned about.
        mixed = _mixed(mixed ^ (zero + over(key)))
    places = xp.arange(math.prod(shape), dtype=xp.int32, device=device(like))
    bits = _mixed(_mixed(xp.reshape(places, shape)) ^ mixed)
    return xp.astype((bits >> 8) & 0xFFFFFF, real_dtype(xp, like.dtype)) * 2.0**-24


def _mixed(x: Array) -> Array:
    """A bijection of 32 bits, of which each depends on all: two products and three shifts."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def rows_short(x: Array) -> Array:
    """A weight or its transpose, with rows along the shorter side, which shards leave whole."""
    return x.mT if x.shape[-2] < x.shape[-1] else x


def turned_like(rows: Array, shape: tuple[int, ...]) -> Array:
    """The weight of a shape that :func:`rows_short` has made ``rows`` of."""
    return rows.mT if shape[-2] < shape[-1] else rows
