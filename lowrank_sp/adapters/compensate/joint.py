"""Correction and base are chosen together: the correction takes its part before the quantizer."""

from __future__ import annotations

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, eps, frobenius, namespace, to_host
from lowrank_sp.adapters.compensate._base import Compensated, Quantizer, checked_weight, quantized
from lowrank_sp.adapters.quantize import nf4
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.linalg.weighted import (
    check_not_negative,
    checked_scales,
    covariance_root,
    projected,
)


def lq_lora(
    weight: Array,
    rank: int,
    *,
    fisher: Array,
    quantize: Quantizer = nf4,
    steps: int = 5,
    rng: RNG = None,
) -> Compensated:
    r"""LQ-LoRA: rows and columns count by their share in the Fisher information.

    .. math:: B_t A_t = D_1^{-1} \bigl(D_1 (W - Q_{t-1}) D_2\bigr)_r D_2^{-1}, \qquad
              Q_t = q(W - B_t A_t), \qquad Q_0 = 0

    with :math:`D_1^2, D_2^2` the means of the rows and of the columns of ``fisher``, the latter
    over the mean of all, so that :math:`\lVert D_1 (\cdot) D_2 \rVert_F^2` weighs squares by
    ``fisher`` where that has rank one. ``error`` is this norm of ``W - Q - B A``; the steps end
    with the last that lowers it :cite:p:`guo2024lqlora`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    fisher : array, shape (m, n)
        Mean squares of the gradients of the loss, of single samples. Not negative.
    steps : int
        At most; at least 1.
    """
    wide = checked_weight(weight, rank)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rows, columns = _fisher_scales(fisher, wide)

    def step(lost: Array) -> tuple[Compensated, Array]:
        correction = _two_sided(rows, lost, columns, rank, rng)
        base, rest = quantized(wide - correction.to_dense(), quantize)
        found = Compensated(base, correction, frobenius(rows * rest * columns))
        return found, rest + correction.to_dense()

    best, lost = step(wide)
    for _ in range(steps - 1):
        found, lost = step(lost)
        if found.error >= best.error:
            break
        best = found
    return best


def svdquant(
    weight: Array,
    rank: int,
    *,
    magnitude: Array | None = None,
    migration: float = 0.5,
    quantize: Quantizer = nf4,
    rng: RNG = None,
) -> Compensated:
    r"""SVDQuant: the leading part stays unquantized, and the rest is quantized.

    .. math:: W D = (W D)_r + R, \qquad W' = \bigl((W D)_r + q(R)\bigr) D^{-1}, \qquad
              d_j = \frac{a_j^{\mu}}{(\max_i |w_{ij}|)^{1 - \mu}}

    ``D`` moves outliers of the inputs, of magnitudes :math:`a`, into the weight, whose outliers the
    low-rank part takes. ``error`` is :math:`\lVert (W - W') D \rVert_F`. The quantizer comes last,
    so what it loses is lost, as in :func:`~lowrank_sp.adapters.initializers.qpissa`
    :cite:p:`li2025svdquant`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    magnitude : array, shape (n,), optional
        Largest magnitudes of the inputs; means will do. By default ``D`` is the identity. Inputs
        or columns that are zero get ``d_j = 1``.
    migration : float
        :math:`\mu`, in 0..1: how much of the outliers to move.
    """
    wide = checked_weight(weight, rank)
    if not 0 <= migration <= 1:
        raise ValueError(f"migration must be in 0..1, got {migration}")
    smoothing = None
    if magnitude is not None:
        xp = namespace(wide, magnitude)
        size = checked_scales(magnitude, wide, "magnitude")
        largest = xp.max(abs(wide), axis=0)
        one, live = xp.ones_like(size), (size > 0) & (largest > 0)
        size, largest = xp.where(live, size, one), xp.where(live, largest, one)
        smoothing = size**migration / largest ** (1 - migration)
    smoothed = wide if smoothing is None else wide * smoothing
    leading, _ = projected(smoothed, smoothed, rank, rng)
    rest = smoothed - leading.to_dense()
    base, lost = quantized(rest, quantize)
    right = leading.right if smoothing is None else leading.right / smoothing
    return Compensated(base, LowRank(leading.left, right), frobenius(lost), smoothing)


def srr(
    weight: Array,
    rank: int,
    *,
    second_moment: Array,
    kept: int | None = None,
    quantize: Quantizer = nf4,
    rng: RNG = None,
) -> Compensated:
    r"""SRR: part of the rank is kept from the quantizer, the rest corrects what it loses.

    .. math:: L = U_k U_k^H W, \quad W M = U \Sigma V^H, \qquad Q = q(W - L), \qquad
              B A = \operatorname*{argmin}_{\text{rank } r} \; \lVert (W - Q - B A) M \rVert_F

    with a root ``M`` of the second moment. Directions that carry much of the outputs are kept from
    a quantizer of few bits, which would lose more of them than of the rest.
    ``error`` is this norm, the root mean square error of the outputs :cite:p:`cho2026preserve`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    second_moment : array, shape (n, n)
        As in :func:`qera`, which this is for ``kept=0``.
    kept : int, optional
        ``k``, in ``0..rank``. By default where the product of what the quantizer sees,
        :math:`\lVert W M - (W M)_k \rVert_F`, and of the share of the error of ``q(W)`` that is
        beyond rank ``r - k`` is least.

    Notes
    -----
    The published correction is ``L``, and beside it the best one of rank ``r - k`` for what is lost
    then. The one here is the best of rank ``r``, so no worse. For the error of the quantizer, whose
    size and spectrum are taken not to depend on ``k``, the published choice of ``k`` has a random
    matrix in the place of ``W - q(W)``.

    Examples
    --------
    >>> import numpy as np
    >>> from functools import partial
    >>> from lowrank_sp.adapters import int_symmetric
    >>> from lowrank_sp.adapters.compensate import qera
    >>> rng = np.random.default_rng(0)
    >>> w = rng.standard_normal((64, 64)) + 4 * rng.standard_normal((64, 3)) @ rng.random((3, 64))
    >>> options = dict(second_moment=np.eye(64), quantize=partial(int_symmetric, bits=3), rng=0)
    >>> bool(srr(w, 8, **options).error < 0.5 * qera(w, 8, **options).error)
    True
    """
    wide = checked_weight(weight, rank)
    if kept is not None and not 0 <= kept <= rank:
        raise ValueError(f"kept must be in 0..{rank}, got {kept}")
    generator = np.random.default_rng(rng)
    root = covariance_root(second_moment, wide.shape[1], name="second_moment", least=rank)
    root = namespace(wide, root).astype(root, wide.dtype)
    image, rest = wide @ root, wide
    if kept is None:
        # The split by what the quantizer loses of the weight itself.
        _, lost = quantized(wide, quantize)
        exposed, beyond = (_tails(a, rank, generator) for a in (image, lost @ root))
        kept = int(np.argmin(exposed * beyond[::-1]))
    if kept:
        rest = wide - projected(wide, image, kept, generator).approximation.to_dense()
    base, lost = quantized(rest, quantize)
    lost = lost + (wide - rest)
    return Compensated(base, *projected(lost, lost @ root, rank, generator))


def _tails(a: Array, rank: int, rng: np.random.Generator) -> np.ndarray:
    """``||A - A_k||_F`` for ``k`` from 0 to ``rank``."""
    s = to_host(truncated_svd(a, rank, rng=rng).s).astype(np.float64)
    left = frobenius(a) ** 2 - np.concatenate([[0.0], np.cumsum(s**2)])
    return np.maximum(left, 0.0) ** 0.5


def _two_sided(rows: Array, lost: Array, columns: Array, rank: int, rng: RNG) -> LowRank:
    """``D_1^{-1} (D_1 E D_2)_r D_2^{-1}`` without either inverse, ``D_1 E D_2 = U S V^H``.

    It is ``(E D_2 V_r S_r^{-1}) (U_r^H D_1 E)``, which exists where weights are zero, too.
    """
    u, s, vh = truncated_svd(rows * lost * columns, rank, rng=rng)
    xp = namespace(u)
    floor = max(lost.shape) * eps(s.dtype) * float(xp.max(s))
    inverse = xp.where(s > floor, 1 / xp.where(s > floor, s, xp.ones_like(s)), xp.zeros_like(s))
    return LowRank((lost * columns) @ vh.mT * inverse, u.mT @ (rows * lost))


def _fisher_scales(fisher: Array, w: Array) -> tuple[Array, Array]:
    """``D_1`` as a column and ``D_2`` as a row, in the dtype of ``w``."""
    xp = namespace(fisher, w)
    if tuple(fisher.shape) != tuple(w.shape):
        raise ValueError(f"fisher must have shape {tuple(w.shape)}, got {tuple(fisher.shape)}")
    check_not_negative(fisher, "fisher")
    fisher = as_compute(fisher)
    rows, columns = (xp.mean(fisher, axis=axis, keepdims=True) for axis in (1, 0))
    mean = float(xp.mean(rows)) or 1.0
    return xp.astype(rows**0.5, w.dtype), xp.astype((columns / mean) ** 0.5, w.dtype)
