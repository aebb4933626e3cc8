r"""A product whose terms have unit size, times a trained strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, as_compute, detached, namespace
from lowrank_sp.adapters.forms._draws import full
from lowrank_sp.adapters.forms._form import Form, Product, check_weight
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank

# Shorter columns and rows are not lengthened to one.
_SHORTEST = 1e-4


@dataclass(frozen=True, repr=False)
class NormalizedProduct(Form):
    r"""Terms of unit size, a strength, and the lengths of the weight: DeLoRA
    :cite:p:`bini2025delora`.

    .. math:: \Delta = \frac{\lambda}{r} \sum_i \frac{b_i a_i^T}{\lVert b_i \rVert\,
              \lVert a_i \rVert} \operatorname{diag}(c)

    However long training moves ``b`` and ``a``, the update before ``c`` has no larger norm than
    the strength. The paper multiplies by the norm of the weight; PEFT, and so this form, by
    those of its columns ``c``.

    Attributes
    ----------
    up : array, shape (m, r)
        ``b``.
    down : array, shape (r, n)
        ``a``.
    strength : array, shape (1,)
        ``lambda``.
    gains : array, shape (n,)
        ``c``.

    Notes
    -----
    Norms below 1e-4 are taken for that, so that a column of ``up`` may be zero. But what matters of
    a column is its direction: the first step away from zero, however short beyond 1e-4, makes a
    term of full strength.

    Examples
    --------
    >>> import numpy as np
    >>> form = NormalizedProduct.create(np.diag([3.0, 4.0]), rank=1, strength=2.0, rng=0)
    >>> form = form.replace({"up": np.array([[0.0], [9.0]]), "down": np.array([[7.0, 0.0]])})
    >>> form.delta().to_dense()
    array([[0., 0.],
           [6., 0.]])
    """  # noqa: D205

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    strength: Trained[Array, "1"]
    gains: Fixed[Array, "n"]

    @classmethod
    def create(cls, weight: Array, rank: int, *, strength: float = 15.0, rng: RNG = None) -> Self:
        """Factors of plain LoRA, so that the update is zero: as PEFT has it."""
        weight = as_compute(check_weight(weight, cls.__name__))
        form = Product.create(weight, rank, rng=rng)
        lengths = detached(namespace(weight).linalg.vector_norm(weight, axis=0))
        return cls(form.up, form.down, full((1,), strength, form.up), lengths)

    @property
    def rank_bound(self) -> int:
        return min(*self.up.shape, *self.down.shape)

    def delta(self) -> LowRank:
        return LowRank(self.up * self._terms(), self.down * self.gains)

    def apply(self, x: Array) -> Array:
        return (((x * self.gains) @ self.down.mT) * self._terms()) @ self.up.mT

    def _terms(self) -> Array:
        xp = namespace(self.up)
        up, down = as_compute(self.up), as_compute(self.down)
        squares = [xp.sum(up * up, axis=0), xp.sum(down * down, axis=1)]
        # Of squares: the slope of a norm at zero is not a number.
        lengths = [xp.sqrt(xp.clip(square, min=_SHORTEST**2)) for square in squares]
        terms = as_compute(self.strength) / (up.shape[1] * lengths[0] * lengths[1])
        return xp.astype(terms, self.up.dtype, copy=False)
