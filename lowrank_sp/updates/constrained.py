"""Rules whose factors have orthonormal columns and rows: StelLA and PoLAR.

With a core between them, ``W = W_0 + scale up core down``: the pair rule is the same, for the
gradients of ``up`` and ``down`` have the core in them, and the core is a parameter like any other,
which Adam moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lowrank_sp._arrays import Array, adjoint
from lowrank_sp.updates.frames import times
from lowrank_sp.updates.moments import Adam, Moments
from lowrank_sp.updates.rule import Pair, Scalar
from lowrank_sp.updates.slots import SlotRule
from lowrank_sp.updates.spectral import polar


@dataclass(frozen=True)
class StelLA(SlotRule):
    r"""StelLA :cite:p:`li2025stella`: both factors stay on the Stiefel manifold.

    For each factor, as a block ``X`` of orthonormal columns: the gradient in the canonical metric
    ``g - X g^H X``, then the moments, then the projection of the step on the tangent space,
    ``D - X sym(X^H D)``, and the polar factor of ``X + D`` as the new ``X``. Weight decay would be
    undone, so there is none. With a core between the factors, move it by Adam.

    Parameters
    ----------
    lr : float
    moments : Moments
    width : float, optional
        Hidden size of the model; steps of a factor with ``m`` rows are then multiplied by
        ``sqrt(width / m)``, which the authors do by default.

    Notes
    -----
    ``O((m + n) r^2)``. Factors must have orthonormal columns and rows at the start.
    """

    lr: float = 5e-4
    moments: Moments = field(default_factory=Adam)
    width: float | None = None

    factorwise: ClassVar[bool] = True

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:  # noqa: ARG002
        return _each(canonical_gradient, factors, grads)

    def _move(self, factors: Pair, directions: Pair, *, scale: Scalar, lr: Scalar) -> Pair:  # noqa: ARG002
        def moved(x: Array, d: Array) -> Array:
            size = 1.0 if self.width is None else (self.width / x.shape[-2]) ** 0.5
            inner = adjoint(x) @ d
            return polar(x - lr * size * (d - times(x, (inner + adjoint(inner)) / 2)))

        return _each(moved, factors, directions)


@dataclass(frozen=True)
class PoLAR(SlotRule):
    """PoLAR :cite:p:`lion2025polar`: factors that land on the Stiefel manifold, never retracted.

    For each factor, as a block ``X`` of columns, the gradient is replaced by the landing field
    ``(g X^H - X g^H) X + strength X (X^H X - I)``, whose two parts are orthogonal, and the moments
    act on that. With a core between the factors, move it by Adam.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    strength : float
        Of the pull to the manifold.

    Notes
    -----
    ``O((m + n) r^2)``, products only.
    """

    lr: float = 4e-3
    moments: Moments = field(default_factory=Adam)
    strength: float = 5e-3

    factorwise: ClassVar[bool] = True

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:  # noqa: ARG002
        return _each(lambda x, g: landing(x, g, self.strength), factors, grads)


def canonical_gradient(x: Array, grad: Array) -> Array:
    """``g - X g^H X``, the gradient in the canonical metric of the Stiefel manifold."""
    return grad - times(x, adjoint(grad) @ x)


def landing(x: Array, grad: Array, strength: float) -> Array:
    """``(g X^H - X g^H) X + strength X (X^H X - I)``, in ``O(m r^2)``."""
    n = adjoint(x) @ x
    return times(grad, n) - times(x, adjoint(grad) @ x) + strength * (times(x, n) - x)


def _each(f, factors: Pair, other: Pair) -> Pair:
    """``f`` of both factors as tall blocks."""
    down = f(adjoint(factors.down), adjoint(other.down))
    return Pair(f(factors.up, other.up), adjoint(down))
