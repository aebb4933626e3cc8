"""The cores of layers in shared factors: tensor trains, CP and Tucker decompositions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import matmul, mul
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, namespace
from lowrank_sp.adapters.forms._draws import (
    Like,
    full,
    kaiming_uniform,
    normal,
    orthogonal,
    uniform,
    zeros,
)
from lowrank_sp.adapters.forms._grid import Index, LayerGrid, gathered, like_of, shapes_of
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.adapters.forms.shared_core import SharedCore
from lowrank_sp.factors import check_rank
from lowrank_sp.tensors.ranks import tucker_rank


@dataclass(frozen=True, repr=False)
class SharedTT(SharedCore):
    r"""Cores that are products of matrices, one an axis: a tensor train over all layers.

    .. math:: \Delta_{i_1 \dots i_K} = s\, U\, G_1[i_1] \cdots G_K[i_K]\, V^T

    Along one axis every block has a free core: LoTR :cite:p:`bershatsky2024lotr` and FacT-TT
    :cite:p:`jie2023fact`. Along the axes of layers, matrix types and heads it is MetaTT
    :cite:p:`lopezpiqueres2025metatt`, whose train runs from the input to the output, and ours from
    the output to the input: ``i_1`` is its last axis.

    Attributes
    ----------
    cores : tuple of K arrays of shape (n_k, r_(k-1), r_k)
        ``G_k``, with ``r_0 = r`` and ``r_K = s``.

    Examples
    --------
    >>> form = SharedTT.create([(6, 4)] * 3, rank=2, rng=0)
    >>> form
    SharedTT(up 6 x 2, down 2 x 4, cores.0 3 x 2 x 2)
    >>> form.layer(1).delta()
    LowRank(6 x 4, rank 2, float64)
    """

    cores: Trained[tuple[Array, ...], "..."]

    def __post_init__(self) -> None:
        super().__post_init__()
        bonds = [self.up.shape[1], *(c.shape[-1] for c in self.cores[:-1]), self.down.shape[0]]
        sizes = zip(self.grid.sizes, pairwise(bonds), strict=False)
        self._check_sizes("cores", self.cores, [(n, *pair) for n, pair in sizes])

    @classmethod
    def create(
        cls,
        weights: Sequence[Like],
        rank: int | Sequence[int],
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As LoTR starts: Gaussian ``up`` and ``down`` of unit variance, the first core zero.

        Further cores are identities. LoTR's scale is ``alpha / rank``.

        Parameters
        ----------
        weights : sequence of arrays (m, n), or shapes
        rank : int, or K + 1 ints
            Sizes of the bonds from ``up`` to ``down``.
        grid : LayerGrid, optional
            By default one block a weight, along one axis.
        """
        grid, like, bonds, generator = _train_setting(weights, rank, grid, rng)
        (u, v), cores = grid.block, _identities(grid, bonds, like)
        up = normal((u, bonds[0]), 1.0, like, generator)
        down = normal((bonds[-1], v), 1.0, like, generator)
        return cls(up, down, grid, scale, (zeros(cores[0].shape, like), *cores[1:]))

    @classmethod
    def create_zero_up(
        cls,
        weights: Sequence[Like],
        rank: int | Sequence[int],
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As FacT-TT starts: ``up`` zero, all others uniform like layers of PyTorch."""
        grid, like, bonds, generator = _train_setting(weights, rank, grid, rng)
        u, v = grid.block
        down = kaiming_uniform((bonds[-1], v), like, generator)
        shapes = [(n, *pair) for n, pair in zip(grid.sizes, pairwise(bonds), strict=True)]
        cores = tuple(kaiming_uniform(shape, like, generator) for shape in shapes)
        return cls(zeros((u, bonds[0]), like), down, grid, scale, cores)

    @classmethod
    def create_identity(
        cls,
        weights: Sequence[Like],
        rank: int | Sequence[int],
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As MetaTT starts: ``down`` zero, all others identities. Nothing is drawn."""
        grid, like, bonds, _ = _train_setting(weights, rank, grid, rng)
        (u, v), cores = grid.block, _identities(grid, bonds, like)
        return cls(_eye(u, bonds[0], like), zeros((bonds[-1], v), like), grid, scale, cores)

    @property
    def core_rank(self) -> int:
        return min(self.up.shape[1], *(c.shape[2] for c in self.cores))

    def core_of(self, indices: Sequence[Index]) -> Array:
        positions = zip(*indices, strict=True)
        return reduce(matmul, map(gathered, self.cores, positions))


@dataclass(frozen=True, repr=False)
class SharedCP(SharedCore):
    r"""Cores that are diagonal, products of one row an axis: a CP decomposition of all layers.

    .. math:: \Delta_{i_1 \dots i_K} = s\, U\, \mathrm{diag}\bigl(F_1[i_1] \cdots F_K[i_K]\bigr) V^T

    On axes of layers, types and heads it is LoRTA :cite:p:`hounie2024lorta`, on axes of layers and
    heads CaRA :cite:p:`veeramacheneni2025canonical`. LoRTA's code lets the heads cut the inputs of
    every matrix, ``block = (m, n / heads)``; ``block = (m / heads, n)`` cuts the outputs, where the
    heads of queries, keys and values are.

    Attributes
    ----------
    factors : tuple of K arrays of shape (n_k, r)
        ``F_k``. One of a single row holds weights of the terms.

    Examples
    --------
    >>> grid = LayerGrid.indexed([(6, 6)] * 4, [(0, 0), (0, 1), (1, 0), (1, 1)], block=(6, 3))
    >>> SharedCP.create([(6, 6)] * 4, rank=2, grid=grid, rng=0)
    SharedCP(up 6 x 2, down 2 x 3, factors.0 2 x 2, factors.1 2 x 2, factors.2 2 x 2)
    """

    down: Trained[Array, "r v"]
    factors: Trained[tuple[Array, ...], "..."]

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = [(n, self.up.shape[1]) for n in self.grid.sizes]
        self._check_sizes("factors", self.factors, wanted)

    @classmethod
    def create(
        cls,
        weights: Sequence[Like],
        rank: int,
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As LoRTA starts: the factor of the side that is cut zero, ``down`` if none is.

        All others are uniform with the rank as fan-in, on ``+-1/sqrt(r)``, and on ``+-sqrt(6/r)``
        for the axes. LoRTA's scale is ``alpha / rank``.
        """
        grid, like, generator = _setting(weights, grid, rng)
        rank = check_rank(rank, max(grid.block), grid.block)
        u, v = grid.block
        if all(grid.counts(k)[0] == 1 for k in range(len(grid.shapes))):
            up, down = kaiming_uniform((u, rank), like, generator), zeros((rank, v), like)
        else:
            up, down = zeros((u, rank), like), kaiming_uniform((v, rank), like, generator).mT
        gain = math.sqrt(2)
        factors = [kaiming_uniform((n, rank), like, generator, gain=gain) for n in grid.sizes]
        return cls(up, down, grid, scale, tuple(factors))

    @classmethod
    def create_orthogonal(
        cls,
        weights: Sequence[Like],
        rank: int,
        *,
        grid: LayerGrid | None = None,
        normal_axes: Sequence[int] = (),
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As TensLoRA and CaRA start: ``down`` zero, ``up`` and axes orthogonal.

        Parameters
        ----------
        weights, rank, grid, scale, rng
            As for :meth:`create`.
        normal_axes : sequence of int
            Axes that are drawn from Xavier's normal distribution instead: that of the layers in
            CaRA. An axis of one index, a weight for every term, starts at one.
        """
        grid, like, generator = _setting(weights, grid, rng)
        rank = check_rank(rank, max(grid.block), grid.block)
        u, v = grid.block
        up = orthogonal((u, rank), like, generator)
        factors = []
        for axis, n in enumerate(grid.sizes):
            if n == 1:
                factors.append(full((1, rank), 1.0, like))
            elif axis in normal_axes:
                factors.append(normal((n, rank), math.sqrt(2 / (n + rank)), like, generator))
            else:
                factors.append(orthogonal((n, rank), like, generator))
        return cls(up, zeros((rank, v), like), grid, scale, tuple(factors))

    def core_of(self, indices: Sequence[Index]) -> Array:
        positions = zip(*indices, strict=True)
        entries = reduce(mul, map(gathered, self.factors, positions))
        return entries[:, :, None] * _eye(entries.shape[1], entries.shape[1], entries)


@dataclass(frozen=True, repr=False)
class SharedTucker(SharedCore):
    r"""Cores that are mixtures of a few: a Tucker decomposition of all layers.

    .. math:: \Delta_{i_1 \dots i_K}
              = s\, U \bigl(G \times_1 P_1[i_1] \cdots \times_K P_K[i_K]\bigr) V^T

    Along one axis it is FacT-TK :cite:p:`jie2023fact`; along any of layers, types and heads,
    TensLoRA :cite:p:`marmoret2025tenslora`.

    Attributes
    ----------
    core : array, shape (s_1, ..., s_K, r, s)
        ``G``.
    factors : tuple of K arrays of shape (n_k, s_k)
        ``P_k``.

    Examples
    --------
    >>> grid = LayerGrid.numbered([(4, 4), (16, 4)], block=(4, 4))
    >>> form = SharedTucker.create([(4, 4), (16, 4)], rank=2, grid=grid, rng=0)
    >>> form
    SharedTucker(up 4 x 2, down 2 x 4, core 2 x 2 x 2, factors.0 5 x 2)
    >>> form.layer(1).delta()
    LowRank(16 x 4, rank 2, float64)
    """

    core: Trained[Array, "..."]
    factors: Trained[tuple[Array, ...], "..."]

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = tuple(self.core.shape)
        self._check_sizes("core", [self.core], [(*inner[:-2], *self._ends())])
        wanted = list(zip(self.grid.sizes, inner[:-2], strict=False))
        self._check_sizes("factors", self.factors, wanted)

    def _ends(self) -> tuple[int, int]:
        return self.up.shape[1], self.down.shape[0]

    @classmethod
    def create(
        cls,
        weights: Sequence[Like],
        rank: int | Sequence[int],
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As FacT-TK starts: ``up`` zero, ``down`` like a layer of PyTorch, the rest Xavier.

        Parameters
        ----------
        weights, grid, scale, rng
            As for :meth:`SharedTT.create`.
        rank : int, or K + 2 ints
            Shape of the core; one number for all its sizes.
        """
        grid, like, generator = _setting(weights, grid, rng)
        (*inner, r, s), (u, v) = _core_shape(rank, grid), grid.block
        down = kaiming_uniform((s, v), like, generator)
        core = _xavier_uniform((*inner, r, s), like, generator)
        shapes = zip(grid.sizes, inner, strict=True)
        factors = tuple(_xavier_uniform(shape, like, generator) for shape in shapes)
        return cls(zeros((u, r), like), down, grid, scale, core, factors)

    @classmethod
    def create_zero_core(
        cls,
        weights: Sequence[Like],
        rank: int | Sequence[int],
        *,
        grid: LayerGrid | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """As TensLoRA starts: the core zero, all factors orthogonal."""
        grid, like, generator = _setting(weights, grid, rng)
        (*inner, r, s), (u, v) = _core_shape(rank, grid), grid.block
        up, down = orthogonal((u, r), like, generator), orthogonal((s, v), like, generator)
        shapes = zip(grid.sizes, inner, strict=True)
        factors = tuple(orthogonal(shape, like, generator) for shape in shapes)
        return cls(up, down, grid, scale, zeros((*inner, r, s), like), factors)

    def core_of(self, indices: Sequence[Index]) -> Array:
        xp = namespace(self.core)
        part, shape = self.core[None, ...], self.core.shape
        for k, positions in enumerate(zip(*indices, strict=True)):
            rows = gathered(self.factors[k], positions)[:, None, :]
            product = rows @ xp.reshape(part, (part.shape[0], shape[k], -1))
            part = xp.reshape(product, (product.shape[0], *shape[k + 1 :]))
        return part


def _setting(
    weights: Sequence[Like], grid: LayerGrid | None, rng: RNG
) -> tuple[LayerGrid, Array, np.random.Generator]:
    """The grid, an empty array of the library of the weights, and one generator for all draws."""
    grid = LayerGrid.numbered(weights) if grid is None else grid
    shapes = tuple(shapes_of(weights))
    if shapes != grid.shapes:
        raise ValueError(f"the grid is for weights of shapes {grid.shapes}, got {shapes}")
    return grid, like_of(weights), np.random.default_rng(rng)


def _train_setting(
    weights: Sequence[Like], rank: int | Sequence[int], grid: LayerGrid | None, rng: RNG
) -> tuple[LayerGrid, Array, tuple[int, ...], np.random.Generator]:
    """:func:`_setting` with the sizes of all bonds."""
    grid, like, generator = _setting(weights, grid, rng)
    return grid, like, _ranks(rank, len(grid.sizes) + 1, grid), generator


def _ranks(rank: int | Sequence[int], count: int, grid: LayerGrid) -> tuple[int, ...]:
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,) * count
    if len(ranks) != count:
        raise ValueError(
            f"rank must be one number or {count} for {len(grid.sizes)} axes, got {len(ranks)}"
        )
    return tuple(check_rank(r, max(grid.block), grid.block) for r in ranks)


def _core_shape(rank: int | Sequence[int], grid: LayerGrid) -> tuple[int, ...]:
    shape = (*grid.sizes, *grid.block)
    if isinstance(rank, Sequence):
        return tucker_rank(rank, shape)
    rank = check_rank(rank, max(grid.block), grid.block)
    return tuple(min(rank, n) for n in shape)


def _identities(grid: LayerGrid, bonds: Sequence[int], like: Array) -> tuple[Array, ...]:
    ones = zip(grid.sizes, pairwise(bonds), strict=True)
    return tuple(full((n, 1, 1), 1.0, like) * _eye(*pair, like) for n, pair in ones)


def _eye(rows: int, columns: int, like: Array) -> Array:
    return namespace(like).eye(rows, columns, dtype=like.dtype, device=device(like))


def _xavier_uniform(shape: tuple[int, ...], like: Array, rng: np.random.Generator) -> Array:
    """Uniform on ``+-sqrt(6 / (fan_in + fan_out))``; axes after the second count in both."""
    within = math.prod(shape[2:])
    return uniform(shape, math.sqrt(6 / ((shape[0] + shape[1]) * within)), like, rng)
