r"""Products in the blocks of a grid, or along its diagonal.

With ``B_i`` in the ``g`` blocks of rows and ``A_j`` in the ``g`` blocks of columns, all forms here
are one block-diagonal matrix of the ``B_i`` times something short: so they are plain LoRA of rank
``g`` times theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, namespace
from lowrank_sp.adapters.forms._draws import Like, factor_scale, full, kaiming_uniform, zeros
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.factors import LowRank


class _Blocks(Form, ABC):
    """``up`` of shape (g, m / g, r) and ``down`` of shape (g, r, n / g), and what is between."""

    up: Array
    down: Array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        (g, p, _), t = self.up.shape, self.down.shape[2]
        return g * p, g * t

    @property
    def rank_bound(self) -> int:
        g, p, r = self.up.shape
        return g * min(p, r, self.down.shape[2])

    @abstractmethod
    def _right(self) -> Array:
        """What the block-diagonal ``up`` is multiplied by, of shape (g r, n)."""

    @abstractmethod
    def _mixed(self, z: Array) -> Array:
        """From products with ``down`` to factors of ``up``, both of shape (g, c, r)."""

    def delta(self) -> LowRank:
        return LowRank(block_diagonal(self.up * self.scale), self._right())

    def apply(self, x: Array) -> Array:
        xp = namespace(x)
        g, _, t = self.down.shape
        inside = xp.permute_dims(xp.reshape(x, (-1, g, t)), (1, 0, 2)) @ self.down.mT
        y = (self._mixed(inside) * self.scale) @ self.up.mT
        return xp.reshape(xp.permute_dims(y, (1, 0, 2)), (*x.shape[:-1], self.shape[0]))


@dataclass(frozen=True, repr=False)
class BlockDiagonal(_Blocks):
    r"""Small products along the diagonal: MELoRA :cite:p:`ren2024melora`.

    .. math:: \Delta = s \operatorname{blockdiag}(B_1 A_1, \dots, B_g A_g)

    Attributes
    ----------
    up : array, shape (g, m / g, r)
        ``B_i``.
    down : array, shape (g, r, n / g)
        ``A_i``.
    scale : float

    Examples
    --------
    >>> form = BlockDiagonal.create((4096, 1024), rank=2, blocks=8, rng=0)
    >>> form.num_trainable, form.rank_bound  # rank 2 as plain LoRA has as many
    (10240, 16)
    """

    up: Trained[Array, "g p r"]
    down: Trained[Array, "g r t"]
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        blocks: int,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """``down`` Kaiming, ``up`` zero, ``scale = alpha / rank``, with the rank of one block."""
        return cls(*_drawn(weight, rank, blocks, alpha, rng))

    def _right(self) -> Array:
        return block_diagonal(self.down)

    def _mixed(self, z: Array) -> Array:
        return z


@dataclass(frozen=True, repr=False)
class DiagonalGrid(_Blocks):
    r"""Diagonals of its own for every block of a product: BoRA :cite:p:`li2026bora`.

    .. math:: \Delta_{ij} = s\, B_i \operatorname{diag}(d_{ij}) A_j

    Attributes
    ----------
    up : array, shape (g, m / g, r)
        ``B_i``: the rows of ``B`` in blocks.
    down : array, shape (g, r, n / g)
        ``A_j``: the columns of ``A`` in blocks.
    gains : array, shape (g, g, r)
        ``d_ij``.
    scale : float

    Notes
    -----
    ``2 r (m + n + g^2)`` flops per input.

    Examples
    --------
    >>> form = DiagonalGrid.create((64, 48), rank=2, blocks=4, rng=0)
    >>> form.num_trainable, form.rank_bound
    (256, 8)
    """

    up: Trained[Array, "g p r"]
    down: Trained[Array, "g r t"]
    gains: Trained[Array, "g g r"]
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        blocks: int,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """Plain LoRA: ``down`` Kaiming, ``up`` zero, all gains one, ``scale = alpha / rank``.

        The gains are ours: what the authors start at is not known to us.
        """
        up, down, scale = _drawn(weight, rank, blocks, alpha, rng)
        return cls(up, down, full((blocks, blocks, rank), 1.0, up), scale)

    def _right(self) -> Array:
        xp = namespace(self.down)
        g, r, t = self.down.shape
        grid = self.gains[..., None] * self.down
        return xp.reshape(xp.permute_dims(grid, (0, 2, 1, 3)), (g * r, g * t))

    def _mixed(self, z: Array) -> Array:
        return namespace(z).sum(self.gains[:, :, None, :] * z, axis=1)


@dataclass(frozen=True, repr=False)
class BlockGrid(_Blocks):
    r"""A small product of its own in every block of a grid: GraLoRA :cite:p:`jung2025gralora`.

    .. math:: \Delta_{ij} = s\, B_i[:, j]\, A_j[i, :] \; (+\; s\, \text{a plain product})

    where :math:`B_i[:, j]` are the columns of number ``j`` of ``g`` groups of ``r / g``, and
    :math:`A_j[i, :]` the rows of number ``i``. It has the trained numbers of plain LoRA of rank
    ``r`` and up to ``g`` times its rank.

    Attributes
    ----------
    up : array, shape (g, m / g, r)
        ``B_i``; PEFT's ``gralora_B`` with the last two axes swapped.
    down : array, shape (g, r, n / g)
        ``A_j``; ``gralora_A`` with the last two axes swapped.
    common_up : array, shape (m, h), or None
        The hybrid part, ``gralora_B_general``.
    common_down : array, shape (h, n), or None
        ``gralora_A_general``.
    scale : float

    Notes
    -----
    ``2 r (m + n)`` flops per input, those of plain LoRA of rank ``r``.

    Examples
    --------
    >>> form = BlockGrid.create((64, 48), rank=8, blocks=4, rng=0)
    >>> form.num_trainable, form.rank_bound
    (896, 32)
    """

    up: Trained[Array, "g p r"]
    down: Trained[Array, "g r t"]
    common_up: Trained[Array, "m h"] = None
    common_down: Trained[Array, "h n"] = None
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        blocks: int,
        common: int = 0,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """``down`` Kaiming, ``up`` zero, ``scale = alpha / (rank + common)``.

        Parameters
        ----------
        weight : array or (int, int)
            With sides that ``blocks`` divides.
        rank : int
            That ``blocks`` divides.
        blocks : int
            ``g``, the number of blocks to a side.
        common : int
            Rank of the plain product beside them, zero for none.
        alpha : float, optional
            By default ``rank + common``.
        rng : int, Generator or None
        """
        generator = np.random.default_rng(rng)
        up, down, _ = _drawn(weight, rank, blocks, alpha, generator)
        if rank % blocks:
            raise ValueError(f"blocks must divide the rank, {rank}, got {blocks}")
        scale = 1.0 if alpha is None else alpha / (rank + common)
        if common == 0:
            return cls(up, down, scale=scale)
        (m, n), like, _ = factor_scale(weight, common, None)
        wide = kaiming_uniform((common, n), like, generator)
        return cls(up, down, zeros((m, common), like), wide, scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        g, _, r = self.up.shape
        if r % g:
            raise ValueError(f"the last axis of up must be a multiple of its first, {g}, got {r}")
        both = self.common_up, self.common_down
        if (both[0] is None) != (both[1] is None):
            raise ValueError("the common product needs both common_up and common_down, or neither")
        if both[0] is not None and (both[0].shape[0], both[1].shape[1]) != self.shape:
            raise ValueError(
                f"the common product must have shape {self.shape}, got factors of shapes "
                f"{tuple(both[0].shape)} and {tuple(both[1].shape)}"
            )

    @property
    def rank_bound(self) -> int:
        g, p, r = self.up.shape
        common = 0 if self.common_up is None else self.common_up.shape[1]
        return min(*self.shape, g * min(p, r) + common, g * min(self.down.shape[2], r) + common)

    def delta(self) -> LowRank:
        blocks = super().delta()
        if self.common_up is None:
            return blocks
        return blocks + LowRank(self.common_up * self.scale, self.common_down)

    def apply(self, x: Array) -> Array:
        y = super().apply(x)
        if self.common_up is None:
            return y
        return y + ((x @ self.common_down.mT) * self.scale) @ self.common_up.mT

    def _right(self) -> Array:
        # Row (i, j, k) holds, in the columns of block j, row (i, k) of A_j.
        xp = namespace(self.down)
        g, r, t = self.down.shape
        rows = xp.permute_dims(xp.reshape(self.down, (g, g, r // g, t)), (1, 0, 2, 3))
        eye = xp.eye(g, dtype=self.down.dtype, device=device(self.down))
        grid = rows[:, :, :, None, :] * eye[:, None, :, None]
        return xp.reshape(grid, (g * r, g * t))

    def _mixed(self, z: Array) -> Array:
        # Group i of what block j of the input gives goes to group j of block i of the output.
        xp = namespace(z)
        g, c, r = z.shape
        groups = xp.reshape(z, (g, c, g, r // g))
        return xp.reshape(xp.permute_dims(groups, (2, 1, 0, 3)), (g, c, r))


def block_diagonal(blocks: Array) -> Array:
    """Matrix ``(g p, g q)`` with ``blocks`` of shape (g, p, q) along its diagonal."""
    xp = namespace(blocks)
    g, p, q = blocks.shape
    eye = xp.eye(g, dtype=blocks.dtype, device=device(blocks))
    return xp.reshape(blocks[:, :, None, :] * eye[:, None, :, None], (g * p, g * q))


def _drawn(
    weight: Like, rank: int, blocks: int, alpha: float | None, rng: RNG
) -> tuple[Array, Array, float]:
    """``down`` as Kaiming factors of the blocks, ``up`` zero, and the scale."""
    (m, n), like, scale = factor_scale(weight, rank, alpha)
    if blocks < 1 or m % blocks or n % blocks:
        raise ValueError(f"blocks must divide both sides of {m} x {n}, got {blocks}")
    down = kaiming_uniform((blocks, rank, n // blocks), like, rng)
    return zeros((blocks, m // blocks, rank), like), down, scale
