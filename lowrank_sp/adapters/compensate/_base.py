"""What all methods return, and what they check and quantize alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowrank_sp._arrays import Array, as_compute
from lowrank_sp.adapters.initializers._start import check_finite, checked
from lowrank_sp.factors import LowRank
from lowrank_sp.operators import LinearOperator

#: From a matrix to what stands in its place, such as :func:`~lowrank_sp.adapters.quantize.nf4`.
Quantizer = Callable[[Array], LinearOperator]


@dataclass(frozen=True, repr=False)
class Compensated(LinearOperator):
    """A quantized base and its correction: ``base @ diag(1 / smoothing) + correction``.

    Attributes
    ----------
    base : LinearOperator, shape (m, n)
        What the quantizer returned.
    correction : LowRank, shape (m, n)
    error : float
        Norm of the weight minus this operator, in the norm that the method minimizes.
    smoothing : array, shape (n,), or None
        What inputs are divided by before the base multiplies them.
    """

    base: LinearOperator
    correction: LowRank
    error: float
    smoothing: Array = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(m, n)``."""
        return self.correction.shape

    @property
    def like(self) -> Array:
        return self.correction.like

    def matmul(self, x: Array) -> Array:
        smoothed = x if self.smoothing is None else x / self.smoothing[:, None]
        return self.base.matmul(smoothed) + self.correction.matmul(x)

    def rmatmul(self, x: Array) -> Array:
        y = self.base.rmatmul(x)
        y = y if self.smoothing is None else y / self.smoothing[:, None]
        return y + self.correction.rmatmul(x)

    def to_dense(self) -> Array:
        """The matrix itself, of shape ``(m, n)``."""
        base = self.base.to_dense()
        base = base if self.smoothing is None else base / self.smoothing
        return base + self.correction.to_dense()


def quantized(target: Array, quantize: Quantizer) -> tuple[LinearOperator, Array]:
    """The base made of ``target``, and what is lost of it."""
    base = quantize(target)
    if tuple(base.shape) != tuple(target.shape):
        raise ValueError(f"the base must have shape {tuple(target.shape)}, got {tuple(base.shape)}")
    return base, target - base.to_dense()


def checked_weight(weight: Array, rank: int) -> Array:
    """The weight in its compute dtype, after the checks that all methods share."""
    checked(weight, rank, None, None)
    check_finite(weight)
    return as_compute(weight)
