r"""The weight reflected: inputs are turned before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, as_compute, device, namespace
from lowrank_sp.adapters.forms._draws import template, uniform
from lowrank_sp.adapters.forms._form import Form, check_weight
from lowrank_sp.adapters.forms._parts import Trained, Weight
from lowrank_sp.factors import LowRank, check_rank


@dataclass(frozen=True, repr=False)
class Reflections(Form):
    r"""A chain of Householder reflections of the input: HRA :cite:p:`yuan2024bridging`.

    .. math:: W + \Delta = W H_1 \cdots H_r, \qquad
              H_i = I - 2\, \frac{u_i u_i^T}{\lVert u_i \rVert^2}

    It keeps the singular values of the weight, and its left singular vectors. The product of the
    reflections is the identity less a matrix of rank ``r``, so that the update is plain LoRA: with
    unit vectors for columns of ``U``,

    .. math:: H_1 \cdots H_r = I - U T U^T, \qquad T^{-1} = \tfrac12 I + \operatorname{triu}(U^T U)

    where ``triu`` takes what stands above the diagonal.

    Attributes
    ----------
    vectors : array, shape (n, r)
        ``u``, of any length but zero.
    weight : array, shape (m, n)
        ``W``. The update depends on it: on a merged weight it is another one.
    orthogonal : bool
        Whether the vectors are made orthogonal first, one after the other.

    Notes
    -----
    ``2 m n r`` flops for the weight times ``U``, then those of plain LoRA. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> form = Reflections(np.array([[1.0], [1.0]]), np.diag([3.0, 4.0]))
    >>> np.round(form.merge(form.weight), 12)
    array([[ 0., -3.],
           [-4.,  0.]])
    """

    vectors: Trained[Array, "n r"]
    weight: Weight[Array, "m n"]
    orthogonal: bool = False

    @classmethod
    def create(cls, weight: Array, rank: int, *, rng: RNG = None) -> Self:
        """Random vectors, each of them twice, so that reflections undo each other.

        ``rank`` must be even.
        """
        weight = as_compute(check_weight(weight, cls.__name__))
        (m, n), like = template(weight)
        rank = check_rank(rank, n, (m, n))
        if rank % 2:
            raise ValueError(f"rank must be even, for reflections start in pairs, got {rank}")
        half = uniform((n, rank // 2, 1), (2 / rank) ** 0.5, like, rng)
        xp = namespace(half)
        return cls(xp.reshape(xp.concat([half, half], axis=2), (n, rank)), weight)

    @property
    def rank_bound(self) -> int:
        return min(*self.weight.shape, self.vectors.shape[1])

    def delta(self) -> LowRank:
        up, unit = self._factors()
        return LowRank(up, unit.mT)

    def apply(self, x: Array) -> Array:
        up, unit = self._factors()
        return (x @ unit) @ up.mT

    def _factors(self) -> tuple[Array, Array]:
        """``-W U T`` and ``U``, in the dtype of the weight."""
        u = as_compute(self.vectors)
        xp = namespace(u)
        u = xp.linalg.qr(u).Q if self.orthogonal else u / xp.sqrt(xp.sum(u * u, axis=0))
        eye = xp.eye(u.shape[1], dtype=u.dtype, device=device(u))
        inverse = xp.triu(u.mT @ u, k=1) + 0.5 * eye
        unit = xp.astype(u, self.weight.dtype, copy=False)
        core = xp.astype(xp.linalg.solve(inverse, eye), self.weight.dtype, copy=False)
        return -(self.weight @ unit) @ core, unit
