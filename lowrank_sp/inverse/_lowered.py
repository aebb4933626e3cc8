"""Singular values lowered by a constant: the proximal map of the nuclear norm, warm-started."""

from __future__ import annotations

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, max_abs, namespace, standard_normal
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.orth import orthonormalize

# Reads in a search for singular values beyond a level, which starts near them.
_MOST_READS = 20


def lowered_svd(a: Array, level: float, vh: Array, rng: RNG) -> SVD:
    """Singular values of ``a`` beyond ``level``, lowered by it; there may be none.

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
