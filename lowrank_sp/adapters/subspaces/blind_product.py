"""A product of two factors that does not see some of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_sp._arrays import RNG, Array, adjoint, namespace
from lowrank_sp.adapters.forms import Fixed, Form, Start, Trained
from lowrank_sp.adapters.initializers import corda_kpm
from lowrank_sp.adapters.initializers._start import remainder
from lowrank_sp.adapters.subspaces.projectors import Projector
from lowrank_sp.factors import LowRank


@dataclass(frozen=True, repr=False)
class BlindProduct(Form):
    r"""A product that does not see some inputs: GuardSpace :cite:p:`zhang2026guardrail`.

    .. math:: \Delta = s\, B A\, (I - V V^H)

    Outputs on the span of ``V`` are those of the base, whatever is trained. ``to_lora()`` merges
    the projector into ``down``; nothing is lost.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    hidden : array, shape (n, k)
        ``V``, orthonormal and fixed: the basis of a :class:`Projector`.
    scale : float

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.adapters.subspaces import span
    >>> weight, harmful = np.diag([3.0, 2.0, 1.0]), np.array([[0.0], [0.0], [1.0]])
    >>> options = dict(hidden=span(harmful), second_moment=np.eye(3) + harmful @ harmful.T)
    >>> form, base = BlindProduct.for_inputs(weight, 1, **options)
    >>> form, bool(np.allclose(base @ harmful, weight @ harmful))
    (BlindProduct(up 3 x 1, down 1 x 3, hidden 3 x 1), True)
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    hidden: Fixed[Array, "n k"]
    scale: float = 1.0

    @classmethod
    def for_inputs(
        cls,
        weight: Array,
        rank: int,
        *,
        hidden: Projector,
        second_moment: Array,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Start:
        """The published start: what of the weight the harmful inputs excite least.

        Factors as :func:`~lowrank_sp.adapters.initializers.corda_kpm` makes them; the base weight
        gives up what the projector lets through of their product.

        Parameters
        ----------
        weight : array, shape (m, n)
        rank : int
        hidden : Projector
            Onto the harmful inputs, such as :func:`input_span`.
        second_moment : array, shape (n, n)
            ``E[x x^H]`` of these inputs.
        alpha : float, optional
        rng : int, Generator or None
        """
        start = corda_kpm(weight, rank, second_moment=second_moment, alpha=alpha, rng=rng)
        n = weight.shape[1]
        if hidden.shape != (n, n):
            raise ValueError(f"hidden must have shape ({n}, {n}), got {hidden.shape}")
        xp = namespace(hidden.basis, start.up)
        basis = xp.astype(hidden.range_basis(), start.up.dtype)
        form = cls(start.up, start.down, basis, start.scale)
        return Start(form, remainder(weight, form.up, form.seeing_down(), form.scale))

    @property
    def rank_bound(self) -> int:
        (r, n), k = self.down.shape, self.hidden.shape[1]
        return min(r, n - k, self.up.shape[0])

    def seeing_down(self) -> Array:
        """``A (I - V V^H)``."""
        return self.down - (self.down @ self.hidden) @ adjoint(self.hidden)

    def delta(self) -> LowRank:
        return self.scale * LowRank(self.up, self.seeing_down())

    def apply(self, x: Array) -> Array:
        return ((x @ self.seeing_down().mT) * self.scale) @ self.up.mT
