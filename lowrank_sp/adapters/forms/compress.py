r"""A square matrix between fixed maps that shorten the input and lengthen the output."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import Array, device, from_host, namespace
from lowrank_sp.adapters.forms._draws import Like, factor_scale, zeros
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank


class _Square(Form, ABC):
    """Shortening and lengthening by reshapes."""

    square: Array
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def _chunks(self, x: Array) -> Array:
        """``x`` continued periodically to a multiple of ``q``, in pieces of ``q``."""
        xp = namespace(x)
        n, q = self.size[1], self.square.shape[0]
        padding = -n % q
        if padding:
            x = xp.concat([x, x[..., :padding]], axis=-1)
        return xp.reshape(x, (*x.shape[:-1], (n + padding) // q, q))


@dataclass(frozen=True, repr=False)
class SharedSquare(_Square):
    r"""Inputs summed in groups, a square matrix, outputs repeated: MoRA :cite:p:`jiang2024mora`,
    types 1 to 4.

    .. math:: \Delta = D M C, \qquad (C x)_j = \sum_{i \equiv j \bmod q} x_i, \qquad
              (D y)_i = y_{i \bmod q},

    where ``x`` is continued periodically to a multiple of ``q``. Its rank is ``q``, the root of
    the number of trained entries.

    Groups of neighbours take the place of every ``q``-th entry in ``C`` or in ``D``, or in both. No
    input is then counted twice: the first ``n mod q`` groups are longer by one.

    Attributes
    ----------
    square : array, shape (q, q)
        ``M``.
    size : (int, int)
        Shape ``(m, n)`` of the weight.
    neighbours_in, neighbours_out : bool
        Whether inputs, outputs are grouped with their neighbours: neither is type 1, both are type
        2, the inputs type 3, the outputs type 4.

    Notes
    -----
    ``2 q^2`` flops per input; ``C`` and ``D`` are reshapes and sums. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> SharedSquare.create((4096, 4096), rank=16)
    SharedSquare(square 362 x 362)
    >>> SharedSquare(np.array([[1.0, 0.0], [0.0, 2.0]]), (5, 4)).delta().to_dense()[:, :3]
    array([[1., 0., 1.],
           [0., 2., 0.],
           [1., 0., 1.],
           [0., 2., 0.],
           [1., 0., 1.]])
    >>> SharedSquare(np.array([[1.0, 0.0], [0.0, 2.0]]), (3, 3), True, True).delta().to_dense()
    array([[1., 1., 0.],
           [1., 1., 0.],
           [0., 0., 2.]])
    """  # noqa: D205

    square: Trained[Array, "q q"]
    size: tuple[int, int]
    neighbours_in: bool = False
    neighbours_out: bool = False

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        neighbours_in: bool = False,
        neighbours_out: bool = False,
    ) -> Self:
        """Zero, with as many entries as factors of rank ``rank`` have, nearly."""
        size, like, q = _side(weight, rank)
        return cls(zeros((q, q), like), size, neighbours_in, neighbours_out)

    @property
    def rank_bound(self) -> int:
        return min(self.square.shape[0], *self.size)

    def delta(self) -> LowRank:
        xp = namespace(self.square)
        q, (m, n) = self.square.shape[0], self.size
        eye = xp.eye(q, dtype=self.square.dtype, device=device(self.square))
        up = neighbours(eye, m) if self.neighbours_out else tiled(eye, m)
        if self.neighbours_in:
            return LowRank(up.mT, neighbours(self.square, n))
        padding = -n % q
        row = tiled(self.square, n + padding)
        right = xp.concat([row[:, :padding] + row[:, n:], row[:, padding:n]], axis=1)
        return LowRank(up.mT, right)

    def apply(self, x: Array) -> Array:
        m, q = self.size[0], self.square.shape[0]
        grouped = summed(x, q) if self.neighbours_in else namespace(x).sum(self._chunks(x), axis=-2)
        y = grouped @ self.square.mT
        return neighbours(y, m) if self.neighbours_out else tiled(y, m)


def tiled(y: Array, length: int) -> Array:
    """``y`` repeated along its last axis, and cut to ``length`` entries."""
    times = -(-length // y.shape[-1])
    y = y if times == 1 else namespace(y).concat([y] * times, axis=-1)
    return y[..., :length]


def neighbours(y: Array, length: int) -> Array:
    """Every entry of the last axis repeated in place, the first ones once more than the others."""
    xp = namespace(y)
    parts = []
    for part, times in _uneven(y.shape[-1], length):
        groups = xp.broadcast_to(y[..., part, None], (*y[..., part].shape, times))
        parts.append(xp.reshape(groups, (*y.shape[:-1], (part.stop - part.start) * times)))
    return xp.concat(parts, axis=-1)


def summed(x: Array, groups: int) -> Array:
    """Sums of neighbours: the transpose of :func:`neighbours`."""
    xp, start, parts = namespace(x), 0, []
    for part, times in _uneven(groups, x.shape[-1]):
        count = part.stop - part.start
        piece = x[..., start : start + count * times]
        parts.append(xp.sum(xp.reshape(piece, (*x.shape[:-1], count, times)), axis=-1))
        start += count * times
    return xp.concat(parts, axis=-1)


def _uneven(groups: int, length: int) -> list[tuple[slice, int]]:
    """Which groups of neighbours there are, and how long they are."""
    longer, times = length % groups, length // groups
    return [(slice(0, longer), times + 1), (slice(longer, groups), times)]


@dataclass(frozen=True, repr=False)
class RotatedSquare(_Square):
    r"""One square matrix for all pieces of the input, each rotated by its own angles: MoRA
    :cite:p:`jiang2024mora`, type 6.

    .. math:: y = (M R_0 x_0,\ M R_1 x_1,\ \dots), \qquad
              \theta_{ij} = 10^{-8 j / q}\, i, \quad j = 0, \dots, q/2 - 1,

    where :math:`R_i` turns entries ``j`` and ``j + q/2`` by :math:`\theta_{ij}`, as in rotary
    embeddings; ``x`` is continued periodically, ``y`` repeated or cut to the length of the output.
    The rank is up to ``min(m, n)``.

    Attributes
    ----------
    square : array, shape (q, q)
        ``M``, of even size.
    cosines, sines : arrays, shape (g, q / 2)
        Of the angles; ``g`` pieces.
    size : (int, int)
        Shape ``(m, n)`` of the weight.

    Notes
    -----
    ``2 q n`` flops per input. There is no scale.

    Examples
    --------
    >>> RotatedSquare.create((4096, 1024), rank=8)
    RotatedSquare(square 202 x 202, cosines 6 x 101, sines 6 x 101)
    """  # noqa: D205

    square: Trained[Array, "q q"]
    size: tuple[int, int]
    cosines: Fixed[Array, "g h"]
    sines: Fixed[Array, "g h"]

    @classmethod
    def create(cls, weight: Like, rank: int) -> Self:
        """Zero, with as many entries as factors of rank ``rank`` have, nearly."""
        size, like, q = _side(weight, rank, even=True)
        pieces = np.arange(-(-size[1] // q))
        angles = np.outer(pieces, 10000.0 ** (-2 * np.arange(q // 2) / q))
        cosines, sines = (from_host(f(angles), like, like.dtype) for f in (np.cos, np.sin))
        return cls(zeros((q, q), like), size, cosines, sines)

    @property
    def rank_bound(self) -> int:
        return min(self.size)

    def delta(self) -> Array:
        xp = namespace(self.square)
        (g, h), n = self.cosines.shape, self.size[1]
        # M R_i, where R_i x = c x + s (-x_2, x_1) on the halves of x.
        first, second = self.square[:, :h], self.square[:, h:]
        c, s = self.cosines[:, None, :], self.sines[:, None, :]
        blocks = xp.concat([first * c + second * s, second * c - first * s], axis=-1)
        eye = xp.eye(g, dtype=self.square.dtype, device=device(self.square))
        grid = blocks[:, :, None, :] * eye[:, None, :, None]
        square = xp.reshape(grid, (2 * g * h, 2 * g * h))
        padding = 2 * g * h - n
        folded = square[:, :padding] + square[:, n:]
        return tiled(xp.concat([folded, square[:, padding:n]], axis=1).mT, self.size[0]).mT

    def apply(self, x: Array) -> Array:
        xp = namespace(x)
        pieces, h = self._chunks(x), self.cosines.shape[1]
        first, second = pieces[..., :h], pieces[..., h:]
        rotated = xp.concat(
            [
                first * self.cosines - second * self.sines,
                second * self.cosines + first * self.sines,
            ],
            axis=-1,
        )
        y = rotated @ self.square.mT
        return tiled(xp.reshape(y, (*x.shape[:-1], y.shape[-2] * y.shape[-1])), self.size[0])


def _side(weight: Like, rank: int, *, even: bool = False) -> tuple[tuple[int, int], Array, int]:
    (m, n), like, _ = factor_scale(weight, rank, None)
    q = int(math.sqrt((m + n) * rank) + 0.5)
    q = q - q % 2 if even else q
    if not 0 < q <= min(m, n):
        raise ValueError(
            f"rank {rank} gives a square of size {q}, which must be in 1..{min(m, n)} for a weight "
            f"of {m} x {n}; take at most rank {min(m, n) ** 2 // (m + n)}, or plain factors"
        )
    return (m, n), like, q
