"""Rules that descend along the tangent space of fixed rank: Riemannian GD, LoRA-Pro, AdaPreLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_sp._arrays import Array, adjoint, eps, is_complex, namespace
from lowrank_sp.updates.frames import frame, left_times, times
from lowrank_sp.updates.moments import Adam, Moments, Plain, init_pair, turn_pair, weight_of
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State, counter
from lowrank_sp.updates.slots import descend
from lowrank_sp.updates.tangent import Point, Tangent, point, project, project_gradient, retract


@dataclass(frozen=True)
class RiemannianGD(Rule):
    """Riemannian gradient descent on the manifold of rank ``r``, with momentum.

    ``W <- H_r((1 - lr weight_decay) W - lr M)`` for ``W = scale up down``, with the projected
    gradient ``P_T(G)`` and ``M <- momentum P_T(M) + P_T(G)``; ``H_r`` is the best approximation of
    rank ``r`` :cite:p:`vandereycken2013low`. It works on the product alone, so it is invariant. The
    new ``down`` has orthonormal rows.

    Parameters
    ----------
    lr : float
        In units of the gradient with respect to ``W``.
    momentum : float
        In ``[0, 1)``. Kept as an ambient matrix of rank ``2 r`` and projected to each new tangent
        space; without it there is no state.
    weight_decay : float

    Notes
    -----
    ``O((m + n) r^2)``; state ``2 (m + n) r``.
    """

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0

    @property
    def joint(self) -> bool:
        return True

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL

    def _init(self, factors: Pair) -> State:
        if not self.momentum:
            return {}
        xp = namespace(factors.up)
        up, down = xp.zeros_like(factors.up), xp.zeros_like(factors.down)
        return {
            "left": xp.concat([up, up], axis=-1),
            "right": xp.concat([down, down], axis=-2),
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        at = point(factors)
        direction = project_gradient(at, grads, scale)
        if self.momentum:
            left, right = state["left"], state["right"]
            kept = project(at, left @ (right @ at.q_down), (adjoint(at.q_up) @ left) @ right)
            direction = Tangent(
                *(self.momentum * m + g for m, g in zip(kept, direction, strict=True))
            )
            left, right = _ambient(at, direction)
            state = {"left": left, "right": right}
        # The adapter is scale up down: a step of lr there is one of lr / scale in the product.
        step = Tangent(*(lr / scale * part for part in direction))
        return retract(at, step, 1 - lr * self.weight_decay), state


def _ambient(at: Point, x: Tangent) -> tuple[Array, Array]:
    """Factors ``(..., m, 2 r)`` and ``(..., 2 r, n)`` of a tangent vector as a matrix."""
    xp = namespace(x.core)
    return (
        xp.concat([at.q_up @ x.core + x.left, at.q_up], axis=-1),
        xp.concat([adjoint(at.q_down), x.right], axis=-2),
    )


@dataclass(frozen=True)
class LoRAPro(Rule):
    r"""LoRA-Pro :cite:p:`wang2025lorapro`: factor steps whose sum is closest to a full step.

    .. math:: \min_{h_B, h_A} \lVert s (B h_A + h_B A) - G \rVert_F

    Its minimizers all give ``P_T(G)`` and differ by ``(h_B - B X, h_A + X A)``.

    Parameters
    ----------
    lr : float
        In units of the gradient with respect to ``W``.
    moments : Moments
        Of the projected gradient as an ``m x n`` array, and so independent of the gauge. The
        moments of the authors are Adam's; with
        :class:`~lowrank_sp.updates.moments.Plain` no such array is formed.
    weight_decay : float
        On both factors.
    sylvester : bool
        Choose ``X`` so that ``(h_B, h_A)`` is nearest to the factor gradients, as the authors do.
        That choice depends on the gauge, and so does the term ``lr^2 h_B h_A`` of the step. The
        default shares the common part ``P_B G P_A`` equally, which does not.

    Notes
    -----
    ``O(m n r)`` and a state of ``2 m n`` with Adam; ``O((m + n) r^2)`` and no state without
    moments. The published code counts its steps from two; this one counts from one.
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Adam)
    weight_decay: float = 0.0
    sylvester: bool = False

    @property
    def joint(self) -> bool:
        return True

    @property
    def invariance(self) -> Gauge:
        return Gauge.UNITARY if self.sylvester else Gauge.GENERAL

    def _init(self, factors: Pair) -> State:
        if isinstance(self.moments, Plain):
            return {"step": counter(factors)}
        full = namespace(factors.up).zeros_like(factors.up[..., :1] @ factors.down[..., :1, :])
        return {"step": counter(factors), **self.moments.init(full)}

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        step = state["step"] + 1
        at = point(factors)
        direction = project_gradient(at, grads, scale)
        if not isinstance(self.moments, Plain):
            left, right = _ambient(at, direction)
            kept = {name: x for name, x in state.items() if name != "step"}
            full, state = self.moments.turn(left @ right, kept, step)
            direction = project(at, full @ at.q_down, adjoint(at.q_up) @ full)
        h = self._split(factors, at, direction, scale)
        new = Pair(
            descend(factors.up, h.up, lr, self.weight_decay),
            descend(factors.down, h.down, lr, self.weight_decay),
        )
        return new, {**state, "step": step}

    def _split(self, factors: Pair, at: Point, direction: Tangent, scale: Scalar) -> Pair:
        core, left, right = direction
        part = core if self.sylvester else core / 2
        up = times(at.q_up @ part + left, adjoint(at.of_down.inverse / scale))
        down = left_times(at.of_up.inverse / scale, part @ adjoint(at.q_down) + right)
        if not self.sylvester:
            return Pair(up, down)
        # Both steps have the common part in full: up @ shared is to be taken off.
        of_down = adjoint(at.of_down.inverse)
        shared = left_times(at.of_up.inverse / scale, times(core, of_down))
        n_up = adjoint(at.of_up.root) @ at.of_up.root
        n_down = adjoint(at.of_down.root) @ at.of_down.root
        choice = sylvester(n_up, n_down, -(down @ adjoint(factors.down)))
        return Pair(
            up - times(factors.up, shared + choice), down + left_times(choice, factors.down)
        )


def sylvester(p: Array, q: Array, c: Array) -> Array:
    """Solution of ``p x + x q = c`` for positive semidefinite ``p`` and ``q``, ``O(r^3)``.

    Two eigenvalue decompositions; the least solution where ``p`` and ``q`` are singular.
    """
    xp = namespace(c)
    (left, u), (right, v) = xp.linalg.eigh(p), xp.linalg.eigh(q)
    sums = left[..., :, None] + right[..., None, :]
    inside = adjoint(u) @ xp.astype(c, u.dtype) @ v
    # Rounding makes zero eigenvalues of p and q negative.
    least = sums.shape[-1] * eps(sums.dtype) * xp.max(sums, axis=(-2, -1), keepdims=True)
    safe = sums > least
    inside = inside / xp.where(safe, sums, xp.ones_like(sums))
    inside = xp.where(safe, inside, xp.zeros_like(inside))
    return xp.astype(u @ inside @ adjoint(v), c.dtype)


@dataclass(frozen=True)
class AdaPreLoRA(Rule):
    r"""AdaPreLoRA :cite:p:`bian2026adaprelora`: the problem of LoRA-Pro in Adafactor's metric.

    With running energies ``L`` of the rows and ``R`` of the columns of the gradient, as Adafactor
    keeps them, the steps ``h`` minimize

    .. math:: \lVert L^{1/4} \bigl( s (B h_A + h_B A) - L^{-1/2} G R^{-1/2} \bigr) R^{1/4} \rVert_F

    with the part common to both sides shared equally.

    Parameters
    ----------
    lr : float
    moments : Moments
        Of the steps ``h``.
    weight_decay : float
    beta : float
        Decay of the running energies.
    eps : float
        Floor of an energy relative to the mean one.

    Notes
    -----
    ``O((m + n) r^2)``; state ``m + n``. The published rule takes the energies of ``G`` itself, at a
    cost of ``O(m n)``; these are the energies of ``P_T(G)``, which is all that factor gradients
    tell of it.
    """

    lr: float = 1e-3
    moments: Moments = field(default_factory=Plain)
    weight_decay: float = 0.0
    beta: float = 0.999
    eps: float = 1e-6

    @property
    def joint(self) -> bool:
        return True

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL if self.moments.linear else Gauge.NONE

    def _init(self, factors: Pair) -> State:
        rows, columns = abs(0 * factors.up[..., :, 0]), abs(0 * factors.down[..., 0, :])
        return {"rows": rows, "columns": columns, **init_pair(self.moments, factors)}

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        xp = namespace(factors.up)
        rows, columns = _energies(point(factors), grads, scale)
        rows = self.beta * state["rows"] + (1 - self.beta) * rows
        columns = self.beta * state["columns"] + (1 - self.beta) * columns
        count = xp.astype(state["step"] + 1, rows.dtype)[..., None]
        seen = weight_of(self.beta, count)
        weight_up = self._floored(rows / seen)
        # Adafactor's second moment is rows columns^T / mean(rows).
        mean = xp.mean(weight_up, axis=-1, keepdims=True)
        weight_down = self._floored(columns / seen) / mean
        h = _weighted_split(factors, grads, weight_up**0.5, weight_down**0.5, scale)
        kept = {name: x for name, x in state.items() if name not in ("rows", "columns")}
        h, kept = turn_pair(self.moments, h, kept)
        new = Pair(
            descend(factors.up, h.up, lr, self.weight_decay),
            descend(factors.down, h.down, lr, self.weight_decay),
        )
        return new, {"rows": rows, "columns": columns, **kept}

    def _floored(self, energy: Array) -> Array:
        xp = namespace(energy)
        mean = xp.mean(energy, axis=-1, keepdims=True)
        return energy + xp.where(mean > 0, self.eps * mean, xp.ones_like(mean))


def _energies(at: Point, grads: Pair, scale: Scalar) -> tuple[Array, Array]:
    """Mean squares of the rows and columns of ``P_T(G)``."""
    xp = namespace(at.core)
    x = project_gradient(at, grads, scale)
    along_rows = at.q_up @ x.core + x.left
    along_columns = x.core @ adjoint(at.q_down) + x.right
    across_rows = at.q_up @ (x.right @ adjoint(x.right))
    across_columns = at.q_down @ (adjoint(x.left) @ x.left)
    rows = xp.sum(abs(along_rows) ** 2, axis=-1) + _row_products(across_rows, at.q_up)
    columns = xp.sum(abs(along_columns) ** 2, axis=-2)
    columns = columns + _row_products(across_columns, at.q_down)
    m, n = at.q_up.shape[-2], at.q_down.shape[-2]
    return rows / n, columns / m


def _row_products(x: Array, y: Array) -> Array:
    """Real parts of the inner products of the rows of ``x`` and ``y``."""
    xp = namespace(x)
    if is_complex(x.dtype):
        return xp.sum(xp.real(x * xp.conj(y)), axis=-1)
    return xp.sum(x * y, axis=-1)


def _weighted_split(factors: Pair, grads: Pair, left: Array, right: Array, scale: Scalar) -> Pair:
    """The minimizers for the metric ``left (x) right``, given as positive vectors."""
    left, right = left[..., :, None] ** 0.5, right[..., :, None] ** 0.5
    up, down = factors.up * left, adjoint(factors.down) * right
    of_up, of_down = frame(up), frame(down)
    q_up, q_down = times(up, of_up.inverse), times(down, of_down.inverse)
    g_down = times(grads.up, of_down.inverse / scale**2)
    up_g = left_times(adjoint(of_up.inverse / scale**2), grads.down)
    half = adjoint(q_up) @ (g_down / left) / 2
    return Pair(
        times((g_down / left - q_up @ half) / left, adjoint(of_down.inverse)),
        left_times(of_up.inverse, (up_g / right.mT - half @ adjoint(q_down)) / right.mT),
    )
