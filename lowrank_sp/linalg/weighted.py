"""Low-rank approximation in the norm that data induce on the inputs of a matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    eps,
    frobenius,
    is_complex,
    max_abs,
    namespace,
)
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd


class Weighted(NamedTuple):
    """A weighted low-rank approximation and the root mean square error it makes."""

    approximation: LowRank
    error: float


def weighted_low_rank(
    w: Array,
    rank: int,
    *,
    inputs: Array | None = None,
    covariance: Array | None = None,
    rng: RNG = None,
) -> Weighted:
    r"""Best approximation of the outputs ``W x`` by a matrix of given rank.

    .. math:: \min_{\operatorname{rank} W' \le r} \; \mathbb{E}\, \lVert (W - W') x \rVert^2

    With any root :math:`M M^H = \mathbb{E}[x x^H]` and :math:`W M = U \Sigma V^H` the minimizer is
    :math:`W' = U_r U_r^H W` and the least value :math:`\sum_{i>r} \sigma_i^2`. No root is inverted,
    so singular second moments do no harm.

    Parameters
    ----------
    w : array, shape (m, n)
    rank : int
        In ``1..min(m, n)``.
    inputs : array, shape (N, n)
        Samples of ``x``, one a row. Their second moment is not formed.
    covariance : array, shape (n, n)
        ``E[x x^H]`` instead, uncentred; eigenvalues below rounding count as zero.
    rng : int, Generator or None

    Returns
    -------
    Weighted
        ``approximation``, a :class:`~lowrank_sp.factors.LowRank` with orthonormal left factor, and
        ``error``, the square root of ``E ||(W - W') x||^2``.

    Raises
    ------
    ValueError
        If not exactly one of ``inputs`` and ``covariance`` is given, or shapes disagree.

    Notes
    -----
    ``O(N n^2 + m n min(N, n))`` flops. SVD-LLM's Cholesky factor, QERA's symmetric root and EoRA's
    eigenvectors are three choices of ``M`` and give this one answer.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.diag([1.0, 2.0, 3.0])
    >>> approximation, error = weighted_low_rank(w, 1, covariance=np.diag([100.0, 1.0, 0.0]))
    >>> np.round(approximation.to_dense(), 12), error
    (array([[1., 0., 0.],
           [0., 0., 0.],
           [0., 0., 0.]]), 2.0)
    """
    if (inputs is None) == (covariance is None):
        raise ValueError("give exactly one of inputs and covariance")
    data = inputs if covariance is None else covariance
    xp = namespace(w, data)
    w, data = as_compute(w), as_compute(data)
    if is_complex(data.dtype) and not is_complex(w.dtype):
        raise TypeError("w must be complex where its inputs are; convert it first")
    m, n = w.shape
    rank = check_rank(rank, min(m, n), (m, n))
    kind, rule = ("inputs", f"(N, {n})") if covariance is None else ("covariance", f"({n}, {n})")
    if data.ndim != 2 or data.shape[1] != n or (covariance is not None and data.shape[0] != n):
        raise ValueError(f"{kind} must have shape {rule}, got {tuple(data.shape)}")
    for name, array in (("w", w), (kind, data)):
        if not math.isfinite(max_abs(array)):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    root = _root_of_inputs(data) if covariance is None else _root_of_covariance(data)
    image = w @ xp.astype(root, w.dtype)
    u = _leading(image, rank, rng)
    error = frobenius(image - u @ (adjoint(u) @ image))
    return Weighted(LowRank(u, adjoint(u) @ w), error)


def _leading(image: Array, rank: int, rng: RNG) -> Array:
    xp = namespace(image)
    if min(image.shape) >= rank:
        return truncated_svd(image, rank, rng=rng).u
    # Fewer samples than the rank: the image is reproduced exactly, with room to spare.
    padding = xp.zeros((image.shape[0], rank - image.shape[1]), dtype=image.dtype)
    return truncated_svd(xp.concat([image, padding], axis=1), rank, rng=rng).u


def _root_of_inputs(x: Array) -> Array:
    """``M`` with ``M M^H = x^T conj(x) / N``, from a thin QR of the samples."""
    xp = namespace(x)
    samples = x.shape[0]
    if samples == 0:
        raise ValueError("inputs must hold at least one sample, got 0")
    if samples > x.shape[1]:
        x = xp.linalg.qr(x)[1]
    return x.mT / samples**0.5


def _root_of_covariance(c: Array) -> Array:
    xp = namespace(c)
    if max_abs(c - adjoint(c)) > 1e3 * eps(c.dtype) * max_abs(c):
        raise ValueError("covariance must be Hermitian; symmetrize it as (C + C^H) / 2")
    values, vectors = xp.linalg.eigh((c + adjoint(c)) / 2)
    floor = c.shape[0] * eps(c.dtype) * max_abs(values)
    if float(values[0]) < -100 * floor:
        raise ValueError(
            f"covariance must be positive semidefinite, got eigenvalue {float(values[0]):.3g}"
        )
    clipped = xp.where(values > floor, values, xp.zeros_like(values))
    return vectors * xp.astype(clipped**0.5, vectors.dtype)
