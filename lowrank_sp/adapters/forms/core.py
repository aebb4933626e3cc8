"""A trained core between two trained factors: ``scale * up @ core @ down``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, from_host, namespace
from lowrank_sp.adapters.forms._draws import (
    Like,
    factor_scale,
    full,
    normal,
    orthogonal,
    zeros,
)
from lowrank_sp.adapters.forms._form import Form, Start, check_weight
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.adapters.initializers._start import remainder
from lowrank_sp.adapters.initializers.spectral import kasa
from lowrank_sp.factors import SVD, LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd


class Sandwich(Form, ABC):
    """``scale * up @ core @ down``, whatever the core is made of."""

    up: Array
    down: Array
    scale: float

    @abstractmethod
    def core_matrix(self) -> Array:
        """The core, of shape ``(r, r)``."""

    @property
    def rank_bound(self) -> int:
        return min(*self.up.shape, *self.down.shape)

    def delta(self) -> LowRank:
        return LowRank(self.up @ (self.core_matrix() * self.scale), self.down)

    def apply(self, x: Array) -> Array:
        return ((x @ self.down.mT) @ (self.core_matrix().mT * self.scale)) @ self.up.mT


@dataclass(frozen=True, repr=False)
class DiagonalCore(Form):
    r"""Two factors and a diagonal, :math:`\Delta = s B \operatorname{diag}(d) A`.

    With nearly orthonormal factors it is an SVD whose values are trained, and a rank is given up by
    setting one of them to zero: AdaLoRA :cite:p:`zhang2023adalora`. What keeps the factors so is
    :func:`~lowrank_sp.adapters.forms.orthogonality` in the loss, or the rule
    :class:`~lowrank_sp.updates.constrained.StelLA`; which ranks to give up is
    :func:`~lowrank_sp.adapters.forms.keep_largest`.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    core : array, shape (r,)
        ``d``, of any sign.
    down : array, shape (r, n)
        ``A``.
    scale : float
        ``s``. It belongs to the rank of the start and stays when ranks are cut away.

    Examples
    --------
    >>> import numpy as np
    >>> form = DiagonalCore.create((6, 4), rank=3, rng=0)
    >>> form.replace({"core": np.array([2.0, 0.0, 1.0])}).kept(np.array([True, False, True]))
    DiagonalCore(up 6 x 2, core 2, down 2 x 4)
    """

    up: Trained[Array, "m r"]
    core: Trained[Array, "r"]
    down: Trained[Array, "r n"]
    scale: float = 1.0

    products = (("up", "core", "down"),)

    @classmethod
    def create(
        cls, weight: Like, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """AdaLoRA: factors of standard deviation 0.02, the diagonal zero.

        ``scale`` is ``alpha / rank``; PEFT divides by ``rank + 1e-5`` instead.
        """
        (m, n), like, scale = factor_scale(weight, rank, alpha)
        generator = np.random.default_rng(rng)
        up = normal((m, rank), 0.02, like, generator)
        down = normal((rank, n), 0.02, like, generator)
        return cls(up, zeros((rank,), like), down, scale)

    @classmethod
    def at_identity(
        cls,
        weight: Like,
        rank: int,
        *,
        sides: SVD | None = None,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """StelLA with a diagonal core :cite:p:`li2025stella`; see :meth:`FullCore.at_identity`."""
        up, down, like, scale = _orthonormal(weight, rank, sides, alpha, rng)
        return cls(up, full((rank,), 1.0, like), down, scale)

    @classmethod
    def principal(
        cls, weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Start:
        """SORSA :cite:p:`cao2024sorsa`: the leading singular triplets, and the weight without them.

        The triplets are computed in single precision at least, whatever the dtype of the weight.
        They are not divided by ``scale``: with ``alpha`` other than ``rank``, what is taken from
        the weight is ``scale`` times its principal part.
        """
        _, _, scale = factor_scale(check_weight(weight, cls.__name__), rank, alpha)
        u, s, vh = truncated_svd(weight, rank, rng=rng)
        return Start(cls(u, s, vh, scale), remainder(weight, u * s, vh, scale))

    @classmethod
    def beside_truncated(
        cls, weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Start:
        """KaSA :cite:p:`wang2025kasa`: plain LoRA with a Gaussian diagonal, beside a cut weight.

        The weight loses its ``rank`` smallest of ``min(m, n)`` singular triplets for good, so the
        layer does not start where it was.
        """
        weight = check_weight(weight, cls.__name__)
        if weight.ndim == 2 and min(weight.shape) < 2:
            raise ValueError(
                f"a weight of shape {' x '.join(map(str, weight.shape))} has one singular triplet, "
                "and would lose it; it needs at least two rows and two columns"
            )
        _, like, _ = factor_scale(weight, rank, alpha, min(weight.shape) - 1)
        generator = np.random.default_rng(rng)
        start = kasa(weight, rank, alpha=alpha, rng=generator)
        core = normal((rank,), 1.0, like, generator)
        return Start(cls(start.up, core, start.down, start.scale), start.residual)

    @property
    def rank_bound(self) -> int:
        return min(*self.up.shape, *self.down.shape)

    def delta(self) -> LowRank:
        return LowRank(self.up * (self.core * self.scale), self.down)

    def apply(self, x: Array) -> Array:
        return ((x @ self.down.mT) * (self.core * self.scale)) @ self.up.mT

    def masked(self, keep: Array) -> Self:
        """The diagonal zero where ``keep``, booleans of shape ``(r,)``, is False.

        The factors stay as they are, so a later step may bring the triplet back.
        """
        xp = namespace(self.core)
        return self.replace({"core": xp.where(keep, self.core, xp.zeros_like(self.core))})

    def kept(self, keep: np.ndarray) -> Self:
        """Only the triplets where ``keep``, booleans of shape ``(r,)``, is True; same ``scale``."""
        xp = namespace(self.core)
        index = from_host(np.flatnonzero(keep), self.core, xp.int64)
        return self.replace(
            {
                "up": xp.take(self.up, index, axis=1),
                "core": xp.take(self.core, index),
                "down": xp.take(self.down, index, axis=0),
            }
        )


@dataclass(frozen=True, repr=False)
class FullCore(Sandwich):
    r"""Two factors and a full core, :math:`\Delta = s\, U S V`.

    One form for PoLAR :cite:p:`lion2025polar` and StelLA :cite:p:`li2025stella`: the factors have
    orthonormal columns and rows at the start, and the rules
    :class:`~lowrank_sp.updates.constrained.PoLAR` and
    :class:`~lowrank_sp.updates.constrained.StelLA` keep them so. The gauge that is left is
    orthogonal: ``(U q, q^T S p, p^T V)``. Under a rule that does not know of the constraint it is
    a redundant product.

    Attributes
    ----------
    up : array, shape (m, r)
    core : array, shape (r, r)
    down : array, shape (r, n)
    scale : float
    """

    up: Trained[Array, "m r"]
    core: Trained[Array, "r r"]
    down: Trained[Array, "r n"]
    scale: float = 1.0

    products = (("up", "core", "down"),)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        alpha: float | None = None,
        std: float = 0.0,
        rng: RNG = None,
    ) -> Self:
        """PoLAR: random orthonormal sides, and a core that is zero, or Gaussian of size ``std``."""
        generator = np.random.default_rng(rng)
        up, down, like, scale = _orthonormal(weight, rank, None, alpha, generator)
        return cls(up, normal((rank, rank), std, like, generator), down, scale)

    @classmethod
    def at_identity(
        cls,
        weight: Like,
        rank: int,
        *,
        sides: SVD | None = None,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """StelLA: the core is the identity, so the update is not zero, and the weight stays.

        Parameters
        ----------
        weight, rank, alpha, rng
        sides : SVD, optional
            Whose vectors the sides are: :func:`~lowrank_sp.linalg.svd.truncated_svd` or
            :func:`~lowrank_sp.linalg.svd.minor_svd` of the weight. By default they are random.
        """
        up, down, like, scale = _orthonormal(weight, rank, sides, alpha, rng)
        return cls(up, identity(rank, like), down, scale)

    def core_matrix(self) -> Array:
        return self.core


def identity(size: int, like: Array) -> Array:
    """The identity matrix."""
    return namespace(like).eye(size, dtype=like.dtype, device=device(like))


def _orthonormal(
    weight: Like, rank: int, sides: SVD | None, alpha: float | None, rng: RNG
) -> tuple[Array, Array, Array, float]:
    """Sides with orthonormal columns and rows, :func:`template` and the scale."""
    (m, n), like, scale = factor_scale(weight, rank, alpha)
    if sides is None:
        generator = np.random.default_rng(rng)
        up = orthogonal((m, rank), like, generator)
        return up, orthogonal((rank, n), like, generator), like, scale
    if tuple(sides.shape) != (m, n):
        raise ValueError(f"sides must be an SVD of shape {(m, n)}, got {tuple(sides.shape)}")
    u, _, vh = sides.truncate(check_rank(rank, sides.rank, (m, n)))
    return u, vh, like, scale
