"""What every initializer returns, checks and owes: the identity of the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    as_compute,
    compute_dtype,
    detached,
    device,
    dtype_name,
    is_inexact,
    max_abs,
    namespace,
    slices,
)
from lowrank_sp.factors import SVD, LowRank, check_rank


@dataclass(frozen=True)
class Initialization:
    """Factors of an adapter and the base weight that belongs to them.

    ``weight == residual + scale * up @ down`` to the rounding of the dtypes in which the parts are
    stored. Two published starts move the layer on purpose, and say so: ``lora_one`` and ``kasa``.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    scale : float
        ``alpha / r``.
    residual : array, shape (m, n)
        The base weight, in the dtype of ``weight``.
    svd : SVD or None
        The triplets that the factors were made of, with their certified errors.
    error : float or None
        Root mean square norm of ``residual @ x`` over the inputs, where they are known.
    """

    up: Array
    down: Array
    scale: float
    residual: Array
    svd: SVD | None = None
    error: float | None = None

    def delta(self) -> LowRank:
        """The update of the weight, ``scale * up @ down``."""
        return self.scale * LowRank(self.up, self.down)


def checked(
    weight: Array, rank: int, alpha: float | None, dtype: Any
) -> tuple[int, int, float, Any]:
    """``m, n``, the scale and the dtype of the factors, after the checks all initializers share."""
    xp = namespace(weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    m, n = weight.shape
    check_rank(rank, min(m, n), (m, n))
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not is_inexact(weight.dtype):
        raise TypeError(
            f"weight must be floating, got {dtype_name(weight.dtype)}; dequantize it first"
        )
    return m, n, alpha / rank, compute_dtype(xp, weight.dtype) if dtype is None else dtype


def check_finite(weight: Array) -> None:
    """Raise unless the weight is finite."""
    # By blocks, for magnitudes are a copy.
    if not all(math.isfinite(max_abs(weight[rows, :])) for rows in slices(weight.shape[0], 512)):
        raise ValueError("the weight must be finite, got NaN or infinite entries")


def zeros(shape: tuple[int, int], like: Array) -> Array:
    """Zeros of the dtype and on the device of ``like``."""
    return namespace(like).zeros(shape, dtype=like.dtype, device=device(like))


def divided(factors: tuple[Array, Array], scale: float, dtype: Any) -> tuple[Array, Array]:
    """Factors of the product over ``scale``, which both share."""
    xp = namespace(*factors)
    left, right = (xp.astype(factor * scale**-0.5, dtype) for factor in factors)
    return left, right


def from_svd(weight: Array, f: SVD, scale: float, dtype: Any) -> Initialization:
    """The start that holds ``f``, split evenly over both factors."""
    return compensated(weight, *divided(f.split().factors(), scale, dtype), scale, f)


def compensated(
    weight: Array,
    up: Array,
    down: Array,
    scale: float,
    f: SVD | None = None,
    error: float | None = None,
) -> Initialization:
    """The start whose residual makes up for the factors as they are stored."""
    return Initialization(up, down, scale, remainder(weight, up, down, scale), f, error)


def remainder(weight: Array, up: Array, down: Array, scale: float) -> Array:
    """``weight - scale * up @ down``, by row blocks, each rounded once."""
    xp = namespace(weight, up)
    weight = detached(weight)
    wide = as_compute(up[:1, :]).dtype
    scaled = as_compute(down) * scale

    def part(rows: slice) -> Array:
        block = as_compute(weight[rows, :]) - xp.astype(up[rows, :], wide) @ scaled
        return xp.astype(block, weight.dtype)

    every = slices(weight.shape[0], 512)
    if isinstance(weight, np.ndarray):
        # Filled in place: concatenation would hold the residual twice.
        residual = np.empty(weight.shape, weight.dtype)
        for rows in every:
            residual[rows] = part(rows)
        return residual
    return xp.concat([part(rows) for rows in every], axis=0)
