"""Leading subspace of the fibres of a mode: the truncated SVD that every decomposition is made of.

The left singular vectors of an unfolding are wanted, and its singular values as far as they tell
what is lost; its right ones, as long as the tensor, are not. There are three routes: eigenvectors
of the Gram matrix of the mode in float64, while what it squares away lies below what truncation
loses; else the triangular factor of the fibres, both by blocks; and for long modes and small ranks
the certified SVD of the unfolding.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    eps,
    frobenius,
    from_host,
    inner,
    namespace,
    to_host,
)
from lowrank_sp.factors import rank_for_tol
from lowrank_sp.gauge import positive_columns
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.tensors.modes import around, fibre_blocks, mode_gram, unfold


def leading_subspace(
    x: Array,
    mode: int,
    *,
    rank: int | None,
    allowed: float = 0.0,
    rng: RNG = None,
) -> tuple[Array, float]:
    """Orthonormal ``u`` that keeps most of ``X_(mode)``, and what it loses.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        Finite, in its compute dtype.
    mode : int
    rank : int or None
        Columns of ``u``. With None, as few as lose at most ``allowed``.
    allowed : float
        Absolute, in the Frobenius norm.
    rng : int, Generator or None
        For the route by Krylov spaces.

    Returns
    -------
    array, shape (n_mode, k)
        Sorted by singular values, signs fixed.
    float
        ``||X_(mode) - u u^H X_(mode)||_F``, not from a difference of squares that cancels.
    """
    leading, n, trailing = around(x.shape, mode)
    if rank is not None and rank > leading * trailing:
        u, _ = leading_subspace(x, mode, rank=leading * trailing, rng=rng)
        return complete(u, rank), 0.0
    wide = n < leading * trailing
    if gram_is_cheap(x, mode, rank):
        found = _by_gram(x, mode, rank, allowed)
        if found or wide:
            return found or _by_triangle(x, mode, rank, allowed)
    matrix = _unfolding(x, mode)
    size = frobenius(matrix)
    if rank is not None:
        f = truncated_svd(matrix, rank, rng=rng)
        kept = float(f.norm())
        squares = (size - kept) * (size + kept)
        # A difference that has digits to lose is enough.
        return f.u, math.sqrt(squares) if squares > 1e-6 * size**2 else lost(x, mode, f.u)
    tol = allowed / size if size else 1.0
    if tol >= 1.0:
        return leading_subspace(x, mode, rank=1, rng=rng)
    if 0 < tol < 4 * eps(x.dtype) ** 0.5 and wide:
        return _by_triangle(x, mode, rank, allowed)
    f = truncated_svd(matrix, tol=tol or None, rng=rng)
    return f.u, float(f.error)


def gram_is_cheap(x: Array, mode: int, rank: int | None) -> bool:
    """Whether the shorter side is below the length at which a Krylov space is cheaper than the Gram
    matrix (docs/which-svd.md).
    """  # noqa: D205
    leading, n, trailing = around(x.shape, mode)
    return min(n, leading * trailing) <= (512 if rank is None else 168 + 14 * rank)


def improved(x: Array, u: Array) -> Array:
    """Orthonormal ``u'`` that keeps more of a stack of matrices ``x (L, m, c)`` than ``u (m, k)``.

    The leading Ritz vectors of ``G = sum_l x_l x_l^H`` in the span of ``u`` and ``G u``, which
    holds ``u``, so that nothing is lost. Four products of ``x`` with ``k`` columns.
    """
    xp = namespace(x, u)
    z = xp.sum(x @ (adjoint(x) @ u), axis=0)
    q, _ = xp.linalg.qr(xp.concat([u, z - u @ (adjoint(u) @ z)], axis=1))
    tall = xp.reshape(adjoint(x) @ q, (-1, q.shape[1]))
    _, vectors = xp.linalg.eigh(inner(tall, tall))
    u = q @ xp.astype(xp.flip(vectors, axis=1)[:, : u.shape[1]], x.dtype)
    return positive_columns(u)


def lost(x: Array, mode: int, u: Array) -> float:
    """``||X_(mode) - u u^H X_(mode)||_F``: one read of ``x``, of which only blocks are copied."""
    squares = 0.0
    for rows in fibre_blocks(x, mode):
        residual = rows - (rows @ namespace(u).conj(u)) @ u.mT
        squares = math.hypot(squares, frobenius(residual))
    return squares


def _by_gram(x: Array, mode: int, rank: int | None, allowed: float) -> tuple[Array, float] | None:
    """By the Gram matrix of the shorter side, or None where squaring hides what is asked for."""
    xp = namespace(x)
    leading, n, trailing = around(x.shape, mode)
    tall = _unfolding(x, mode) if n > leading * trailing else None
    gram = mode_gram(x, mode) if tall is None else inner(tall, tall)
    n = gram.shape[0]
    values, vectors = xp.linalg.eigh(gram)
    energy = np.maximum(to_host(values)[::-1].astype(np.float64), 0.0)
    tails = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    # The Gram matrix is known to this, and by its k leading eigenvectors 2 k times this is lost.
    hidden = 4 * eps(gram.dtype) * float(energy[0])
    excess = 2 * hidden * np.arange(1, n + 2)
    k = rank or max(1, int(np.sum(tails + excess > allowed**2)))
    if rank is None and (k >= n or allowed**2 <= 50 * excess[k]):
        return None
    u = xp.astype(xp.flip(vectors, axis=1)[:, :k], x.dtype)
    u = u if tall is None else xp.linalg.qr(tall @ u)[0]
    u = positive_columns(u)
    if k == n:
        return u, 0.0
    rounding = 10 * eps(x.dtype) * math.sqrt(k * tails[0])
    sure = tails[k] > max(50 * excess[k], 100 * rounding**2)
    if sure and tails[k] > 1e-8 * tails[0]:
        return u, math.sqrt(tails[k])
    # Where little is lost, it is measured.
    loss = lost(x, mode, u)
    return (u, loss) if sure or loss <= max(allowed, rounding) else None


def _by_triangle(x: Array, mode: int, rank: int | None, allowed: float) -> tuple[Array, float]:
    """By the triangular factor of the fibres, block by block: accurate to ``eps sigma_1``."""
    xp = namespace(x)
    n = x.shape[mode]
    triangle = reduce(
        lambda r, rows: xp.linalg.qr(xp.concat([r, rows], axis=0))[1],
        fibre_blocks(x, mode),
        from_host(np.zeros((0, n)), x, x.dtype),
    )
    u, s, _ = xp.linalg.svd(triangle.mT, full_matrices=False)
    u = positive_columns(u)
    sigma = to_host(s).astype(np.float64)
    size = float(np.linalg.norm(sigma))
    k = rank or rank_within(sigma, allowed / size if size else 1.0)
    return u[:, :k], float(np.linalg.norm(sigma[k:]))


def rank_within(sigma: np.ndarray, tol: float) -> int:
    """Smallest rank that loses at most ``tol`` of all, where ``tol`` may be 0 or 1 and more."""
    if tol >= 1.0:
        return 1
    return rank_for_tol(sigma, tol) if tol > 0.0 else len(sigma)


def _unfolding(x: Array, mode: int) -> Array:
    """The unfolding in any order of its columns: a view for the first and the last mode."""
    leading, n, trailing = around(x.shape, mode)
    xp = namespace(x)
    return xp.reshape(x, (leading, n)).mT if trailing == 1 else unfold(x, mode)


def complete(u: Array, columns: int) -> Array:
    """``u`` with further orthonormal columns up to ``columns`` of them."""
    xp = namespace(u)
    n, k = u.shape
    if columns <= k:
        return u
    q, _ = xp.linalg.qr(xp.concat([u, xp.eye(n, dtype=u.dtype, device=device(u))], axis=1))
    return xp.concat([u, q[:, k:columns]], axis=1)
