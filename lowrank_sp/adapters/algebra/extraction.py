"""An adapter from two checkpoints: the difference of two weights, compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank_sp._arrays import RNG
from lowrank_sp.adapters.algebra.blocks import difference, distance
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import Rows


def extract(
    tuned: Any, base: Any, *, rank: int | None = None, tol: float | None = None, rng: RNG = None
) -> SVD:
    r"""Best low-rank approximation of what fine-tuning changed in a weight.

    .. math:: \min_{\operatorname{rank} X \le r} \lVert W - W_0 - X \rVert_F

    Parameters
    ----------
    tuned, base : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
        Of one array library. Memory-mapped and half-precision arrays are read block by block.
    rank, tol
        As in :func:`~lowrank_sp.linalg.svd.truncated_svd`: without ``rank``, the smallest one whose
        error is within ``tol`` of the norm of the difference.
    rng : int, Generator or None

    Returns
    -------
    SVD
        ``bounds`` certifies each singular value; ``error`` is
        :math:`\lVert W - W_0 - X \rVert_F`, computed for arrays in one more read, and for operators
        where it comes for free. ``split()`` gives balanced factors, with scale 1.

    Raises
    ------
    ValueError
        If shapes differ or a weight is not finite.

    Notes
    -----
    Costs what :func:`~lowrank_sp.linalg.svd.truncated_svd` costs. The difference of arrays is
    formed entry by entry in blocks of rows, which loses no digit where the weights are close;
    operators are multiplied one after the other, and lose those that they share.

    Examples
    --------
    >>> import numpy as np
    >>> base = np.random.default_rng(0).normal(size=(40, 30))
    >>> extract(base + 0.1, base, rank=1).s.round(3)  # 0.1 sqrt(40 30)
    array([3.464])
    """
    operator = difference(tuned, base)
    f = truncated_svd(operator, rank, tol=tol, rng=rng)
    return replace(f, error=distance(operator, f)) if isinstance(operator, Rows) else f
