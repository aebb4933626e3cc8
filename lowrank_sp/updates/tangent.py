"""The tangent space of fixed rank at ``up @ down``, from factor gradients alone."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_sp._arrays import Array, adjoint, device, eps, namespace
from lowrank_sp.updates.frames import Frame, frame, frames, left_times, times
from lowrank_sp.updates.rule import Pair, Scalar


class Point(NamedTuple):
    """``W = up @ down = q_up core q_down^H`` with orthonormal ``q_up``, ``q_down``."""

    q_up: Array
    core: Array
    q_down: Array
    of_up: Frame
    of_down: Frame


class Tangent(NamedTuple):
    """``q_up core q_down^H + left q_down^H + q_up right``.

    ``left`` is orthogonal to ``q_up`` and ``right`` to ``q_down^H``: three orthogonal parts.
    """

    core: Array
    left: Array
    right: Array

    @classmethod
    def of(cls, u: Array, vh: Array, zv: Array, zu: Array) -> Tangent:
        """Projection of a matrix ``z``, from ``zv = z vh^H`` and ``zu = u^H z``.

        It is ``u zu + zv vh - u (u^H zv) vh``, for orthonormal bases ``u`` and ``vh``.
        """
        core = adjoint(u) @ zv
        return cls(core, zv - u @ core, zu - core @ vh)

    def norm(self) -> Array:
        """Frobenius norm, of shape ``(...)``."""
        xp = namespace(self.core)
        squares = (xp.sum(abs(part) ** 2, axis=(-2, -1)) for part in self)
        return sum(squares) ** 0.5


def point(factors: Pair) -> Point:
    """Orthonormal bases of the columns of ``up`` and the rows of ``down``."""
    xp = namespace(factors.up)
    of_up, of_down = frames(factors)
    core = xp.astype(of_up.root @ adjoint(of_down.root), factors.up.dtype)
    q_down = times(adjoint(factors.down), of_down.inverse)
    return Point(times(factors.up, of_up.inverse), core, q_down, of_up, of_down)


def project(at: Point, g_down: Array, up_g: Array) -> Tangent:
    """Projection ``P_B G + G P_A - P_B G P_A`` from ``G q_down`` and ``q_up^H G``."""
    return Tangent.of(at.q_up, adjoint(at.q_down), g_down, up_g)


def project_gradient(at: Point, grads: Pair, scale: Scalar) -> Tangent:
    """Projection of the gradient with respect to ``W`` of which factor gradients are at hand."""
    g_down = times(grads.up, at.of_down.inverse / scale)
    up_g = left_times(adjoint(at.of_up.inverse / scale), grads.down)
    return project(at, g_down, up_g)


def retract(at: Point, step: Tangent, keep: Scalar = 1.0) -> Pair:
    """Best approximation of rank ``r`` of ``keep W - step``, from a core of order ``2 r``.

    ``O((m + n) r^2)``. The new ``down`` has orthonormal rows. Where the result has a smaller rank,
    columns of the new ``up`` are zero and rows of the old ``down`` are kept in their places, so
    that later steps can raise the rank again.
    """
    xp = namespace(at.core)
    of_left, of_right = frame(step.left), frame(adjoint(step.right))
    core = keep * at.core - step.core
    # Decides only between directions that the result does not have, in favour of the old rows.
    size = Tangent(core, step.left, step.right).norm()[..., None, None]
    size = xp.where(size > 0, size, xp.ones_like(size))
    old = xp.eye(core.shape[-1], dtype=core.dtype, device=device(core))
    core = core + eps(core.dtype) * size * old
    beside = xp.astype(adjoint(of_right.root), core.dtype)
    below = xp.astype(of_left.root, core.dtype)
    rows = [xp.concat([core, -beside], axis=-1)]
    rows.append(xp.concat([-below, xp.zeros_like(core)], axis=-1))
    u, s, vh = xp.linalg.svd(xp.concat(rows, axis=-2), full_matrices=False)
    r = core.shape[-1]
    u = u[..., :, :r] * s[..., None, :r]
    beyond_up = of_left.inverse @ xp.astype(u[..., r:, :], of_left.inverse.dtype)
    beyond_down = xp.astype(vh[..., :r, r:], of_right.inverse.dtype) @ adjoint(of_right.inverse)
    return Pair(
        at.q_up @ u[..., :r, :] + times(step.left, beyond_up),
        vh[..., :r, :r] @ adjoint(at.q_down) + left_times(beyond_down, step.right),
    )
