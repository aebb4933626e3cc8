"""Singular values lowered by a constant: the proximal map of the nuclear norm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, max_abs, namespace, standard_normal
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.krylov import block_krylov
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.operators import LinearOperator

# Reads in a search for singular values beyond a level, which starts near them.
_MOST_READS = 20
# Random columns beside those of a matrix nearby.
_GUARDS = 2


def lowered(f: SVD, level: float) -> SVD:
    """``f`` with lower singular values, without those that become zero; one remains."""
    xp = namespace(f.s)
    s = f.s - level
    count = max(1, int(xp.sum(xp.astype(s > 0, xp.int32))))
    s = xp.where(s > 0, s, xp.zeros_like(s))[:count]
    return SVD(f.u[:, :count], s, f.vh[:count, :])


def soft_threshold(a: LinearOperator, level: float, *, most: int, tol: float, rng: RNG) -> SVD:
    """Singular values of an operator beyond ``level``, lowered by it; at least one, maybe zero.

    There are up to ``most`` of them, found to a relative residual of ``tol``.
    """

    def wanted(theta: np.ndarray) -> int | None:
        count = int(np.sum(theta > level))
        # Whether there are more is known once one of those found is not beyond.
        return None if count == len(theta) < most else max(1, min(count, most))

    return lowered(leading(a, wanted, tol=tol, rng=rng), level)


def leading(
    a: LinearOperator,
    wanted: Callable[[np.ndarray], int | None],
    *,
    tol: float,
    rng: RNG,
    near: SVD | None = None,
    max_columns: int | None = None,
) -> SVD:
    """:func:`~lowrank_sp.linalg.krylov.block_krylov` on the shorter side of an operator.

    It starts from the singular vectors of ``near``, a matrix nearby.
    """
    tall = a.shape[0] >= a.shape[1]
    start = None if near is None else adjoint(near.vh) if tall else near.u
    found = block_krylov(
        a if tall else a.mH,
        wanted,
        tol=tol,
        rng=np.random.default_rng(rng),
        init=start,
        width=None if start is None else start.shape[1] + _GUARDS,
        max_columns=max_columns,
    )
    return found.svd if tall else found.svd.mH


def lowered_svd(a: Array, level: float, vh: Array, rng: RNG) -> SVD:
    """Singular values of an array beyond ``level``, lowered by it; there may be none.

    Subspace iteration from the rows of ``vh``, which should be near, and random columns. It ends
    once the residual of every triplet is a hundredth of the level.
    """
    xp = namespace(a)
    generator = np.random.default_rng(rng)

    def widened(v: Array) -> Array:
        more = min(*a.shape, v.shape[1] + 5 + v.shape[1] // 4) - v.shape[1]
        draws = standard_normal((a.shape[1], more), like=a, rng=generator)
        return orthonormalize(xp.concat([v, draws], axis=1))[0]

    v = widened(adjoint(vh))
    y, reads = a @ v, 0
    while True:
        q, _ = orthonormalize(y)
        if q.shape[1] == 0:
            return SVD(q, xp.abs(q[0, :]), adjoint(v)[:0, :])
        small, s, vh = xp.linalg.svd(adjoint(q) @ a, full_matrices=False)
        beyond = int(xp.sum(xp.astype(s > level, xp.int32)))
        if beyond == v.shape[1] < min(a.shape):
            v = widened(adjoint(vh))
            y = a @ v
            continue
        u, v, reads = q @ small, adjoint(vh), reads + 1
        y = a @ v
        rest = y[:, :beyond] - u[:, :beyond] * xp.astype(s[:beyond], u.dtype)
        if max_abs(rest) <= 0.01 * level or reads >= _MOST_READS:
            break
    return SVD.canonical(u[:, :beyond], s[:beyond] - level, vh[:beyond, :])
