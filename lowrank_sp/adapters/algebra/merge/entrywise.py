"""Merging entry by entry, of the updates or of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from lowrank_sp._arrays import RNG, Array
from lowrank_sp.adapters.algebra.blocks import distance, rows_of
from lowrank_sp.adapters.algebra.merge.exact import Merged
from lowrank_sp.adapters.algebra.merge.rules import EntryRule, magnitude_prune
from lowrank_sp.adapters.algebra.sums import Update, checked
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.svd import truncated_svd


def entrywise(
    deltas: Sequence[Update],
    weights: Sequence[float] | None = None,
    *,
    rule: EntryRule,
    rank: int | None = None,
    tol: float | None = None,
    rng: RNG = None,
) -> Merged:
    r"""Merge the entries of the updates by a rule, and take the best approximation of low rank.

    Parameters
    ----------
    deltas, weights
        As in :func:`cat`.
    rule : EntryRule
        :func:`ties`, :func:`dare`, :func:`dare_ties` or :func:`magnitude_prune`.
    rank, tol
        As in :func:`~lowrank_sp.linalg.svd.truncated_svd`. One of them is needed, since the merged
        entries are a matrix of full rank.
    rng : int, Generator or None
        Seed of the random entries and of the SVD.

    Returns
    -------
    Merged
        ``truncation`` is :math:`\lVert M - X \rVert_F` for the merged matrix ``M`` of full rank.

    Notes
    -----
    ``M`` is never stored. Its blocks of rows are computed from the factors whenever they are read,
    in a few megabytes; every read costs ``2 m n sum r_i`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.adapters.algebra.merge import ties
    >>> rng = np.random.default_rng(0)
    >>> deltas = [LowRank(rng.normal(size=(40, 2)), rng.normal(size=(2, 30))) for _ in range(3)]
    >>> merged = entrywise(deltas, rule=ties(density=0.2), rank=4)
    >>> merged.value
    SVD(40 x 30, rank 4, float64)
    """
    pairs, weights = checked(deltas, weights)
    if rank is None and tol is None:
        raise ValueError("entries merged by a rule have full rank: pass rank or tol")
    generator = np.random.default_rng(rng)
    first = pairs[0]
    reads = [rows_of(delta) for delta in pairs]
    full = rule.rows(reads, weights, first.shape, like=first.like[:0, :0], rng=generator)
    f = truncated_svd(full, rank, tol=tol, rng=generator)
    exact = rule.reference(pairs, weights)
    return Merged(f, exact, (f - exact).norm(), distance(full, f))


def factorwise(
    deltas: Sequence[Update],
    weights: Sequence[float] | None = None,
    *,
    rule: EntryRule,
    rng: RNG = None,
) -> Merged:
    r"""Merge the factors by a rule, left with left and right with right.

    What PEFT does under the names ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune``.
    Both factors are weighted by :math:`\sqrt{|w_i|}`, the right one with the sign of
    :math:`w_i`, and their product has cross terms between the updates.

    **The result depends on the gauge**: other factors of the same updates give another one.
    Prefer :func:`entrywise`.

    Parameters
    ----------
    deltas : sequence of LowRank or SVD, shape (m, n)
        All of one rank. For PEFT's result, ``LowRank(up, down)`` without the scale, and the scale
        multiplied into the weight.
    weights, rule, rng
        As in :func:`entrywise`.
    """
    pairs, weights = checked(deltas, weights)
    ranks = [delta.rank for delta in pairs]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"factors of one rank are needed to merge them, got ranks {ranks}; use svd or cat"
        )
    generator = np.random.default_rng(rng)

    def merge(factors: list[Array], roots: list[float]) -> Array:
        reads = [partial(_rows_of_array, factor) for factor in factors]
        shape, like = factors[0].shape, factors[0][:0, :0]
        return rule.rows(reads, roots, shape, like=like, rng=generator).to_dense()

    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    value = LowRank(
        merge([delta.left for delta in pairs], roots),
        merge([delta.right for delta in pairs], signed),
    )
    exact = rule.reference(pairs, weights)
    return Merged(value, exact, (value - exact).norm(), 0.0)


def linear(deltas: Sequence[Update], weights: Sequence[float] | None = None) -> Merged:
    r"""Weighted sums of the factors: PEFT's ``linear``, which is not the sum of the updates.

    .. math:: B = \sum_i \sqrt{|w_i|}\, B_i, \qquad
              A = \sum_i \operatorname{sgn}(w_i) \sqrt{|w_i|}\, A_i, \qquad
              B A = \sum_i w_i B_i A_i + \sum_{i \ne j} \dots

    The cross terms are its ``error``, and **depend on the gauge**. :func:`svd` costs as little and
    is the best that the rank allows.

    Parameters
    ----------
    deltas, weights
        As in :func:`factorwise`.
    """
    return factorwise(deltas, weights, rule=magnitude_prune(1.0))


def _rows_of_array(a: Array, start: int, stop: int) -> Array:
    return a[start:stop, :]
