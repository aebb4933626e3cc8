"""Merging that is the weighted sum, or its best approximation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_sp.adapters.algebra.sums import Update, add, resize
from lowrank_sp.factors import SVD, LowRank


@dataclass(frozen=True)
class Merged:
    r"""A merged update, beside the weighted sum that it stands for.

    Attributes
    ----------
    value : LowRank or SVD, shape (m, n)
        The merged update ``X``.
    exact : LowRank, shape (m, n)
        What the method would be without interference: :math:`E = \sum_i w_i \Delta_i`, and
        :math:`E / T` where it is a mean of ``T`` updates (see :class:`EntryRule`).
    error : float
        :math:`\lVert X - E \rVert_F`.
    truncation : float
        Frobenius norm of what was cut from the method's own answer to make its rank that of
        ``value``; zero where nothing was.
    """

    value: LowRank | SVD
    exact: LowRank
    error: float
    truncation: float

    @property
    def relative_error(self) -> float:
        """``error`` over the norm of ``exact``; infinite where the exact sum is zero, and ``error``
        is not.
        """  # noqa: D205
        norm = self.exact.norm()
        if norm == 0.0:
            return 0.0 if self.error == 0.0 else float("inf")
        return self.error / norm


def cat(deltas: Sequence[Update], weights: Sequence[float] | None = None) -> Merged:
    """The weighted sum itself, by the factors side by side: rank ``sum r_i``, no error.

    Parameters
    ----------
    deltas : sequence of LowRank or SVD, shape (m, n), or of what has such a ``delta()``
        Scales included. Ranks may differ.
    weights : sequence of float, optional
        By default all one.
    """
    exact = add(deltas, weights)
    return Merged(exact, exact, 0.0, 0.0)


def svd(
    deltas: Sequence[Update],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    tol: float | None = None,
) -> Merged:
    r"""Best approximation of the weighted sum by one matrix of rank ``r``.

    .. math:: \min_{\operatorname{rank} X \le r} \Big\lVert \sum_i w_i \Delta_i - X \Big\rVert_F

    Parameters
    ----------
    deltas, weights
        As in :func:`cat`.
    rank, tol
        As in :func:`~lowrank_sp.adapters.algebra.sums.resize`.

    Notes
    -----
    ``O((m + n) R^2)`` flops for the sum ``R`` of the ranks; no ``m x n`` array is formed, and the
    error is known before anything is saved.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.eye(4, 2), np.eye(2, 3)
    >>> one, two = LowRank(3 * up[:, :1], down[:1]), LowRank(up[:, 1:], down[1:])
    >>> merged = svd([one, two], rank=1)
    >>> merged.value.s, merged.error
    (array([3.]), 1.0)
    """
    exact = add(deltas, weights)
    f = resize(exact, rank=rank, tol=tol)
    return Merged(f, exact, f.error, f.error)
