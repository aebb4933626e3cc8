"""What a rule remembers of the gradients of one factor.

A moment has ``init(x)`` for the arrays it keeps and ``turn(g, state, step)``, from the gradient at
hand to the direction to move in. ``step`` is the number of this step, from 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lowrank_sp._arrays import Array, is_complex, namespace
from lowrank_sp.updates.frames import combined, to_compile
from lowrank_sp.updates.rule import Pair, State, counter, over


@dataclass(frozen=True)
class Moments(ABC):
    """The history of one factor; a rule keeps one for each.

    ``linear`` says whether the direction is a linear map of gradients, row by row and column by
    column, which keeps the covariance of the gradients under a fixed change of gauge.
    """

    linear: ClassVar[bool] = False

    def init(self, x: Array) -> State:  # noqa: ARG002
        """What is kept for a factor ``x`` before the first step."""
        return {}

    @abstractmethod
    def turn(self, grad: Array, state: State, step: Array) -> tuple[Array, State]:
        """The direction for a gradient, and what is kept after it."""

    def transport(self, state: State, turn: Array) -> State:  # noqa: ARG002
        """What is kept, where coordinates ``x (..., r, n)`` of gradients become ``turn @ x``."""
        return state


@dataclass(frozen=True)
class Plain(Moments):
    """No history: the direction is the gradient."""

    linear: ClassVar[bool] = True

    def turn(self, grad: Array, state: State, step: Array) -> tuple[Array, State]:  # noqa: ARG002
        return grad, state


@dataclass(frozen=True)
class Momentum(Moments):
    """Heavy ball: ``mean <- beta mean + grad``, which is the direction."""

    beta: float = 0.9
    linear: ClassVar[bool] = True

    def init(self, x: Array) -> State:
        return {"mean": namespace(x).zeros_like(x)}

    def turn(self, grad: Array, state: State, step: Array) -> tuple[Array, State]:  # noqa: ARG002
        mean = combined(self.beta, state["mean"], 1.0, grad)
        return mean, {"mean": mean}

    def transport(self, state: State, turn: Array) -> State:
        return {"mean": turn @ state["mean"]}


@dataclass(frozen=True)
class Adam(Moments):
    """Adam :cite:p:`kingma2015adam`: ``mean / (sqrt(square) + eps)``, entry by entry.

    Both running means are corrected for their start at zero. The division by entries depends on the
    basis, so no rule with it is invariant, not even under rotations.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, x: Array) -> State:
        zeros = namespace(x).zeros_like(x)
        return {"mean": zeros, "square": abs(zeros)}

    def turn(self, grad: Array, state: State, step: Array) -> tuple[Array, State]:
        xp = namespace(grad)
        first, second = self.betas
        count = over(xp.astype(step, state["square"].dtype))
        # mean / c / (sqrt(square / d) + eps), with one division by an array
        seen = weight_of(second, count) ** 0.5
        lift, weight = self.eps * seen, weight_of(first, count) / seen
        if to_compile(grad, state["mean"]):
            from lowrank_sp.updates import _compiled

            mean, square, direction = _compiled.adam(
                grad, state["mean"], state["square"], self.betas, lift, weight
            )
            return direction, {"mean": mean, "square": square}
        # In place on what comes from the state, whose layout over devices is that of the factor.
        mean = first * state["mean"]
        mean += (1 - first) * grad
        square = second * state["square"]
        square += (1 - second) * squared(grad)
        size = xp.sqrt(square)
        size += lift
        size *= weight
        return mean / size, {"mean": mean, "square": square}

    def transport(self, state: State, turn: Array) -> State:
        # The mean squares of sums of coordinates that are not correlated.
        return {"mean": turn @ state["mean"], "square": squared(turn) @ state["square"]}


def weight_of(decay: float, count: Array) -> Array:
    """``1 - decay^count``, the weight of ``count`` terms in a running mean that began at zero."""
    if decay == 0:
        return 1 - decay**count
    # In single precision a difference from one would lose five digits of a thousandth.
    return -namespace(count).expm1(count * math.log(decay))


def squared(x: Array) -> Array:
    """Squares of the magnitudes of the entries."""
    return abs(x) ** 2 if is_complex(x.dtype) else x * x


def init_pair(moments: Moments, factors: Pair) -> State:
    """The state of both factors and the step counter, in one flat dict."""
    up, down = moments.init(factors.up), moments.init(factors.down)
    return {"step": counter(factors), **named("up", up), **named("down", down)}


def turn_pair(moments: Moments, grads: Pair, state: State) -> tuple[Pair, State]:
    """Directions for both factors, and the state after them."""
    step = state["step"] + 1
    up, kept_up = moments.turn(grads.up, part("up", state), step)
    down, kept_down = moments.turn(grads.down, part("down", state), step)
    return Pair(up, down), {"step": step, **named("up", kept_up), **named("down", kept_down)}


def named(side: str, state: State) -> State:
    """A state within a larger one: its arrays, under names that say whose they are."""
    return {f"{side}_{name}": x for name, x in state.items()}


def part(side: str, state: State) -> State:
    """The inverse of :func:`named`."""
    return {k.removeprefix(f"{side}_"): x for k, x in state.items() if k.startswith(f"{side}_")}
