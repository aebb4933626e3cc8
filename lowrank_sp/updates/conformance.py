"""The law that every rule is measured on: one path of products in every gauge."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_sp._arrays import RNG
from lowrank_sp.updates.rule import Gauge, Rule


@dataclass(frozen=True)
class Conformance:
    """What :func:`conformance` found.

    Attributes
    ----------
    rule : Rule
    promise : Gauge
        The invariance that the rule promises.
    conditions : tuple of float
        Condition numbers of the changes of gauge tried.
    drifts : tuple of float
        For each of them, the largest ``||P_t - P'_t||_F / ||P_t||_F`` between the path of products
        ``P_t`` and the path ``P'_t`` from the changed start; infinite where a path diverged.
    unitary : float
        The same for an orthogonal change of gauge.
    state : float
        Numbers in the state, in units of the ``(m + n) r`` of the factors.
    """

    rule: Rule
    promise: Gauge
    conditions: tuple[float, ...]
    drifts: tuple[float, ...]
    unitary: float
    state: float

    def holds(self, tol: float = 1e3 * 2.0**-52) -> bool:
        """Whether the drifts are what was promised, and no less was promised than is true.

        A gauge of condition ``c`` changes the start by a rounding of ``c eps``, so the drift may be
        ``tol max(1, c / 10)``. A rule that does not promise a law has to break it.
        """
        general = all(
            d <= tol * max(1.0, c / 10) for c, d in zip(self.conditions, self.drifts, strict=True)
        )
        found = Gauge.NONE
        if self.unitary <= tol:
            found = Gauge.GENERAL if general else Gauge.UNITARY
        return found is self.promise


def conformance(
    rule: Rule,
    *,
    shape: tuple[int, int] = (12, 9),
    rank: int = 3,
    steps: int = 6,
    conditions: Sequence[float] = (1.0, 10.0, 1e3),
    rng: RNG = 0,
) -> Conformance:
    r"""Measure how the path of a rule depends on the gauge of its start.

    The loss is ``||W_0 + s B A - W||_F^2 / 2`` with a random ``W`` and ``s = 0.7``, in NumPy and
    float64. The rule takes ``steps`` steps from ``(B, A)`` and from ``(B X, X^{-1} A)``, with
    random ``X`` whose singular values go from ``c^{-1/2}`` to ``c^{1/2}``.

    Parameters
    ----------
    rule : Rule
    shape : (int, int)
    rank : int
    steps : int
    conditions : sequence of float
        The ``c``.
    rng : int, Generator or None

    Returns
    -------
    Conformance

    Examples
    --------
    >>> from lowrank_sp.updates import AdamW, ScaledGD
    >>> conformance(ScaledGD(lr=0.1)).holds()
    True
    >>> conformance(AdamW()).promise, max(conformance(AdamW()).drifts) > 1e-3
    (<Gauge.NONE: 'none'>, True)
    """
    generator = np.random.default_rng(rng)
    target = generator.standard_normal(shape)
    up, down = (
        generator.standard_normal((shape[0], rank)),
        generator.standard_normal((rank, shape[1])),
    )
    path = _path(rule, up, down, target, steps)

    def drift(condition: float, unitary: bool = False) -> float:
        left, right = (np.linalg.qr(generator.standard_normal((rank, rank)))[0] for _ in range(2))
        sizes = np.geomspace(condition**-0.5, condition**0.5, rank)
        if unitary:
            x, inverse = left, left.T
        else:
            x, inverse = (left * sizes) @ right, (right.T / sizes) @ left.T
        other = _path(rule, up @ x, inverse @ down, target, steps)
        with np.errstate(all="ignore"):
            errors = [
                float(np.linalg.norm(p - q) / np.linalg.norm(p))
                for p, q in zip(path, other, strict=True)
            ]
        return max((e if math.isfinite(e) else math.inf) for e in errors)

    state = rule.init(up, down)
    size = sum(np.asarray(x).size for name, x in state.items() if np.asarray(x).ndim > 0)
    return Conformance(
        rule=rule,
        promise=rule.invariance,
        conditions=tuple(conditions),
        drifts=tuple(drift(c) for c in conditions),
        unitary=drift(1.0, unitary=True),
        state=size / ((shape[0] + shape[1]) * rank),
    )


def _path(
    rule: Rule, up: np.ndarray, down: np.ndarray, target: np.ndarray, steps: int
) -> list[np.ndarray]:
    scale, state, path = 0.7, rule.init(up, down), []
    # Rules that are not invariant diverge in some gauges: that is what is measured.
    with np.errstate(all="ignore"):
        for _ in range(steps):
            gradient = scale * (up @ down) - target
            grads = scale * (gradient @ down.T), scale * (up.T @ gradient)
            up, down, state = rule.step(up, down, *grads, state, scale=scale)
            path.append(up @ down)
    return path


def step_seconds(
    rule: Rule, *, shape: tuple[int, int] = (4096, 4096), rank: int = 16, repeats: int = 5
) -> float:
    """Median processor time of a step in NumPy and float32, over ``repeats``, in seconds."""
    generator = np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        return generator.standard_normal(size).astype(np.float32)

    up, down = draw(shape[0], rank), draw(rank, shape[1])
    grads = draw(shape[0], rank), draw(rank, shape[1])
    state, times = rule.init(up, down), []
    for _ in range(repeats + 1):
        start = time.process_time()
        _, _, state = rule.step(up, down, *grads, state)
        times.append(time.process_time() - start)
    return float(np.median(times[1:]))
