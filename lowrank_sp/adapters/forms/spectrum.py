r"""The spectrum of the weight, trained in its own singular basis: shifts, or a sparse core.

The basis is stored. Computed again when an adapter is loaded, it would be another one wherever
singular values are close, by whole rotations, and in every sign; the trained numbers mean nothing
without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, from_host, namespace, to_host
from lowrank_sp.adapters.forms._draws import normal, template, zeros
from lowrank_sp.adapters.forms._form import Form, check_weight
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd


@dataclass(frozen=True, repr=False)
class SpectralShift(Form):
    r"""Singular values moved, vectors fixed: SVDiff :cite:p:`han2023svdiff`.

    .. math:: W + \Delta = U \operatorname{diag}(\max(\sigma + s\,\delta, 0))\, V^H, \qquad
              \Delta = U \operatorname{diag}(\max(s\,\delta, -\sigma))\, V^H

    The second formula is the one computed: it does not lose small shifts of large values.

    Attributes
    ----------
    u : array, shape (m, k)
    s : array, shape (k,)
        ``sigma``.
    vh : array, shape (k, n)
    shift : array, shape (k,)
        ``delta``.
    scale : float
        The authors train at 1, with a learning rate a thousand times the usual one.

    Examples
    --------
    >>> import numpy as np
    >>> form = SpectralShift.create(np.diag([4.0, 2.0]))
    >>> form.replace({"shift": np.array([1.0, -3.0])}).merge(np.diag([4.0, 2.0]))
    array([[5., 0.],
           [0., 0.]])
    """

    u: Fixed[Array, "m k"]
    s: Fixed[Array, "k"]
    vh: Fixed[Array, "k n"]
    shift: Trained[Array, "k"]
    scale: float = 1.0

    @classmethod
    def create(
        cls, weight: Array, rank: int | None = None, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """No shift, in the basis of all triplets, or of the leading ``rank``."""
        u, s, vh = truncated_svd(check_weight(weight, cls.__name__), rank, rng=rng)
        return cls(u, s, vh, namespace(s).zeros_like(s), scale)

    @property
    def rank_bound(self) -> int:
        return self.s.shape[0]

    def delta(self) -> LowRank:
        return LowRank(self.u * self._change(), self.vh)

    def apply(self, x: Array) -> Array:
        return ((x @ self.vh.mT) * self._change()) @ self.u.mT

    def _change(self) -> Array:
        moved = self.shift * self.scale
        return namespace(moved).where(moved > -self.s, moved, -self.s)


class Support(NamedTuple):
    """Places of a square matrix, as integer arrays on the host, none twice."""

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def banded(cls, size: int, width: int = 0) -> Self:
        """The diagonal and ``width`` diagonals on each side of it."""
        _at_least(0, width=width)
        rows = np.arange(size)[:, None]
        columns = rows + np.arange(-width, width + 1)[None, :]
        rows = np.broadcast_to(rows, columns.shape)
        inside = (columns >= 0) & (columns < size)
        return cls(rows[inside], columns[inside])

    @classmethod
    def random(cls, size: int, count: int, *, rng: RNG = None) -> Self:
        """``count`` places, drawn without replacement."""
        _at_least(1, count=count)
        drawn = np.random.default_rng(rng).choice(size**2, count, replace=False, shuffle=False)
        return cls(*np.divmod(drawn, size))

    @classmethod
    def largest(cls, scores: Array, count: int) -> Self:
        """The ``count`` largest entries of ``scores``, shape (k, k), of equal ones the first."""
        _at_least(1, count=count)
        host = to_host(scores)
        if host.ndim != 2 or host.shape[0] != host.shape[1]:
            raise ValueError(f"scores must be square, got shape {host.shape}")
        best = np.argsort(-host.reshape(-1), kind="stable")[:count]
        return cls(*np.divmod(best, host.shape[0]))


@dataclass(frozen=True, repr=False)
class SparseCore(Form):
    r"""A sparse core in the singular basis of the weight: SVFT :cite:p:`lingam2024svft`.

    .. math:: \Delta = \sigma(g)\, U M V^H, \qquad M_{ij} = 0 \text{ outside a fixed support}

    with the logistic function of a trained gate. Nothing is taken from the weight, so a basis of
    fewer than all triplets loses nothing either.

    Attributes
    ----------
    u : array, shape (m, k)
    vh : array, shape (k, n)
    rows, columns : integer arrays, shape (z,)
        Where the entries stand; see Notes for their order.
    values : array, shape (z,)
    gate : array, shape (1,)
    counts : tuple of int
        How many rows have a first entry, a second one, and so on.

    Notes
    -----
    ``2 k (m + n)`` flops per input for the basis and ``2 z`` for the core: twice those of the
    weight, if it is square and all of its triplets are taken. Entries are ordered by jagged
    diagonals: the first entry of every row, rows with more entries before others, then the second
    entry of every row that has one. The core is then applied by gathers and sums of slices alone.

    Examples
    --------
    >>> import numpy as np
    >>> form = SparseCore.create(np.diag([4.0, 2.0, 1.0]), Support.banded(3, 1), rng=0)
    >>> form.counts, form.num_trainable
    ((3, 3, 1), 8)
    >>> float(form.core_matrix()[0, 2])
    0.0
    """

    u: Fixed[Array, "m k"]
    vh: Fixed[Array, "k n"]
    rows: Fixed[Array, "z"]
    columns: Fixed[Array, "z"]
    values: Trained[Array, "z"]
    gate: Trained[Array, "1"]
    counts: tuple[int, ...]

    @classmethod
    def create(
        cls,
        weight: Array,
        support: Support,
        rank: int | None = None,
        *,
        rng: RNG = None,
    ) -> Self:
        """Values of variance ``2 / z`` and ``sigma(g) = 1/2``: not zero, as published.

        Parameters
        ----------
        weight : array, shape (m, n)
        support : Support
            Places in a core of ``rank`` rows and columns.
        rank : int, optional
            Of the leading triplets only; by default all, ``min(m, n)``.
        rng : int, Generator or None
        """
        generator = np.random.default_rng(rng)
        f = truncated_svd(check_weight(weight, cls.__name__), rank, rng=generator)
        _, like = template(weight)
        count = len(support.rows)
        values = normal((count,), (2 / max(count, 1)) ** 0.5, like, generator)
        return cls.at(f.u, f.vh, support, values, zeros((1,), like))

    @classmethod
    def at(cls, u: Array, vh: Array, support: Support, values: Array, gate: Array) -> Self:
        """With entries in the order of ``support``, whatever it is."""
        rows, columns = (np.asarray(index) for index in support)
        check_rank(int(max(rows.max(initial=0), columns.max(initial=0))) + 1, u.shape[1], u.shape)
        flat = rows * u.shape[1] + columns
        if rows.shape[0] == 0 or np.unique(flat).shape[0] < flat.shape[0]:
            raise ValueError("support must have at least one place and none of them twice")
        order, counts = _jagged(rows, columns)
        xp = namespace(values)
        index = from_host(order, values, xp.int64)
        return cls(
            u,
            vh,
            from_host(rows[order], values, xp.int64),
            from_host(columns[order], values, xp.int64),
            xp.take(values, index),
            gate,
            counts,
        )

    @property
    def rank_bound(self) -> int:
        return self.u.shape[1]

    def core_matrix(self) -> Array:
        """``M``, dense, without the gate."""
        xp = namespace(self.values)
        one = xp.eye(self.u.shape[1], dtype=self.values.dtype, device=device(self.values))
        return self._times_core(one).mT

    def delta(self) -> LowRank:
        return LowRank(self.u * self._opening(), self._times_core(self.vh.mT).mT)

    def apply(self, x: Array) -> Array:
        return (self._times_core(x @ self.vh.mT) * self._opening()) @ self.u.mT

    def _opening(self) -> Array:
        return 1.0 / (1.0 + namespace(self.gate).exp(-self.gate))

    def _times_core(self, z: Array) -> Array:
        """``z @ M.T`` for ``z`` of shape ``(..., k)``."""
        xp = namespace(self.values)
        total, stop = None, self.values.shape[0]
        # From the last jagged diagonal to the first, which is the longest.
        for count in reversed(self.counts):
            part = slice(stop - count, stop)
            term = xp.take(z, self.columns[part], axis=-1) * self.values[part]
            if total is not None:
                shorter = total.shape[-1]
                total = xp.concat([term[..., :shorter] + total, term[..., shorter:]], axis=-1)
            else:
                total = term
            stop -= count
        return xp.take(self._with_zero(total), self._place_of_rows(), axis=-1)

    def _with_zero(self, total: Array) -> Array:
        """One more entry, for rows that have none."""
        xp = namespace(total)
        return xp.concat([total, xp.zeros_like(total[..., :1])], axis=-1)

    def _place_of_rows(self) -> Array:
        """Where in the order of the first jagged diagonal each row stands."""
        xp = namespace(self.rows)
        first = self.rows[: self.counts[0]]
        order = xp.argsort(first)
        ascending = xp.take(first, order)
        every = xp.arange(self.u.shape[1], dtype=first.dtype, device=device(first))
        at = xp.searchsorted(ascending, every)
        last = first.shape[0] - 1
        at = xp.where(at > last, xp.full_like(at, last), at)
        found = xp.take(ascending, at) == every
        place = xp.take(order, at)
        return xp.where(found, place, xp.full_like(place, first.shape[0]))


def _jagged(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Order of entries by jagged diagonals, and the lengths of these."""
    degree = np.bincount(rows)
    # Rank of each entry within its row.
    by_row = np.lexsort((columns, rows))
    starts = np.concatenate([[0], np.cumsum(degree)[:-1]])
    within = np.empty_like(rows)
    within[by_row] = np.arange(rows.shape[0]) - starts[rows[by_row]]
    order = np.lexsort((rows, -degree[rows], within))
    return order, tuple(int(count) for count in np.bincount(within))


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
