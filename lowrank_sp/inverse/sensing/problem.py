"""What every sensing solver does before and after its iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    frobenius,
    max_abs,
    namespace,
)
from lowrank_sp.factors import SVD, Factored, LowRank, check_rank
from lowrank_sp.inverse._problem import fits, power_of_two, with_residual
from lowrank_sp.inverse.measurements import Measurement
from lowrank_sp.inverse.tangent import inner
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.linalg.svd import randomized_svd
from lowrank_sp.operators import LinearOperator

Callback = Callable[[int, float, Factored], Any] | None


@dataclass(frozen=True)
class Problem:
    """Measurements of a matrix, scaled so that the largest has a magnitude of about one.

    Attributes
    ----------
    measurement : Measurement
    data : array, shape (M,)
        What a solver works on.
    scale : float
        A power of two; the measurements are ``scale`` times ``data``.
    """

    measurement: Measurement
    data: Array
    scale: float

    @classmethod
    def of(cls, measurement: Measurement, data: Array, rank: int | None = None) -> Problem:
        """The problem, or an error where the measurements cannot determine a matrix.

        Parameters
        ----------
        measurement : Measurement
        data : array, shape (M,)
        rank : int, optional
        """
        data = as_compute(data)
        if tuple(data.shape) != (measurement.size,):
            raise ValueError(
                f"data must have shape ({measurement.size},), one number for every measurement, "
                f"got {tuple(data.shape)}"
            )
        largest = max_abs(data)
        if not math.isfinite(largest):
            raise ValueError("data must be finite, got NaN or infinity; drop such measurements")
        if rank is not None:
            shape = measurement.shape
            rank = check_rank(rank, min(shape), shape)
            freedom = rank * (sum(shape) - rank)
            if measurement.size < freedom:
                raise ValueError(
                    f"rank {rank} has {freedom} degrees of freedom, got {measurement.size} "
                    "measurements; lower the rank"
                )
        scale = power_of_two(largest)
        return cls(measurement, data / scale, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the matrix."""
        return self.measurement.shape

    @property
    def size(self) -> float:
        """Norm of the data."""
        return frobenius(self.data)

    def residual(self, x: Factored) -> Array:
        """``data - A(x)``."""
        return self.data - self.measurement.forward(x)

    def fits(self, residual: Array) -> bool:
        """Whether a residual is not that of a method that diverges."""
        return fits(frobenius(residual), self.size)

    def start(self, rank: int, init: Factored | None, rng: RNG) -> SVD:
        """``init`` in the scale of the problem; by default a spectral start.

        That is the leading part of ``A^*(data)``, times the number with which it fits best.
        """
        if init is not None:
            if tuple(init.shape) != tuple(self.shape):
                raise ValueError(f"init must have shape {self.shape}, got {tuple(init.shape)}")
            f = init if isinstance(init, SVD) else init.svd()
            if f.rank < rank:
                raise ValueError(f"init must have rank {rank}, got {f.rank}")
            f = f.truncate(rank)
            return SVD(f.u, f.s / self.scale, f.vh)
        f = leading(self.measurement.adjoint(self.data), rank, rng)
        image = self.measurement.forward(f)
        squares = frobenius(image) ** 2
        best = inner((image,), (self.data,)) / squares if squares else 0.0
        return SVD(f.u, f.s * abs(best), f.vh)

    def gain(self, x: Factored) -> float:
        """``||A(x)||^2 / ||x||^2``, what ``A^* A`` multiplies low-rank matrices by on average."""
        norm = float(x.norm())
        return (frobenius(self.measurement.forward(x)) / norm) ** 2 if norm else 1.0

    def solve(
        self,
        step: Callable[[Any], tuple[Any, Any]],
        state: Any,
        *,
        value: Callable[[Any], Factored],
        stop: Stop,
        callback: Callback,
    ) -> Solution:
        """:func:`~lowrank_sp.iterate.iterate` with answers in the scale of the data.

        A state has its ``residual``, which says whether the method diverges. The reason of the
        solution says how well the answer fits.
        """
        if self.size == 0.0:
            return self.zero()

        def guarded(old: Any) -> tuple[Any, Any]:
            with np.errstate(over="ignore", invalid="ignore"):
                new, change = step(old)
                return new, change if self.fits(new.residual) else math.inf

        solution = iterate(
            guarded,
            state,
            stop=stop,
            dtype=self.data.dtype,
            callback=callback,
            value=lambda state: self.restore(value(state)),
        )
        return self.finish(solution)

    def finish(self, solution: Solution) -> Solution:
        """The solution, with its residual in the reason."""
        f = solution.value
        residual = frobenius(self.residual(SVD(f.u, f.s / self.scale, f.vh))) / self.size
        return with_residual(solution, residual, "of the data")

    def restore(self, x: Factored) -> SVD:
        """The SVD of an answer, in the scale of the data."""
        f = x if isinstance(x, SVD) else x.svd()
        return SVD(f.u, f.s * self.scale, f.vh)

    def zero(self) -> Solution:
        """The answer to data that are all zero."""
        xp = namespace(self.data)
        m, n = self.shape
        where = {"dtype": self.data.dtype, "device": device(self.data)}
        left, right = xp.zeros((m, 1), **where), xp.zeros((1, n), **where)
        return Solution(LowRank(left, right).svd(), True, "the data are all zero", 0, ())


def leading(a: LinearOperator, rank: int, rng: RNG = None) -> SVD:
    """The leading triplets to start from; a few reads tell enough."""
    return randomized_svd(a, rank, reads=3, oversampling=8, rng=rng)


def relative_change(new: Factored, old: Factored) -> float:
    """``||new - old||_F / ||new||_F``."""
    size = float(new.norm())
    change = float((plain(new) - plain(old)).norm())
    return change / size if size else change


def plain(x: Factored) -> LowRank:
    """Two factors of ``x``, to add others to."""
    return LowRank(*x.factors())


def transposed(a: LinearOperator, x: Array) -> Array:
    """``x^H A`` for a block ``x`` of columns."""
    return adjoint(a.rmatmul(x))
