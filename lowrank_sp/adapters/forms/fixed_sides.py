"""A core between two factors that are not trained: singular vectors of the weight or gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, device, namespace
from lowrank_sp.adapters.forms._draws import factor_scale, full, normal, zeros
from lowrank_sp.adapters.forms._form import LayeredForm, check_weight
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.adapters.forms.core import FullCore, Sandwich, identity
from lowrank_sp.adapters.initializers.gradient import lora_sb
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.svd import truncated_svd


@dataclass(frozen=True, repr=False)
class FixedSides(FullCore):
    r"""A trained core in fixed bases, :math:`\Delta = s B R A` with ``r^2`` trained numbers.

    LoRA-XS :cite:p:`balazy2024loraxs` takes the principal subspaces of the weight, LoRA-SB
    :cite:p:`ponkshe2024lorasb` those of the gradient. With orthonormal sides a gradient step on the
    core changes the weight by the projection of its gradient onto both subspaces.

    Attributes
    ----------
    up : array, shape (m, r)
    core : array, shape (r, r)
    down : array, shape (r, n)
    scale : float

    Examples
    --------
    >>> import numpy as np
    >>> form = FixedSides.create(np.diag([4.0, 2.0, 1.0]), rank=2, rng=0)
    >>> form.down
    array([[4., 0., 0.],
           [0., 2., 0.]])
    >>> form.num_trainable
    4
    """

    up: Fixed[Array, "m r"]
    down: Fixed[Array, "r n"]

    products = ()

    @classmethod
    def create(
        cls,
        weight: Array,
        rank: int,
        *,
        alpha: float | None = None,
        std: float = 1e-5,
        rng: RNG = None,
    ) -> Self:
        """LoRA-XS: ``up = U_r``, ``down = Sigma_r V_r^H``, a core of standard deviation ``std``."""
        generator = np.random.default_rng(rng)
        f, like, scale = _principal(cls, weight, rank, alpha, generator)
        up, down = f.split("right").factors()
        return cls(up, normal((rank, rank), std, like, generator), down, scale)

    @classmethod
    def along_gradient(
        cls, weight: Array, rank: int, *, gradient: Any, step: float, rng: RNG = None
    ) -> Self:
        """LoRA-SB: where :func:`~lowrank_sp.adapters.initializers.lora_sb` starts, at scale 1.

        The layer starts one step away from its weight, which is not compensated.
        """
        start = lora_sb(weight, rank, gradient=gradient, step=step, rng=rng)
        return cls(start.up, start.core, start.down)


@dataclass(frozen=True, repr=False)
class CombinedCore(Sandwich):
    r"""A core that is a combination of fixed ones, :math:`\Delta = B (\sum_i v_i P_i) A`.

    TinyLoRA :cite:p:`morris2026tinylora`: down to a single trained number. The random ``P`` are
    part of the adapter, so that nothing depends on how a library draws; a file is not tiny.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    coefficients : array, shape (k,)
        ``v``.
    basis : array, shape (k, r, r)
        ``P``.
    down : array, shape (r, n)
        ``A``.
    scale : float
    """

    up: Fixed[Array, "m r"]
    coefficients: Trained[Array, "k"]
    basis: Fixed[Array, "k r r"]
    down: Fixed[Array, "r n"]
    scale: float = 1.0

    @classmethod
    def create(cls, weight: Array, rank: int = 2, *, size: int = 64, rng: RNG = None) -> Self:
        """``B = U Sigma^(1/2)``, ``A = Sigma^(1/2) V^H``, ``P`` of variance ``1/r``, ``v`` zero."""
        generator = np.random.default_rng(rng)
        f, like, _ = _principal(cls, weight, rank, None, generator)
        up, down = f.split().factors()
        basis = normal((_count(size), rank, rank), rank**-0.5, like, generator)
        return cls(up, zeros((size,), like), basis, down)

    def core_matrix(self) -> Array:
        return namespace(self.basis).tensordot(self.coefficients, self.basis, axes=1)


@dataclass(frozen=True, repr=False)
class TiedCores(LayeredForm):
    """:class:`CombinedCore` of many layers, which share the trained coefficients.

    Attributes
    ----------
    coefficients : array, shape (k,)
    ups, bases, downs : tuples of arrays
        Of every layer, as in :class:`CombinedCore`.

    Examples
    --------
    >>> import numpy as np
    >>> weights = [np.eye(4), np.ones((6, 4))]
    >>> form = TiedCores.create(weights, rank=1, size=3, rng=0)
    >>> form.num_trainable, form.num_layers, form.layer(1).shape
    (3, 2, (6, 4))
    """

    coefficients: Trained[Array, "k"]
    ups: Fixed[tuple[Array, ...], "..."]
    bases: Fixed[tuple[Array, ...], "..."]
    downs: Fixed[tuple[Array, ...], "..."]

    @classmethod
    def create(
        cls, weights: Sequence[Array], rank: int = 2, *, size: int = 64, rng: RNG = None
    ) -> Self:
        """Layers as :meth:`CombinedCore.create`, each with draws of its own."""
        children = np.random.default_rng(rng).spawn(len(weights))
        layers = [
            CombinedCore.create(weight, rank, size=size, rng=child)
            for weight, child in zip(weights, children, strict=True)
        ]
        if not layers:
            raise ValueError("at least one weight is needed, got none")
        return cls(
            layers[0].coefficients,
            tuple(layer.up for layer in layers),
            tuple(layer.basis for layer in layers),
            tuple(layer.down for layer in layers),
        )

    @property
    def num_layers(self) -> int:
        return len(self.ups)

    @property
    def rank_bound(self) -> int:
        return max(up.shape[1] for up in self.ups)

    def layer(self, index: int) -> CombinedCore:
        return CombinedCore(
            self.ups[index], self.coefficients, self.bases[index], self.downs[index]
        )


@dataclass(frozen=True, repr=False)
class RotatedCore(Sandwich):
    r"""Principal triplets of the weight, turned and stretched: PSOFT :cite:p:`wu2026psoft`.

    .. math:: \Delta = s B \left(\operatorname{diag}(b)\, Q \operatorname{diag}(a) - I\right) A,
              \qquad Q = (I + K)(I - K)^{-1}, \qquad K^T = -K

    with :math:`s B A` the principal part of the weight, so that its place is taken by
    :math:`U_r \Sigma_r \operatorname{diag}(b) Q \operatorname{diag}(a) V_r^T`. The Cayley transform
    reaches every rotation without the eigenvalue -1. Without the constraint on ``Q`` the functions
    are those of LoRA-XS.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    skew : array, shape (r (r - 1) / 2,)
        ``K`` above its diagonal, row by row.
    left, right : array, shape (r,)
        ``b`` and ``a``.
    down : array, shape (r, n)
        ``A``.
    scale : float
    """

    up: Fixed[Array, "m r"]
    skew: Trained[Array, "k"]
    left: Trained[Array, "r"]
    right: Trained[Array, "r"]
    down: Fixed[Array, "r n"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.up.shape[1]
        if self.skew.shape[0] != r * (r - 1) // 2:
            raise ValueError(
                f"skew of RotatedCore must have {r * (r - 1) // 2} entries for r = {r}, "
                f"got {self.skew.shape[0]}"
            )

    @classmethod
    def create(
        cls, weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """``B = U_r Sigma_r / s``, ``A = V_r^H``, no rotation, no stretching."""
        f, like, scale = _principal(cls, weight, rank, alpha, rng)
        up, down = f.split("left").factors()
        one = full((rank,), 1.0, like)
        skew = zeros((rank * (rank - 1) // 2,), like)
        return cls(up / scale, skew, one, one, down, scale)

    def core_matrix(self) -> Array:
        xp = namespace(self.skew)
        k = skew_matrix(as_compute(self.skew), self.left.shape[0])
        one = identity(k.shape[0], k)
        # No library solves in half precision.
        rotation = xp.astype(xp.linalg.solve(one - k, one + k), self.skew.dtype, copy=False)
        one = identity(k.shape[0], self.skew)
        return self.left[:, None] * rotation * self.right[None, :] - one


def skew_matrix(values: Array, size: int) -> Array:
    """The skew-symmetric matrices with ``values`` above their diagonals, row by row."""
    xp = namespace(values)
    index = xp.arange(size, device=device(values))
    low = xp.minimum(index[:, None], index[None, :])
    high = xp.maximum(index[:, None], index[None, :])
    place = low * (2 * size - low - 1) // 2 + high - low - 1
    # One more entry, of the diagonal, so that no index lies outside.
    place = xp.where(low == high, xp.full_like(place, values.shape[-1]), place)
    lead = values.shape[:-1]
    none = xp.zeros((*lead, 1), dtype=values.dtype, device=device(values))
    padded = xp.concat([values, none], axis=-1)
    flat = xp.take(padded, xp.reshape(place, (-1,)), axis=-1)
    entries = xp.reshape(flat, (*lead, size, size))
    return entries * xp.astype(xp.sign(index[None, :] - index[:, None]), values.dtype)


def _principal(
    cls: type, weight: Array, rank: int, alpha: float | None, rng: RNG
) -> tuple[SVD, Array, float]:
    """Leading triplets of the weight, an array like their vectors, and the scale."""
    _, like, scale = factor_scale(check_weight(weight, cls.__name__), rank, alpha)
    return truncated_svd(weight, rank, rng=rng), like, scale


def _count(size: int) -> int:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}; it counts the trained numbers")
    return size
