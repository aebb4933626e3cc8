"""Starts that draw the factors at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, from_host
from lowrank_sp.adapters.initializers._start import (
    Initialization,
    check_finite,
    checked,
    compensated,
    zeros,
)


def lora(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Plain LoRA: ``down`` uniform on ``+-1/sqrt(n)`` (Kaiming), ``up`` zero.

    Parameters
    ----------
    weight : array, shape (m, n)
        In the layout of ``torch.nn.Linear``: outputs by inputs.
    rank : int
        In ``1..min(m, n)``.
    alpha : float, optional
        ``scale = alpha / rank``; by default ``rank``, so that the scale is 1.
    rng : int, Generator or None
    dtype : dtype, optional
        Of the factors; by default the compute dtype of ``weight`` (float32 for half precision).

    Returns
    -------
    Initialization
        The residual is ``weight`` itself :cite:p:`hu2022lora`.
    """
    m, n, scale, dtype = checked(weight, rank, alpha, dtype)
    draw = np.random.default_rng(rng).uniform(-1.0, 1.0, (rank, n)) / n**0.5
    down = from_host(draw, weight, dtype)
    check_finite(weight)
    return Initialization(zeros((m, rank), down), down, scale, weight)


def gaussian(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """LoRA with Gaussian ``down`` of standard deviation ``1 / rank``, ``up`` zero.

    Parameters are those of :func:`lora`.
    """
    m, n, scale, dtype = checked(weight, rank, alpha, dtype)
    draw = np.random.default_rng(rng).standard_normal((rank, n)) / rank
    down = from_host(draw, weight, dtype)
    check_finite(weight)
    return Initialization(zeros((m, rank), down), down, scale, weight)


def orthogonal(
    weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None, dtype: Any = None
) -> Initialization:
    """Both factors nonzero, their product zero: they meet in orthogonal halves of ``R^r``.

    ``down^T = G_1 Q_even / 10`` and ``up = G_2 Q_odd / 10`` with Gaussian ``G_1, G_2`` and the even
    and odd rows of one orthogonal ``r x r`` matrix ``Q``. Both have rank ``r / 2``.

    Parameters are those of :func:`lora`; ``rank`` must be even.
    """
    m, n, scale, dtype = checked(weight, rank, alpha, dtype)
    if rank % 2:
        raise ValueError(f"rank must be even for the orthogonal initialization, got {rank}")
    check_finite(weight)
    generator = np.random.default_rng(rng)
    q, _ = np.linalg.qr(generator.standard_normal((rank, rank)))
    down = (generator.standard_normal((n, rank // 2)) @ q[0::2]).T / 10
    up = generator.standard_normal((m, rank // 2)) @ q[1::2] / 10
    return compensated(weight, from_host(up, weight, dtype), from_host(down, weight, dtype), scale)
