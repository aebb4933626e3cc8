"""Full gradients, scaled as the moments scale a projection of them: Fira and APOLLO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowrank_sp._arrays import Array, namespace
from lowrank_sp.updates.full_weight import GaLore, ProjectedRule, norm_of
from lowrank_sp.updates.projector import Subspace, sketch
from lowrank_sp.updates.rule import State, over


@dataclass(frozen=True)
class Fira(GaLore):
    r"""Fira :cite:p:`chen2024fira`: GaLore, and what of the gradient it leaves out, scaled alike.

    .. math:: W \leftarrow W - \eta \alpha \bigl( P\, \mathrm{Adam}(R) + S \bigr), \quad
              S = (G - P R)\, \mathrm{diag}(\varphi), \quad
              \varphi_j = \lVert \mathrm{Adam}(R)_j \rVert / \lVert R_j \rVert

    over the columns ``j`` of ``R = P^H G``, or the rows of the gradient for ``m >= n``.

    Parameters
    ----------
    rank, lr, scale, when, moments, weight_decay, seed, tol, transport
        As in :class:`GaLore`.
    growth : float
        ``||S||_F`` may grow by this factor from step to step; beyond, ``S`` is scaled down.

    Notes
    -----
    ``6 m n r`` flops a step. The state has one number more, ``"norm"``.
    """

    scale: float = 1.0
    growth: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_growth(self.growth)

    def init(self, weight: Array, *, index: Any = 0, count: int = 1) -> State:
        state = super().init(weight, index=index, count=count)
        return {**state, "norm": 0 * state["angle"]}

    def _direction(
        self, g: Array, basis: Array, coordinates: Array, adapted: Array, state: State
    ) -> tuple[Array, State]:
        rest = (g - basis @ coordinates) * _gain(adapted, coordinates, -2)
        rest, norm = _limited(rest, state["norm"], self.growth)
        return basis @ adapted + rest, {"norm": norm}


@dataclass(frozen=True)
class APOLLO(ProjectedRule):
    r"""APOLLO :cite:p:`zhu2024apollo`: the gradient, scaled by channels as Adam scales a sketch.

    .. math:: W \leftarrow W - \eta \alpha\, G\, \mathrm{diag}(\varphi), \qquad
              \varphi_j = \lVert \mathrm{Adam}(R)_j \rVert / \lVert R_j \rVert

    over the columns ``j`` of ``R = P^H G``, or the rows of the gradient for ``m >= n``. ``P`` is
    Gaussian, drawn anew from a seed at each renewal; there is no SVD.

    Parameters
    ----------
    rank, lr, scale, when, moments, weight_decay, seed
        As in :class:`ProjectedRule`. ``scale`` is the square root of the published factor.
    growth : float
        The norm of the direction may grow by this factor from step to step.

    Notes
    -----
    ``2 m n r`` flops a step. State as of GaLore; the sketch, which the seed determines, is kept so
    that a step draws no random numbers.
    """

    growth: float = 1.01

    def __post_init__(self) -> None:
        _check_growth(self.growth)

    #: Axes of the coordinates that share one factor.
    shared: ClassVar[Any] = -2

    def init(self, weight: Array, *, index: Any = 0, count: int = 1) -> State:
        state = super().init(weight, index=index, count=count)
        return {**state, "norm": 0 * state["angle"]}

    def _look(self, g: Array, old: Array | None, rng: np.random.Generator) -> Subspace:  # noqa: ARG002
        return Subspace(sketch(g, self.rank, rng=rng), 1.0, 0, False)

    def _direction(
        self,
        g: Array,
        basis: Array,  # noqa: ARG002
        coordinates: Array,
        adapted: Array,
        state: State,
    ) -> tuple[Array, State]:
        direction = g * _gain(adapted, coordinates, self.shared)
        direction, norm = _limited(direction, state["norm"], self.growth)
        return direction, {"norm": norm}


@dataclass(frozen=True)
class APOLLOMini(APOLLO):
    """APOLLO-Mini :cite:p:`zhu2024apollo`: one factor for a whole weight, from a sketch of rank 1.

    Parameters
    ----------
    rank, lr, scale, when, moments, weight_decay, seed, growth
        As in :class:`APOLLO`.

    Notes
    -----
    State ``s + 2 l``: hardly more than that of plain gradient descent.
    """

    rank: int = 1
    scale: float = 128**0.5

    shared: ClassVar[Any] = (-2, -1)


def _check_growth(growth: float) -> None:
    if not growth >= 1:
        raise ValueError(f"growth must be at least 1, got {growth}")


def _gain(adapted: Array, coordinates: Array, shared: Any) -> Array:
    """How much longer the moments have made each column, or the whole."""
    xp = namespace(adapted)
    after, before = (
        xp.sum(abs(x) ** 2, axis=shared, keepdims=True) ** 0.5 for x in (adapted, coordinates)
    )
    return after / (before + 1e-8)


def _limited(x: Array, last: Array, growth: float) -> tuple[Array, Array]:
    """``x``, no longer than ``growth`` times the last one, and its norm."""
    xp = namespace(x)
    norm = norm_of(x)
    most = growth * last
    above = (last > 0) & (norm > most)
    factor = xp.where(above, most / xp.where(above, norm, xp.ones_like(norm)), xp.ones_like(norm))
    return x * over(factor), norm * factor
