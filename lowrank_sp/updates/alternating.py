"""Rules that move one factor at a time, or one factor only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lowrank_sp._arrays import adjoint, namespace
from lowrank_sp.updates.first_order import scaled
from lowrank_sp.updates.frames import frame, frames, solve_left, solve_right
from lowrank_sp.updates.moments import Adam, Moments
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State, counter, over, where
from lowrank_sp.updates.slots import descend


@dataclass(frozen=True)
class AltLoRA(Rule):
    r"""AltLoRA :cite:p:`yu2025altlora`: projected gradients, one factor at a time, with momentum.

    Every other step moves ``up`` and the steps between move ``down``, each by the solution of a
    least-squares problem,

    .. math:: h_B = s^{-2}\, \nabla_B (A A^H)^{-1}, \qquad h_A = s^{-2} (B^H B)^{-1} \nabla_A ,

    so that the adapter moves by ``-lr G P_A`` and ``-lr P_B G`` in turn. The momentum of a factor,
    ``M <- beta T(M) + (1 - beta) h``, is transported when the other factor has moved:
    ``T(M_B) = M_B A' A^H (A A^H)^-1`` projects ``M_B A'`` on the new row space.

    ``up`` moves first, so that the usual start at ``up = 0`` wastes no step. The gradient of the
    factor whose turn it is not may be None.

    Parameters
    ----------
    lr : float
        In units of the gradient with respect to ``W``.
    beta : float
    weight_decay : float
        On the factor that moves.

    Notes
    -----
    ``O((m + n) r^2)``; state ``2 (m + n) r``: momenta and the factors that they belong to.
    """

    lr: float = 1e-2
    beta: float = 0.9
    weight_decay: float = 0.0

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL

    def _init(self, factors: Pair) -> State:
        xp = namespace(factors.up)
        return {
            "step": counter(factors),
            "up_mean": xp.zeros_like(factors.up),
            "down_mean": xp.zeros_like(factors.down),
            "past_up": factors.up,
            "past_down": factors.down,
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        h = scaled(factors, grads, scale)
        carried = transport(factors, Pair(state["past_up"], state["past_down"]))
        ups = state["step"] % 2 == 0
        up_mean = self.beta * (state["up_mean"] @ carried.down) + (1 - self.beta) * h.up
        down_mean = self.beta * (carried.up @ state["down_mean"]) + (1 - self.beta) * h.down
        directions, extra = self._directions(h, Pair(up_mean, down_mean), state)
        moved = Pair(
            descend(factors.up, directions.up, lr, self.weight_decay),
            descend(factors.down, directions.down, lr, self.weight_decay),
        )
        new = Pair(
            where(ups, moved.up, factors.up),
            where(ups, factors.down, moved.down),
        )
        after_up = {"up_mean": up_mean, "past_down": factors.down, **extra.up}
        after_down = {"down_mean": down_mean, "past_up": factors.up, **extra.down}
        return new, {
            "step": state["step"] + 1,
            **{name: where(ups, x, state[name]) for name, x in after_up.items()},
            **{name: where(ups, state[name], x) for name, x in after_down.items()},
        }

    def _directions(self, h: Pair, means: Pair, state: State) -> tuple[Pair, Extra]:  # noqa: ARG002
        return means, Extra({}, {})


class Extra(NamedTuple):
    """What else a step of either factor leaves behind."""

    up: State
    down: State


@dataclass(frozen=True)
class AltLoRAPlus(AltLoRA):
    """AltLoRA+ :cite:p:`yu2025altlora`: AltLoRA with Adam's division by entries.

    The squares of the projected gradients are averaged entry by entry; not invariant, as its
    authors say. State: ``3 (m + n) r``.

    Parameters
    ----------
    lr, beta, weight_decay
        As for :class:`AltLoRA`.
    second : float
        Decay of the squares.
    eps : float
    """

    lr: float = 1e-3
    second: float = 0.999
    eps: float = 1e-4

    @property
    def invariance(self) -> Gauge:
        return Gauge.NONE

    def _init(self, factors: Pair) -> State:
        squares = Pair(*(abs(namespace(x).zeros_like(x)) for x in factors))
        return {**super()._init(factors), "up_square": squares.up, "down_square": squares.down}

    def _directions(self, h: Pair, means: Pair, state: State) -> tuple[Pair, Extra]:
        xp = namespace(h.up)
        turns = over(xp.astype(state["step"] // 2 + 1, state["up_square"].dtype))
        up = self.second * state["up_square"] + (1 - self.second) * abs(h.up) ** 2
        down = self.second * state["down_square"] + (1 - self.second) * abs(h.down) ** 2
        seen, weight = 1 - self.second**turns, 1 - self.beta**turns
        directions = Pair(
            means.up / (weight * ((up / seen) ** 0.5 + self.eps)),
            means.down / (weight * ((down / seen) ** 0.5 + self.eps)),
        )
        return directions, Extra({"up_square": up}, {"down_square": down})


@dataclass(frozen=True)
class FrozenDown(Rule):
    """LoRA-FA :cite:p:`zhang2023lorafa`: ``down`` stays; ``up`` gets its projected gradient.

    ``h_B = grad_up (A A^H)^-1 / scale^2`` is the least-squares step for a fixed ``down``, and the
    moments act on it. (FFA-LoRA, the plain gradient of ``up`` alone, is :class:`AdamW` with
    ``grad_down=None``.) State: ``2 m r`` with Adam.

    Parameters
    ----------
    lr : float
    moments : Moments
    weight_decay : float
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=lambda: Adam(eps=1e-6))
    weight_decay: float = 0.0

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL if self.moments.linear else Gauge.NONE

    def _init(self, factors: Pair) -> State:
        return {"step": counter(factors), **self.moments.init(factors.up)}

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        of_down = frame(adjoint(factors.down))
        step = state["step"] + 1
        kept = {name: x for name, x in state.items() if name != "step"}
        projected = solve_right(grads.up, of_down, 1 / scale**2)
        direction, kept = self.moments.turn(projected, kept, step)
        up = descend(factors.up, direction, lr, self.weight_decay)
        return Pair(up, factors.down), {"step": step, **kept}


def transport(factors: Pair, past: Pair) -> Pair:
    """The ``r x r`` maps that carry steps of one factor to where the other has moved.

    ``down <- (B^H B)^-1 B^H B' @ down`` for steps of ``down``, which is the ``up`` part of the
    result, and ``up <- up @ A' A^H (A A^H)^-1`` for steps of ``up``, which is its ``down`` part.
    """
    of_up, of_down = frames(factors)
    return Pair(
        solve_left(of_up, adjoint(factors.up) @ past.up),
        solve_right(past.down @ adjoint(factors.down), of_down),
    )
