"""The tangent space of the matrices of rank ``r``: project onto it, move in it, retract from it.

At ``u diag(s) vh`` it consists of ``u core vh + left vh + u right`` with ``u^H left = 0`` and
``right vh^H = 0``: three orthogonal parts, of ``r (m + n - r)`` dimensions together.
"""

from __future__ import annotations

from typing import NamedTuple

from lowrank_sp._arrays import Array, adjoint, device, is_complex, namespace
from lowrank_sp.factors import SVD, LowRank
from lowrank_sp.operators import LinearOperator
from lowrank_sp.updates.tangent import Tangent


class Space(NamedTuple):
    """A tangent space, by orthonormal bases ``u (m, r)`` and ``vh (r, n)`` of its point."""

    u: Array
    vh: Array

    def project(self, z: LinearOperator) -> Tangent:
        """The tangent nearest to ``z``: two products with it, and ``2 (m + n) r^2`` flops more.

        Projecting the :meth:`matrix` of a tangent at another point transports it here.
        """
        zv, zu = z.matmul(adjoint(self.vh)), adjoint(z.rmatmul(self.u))
        return Tangent.of(self.u, self.vh, zv, zu)

    def matrix(self, x: Tangent) -> LowRank:
        """A tangent as a matrix of rank ``2 r``."""
        xp = namespace(self.u)
        left = xp.concat([self.u @ x.core + x.left, self.u], axis=1)
        return LowRank(left, xp.concat([self.vh, x.right], axis=0))

    def retract(self, s: Array, x: Tangent, rank: int | None = None) -> SVD:
        """The matrix of rank ``rank``, by default ``r``, nearest to ``u diag(s) vh + x``.

        Two QRs of ``r`` columns and an SVD of order ``2 r``; signs are not fixed.
        """
        xp = namespace(self.u)
        q, lower = xp.linalg.qr(x.left)
        p, upper = xp.linalg.qr(adjoint(x.right))
        core = x.core + _diagonal(s, x.core)
        rows = [
            xp.concat([core, adjoint(upper)], axis=1),
            xp.concat([lower, xp.zeros_like(core)], axis=1),
        ]
        left, sizes, right = xp.linalg.svd(xp.concat(rows, axis=0), full_matrices=False)
        k = s.shape[0] if rank is None else rank
        u = xp.concat([self.u, q], axis=1) @ left[:, :k]
        vh = right[:k, :] @ xp.concat([self.vh, adjoint(p)], axis=0)
        return SVD(u, sizes[:k], vh)


def inner(x: tuple[Array, ...], y: tuple[Array, ...]) -> float:
    """Real inner product of two tangents, or of other tuples of arrays."""
    total = 0.0
    for a, b in zip(x, y, strict=True):
        xp = namespace(a)
        total += float(xp.sum(xp.real(xp.conj(a) * b) if is_complex(a.dtype) else a * b))
    return total


def added(step: float, x: Tangent, to: Tangent | None = None) -> Tangent:
    """``step * x``, plus ``to`` where it is given."""
    if to is None:
        return Tangent(*(step * a for a in x))
    return Tangent(*(step * a + b for a, b in zip(x, to, strict=True)))


def _diagonal(s: Array, like: Array) -> Array:
    xp = namespace(like)
    return xp.eye(s.shape[0], dtype=like.dtype, device=device(like)) * xp.astype(s, like.dtype)
