"""Rules that move one factor at a time, or one factor only."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_sp._arrays import Array, adjoint, namespace
from lowrank_sp.updates.frames import combined, frame, solve_right, times
from lowrank_sp.updates.moments import Adam, Moments, squared, weight_of
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State, counter, nowhere, over, where
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
        ups = state["step"] % 2 == 0
        new, after = factors, {**state, "step": state["step"] + 1}
        if not nowhere(ups):
            up, kept = self._up_moved(factors, grads.up, state, scale=scale, lr=lr)
            new = new._replace(up=where(ups, up, factors.up))
            after |= {name: where(ups, x, state[name]) for name, x in kept.items()}
        if not nowhere(~ups):
            mirrored = Pair(adjoint(factors.down), adjoint(factors.up))
            down, kept = self._up_moved(
                mirrored, adjoint(grads.down), _mirrored(state), scale=scale, lr=lr
            )
            new = new._replace(down=where(ups, factors.down, adjoint(down)))
            after |= {name: where(ups, state[name], x) for name, x in _mirrored(kept).items()}
        return new, after

    def _up_moved(
        self, factors: Pair, grad: Array, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Array, State]:
        """``up`` after its step, and what changes in the state."""
        other = adjoint(factors.down)
        of_other = frame(other)
        h = solve_right(grad, of_other, 1 / scale**2)
        carried = solve_right(state["past_down"] @ other, of_other)
        mean = combined(self.beta, times(state["up_mean"], carried), 1 - self.beta, h)
        direction, kept = self._direction(h, mean, state)
        up = descend(factors.up, direction, lr, self.weight_decay)
        return up, {"up_mean": mean, "past_down": factors.down, **kept}

    def _direction(self, h: Array, mean: Array, state: State) -> tuple[Array, State]:  # noqa: ARG002
        return mean, {}


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

    def _direction(self, h: Array, mean: Array, state: State) -> tuple[Array, State]:
        turns = over(namespace(h).astype(state["step"] // 2 + 1, state["up_square"].dtype))
        square = self.second * state["up_square"] + (1 - self.second) * squared(h)
        size = (square / weight_of(self.second, turns)) ** 0.5 + self.eps
        return mean / (weight_of(self.beta, turns) * size), {"up_square": square}


def _mirrored(state: State) -> State:
    """The state of the pair ``(down^H, up^H)``."""
    other = {"up_mean": "down_mean", "up_square": "down_square", "past_up": "past_down"}
    other |= {theirs: ours for ours, theirs in other.items()}
    return {other.get(name, name): adjoint(x) if name in other else x for name, x in state.items()}


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
