"""What a layer sees of its data, gathered batch by batch in bounded memory.

Every statistic is a frozen value: ``update`` returns a new one that has seen one more batch, and
two of them add up, so that batches may be shared out over workers. ``arrays`` names its parts;
:func:`pack` and :func:`unpack` turn the statistics of many layers into one flat mapping of arrays,
such as a safetensors file holds, and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    detached,
    device,
    frobenius,
    inner,
    max_abs,
    namespace,
    wide_dtype,
)
from lowrank_sp.linalg.svd import truncated_svd


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
        return {self.key: self.mean, f"{self.key}_count": _count(self.count, self.mean)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """The statistic whose :meth:`arrays` are given."""
        return cls(arrays[cls.key], int(arrays[f"{cls.key}_count"]))


@dataclass(frozen=True)
class SecondMoment(_Mean):
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
    def of(cls, x: Array) -> SecondMoment:
        """Second moment of one batch of shape ``(..., n)``, a sample a row."""
        rows = as_compute(_samples(x))
        return cls(inner(rows, rows).mT / rows.shape[0], rows.shape[0])

    def update(self, x: Array) -> SecondMoment:
        """The statistic after one more batch, of shape ``(..., n)``."""
        return self + SecondMoment.of(x)


@dataclass(frozen=True)
class MeanSquare(_Mean):
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
    def of(cls, x: Array) -> MeanSquare:
        """Mean squares of one batch of shape ``(..., n)``, a sample a row."""
        return cls(*_mean_power(x, 2))

    def update(self, x: Array) -> MeanSquare:
        """The statistic after one more batch, of shape ``(..., n)``."""
        return self + MeanSquare.of(x)


@dataclass(frozen=True)
class MeanMagnitude(_Mean):
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
    def of(cls, x: Array) -> MeanMagnitude:
        """Mean magnitudes of one batch of shape ``(..., n)``, a sample a row."""
        return cls(*_mean_power(x, 1))

    def update(self, x: Array) -> MeanMagnitude:
        """The statistic after one more batch, of shape ``(..., n)``."""
        return self + MeanMagnitude.of(x)


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


@dataclass(frozen=True)
class InputPCA:
    """Principal directions of the inputs of a layer, centred, of a stream.

    What is kept is a truncated SVD of the centred samples. A batch joins it as further rows, with
    one more for the distance of both means; so do the directions of another stream
    :cite:p:`ross2008incremental`. Exact as long as the samples span no more than ``rank``
    directions; else each update drops the smallest directions, and ``explained`` says what remains.

    Parameters
    ----------
    mean : array, shape (n,)
    components : array, shape (k, n)
        Orthonormal rows, ``k`` at most ``rank``; the largest entry of each is positive.
    values : array, shape (k,)
        Singular values of the centred samples along them.
    energy : float
        Sum of squares of the centred samples, of all directions.
    count : int
        Samples seen.
    rank : int
        Directions to keep.

    Notes
    -----
    ``O((k + b) n k)`` flops for a batch of ``b`` samples, ``O(k n)`` memory.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [3.0, 0.1], [5.0, 0.0]])
    >>> statistic = InputPCA.of(x[:2], rank=1, rng=0).update(x[2:], rng=0)
    >>> np.round(statistic.components, 3), np.round(statistic.explained, 3)
    (array([[1., 0.]]), array([0.999]))
    """

    mean: Array
    components: Array
    values: Array
    energy: float
    count: int
    rank: int

    key: ClassVar[str] = "components"

    @classmethod
    def of(cls, x: Array, rank: int, *, rng: RNG = None) -> InputPCA:
        """Principal directions of one batch of shape ``(..., n)``, a sample a row."""
        rows = as_compute(_samples(x))
        xp = namespace(rows)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        mean = xp.mean(rows, axis=0)
        centred = rows - mean
        count = rows.shape[0]
        return cls(mean, *_directions(centred, rank, rng), frobenius(centred) ** 2, count, rank)

    def update(self, x: Array, *, rng: RNG = None) -> InputPCA:
        """The statistic after one more batch, of shape ``(..., n)``."""
        rows = as_compute(_samples(x))
        xp = namespace(rows, self.mean)
        mean = xp.mean(rows, axis=0)
        centred = rows - mean
        return self._joined(centred, mean, frobenius(centred) ** 2, rows.shape[0], rng)

    def __add__(self, other: InputPCA) -> InputPCA:
        """The statistic of both parts of the data, with the ``rank`` of the first."""
        xp = namespace(self.mean, other.mean)
        rows = xp.astype(other.values, other.mean.dtype)[:, None] * other.components
        return self._joined(rows, other.mean, other.energy, other.count, None)

    def _joined(self, centred: Array, mean: Array, energy: float, count: int, rng: RNG) -> InputPCA:
        xp = namespace(self.mean, mean)
        if mean.shape != self.mean.shape:
            raise ValueError(f"samples must have {self.mean.shape[0]} entries, got {mean.shape[0]}")
        total = self.count + count
        shift = mean - self.mean
        bridge = (self.count / total * count) ** 0.5 * shift
        known = xp.astype(self.values, self.mean.dtype)[:, None] * self.components
        stacked = xp.concat([known, centred, bridge[None, :]], axis=0)
        return InputPCA(
            self.mean + (count / total) * shift,
            *_directions(stacked, self.rank, rng),
            self.energy + energy + frobenius(bridge) ** 2,
            total,
            self.rank,
        )

    @property
    def explained(self) -> Array:
        """Share of every direction in the variance of the inputs, shape ``(k,)``."""
        return (self.values / (self.energy or 1.0) ** 0.5) ** 2

    def cosines(self, earlier: InputPCA) -> Array:
        """``|<v_i, v'_i>|`` of the directions now and earlier in the stream."""
        k = min(self.components.shape[0], earlier.components.shape[0])
        xp = namespace(self.mean, earlier.mean)
        products = self.components[:k, :] * xp.conj(earlier.components[:k, :])
        return abs(xp.sum(products, axis=1))

    def settled(self, earlier: InputPCA, rank: int, *, cosine: float = 0.99) -> bool:
        """Whether the first ``rank`` directions have turned by less than ``arccos(cosine)``."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        cosines = self.cosines(earlier)[:rank]
        return cosines.shape[0] == rank and float(namespace(cosines).min(cosines)) >= cosine

    def arrays(self) -> dict[str, Array]:
        """The parts by name, ``components`` first."""
        xp, like = namespace(self.mean), self.mean
        energy = xp.asarray(self.energy, dtype=self.values.dtype, device=device(like))
        return {
            "components": self.components,
            "component_values": self.values,
            "components_mean": like,
            "components_energy": energy,
            "components_count": _count(self.count, like),
            "components_rank": _count(self.rank, like),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> InputPCA:
        """The statistic whose :meth:`arrays` are given."""
        return cls(
            arrays["components_mean"],
            arrays["components"],
            arrays["component_values"],
            float(arrays["components_energy"]),
            int(arrays["components_count"]),
            int(arrays["components_rank"]),
        )


Statistic = TypeVar("Statistic", SecondMoment, MeanSquare, MeanMagnitude, MeanGradient, InputPCA)


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


def pack(statistics: Mapping[str, Any]) -> dict[str, Array]:
    """Statistics of many layers as one mapping from ``<layer>.<part>`` to arrays.

    Examples
    --------
    >>> import numpy as np
    >>> packed = pack({"mlp.up": SecondMoment.of(np.ones((3, 2)))})
    >>> sorted(packed)
    ['mlp.up.second_moment', 'mlp.up.second_moment_count']
    >>> unpack(SecondMoment, packed)["mlp.up"].count
    3
    """
    return {
        f"{layer}.{part}": _in_row_order(array)
        for layer, statistic in statistics.items()
        for part, array in statistic.arrays().items()
    }


def unpack(kind: type[Statistic], arrays: Mapping[str, Array]) -> dict[str, Statistic]:
    """All statistics of one kind in what :func:`pack` returned, by layer.

    Raises
    ------
    KeyError
        If a part is missing; it is named.
    """
    suffix = f".{kind.key}"
    layers = [name.removesuffix(suffix) for name in arrays if name.endswith(suffix)]
    return {layer: kind.from_arrays(_Layer(arrays, layer)) for layer in layers}


class _Layer(Mapping[str, Any]):
    """The arrays of one layer, read under their names without it."""

    def __init__(self, arrays: Mapping[str, Array], layer: str):
        self._arrays, self._prefix = arrays, f"{layer}."

    def __getitem__(self, part: str) -> Array:
        return self._arrays[self._prefix + part]

    def __iter__(self) -> Any:
        prefix = self._prefix
        return (name.removeprefix(prefix) for name in self._arrays if name.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _samples(x: Array) -> Array:
    """A batch as a matrix of samples in rows, finite and not empty."""
    x = detached(x)
    xp = namespace(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    if rows.shape[0] == 0:
        raise ValueError(f"a batch must hold at least one sample, got shape {tuple(x.shape)}")
    if not math.isfinite(max_abs(rows)):
        raise ValueError("a batch must be finite, got NaN or infinite entries; skip it")
    return rows


def _mean_power(x: Array, power: int) -> tuple[Array, int]:
    """Mean of ``|x_j|^power`` over a batch, and its size."""
    rows = as_compute(_samples(x))
    xp = namespace(rows)
    size = abs(rows)
    size = xp.astype(size, wide_dtype(xp, size.dtype))
    return xp.mean(size**power, axis=0), rows.shape[0]


def _directions(rows: Array, rank: int, rng: RNG) -> tuple[Array, Array]:
    """Leading right singular vectors, as rows, and singular values."""
    f = truncated_svd(adjoint(rows), min(rank, *rows.shape), rng=rng)
    return adjoint(f.u), f.s


def _in_row_order(a: Array) -> Array:
    # safetensors writes the memory of a NumPy array as it lies.
    xp = namespace(a)
    return xp.reshape(xp.reshape(a, (-1,)), a.shape)


def _count(count: int, like: Array) -> Array:
    xp = namespace(like)
    return xp.asarray(count, dtype=xp.int32 if count < 2**31 else xp.int64, device=device(like))
