"""A product of two factors that cannot write to protected outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from lowrank_sp._arrays import RNG, Array, adjoint, namespace
from lowrank_sp.adapters.forms import Fixed, Form, Start, Trained
from lowrank_sp.adapters.forms._draws import factor_scale, kaiming_uniform, zeros
from lowrank_sp.adapters.initializers import weighted
from lowrank_sp.adapters.initializers._start import remainder
from lowrank_sp.adapters.subspaces.projectors import Projector
from lowrank_sp.factors import LowRank


@dataclass(frozen=True, repr=False)
class SafeProduct(Form):
    r"""A product that cannot write to protected outputs: SaLoRA :cite:p:`li2025salora`.

    .. math:: \Delta = s\, (I - U U^H) B A

    ``to_lora()`` merges the projector into ``up``; nothing is lost.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    protected : array, shape (m, k)
        ``U``, orthonormal and fixed: the basis of a :class:`Projector`.
    scale : float

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.adapters.subspaces import span
    >>> form = SafeProduct.create((3, 4), rank=2, protected=span(np.eye(3)[:, :1]), rng=0)
    >>> form, form.num_trainable, form.rank_bound
    (SafeProduct(up 3 x 2, down 2 x 4, protected 3 x 1), 14, 2)
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    protected: Fixed[Array, "m k"]
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Any,
        rank: int,
        *,
        protected: Projector,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """Plain LoRA's start: ``down`` uniform on ``+-1/sqrt(n)``, ``up`` zero.

        Parameters
        ----------
        weight : array of shape (m, n), or its shape
        rank : int
        protected : Projector
            Onto the outputs that must not change, such as :func:`harmful_outputs`.
        alpha : float, optional
        rng : int, Generator or None
        """
        (m, n), like, scale = factor_scale(weight, rank, alpha)
        u = _protected(protected, m, like)
        return cls(zeros((m, rank), like), kaiming_uniform((rank, n), like, rng), u, scale)

    @classmethod
    def for_task(
        cls,
        weight: Array,
        rank: int,
        *,
        protected: Projector,
        second_moment: Array,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Start:
        """The task-aware start: what of the weight matters most for the outputs on the task.

        Factors as :func:`~lowrank_sp.adapters.initializers.weighted` makes them, ``U_r U_r^H W``
        with the leading outputs ``U_r`` on the task; the base weight gives up what the projector
        lets through of their product. The published start truncates the weight before, ``U_r U_r^H
        [W]_r``, so that it has less of these outputs.

        Parameters
        ----------
        weight : array, shape (m, n)
        rank, protected, alpha, rng
            As in :meth:`create`.
        second_moment : array, shape (n, n)
            ``E[x x^H]`` on the task.
        """
        start = weighted(weight, rank, second_moment=second_moment, alpha=alpha, rng=rng)
        u = _protected(protected, weight.shape[0], start.up)
        form = cls(start.up, start.down, u, start.scale)
        return Start(form, remainder(weight, form.safe_up(), form.down, form.scale))

    @property
    def rank_bound(self) -> int:
        (m, r), k = self.up.shape, self.protected.shape[1]
        return min(r, m - k, self.down.shape[1])

    def safe_up(self) -> Array:
        """``(I - U U^H) B``."""
        return self.up - self.protected @ (adjoint(self.protected) @ self.up)

    def delta(self) -> LowRank:
        return self.scale * LowRank(self.safe_up(), self.down)

    def apply(self, x: Array) -> Array:
        return ((x @ self.down.mT) * self.scale) @ self.safe_up().mT


def _protected(protected: Projector, m: int, like: Array) -> Array:
    """A basis of the range of a projector, in the dtype of ``like``."""
    if protected.shape != (m, m):
        raise ValueError(f"protected must have shape ({m}, {m}), got {protected.shape}")
    return namespace(protected.basis, like).astype(protected.range_basis(), like.dtype)
