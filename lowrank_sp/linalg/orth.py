"""Orthonormal bases of tall blocks by Cholesky QR: matrix products and a small Gram matrix."""

from __future__ import annotations

import numpy as np

from lowrank_sp._arrays import Array, eps, from_host, inner, to_host

# Well-conditioned blocks need two passes, shifted ones three or four.
_MOST_PASSES = 6


def orthonormalize(x: Array, *, floor: float = 0.0) -> tuple[Array, Array]:
    """Orthonormal basis of the range of a tall block: ``x = q @ r``.

    Cholesky QR, with the Gram matrix and its factor in float64, is repeated until the Gram matrix
    of the result is the identity to rounding. Where the Gram matrix is too close to singular for a
    Cholesky factor it is shifted, which costs a third pass. The numerical null space is dropped.

    Parameters
    ----------
    x : array, shape (m, k), with k <= m
    floor : float
        Directions of ``x`` no longer than this are noise, and dropped as well.

    Returns
    -------
    q : array, shape (m, p)
        ``p <= k`` orthonormal columns, to a small multiple of eps.
    r : array, shape (p, k)

    Notes
    -----
    A pass costs ``4 m k^2`` flops and two reads of ``x``. In single precision the wide Gram matrix
    resolves every condition number up to ``1 / eps``; in double precision the shift does
    :cite:p:`fukaya2020shifted`.

    Examples
    --------
    >>> import numpy as np
    >>> q, r = orthonormalize(np.array([[3.0, 3.0], [4.0, 4.0], [0.0, 0.0]]))
    >>> q.shape, np.allclose(q @ r, [[3, 3], [4, 4], [0, 0]])
    ((3, 1), True)
    """
    m, k = x.shape
    if k > m:
        raise ValueError(f"a block must have no more columns than rows, got shape {m} x {k}")
    rounding = (8 + m**0.5 / 8) * eps(x.dtype)
    gram = _gram(x)
    defect = _defect(gram)
    if defect < rounding and floor <= 0.5:
        return x, from_host(np.eye(k), x, x.dtype)
    r = np.eye(k, dtype=gram.dtype)
    doubtful = floor > 0.0
    for _ in range(_MOST_PASSES):
        if defect < 0.01:
            # The symmetric step (I + E)^(-1/2) = I - E/2 + ... for a Gram matrix I + E.
            inverse = 1.5 * np.eye(len(gram)) - 0.5 * gram
            step, shifted = np.linalg.inv(inverse), False
        else:
            step, inverse, shifted = _cholesky(gram, m)
        doubtful = doubtful or shifted
        x, r = _times(x, inverse), step @ r
        if defect * defect < rounding:
            break
        gram = _gram(x)
        defect = _defect(gram)
        if defect < rounding:
            break
    if doubtful:
        left, sizes, right = np.linalg.svd(r, full_matrices=False)
        keep = sizes > max(floor, 10 * eps(x.dtype) * float(np.max(sizes, initial=0.0)))
        if not keep.all():
            # The others had no chance to converge beside directions of rounding size.
            x, step = orthonormalize(_times(x, left[:, keep]))
            r = to_host(step) @ (sizes[keep, None] * right[keep])
    return x, from_host(r, x)


def _defect(gram: np.ndarray) -> float:
    return float(np.max(np.abs(gram - np.eye(len(gram))), initial=0.0))


def _gram(x: Array) -> np.ndarray:
    gram = to_host(inner(x, x))
    return gram.astype(np.result_type(gram, np.float64), copy=False)


def _times(x: Array, small: np.ndarray) -> Array:
    # As rows times rows, so that the columns of the result are contiguous.
    return (from_host(small, x).mT @ x.mT).mT


def _cholesky(gram: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """``(r, inverse, shifted)`` with ``gram = r^H r``, without rows for columns that are zero."""
    lengths = np.sqrt(np.abs(gram.diagonal()))
    k = len(gram)
    if not lengths.all():
        alive = np.flatnonzero(lengths)
        r, inverse = np.zeros((len(alive), k), gram.dtype), np.zeros((k, len(alive)), gram.dtype)
        r[:, alive], inverse[alive], _ = _cholesky(gram[np.ix_(alive, alive)], m)
        return r, inverse, True
    unit = gram / (lengths * lengths[:, None])
    # The norm of a Gram matrix of unit columns is at most k.
    shift = 11 * (m * k + k * (k + 1)) * eps(np.float64) * k
    upper = _factor(unit)
    shifted = float(np.min(np.abs(upper.diagonal()), initial=1.0)) ** 2 < 2 * shift
    if shifted:
        upper = _factor(unit + shift * np.eye(k))
    return upper * lengths, np.linalg.inv(upper) / lengths[:, None], shifted


def _factor(unit: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor; zero where the matrix is numerically singular."""
    try:
        return np.linalg.cholesky(unit).conj().T
    except np.linalg.LinAlgError:
        return np.zeros_like(unit)
