"""Rules around a rule: gradients that are not finite, and clipping that no gauge can change."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_sp._arrays import Array, namespace
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State, counter, where
from lowrank_sp.updates.tangent import point, project_gradient


@dataclass(frozen=True)
class Wrapper(Rule):
    """A rule that changes what another one is given. Its state lies in the same flat dict.

    Parameters
    ----------
    rule : Rule
    """

    rule: Rule

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Learning rate of the inner rule."""
        return self.rule.lr

    @property
    def joint(self) -> bool:
        return self.rule.joint

    @property
    def invariance(self) -> Gauge:
        return self.rule.invariance

    def settle(self, up: Array, down: Array, state: State) -> tuple[Array, Array]:
        return self.rule.settle(up, down, state)

    def _init(self, factors: Pair) -> State:
        return self.rule._init(factors)


@dataclass(frozen=True)
class SkipNonFinite(Wrapper):
    """Skip steps whose gradients hold a NaN or an infinity, and count them.

    Factors and state stay as they are, pair by pair in a batch; ``state["skipped"]`` counts. No
    value is read back to the host, so that the step can be compiled.

    Parameters
    ----------
    rule : Rule

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.updates import AdamW
    >>> rule = SkipNonFinite(AdamW())
    >>> up, down = np.ones((3, 1)), np.ones((1, 2))
    >>> new, _, state = rule.step(up, down, up * np.nan, down, rule.init(up, down))
    >>> np.array_equal(new, up), int(state["skipped"]), int(state["step"])
    (True, 1, 0)
    """

    @property
    def factorwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner rule."""
        return self.rule.factorwise

    def _init(self, factors: Pair) -> State:
        return {"skipped": counter(factors), **self.rule._init(factors)}

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        xp = namespace(factors.up)
        good = xp.all(xp.all(xp.isfinite(grads.up), axis=-1), axis=-1)
        good = good & xp.all(xp.all(xp.isfinite(grads.down), axis=-1), axis=-1)
        inner = {name: x for name, x in state.items() if name != "skipped"}
        # Eigenvalue routines refuse NaN in some libraries.
        safe = Pair(*(where(good, g, xp.zeros_like(g)) for g in grads))
        new, after = self.rule._update(factors, safe, inner, scale=scale, lr=lr)
        bad = xp.astype(~good, xp.int32)
        return Pair(where(good, new.up, factors.up), where(good, new.down, factors.down)), {
            "skipped": state["skipped"] + bad,
            **{name: where(good, x, inner[name]) for name, x in after.items()},
        }


@dataclass(frozen=True)
class Clip(Wrapper):
    """Scale gradients down so that ``||P_T(G)||_F`` is at most ``max_norm``.

    The norm of the gradient with respect to ``W``, projected on the tangent space of fixed rank,
    is known from the factor gradients and depends on the product alone. The norm of the factor
    gradients, which is commonly clipped, depends on the gauge. ``O((m + n) r^2)``.

    Parameters
    ----------
    rule : Rule
    max_norm : float
        In units of the gradient with respect to ``W``.
    """

    max_norm: float = 1.0

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        xp = namespace(factors.up)
        norm = project_gradient(point(factors), grads, scale).norm()[..., None, None]
        large = norm > self.max_norm
        one = xp.ones_like(norm)
        weight = xp.where(large, self.max_norm / xp.where(large, norm, one), one)
        grads = Pair(grads.up * weight, grads.down * weight)
        return self.rule._update(factors, grads, state, scale=scale, lr=lr)
