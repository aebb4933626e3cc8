r"""A product plus entries at fixed places."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    from_host,
    namespace,
    placed,
    slices,
    to_host,
)
from lowrank_sp.adapters.algebra.blocks import blocks_of, kth_largest
from lowrank_sp.adapters.forms._draws import Like, template, uniform, zeros
from lowrank_sp.adapters.forms._form import Form, Product
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.adapters.forms._sparse import random_places
from lowrank_sp.inverse.separation import LowRankPlusSparse

# Entries of a block of rows in which the sparse part is laid out to be multiplied.
_BLOCK = 2**20


class _Sparse(Form, ABC):
    """Values at fixed places, laid out and multiplied by blocks of rows."""

    values: Array
    places: Array
    cuts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        places, (m, n) = to_host(self.places), self.shape
        if len(places) and not (
            np.all(places[1:] > places[:-1]) and places[0] >= 0 and places[-1] < m * n
        ):
            raise ValueError(
                f"places must be sorted, distinct and in 0..{m * n - 1}; numpy.unique sorts them"
            )
        starts = np.arange(0, m + self._height, self._height).clip(max=m) * n
        cuts = tuple(int(cut) for cut in np.searchsorted(places, starts))
        object.__setattr__(self, "cuts", cuts)

    def sparse(self) -> Array:
        """The sparse part, as a dense array."""
        return self._laid_out(slice(0, self.shape[0]), slice(None))

    def _apply_sparse(self, x: Array) -> Array:
        blocks = zip(slices(self.shape[0], self._height), pairwise(self.cuts), strict=True)
        parts = [x @ self._laid_out(rows, slice(*part)).mT for rows, part in blocks]
        return parts[0] if len(parts) == 1 else namespace(x).concat(parts, axis=-1)

    @property
    def _height(self) -> int:
        return max(1, _BLOCK // self.shape[1])

    def _laid_out(self, rows: slice, part: slice) -> Array:
        height, n = rows.stop - rows.start, self.shape[1]
        flat = placed(self.values[part], self.places[part] - rows.start * n, height * n)
        return namespace(flat).reshape(flat, (height, n))


@dataclass(frozen=True, repr=False)
class Sparse(_Sparse):
    r"""A sparse matrix of fixed support, :math:`\Delta = s S`: SHiRA :cite:p:`bhardwaj2024sparse`.

    It has the trained numbers of LoRA, at a rank up to ``min(m, n)``. Adapters with different
    supports hardly disturb each other, and are switched by writing a few entries of the weight.

    Attributes
    ----------
    values : array, shape (k,)
        Entries of ``S``.
    places : integer array, shape (k,)
        Where they stand, ``i n + j`` for row ``i`` and column ``j``: sorted and distinct.
    size : (int, int)
        Shape ``(m, n)`` of the weight.
    scale : float
        ``s``.
    cuts : tuple of int
        How many places come before every block of rows; found if not given.

    Notes
    -----
    Multiplied by blocks of rows, as in :class:`ProductPlusSparse`.

    Examples
    --------
    >>> import numpy as np
    >>> form = Sparse.create((3, 4), places=np.array([1, 6]))
    >>> form.replace({"values": np.array([5.0, 7.0])}).delta()
    array([[0., 5., 0., 0.],
           [0., 0., 7., 0.],
           [0., 0., 0., 0.]])
    """

    values: Trained[Array, "k"]
    places: Fixed[Array, "k"]
    size: tuple[int, int]
    scale: float = 1.0
    cuts: tuple[int, ...] = ()

    @classmethod
    def create(cls, weight: Like, *, places: Array) -> Self:
        """All values zero.

        ``places`` come from :func:`largest_places`, of the magnitudes of the weight or of its
        gradient, or from :func:`~lowrank_sp.updates.random_support`.
        """
        size, like = template(weight)
        return cls(zeros((int(places.shape[0]),), like), places, size)

    @classmethod
    def create_random(cls, weight: Like, rank: int, *, rng: RNG = None) -> Self:
        """As many random places as plain LoRA of a rank has trained numbers, ``r (m + n)``.

        It is the number that PEFT expects, for any places.
        """
        size, like = template(weight)
        drawn = random_places(math.prod(size), rank * sum(size), rng)
        return cls.create(weight, places=_integers(drawn, like, math.prod(size)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        return min(*self.size, self.values.shape[0])

    def delta(self) -> Array:
        return self.sparse() * self.scale

    def apply(self, x: Array) -> Array:
        return self._apply_sparse(x) * self.scale


@dataclass(frozen=True, repr=False)
class ProductPlusSparse(_Sparse):
    r"""A product and a sparse matrix of fixed support, :math:`\Delta = s B A + S`.

    RoSA :cite:p:`nikdan2024rosa` takes the largest entries of an accumulated gradient for the
    support (:func:`largest_places`), SLTrain :cite:p:`han2024sltrain` random ones
    (:func:`~lowrank_sp.updates.random_support`). The rank is up to ``min(m, n)``.

    Attributes
    ----------
    up : array, shape (m, r)
    down : array, shape (r, n)
    values : array, shape (k,)
        Entries of ``S``, which ``scale`` does not multiply.
    places : integer array, shape (k,)
        Where they stand, ``i n + j`` for row ``i`` and column ``j``: sorted and distinct.
    scale : float
        ``s``.
    cuts : tuple of int
        How many places come before every block of rows; found if not given.

    Notes
    -----
    A block of rows of ``S`` is laid out at a time and multiplied as a dense one: ``2 m n`` flops
    per input, as many as the weight takes, but no array of its size, and faster on many inputs
    than sparse kernels at the usual densities. A library that differentiates keeps the blocks.

    Examples
    --------
    >>> import numpy as np
    >>> form = ProductPlusSparse.create((3, 4), rank=1, places=np.array([1, 6]), rng=0)
    >>> form.replace({"values": np.array([5.0, 7.0])}).delta()
    array([[0., 5., 0., 0.],
           [0., 0., 7., 0.],
           [0., 0., 0., 0.]])
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    values: Trained[Array, "k"]
    places: Fixed[Array, "k"]
    scale: float = 1.0
    cuts: tuple[int, ...] = ()

    products = (("up", "down"),)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        places: Array,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """RoSA: all values zero, the product as :meth:`Product.create` makes it.

        ``places`` come from :func:`largest_places` or
        :func:`~lowrank_sp.updates.random_support`.
        """
        form = Product.create(weight, rank, alpha=alpha, rng=rng)
        count = int(places.shape[0])
        return cls(form.up, form.down, zeros((count,), form.up), places, form.scale)

    @classmethod
    def create_values(
        cls,
        weight: Like,
        rank: int,
        *,
        places: Array,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """SLTrain, where this is all of a weight: values uniform within ``1 / sqrt(n)``."""
        generator = np.random.default_rng(rng)
        form = cls.create(weight, rank, places=places, alpha=alpha, rng=generator)
        values = uniform((int(places.shape[0]),), form.shape[1] ** -0.5, form.up, generator)
        return cls(form.up, form.down, values, places, form.scale)

    @classmethod
    def from_parts(cls, parts: LowRankPlusSparse) -> Self:
        """A trained update taken apart by one of :mod:`lowrank_sp.inverse.robust`.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank_sp.inverse import robust
        >>> rng = np.random.default_rng(0)
        >>> delta = rng.standard_normal((80, 2)) @ rng.standard_normal((2, 60))
        >>> delta[rng.random((80, 60)) < 0.02] += 9.0
        >>> parts = robust.alternating_projections(delta, rank=2, rng=0).value
        >>> bool(np.allclose(ProductPlusSparse.from_parts(parts).delta(), delta, atol=1e-5))
        True
        """
        up, down = parts.low_rank.split().factors()
        host = to_host(parts.sparse).reshape(-1)
        places = np.flatnonzero(host)
        return cls(up, down, from_host(host[places], up), _integers(places, up, host.size))

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.up.shape[1] + self.values.shape[0])

    def delta(self) -> Array:
        return (self.up * self.scale) @ self.down + self.sparse()

    def apply(self, x: Array) -> Array:
        y = ((x @ self.down.mT) * self.scale) @ self.up.mT
        return y + self._apply_sparse(x)


def largest_places(scores: Array, density: float) -> Array:
    """Places of the largest magnitudes, such as of a gradient summed over some steps.

    Parameters
    ----------
    scores : array, shape (m, n)
        Also memory-mapped or in half precision: it is read by blocks of rows, a few times.
    density : float
        Share of the entries, in (0, 1].

    Returns
    -------
    integer array, shape (k,)
        Sorted. Where entries are equal, the first.

    Examples
    --------
    >>> import numpy as np
    >>> largest_places(np.array([[1.0, -5.0], [0.0, 2.0]]), 0.5)
    array([1, 3], dtype=int32)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    (m, n), like = template(scores)
    count = max(1, math.floor(density * m * n))

    def read(start: int, stop: int) -> Array:
        return abs(as_compute(scores[start:stop, :]))

    level = kth_largest(read, (m, n), count)
    above, equal = [], []
    for start, block in blocks_of(read, (m, n)):
        host = to_host(block).reshape(-1)
        above.append(np.flatnonzero(host > level) + start * n)
        equal.append(np.flatnonzero(host == level) + start * n)
    larger = np.concatenate(above)
    ties = np.concatenate(equal)[: count - len(larger)]
    if len(larger) + len(ties) < count:
        raise ValueError("scores must not be NaN; leave out the batches that overflowed")
    return _integers(np.sort(np.concatenate([larger, ties])), like, m * n)


def _integers(places: np.ndarray, like: Array, size: int) -> Array:
    xp = namespace(like)
    return from_host(places, like, xp.int32 if size < 2**31 else xp.int64)
