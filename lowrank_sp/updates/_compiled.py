"""Frames of blocks in single precision, and operations by entries, compiled (needs numba).

A Gram matrix of 16 columns is too small for BLAS, and its eigenvectors for a call each: on one
thread this takes half of the time that libraries take on two. A dozen of operations by entries, as
Adam's, become one that leaves no arrays between them.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_sp._arrays import across
from lowrank_sp._compiled.panels import PANEL, add_gram, jit, workspace


@jit
def _gram(x, across, panel, gram):
    """Upper triangle of the Gram matrix of the columns of ``x``, or of its rows if ``across``."""
    r, m = (x.shape[0], x.shape[1]) if across else (x.shape[1], x.shape[0])
    gram[:] = 0
    for start in range(0, m, PANEL):
        count = min(PANEL, m - start)
        if across:
            for k in range(r):
                source, to = x[k, start : start + count], panel[k, :count]
                for e in range(count):
                    to[e] = source[e]
        else:
            for e in range(count):
                for k in range(r):
                    panel[k, e] = x[start + e, k]
        add_gram(panel, count, gram)


@jit
def _frames(x, across, ridge, least, root, inverse):
    r = root.shape[1]
    panel, upper = workspace(r, root)
    unit, lengths = np.empty((r, r)), np.empty(r)
    for b in range(len(x)):
        _gram(x[b], across, panel, upper)
        for k in range(r):
            upper[k, k] += ridge
            lengths[k] = np.sqrt(upper[k, k]) if upper[k, k] > 0 else 1.0
        for i in range(r):
            for j in range(i, r):
                unit[i, j] = unit[j, i] = upper[i, j] / (lengths[i] * lengths[j])
        values, vectors = np.linalg.eigh(unit)
        for k in range(r):
            size = np.sqrt(values[k]) if values[k] > least else 0.0
            for i in range(r):
                root[b, k, i] = size * vectors[i, k] * lengths[i]
                inverse[b, i, k] = vectors[i, k] / (size * lengths[i]) if size > 0 else 0.0


def frames(x: np.ndarray, *, ridge: float, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Root and inverse of a :class:`~lowrank_sp.updates.frames.Frame` of ``x (..., m, r)``."""
    blocks, lie_across, shape = _blocks(x)
    root, inverse = np.empty((2, len(blocks), *shape[-2:]))
    _frames(blocks, lie_across, ridge, least, root, inverse)
    return root.reshape(shape), inverse.reshape(shape)


@jit
def _grams(x, lie_across, gram):
    panel, upper = workspace(gram.shape[1], gram)
    for b in range(len(x)):
        _gram(x[b], lie_across, panel, upper)
        for i in range(gram.shape[1]):
            for j in range(i, gram.shape[1]):
                gram[b, i, j] = gram[b, j, i] = upper[i, j]


def grams(x: np.ndarray) -> np.ndarray:
    """``x^T x`` of ``x (..., m, r)``, summed in float64."""
    blocks, lie_across, shape = _blocks(x)
    gram = np.empty((len(blocks), *shape[-2:]))
    _grams(blocks, lie_across, gram)
    return gram.reshape(shape)


def _blocks(x: np.ndarray) -> tuple[np.ndarray, bool, tuple[int, ...]]:
    """Blocks as they lie, whether rows of them do, and the shape of their Gram matrices."""
    *batch, m, r = x.shape
    lie_across = across(x)
    blocks = np.ascontiguousarray(x.mT if lie_across else x)
    return blocks.reshape((-1, r, m) if lie_across else (-1, m, r)), lie_across, (*batch, r, r)


@jit
def _combined(weights, x, y, out):
    for b in range(len(x)):
        one, other = weights[b]
        for i in range(x.shape[1]):
            out[b, i] = one * x[b, i] + other * y[b, i]


def combined(a: Any, x: np.ndarray, b: Any, y: np.ndarray) -> np.ndarray:
    """``a x + b y`` with a number ``a``, ``b`` for every matrix of a batch, or one for all."""
    if across(x):
        return combined(a, x.mT, b, y.mT).mT
    weights, (one, other) = _terms(x, a, b), (_flat(z) for z in (x, y))
    out = np.empty_like(one)
    _combined(weights, one, other, out)
    return out.reshape(x.shape)


@jit
def _adam(grad, mean, square, decays, terms, new_mean, new_square, direction):
    first, fresh, second, fresh_square = decays
    for b in range(len(grad)):
        lift, weight = terms[b]
        for i in range(grad.shape[1]):
            g = grad[b, i]
            m = first * mean[b, i] + fresh * g
            s = second * square[b, i] + fresh_square * (g * g)
            new_mean[b, i], new_square[b, i] = m, s
            direction[b, i] = m / ((np.sqrt(s) + lift) * weight)


def adam(
    grad: np.ndarray, mean: np.ndarray, square: np.ndarray, decays: tuple[float, float], *terms: Any
) -> list[np.ndarray]:
    """Running mean and mean square with ``grad``, and ``mean / ((sqrt(square) + lift) weight)``.

    ``terms`` are ``lift`` and ``weight``, a number for every matrix of a batch.
    """
    if across(grad):
        new = adam(grad.mT, mean.mT, square.mT, decays, *terms)
        return [x.mT for x in new]
    given = [_flat(x) for x in (grad, mean, square)]
    new = [np.empty_like(x) for x in given]
    # 1 - 0.999 has lost its last digits where 0.999 was rounded to single precision first.
    weights = np.asarray([w for decay in decays for w in (decay, 1 - decay)], grad.dtype)
    _adam(*given, weights, _terms(grad, *terms), *new)
    return [x.reshape(grad.shape) for x in new]


def _flat(x: np.ndarray) -> np.ndarray:
    """The entries of every matrix of a batch in a row."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-2] * x.shape[-1])


def _terms(x: np.ndarray, *numbers: Any) -> np.ndarray:
    """Numbers for every matrix of a batch, in the dtype of ``x``."""
    terms = np.empty((*x.shape[:-2], len(numbers)), x.dtype)
    for k, number in enumerate(numbers):
        terms[..., k] = np.reshape(number, np.shape(number)[:-2])
    return terms.reshape(-1, len(numbers))
