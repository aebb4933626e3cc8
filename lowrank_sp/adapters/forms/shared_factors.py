"""Products whose factors several layers share: Tied-LoRA and ShareLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array
from lowrank_sp.adapters.forms._draws import Like, full, kaiming_uniform, zeros
from lowrank_sp.adapters.forms._form import LayeredForm, Product
from lowrank_sp.adapters.forms._grid import like_of, shapes_of
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import check_rank


@dataclass(frozen=True, repr=False)
class Tied(LayeredForm):
    r"""One pair of factors for all layers, and gains of each layer on its outputs and terms.

    .. math:: \Delta_l = s\, \mathrm{diag}(v_l)\, B\, \mathrm{diag}(u_l)\, A

    Tied-LoRA :cite:p:`renduchintala2024tied`. Which of the four are trained is the type:
    :class:`TiedFactors`, :class:`TiedGains`, :class:`TiedUp` and :class:`TiedDown` fix some.
    Layers smaller than the factors use the first rows of ``B`` and the first columns of ``A``.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    outputs : array, shape (l, m)
        ``v_l``.
    terms : array, shape (l, r)
        ``u_l``.
    shapes : tuple of (int, int)
        Shapes of the weights.
    scale : float
        ``s``.

    Examples
    --------
    >>> form = Tied.create([(6, 4), (3, 4)], rank=2, rng=0)
    >>> form, form.layer(1)
    (Tied(up 6 x 2, down 2 x 4, outputs 2 x 6, terms 2 x 2), Product(up 3 x 2, down 2 x 4))
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    outputs: Trained[Array, "l m"]
    terms: Trained[Array, "l r"]
    shapes: tuple[tuple[int, int], ...]
    scale: float = 1.0

    @classmethod
    def create(
        cls, weights: Sequence[Like], rank: int, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """Gains at one and factors as in LoRA; output gains at zero where ``up`` is fixed.

        So every type starts at zero by something that it trains. Fixed factors are uniform, too.
        """
        shapes, like = tuple(shapes_of(weights)), like_of(weights)
        m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        rank = check_rank(rank, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        down = kaiming_uniform((rank, n), like, generator)
        fixed = cls.roles()["up"] is Fixed
        up = kaiming_uniform((m, rank), like, generator) if fixed else zeros((m, rank), like)
        outputs = full((len(shapes), m), 0.0 if fixed else 1.0, like)
        terms = full((len(shapes), rank), 1.0, like)
        return cls(up, down, outputs, terms, shapes, scale)

    @property
    def num_layers(self) -> int:
        return len(self.shapes)

    @property
    def rank_bound(self) -> int:
        return max(min(*shape, self.up.shape[1]) for shape in self.shapes)

    def layer(self, index: int) -> Product:
        m, n = self.shapes[index]
        gains = self.outputs[index, :m][:, None] * self.terms[index, :]
        return _product(self.up[:m, :] * gains, self.down[:, :n], self.scale)


@dataclass(frozen=True, repr=False)
class TiedFactors(Tied):
    """:class:`Tied` of which the factors are trained, the gains not."""

    outputs: Fixed[Array, "l m"]
    terms: Fixed[Array, "l r"]


@dataclass(frozen=True, repr=False)
class TiedGains(Tied):
    """:class:`Tied` of which the gains are trained, the factors not."""

    up: Fixed[Array, "m r"]
    down: Fixed[Array, "r n"]


@dataclass(frozen=True, repr=False)
class TiedUp(Tied):
    """:class:`Tied` of which all but ``down`` is trained."""

    down: Fixed[Array, "r n"]


@dataclass(frozen=True, repr=False)
class TiedDown(Tied):
    """:class:`Tied` of which all but ``up`` is trained."""

    up: Fixed[Array, "m r"]


@dataclass(frozen=True, repr=False)
class SharedDown(LayeredForm):
    r"""One ``down`` for all layers: :math:`\Delta_l = s B_l A` :cite:p:`song2024sharelora`.

    Its file holds ``A`` once, where a copy in every layer would do for libraries that know plain
    LoRA only.

    Attributes
    ----------
    ups : tuple of arrays of shape (m_l, r)
        ``B_l``.
    down : array, shape (r, n)
        ``A``, for weights with equally many columns.
    scale : float
        ``s``.

    Examples
    --------
    >>> SharedDown.create([(6, 4), (3, 4)], rank=2, rng=0)
    SharedDown(ups.0 6 x 2, ups.1 3 x 2, down 2 x 4)
    """

    ups: Trained[tuple[Array, ...], "..."]
    down: Trained[Array, "r n"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_columns("ups", self.ups, self.down.shape[0], 1)

    @classmethod
    def create(
        cls, weights: Sequence[Like], rank: int, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """``ups`` zero, ``down`` uniform on ``+-1/sqrt(n)``."""
        shapes, like = tuple(shapes_of(weights)), like_of(weights)
        n = _common([n for _, n in shapes], "columns", "down")
        rank = check_rank(rank, n, shapes[0])
        ups = tuple(zeros((m, rank), like) for m, _ in shapes)
        return cls(ups, kaiming_uniform((rank, n), like, rng), scale)

    @property
    def num_layers(self) -> int:
        return len(self.ups)

    @property
    def rank_bound(self) -> int:
        return min(max(up.shape[0] for up in self.ups), *self.down.shape)

    def layer(self, index: int) -> Product:
        return _product(self.ups[index], self.down, self.scale)


@dataclass(frozen=True, repr=False)
class SharedUp(LayeredForm):
    r"""One ``up`` for all layers: :math:`\Delta_l = s B A_l` :cite:p:`song2024sharelora`.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``, for weights with equally many rows.
    downs : tuple of arrays of shape (r, n_l)
        ``A_l``.
    scale : float
        ``s``.

    Examples
    --------
    >>> SharedUp.create([(6, 4), (6, 3)], rank=2, rng=0)
    SharedUp(up 6 x 2, downs.0 2 x 4, downs.1 2 x 3)
    """

    up: Trained[Array, "m r"]
    downs: Trained[tuple[Array, ...], "..."]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_columns("downs", self.downs, self.up.shape[1], 0)

    @classmethod
    def create(
        cls, weights: Sequence[Like], rank: int, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """``up`` zero, ``downs`` uniform on ``+-1/sqrt(n)``."""
        shapes, like = tuple(shapes_of(weights)), like_of(weights)
        m = _common([m for m, _ in shapes], "rows", "up")
        rank = check_rank(rank, m, shapes[0])
        generator = np.random.default_rng(rng)
        downs = tuple(kaiming_uniform((rank, n), like, generator) for _, n in shapes)
        return cls(zeros((m, rank), like), downs, scale)

    @property
    def num_layers(self) -> int:
        return len(self.downs)

    @property
    def rank_bound(self) -> int:
        return min(max(down.shape[1] for down in self.downs), *self.up.shape)

    def layer(self, index: int) -> Product:
        return _product(self.up, self.downs[index], self.scale)


@dataclass(frozen=True, repr=False)
class SharedPair(LayeredForm):
    r"""One product for all layers: :math:`\Delta_l = s B A` :cite:p:`song2024sharelora`.

    Layers smaller than it use its first rows and columns.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    shapes : tuple of (int, int)
        Shapes of the weights.
    scale : float
        ``s``.

    Examples
    --------
    >>> SharedPair.create([(6, 4), (3, 4)], rank=2, rng=0).layer(1)
    Product(up 3 x 2, down 2 x 4)
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    shapes: tuple[tuple[int, int], ...]
    scale: float = 1.0

    @classmethod
    def create(
        cls, weights: Sequence[Like], rank: int, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """``up`` zero, ``down`` uniform on ``+-1/sqrt(n)``."""
        shapes, like = tuple(shapes_of(weights)), like_of(weights)
        m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        rank = check_rank(rank, min(m, n), (m, n))
        down = kaiming_uniform((rank, n), like, rng)
        return cls(zeros((m, rank), like), down, shapes, scale)

    @property
    def num_layers(self) -> int:
        return len(self.shapes)

    @property
    def rank_bound(self) -> int:
        return max(min(*shape, self.up.shape[1]) for shape in self.shapes)

    def layer(self, index: int) -> Product:
        m, n = self.shapes[index]
        return _product(self.up[:m, :], self.down[:, :n], self.scale)


def _product(up: Array, down: Array, scale: float) -> Product:
    return Product.assembled({"up": up, "down": down, "scale": scale})


def _common(sizes: Sequence[int], what: str, shared: str) -> int:
    if len(set(sizes)) > 1:
        raise ValueError(
            f"weights that share {shared} must have equally many {what}, got {sorted(set(sizes))}; "
            "make one form for each"
        )
    return sizes[0]


def _check_columns(name: str, arrays: Sequence[Array], rank: int, axis: int) -> None:
    wanted = "(m, r)" if axis else "(r, n)"
    found = [tuple(a.shape) for a in arrays]
    if any(len(shape) != 2 or shape[axis] != rank for shape in found):
        raise ValueError(
            f"{name} must have shape {wanted} with r = {rank}, got {', '.join(map(str, found))}"
        )
