"""Rules of first order: plain and preconditioned gradients, with or without moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lowrank_sp._arrays import namespace
from lowrank_sp.updates.frames import balance_of, frames, solve_left, solve_right
from lowrank_sp.updates.moments import Adam, Moments
from lowrank_sp.updates.rule import Gauge, Pair, Scalar
from lowrank_sp.updates.slots import SlotRule, descend


@dataclass(frozen=True)
class GradientDescent(SlotRule):
    """Gradient descent on the factors: ``x <- x - lr grad``, with any moments.

    Invariant under unitary gauges without moments or with :class:`Momentum`; a change of gauge
    with condition ``c`` changes its steps by up to ``c^2``.

    Parameters
    ----------
    lr : float
    moments : Moments
        :class:`~lowrank_sp.updates.moments.Plain` by default.
    weight_decay : float

    Examples
    --------
    >>> import numpy as np
    >>> rule = GradientDescent(lr=0.5)
    >>> up, down = np.ones((2, 1)), np.ones((1, 3))
    >>> up, down, state = rule.step(up, down, up, down, rule.init(up, down))
    >>> up[0, 0], down[0, 0], int(state["step"])
    (np.float64(0.5), np.float64(0.5), 1)
    """

    lr: float = 1e-2

    factorwise: ClassVar[bool] = True


@dataclass(frozen=True)
class AdamW(SlotRule):
    """Adam with decoupled weight decay on both factors :cite:p:`loshchilov2019decoupled`.

    The baseline. Defaults are those of ``torch.optim.AdamW``, whose steps it repeats. Not even
    invariant under unitary gauges. State: ``2 (m + n) r``.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)
    weight_decay: float = 1e-2

    factorwise: ClassVar[bool] = True


@dataclass(frozen=True)
class LoRAPlus(SlotRule):
    """LoRA+ :cite:p:`hayou2024loraplus`: the learning rate of ``up`` is ``ratio`` times as large.

    Without moments it is gradient descent with ``lr sqrt(ratio)`` in the gauge
    ``(c up, down / c)``, ``c = ratio^(-1/4)``; with Adam it is not.

    Parameters
    ----------
    lr : float
        Learning rate of ``down``.
    ratio : float
        At least 1; the authors advise 16.
    moments : Moments
    weight_decay : float
    """

    lr: float = 1e-4
    moments: Moments = field(default_factory=Adam)
    weight_decay: float = 0.0
    ratio: float = 16.0

    factorwise: ClassVar[bool] = True

    def _move(self, factors: Pair, directions: Pair, *, scale: Scalar, lr: Scalar) -> Pair:  # noqa: ARG002
        return Pair(
            descend(factors.up, directions.up, self.ratio * lr, self.weight_decay),
            descend(factors.down, directions.down, lr, self.weight_decay),
        )


@dataclass(frozen=True)
class ScaledGD(SlotRule):
    r"""Scaled gradient descent :cite:p:`tong2021accelerating`: inverse Grams as the metric.

    .. math::
        B \leftarrow B - \eta s^{-2}\, \nabla_B (A A^H)^{-1}, \qquad
        A \leftarrow A - \eta s^{-2}\, (B^H B)^{-1} \nabla_A

    To first order the adapter moves by ``-lr (P_B G + G P_A)``, whatever the gauge and the scale,
    and the rate of convergence does not depend on the condition number of the matrix. Both factors
    move from the old point. Invariant under every change of gauge, with ``damping`` too, but not
    with ``ridge``.

    Parameters
    ----------
    lr : float
        In units of the gradient with respect to ``W``; 0.5 is the published choice for sensing.
    moments : Moments
    weight_decay : float
    damping : float
        Relative ridge in the balanced gauge, where both Grams are ``diag(sigma)`` with the singular
        values of the product: ``diag(sigma + damping mean(sigma))`` is inverted instead. Directions
        in which the product is zero are not damped, so a cold start is not slowed down.
    ridge : float
        Added to the diagonals of both Grams as they stand, in the place of ``damping``; most codes
        do this.

    Notes
    -----
    ``O((m + n) r^2)``. The Grams, their inverses and the balanced gauge are ``r x r`` and computed
    in float64; see :func:`~lowrank_sp.updates.frames.frame`.

    Examples
    --------
    One step of size one from ``down = 0`` recovers a matrix whose columns ``up`` spans.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> up, down = rng.standard_normal((6, 2)), np.zeros((2, 5))
    >>> w = up @ rng.standard_normal((2, 5))
    >>> rule = ScaledGD(lr=1.0, damping=0.0)
    >>> g = up @ down - w
    >>> up, down, _ = rule.step(up, down, g @ down.T, up.T @ g, rule.init(up, down))
    >>> np.allclose(up @ down, w)
    True
    """

    lr: float = 1e-2
    damping: float = 1e-2
    ridge: float = 0.0

    covariance: ClassVar[Gauge] = Gauge.GENERAL

    @property
    def invariance(self) -> Gauge:
        return Gauge.UNITARY if self.ridge and self.moments.linear else super().invariance

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:
        return scaled(factors, grads, scale, damping=self.damping, ridge=self.ridge)


@dataclass(frozen=True)
class ScaledAdamW(ScaledGD):
    """Riemannian-preconditioned LoRA :cite:p:`zhang2024riemannian`: AdamW on scaled gradients.

    :class:`ScaledGD` with Adam's moments. The division by entries gives up the invariance.

    Parameters
    ----------
    lr, moments, weight_decay, damping, ridge
        As for :class:`ScaledGD`.
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=lambda: Adam(eps=1e-6))
    weight_decay: float = 0.0


def scaled(
    factors: Pair, grads: Pair, scale: Scalar, *, damping: float = 0.0, ridge: float = 0.0
) -> Pair:
    """Factor gradients times the inverse Gram matrix of the other factor, over ``scale^2``."""
    of_up, of_down = frames(factors, ridge=ridge)
    weights = 1 / scale**2
    if damping and not ridge:
        xp = namespace(factors.up)
        of_up, sigma, of_down, null = balance_of(factors, of_up, of_down)
        delta = damping * xp.mean(sigma, axis=-1, keepdims=True)
        one = xp.ones_like(sigma)
        filtered = xp.where(null, one, sigma / xp.where(null, one, sigma + delta))
        weights = weights * filtered[..., None, :]
    return Pair(solve_right(grads.up, of_down, weights), solve_left(of_up, grads.down, weights))
