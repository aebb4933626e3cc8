"""Initial values: drawn on the host, in the library, device and compute dtype of the weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    compute_dtype,
    device,
    dtype_name,
    from_host,
    is_array,
    is_inexact,
    namespace,
)
from lowrank_sp.factors import check_rank

#: A weight, or its shape where its values are of no account; a shape gives NumPy arrays of float64.
Like = Any


def template(weight: Like) -> tuple[tuple[int, int], Array]:
    """Shape of a weight, and an empty array of its library and device in its compute dtype."""
    if isinstance(weight, tuple):
        shape, like = weight, np.empty((0, 0))
    else:
        check_array(weight)
        shape, like = tuple(weight.shape), weight
        if not is_inexact(weight.dtype):
            raise TypeError(
                f"weight must be floating, got {dtype_name(weight.dtype)}; dequantize it first"
            )
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"weight must be a matrix, got shape {shape}")
    return shape, as_compute(like[:0, :0])


def check_array(weight: Any) -> None:
    """Raise unless a weight is an array."""
    if not is_array(weight):
        raise TypeError(
            f"weight must be an array, got {type(weight).__name__}; convert it first, for example "
            "with numpy.asarray"
        )


def factor_scale(
    weight: Like, rank: int, alpha: float | None, largest: int | None = None
) -> tuple[tuple[int, int], Array, float]:
    """``(m, n)``, :func:`template` and ``alpha / rank``, after the checks that forms share."""
    shape, like = template(weight)
    rank = check_rank(rank, min(shape) if largest is None else largest, shape)
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    return shape, like, alpha / rank


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros."""
    return full(shape, 0.0, like)


def full(shape: tuple[int, ...], value: float, like: Array) -> Array:
    """One value everywhere."""
    xp = namespace(like)
    return xp.full(shape, value, dtype=compute_dtype(xp, like.dtype), device=device(like))


def uniform(shape: tuple[int, ...], bound: float, like: Array, rng: RNG) -> Array:
    """Uniform on ``+-bound``."""
    return from_host(np.random.default_rng(rng).uniform(-bound, bound, shape), like, like.dtype)


def kaiming_uniform(
    shape: tuple[int, ...], like: Array, rng: RNG, *, gain: float = 3**-0.5
) -> Array:
    """Uniform on ``+-gain * sqrt(3 / fan_in)``, ``fan_in`` the last size.

    The default gain is that of ``torch.nn.Linear`` (``a = sqrt(5)``): ``+-1 / sqrt(fan_in)``.
    """
    return uniform(shape, gain * (3 / shape[-1]) ** 0.5, like, rng)


def normal(shape: tuple[int, ...], std: float, like: Array, rng: RNG) -> Array:
    """Gaussian of standard deviation ``std``."""
    return from_host(std * np.random.default_rng(rng).standard_normal(shape), like, like.dtype)


def orthogonal(shape: tuple[int, int], like: Array, rng: RNG) -> Array:
    """Uniform among matrices with orthonormal columns, or rows where they are fewer."""
    rows, columns = shape
    g = np.random.default_rng(rng).standard_normal((max(shape), min(shape)))
    q, r = np.linalg.qr(g)
    q = q * np.sign(np.diagonal(r))
    return from_host(q if rows >= columns else q.T, like, like.dtype)
