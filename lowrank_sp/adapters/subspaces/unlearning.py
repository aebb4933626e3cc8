"""Unlearning: an adapter of what to forget turned round, or started where that is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lowrank_sp._arrays import RNG, Array, adjoint, as_compute, namespace
from lowrank_sp.adapters._products import product_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.initializers._start import (
    Initialization,
    check_finite,
    checked,
    compensated,
    divided,
)
from lowrank_sp.gauge import balance
from lowrank_sp.linalg.weighted import check_not_negative, projected


def negated(adapter: Any, strength: float = 1.0) -> Product:
    r"""An adapter that was trained on what to forget, subtracted: ``W - strength * Delta``.

    Only the sign and size of the scale change, which is exact in every precision
    :cite:p:`ilharco2023editing`.

    Parameters
    ----------
    adapter : Product, anything with ``up``, ``down`` and ``scale``, or a LowRank
    strength : float
        How much of it to subtract, usually tuned on what must not be forgotten.

    Examples
    --------
    >>> import numpy as np
    >>> negated(Product(np.ones((2, 1)), np.ones((1, 2)), scale=2.0), 0.25).scale
    -0.5
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
    pair = product_of(adapter, "the adapter")
    return replace(pair, scale=-strength * pair.scale)


def row_importance(forget: Array, retain: Array, *, damping: float = 0.0) -> Array:
    r"""How much more the rows of a weight matter for what to forget than for what to retain.

    .. math:: d_i^2 = \sum_j \frac{F^{\text{forget}}_{ij}}{F^{\text{retain}}_{ij} +
              \text{damping} \cdot \operatorname{mean} F^{\text{retain}}}

    Parameters
    ----------
    forget, retain : array, shape (m, n)
        Diagonals of Fisher information matrices: means of squared gradients of the log-likelihood.
    damping : float
        Without units. Needed where ``retain`` has zeros.

    Returns
    -------
    array, shape (m,)
        ``d``.

    Examples
    --------
    >>> import numpy as np
    >>> row_importance(np.array([[4.0, 0.0], [9.0, 7.0]]), np.ones((2, 2)))
    array([2., 4.])
    """
    if tuple(forget.shape) != tuple(retain.shape):
        raise ValueError(
            f"forget and retain must have one shape, got {tuple(forget.shape)} and "
            f"{tuple(retain.shape)}"
        )
    forget, retain = as_compute(forget), as_compute(retain)
    xp = namespace(forget, retain)
    check_not_negative(forget, "forget")
    check_not_negative(retain, "retain")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and at least 0, got {damping}")
    below = retain + damping * xp.mean(retain)
    if float(xp.min(below)) == 0.0:
        raise ValueError("retain must be positive to divide by; pass damping above 0")
    return xp.sum(forget / below, axis=1) ** 0.5


def fila(
    weight: Array,
    rank: int,
    *,
    importance: Array,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""The part of the weight that matters most for what to forget: LoKU's start.

    .. math:: \min_{B, A} \; \lVert \operatorname{diag}(d) (W - s B A) \rVert_F

    The minimizer is ``W V V^H`` with the leading right singular vectors of ``diag(d) W``; the
    weights are not inverted, so that rows of no importance do no harm :cite:p:`cha2025towards`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`~lowrank_sp.adapters.initializers.lora`.
    importance : array, shape (m,)
        ``d``, such as :func:`row_importance`; any multiple of it gives the same start.

    Returns
    -------
    Initialization
        Balanced factors, and the residual as base weight. ``error`` is the minimum.

    Examples
    --------
    >>> import numpy as np
    >>> start = fila(np.diag([3.0, 2.0]), rank=1, importance=np.array([1.0, 9.0]))
    >>> np.round(start.delta().to_dense(), 12), start.error
    (array([[0., 0.],
           [0., 2.]]), 3.0)
    """
    m, _, scale, dtype = checked(weight, rank, alpha, dtype)
    if tuple(importance.shape) != (m,):
        raise ValueError(f"importance must have shape ({m},), got {tuple(importance.shape)}")
    check_not_negative(importance, "importance")
    wide = adjoint(as_compute(weight))
    xp = namespace(wide, importance)
    check_finite(wide)
    # The problem of weighted_low_rank, of the adjoint and with a diagonal root.
    found, error = projected(wide, wide * xp.astype(importance, wide.dtype), rank, rng)
    up, down = divided(balance(*found.mH.factors()), scale, dtype)
    return compensated(weight, up, down, scale, error=error)
