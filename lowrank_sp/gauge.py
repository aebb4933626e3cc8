"""Gauge maps: changes of a factor pair that keep its product.

``left @ right`` equals ``(left @ g) @ (inv(g) @ right)`` for every invertible ``g``. The maps here
choose one representative: signs, equal Grams on both sides, closeness to a reference.

Fixing signs settles simple singular values only. Where singular values coincide the vectors may
rotate among themselves, so compare products, spectra and projectors, never raw vectors; and do not
differentiate through a canonical gauge.
"""

from __future__ import annotations

from lowrank_sp._arrays import Array, adjoint, eps, is_complex, namespace


def fix_signs(u: Array, vh: Array) -> tuple[Array, Array]:
    """Make the largest entry of every column of ``u`` positive, keeping ``u @ diag @ vh``.

    Parameters
    ----------
    u : array, shape (..., m, k)
    vh : array, shape (..., k, n)

    Returns
    -------
    (array, array)
        ``u * conj(p)`` and ``p[:, None] * vh`` with unit phases ``p`` (signs, for real data).
        Of entries that tie for the largest magnitude up to ``sqrt(eps)`` the first one counts, so
        that rounding does not decide.

    Examples
    --------
    >>> import numpy as np
    >>> u, vh = fix_signs(np.array([[-1.0], [0.0]]), np.array([[1.0, 2.0]]))
    >>> u[:, 0], vh[0]
    (array([ 1., -0.]), array([-1., -2.]))
    """
    phase = _phases(u)
    return u * namespace(u).conj(phase), phase.mT * vh


def positive_columns(u: Array) -> Array:
    """``u`` with the largest entry of every column positive, as :func:`fix_signs` makes it.

    Parameters
    ----------
    u : array, shape (..., m, k)
    """
    return u * namespace(u).conj(_phases(u))


def _phases(u: Array) -> Array:
    """Phases ``(..., 1, k)`` of the largest entries of all columns; signs, for real data."""
    xp = namespace(u)
    if 0 in u.shape[-2:]:
        return xp.ones_like(xp.sum(u, axis=-2, keepdims=True))
    size = abs(u)
    largest = xp.max(size, axis=-2, keepdims=True)
    tied = xp.astype(size >= (1 - 4 * eps(u.dtype) ** 0.5) * largest, xp.int8)
    entry = xp.take_along_axis(u, xp.argmax(tied, axis=-2, keepdims=True), axis=-2)
    one = xp.ones_like(entry)
    if is_complex(u.dtype):
        some = largest > 0
        return xp.where(some, entry / xp.where(some, xp.astype(abs(entry), u.dtype), one), one)
    return xp.where(entry < 0, -one, one)


def balance(left: Array, right: Array) -> tuple[Array, Array]:
    """Factors of the same product with ``left^H left = right right^H``, diagonal and sorted.

    The balanced pair minimizes ``||left||_F^2 + ||right||_F^2`` over all gauges; the minimum is
    twice the nuclear norm of the product. Two thin QRs and an ``r x r`` SVD, so the condition
    number is not squared; ``O((m + n) r^2)``.

    Parameters
    ----------
    left : array, shape (..., m, r)
    right : array, shape (..., r, n)

    Returns
    -------
    (array, array)
        Of the same shapes, provided ``r <= min(m, n)``; otherwise of rank ``min(m, n)``.
    """
    u, s, vh = thin_svd(left, right)
    root = namespace(s).astype(s**0.5, u.dtype)
    return u * root[..., None, :], root[..., :, None] * vh


def thin_svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """SVD of ``left @ right`` from thin QRs of both factors; the product is never formed.

    Returns ``u (..., m, k), s (..., k), vh (..., k, n)`` with ``k = min(m, n, r)`` and fixed signs.
    """
    xp = namespace(left, right)
    q_left, r_left = xp.linalg.qr(left)
    q_right, r_right = xp.linalg.qr(adjoint(right))
    u, s, vh = xp.linalg.svd(r_left @ adjoint(r_right), full_matrices=False)
    u, vh = fix_signs(q_left @ u, vh @ adjoint(q_right))
    return u, s, vh


def align(left: Array, right: Array, reference: Array) -> tuple[Array, Array]:
    """Rotate a factor pair so that ``left`` comes closest to ``reference``, keeping the product.

    The unitary ``q = argmin ||left q - reference||_F`` is the polar factor of
    ``left^H reference`` (orthogonal Procrustes).

    Parameters
    ----------
    left, reference : array, shape (..., m, r)
    right : array, shape (..., r, n)

    Returns
    -------
    (array, array)
        ``left @ q`` and ``q^H @ right``.
    """
    xp = namespace(left, right, reference)
    u, _, vh = xp.linalg.svd(adjoint(left) @ reference, full_matrices=False)
    q = u @ vh
    return left @ q, adjoint(q) @ right


def geometric_mean(p: Array, q: Array) -> Array:
    """Geometric mean ``p # q`` of Hermitian positive definite matrices ``(..., r, r)``.

    ``p # q = p^(1/2) (p^(-1/2) q p^(-1/2))^(1/2) p^(1/2)`` is the one positive definite solution
    ``x`` of ``x inv(p) x = q``.
    """
    root, inverse_root = _roots(p)
    middle, _ = _roots(inverse_root @ q @ inverse_root)
    return root @ middle @ root


def _roots(p: Array) -> tuple[Array, Array]:
    xp = namespace(p)
    values, vectors = xp.linalg.eigh((p + adjoint(p)) / 2)
    root = xp.astype(values**0.5, vectors.dtype)[..., None, :]
    return (vectors * root) @ adjoint(vectors), (vectors / root) @ adjoint(vectors)
