"""Most rules: four slots, each filled with a small pure function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lowrank_sp._arrays import Array
from lowrank_sp.updates.frames import combined
from lowrank_sp.updates.moments import Moments, Plain, init_pair, turn_pair
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State


@dataclass(frozen=True)
class SlotRule(Rule):
    """A rule made of four slots: rebalance, metric, moments and move.

    The defaults are no change of gauge, the Euclidean metric, no moments, and a step with decoupled
    weight decay; together they are gradient descent. A rule overrides what it does otherwise.

    Parameters
    ----------
    lr : float
    moments : Moments
        What is remembered of the preconditioned gradients.
    weight_decay : float
        Both factors shrink by ``1 - lr weight_decay`` each step, the product by its square.
    """

    lr: float
    moments: Moments = field(default_factory=Plain)
    weight_decay: float = 0.0

    #: Gauges under which metric, move and rebalance are covariant.
    covariance: ClassVar[Gauge] = Gauge.UNITARY

    @property
    def invariance(self) -> Gauge:
        return self.covariance if self.moments.linear else Gauge.NONE

    def _init(self, factors: Pair) -> State:
        return init_pair(self.moments, factors)

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        factors, grads, state = self._rebalance(factors, grads, state)
        directions = self._metric(factors, grads, scale)
        directions, state = turn_pair(self.moments, directions, state)
        return self._move(factors, directions, scale=scale, lr=lr), state

    def _rebalance(self, factors: Pair, grads: Pair, state: State) -> tuple[Pair, Pair, State]:
        return factors, grads, state

    def _metric(self, factors: Pair, grads: Pair, scale: Scalar) -> Pair:  # noqa: ARG002
        return grads

    def _move(self, factors: Pair, directions: Pair, *, scale: Scalar, lr: Scalar) -> Pair:  # noqa: ARG002
        return Pair(
            descend(factors.up, directions.up, lr, self.weight_decay),
            descend(factors.down, directions.down, lr, self.weight_decay),
        )


def descend(x: Array, direction: Array, lr: Scalar, decay: float) -> Array:
    """``(1 - lr decay) x - lr direction``."""
    return combined(1 - lr * decay, x, -lr, direction)
