"""Means over inputs, and of gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from lowrank_sp._arrays import Array, as_compute, detached, inner, max_abs, namespace, wide_dtype
from lowrank_sp.adapters.statistics.batches import as_array, samples


@dataclass(frozen=True)
class _Mean:
    """A mean and the number of terms it was taken over."""

    mean: Array
    count: int

    key: ClassVar[str]

    def __add__(self, other: Self) -> Self:
        """The statistic of both parts of the data."""
        if tuple(self.mean.shape) != tuple(other.mean.shape):
            raise ValueError(
                f"statistics must be of one layer, got shapes {tuple(self.mean.shape)} and "
                f"{tuple(other.mean.shape)}"
            )
        namespace(self.mean, other.mean)
        total = self.count + other.count
        if total == 0:
            return self
        share = other.count / total
        return type(self)(self.mean + share * (other.mean - self.mean), total)

    def arrays(self) -> dict[str, Array]:
        """The parts by name, the mean first."""
        return {self.key: self.mean, f"{self.key}_count": as_array(self.count, self.mean)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """The statistic whose :meth:`arrays` are given."""
        return cls(arrays[cls.key], int(arrays[f"{cls.key}_count"]))


@dataclass(frozen=True)
class _MeanOfInputs(_Mean, ABC):
    """A mean over samples."""

    @classmethod
    @abstractmethod
    def of(cls, x: Array) -> Self:
        """The statistic of one batch of shape ``(..., n)``, a sample a row."""

    def update(self, x: Array) -> Self:
        """The statistic after one more batch, of shape ``(..., n)``."""
        return self + type(self).of(x)


@dataclass(frozen=True)
class SecondMoment(_MeanOfInputs):
    """Uncentred second moment of the inputs of a layer, ``E[x x^H]``.

    In float64, for initializers take roots of it. ``O(n^2)`` memory and ``2 n^2`` flops a sample.

    Parameters
    ----------
    mean : array, shape (n, n)
    count : int
        Samples seen.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> statistic = SecondMoment.of(x[:1]).update(x[1:])
    >>> statistic.mean, statistic.count
    (array([[ 5.,  7.],
           [ 7., 10.]]), 2)
    """

    key: ClassVar[str] = "second_moment"

    @classmethod
    def of(cls, x: Array) -> Self:
        """Second moment of one batch of shape ``(..., n)``, a sample a row."""
        rows = as_compute(samples(x))
        return cls(inner(rows, rows).mT / rows.shape[0], rows.shape[0])


@dataclass(frozen=True)
class MeanSquare(_MeanOfInputs):
    """Mean square of every input of a layer, ``E |x_j|^2``: the diagonal of the second moment.

    Parameters
    ----------
    mean : array, shape (n,)
    count : int
        Samples seen.

    Examples
    --------
    >>> import numpy as np
    >>> MeanSquare.of(np.array([[1.0, -2.0], [3.0, 4.0]])).mean
    array([ 5., 10.])
    """

    key: ClassVar[str] = "mean_square"

    @classmethod
    def of(cls, x: Array) -> Self:
        """Mean squares of one batch of shape ``(..., n)``, a sample a row."""
        return cls(*_mean_power(x, 2))


@dataclass(frozen=True)
class MeanMagnitude(_MeanOfInputs):
    """Mean magnitude of every input of a layer, ``E |x_j|``.

    Parameters
    ----------
    mean : array, shape (n,)
    count : int
        Samples seen.

    Examples
    --------
    >>> import numpy as np
    >>> MeanMagnitude.of(np.array([[1.0, -2.0], [3.0, 4.0]])).mean
    array([2., 3.])
    """

    key: ClassVar[str] = "magnitude"

    @classmethod
    def of(cls, x: Array) -> Self:
        """Mean magnitudes of one batch of shape ``(..., n)``, a sample a row."""
        return cls(*_mean_power(x, 1))


@dataclass(frozen=True)
class MeanGradient(_Mean):
    """Mean of the gradient of the loss in the weight, in the compute dtype.

    Parameters
    ----------
    mean : array, shape (m, n)
    count : int
        Batches seen, or samples, where batches differ in size.

    Examples
    --------
    >>> import numpy as np
    >>> statistic = MeanGradient.of(np.array([[1.0]])).update(np.array([[4.0]]))
    >>> statistic.mean
    array([[2.5]])
    """

    key: ClassVar[str] = "gradient"

    @classmethod
    def of(cls, gradient: Array, count: int = 1) -> MeanGradient:
        """The gradient of one batch, itself a mean over ``count`` samples."""
        first = cls._seen(gradient, count)
        # Frameworks write the next gradient where the last one was.
        return cls(namespace(first.mean).asarray(first.mean, copy=True), count)

    def update(self, gradient: Array, count: int = 1) -> MeanGradient:
        """The statistic after one more batch."""
        return self + self._seen(gradient, count)

    @classmethod
    def _seen(cls, gradient: Array, count: int) -> MeanGradient:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}; it is the weight of a batch")
        if gradient.ndim != 2:
            raise ValueError(f"a gradient must be a matrix, got shape {tuple(gradient.shape)}")
        if not math.isfinite(max_abs(gradient)):
            raise ValueError(
                "a gradient must be finite, got NaN or infinite entries; skip that batch"
            )
        return cls(as_compute(detached(gradient)), count)


def _mean_power(x: Array, power: int) -> tuple[Array, int]:
    """Mean of ``|x_j|^power`` over a batch, and its size."""
    rows = as_compute(samples(x))
    xp = namespace(rows)
    size = abs(rows)
    size = xp.astype(size, wide_dtype(xp, size.dtype))
    return xp.mean(size**power, axis=0), rows.shape[0]
