"""Singular triplets of a matrix in memory, all of which is seen: by LAPACK and by Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lowrank_sp._arrays import (
    Array,
    adjoint,
    eps,
    frobenius,
    inner,
    max_abs,
    namespace,
    real_dtype,
    slices,
    to_host,
)
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.basis import NOT_FINITE
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.operators import LinearOperator

# From the singular values found so far to how many are wanted, or None while that is open.
Wanted = Callable[[np.ndarray], int | None]


def with_error(f: SVD, norm: float, a: LinearOperator) -> SVD:
    """``f`` with ``||a - f||_F``, unless the ``norm`` of ``a`` is not known.

    From the difference of squared norms where that has digits. Otherwise from ``a - f`` itself if
    ``a`` is in memory, and if not, the most that it can be.
    """
    if math.isnan(norm) or norm == 0.0:
        return f if norm else replace(f, error=0.0)
    s = to_host(f.s).astype(np.float64) / norm
    tail, rounding = max(0.0, 1.0 - float(s @ s)), 20 * eps(f.s.dtype) * float(np.sum(s))
    if tail > 50 * rounding:
        return replace(f, error=norm * math.sqrt(tail))
    if not fits(a):
        return replace(f, error=norm * math.sqrt(tail + rounding))
    dense = a.to_dense()
    left, right = f.factors()
    parts = (frobenius(dense[rows, :] - left[rows, :] @ right) for rows in slices(a.shape[0], 512))
    return replace(f, error=math.hypot(*parts))


def fits(a: LinearOperator) -> bool:
    """Whether ``a`` is an array in memory, or small enough to become one."""
    return a.in_memory or a.shape[0] * a.shape[1] <= 2**20


def finite(dense: Array) -> Array:
    """``dense``, or an error where it holds NaN or infinity."""
    if not math.isfinite(max_abs(dense)):
        raise ValueError(NOT_FINITE)
    return dense


def lapack_svd(dense: Array) -> SVD:
    """All triplets of a matrix or a stack of them, by the library's own SVD."""
    xp = namespace(dense)
    u, s, vh = xp.linalg.svd(finite(dense), full_matrices=False)
    largest = s[..., :1] if s.shape[-1] else s
    bounds = xp.zeros_like(s) + max(dense.shape[-2:]) * eps(dense.dtype) * largest
    return SVD.canonical(u, s, vh, bounds, 0.0 if s.ndim == 1 else None)


def gram_svd(
    a: LinearOperator,
    wanted: Wanted,
    index: slice | None,
    tol: float,
) -> SVD | None:
    """Triplets from the eigenvectors of ``A^H A``, or None where their bounds miss ``tol``.

    In float64 throughout, for ``A v`` of a small singular value is small. ``index`` selects
    eigenvectors by position, in ascending order, where that is known beforehand.
    """
    dense = finite(a.to_dense())
    xp = namespace(dense)
    if eps(dense.dtype) == eps(np.float64) and not 1e-100 < max_abs(dense) < 1e100:
        return None
    gram = inner(dense, dense)
    norm = max(0.0, complex(xp.linalg.trace(gram)).real) ** 0.5
    rounding = 5 * eps(dense.dtype) * norm
    # LAPACK leaves eigenvectors of clustered values orthogonal to some hundred eps only.
    v, _ = orthonormalize(_eigenvectors(gram, wanted, index))
    q, r = xp.linalg.qr(inner(adjoint(dense), v))
    left, s, right = xp.linalg.svd(r, full_matrices=False)
    u, vh = q @ left, right @ adjoint(v)
    residual = inner(dense, u) - adjoint(vh) * xp.astype(s, u.dtype)
    bounds = xp.linalg.vector_norm(residual, axis=0) + rounding
    if float(xp.max(bounds)) > max(tol * float(s[-1]), 2 * rounding):
        return None
    real = real_dtype(xp, dense.dtype)
    u, vh = xp.astype(u, dense.dtype), xp.astype(vh, dense.dtype)
    f = SVD.canonical(u, xp.astype(s, real), vh, xp.astype(bounds, real))
    return with_error(f, norm, a)


def _eigenvectors(gram: Array, wanted: Wanted, index: slice | None) -> Array:
    xp = namespace(gram)
    if index is not None and isinstance(gram, np.ndarray):
        from scipy.linalg import eigh

        _, vectors = eigh(
            adjoint(gram),  # the same matrix, in the order in which LAPACK can overwrite it
            subset_by_index=[index.start, index.stop - 1],
            overwrite_a=True,
            check_finite=False,
        )
        return vectors[:, ::-1]
    values, vectors = xp.linalg.eigh(gram)
    if index is None:
        theta = np.sqrt(np.maximum(to_host(values)[::-1], 0.0))
        k = wanted(theta) or len(theta)
        index = slice(len(theta) - k, len(theta))
    return xp.flip(vectors[:, index], axis=1)
