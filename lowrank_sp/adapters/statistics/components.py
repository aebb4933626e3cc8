"""Principal directions of inputs, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    frobenius,
    namespace,
    wide_dtype,
)
from lowrank_sp.adapters.statistics.batches import as_array, samples
from lowrank_sp.linalg.svd import truncated_svd


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
        rows = as_compute(samples(x))
        xp = namespace(rows)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        mean = xp.mean(rows, axis=0)
        centred = rows - mean
        count = rows.shape[0]
        return cls(mean, *_directions(centred, rank, rng), frobenius(centred) ** 2, count, rank)

    def update(self, x: Array, *, rng: RNG = None) -> InputPCA:
        """The statistic after one more batch, of shape ``(..., n)``."""
        rows = as_compute(samples(x))
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
        # A sum of squares, which may leave the range of single precision.
        wide = wide_dtype(xp, self.values.dtype)
        energy = xp.asarray(self.energy, dtype=wide, device=device(like))
        return {
            "components": self.components,
            "component_values": self.values,
            "components_mean": like,
            "components_energy": energy,
            "components_count": as_array(self.count, like),
            "components_rank": as_array(self.rank, like),
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


def _directions(rows: Array, rank: int, rng: RNG) -> tuple[Array, Array]:
    """Leading right singular vectors, as rows, and singular values."""
    f = truncated_svd(adjoint(rows), min(rank, *rows.shape), rng=rng)
    return adjoint(f.u), f.s
