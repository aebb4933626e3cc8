"""What a spectrum says: ranks, thresholds, angles between subspaces."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from lowrank_sp._arrays import Array, adjoint, max_abs, namespace


def effective_rank(s: Array) -> float:
    r"""Exponential of the entropy of ``p = s / sum(s)``: ``n`` for ``n`` equal values.

    Parameters
    ----------
    s : array, shape (k,)
        Non-negative singular values. All zero gives 0.
    """
    xp = namespace(s)
    largest = max_abs(s)
    if not math.isfinite(largest):
        raise ValueError("singular values must be finite, got NaN or infinity")
    if largest == 0.0:
        return 0.0
    p = s / largest
    p = p / xp.sum(p)
    p = xp.where(p > 0, p, xp.ones_like(p))
    return math.exp(-float(xp.sum(p * xp.log(p))))


def stable_rank(s: Array) -> float:
    """``||A||_F^2 / ||A||_2^2`` from the singular values ``s``; 0 for the zero matrix."""
    xp = namespace(s)
    largest = max_abs(s)
    return float(xp.sum((s / largest) ** 2)) if largest else 0.0


def energy_rank(s: Array, share: float) -> int:
    """Smallest ``k`` whose leading values hold ``share`` of ``sum(s^2)``; 0 for the zero matrix.

    Parameters
    ----------
    s : array, shape (k,)
        Singular values from large to small.
    share : float
        In (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    xp = namespace(s)
    largest = max_abs(s)
    if largest == 0.0:
        return 0
    held = xp.cumulative_sum((s / largest) ** 2)
    short = held < share * float(held[-1])
    return min(int(xp.sum(xp.astype(short, xp.int32))) + 1, s.shape[0])


def gavish_donoho_threshold(s: Array, shape: tuple[int, int], noise: float | None = None) -> float:
    r"""Singular values below this are noise: the optimal hard threshold.

    For an ``m x n`` matrix with independent noise of standard deviation ``noise`` (in units of the
    entries) and aspect ratio :math:`\beta = \min(m, n) / \max(m, n)`,

    .. math:: \tau = \lambda(\beta) \sqrt{\max(m, n)}\; \text{noise}, \qquad
              \lambda^2 = 2(\beta + 1) + \frac{8\beta}{\beta + 1 + \sqrt{\beta^2 + 14\beta + 1}}

    and for unknown noise :math:`\tau = \lambda(\beta) \operatorname{median}(s) / \sqrt{\mu_\beta}`
    with the median :math:`\mu_\beta` of the Marchenko-Pastur law, computed, not fitted
    :cite:p:`gavish2014optimal`.

    Parameters
    ----------
    s : array, shape (min(m, n),)
        All singular values; only their median is used, and only where ``noise`` is None.
    shape : (int, int)
    noise : float, optional

    Examples
    --------
    >>> import numpy as np
    >>> round(gavish_donoho_threshold(np.ones(1), (1, 1), noise=1.0), 4)  # 4 / sqrt(3)
    2.3094
    >>> round(gavish_donoho_threshold(np.ones(9), (9, 9)), 3)
    2.858
    """
    small, large = sorted(shape)
    beta = small / large
    factor = gavish_donoho_factor(beta)
    if noise is not None:
        return factor * math.sqrt(large) * noise
    if s.shape[0] != small:
        raise ValueError(
            f"the median needs all {small} singular values, got {s.shape[0]}; or pass noise="
        )
    xp = namespace(s)
    ordered = xp.sort(s)
    median = (float(ordered[(small - 1) // 2]) + float(ordered[small // 2])) / 2
    return factor * median / math.sqrt(marchenko_pastur_median(beta))


def gavish_donoho_factor(beta: float) -> float:
    r"""The :math:`\lambda(\beta)` of :func:`gavish_donoho_threshold`: ``4 / sqrt(3)`` at 1."""
    root = math.sqrt(beta**2 + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))


def gavish_donoho_rank(s: Array, shape: tuple[int, int], noise: float | None = None) -> int:
    """How many of ``s`` exceed :func:`gavish_donoho_threshold`."""
    xp = namespace(s)
    above = s > gavish_donoho_threshold(s, shape, noise)
    return int(xp.sum(xp.astype(above, xp.int32)))


@lru_cache
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law of aspect ratio ``beta`` in (0, 1] and unit variance."""
    from scipy.integrate import quad
    from scipy.optimize import brentq

    if not 0 < beta <= 1:
        raise ValueError(f"beta must be in (0, 1], got {beta}")
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    middle, radius = (high + low) / 2, (high - low) / 2

    def mass(angle: float) -> float:
        # t = middle - radius cos(angle) removes both square-root ends of the density.
        def density(a: float) -> float:
            sine2 = math.sin(a / 2) ** 2
            return 4 * radius**2 * sine2 * (1 - sine2) / (low + 2 * radius * sine2)

        return quad(density, 0.0, angle)[0] / (2 * math.pi * beta)

    angle: Any = brentq(lambda a: mass(a) - 0.5, 1e-9, math.pi)
    return middle - radius * math.cos(angle)


def principal_angles(u: Array, v: Array) -> Array:
    """Angles between the ranges of two orthonormal bases, in radians, from small to large.

    Small angles come from sines and large ones from cosines, so that both keep their digits.

    Parameters
    ----------
    u : array, shape (n, j)
    v : array, shape (n, k)

    Returns
    -------
    array, shape (min(j, k),)
    """
    xp = namespace(u, v)
    if u.shape[1] < v.shape[1]:
        u, v = v, u
    cross = adjoint(u) @ v
    cosines = xp.linalg.svdvals(cross)
    sines = xp.flip(xp.linalg.svdvals(v - u @ cross))
    return xp.where(
        cosines**2 > 0.5,
        xp.asin(xp.clip(sines, 0.0, 1.0)),
        xp.acos(xp.clip(cosines, 0.0, 1.0)),
    )


def subspace_overlap(u: Array, v: Array) -> float:
    """``||u^H v||_F^2 / min(j, k)`` of orthonormal bases: 1 if one range holds the other, 0 if
    they are orthogonal.
    """  # noqa: D205
    xp = namespace(u, v)
    cross = adjoint(u) @ v
    return float(xp.sum(abs(cross) ** 2)) / min(u.shape[1], v.shape[1])
