r"""Hadamard products: of two products of factors, and of one with the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, namespace, slices
from lowrank_sp.adapters.forms._draws import Like, factor_scale, kaiming_uniform, zeros
from lowrank_sp.adapters.forms._entries import Entrywise, apply_rows, count_of
from lowrank_sp.adapters.forms._form import Form, Product, check_weight
from lowrank_sp.adapters.forms._parts import Trained, Weight
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd

# Columns of Khatri-Rao factors made at a time: as many as keep a matrix product efficient.
_COLUMNS = 128


@dataclass(frozen=True, repr=False)
class HadamardProduct(Form):
    r"""Entrywise product of two products, :math:`\Delta = s\,(B_1 A_1) \circ (B_2 A_2)`.

    LoHa :cite:p:`hyeonwoo2022fedpara,yeh2024navigating`, and ABBA :cite:p:`singhal2025abba` by
    :meth:`from_weight`. It is a product of rank :math:`r_1 r_2` as well,

    .. math:: (B_1 A_1) \circ (B_2 A_2) = (B_1 \bullet B_2)\,(A_1 \circledast A_2),

    of row-wise and column-wise Khatri-Rao products of the factors, and so plain LoRA of that rank.

    Attributes
    ----------
    up1 : array, shape (m, r1)
        ``hada_w1_a`` of PEFT.
    down1 : array, shape (r1, n)
        ``hada_w1_b``.
    up2 : array, shape (m, r2)
        ``hada_w2_a``.
    down2 : array, shape (r2, n)
        ``hada_w2_b``.
    scale : float

    Notes
    -----
    Applied to ``c`` inputs by whichever takes fewer flops, ``2 c r1 r2 (m + n)`` with Khatri-Rao
    factors, of which some columns are made at a time, or ``2 m n (c + r1 + r2)`` with blocks of
    rows. For few inputs even the factors are not made: the inputs are multiplied by ``down1``
    instead.

    Examples
    --------
    >>> import numpy as np
    >>> form = HadamardProduct.create((60, 40), rank=4, rng=0)
    >>> form.num_trainable, form.rank_bound, form.delta()
    (800, 16, LowRank(60 x 40, rank 16, float64))
    """

    up1: Trained[Array, "m r"]
    down1: Trained[Array, "r n"]
    up2: Trained[Array, "m q"]
    down2: Trained[Array, "q n"]
    scale: float = 1.0

    products = (("up1", "down1"), ("up2", "down2"))

    @classmethod
    def create(
        cls, weight: Like, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """As PEFT: ``down2`` zero, the others Kaiming; ``scale = alpha / rank``."""
        (m, n), like, scale = factor_scale(weight, rank, alpha)
        generator = np.random.default_rng(rng)
        up1, down1, up2 = (
            kaiming_uniform(shape, like, generator) for shape in ((m, rank), (rank, n), (m, rank))
        )
        return cls(up1, down1, up2, zeros((rank, n), like), scale)

    @classmethod
    def from_weight(
        cls,
        weight: Array,
        rank: int,
        *,
        rank2: int | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """ABBA: the first product is the best approximation of the weight, the second is zero.

        Nothing is taken from the weight. ``up2`` is zero and ``down2`` uniform within
        ``sqrt(6 / n)``.

        Parameters
        ----------
        weight : array, shape (m, n)
        rank, rank2 : int
            Of the two products; equal by default, as in the authors' code.
        scale : float
            They write it as the square root of a product of two numbers, free of the ranks. As an
            adapter of PEFT's LoHa, which divides by the rank, it has ``alpha = rank * scale``.
        rng : int, Generator or None
        """
        (m, n), like, _ = factor_scale(check_weight(weight, cls.__name__), rank, None)
        rank2 = rank if rank2 is None else check_rank(rank2, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        up1, down1 = truncated_svd(weight, rank, rng=generator).split().factors()
        down2 = kaiming_uniform((rank2, n), like, generator, gain=2**0.5)
        return cls(up1, down1, zeros((m, rank2), like), down2, scale)

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.up1.shape[1] * self.up2.shape[1])

    def delta(self) -> LowRank:
        return self.scale * LowRank(self.up1, self.down1).hadamard(LowRank(self.up2, self.down2))

    def apply(self, x: Array) -> Array:
        (m, r1), (r2, n) = self.up1.shape, self.down2.shape
        count, rank = count_of(x), r1 * r2
        if count * rank * (m + n) > m * n * (count + r1 + r2):
            return apply_rows(x, self._some, (m, n))
        return self._few(x) if count < r2 else self._factored(x)

    def _some(self, rows: slice) -> Array:
        first = (self.up1[rows, :] * self.scale) @ self.down1
        return first * (self.up2[rows, :] @ self.down2)

    def _few(self, x: Array) -> Array:
        # y = sum_i diag(b_i) B_2 A_2 diag(a_i) x, with columns b_i and rows a_i of the first pair.
        inside = (x[..., None, :] * (self.down1 * self.scale)) @ self.down2.mT
        return namespace(x).sum((inside @ self.up2.mT) * self.up1.mT, axis=-2)

    def _factored(self, x: Array) -> Array:
        total = None
        (_, r1), r2 = self.up1.shape, self.up2.shape[1]
        for part in slices(r1, max(1, _COLUMNS // r2)):
            pair = LowRank(self.up1[:, part] * self.scale, self.down1[part, :])
            left, right = pair.hadamard(LowRank(self.up2, self.down2)).factors()
            y = (x @ right.mT) @ left.mT
            total = y if total is None else total + y
        return total


@dataclass(frozen=True, repr=False)
class HadamardWeight(Entrywise):
    r"""The weight modulated by a product, :math:`\Delta = W \circ (B A)`: HiRA
    :cite:p:`huang2025hira`.

    The rank of the update is up to ``r`` times that of the weight. Where the weight is zero, it
    stays zero. There is no scale.

    Attributes
    ----------
    up : array, shape (m, r)
    down : array, shape (r, n)
    weight : array, shape (m, n)
        The original weight, which merging needs too: what is merged is no longer it.

    Notes
    -----
    Computed by blocks of rows of the weight, ``2 m n (c + r)`` flops for ``c`` inputs.

    Examples
    --------
    >>> import numpy as np
    >>> form = HadamardWeight.create(np.eye(3), rank=1, rng=0)
    >>> form.replace({"up": np.ones((3, 1)), "down": 2 * np.ones((1, 3))}).merge(np.eye(3))
    array([[3., 0., 0.],
           [0., 3., 0.],
           [0., 0., 3.]])
    """  # noqa: D205

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    weight: Weight[Array, "m n"]

    products = (("up", "down"),)

    @classmethod
    def create(cls, weight: Array, rank: int, *, rng: RNG = None) -> Self:
        """``down`` Kaiming, ``up`` zero."""
        product = Product.create(check_weight(weight, cls.__name__), rank, rng=rng)
        return cls(product.up, product.down, as_compute(weight))

    def rows(self, rows: slice) -> Array:
        return self.weight[rows, :] * (self.up[rows, :] @ self.down)
