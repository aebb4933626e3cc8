"""What every completion solver does before and after its iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    frobenius,
    max_abs,
    namespace,
    standard_normal,
)
from lowrank_sp.factors import SVD, Factored, LowRank, check_rank
from lowrank_sp.inverse._problem import fits, power_of_two, with_residual
from lowrank_sp.inverse.entries import Entries, check_entries
from lowrank_sp.inverse.pattern import Identifiability, Pattern
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.linalg.svd import randomized_svd

Callback = Callable[[int, float, SVD], Any] | None


class Fit(NamedTuple):
    """``left @ right``, and what it leaves of the entries."""

    left: Array
    right: Array
    residual: Entries


def fit(entries: Entries, left: Array, right: Array) -> Fit:
    """The factors with their residual on ``entries``."""
    return Fit(left, right, entries.with_values(entries.values - entries.sampled(left, right)))


def relative_change(new: Entries, old: Entries, size: float) -> float:
    """Change of the residual, which is that of the model, relative to data of norm ``size``.

    Infinite where the new residual says that the method diverges.
    """
    # A start may be far worse than zero; from there a method has to come down first.
    fine = fits(new.norm(), max(size, old.norm()))
    return frobenius(new.values - old.values) / size if fine else math.inf


@dataclass(frozen=True)
class Problem:
    """Entries to complete: their identifiable part, scaled to a largest magnitude of about one.

    Attributes
    ----------
    entries : Entries
        What a solver works on.
    rank : int
    scale : float
        A power of two; the data are ``scale`` times these entries.
    shape : (int, int)
        Shape of the whole matrix.
    rows, cols : integer arrays
        Lines of the whole matrix that ``entries`` consists of.
    """

    entries: Entries
    rank: int
    scale: float
    shape: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def of(
        cls,
        entries: Entries,
        rank: int,
        *,
        allow_unidentified: bool = False,
        regularized: bool = False,
    ) -> Problem:
        """The problem of ``entries``, or an error that names the lines that are not identified.

        Parameters
        ----------
        entries : Entries
        rank : int
        allow_unidentified : bool
            Leave such lines out instead; :meth:`restore` makes them NaN.
        regularized : bool
            Whether the solution is unique as soon as every line has one entry.
        """
        check_entries(entries)
        shape = entries.pattern.shape
        rank = check_rank(rank, min(shape), shape)
        rows, cols = entries.pattern.core(1 if regularized else rank, connected=not regularized)
        whole = bool(np.all(rows) and np.all(cols))
        if not whole:
            if not allow_unidentified or not rows.any():
                raise ValueError(_message(entries.check_identifiable(1 if regularized else rank)))
            entries = _restricted(entries, rows, cols)
            rank = min(rank, *entries.shape)
        if not regularized and entries.size < (needed := rank * (sum(entries.shape) - rank)):
            raise ValueError(
                f"rank {rank} has {needed} degrees of freedom on the lines with enough entries, "
                f"got {entries.size} entries; lower the rank"
            )
        scale = power_of_two(max_abs(entries.values))
        return cls(
            entries.with_values(entries.values / scale),
            rank,
            scale,
            shape,
            np.flatnonzero(rows),
            np.flatnonzero(cols),
        )

    def start(self, init: Factored | None, rng: RNG = None) -> SVD:
        """``init`` on the lines and in the scale of the problem; by default a spectral start.

        That is the leading part of the zero-filled matrix, divided by the sampling rate, without
        lines of more than twice the mean number of entries :cite:p:`keshavan2010matrix`. There are
        ``rank`` triplets; some of them are zero if ``init`` has fewer.
        """
        if init is not None:
            return self._given(init)
        entries = self.entries
        m, n = entries.shape
        pattern = entries.pattern
        usual = (pattern.row_counts <= 2 * entries.size / m)[pattern.rows]
        usual &= (pattern.column_counts <= 2 * entries.size / n)[pattern.cols]
        xp = namespace(entries.values)
        # A trimmed matrix without entries, or of a few, would tell less than the whole one.
        if 2 * np.count_nonzero(usual) > entries.size:
            mask = xp.asarray(usual, device=device(entries.values))
            kept = xp.where(mask, entries.values, xp.zeros_like(entries.values))
            entries = entries.with_values(kept)
        found = randomized_svd(entries, self.rank, reads=3, oversampling=8, rng=rng)
        return SVD(found.u, found.s * (m * n / entries.size), found.vh)

    def _given(self, init: Factored) -> SVD:
        if tuple(init.shape) != self.shape:
            raise ValueError(f"init must have shape {self.shape}, got {tuple(init.shape)}")
        left, right = init.factors()
        xp = namespace(left, self.entries.values)
        rows = xp.asarray(self.rows, device=device(left))
        cols = xp.asarray(self.cols, device=device(left))
        left, right = xp.take(left, rows, axis=0), xp.take(right, cols, axis=1)
        found = LowRank(xp.astype(left, self.entries.dtype), xp.astype(right, self.entries.dtype))
        f = (found * (1 / self.scale)).svd()
        return f.truncate(self.rank) if f.rank >= self.rank else _padded(f, self.rank)

    def solve(
        self,
        step: Callable[[Any], tuple[Any, Any]],
        state: Any,
        *,
        value: Callable[[Any], Factored],
        stop: Stop,
        callback: Callback = None,
    ) -> Solution:
        """:func:`~lowrank_sp.iterate.iterate` with answers in the scale and shape of the data.

        ``value`` reads the factors off a state. The reason of the solution says how well the
        answer fits the entries.
        """
        if frobenius(self.entries.values) == 0.0:
            return Solution(self.restore(self.zero()), True, "the entries are all zero", 0, ())
        with self.entries.session():
            solution = iterate(
                step,
                state,
                stop=stop,
                dtype=self.entries.dtype,
                callback=callback,
                value=lambda state: self.restore(value(state)),
            )
        return with_residual(solution, self.relative_residual(solution.value), "on the entries")

    def relative_residual(self, x: Factored) -> float:
        """``||X - x||_F / ||X||_F`` over the entries, of a matrix in the shape of the data."""
        left, right = x.factors()
        xp = namespace(left)
        rows = xp.asarray(self.rows, device=device(left))
        cols = xp.asarray(self.cols, device=device(left))
        part = LowRank(xp.take(left, rows, axis=0) / self.scale, xp.take(right, cols, axis=1))
        return self.entries.relative_residual(part)

    def restore(self, x: Factored) -> SVD:
        """The SVD of a solution in the scale and shape of the data; NaN where lines are missing."""
        f = x if isinstance(x, SVD) else x.svd()
        u, vh = _expanded(f.u, self.rows, self.shape[0]), f.vh
        if vh.shape[1] < self.shape[1]:
            vh = _expanded(vh.mT, self.cols, self.shape[1]).mT
        return SVD(u, f.s * self.scale, vh)

    def zero(self) -> LowRank:
        """The zero matrix, in the shape of the entries."""
        xp = namespace(self.entries.values)
        where = {"dtype": self.entries.dtype, "device": self.entries.device}
        m, n = self.entries.shape
        left = xp.zeros((m, self.rank), **where)
        return LowRank(left, xp.zeros((self.rank, n), **where))


def spread(f: SVD) -> tuple[Array, Array]:
    """Positive ``a`` and some ``b`` with ``a b = s``: equal, but where ``s`` is next to zero.

    A method that solves for one factor at a time needs a start in which the other has no zeros.
    """
    xp = namespace(f.s)
    least = 0.01 * float(f.s[0]) or 1.0
    root = xp.where(f.s > least, f.s, xp.full_like(f.s, least)) ** 0.5
    return xp.astype(root, f.u.dtype), xp.astype(f.s / root, f.u.dtype)


def _padded(f: SVD, rank: int) -> SVD:
    """``f`` with further triplets of singular value zero."""
    xp = namespace(f.u)
    sides = []
    for u in (f.u, adjoint(f.vh)):
        more = standard_normal((u.shape[0], rank - f.rank), like=u, rng=rank)
        for _ in range(2):
            more = xp.linalg.qr(more - u @ (adjoint(u) @ more))[0]
        sides.append(xp.concat([u, more], axis=1))
    zeros = xp.zeros(rank - f.rank, dtype=f.s.dtype, device=device(f.s))
    return SVD(sides[0], xp.concat([f.s, zeros]), adjoint(sides[1]))


def _expanded(u: Array, lines: np.ndarray, size: int) -> Array:
    """Rows of ``u`` at ``lines`` of a taller array that is NaN elsewhere."""
    if u.shape[0] == size:
        return u
    xp = namespace(u)
    place = np.full(size, u.shape[0], dtype=np.int64)
    place[lines] = np.arange(len(lines))
    missing = xp.full((1, u.shape[1]), math.nan, dtype=u.dtype, device=device(u))
    where = xp.asarray(place, device=device(u))
    return xp.take(xp.concat([u, missing], axis=0), where, axis=0)


def _restricted(entries: Entries, rows: np.ndarray, cols: np.ndarray) -> Entries:
    """The entries within some lines, which are renumbered."""
    inside = entries.select(rows[entries.rows] & cols[entries.cols])
    place = [np.cumsum(lines) - 1 for lines in (rows, cols)]
    pattern = Pattern(
        place[0][inside.rows].astype(inside.rows.dtype),
        place[1][inside.cols].astype(inside.cols.dtype),
        (int(np.sum(rows)), int(np.sum(cols))),
    )
    return Entries.on(pattern, inside.values)


def _message(report: Identifiability) -> str:
    return (
        f"the entries do not determine a matrix of rank {report.rank}: {report}; "
        "lower the rank, or pass allow_unidentified=True to get NaN there"
    )
