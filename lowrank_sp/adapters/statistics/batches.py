"""What all statistics ask of a batch."""

from __future__ import annotations

import math

from lowrank_sp._arrays import Array, as_compute, detached, device, max_abs, namespace


def samples(x: Array) -> Array:
    """A batch as a matrix of samples in rows, finite and not empty."""
    x = detached(x)
    xp = namespace(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    if rows.shape[0] == 0:
        raise ValueError(f"a batch must hold at least one sample, got shape {tuple(x.shape)}")
    if not math.isfinite(max_abs(rows)):
        raise ValueError("a batch must be finite, got NaN or infinite entries; skip it")
    return rows


def peak_scaled(x: Array) -> Array:
    """A batch over its largest magnitude: CorDA's remedy against a few huge activations.

    Examples
    --------
    >>> import numpy as np
    >>> peak_scaled(np.array([[1.0, -4.0]]))
    array([[ 0.25, -1.  ]])
    """
    x = as_compute(x)
    return x / (max_abs(x) or 1.0)


def as_array(count: int, like: Array) -> Array:
    """A count as an array, beside arrays such as ``like``."""
    xp = namespace(like)
    return xp.asarray(count, dtype=xp.int32 if count < 2**31 else xp.int64, device=device(like))
