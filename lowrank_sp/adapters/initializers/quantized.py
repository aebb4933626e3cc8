"""Starts beside a quantized base: the factors take up what the quantizer loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, detached, frobenius, namespace
from lowrank_sp.adapters.initializers._start import checked, divided, remainder
from lowrank_sp.adapters.quantize import Quantized, nf4
from lowrank_sp.factors import SVD, LowRank
from lowrank_sp.linalg.svd import truncated_svd


@dataclass(frozen=True)
class QuantizedInitialization:
    """Factors of an adapter and the quantized base that they belong to.

    Attributes
    ----------
    up : array, shape (m, r)
    down : array, shape (r, n)
    scale : float
        ``alpha / r``.
    base : Quantized
        The base weight, an operator; :meth:`~lowrank_sp.operators.LinearOperator.to_dense` decodes
        it.
    error : float
        ``||weight - base - scale * up @ down||_F``, of the factors as they are stored.
    svd : SVD
        The triplets that the factors were made of.
    """

    up: Array
    down: Array
    scale: float
    base: Quantized
    error: float
    svd: SVD

    def delta(self) -> LowRank:
        """The update of the weight, ``scale * up @ down``."""
        return self.scale * LowRank(self.up, self.down)


def loftq(
    weight: Array,
    rank: int,
    *,
    quantize: Callable[[Array], Quantized] = nf4,
    steps: int = 1,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> QuantizedInitialization:
    r"""Quantize, then take the best rank-``r`` approximation of what that loses; again.

    .. math:: Q_t = q(W - s B_{t-1} A_{t-1}), \qquad s B_t A_t = (W - Q_t)_r, \qquad B_0 A_0 = 0

    The last half-step is optimal for its ``Q``, so ``error`` is the norm of the trailing singular
    values of ``W - Q`` and at most ``||W - Q||_F``. It need not fall from step to step, since the
    scales of the blocks move :cite:p:`li2024loftq`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`. The factors are divided by the scale.
    quantize : callable
        From a matrix to :class:`~lowrank_sp.adapters.quantize.Quantized`; more bits or other blocks
        by ``functools.partial(int_symmetric, bits=2)``.
    steps : int
        At least 1.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((64, 64))
    >>> start = loftq(w, rank=8)
    >>> alone = np.linalg.norm(w - nf4(w).to_dense())
    >>> bool(0.7 * alone < start.error < 0.9 * alone)
    True
    """
    _, _, scale, dtype = _checked(weight, rank, alpha, dtype, steps)
    wide, generator = as_compute(detached(weight)), np.random.default_rng(rng)

    def step(target: Array) -> tuple[QuantizedInitialization, Array]:
        base = quantize(target)
        f = truncated_svd(_lost(wide, base), rank, rng=generator)
        up, down = divided(f.split().factors(), scale, dtype)
        target = remainder(wide, up, down, scale)
        return QuantizedInitialization(up, down, scale, base, _error(target, base), f), target

    start, target = step(wide)
    for _ in range(steps - 1):
        start, target = step(target)
    return start


def qpissa(
    weight: Array,
    rank: int,
    *,
    quantize: Callable[[Array], Quantized] = nf4,
    steps: int = 1,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> QuantizedInitialization:
    r"""PiSSA first, then quantize the residual; again on what the quantized base leaves.

    .. math:: s B_t A_t = (W - Q_{t-1})_r, \qquad Q_t = q(W - s B_t A_t), \qquad Q_0 = 0

    One step quantizes the residual of :func:`pissa`, whose range is smaller than that of the weight
    :cite:p:`meng2024pissa`. The order is the opposite of :func:`loftq`: what is lost last is the
    quantizer's, whole.

    Parameters are those of :func:`loftq`.
    """
    _, _, scale, dtype = _checked(weight, rank, alpha, dtype, steps)
    wide, generator = as_compute(detached(weight)), np.random.default_rng(rng)

    def step(lost: Array) -> QuantizedInitialization:
        f = truncated_svd(lost, rank, rng=generator)
        up, down = divided(f.split().factors(), scale, dtype)
        target = remainder(wide, up, down, scale)
        base = quantize(target)
        return QuantizedInitialization(up, down, scale, base, _error(target, base), f)

    start = step(wide)
    for _ in range(steps - 1):
        start = step(_lost(wide, start.base))
    return start


def _checked(
    weight: Array, rank: int, alpha: float | None, dtype: Any, steps: int
) -> tuple[int, int, float, Any]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return checked(weight, rank, alpha, dtype)


def _lost(weight: Array, base: Quantized) -> Array:
    """``weight - base``, in the compute dtype."""
    blocks = [weight[i : i + rows.shape[0], :] - rows for i, rows in base.row_blocks()]
    return namespace(weight).concat(blocks, axis=0)


def _error(target: Array, base: Quantized) -> float:
    """``||target - base||_F``, decoding a block at a time."""
    parts = (frobenius(target[i : i + rows.shape[0], :] - rows) for i, rows in base.row_blocks())
    return math.hypot(*parts)
