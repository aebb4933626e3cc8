"""Merging in subspaces that the updates share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, eps, namespace
from lowrank_sp.adapters.algebra.blocks import rows_of
from lowrank_sp.adapters.algebra.merge.exact import Merged
from lowrank_sp.adapters.algebra.merge.rules import EntryRule
from lowrank_sp.adapters.algebra.sums import Update, checked, resize, weighted_sum
from lowrank_sp.factors import LowRank, check_rank


def knots(
    deltas: Sequence[Update],
    weights: Sequence[float] | None = None,
    *,
    rule: EntryRule,
    rank: int | None = None,
    tol: float | None = None,
    rng: RNG = None,
) -> Merged:
    r"""Merge the coordinates of the updates in the basis of their common column space.

    .. math:: [\Delta_1 \dots \Delta_T] = U \Sigma\, [V_1^H \dots V_T^H], \qquad
              X = U\, \mathrm{rule}(\Sigma V_1^H, \dots, \Sigma V_T^H)

    Parameters
    ----------
    deltas, weights, rule
        As in :func:`~lowrank_sp.adapters.algebra.merge.entrywise.entrywise`.
    rank, tol
        As in :func:`~lowrank_sp.adapters.algebra.sums.resize`; by default all directions that
        there are, at most ``sum r_i``.
    rng : int, Generator or None
        Seed of the random entries.

    Notes
    -----
    The ``m x Tn`` matrix is not formed: a QR factorization of the left factors side by side and one
    of every right factor leave an SVD of size ``R = sum r_i``, ``O((m + n) R^2)`` flops. The
    coordinates are ``T`` matrices of ``R x n``, merged block by block; directions at the level of
    rounding are dropped :cite:p:`stoica2025knots`.
    """
    pairs, weights = checked(deltas, weights)
    m, n = pairs[0].shape
    if rank is not None:
        rank = check_rank(rank, min(m, n, sum(delta.rank for delta in pairs)), (m, n))
    xp = namespace(pairs[0].left)
    q, r = xp.linalg.qr(xp.concat([delta.left for delta in pairs], axis=1))
    ends = np.cumsum([0, *(delta.rank for delta in pairs)])
    parts = [r[:, int(start) : int(stop)] for start, stop in pairwise(ends)]
    cores = [
        part @ adjoint(xp.linalg.qr(adjoint(delta.right))[1])
        for part, delta in zip(parts, pairs, strict=True)
    ]
    u, s, _ = xp.linalg.svd(xp.concat(cores, axis=1), full_matrices=False)
    u = u[:, : _resolved(s)]
    reads = [
        rows_of(LowRank(adjoint(u) @ part, delta.right))
        for part, delta in zip(parts, pairs, strict=True)
    ]
    generator = np.random.default_rng(rng)
    merged = rule.rows(reads, weights, (u.shape[1], n), like=u[:0, :0], rng=generator).to_dense()
    rank = None if rank is None else min(rank, u.shape[1])
    f = resize(LowRank(q @ u, merged), rank=rank, tol=tol)
    exact = rule.reference(pairs, weights)
    return Merged(f, exact, (f - exact).norm(), f.error)


def tsv(
    deltas: Sequence[Update], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> Merged:
    r"""Merge singular vectors after making those of different updates orthogonal.

    .. math:: X = \hat U \,\mathrm{diag}(w_1 \sigma_1, \dots, w_T \sigma_T)\, \hat V^H, \qquad
              \hat U = \operatorname*{argmin}_{Q^H Q = I}
              \lVert Q - [U_1 \dots U_T] \rVert_F

    and :math:`\hat V` alike, for the leading triplets of every update. Orthogonal Procrustes
    problems, solved by polar factors :cite:p:`gargiulo2025tsv`.

    Parameters
    ----------
    deltas, weights
        As in :func:`~lowrank_sp.adapters.algebra.merge.exact.cat`.
    rank : int, optional
        In ``T..min(m, n)``, shared evenly: ``rank // T`` triplets of each of ``T`` updates. By
        default all of them, which must be no more than ``min(m, n)``.

    Returns
    -------
    Merged
        Its error is what orthogonalizing and leaving out triplets made; ``truncation`` is zero.

    Notes
    -----
    Where the vectors are dependent, as of equal updates, the polar factor is a partial isometry,
    which is unique; one that completes it to orthonormal columns is not. Triplets at the level of
    rounding, as of an update that is zero, are left out. ``O((m + n) R^2)`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.eye(4, 2), np.eye(2, 3)
    >>> one, two = LowRank(3 * up[:, :1], down[:1]), LowRank(up[:, 1:], down[1:])
    >>> merged = tsv([one, two])  # orthogonal already
    >>> merged.error, merged.value.rank
    (0.0, 2)
    """
    pairs, weights = checked(deltas, weights)
    m, n = pairs[0].shape
    each = max(delta.rank for delta in pairs)
    if rank is not None:
        each = check_rank(rank, min(m, n), (m, n)) // len(pairs)
        if each == 0:
            raise ValueError(
                f"rank must be at least the number of updates, {len(pairs)}, got {rank}"
            )
    exact = weighted_sum(pairs, weights)
    found = [
        (f.truncate(min(each, _resolved(f.s))), w)
        for f, w in zip([delta.svd() for delta in pairs], weights, strict=True)
        if float(f.s[0]) > 0.0
    ]
    if not found:
        return Merged(exact, exact, 0.0, 0.0)
    count = sum(f.rank for f, _ in found)
    if count > min(m, n):
        raise ValueError(
            f"at most {min(m, n)} singular vectors can be orthogonal in shape {m} x {n}, got "
            f"{count}; pass a rank"
        )
    xp = namespace(pairs[0].left)
    u = _polar(xp.concat([f.u for f, _ in found], axis=1))
    v = _polar(xp.concat([adjoint(f.vh) for f, _ in found], axis=1))
    s = xp.concat([f.s * w for f, w in found])
    value = LowRank(u * xp.astype(s, u.dtype), adjoint(v))
    return Merged(value, exact, (value - exact).norm(), 0.0)


def _polar(x: Array) -> Array:
    """Closest partial isometry with the null space of ``x``: orthonormal columns if it has none."""
    xp = namespace(x)
    q, r = xp.linalg.qr(x)
    left, s, right = xp.linalg.svd(r, full_matrices=False)
    k = _resolved(s)
    return (q @ left[:, :k]) @ right[:k, :]


def _resolved(s: Array) -> int:
    """How many singular values of a small matrix are above rounding; at least 1."""
    xp = namespace(s)
    noise = 8 * s.shape[0] * eps(s.dtype) * float(s[0])
    return max(1, int(xp.sum(xp.astype(s > noise, xp.int32))))
