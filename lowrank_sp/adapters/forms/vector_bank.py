r"""Factors made of few numbers that layers share: mixtures of vectors of a bank, drawn entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, detached, from_host, namespace
from lowrank_sp.adapters.forms._draws import Like, normal, uniform
from lowrank_sp.adapters.forms._form import Form, LayeredForm
from lowrank_sp.adapters.forms._grid import like_of, shapes_of
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank, check_rank


class _Made(Form, ABC):
    """A product of factors that are computed."""

    @abstractmethod
    def _factors(self) -> tuple[Array, Array]:
        """``up`` and ``down``."""

    def delta(self) -> LowRank:
        return LowRank(*self._factors())

    def apply(self, x: Array) -> Array:
        up, down = self._factors()
        return (x @ down.mT) @ up.mT


@dataclass(frozen=True, repr=False)
class BankFactors(_Made):
    r"""Factors of pieces that are mixtures of a few vectors: one layer of VB-LoRA
    :cite:p:`li2024vblora`.

    .. math:: \Delta = B A, \qquad \text{pieces of } b_i \text{ and } a_i =
              \sum_{h \in \text{top}} \operatorname{softmax}(l)_h\, v_h

    Every column of ``B`` and row of ``A`` is cut into pieces of the length of the vectors; a piece
    has a logit for every vector, of which the largest few count.

    Attributes
    ----------
    up_logits : array, shape (m / b, r, h)
    down_logits : array, shape (r, n / b, h)
        ``l``.
    bank : array, shape (h, b)
        ``v``.
    top : int
        Vectors in a mixture. Where logits are equal there may be more.

    Notes
    -----
    ``2 h r (m + n)`` flops for the factors, then those of plain LoRA. There is no scale.
    """  # noqa: D205

    up_logits: Trained[Array, "p r h"]
    down_logits: Trained[Array, "r q h"]
    bank: Trained[Array, "h b"]
    top: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top <= self.bank.shape[0]:
            raise ValueError(
                f"top must be in 1..{self.bank.shape[0]}, the vectors of the bank, got {self.top}"
            )

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        vectors: int = 256,
        length: int = 256,
        top: int = 2,
        rng: RNG = None,
    ) -> BankFactors:
        """A layer with a bank of its own: as :meth:`VectorBank.create` of one weight."""
        options = {"vectors": vectors, "length": length, "top": top}
        return VectorBank.create([weight], rank, rng=rng, **options).layer(0)

    @property
    def shape(self) -> tuple[int, int]:
        length = self.bank.shape[1]
        return self.up_logits.shape[0] * length, self.down_logits.shape[1] * length

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.down_logits.shape[0])

    def _factors(self) -> tuple[Array, Array]:
        (m, n), r = self.shape, self.down_logits.shape[0]
        xp = namespace(self.bank)
        up = xp.permute_dims(self._mixtures(self.up_logits), (0, 2, 1))
        return xp.reshape(up, (m, r)), xp.reshape(self._mixtures(self.down_logits), (r, n))

    def _mixtures(self, logits: Array) -> Array:
        xp = namespace(logits)
        ordered = xp.sort(detached(logits), axis=-1, descending=True)
        largest, least = ordered[..., :1], ordered[..., self.top - 1 : self.top]
        sizes = xp.exp(logits - largest)
        sizes = xp.where(logits >= least, sizes, xp.zeros_like(sizes))
        return (sizes / xp.sum(sizes, axis=-1, keepdims=True)) @ self.bank


@dataclass(frozen=True, repr=False)
class VectorBank(LayeredForm):
    r"""One bank of vectors for the factors of all layers: VB-LoRA :cite:p:`li2024vblora`.

    Attributes
    ----------
    bank : array, shape (h, b)
    up_logits, down_logits : tuples of arrays, shapes (m_l / b, r, h) and (r, n_l / b, h)
        As in :class:`BankFactors`.
    top : int

    Examples
    --------
    >>> form = VectorBank.create([(8, 4), (4, 16)], rank=3, vectors=10, length=4, rng=0)
    >>> form.num_trainable, form.layer(1)
    (280, BankFactors(up_logits 1 x 3 x 10, down_logits 3 x 4 x 10, bank 10 x 4))
    """

    bank: Trained[Array, "h b"]
    up_logits: Trained[tuple[Array, ...], "..."]
    down_logits: Trained[tuple[Array, ...], "..."]
    top: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)

    @classmethod
    def create(
        cls,
        weights: Sequence[Like],
        rank: int,
        *,
        vectors: int = 256,
        length: int = 256,
        top: int = 2,
        rng: RNG = None,
    ) -> Self:
        """A bank uniform on +-0.02 and logits of deviation 0.1: an update that is not zero.

        ``length`` must divide the sides of all weights.
        """
        generator = np.random.default_rng(rng)
        shapes, like = _shapes(weights, rank)
        for m, n in shapes:
            if length < 1 or m % length or n % length:
                raise ValueError(f"length must divide the sides of {m} x {n}, got {length}")
        bank = uniform((vectors, length), 0.02, like, generator)
        ups, downs = [], []
        for m, n in shapes:
            ups.append(normal((m // length, rank, vectors), 0.1, like, generator))
            downs.append(normal((rank, n // length, vectors), 0.1, like, generator))
        return cls(bank, tuple(ups), tuple(downs), top)

    @property
    def num_layers(self) -> int:
        return len(self.up_logits)

    @property
    def rank_bound(self) -> int:
        return max(self.layer(index).rank_bound for index in range(self.num_layers))

    def layer(self, index: int) -> BankFactors:
        return BankFactors(self.up_logits[index], self.down_logits[index], self.bank, self.top)


@dataclass(frozen=True, repr=False)
class DrawnFactors(_Made):
    r"""Factors whose entries are drawn from a short vector: one layer of Uni-LoRA
    :cite:p:`li2025unilora`.

    .. math:: \Delta = B A, \qquad B_{ij} = g_k \theta_k, \quad k = p_{ij}

    Attributes
    ----------
    entries : array, shape (d,)
        ``theta``.
    gains : array, shape (d,)
        ``g``: with the inverse root of how often an entry is drawn in all layers, distances in
        ``theta`` are those of all factors together.
    up_places : integer array, shape (m, r)
    down_places : integer array, shape (r, n)
        ``p``.
    """  # noqa: D205

    entries: Trained[Array, "d"]
    gains: Fixed[Array, "d"]
    up_places: Fixed[Array, "m r"]
    down_places: Fixed[Array, "r n"]

    @classmethod
    def create(cls, weight: Like, rank: int, *, length: int = 256, rng: RNG = None) -> DrawnFactors:
        """A layer with a vector of its own: as :meth:`DrawnEntries.create` of one weight."""
        return DrawnEntries.create([weight], rank, length=length, rng=rng).layer(0)

    @property
    def rank_bound(self) -> int:
        return min(*self.up_places.shape, *self.down_places.shape)

    def _factors(self) -> tuple[Array, Array]:
        xp, scaled = namespace(self.entries), self.entries * self.gains
        up, down = (
            xp.reshape(xp.take(scaled, xp.reshape(places, (-1,))), places.shape)
            for places in (self.up_places, self.down_places)
        )
        return up, down


@dataclass(frozen=True, repr=False)
class DrawnEntries(LayeredForm):
    r"""One short vector from which the factors of all layers are drawn: Uni-LoRA
    :cite:p:`li2025unilora`.

    Attributes
    ----------
    entries, gains : array, shape (d,)
    up_places, down_places : tuples of integer arrays, shapes (m_l, r) and (r, n_l)
        As in :class:`DrawnFactors`.

    Examples
    --------
    >>> form = DrawnEntries.create([(8, 4), (4, 16)], rank=3, length=10, rng=0)
    >>> form.num_trainable, form.layer(1).shape
    (10, (4, 16))
    """  # noqa: D205

    entries: Trained[Array, "d"]
    gains: Fixed[Array, "d"]
    up_places: Fixed[tuple[Array, ...], "..."]
    down_places: Fixed[tuple[Array, ...], "..."]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)

    @classmethod
    def create(
        cls, weights: Sequence[Like], rank: int, *, length: int = 256, rng: RNG = None
    ) -> Self:
        """Entries uniform on +-0.02: an update that is not zero.

        All are drawn equally often, up to one. ``rng=seed`` draws the places that PEFT draws with
        that ``proj_seed``, for weights in the order of the model.
        """
        generator = np.random.default_rng(rng)
        shapes, like = _shapes(weights, rank)
        total = sum(rank * (m + n) for m, n in shapes)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        drawn = np.repeat(np.arange(length), total // length)
        if total % length:
            more = generator.choice(length, total % length, replace=False)
            drawn = np.concatenate([drawn, more])
        generator.shuffle(drawn)
        counts = np.bincount(drawn, minlength=length)
        gains = np.maximum(counts, 1) ** -0.5
        integer, ups, downs, start = namespace(like).int64, [], [], 0
        for m, n in shapes:
            middle, stop = start + rank * n, start + rank * (m + n)
            downs.append(from_host(drawn[start:middle].reshape(rank, n), like, integer))
            ups.append(from_host(drawn[middle:stop].reshape(m, rank), like, integer))
            start = stop
        entries = uniform((length,), 0.02, like, generator)
        return cls(entries, from_host(gains, like), tuple(ups), tuple(downs))

    @property
    def num_layers(self) -> int:
        return len(self.up_places)

    @property
    def rank_bound(self) -> int:
        return max(self.layer(index).rank_bound for index in range(self.num_layers))

    def layer(self, index: int) -> DrawnFactors:
        return DrawnFactors(
            self.entries, self.gains, self.up_places[index], self.down_places[index]
        )


def _check_layers(form: LayeredForm) -> None:
    """What the annotations promise holds for every layer."""
    for index in range(form.num_layers):
        form.layer(index)


def _shapes(weights: Sequence[Like], rank: int) -> tuple[list[tuple[int, int]], Array]:
    """Shapes of weights, and an array like them, after the checks that banks share."""
    shapes = shapes_of(weights)
    for shape in shapes:
        check_rank(rank, min(shape), shape)
    return shapes, like_of(weights)
