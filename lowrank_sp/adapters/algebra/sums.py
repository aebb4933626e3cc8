"""Sums of updates and their best approximation of a given rank, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from lowrank_sp._arrays import (
    Array,
    as_compute,
    detached,
    dtype_name,
    frobenius,
    max_abs,
    namespace,
)
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.linalg.spectrum import energy_rank


class HasDelta(Protocol):
    """What is not an update itself, and has one: an initialization, a pair, a form."""

    def delta(self) -> Any:
        """The update, scale included."""
        ...


#: An update of a weight ``(m, n)``.
Update = Factored | HasDelta


def resize(delta: Update, *, rank: int | None = None, tol: float | None = None) -> SVD:
    r"""Best approximation of an update by one of lower rank.

    .. math:: \min_{\operatorname{rank} X \le r} \lVert B A - X \rVert_F

    Parameters
    ----------
    delta : LowRank or SVD, shape (..., m, n), or what has such a ``delta()``
        Of rank ``R``. A batch, all layers of one shape, needs ``rank``.
    rank, tol
        As in :meth:`SVD.truncate <lowrank_sp.factors.SVD.truncate>`: ``rank`` triplets, or as few
        as keep the error within ``tol`` of the norm; with both, ``rank`` is the most. With neither,
        all ``R``. The rules :func:`sv_ratio`, :func:`sv_cumulative` and :func:`sv_fro` choose a
        rank from the singular values.

    Returns
    -------
    SVD
        ``error`` is :math:`\lVert B A - X \rVert_F`, to the rounding that ``bounds`` tells.
        ``split()`` gives balanced factors.

    Raises
    ------
    ValueError
        If ``rank`` or ``tol`` is out of range, or the factors are not finite.

    Notes
    -----
    Two QR factorizations and an SVD of ``R x R``: ``O((m + n) R^2)`` flops, and no ``m x n`` array.

    Examples
    --------
    >>> import numpy as np
    >>> delta = LowRank(np.eye(5, 3) * [3.0, 2.0, 1.0], np.eye(3, 4))
    >>> f = resize(delta, rank=1)
    >>> f.s, round(f.error**2, 12)
    (array([3.]), 5.0)
    >>> f = resize(delta)
    >>> f.truncate(sv_ratio(f.s, 2.0)).rank
    2
    """
    product = factored(delta)
    f = product if isinstance(product, SVD) else product.svd()
    return replace(f, error=0.0).truncate(rank, tol=tol)


def sv_ratio(s: Array, ratio: float) -> int:
    """How many singular values exceed ``s[0] / ratio``; at least 1.

    Parameters
    ----------
    s : array, shape (k,)
        From large to small.
    ratio : float
        Above 1.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be finite and above 1, got {ratio}")
    xp = namespace(s)
    return max(1, int(xp.sum(xp.astype(s * ratio > s[0], xp.int32))))


def sv_cumulative(s: Array, share: float) -> int:
    """Smallest ``k`` whose leading values hold ``share`` of ``sum(s)``; at least 1.

    Parameters
    ----------
    s : array, shape (k,)
        From large to small.
    share : float
        In (0, 1].
    """
    return max(1, energy_rank(s**0.5, share))


def sv_fro(s: Array, share: float) -> int:
    """Smallest ``k`` whose leading values hold ``share`` of the norm ``||s||_2``; at least 1.

    Parameters
    ----------
    s : array, shape (k,)
        From large to small.
    share : float
        In (0, 1]. Of the norm, while :func:`~lowrank_sp.linalg.spectrum.energy_rank` counts in
        squares.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return max(1, energy_rank(s, share**2))


def add(deltas: Sequence[Update], weights: Sequence[float] | None = None) -> LowRank:
    """Weighted sum of updates, exactly: the factors side by side, of rank ``sum r_i``.

    Parameters
    ----------
    deltas : sequence of LowRank or SVD, shape (m, n), or of what has such a ``delta()``
        Scales included: ``scale * LowRank(up, down)``. Ranks may differ.
    weights : sequence of float, optional
        By default all one. Negative ones subtract.

    Raises
    ------
    TypeError
        If a delta is not a product of factors, or dtypes or array libraries differ.
    ValueError
        If shapes differ, or something is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> one = LowRank(np.ones((4, 1)), np.ones((1, 3)))
    >>> add([one, one], [2.0, -1.0])
    LowRank(4 x 3, rank 2, float64)
    """
    return weighted_sum(*checked(deltas, weights))


def average(deltas: Sequence[Update], weights: Sequence[float] | None = None) -> LowRank:
    """Weighted mean of updates, exactly: :func:`add` with the weights divided by their sum.

    Parameters are those of :func:`add`; the sum of the weights must not be zero.
    """
    deltas, weights = checked(deltas, weights)
    total = math.fsum(weights)
    if total == 0.0:
        raise ValueError("the weights of a mean must not sum to zero; use add for a difference")
    return weighted_sum(deltas, [w / total for w in weights])


def subtract(
    trained: Update, start: Update, *, rank: int | None = None, tol: float | None = None
) -> SVD:
    r"""What training added to an adapter that did not start at zero.

    PiSSA and its kin move a part :math:`B_0 A_0` of the weight into the adapter. Against the
    untouched weight the trained adapter is the update

    .. math:: B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)

    of rank at most ``2r``, a plain LoRA.

    Parameters
    ----------
    trained, start : LowRank or SVD, shape (m, n)
        Leave out the common scale and multiply the result by it: then ``B - B_0`` is formed from
        the numbers that were stored, without rounding where they are close.
    rank, tol
        As in :func:`resize`.

    Returns
    -------
    SVD
        Of rank ``2r`` or ``rank``; ``error`` is what the truncation took. Multiply by the scale to
        use it with the original weight.

    Notes
    -----
    The right-hand side is used where it rounds less, which is when both factors moved little: its
    error is ``eps`` of the change, not of :math:`B A`. It needs both pairs in the gauge in which
    they were trained.

    Examples
    --------
    >>> import numpy as np
    >>> start = LowRank(np.eye(4, 2), np.eye(2, 3))
    >>> trained = LowRank(start.left + 2.0**-40, start.right)
    >>> f = subtract(trained, start)
    >>> f.s[:1] * 2**40, f.bounds[0] < 1e-20
    (array([2.82842712]), np.True_)
    """
    (new, old), _ = checked([trained, start], None)
    difference = weighted_sum([new, old], [1.0, -1.0])
    if new.rank == old.rank:
        moved = [
            LowRank(new.left - old.left, new.right),
            LowRank(old.left, new.right - old.right),
        ]
        balanced = weighted_sum(list(map(_balanced, moved)), [1.0, 1.0])
        difference = min(difference, balanced, key=_size)
    return resize(difference, rank=rank, tol=tol)


def checked(
    deltas: Sequence[Update], weights: Sequence[float] | None
) -> tuple[list[LowRank], list[float]]:
    """Updates that can be added, in their compute dtype, and one weight for each."""
    if not deltas:
        raise ValueError("a sum needs at least one update, got none")
    pairs = [factored(delta) for delta in deltas]
    first = pairs[0]
    for i, delta in enumerate(pairs):
        if len(delta.shape) != 2:
            raise ValueError(
                f"update {i} must be one matrix, got shape {delta.shape}; loop over the layers"
            )
        if delta.shape != first.shape:
            raise ValueError(
                f"updates must have one shape, got {first.shape} and {delta.shape} of update {i}; "
                "those of different layers or base models do not add"
            )
        namespace(first.like, delta.like)
        if delta.dtype != first.dtype:
            raise TypeError(
                f"updates must have one dtype, got {dtype_name(first.dtype)} and "
                f"{dtype_name(delta.dtype)} of update {i}; cast one of them first"
            )
    weights = [1.0] * len(pairs) if weights is None else [float(w) for w in weights]
    if len(weights) != len(pairs):
        raise ValueError(
            f"there must be one weight for each update, got {len(weights)} for {len(pairs)}"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    return [LowRank(*delta.factors()) for delta in pairs], weights


def factored(update: Any) -> Factored:
    """An update as a product of finite factors in its compute dtype, or an error where it is none.

    Of anything but a product, such as an initialization or a form of an adapter, ``delta()`` is
    asked for.
    """
    delta = update.delta() if hasattr(update, "delta") else update
    if not isinstance(delta, Factored):
        what = "" if delta is update else f"{type(update).__name__} with a delta that is "
        raise TypeError(
            f"an update must be a LowRank, or have a delta that is one, got {what}a "
            f"{type(delta).__name__}: updates of this form do not add as factors; make a LowRank "
            "of it first, by to_lora or truncated_svd"
        )
    if not isinstance(delta, SVD):
        delta = LowRank(*(as_compute(detached(factor)) for factor in delta.factors()))
    if not all(math.isfinite(max_abs(factor)) for factor in delta.factors()):
        raise ValueError("the factors of an update must be finite, got NaN or infinite entries")
    return delta


def weighted_sum(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_i weights[i] deltas[i]`` of updates that were checked."""
    xp = namespace(deltas[0].left)
    lefts = [d.left * w for d, w in zip(deltas, weights, strict=True)]
    return LowRank(xp.concat(lefts, axis=1), xp.concat([d.right for d in deltas], axis=0))


def _balanced(delta: LowRank) -> LowRank:
    """The same product with factors of about one norm, by a power of two."""
    left, right = frobenius(delta.left), frobenius(delta.right)
    if left == 0.0 or right == 0.0:
        return delta
    factor = 2.0 ** round(math.log2(right / left) / 2)
    return LowRank(delta.left * factor, delta.right / factor)


def _size(delta: LowRank) -> float:
    """To what the rounding of a product of factors is relative."""
    xp = namespace(delta.left)
    lengths = xp.linalg.vector_norm(delta.left, axis=0)
    return float(xp.sum(lengths * xp.linalg.vector_norm(delta.right, axis=1)))
