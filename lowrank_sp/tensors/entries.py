"""Observed entries of a tensor, and the least-squares kernel of every completion by them.

In alternating least squares each slice of a tensor, the entries that share an index of one mode,
gives a small system of its own. The array standard has gathers but no scatter. So slices of similar
numbers of entries are padded to one length and stacked: a kernel is then a gather and a batched
product for every such bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    eps,
    frobenius,
    from_host,
    is_array,
    max_abs,
    namespace,
    power_of_two,
    real_dtype,
    to_host,
)
from lowrank_sp.iterate import Solution
from lowrank_sp.tensors.factored import on_host

# Entries in a bucket, padding included.
_BUCKET = 2**16


class Bucket(NamedTuple):
    """Slices of one mode, their entries padded to one length."""

    lines: Array  # (b,) which indices of the mode
    chosen: np.ndarray  # (b * length,) which entries, on the host
    values: Array  # (b, length, 1) their values, zero for padding
    inside: Array  # (b, length, 1) one, and zero for padding


def check_entries(entries: Any) -> None:
    """Raise unless they are :class:`TensorEntries`."""
    if not isinstance(entries, TensorEntries):
        raise TypeError(
            f"entries must be TensorEntries, got {type(entries).__name__}; TensorEntries.from_nan "
            "and TensorEntries.from_mask make them of tensors"
        )


def check_enough(entries: TensorEntries, dof: int) -> None:
    """Raise if there are fewer entries than degrees of freedom."""
    if entries.size < dof:
        raise ValueError(
            f"a tensor of this rank has {dof} degrees of freedom, got {entries.size} entries; "
            "lower the rank"
        )


def of_unit_size(entries: TensorEntries) -> tuple[TensorEntries, float]:
    """The entries over a power of two of about their size, on the host where they lie, and it.

    Squares and products of them then stay in the range of the dtype.
    """
    check_entries(entries)
    unit = power_of_two(entries.values)
    values = on_host(entries.values) / unit
    return TensorEntries(entries.indices, values, entries.shape), unit


@dataclass(frozen=True, eq=False, repr=False)
class TensorEntries:
    """Entries of a tensor of shape ``(n_1, ..., n_N)`` that were observed.

    Parameters
    ----------
    indices : integer array on the host, shape (M, N)
        Position of every entry.
    values : array, shape (M,)
        Of any library, device and dtype; computed in at least float32.
    shape : sequence of int

    Raises
    ------
    ValueError
        If positions repeat or lie outside of ``shape``, or values are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, np.nan], [np.nan, 3.0]])
    >>> entries = TensorEntries.from_nan(x)
    >>> entries, entries.values
    (TensorEntries(2 x 2, 2 observed, float64), array([1., 3.]))
    """

    indices: np.ndarray
    values: Array
    shape: tuple[int, ...]

    def __init__(self, indices: Any, values: Array, shape: Sequence[int]):
        shape, indices = tuple(shape), np.asarray(indices)
        if indices.ndim != 2 or indices.shape[1] != len(shape) or indices.dtype.kind not in "iu":
            raise ValueError(
                f"indices must be integers of shape (M, {len(shape)}), got {indices.dtype} of "
                f"shape {indices.shape}"
            )
        if not is_array(values) or tuple(values.shape) != indices.shape[:1]:
            raise ValueError(
                f"values must be an array of shape ({len(indices)},), one for every position, got "
                f"{getattr(values, 'shape', type(values).__name__)}"
            )
        if np.any(indices < 0) or np.any(indices >= np.array(shape)):
            raise ValueError(f"indices must lie within shape {shape}; the first index is 0")
        flat = np.sort(np.ravel_multi_index(tuple(indices.T), shape))
        if np.any(flat[1:] == flat[:-1]):
            raise ValueError("positions must not repeat; average repeated observations first")
        values = as_compute(values)
        if not np.isfinite(max_abs(values)):
            raise ValueError("values must be finite, got NaN or inf; leave such entries out")
        for name, field in (("indices", indices), ("values", values), ("shape", shape)):
            object.__setattr__(self, name, field)

    @classmethod
    def from_mask(cls, x: Array, mask: Array) -> TensorEntries:
        """The entries of a tensor ``x`` where ``mask``, of the same shape, is true."""
        mask = to_host(mask)
        if mask.shape != tuple(x.shape) or mask.dtype != np.bool_:
            raise ValueError(
                f"mask must be boolean and of the shape {tuple(x.shape)} of the tensor, got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        xp = namespace(x)
        flat = xp.asarray(np.flatnonzero(mask), device=device(x))
        return cls(np.argwhere(mask), xp.take(xp.reshape(x, (-1,)), flat), mask.shape)

    @classmethod
    def from_nan(cls, x: Array) -> TensorEntries:
        """The entries of a tensor ``x`` that are not NaN."""
        return cls.from_mask(x, ~namespace(x).isnan(x))

    @property
    def size(self) -> int:
        """Number ``M`` of entries."""
        return len(self.indices)

    @property
    def ndim(self) -> int:
        """Number of modes."""
        return len(self.shape)

    def norm(self) -> float:
        """Euclidean norm of the values."""
        return frobenius(self.values)

    def relative_residual(self, tensor: Any) -> float:
        """``||X - tensor|| / ||X||`` over the entries; on withheld ones, an estimate of the error.

        ``tensor`` is a :class:`~lowrank_sp.tensors.factored.FactoredTensor`. Zero where both norms
        vanish, and infinite where only the second does.
        """
        error, size = frobenius(self.values - tensor.sample(self.indices)), self.norm()
        if error == 0.0:
            return 0.0
        return error / size if size else float("inf")

    def select(self, chosen: np.ndarray) -> TensorEntries:
        """The entries where ``chosen``, a boolean host array of shape ``(M,)``, is true."""
        xp = namespace(self.values)
        index = xp.asarray(np.flatnonzero(chosen), device=device(self.values))
        return TensorEntries(self.indices[chosen], xp.take(self.values, index), self.shape)

    def split(self, share: float = 0.05, rng: RNG = None) -> tuple[TensorEntries, TensorEntries]:
        """A random ``share`` of the entries withheld: ``(kept, withheld)``."""
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), got {share}")
        withheld = np.zeros(self.size, bool)
        chosen = np.random.default_rng(rng).permutation(self.size)[: round(share * self.size)]
        withheld[chosen] = True
        return self.select(~withheld), self.select(withheld)

    def unobserved(self) -> list[tuple[int, np.ndarray]]:
        """Pairs of a mode and the indices of it that no entry has."""
        counts = (
            np.bincount(i, minlength=n) for i, n in zip(self.indices.T, self.shape, strict=True)
        )
        empty = [(mode, np.flatnonzero(count == 0)) for mode, count in enumerate(counts)]
        return [(mode, lines) for mode, lines in empty if len(lines)]

    def least_squares(
        self,
        mode: int,
        design: Callable[[np.ndarray], Array],
        current: Array,
        ridge: float = 0.0,
    ) -> tuple[Array, float]:
        r"""Rows of a factor that fit the entries best, one small system for every row.

        .. math:: \min_A \sum_{m=1}^M |x_m - \langle \bar d_m, A_{i_m} \rangle|^2
                  + \rho \lVert A \rVert_F^2

        Parameters
        ----------
        mode : int
            Entry ``m`` lies in row ``i_m = indices[m, mode]``.
        design : callable
            From entry numbers, a host array of shape ``(k,)``, to their vectors ``d_m``, an array
            of shape ``(k, r)``.
        current : array, shape (n_mode, r)
            The point that is corrected. Rows without entries stay, and so do directions that the
            entries of a row leave open.
        ridge : float
            The weight ``rho``.

        Returns
        -------
        array, shape (n_mode, r)
        float
            ``sum |x_m - <d_m, A_i>|^2`` before the correction.

        Notes
        -----
        ``M (r^2 + 4 r) + n r^3 / 3`` multiplications. Solving for a correction keeps rounding from
        growing with the condition of the systems when this is repeated.
        """
        xp = namespace(current)
        r = current.shape[1]
        unit = xp.eye(r, dtype=current.dtype, device=device(current))
        parts, squares = [], 0.0
        buckets, place = self._buckets(mode)
        for bucket in buckets:
            d = self._designed(bucket, design)
            old = xp.take(current, bucket.lines, axis=0)[:, :, None]
            residual = bucket.values - d @ old
            squares += float(xp.sum(abs(residual) ** 2))
            gram = adjoint(d) @ d
            # Far below what moves the solution, and enough for open directions.
            shift = eps(d.dtype) * xp.linalg.trace(gram)[:, None, None] + eps(d.dtype) ** 2
            step = adjoint(d) @ residual - ridge * old
            parts.append((old + xp.linalg.solve(gram + (ridge + shift) * unit, step))[:, :, 0])
        return xp.take(xp.concat([*parts, current], axis=0), place, axis=0), squares

    def transform(self, mode: int, rows: Array, matrices: Array) -> Array:
        """``rows[m] @ matrices[i_m]`` for every entry, ``i_m`` being its index of ``mode``.

        Parameters
        ----------
        mode : int
        rows : array, shape (M, r)
        matrices : array, shape (n_mode, r, s)

        Returns
        -------
        array, shape (M, s)
        """
        xp = namespace(rows, matrices)
        parts = []
        for bucket in self._buckets(mode)[0]:
            x = self._designed(bucket, lambda chosen: xp.take(rows, self._moved(chosen), axis=0))
            y = x @ xp.take(matrices, bucket.lines, axis=0)
            parts.append(xp.reshape(y, (-1, matrices.shape[2])))
        return xp.take(xp.concat(parts, axis=0), self._places(mode), axis=0)

    def _designed(self, bucket: Bucket, design: Callable[[np.ndarray], Array]) -> Array:
        xp = namespace(self.values)
        d = design(bucket.chosen)
        shape = (*bucket.values.shape[:2], d.shape[1])
        return xp.reshape(d, shape) * xp.astype(bucket.inside, d.dtype)

    def _moved(self, indices: np.ndarray) -> Array:
        return namespace(self.values).asarray(indices, device=device(self.values), copy=True)

    def _buckets(self, mode: int) -> tuple[list[Bucket], Array]:
        """Buckets of a mode, and where its indices stand among their rows and ``current``."""
        return self._planned[mode][:2]

    def _places(self, mode: int) -> Array:
        """Where every entry stands among the padded entries of all buckets."""
        return self._planned[mode][2]

    @cached_property
    def _planned(self) -> list[tuple[list[Bucket], Array, Array]]:
        return [self._plan(mode) for mode in range(self.ndim)]

    def _plan(self, mode: int) -> tuple[list[Bucket], Array, Array]:
        xp = namespace(self.values)
        n = self.shape[mode]
        order = np.argsort(self.indices[:, mode], kind="stable")
        counts = np.bincount(self.indices[:, mode], minlength=n)
        starts = np.cumsum(counts) - counts
        lines = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        # Lines without entries are read from the rows that follow those of the buckets.
        place = len(lines) + np.arange(n)
        place[lines] = np.arange(len(lines))
        where = np.empty(self.size, dtype=np.int64)
        buckets, first, padded = [], 0, 0
        while first < len(lines):
            length = int(counts[lines[first]])
            similar = int(np.searchsorted(-counts[lines], -(3 * length // 4), side="right"))
            last = max(first + 1, min(similar, first + max(1, _BUCKET // length)))
            group = lines[first:last]
            inside = np.arange(length) < counts[group][:, None]
            chosen = order[np.where(inside, starts[group][:, None] + np.arange(length), 0)]
            where[chosen[inside]] = padded + np.flatnonzero(inside)
            ones = from_host(
                inside[:, :, None].astype(np.float64),
                self.values,
                real_dtype(xp, self.values.dtype),
            )
            values = xp.reshape(
                xp.take(self.values, self._moved(chosen.ravel())), (*chosen.shape, 1)
            )
            values = values * xp.astype(ones, values.dtype)
            buckets.append(Bucket(self._moved(group), chosen.ravel(), values, ones))
            first, padded = last, padded + chosen.size
        return buckets, self._moved(place), self._moved(where)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        name = str(self.values.dtype).rpartition(".")[2]
        return f"TensorEntries({size}, {self.size} observed, {name})"


def with_gaps(solution: Solution, data: TensorEntries) -> Solution:
    """``solution``, not converged where an index has no entry, which its reason names."""
    gaps = data.unobserved()
    if not gaps:
        return solution
    names = ", ".join(f"index {lines[0]} of mode {mode}" for mode, lines in gaps)
    count = sum(len(lines) for _, lines in gaps)
    reason = f"{solution.reason}; no entry has {names} ({count} in all): zero there"
    converged = None if solution.converged is None else False
    return replace(solution, converged=converged, reason=reason)
