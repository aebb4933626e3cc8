"""Tensor trains of functions of many indices: cross approximation from few of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, eps, to_host
from lowrank_sp.factors import check_rank
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.factored import moved
from lowrank_sp.tensors.ranks import tt_rank
from lowrank_sp.tensors.tt import TT


@dataclass(frozen=True)
class _State:
    """Pivots of every bond ``k``, and the train that interpolates them.

    ``left[k]`` holds the first ``k`` indices of its pivots, ``right[k]`` the others.
    """

    left: tuple[np.ndarray, ...]
    right: tuple[np.ndarray, ...]
    train: TT
    worst: np.ndarray  # where the train was worst among the points it was last tested at
    size: float  # root mean square of the values seen at random points
    sweeps: int


def tt_cross(
    function: Callable[[np.ndarray], Array],
    shape: Sequence[int],
    *,
    rank: int,
    init: np.ndarray | None = None,
    rng: RNG = None,
    stop: Stop = Stop(max_iter=20),
    callback: Callable[[int, float, Any], Any] | None = None,
    held_out: int = 1000,
) -> Solution:
    r"""Tensor train of a function of ``N`` indices, from the values on crosses of its unfoldings.

    .. math:: X \approx X[:, J]\, X[I, J]^{-1} X[I, :] \quad \text{for every unfolding}

    A sweep visits all pairs of neighbouring cores, evaluates the function on their indices and the
    pivots around them, and finds new pivots by Gaussian elimination with complete pivoting, as many
    as the tolerance needs. The point where a train was worst at last is a pivot of the next one. No
    dense tensor is ever formed.

    Parameters
    ----------
    function : callable
        From a host array of indices, shape ``(M, N)``, to the values there, shape ``(M,)``, an
        array of any library.
    shape : sequence of int
    rank : int
        Most pivots of a bond.
    init : integer array, shape (P, N), optional
        Positions of the first pivots, such as known peaks; by default the largest of the random
        points at which the first train is tested.
    rng : int, Generator or None
    stop : Stop
        The change is the error at random points, relative to the values there, in the root mean
        square.
    callback : callable, optional
    held_out : int
        Random points that each train is tested at. They are drawn anew for each sweep.

    Returns
    -------
    Solution
        ``value`` is a :class:`TT` whose ``error`` estimates the Frobenius norm of the difference
        from the points held out. ``converged`` is False where ``rank`` was too small.

    Raises
    ------
    ValueError
        If a value is not finite.

    Notes
    -----
    ``O(N r^2 n^2)`` values and ``O(N r^3 n^2)`` flops a sweep :cite:p:`oseledets2010cross`. What
    neither a pivot nor a random point touches stays unseen.

    Examples
    --------
    >>> import numpy as np
    >>> solution = tt_cross(lambda i: 1 / (1.0 + i.sum(axis=1)), (20,) * 6, rank=12, rng=0)
    >>> solution.converged, solution.value.error < 1e-6 * solution.value.norm()
    (True, True)
    """
    shape = tuple(shape)
    most = max(tt_rank(None, shape))
    rank = min(check_rank(rank, max(rank, most), shape), most)
    generator = np.random.default_rng(rng)
    points = np.stack([generator.integers(n, size=held_out) for n in shape], axis=1)
    first = function(points)
    like = as_compute(first)[:0]
    values = _finite(first)
    size = _root_mean_square(values)
    if init is None:
        init = points[np.argmax(np.abs(values))][None, :]
    tol = stop.resolve(like.dtype) or eps(like.dtype)
    init = np.asarray(init)
    bonds = range(len(shape) + 1)
    left, right = tuple(init[:1, :k] for k in bonds), tuple(init[:1, k:] for k in bonds)
    left, right = _with_pivots(left, right, init)
    zero = TT([np.zeros((1, n, 1), values.dtype) for n in shape])
    start = _State(left, right, zero, points[:0], size, 0)
    seeds = int(generator.integers(2**31))

    def step(state: _State) -> tuple[_State, float]:
        left, right = _with_pivots(state.left, state.right, state.worst)
        # Pivots below this would fit what the tolerance allows to ignore.
        floor = max(tol / len(shape), 4 * eps(like.dtype)) * state.size
        left, right, train = _sweep(function, shape, left, right, rank, floor)
        draws = np.random.default_rng([seeds, state.sweeps])
        points = np.stack([draws.integers(n, size=held_out) for n in shape], axis=1)
        values = _finite(function(points))
        misfit = np.abs(values - train.sample(points))
        size = max(state.size, _root_mean_square(values))
        error = _root_mean_square(misfit)
        worst = points[np.argmax(misfit)][None, :] if misfit.max() > floor else points[:0]
        train = replace(train, error=error * math.sqrt(math.prod(shape)))
        following = _State(left, right, train, worst, size, state.sweeps + 1)
        return following, error / size if size else error

    def value(state: _State) -> TT:
        return moved(state.train, like)

    return iterate(step, start, stop=stop, dtype=like.dtype, callback=callback, value=value)


def _sweep(
    function: Callable[[np.ndarray], Array],
    shape: tuple[int, ...],
    left: tuple[np.ndarray, ...],
    right: tuple[np.ndarray, ...],
    rank: int,
    floor: float,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], TT]:
    """New pivots for all bonds, from the left and back, and the train through them."""
    lefts, rights, order = list(left), list(right), len(shape)
    if order == 1:
        line = _finite(function(np.arange(shape[0])[:, None]))
        return left, right, TT([line[None, :, None]])
    cores = []
    for k in [*range(1, order), *range(order - 2, 0, -1)]:
        rows = _products(lefts[k - 1], np.arange(shape[k - 1])[:, None])
        columns = _products(np.arange(shape[k])[:, None], rights[k + 1])
        block = _finite(function(_products(rows, columns))).reshape(len(rows), len(columns))
        i, j, upper = _eliminated(block, rank, floor)
        lefts[k], rights[k] = rows[i], columns[j]
        # From the last bond on back, where the pivots to the right are those of this sweep.
        if k == order - 1 or cores:
            core = np.linalg.solve(upper[:, j], upper)
            cores.insert(0, core.reshape(len(j), shape[k], -1))
    # The last bond of the way back is the first one.
    head = block[None, :, j]  # pyright: ignore[reportPossiblyUnboundVariable]
    return tuple(lefts), tuple(rights), TT([head, *cores])


def _products(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """All rows of ``before`` continued by all rows of ``after``, which change fastest."""
    repeated = np.repeat(before, len(after), axis=0)
    return np.concatenate([repeated, np.tile(after, (len(before), 1))], axis=1)


def _eliminated(
    block: np.ndarray, rank: int, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian elimination with complete pivoting, while pivots are above ``floor``.

    Returns the rows and the columns of the pivots, at least one, and the upper factor.
    """
    rest = block.copy()
    i, j, upper = [], [], []
    for _ in range(min(rank, *block.shape)):
        row, column = divmod(int(np.argmax(np.abs(rest))), rest.shape[1])
        pivot = rest[row, column]
        if i and abs(pivot) <= floor:
            break
        # A block of zeros still needs a pivot, by which nothing is eliminated.
        line = rest[row].copy() if pivot else np.eye(1, block.shape[1], column, rest.dtype)[0]
        rest -= np.outer(rest[:, column] / line[column], line)
        rest[row] = 0
        rest[:, column] = 0
        i.append(row)
        j.append(column)
        upper.append(line)
    return np.array(i), np.array(j), np.array(upper)


def _with_pivots(
    left: Sequence[np.ndarray], right: Sequence[np.ndarray], positions: np.ndarray
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Pivots of every bond with those that lie at ``positions``."""
    lefts = [_joined(rows, positions[:, :k]) for k, rows in enumerate(left)]
    rights = [_joined(rows, positions[:, k:]) for k, rows in enumerate(right)]
    return tuple(lefts), tuple(rights)


def _joined(rows: np.ndarray, more: np.ndarray) -> np.ndarray:
    if rows.shape[1] == 0:
        return rows
    return np.unique(np.concatenate([rows, more]), axis=0)


def _root_mean_square(values: np.ndarray) -> float:
    """In double precision: squares in single leave its range from 1e19 on, and from 1e-19 down."""
    return float(np.sqrt(np.mean(np.abs(values).astype(np.float64) ** 2)))


def _finite(values: Array) -> np.ndarray:
    host = to_host(as_compute(values))
    if not np.all(np.isfinite(host)):
        raise ValueError("the function must be finite, got NaN or inf at some of the points")
    return host
