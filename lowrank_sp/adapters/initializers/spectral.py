"""Starts made of the singular vectors of the weight, its columns or a sketch of it."""

from __future__ import annotations

from typing import Any

from lowrank_sp._arrays import RNG, Array, adjoint, as_compute, detached, namespace, standard_normal
from lowrank_sp.adapters.initializers._start import (
    Initialization,
    check_finite,
    checked,
    compensated,
    from_svd,
    remainder,
    zeros,
)
from lowrank_sp.adapters.initializers.plain import lora
from lowrank_sp.linalg.svd import minor_svd, truncated_svd
from lowrank_sp.operators import as_operator


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
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    # One session for all products, since BLAS threads spin on after a product of their own.
    with as_operator(weight).session():
        return from_svd(weight, truncated_svd(weight, rank, tol=tol, rng=rng), scale, dtype)


def milora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Minor singular triplets, split evenly as in :func:`pissa`; the residual keeps the rest.

    The true minor subspace, by :func:`~lowrank_sp.linalg.svd.minor_svd`; ``rng`` is not used
    :cite:p:`wang2025milora`. Parameters are those of :func:`lora`.
    """
    del rng
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    return from_svd(weight, minor_svd(weight, rank), scale, dtype)


def olora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    r"""Leading part of a QR factorization: ``up = Q[:, :r]``, ``down = R[:r, :]``.

    The factors are not divided by the scale, so the adapter starts at ``scale * Q_r R_r``. Only
    ``r`` columns of ``Q`` are formed, since :math:`R_r = Q_r^H W`; ``R`` has a positive diagonal.
    ``rng`` is not used :cite:p:`buyukakyuz2024olora`. Parameters are those of :func:`lora`.
    """
    del rng
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    xp = namespace(weight)
    check_finite(weight)
    wide = as_compute(detached(weight))
    q, r = xp.linalg.qr(wide[:, :rank])
    diagonal = xp.linalg.diagonal(r)
    size = abs(diagonal)
    one = xp.ones_like(diagonal)
    size = xp.where(size > 0, xp.astype(size, r.dtype), one)
    up = q * xp.where(abs(diagonal) > 0, diagonal / size, one)
    down = adjoint(up) @ wide
    return compensated(weight, xp.astype(up, dtype), xp.astype(down, dtype), scale)


def mica(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Minor left singular vectors in ``up``, ``down`` zero; ``up`` is meant to stay frozen.

    ``up^H up = I``, so a gradient step on ``down`` projects the gradient of the weight onto the
    minor left subspace. ``rng`` is not used :cite:p:`rudiger2026mica`. Parameters are those of
    :func:`lora`.
    """
    del rng
    _, n, scale, dtype = checked(weight, rank, alpha, dtype)
    up = namespace(weight).astype(minor_svd(weight, rank).u, dtype)
    return Initialization(up, zeros((rank, n), up), scale, weight)


def kasa(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    r"""Plain LoRA beside a base that has lost its ``rank`` smallest singular triplets.

    The residual is :math:`W_{k-r}`, ``k = min(m, n)``, on purpose: the layer starts at it and not
    at ``weight``. It differs from ``weight`` by ``svd``, whose norm is the change that is made.
    The diagonal between the factors belongs to the adapter's form
    :cite:p:`wang2025kasa`. Parameters are those of :func:`lora`.
    """
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    f = minor_svd(weight, rank)
    start = lora(weight, rank, alpha=alpha, rng=rng, dtype=dtype)
    truncated = remainder(weight, *f.factors(), 1.0)
    return Initialization(start.up, start.down, scale, truncated, f)


def nora(
    weight: Array,
    rank: int,
    *,
    sigma: float = 0.02,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""Nystrom sketch of the weight in ``down``, ``up`` zero.

    .. math:: A = \sigma\, \Omega W / s, \qquad B = 0

    with Gaussian :math:`\Omega` of shape ``(r, m)``, so that ``down`` lies in the row space of the
    weight. From such a start a scaled gradient step solves the symmetric and the asymmetric
    factorization problem of rank ``r`` at once :cite:p:`li2025nora`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    sigma : float
        Standard deviation of the sketch.
    """
    m, _, scale, dtype = checked(weight, rank, alpha, dtype)
    check_finite(weight)
    operator = as_operator(weight)
    omega = standard_normal((m, rank), like=operator.like, rng=rng)
    down = adjoint(operator.rmatmul(omega)) * (sigma / scale)
    down = namespace(weight).astype(down, dtype)
    return Initialization(zeros((m, rank), down), down, scale, weight)
