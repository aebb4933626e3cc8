r"""Functions of the entries of a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, namespace
from lowrank_sp.adapters.forms._draws import Like
from lowrank_sp.adapters.forms._entries import Entrywise
from lowrank_sp.adapters.forms._form import Product
from lowrank_sp.adapters.forms._parts import Trained


@dataclass(frozen=True, repr=False)
class Sine(Entrywise):
    r"""Sine of every entry of a product: Sine-LoRA :cite:p:`ji2025sine`.

    .. math:: \Delta = \frac{s}{\sqrt n}\, \sin(\omega B A)

    For entries that are not small the rank is full. At the start, where they are, the update is
    :math:`s \omega / \sqrt n` times the product.

    Attributes
    ----------
    up : array, shape (m, r)
    down : array, shape (r, n)
    frequency : float
        ``omega``.
    scale : float
        ``s``, without the square root, which comes from the shape.

    Notes
    -----
    Computed by blocks of rows, ``2 m n (c + r)`` flops and ``m n`` sines for ``c`` inputs.

    Examples
    --------
    >>> import numpy as np
    >>> form = Sine(np.ones((2, 1)), np.ones((1, 4)), frequency=np.pi / 2)
    >>> form.delta()[0]
    array([0.5, 0.5, 0.5, 0.5])
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    frequency: float
    scale: float = 1.0

    products = (("up", "down"),)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        frequency: float = 200.0,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """``down`` Kaiming, ``up`` zero, ``scale = alpha / rank``."""
        if not frequency > 0:
            raise ValueError(f"frequency must be positive, got {frequency}")
        form = Product.create(weight, rank, alpha=alpha, rng=rng)
        return cls(form.up, form.down, frequency, form.scale)

    def rows(self, rows: slice) -> Array:
        angles = (self.up[rows, :] * self.frequency) @ self.down
        return namespace(angles).sin(angles) * (self.scale * self.down.shape[1] ** -0.5)
