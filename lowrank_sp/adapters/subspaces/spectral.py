"""Trained adapters with other singular values: what was learned is kept, how strongly is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lowrank_sp._arrays import Array, frobenius, max_abs, namespace
from lowrank_sp.adapters.algebra.sums import Update, resize
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.spectrum import stable_rank

#: From singular values, large to small, to other ones.
Reweighting = Callable[[Array], Array]


def reweighted(delta: Update, function: Reweighting) -> SVD:
    r"""An update with a function of its singular values in their place.

    .. math:: \Delta = U \Sigma V^H \; \mapsto \; U f(\Sigma) V^H

    The result depends on the product only, not on its factors.

    Parameters
    ----------
    delta : LowRank or SVD, shape (m, n), or what has such a ``delta()``
    function : callable
        From an array of shape ``(k,)`` to another one, not negative: :func:`clipped`,
        :func:`powered`, :func:`at_stable_rank`, or your own.

    Returns
    -------
    SVD
        Sorted anew. ``error`` is how far the update has moved, in the Frobenius norm;
        ``split()`` gives balanced factors.

    Notes
    -----
    From the factors: ``O((m + n) r^2)`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp import LowRank
    >>> f = reweighted(LowRank(np.diag([3.0, 1.0]), np.eye(2)), lambda s: clipped(s, 2.0))
    >>> f.s, f.error
    (array([2., 1.]), 1.0)
    """
    f = resize(delta)
    if f.s.ndim != 1:
        raise ValueError(f"delta must be one matrix, got shape {f.shape}; loop over the layers")
    xp = namespace(f.s)
    s = xp.astype(function(f.s), f.s.dtype)
    if tuple(s.shape) != tuple(f.s.shape):
        raise ValueError(f"function must return shape {tuple(f.s.shape)}, got {tuple(s.shape)}")
    if not math.isfinite(max_abs(s)) or float(xp.min(s)) < 0:
        raise ValueError("function must return finite singular values, not negative")
    order = xp.argsort(s, descending=True)
    u, vh = xp.take(f.u, order, axis=1), xp.take(f.vh, order, axis=0)
    return SVD.canonical(u, xp.take(s, order), vh, error=frobenius(s - f.s))


def clipped(s: Array, largest: float) -> Array:
    """Singular values of at most ``largest``: the nearest update of that spectral norm."""
    if not 0 <= largest < math.inf:
        raise ValueError(f"largest must be finite and at least 0, got {largest}")
    xp = namespace(s)
    return xp.where(s > largest, xp.full_like(s, largest), s)


def powered(s: Array, exponent: float) -> Array:
    """Singular values to a power, with the Frobenius norm that they had; zeros stay zero.

    Below 1 it evens them out, to equal ones at 0; above 1 it sharpens them.

    Examples
    --------
    >>> import numpy as np
    >>> powered(np.array([4.0, 3.0, 0.0]), 0.0) * 2**0.5
    array([5., 5., 0.])
    """
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and at least 0, got {exponent}")
    xp = namespace(s)
    size = frobenius(s)
    if size == 0.0:
        return s
    positive = s > 0
    safe = xp.where(positive, s, xp.ones_like(s)) / max_abs(s)
    raised = xp.where(positive, safe**exponent, xp.zeros_like(s))
    return raised * (size / frobenius(raised))


def at_stable_rank(s: Array, target: float) -> Array:
    r"""The power of the singular values that has a given stable rank ``||s||_2^2 / s_1^2``.

    Parameters
    ----------
    s : array, shape (k,)
        From large to small.
    target : float
        Between the number of values that equal the largest one, to which high powers lead, and the
        number of positive ones.

    Examples
    --------
    >>> import numpy as np
    >>> s = at_stable_rank(np.array([4.0, 2.0, 1.0]), 2.0)
    >>> round(float(s @ s) / float(s[0]) ** 2, 9)
    2.0
    """
    from scipy.optimize import brentq

    def excess(exponent: float) -> float:
        return stable_rank(powered(s, exponent)) - target

    largest = stable_rank(powered(s, 0.0))
    top = 1.0
    while target < largest and excess(top) > 0 and top < 2.0**20:
        top *= 2
    if not target <= largest or excess(top) > 0:
        least = stable_rank(powered(s, top))
        raise ValueError(
            f"target must be in {least:.3g}..{largest:.3g} for these values, got {target}"
        )
    if target == largest:
        return powered(s, 0.0)
    exponent: Any = brentq(excess, 0.0, top, xtol=1e-14)
    return powered(s, exponent)
