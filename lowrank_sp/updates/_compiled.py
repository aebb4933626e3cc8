"""Frames of blocks in single precision on the host, compiled (needs numba).

A Gram matrix of 16 columns is too small for BLAS, and its eigenvectors for a call each: on one
thread this takes half of the time that libraries take on two.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np

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
                for e in range(count):
                    panel[k, e] = x[k, start + e]
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
    *batch, m, r = x.shape
    across = x.strides[-1] > x.strides[-2]
    blocks = np.ascontiguousarray(np.swapaxes(x, -1, -2) if across else x)
    blocks = blocks.reshape((-1, r, m) if across else (-1, m, r))
    root, inverse = np.empty((2, len(blocks), r, r))
    _frames(blocks, across, ridge, least, root, inverse)
    return root.reshape(*batch, r, r), inverse.reshape(*batch, r, r)
