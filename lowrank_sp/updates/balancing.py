"""Rules that choose the gauge: RefLoRA, BaLoRA, imbalance regularization, BAR."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from lowrank_sp._arrays import Array, adjoint, namespace
from lowrank_sp.gauge import fix_signs
from lowrank_sp.updates.frames import (
    balance_of,
    frames,
    left_times,
    solve_left,
    solve_right,
    times,
)
from lowrank_sp.updates.moments import Adam, Moments
from lowrank_sp.updates.rule import Gauge, Pair, Scalar, State, where
from lowrank_sp.updates.slots import SlotRule


@dataclass(frozen=True)
class RefLoRA(SlotRule):
    r"""RefLoRA :cite:p:`zhang2025reflora`: gradients as the balanced gauge would see them.

    .. math::
        \nabla_B \leftarrow \nabla_B S, \qquad \nabla_A \leftarrow S^{-1} \nabla_A, \qquad
        S = (A A^H)^{-1} \mathbin{\#} B^H B

    ``S`` is the geometric mean, the positive definite solution of ``S A A^H S = B^H B``. Without
    moments a step is: balance the factors, one step of gradient descent, map back. To first order
    the adapter moves by ``-lr scale^2 ((D D^H)^(1/2) G + G (D^H D)^(1/2))`` with ``D = up down``, a
    function of the product alone. Adam, as the authors use it, gives up the invariance.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float

    Notes
    -----
    ``O((m + n) r^2)``, from frames of both factors and an ``r x r`` SVD instead of eigenvalues of
    squared matrices. Singular values of the product that are zero, with which ``S`` would freeze
    ``up``, count as the mean of the others, or one: a cold start begins with the step of
    :class:`~lowrank_sp.updates.first_order.ScaledGD`, where the authors warm up with plain LoRA.
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)

    covariance: ClassVar[Gauge] = Gauge.GENERAL

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:  # noqa: ARG002
        xp = namespace(factors.up)
        left, sigma, right, null = balance_of(factors, *frames(factors))
        zero, one = xp.zeros_like(sigma), xp.ones_like(sigma)
        known = xp.sum(xp.where(null, zero, one), axis=-1, keepdims=True)
        total = xp.sum(xp.where(null, zero, sigma), axis=-1, keepdims=True)
        unit = xp.ones_like(total)
        mean = xp.where(known > 0, total / xp.where(known > 0, known, unit), unit)
        filled = xp.where(null, mean, sigma)
        filled = filled[..., None, :]
        return Pair(solve_right(grads.up, right, filled), solve_left(left, grads.down, filled))


@dataclass(frozen=True)
class RefLoRAScalar(SlotRule):
    """RefLoRA-S :cite:p:`zhang2025reflora`: both factors brought to one Frobenius norm.

    Before each step ``up <- up / c`` and ``down <- c down`` with ``c^2 = ||up|| / ||down||``, and
    gradients and moments are changed to match. Undoes scalar changes of gauge, and no others.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)

    @property
    def joint(self) -> bool:
        return True

    def _rebalance(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Pair, State]:
        xp = namespace(factors.up)
        up, down = (xp.linalg.matrix_norm(x)[..., None, None] for x in factors)
        alive = (up > 0) & (down > 0)
        one = xp.ones_like(up)
        c = (xp.where(alive, up, one) / xp.where(alive, down, one)) ** 0.5
        powers = {
            "up_mean": c,
            "down_mean": 1 / c,
            "up_square": c**2,
            "down_square": 1 / c**2,
        }
        state = {name: x * powers[name] if name in powers else x for name, x in state.items()}
        return Pair(factors.up / c, factors.down * c), Pair(grads.up * c, grads.down / c), state


@dataclass(frozen=True)
class BaLoRA(SlotRule):
    r"""BaLoRA :cite:p:`castin2026balanced`: every step starts from the balanced factors.

    ``B^H B = A A^H = diag(sigma)``, with the signs of :func:`~lowrank_sp.gauge.fix_signs`. The
    balanced pair depends on the product alone, and with it the whole path, whatever the moments, as
    long as no singular values coincide. Moments are not transported.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float

    Notes
    -----
    ``O((m + n) r^2)``. The authors balance after each step; before it, the start is balanced too. A
    pair whose product is rank deficient has no balanced gauge and stays as it is, as ``up = 0``
    does in the first step.
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)

    @property
    def joint(self) -> bool:
        return True

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL

    def _rebalance(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Pair, State]:
        xp = namespace(factors.up)
        left, sigma, right, null = balance_of(factors, *frames(factors))
        both = xp.concat([adjoint(left.inverse), adjoint(right.inverse)], axis=-1)
        _, both = fix_signs(times(factors.up, left.inverse), both)
        both = adjoint(both) * sigma[..., None, :] ** 0.5
        # x takes up to the balanced gauge, and the adjoint of its inverse takes its gradient there
        x, inverse = both[..., : sigma.shape[-1], :], both[..., sigma.shape[-1] :, :]
        deficient = xp.any(null, axis=-1)

        def moved(old: Pair, up_map: Array, down_map: Array) -> Pair:
            up, down = times(old.up, up_map), left_times(adjoint(down_map), old.down)
            return Pair(where(deficient, old.up, up), where(deficient, old.down, down))

        return moved(factors, x, inverse), moved(grads, inverse, x), state


@dataclass(frozen=True)
class ImbalanceRegularized(SlotRule):
    r"""Gradients of the loss plus ``(penalty / 4) ||B^H B - A A^H||_F^2``.

    The regularizer of Procrustes flow :cite:p:`tu2016procrustes`, which draws the factors to the
    balanced gauge. Invariant under unitary gauges without Adam.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    penalty : float
    """

    lr: float = 1e-2
    penalty: float = 0.1

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:  # noqa: ARG002
        up, down = factors
        gap = self.penalty * (adjoint(up) @ up - down @ adjoint(down))
        return Pair(grads.up + up @ gap, grads.down - gap @ down)


@dataclass(frozen=True)
class BAR(SlotRule):
    """Balancedness-aware regularization :cite:p:`li2024implicit`, the base of both rules.

    Before each step one factor grows by ``1 + lr strength`` and the other shrinks by
    ``1 - lr strength``; the product changes by ``(lr strength)^2`` only. It has the effect on the
    balancedness ``(||up||^2 - ||down||^2) / 2`` that sharpness-aware minimization has, without its
    second gradient. The authors let ``strength`` decrease over the run; pass another rule then.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    strength : float
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)
    strength: float = 1.0

    @property
    def joint(self) -> bool:
        return True

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        amount = lr * self.strength
        up, down = factors
        grows = self._up_grows(factors, grads)
        factors = Pair(
            where(grows, (1 + amount) * up, (1 - amount) * up),
            where(grows, (1 - amount) * down, (1 + amount) * down),
        )
        return super()._update(factors, grads, state, scale=scale, lr=lr)

    @abstractmethod
    def _up_grows(self, factors: Pair, grads: Pair) -> Array:
        """Whether ``up`` grows, for every pair of a batch."""


@dataclass(frozen=True)
class NBAR(BAR):
    """nBAR :cite:p:`li2024implicit`: the factor with the larger gradient grows.

    Parameters
    ----------
    lr, moments, weight_decay, strength
        As for :class:`BAR`.
    """

    def _up_grows(self, factors: Pair, grads: Pair) -> Array:  # noqa: ARG002
        return _larger(grads)


@dataclass(frozen=True)
class OBAR(BAR):
    """oBAR :cite:p:`li2024implicit`: the larger factor shrinks, so that the pair gets balanced.

    Parameters
    ----------
    lr, moments, weight_decay, strength
        As for :class:`BAR`.
    """

    def _up_grows(self, factors: Pair, grads: Pair) -> Array:  # noqa: ARG002
        return ~_larger(factors)


def _larger(pair: Pair) -> Array:
    """Whether ``up`` has at least the Frobenius norm of ``down``."""
    norm = namespace(pair.up).linalg.matrix_norm
    return norm(pair.up) >= norm(pair.down)
