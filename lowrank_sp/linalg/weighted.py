"""Low-rank approximation in the norm that data induce on the inputs of a matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    eps,
    frobenius,
    is_complex,
    max_abs,
    namespace,
    wide_dtype,
)
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import as_operator


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
    eigenvectors are three choices of ``M`` and give this one answer. Here ``M`` is the triangle of
    a QR factorization of ``inputs``, or the Cholesky factor of ``covariance`` in double precision;
    of a singular one its eigenvectors, at ten times the cost.

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
    root = data_root(w.shape[-1], inputs, covariance)
    w = as_compute(w)
    xp = namespace(w, root)
    if is_complex(root.dtype) and not is_complex(w.dtype):
        raise TypeError("w must be complex where its inputs are; convert it first")
    m, n = w.shape
    rank = check_rank(rank, min(m, n), (m, n))
    if not math.isfinite(max_abs(w)):
        raise ValueError("w must be finite, got NaN or infinite entries")
    return projected(w, w @ xp.astype(root, w.dtype), rank, rng)


def output_norm(a: Any, *, inputs: Array | None = None, covariance: Array | None = None) -> float:
    r"""Root mean square norm of the outputs of a matrix.

    .. math:: \sqrt{\mathbb{E}\, \lVert A x \rVert^2} = \lVert A M \rVert_F,
              \qquad M M^H = \mathbb{E}[x x^H]

    Of a difference ``W - W'`` it is the error that :func:`weighted_low_rank` minimizes.

    Parameters
    ----------
    a : array or operator, shape (m, n)
        Operators are multiplied, not made dense.
    inputs, covariance : array
        One of them, as in :func:`weighted_low_rank`.

    Examples
    --------
    >>> import numpy as np
    >>> output_norm(np.diag([3.0, 4.0]), covariance=np.eye(2))
    5.0
    """
    operator = as_operator(a)
    root = data_root(operator.shape[1], inputs, covariance)
    return frobenius(operator @ namespace(root).astype(root, operator.dtype))


def projected(w: Array, image: Array, rank: int, rng: RNG) -> Weighted:
    """``U_r U_r^H w`` with the leading left singular vectors of ``image = w M``, for any ``M``."""
    u = _leading(image, rank, rng)
    error = frobenius(image - u @ (adjoint(u) @ image))
    return Weighted(LowRank(u, adjoint(u) @ w), error)


def covariance_root(c: Array, n: int, *, name: str = "covariance", least: int = 0) -> Array:
    """``M`` of shape ``(n, k)`` with ``M M^H = C``, in double precision.

    Parameters
    ----------
    c : array, shape (n, n)
    n : int
    name : str
        What errors call ``c``.
    least : int
        Raise if fewer eigenvalues of ``c`` are above rounding.
    """
    wide, precision = _checked_covariance(c, n, name)
    xp = namespace(wide)
    if _is_definite(wide, precision):
        return xp.linalg.cholesky(wide)
    values, vectors = xp.linalg.eigh(wide)
    first = n - _numerical_rank(values, precision, name, least)
    return vectors[:, first:] * xp.astype(values[first:], vectors.dtype) ** 0.5


def check_covariance(c: Array, n: int, *, name: str, least: int) -> None:
    """Raise what :func:`covariance_root` would, without a root."""
    wide, precision = _checked_covariance(c, n, name)
    if not _is_definite(wide, precision):
        _numerical_rank(namespace(wide).linalg.eigvalsh(wide), precision, name, least)


def data_root(
    n: int,
    inputs: Array | None,
    covariance: Array | None,
    *,
    name: str = "covariance",
    least: int = 0,
) -> Array:
    """``M`` with ``M M^H = E[x x^H]``, from samples or from the moment itself.

    Parameters
    ----------
    n : int
    inputs : array, shape (N, n), or None
    covariance : array, shape (n, n), or None
    name, least
        As in :func:`covariance_root`; samples must be as many.
    """
    if covariance is not None and inputs is None:
        return covariance_root(covariance, n, name=name, least=least)
    if inputs is None or covariance is not None:
        raise ValueError(f"give exactly one of inputs and {name}")
    x = as_compute(inputs)
    if x.ndim != 2 or x.shape[1] != n:
        raise ValueError(f"inputs must have shape (N, {n}), got {tuple(x.shape)}")
    samples = x.shape[0]
    if samples < max(1, least):
        raise ValueError(
            f"too few samples: inputs must hold at least {max(1, least)}, got {samples}"
        )
    if not math.isfinite(max_abs(x)):
        raise ValueError("inputs must be finite, got NaN or infinite entries")
    if samples > n:
        x = namespace(x).linalg.qr(x)[1]
    return x.mT / samples**0.5


def checked_scales(values: Array, w: Array, name: str) -> Array:
    """Weights of the columns of ``w``, finite and not negative, in its dtype."""
    n = w.shape[1]
    if tuple(values.shape) != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {tuple(values.shape)}")
    check_not_negative(values, name)
    return namespace(values, w).astype(values, w.dtype)


def check_not_negative(values: Array, name: str) -> None:
    """Raise unless all values are finite and at least zero."""
    if not math.isfinite(max_abs(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    least = float(namespace(values).min(values))
    if least < 0:
        raise ValueError(f"{name} must not be negative, got {least:.3g}")


def _leading(image: Array, rank: int, rng: RNG) -> Array:
    xp = namespace(image)
    if min(image.shape) >= rank:
        return truncated_svd(image, rank, rng=rng).u
    # Fewer samples than the rank: the image is reproduced exactly, with room to spare.
    shape = image.shape[0], rank - image.shape[1]
    padding = xp.zeros(shape, dtype=image.dtype, device=device(image))
    return truncated_svd(xp.concat([image, padding], axis=1), rank, rng=rng).u


def _checked_covariance(c: Array, n: int, name: str) -> tuple[Array, float]:
    """``c`` in double precision, Hermitian and finite, and the spacing of its own precision."""
    if tuple(c.shape) != (n, n):
        raise ValueError(f"{name} must have shape ({n}, {n}), got {tuple(c.shape)}")
    c = as_compute(c)
    largest, precision = max_abs(c), eps(c.dtype)
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    if max_abs(c - adjoint(c)) > 1e3 * precision * largest:
        raise ValueError(f"{name} must be Hermitian; symmetrize it as (C + C^H) / 2")
    xp = namespace(c)
    wide = xp.astype(c, wide_dtype(xp, c.dtype))
    return (wide + adjoint(wide)) / 2, precision


def _is_definite(c: Array, precision: float) -> bool:
    """Whether every eigenvalue is above rounding, by a Cholesky factorization of ``c`` shifted."""
    xp = namespace(c)
    # The Frobenius norm bounds the largest eigenvalue.
    shift = c.shape[0] * precision * frobenius(c)
    try:
        lower = xp.linalg.cholesky(c - shift * xp.eye(c.shape[0], dtype=c.dtype, device=device(c)))
    except (np.linalg.LinAlgError, RuntimeError):  # PyTorch has an error of its own
        return False
    return math.isfinite(max_abs(lower))  # JAX has none


def _numerical_rank(values: Array, precision: float, name: str, least: int) -> int:
    """How many of some ascending eigenvalues are above rounding."""
    xp = namespace(values)
    floor = values.shape[0] * precision * max_abs(values)
    if float(values[0]) < -100 * floor:
        raise ValueError(
            f"{name} must be positive semidefinite, got eigenvalue {float(values[0]):.3g}"
        )
    found = int(xp.sum(xp.astype(values > floor, xp.int32)))
    if found < least:
        raise ValueError(
            f"too few samples: {name} has rank {found}, less than the rank {least} "
            "asked for; feed more inputs, or ask for a smaller rank"
        )
    return found
