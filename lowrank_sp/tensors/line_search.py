"""The best step along the line of the last two sweeps, from the exact polynomial of the objective.

Along ``F_k + t D_k`` the objective ``||X||^2 - 2 Re <X, Y(t)> + ||Y(t)||^2`` is a polynomial of
degree ``2 N`` in ``t``. Its coefficients come from Gram matrices and from one product with the
tensor, the one with which the next sweep starts anyway, only with more columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from lowrank_sp._arrays import Array, eps, inner, namespace, to_host
from lowrank_sp.tensors.alternating import State, gram_of, real_inner
from lowrank_sp.tensors.mttkrp import Rows, contracted, khatri_rao_rows


def extrapolated(state: State, ridge: float = 0.0) -> tuple[State, Array, float]:
    """Factors moved to the lowest point of the line, or left, as ``(state, first, fall)``.

    ``first`` is the product with which a sweep from there starts, and ``fall`` is by how much the
    objective fell.
    """
    source, rows = state.source, state.rows
    steps = [new - old for new, old in zip(rows, state.before or rows, strict=True)]
    kept = source.halves[0]
    gone = [axis for axis in range(len(rows)) if axis not in kept]
    # The polynomial in t of the Khatri-Rao product that the first product contracts.
    powers = [khatri_rao_rows([], like=rows[0])]
    for axis in gone:
        powers = times_line(powers, rows[axis], steps[axis], _outer)
    xp, rank = namespace(rows[0]), rows[0].shape[0]
    stacked = source.product(xp.concat(powers, axis=0), last=kept.start == 0)
    partials = [stacked[k * rank : (k + 1) * rank, :] for k in range(len(powers))]
    values = partials
    for axis in reversed(kept):
        values = times_line(values, rows[axis], steps[axis], _along_last)
    products = np.array([complex(xp.sum(v)).real for v in values])
    objective = _objective_norm(state, steps, ridge)
    objective[: len(products)] -= 2 * products
    t = lowest(objective)
    fall = objective[0] - np.polynomial.polynomial.polyval(t, objective)
    # Below this the polynomial is rounding.
    if not fall > 100 * eps(rows[0].dtype) * (source.norm**2 + abs(objective[0])):
        return state, partials[0], 0.0
    moved = [row + t * step for row, step in zip(rows, steps, strict=True)]
    first = reduce(lambda a, b: a * t + b, reversed(partials))
    grams = [gram_of(row) for row in moved]
    return state._replace(rows=moved, grams=grams, before=rows), first, float(fall)


def times_line(
    powers: list[Array], rows: Array, step: Array, product: Callable[[Array, Array], Array]
) -> list[Array]:
    """Coefficients of a polynomial times ``rows + t step``."""
    constant = [product(p, rows) for p in powers]
    linear = [product(p, step) for p in powers]
    middle = [a + b for a, b in zip(constant[1:], linear[:-1], strict=True)]
    return [constant[0], *middle, linear[-1]]


def _outer(a: Array, b: Array) -> Array:
    return khatri_rao_rows([a, b], like=a)


def _along_last(partial: Array, rows: Array) -> Array:
    return contracted(partial, partial.shape[1] // rows.shape[1], rows, last=True)


def _objective_norm(state: State, steps: Rows, ridge: float) -> np.ndarray:
    """Coefficients of ``||Y(t)||^2 + ridge sum_k ||F_k + t D_k||^2``."""
    powers = [np.ones_like(state.grams[0])]
    for rows, gram, step in zip(state.rows, state.grams, steps, strict=True):
        cross = to_host(inner(rows.mT, step.mT))
        line = [gram, cross + cross.conj().T, gram_of(step)]
        product = [np.zeros_like(gram) for _ in range(len(powers) + 2)]
        for i, a in enumerate(powers):
            for j, b in enumerate(line):
                product[i + j] = product[i + j] + a * b
        powers = product
    coefficients = np.array([np.sum(p).real for p in powers])
    coefficients[:3] += ridge * squares_along(state.rows, steps)
    return coefficients


def squares_along(rows: Rows, steps: Rows) -> np.ndarray:
    """Coefficients of ``sum_k ||F_k + t D_k||^2``."""
    pairs = list(zip(rows, steps, strict=True))
    constant, linear, square = (
        sum(factor * real_inner(pair[i], pair[j]) for pair in pairs)
        for factor, i, j in ((1, 0, 0), (2, 0, 1), (1, 1, 1))
    )
    return np.array([constant, linear, square])


def lowest(objective: np.ndarray) -> float:
    """The ``t`` of least value among zero and the real stationary points."""
    polynomial = np.polynomial.polynomial
    slope = polynomial.polyder(objective)
    scale = np.max(np.abs(slope))
    if not 0 < scale < np.inf:
        return 0.0
    roots = polynomial.polyroots(slope / scale)
    points = np.concatenate([[0.0], roots.real[abs(roots.imag) <= 1e-6 * (1 + abs(roots.real))]])
    return float(points[np.argmin(polynomial.polyval(points, objective))])
