"""Rank and regularization by withheld entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG
from lowrank_sp.inverse.completion.alternating import als
from lowrank_sp.inverse.entries import Entries, check_entries
from lowrank_sp.iterate import Solution, Stop

Solver = Callable[[Entries, int, float], Solution]


class Score(NamedTuple):
    """How one choice does: relative errors on withheld and on fitted entries, over all splits.

    ``error`` is the root mean square over the splits, and ``spread`` the standard error of it.
    ``error`` is infinite where the kept entries do not determine a matrix of that rank.
    """

    rank: int
    regularization: float
    error: float
    spread: float
    fit: float


@dataclass(frozen=True)
class Selection:
    """The choice that predicts withheld entries best, and the whole curve.

    Attributes
    ----------
    rank : int
    regularization : float
    error : float
        Its relative error on withheld entries.
    curve : tuple of Score
        In the order of ranks, then regularizations.
    """

    rank: int
    regularization: float
    error: float
    curve: tuple[Score, ...]


def select_rank(
    entries: Entries,
    ranks: Sequence[int],
    *,
    regularizations: Sequence[float] = (0.0,),
    solver: Solver | None = None,
    share: float = 0.1,
    splits: int = 3,
    rng: RNG = None,
) -> Selection:
    """Choose rank and regularization by the error on withheld entries.

    Parameters
    ----------
    entries : Entries
    ranks : sequence of int
    regularizations : sequence of float
    solver : callable, optional
        ``solver(entries, rank, regularization)`` returns a Solution; by default :func:`als`, to a
        change of 1e-4 in at most 200 sweeps.
    share : float
        Share of the entries that a split withholds.
    splits : int
        Random splits, the same ones for every choice.
    rng : int, Generator or None

    Returns
    -------
    Selection
        Among choices within one standard error of the best, the one of least rank, then of most
        regularization: errors of nearby ranks differ by less than the splits do.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(80, 60), rank=3, oversampling=6, noise=0.1, rng=0)
    >>> select_rank(p.entries, range(1, 7), rng=0).rank
    3
    """
    check_entries(entries)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    if not ranks or not regularizations:
        raise ValueError("ranks and regularizations must have at least one value each")
    generator = np.random.default_rng(rng)
    pairs = [entries.split(share, generator) for _ in range(splits)]
    solver = _als if solver is None else solver
    curve = tuple(
        _score(pairs, int(rank), float(regularization), solver)
        for rank in ranks
        for regularization in regularizations
    )
    best = min(curve, key=lambda score: score.error)
    if not math.isfinite(best.error):
        raise ValueError(
            f"the entries that are kept do not determine a matrix of any rank in {list(ranks)}; "
            "lower the ranks or the share, or regularize"
        )
    close = [score for score in curve if score.error <= best.error + best.spread]
    chosen = min(close, key=lambda score: (score.rank, -score.regularization))
    return Selection(chosen.rank, chosen.regularization, chosen.error, curve)


def _als(entries: Entries, rank: int, regularization: float) -> Solution:
    stop = Stop(max_iter=200, tol=1e-4)
    return als(entries, rank=rank, regularization=regularization, stop=stop, rng=0)


def _score(
    pairs: list[tuple[Entries, Entries]], rank: int, regularization: float, solver: Solver
) -> Score:
    errors, fits = [], []
    for kept, withheld in pairs:
        rows, cols = kept.pattern.core(1, connected=False)
        lines = rows.all() and cols.all()
        if not (lines if regularization else kept.check_identifiable(rank).complete):
            return Score(rank, regularization, math.inf, math.inf, math.nan)
        value = solver(kept, rank, regularization).value
        errors.append(withheld.relative_residual(value))
        fits.append(kept.relative_residual(value))
    mean = float(np.mean(np.square(errors))) ** 0.5
    spread = float(np.std(errors)) / max(1, len(errors) - 1) ** 0.5
    return Score(rank, regularization, mean, spread, float(np.mean(np.square(fits))) ** 0.5)
