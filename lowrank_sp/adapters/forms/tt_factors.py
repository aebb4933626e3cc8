"""Plain LoRA whose factors are made by tensor trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, namespace
from lowrank_sp.adapters.forms._chains import (
    absorbed,
    check_cores,
    expanded,
    factorized,
    merged,
    modes_of,
)
from lowrank_sp.adapters.forms._draws import Like, normal, template
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.tensors.ranks import tt_rank
from lowrank_sp.tensors.tt_matrix import TTMatrix

Cores = tuple[Array, ...]


@dataclass(frozen=True, repr=False)
class TrainFactors(Form):
    r"""Plain LoRA whose factors are tensor trains, :math:`\Delta = s B A`.

    LoRETTA_rep :cite:p:`yang2024loretta`. ``A^T`` is a train through the factors of the inputs that
    ends with the rank, ``B^T`` one that begins with the rank. So the update has at most the rank of
    the bonds next to it, too. Published shapes are a table of some sizes; here they follow from
    :func:`factorized`.

    Attributes
    ----------
    downs : tuple of arrays of shape (t, n_k, t')
        The last one of shape ``(t, r, 1)``.
    ups : tuple of arrays of shape (t, m_k, t')
        The first one of shape ``(1, r, t)``.
    scale : float
        ``alpha / r``.

    Examples
    --------
    >>> form = TrainFactors.create((12, 8), rank=3, bond=2, order=2, rng=0)
    >>> form.num_trainable, form.rank_bound
    (52, 2)
    """

    downs: Trained[Cores, "..."]
    ups: Trained[Cores, "..."]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_cores(name, self.downs, 3)
        check_cores(name, self.ups, 3)
        if self.downs[-1].shape[1] != self.ups[0].shape[1]:
            raise ValueError(
                f"the last of downs and the first of ups of {name} must have shape (t, r, 1) and "
                f"(1, r, t), got {tuple(self.downs[-1].shape)} and {tuple(self.ups[0].shape)}"
            )

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        bond: int = 5,
        order: int = 3,
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """Gaussian cores, such that entries of ``A`` have variance ``1 / (n + r)`` or so.

        Parameters
        ----------
        weight, rank, alpha, rng
            As for plain LoRA.
        bond : int
            Size of all bonds, as far as there are entries for it.
        order, inputs, outputs
            As for :meth:`TensorTrain.create`.
        """
        (m, n), like = template(weight)
        rank = check_rank(rank, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        down = (*modes_of(inputs, n, order, "inputs"), rank)
        up = (rank, *modes_of(outputs, m, order, "outputs"))
        downs = _gaussian_cores(down, bond, 1 / (n + rank), like, generator)
        ups = _gaussian_cores(up, bond, 1 / (m + rank), like, generator)
        return cls(downs, ups, (rank if alpha is None else alpha) / rank)

    @property
    def shape(self) -> tuple[int, int]:
        m = math.prod(c.shape[1] for c in self.ups[1:])
        return m, math.prod(c.shape[1] for c in self.downs[:-1])

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, *self.downs[-1].shape[:2], *self.ups[0].shape[1:])

    def _ends(self) -> tuple[Array, Array]:
        """The cores at the rank, ``(t, r)`` and ``(r, t')``, with the scale."""
        return self.downs[-1][:, :, 0], self.ups[0][0, :, :] * self.scale

    def delta(self) -> LowRank:
        inner, outer = self._ends()
        right = merged(self.downs[:-1])[0, :, :].mT
        left = merged(self.ups[1:])[:, :, 0].mT
        middle = (inner @ outer).mT
        if middle.shape[1] <= middle.shape[0]:
            return LowRank(left @ middle, right)
        return LowRank(left, middle @ right)

    def apply(self, x: Array) -> Array:
        xp, lead = namespace(x), tuple(x.shape[:-1])
        inner, outer = self._ends()
        rows = xp.reshape(x, (math.prod(lead), x.shape[-1]))
        z = (absorbed(rows, self.downs[:-1]) @ inner) @ outer
        y = expanded(z, self.ups[1:])
        return xp.reshape(y, (*lead, y.shape[1]))


@dataclass(frozen=True, repr=False)
class GeneratedFactors(Form):
    r"""Plain LoRA whose factors are the image of a fixed vector under a tensor train.

    .. math:: (\mathrm{vec}\, A^T, \mathrm{vec}\, B^T) = T z, \qquad \Delta = s B A

    TensorGuide :cite:p:`qi2025tensorguide`: ``T`` is a matrix in tensor-train format that is
    trained, ``z`` a Gaussian vector that is not, and has to be saved.

    Attributes
    ----------
    cores : tuple of arrays of shape (t, m_k, n_k, t')
        ``T``, with ``r (m + n)`` rows.
    latent : array, shape (k,)
        ``z``.
    size : (int, int)
        Shape of the weight.
    scale : float

    Examples
    --------
    >>> form = GeneratedFactors.create((12, 8), rank=2, order=3, rng=0)
    >>> form.delta()
    LowRank(12 x 8, rank 2, float64)
    """

    cores: Trained[Cores, "..."]
    latent: Fixed[Array, "k"]
    size: tuple[int, int]
    scale: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cores(type(self).__name__, self.cores, 4)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        bond: int = 4,
        order: int = 4,
        width: int = 4,
        scale: float = 0.01,
        rng: RNG = None,
    ) -> Self:
        """Gaussian cores of standard deviation 0.1, so that the update is not zero.

        Parameters
        ----------
        weight, rank
        bond : int
            Size of all bonds.
        order : int
            How many cores there are.
        width : int
            Factor of the length of ``z`` that every core takes.
        """
        (m, n), like = template(weight)
        rank = check_rank(rank, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        rows = factorized(rank * (m + n), order)
        bonds = (1, *[bond] * (order - 1), 1)
        cores = tuple(
            normal((r, k, width, s), 0.1, like, generator)
            for k, (r, s) in zip(rows, pairwise(bonds), strict=True)
        )
        return cls(cores, normal((width**order,), 1.0, like, generator), (m, n), scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        return math.prod(c.shape[1] for c in self.cores) // sum(self.size)

    def _factors(self) -> tuple[Array, Array]:
        """``B`` and ``A`` with the scale."""
        m, n = self.size
        xp = namespace(self.latent)
        flat = TTMatrix(self.cores).matmul(self.latent[:, None])[:, 0]
        rank = flat.shape[0] // (m + n)
        down = xp.reshape(flat[: n * rank], (n, rank)).mT
        return xp.reshape(flat[n * rank :], (rank, m)).mT * self.scale, down

    def delta(self) -> LowRank:
        return LowRank(*self._factors())

    def apply(self, x: Array) -> Array:
        up, down = self._factors()
        return (x @ down.mT) @ up.mT


def _gaussian_cores(
    modes: Sequence[int], bond: int, variance: float, like: Array, rng: np.random.Generator
) -> Cores:
    if bond < 1:
        raise ValueError(f"bond must be at least 1, got {bond}")
    bonds = [min(bond, most) for most in tt_rank(None, modes)]
    share = variance ** (0.5 / len(modes))
    return tuple(
        normal((r, n, s), share / math.sqrt(s), like, rng)
        for n, (r, s) in zip(modes, pairwise(bonds), strict=True)
    )
