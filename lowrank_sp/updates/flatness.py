"""Flat minima: gradients taken beside the factors, at a worst or at a random perturbation."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_sp._arrays import RNG, Array, adjoint, as_compute, namespace, standard_normal
from lowrank_sp.updates.frames import times
from lowrank_sp.updates.rule import Gauge, Pair, Scalar, State, counter, rounded, where
from lowrank_sp.updates.tangent import point, project_gradient
from lowrank_sp.updates.wrappers import Wrapper


@dataclass(frozen=True)
class SAM(Wrapper):
    """Sharpness-aware minimization :cite:p:`foret2021sharpness` on the factors, around any rule.

    Two gradients make one step. The first moves the factors up the gradient by a distance of
    ``rho`` together; the second, taken there, moves them from where they were. So call ``step``
    twice, each time with a gradient at the factors that it returned last, and :meth:`settle` at the
    end.

    Parameters
    ----------
    rule : Rule
    rho : float
        Frobenius norm of the perturbation of both factors.

    Notes
    -----
    State: that of the rule, and ``(m + n) r``.
    """

    rho: float = 0.05

    @property
    def factorwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner rule."""
        return self.rule.factorwise

    @property
    def invariance(self) -> Gauge:
        return Gauge.NONE if self.rule.invariance is Gauge.NONE else Gauge.UNITARY

    def settle(self, up: Array, down: Array, state: State) -> tuple[Array, Array]:
        true_up, true_down = rounded(state["sam_up"], up), rounded(state["sam_down"], down)
        return self.rule.settle(true_up, true_down, _inner(state))

    def _init(self, factors: Pair) -> State:
        return {
            "sam_turn": counter(factors),
            "sam_up": factors.up,
            "sam_down": factors.down,
            **self.rule._init(factors),
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        c = self.rho / _norm(grads)
        there = Pair(factors.up + c * grads.up, factors.down + c * grads.down)
        true = Pair(state["sam_up"], state["sam_down"])
        inner = _inner(state)
        moved, after = self.rule._update(true, grads, inner, scale=scale, lr=lr)
        first = state["sam_turn"] == 0
        return Pair(where(first, there.up, moved.up), where(first, there.down, moved.down)), {
            "sam_turn": 1 - state["sam_turn"],
            "sam_up": where(first, factors.up, moved.up),
            "sam_down": where(first, factors.down, moved.down),
            **{name: where(first, inner[name], x) for name, x in after.items()},
        }


@dataclass(frozen=True)
class EFlat(Wrapper):
    r"""EFMLoRA :cite:p:`deng2025flat`: a perturbation of the full weight, made by ``up`` alone.

    The worst perturbation ``E = rho P / ||P||_F`` of ``W``, with ``P = (G P_A + P_B G) / 2``, the
    part of the gradient that both factors see, is reached as ``scale E_B A`` with
    ``E_B = E A^+ / scale``. One gradient a step: it is taken at ``up`` plus a running mean of
    ``E_B``, ``mean <- (1 - beta) mean + beta E_B``, and moves ``up`` itself. Call :meth:`settle` at
    the end.

    Parameters
    ----------
    rule : Rule
    rho : float
        Frobenius norm of the perturbation of ``W``.
    beta : float
        Weight of the new perturbation in the mean.

    Notes
    -----
    ``O((m + n) r^2)``; state: that of the rule, and ``2 m r``.
    """

    rho: float = 0.05
    beta: float = 0.9

    def settle(self, up: Array, down: Array, state: State) -> tuple[Array, Array]:
        return self.rule.settle(rounded(state["flat_up"], up), down, _inner(state))

    def _init(self, factors: Pair) -> State:
        return {
            "flat_up": factors.up,
            "flat_mean": namespace(factors.up).zeros_like(factors.up),
            **self.rule._init(factors),
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        true = Pair(state["flat_up"], factors.down)
        moved, after = self.rule._update(true, grads, _inner(state), scale=scale, lr=lr)
        worst = perturbation(true, grads, scale=scale, rho=self.rho)
        mean = (1 - self.beta) * state["flat_mean"] + self.beta * worst
        return Pair(moved.up + mean, moved.down), {
            "flat_up": moved.up,
            "flat_mean": mean,
            **after,
        }


def perturbation(factors: Pair, grads: Pair, *, scale: Scalar, rho: float) -> Array:
    """``E_B`` with ``scale E_B A = E P_A``, for ``E = rho (G P_A + P_B G) / (2 norm)``."""
    at = point(factors)
    xp = namespace(at.core)
    x = project_gradient(at, grads, scale)
    # G P_A + P_B G = P_T(G) + P_B G P_A: the core counts twice.
    size = x._replace(core=2 * x.core).norm()[..., None, None]
    size = xp.where(size > 0, size, xp.ones_like(size))
    along = 2 * (at.q_up @ x.core) + x.left
    return times(along, adjoint(at.of_down.inverse)) * (rho / (scale * size))


def flat_noise(weight: Array, *, sigma: float = 0.05, rng: RNG = None) -> Array:
    r"""Random perturbation of Flat-LoRA :cite:p:`li2025flatlora` for a merged weight.

    .. math:: \epsilon_{ij} \sim N(0, \sigma^2 \lVert W_{i,:} \rVert^2 / n)

    Add it to ``W = W_0 + scale up down`` before the forward pass, and subtract afterwards what the
    same ``rng`` gives: a seed and the row norms are all that need be stored. The variance of every
    output grows by the factor ``1 + sigma^2``. A statement on ``W``, so no gauge changes it.

    Parameters
    ----------
    weight : array, shape (m, n)
    sigma : float
        The authors let it grow to 0.05 by a cosine.
    rng : int, Generator or None

    Examples
    --------
    >>> import numpy as np
    >>> noise = flat_noise(np.full((2, 5000), 3.0), sigma=0.1, rng=0)
    >>> np.round(np.linalg.norm(noise, axis=1) / np.linalg.norm(np.full(5000, 3.0)), 2)
    array([0.1, 0.1])
    """
    weight = as_compute(weight)
    norms = namespace(weight).linalg.vector_norm(weight, axis=-1, keepdims=True)
    size = sigma / weight.shape[-1] ** 0.5
    return size * norms * standard_normal(tuple(weight.shape), like=weight, rng=rng)


def _norm(grads: Pair) -> Array:
    """Norm of both gradients together, one where it is zero, shaped to divide factors."""
    xp = namespace(grads.up)
    squares = (xp.sum(abs(g) ** 2, axis=(-2, -1), keepdims=True) for g in grads)
    norm = sum(squares) ** 0.5
    return xp.where(norm > 0, norm, xp.ones_like(norm))


def _inner(state: State) -> State:
    return {name: x for name, x in state.items() if not name.startswith(("sam_", "flat_"))}
