"""Alternating minimization over the factors of a CP decomposition: one sweep, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    Array,
    eps,
    from_host,
    host_view,
    inner,
    is_complex,
    namespace,
    to_host,
)
from lowrank_sp.iterate import Solution
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.mttkrp import Rows
from lowrank_sp.tensors.ranks import as_tensor, scaled
from lowrank_sp.tensors.source import Dense, Source

# From the rows of a mode, the gradient M - W F and the Gram matrix W to the step of the rows.
Solve = Callable[[Array, Array, np.ndarray], Array]

# Terms this much longer than their sum cancel: two equal ones at a cosine of -0.96.
_CANCELLATION = 5.0


class State(NamedTuple):
    """Factors after a sweep over ``source``, balanced: the columns of a term are equally long.

    ``product`` is ``Re <X, Y>`` and ``square`` is ``||Y||^2`` for the tensor ``Y`` of the factors;
    ``before`` holds the rows of the sweep before, ``fall`` is by how much the objective fell, and
    ``slow`` whether that was little.
    """

    source: Source
    rows: list[Array]
    grams: list[np.ndarray]
    before: list[Array] | None = None
    product: float = math.nan
    square: float = math.nan
    fall: float = math.inf
    slow: bool = False
    sweeps: int = 0


def started(source: Source, rows: Rows) -> State:
    """State before the first sweep; the answer for a zero tensor."""
    if source.norm == 0.0:
        rows = [0.0 * r for r in rows]
    return State(source, list(rows), [gram_of(r) for r in rows])


class Problem(NamedTuple):
    """What is decomposed: ``unit`` times the tensor of ``source``, of the library of ``like``."""

    source: Source
    unit: float
    like: Array

    @classmethod
    def of(cls, x: Array) -> Problem:
        """Check a tensor. Where NumPy can read it in place, it computes."""
        x, norm = as_tensor(x)
        host = host_view(x)
        data, unit = scaled(x if host is None else host, norm)
        return cls(Dense.of(data, norm / unit), unit, x)

    def rows(self, factors: Sequence[Array]) -> list[Array]:
        """Rows on the axes of ``source`` from factors ``(n_k, R)`` that carry the weights."""
        scale = self.unit ** (-1 / len(factors))
        rows, like = [], self.source.like
        for mode in self.source.modes:
            r = moved(factors[mode].mT * scale, like)
            rows.append(np.ascontiguousarray(r) if isinstance(r, np.ndarray) else r)
        return rows

    def answer(self, state: State) -> CP:
        """The CP tensor of a state in canonical gauge, with its error."""
        factors: list[Any] = [None] * len(state.rows)
        for axis, mode in enumerate(self.source.modes):
            factors[mode] = moved(state.rows[axis], self.like).mT
        cp = CP.of_factors(factors).canonical()
        return CP(cp.weights * self.unit, cp.factors, self.unit * distance(state))


def moved(a: Array, like: Array) -> Array:
    """``a`` in the library of ``like``, if one of the two is an array of NumPy."""
    if isinstance(like, np.ndarray):
        return to_host(a).astype(like.dtype, copy=False)
    return from_host(a, like) if isinstance(a, np.ndarray) else a


def distance(state: State) -> float:
    """``||X - Y||``: from the norms of both, or from all entries once these cancel."""
    source = state.source
    square = source.norm**2 - 2 * state.product + state.square
    if square > 1e4 * eps(state.rows[0].dtype) * source.norm**2:
        return square**0.5
    return source.distance(state.rows)


def sweep(state: State, solve: Solve, ridge: float = 0.0, first: Array | None = None) -> State:
    """One sweep.

    The objective is ``||X - Y||^2 + ridge sum_k ||A_k||^2``. A step ``D`` of the rows of one mode
    lowers it by exactly ``2 Re <D, G> - <D, (W + ridge) D>``, in which nothing cancels.

    Parameters
    ----------
    state : State
    solve : callable
    ridge : float
    first : array, optional
        See :meth:`~lowrank_sp.tensors.mttkrp.Source.sweep`.
    """
    grams = list(state.grams)
    fall = product = 0.0

    def update(axis: int, mttkrp: Array, rows: Array) -> Array:
        nonlocal fall, product
        others = [gram for k, gram in enumerate(grams) if k != axis]
        gram = reduce(np.multiply, others, np.ones_like(grams[axis]))
        gram = gram + ridge * np.eye(len(gram))
        small = from_host(gram, rows)
        gradient = mttkrp - small @ rows
        step = solve(rows, gradient, gram)
        fall += 2 * real_inner(step, gradient) - real_inner(step, small @ step)
        rows = rows + step
        grams[axis] = gram_of(rows)
        product = real_inner(rows, mttkrp)
        return rows

    rows = state.source.sweep(state.rows, update, first)
    square = float(np.sum(reduce(np.multiply, grams)).real)
    rows, grams = balanced(rows, grams)
    return State(
        state.source, rows, grams, state.rows, product, square, fall, False, state.sweeps + 1
    )


def gram_of(rows: Array) -> np.ndarray:
    """``conj(F) F^T`` in float64 on the host."""
    columns = rows.mT
    gram = to_host(inner(columns, columns))
    return gram.astype(np.result_type(gram, np.float64), copy=False)


def inverse(gram: np.ndarray, floor: float) -> np.ndarray:
    """Pseudo-inverse of a Gram matrix of columns, after scaling them to unit length.

    Eigenvalues up to ``floor`` times the largest are noise.
    """
    lengths = np.sqrt(np.real(np.diag(gram)))
    lengths = np.where(lengths > 0, lengths, 1.0)
    scale = np.outer(lengths, lengths)
    unit = gram / scale
    try:
        lower = np.linalg.inv(np.linalg.cholesky(unit))
        if np.max(np.abs(lower)) ** 2 * floor < 1:
            return lower.conj().T @ lower / scale
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(unit)
    keep = values > floor * values[-1]
    return (vectors[:, keep] / values[keep]) @ vectors[:, keep].conj().T / scale


def real_inner(a: Array, b: Array) -> float:
    """``Re sum(conj(a) b)``."""
    xp = namespace(a, b)
    if is_complex(a.dtype):
        return float(xp.real(xp.sum(xp.conj(a) * b)))
    return float(xp.sum(a * b))


def balanced(rows: Rows, grams: list[np.ndarray]) -> tuple[list[Array], list[np.ndarray]]:
    """The same terms with columns of one length in all modes.

    Of all scalings of the terms this one has the smallest sum of squares.
    """
    lengths = np.sqrt([np.real(np.diag(gram)) for gram in grams])
    alive = np.all(lengths > 0, axis=0)
    lengths = np.where(alive, lengths, 1.0)
    scales = np.exp(np.mean(np.log(lengths), axis=0)) / lengths
    rows = [r * from_host(s[:, None], r) for r, s in zip(rows, scales, strict=True)]
    return rows, [gram * np.outer(s, s) for gram, s in zip(grams, scales, strict=True)]


def with_degeneracy(solution: Solution) -> Solution:
    """The solution, marked as not converged where its terms cancel each other."""
    cp = solution.value
    square = float(abs(cp.inner(cp)))
    lengths = float(np.sum(to_host(cp.weights).astype(float) ** 2))
    if not lengths > _CANCELLATION**2 * square:
        return solution
    ratio = f"{(lengths / square) ** 0.5:.0f}" if square > 0 else "more than 1e8"
    reason = (
        f"{solution.reason}; degenerate: terms cancel, they are {ratio} times as long as their sum"
    )
    converged = None if solution.converged is None else False
    return replace(solution, converged=converged, reason=reason)
