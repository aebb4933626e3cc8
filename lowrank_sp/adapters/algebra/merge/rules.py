"""Rules that merge entry by entry: sparsify every update, then combine what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowrank_sp._arrays import Array, from_host, is_complex, namespace
from lowrank_sp.adapters.algebra.blocks import Read, height, kth_largest
from lowrank_sp.adapters.algebra.sums import weighted_sum
from lowrank_sp.factors import LowRank
from lowrank_sp.operators import Rows

#: ``mask(start, rows)`` sparsifies a block of rows.
Mask = Callable[[int, Array], Array]


class Sparsifier(Protocol):
    """Which entries of a matrix are kept."""

    def mask(self, read: Read, shape: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """The map of row blocks that keeps them and puts zero elsewhere."""
        ...


@dataclass(frozen=True)
class Trim:
    """Keeps the share ``density`` of the entries that is largest in magnitude.

    All that equal the smallest kept one are kept. The threshold is found in two reads of the matrix
    in single precision, four in double.
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def mask(self, read: Read, shape: tuple[int, ...], rng: np.random.Generator) -> Mask:
        del rng
        kept = max(1, int(self.density * shape[0] * shape[1]))
        if kept == shape[0] * shape[1]:
            return lambda _, block: block
        threshold = kth_largest(read, shape, kept)

        def trim(start: int, block: Array) -> Array:
            del start
            return block * namespace(block).astype(abs(block) >= threshold, block.dtype)

        return trim


@dataclass(frozen=True)
class Drop:
    """Keeps every entry with probability ``density`` and divides it by that.

    The draws depend on the seed and the shape, not on the array library or the dtype, and are made
    anew at every read.
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def mask(self, read: Read, shape: tuple[int, ...], rng: np.random.Generator) -> Mask:
        del read, shape
        seed = int(rng.integers(2**63))

        def drop(start: int, block: Array) -> Array:
            draw = np.random.default_rng((seed, start)).random(block.shape, dtype=np.float32)
            return block * from_host(draw < self.density, block) / self.density

        return drop


@dataclass(frozen=True)
class EntryRule:
    r"""Sparsify every update, then combine them entry by entry.

    Without election the sparse updates are summed, :math:`X = \sum_i w_i \tilde\Delta_i`. With it,
    every entry is the mean of those terms :math:`w_i \tilde\Delta_i` that have the sign of their
    sum, so that updates which pull apart do not cancel. For equal updates such a mean is
    :math:`\frac1T \sum_i w_i \Delta_i`, which is therefore what its error is measured against.

    The rules that have a name: :func:`magnitude_prune`, :func:`dare`, :func:`ties`,
    :func:`dare_ties`. Where a rule is applied is another choice: to the updates
    (:func:`entrywise`), in their common subspace (:func:`knots`), or to the factors
    (:func:`factorwise`).

    Attributes
    ----------
    sparsify : Trim or Drop
        How every update is made sparse.
    elect : bool
        Whether signs are elected; needs real data.
    """

    sparsify: Sparsifier
    elect: bool = False

    def rows(
        self,
        reads: Sequence[Read],
        weights: Sequence[float],
        shape: tuple[int, ...],
        *,
        like: Array,
        rng: np.random.Generator,
    ) -> Rows:
        """The merged matrix, block of rows by block of rows as it is read."""
        if self.elect and is_complex(like.dtype):
            raise TypeError("complex updates have no sign to elect; use a rule without election")
        masks = [
            self.sparsify.mask(read, shape, child)
            for read, child in zip(reads, rng.spawn(len(reads)), strict=True)
        ]
        combine = elected_mean if self.elect else total

        def merged(start: int, stop: int) -> Array:
            terms = zip(reads, masks, weights, strict=True)
            return combine([mask(start, read(start, stop)) * w for read, mask, w in terms])

        return Rows((shape[0], shape[1]), merged, like=like, rows=height(shape[1]))

    def reference(self, deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """What the rule gives for updates that are dense and agree in sign everywhere."""
        share = 1.0 / len(weights) if self.elect else 1.0
        return weighted_sum(deltas, [w * share for w in weights])


def magnitude_prune(density: float) -> EntryRule:
    """Sum of the largest entries of every update.

    Parameters
    ----------
    density : float
        Share of the entries that is kept, in (0, 1].
    """
    return EntryRule(Trim(density))


def dare(density: float) -> EntryRule:
    """Sum of randomly thinned updates, whose expected value is the weighted sum.

    Parameters
    ----------
    density : float
        Probability with which an entry is kept, in (0, 1] :cite:p:`yu2024dare`.
    """
    return EntryRule(Drop(density))


def ties(density: float) -> EntryRule:
    """Trim, elect a sign for every entry, average those that have it :cite:p:`yadav2023ties`.

    Signs are elected by the sum of the weighted entries, so that a negative weight votes for the
    sign that it brings.

    Parameters
    ----------
    density : float
        Share of the entries that is kept, in (0, 1].
    """
    return EntryRule(Trim(density), elect=True)


def dare_ties(density: float) -> EntryRule:
    """:func:`ties` of updates that are thinned at random instead of trimmed.

    Parameters
    ----------
    density : float
        Probability with which an entry is kept, in (0, 1].
    """
    return EntryRule(Drop(density), elect=True)


def total(terms: Sequence[Array]) -> Array:
    """Sum of the terms."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def elected_mean(terms: Sequence[Array]) -> Array:
    """Entry by entry, the mean of the terms that have the sign of their sum; zero for none.

    A sum of zero counts as positive.
    """
    xp = namespace(*terms)
    # Products instead of xp.where, whose branches on random signs cost five times as much.
    sign = 1 - 2 * xp.astype(total(terms) < 0, terms[0].dtype)
    zero, one = xp.zeros_like(sign), xp.ones_like(sign)
    kept = count = zero
    for term in terms:
        turned = term * sign
        kept = kept + xp.maximum(turned, zero)
        count = count + xp.astype(turned > 0, sign.dtype)
    return sign * kept / xp.maximum(count, one)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}; it is the share that is kept")
