"""Where an adapter starts: factors of the update, and the base weight that makes up for them.

A layer computes ``weight @ x`` with ``weight = residual + scale * up @ down``. Every initializer is
a function ``(weight, rank, *, alpha=None, rng=None, dtype=None)`` and keeps that identity, to the
rounding of the dtypes in which its parts are stored: the residual is derived from the factors after
they were cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    compute_dtype,
    device,
    dtype_name,
    from_host,
    is_inexact,
    max_abs,
    namespace,
    slices,
)
from lowrank_sp.factors import SVD, LowRank, check_rank
from lowrank_sp.linalg.svd import minor_svd, truncated_svd
from lowrank_sp.operators import as_operator


@dataclass(frozen=True)
class Initialization:
    """Factors of an adapter and the base weight that belongs to them.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    scale : float
        ``alpha / r``.
    residual : array, shape (m, n)
        The base weight, in the dtype of ``weight``: ``weight == residual + scale * up @ down``.
    svd : SVD or None
        The triplets that the factors were made of, with their certified errors.
    """

    up: Array
    down: Array
    scale: float
    residual: Array
    svd: SVD | None = None

    def delta(self) -> LowRank:
        """The update of the weight, ``scale * up @ down``."""
        return self.scale * LowRank(self.up, self.down)


def lora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Plain LoRA: ``down`` uniform on ``+-1/sqrt(n)`` (Kaiming), ``up`` zero.

    Parameters
    ----------
    weight : array, shape (m, n)
        In the layout of ``torch.nn.Linear``: outputs by inputs.
    rank : int
        In ``1..min(m, n)``.
    alpha : float, optional
        ``scale = alpha / rank``; by default ``rank``, so that the scale is 1.
    rng : int, Generator or None
    dtype : dtype, optional
        Of the factors; by default the compute dtype of ``weight`` (float32 for half precision).

    Returns
    -------
    Initialization
        The residual is ``weight`` itself :cite:p:`hu2022lora`.
    """
    m, n, scale, dtype = _checked(weight, rank, alpha, dtype)
    draw = np.random.default_rng(rng).uniform(-1.0, 1.0, (rank, n)) / n**0.5
    down = from_host(draw, weight, dtype)
    _check_finite(weight)
    return Initialization(_zeros((m, rank), down), down, scale, weight)


def gaussian(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """LoRA with Gaussian ``down`` of standard deviation ``1 / rank``, ``up`` zero.

    Parameters are those of :func:`lora`.
    """
    m, n, scale, dtype = _checked(weight, rank, alpha, dtype)
    draw = np.random.default_rng(rng).standard_normal((rank, n)) / rank
    down = from_host(draw, weight, dtype)
    _check_finite(weight)
    return Initialization(_zeros((m, rank), down), down, scale, weight)


def orthogonal(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Both factors nonzero, their product zero: they meet in orthogonal halves of ``R^r``.

    ``down^T = G_1 Q_even / 10`` and ``up = G_2 Q_odd / 10`` with Gaussian ``G_1, G_2`` and the even
    and odd rows of one orthogonal ``r x r`` matrix ``Q``. Both have rank ``r / 2``.

    Parameters are those of :func:`lora`; ``rank`` must be even.
    """
    m, n, scale, dtype = _checked(weight, rank, alpha, dtype)
    if rank % 2:
        raise ValueError(f"rank must be even for the orthogonal initialization, got {rank}")
    _check_finite(weight)
    generator = np.random.default_rng(rng)
    q, _ = np.linalg.qr(generator.standard_normal((rank, rank)))
    down = (generator.standard_normal((n, rank // 2)) @ q[0::2]).T / 10
    up = generator.standard_normal((m, rank // 2)) @ q[1::2] / 10
    return _compensated(
        weight, from_host(up, weight, dtype), from_host(down, weight, dtype), scale, None
    )


def pissa(
    weight: Array,
    rank: int,
    *,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
    tol: float | None = None,
) -> Initialization:
    r"""Principal singular triplets, split evenly.

    .. math:: B = U_r (\Sigma_r / s)^{1/2}, \qquad A = (\Sigma_r / s)^{1/2} V_r^H, \qquad
              W_\text{res} = W - s B A

    so that the spectral norm of the residual is :math:`\sigma_{r+1}` :cite:p:`meng2024pissa`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    tol : float, optional
        Accuracy of the triplets, as in :func:`~lowrank_sp.linalg.svd.truncated_svd`.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.diag([4.0, 2.0, 1.0])
    >>> start = pissa(weight, rank=1)
    >>> start.up[:, 0], np.diag(start.residual)
    (array([2., 0., 0.]), array([0., 2., 1.]))
    """
    _, _, scale, dtype = _checked(weight, rank, alpha, dtype)
    # One session for all products, since BLAS threads spin on after a product of their own.
    with as_operator(weight).session():
        return _from_svd(weight, truncated_svd(weight, rank, tol=tol, rng=rng), scale, dtype)


def milora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Minor singular triplets, split evenly as in :func:`pissa`; the residual keeps the rest.

    The true minor subspace, by :func:`~lowrank_sp.linalg.svd.minor_svd`; ``rng`` is not used
    :cite:p:`wang2025milora`. Parameters are those of :func:`lora`.
    """
    del rng
    _, _, scale, dtype = _checked(weight, rank, alpha, dtype)
    return _from_svd(weight, minor_svd(weight, rank), scale, dtype)


def olora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    r"""Leading part of a QR factorization: ``up = Q[:, :r]``, ``down = R[:r, :]``.

    The factors are not divided by the scale, so the adapter starts at ``scale * Q_r R_r``. Only
    ``r`` columns of ``Q`` are formed, since :math:`R_r = Q_r^H W`; ``R`` has a positive diagonal.
    ``rng`` is not used :cite:p:`buyukakyuz2024olora`. Parameters are those of :func:`lora`.
    """
    del rng
    _, _, scale, dtype = _checked(weight, rank, alpha, dtype)
    xp = namespace(weight)
    wide = as_compute(weight)
    q, r = xp.linalg.qr(wide[:, :rank])
    diagonal = xp.linalg.diagonal(r)
    size = abs(diagonal)
    one = xp.ones_like(diagonal)
    size = xp.where(size > 0, xp.astype(size, r.dtype), one)
    up = q * xp.where(abs(diagonal) > 0, diagonal / size, one)
    down = adjoint(up) @ wide
    _check_finite(down)
    return _compensated(weight, xp.astype(up, dtype), xp.astype(down, dtype), scale, None)


#: Initializers by name, for programs that take a name from their user.
INITIALIZERS: dict[str, Callable[..., Initialization]] = {
    "lora": lora,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}


def _checked(
    weight: Array, rank: int, alpha: float | None, dtype: Any
) -> tuple[int, int, float, Any]:
    """``m, n``, the scale and the dtype of the factors, after the checks all initializers share."""
    xp = namespace(weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    m, n = weight.shape
    check_rank(rank, min(m, n), (m, n))
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not is_inexact(weight.dtype):
        raise TypeError(
            f"weight must be floating, got {dtype_name(weight.dtype)}; dequantize it first"
        )
    return m, n, alpha / rank, compute_dtype(xp, weight.dtype) if dtype is None else dtype


def _check_finite(weight: Array) -> None:
    if not math.isfinite(max_abs(weight)):
        raise ValueError("the weight must be finite, got NaN or infinite entries")


def _zeros(shape: tuple[int, int], like: Array) -> Array:
    return namespace(like).zeros(shape, dtype=like.dtype, device=device(like))


def _from_svd(weight: Array, f: SVD, scale: float, dtype: Any) -> Initialization:
    xp = namespace(weight)
    left, right = (factor * scale**-0.5 for factor in f.split().factors())
    return _compensated(weight, xp.astype(left, dtype), xp.astype(right, dtype), scale, f)


def _compensated(
    weight: Array, up: Array, down: Array, scale: float, f: SVD | None
) -> Initialization:
    """Derive the residual from the stored factors, by row blocks, and round it once."""
    xp = namespace(weight, up)
    wide = as_compute(up[:1, :]).dtype
    scaled = as_compute(down) * scale

    def part(rows: slice) -> Array:
        block = as_compute(weight[rows, :]) - xp.astype(up[rows, :], wide) @ scaled
        return xp.astype(block, weight.dtype)

    every = slices(weight.shape[0], 512)
    if isinstance(weight, np.ndarray):
        # Filled in place: concatenation would hold the residual twice.
        residual = np.empty(weight.shape, weight.dtype)
        for rows in every:
            residual[rows] = part(rows)
    else:
        residual = xp.concat([part(rows) for rows in every], axis=0)
    return Initialization(up, down, scale, residual, f)
