"""Many adapters of one layer side by side, and batches whose rows use different ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, compute_dtype, device, is_array, namespace
from lowrank_sp.adapters._products import check_alike, products_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.serving.rows import (
    Part,
    assembled,
    decoded,
    host_ids,
    in_dtype_of,
    segments,
    take,
)

# Where rows of a segment and of its product have no more numbers than this, copies into tiles cost
# less on a CPU than products one by one (measured, docs/serving.md).
_TILE = 2**13


@dataclass(frozen=True, repr=False)
class AdapterBank:
    """Adapters of one layer, of any ranks, stored as rows: those of equal ranks lie together.

    Attributes
    ----------
    down : array, shape (R, n), or Quantized
        The ``down`` factors one below the other, ``R`` the sum of all ranks.
    up : array, shape (R, m), or Quantized
        The transposed ``up`` factors.
    ranks, scales, names : tuple
        One entry an adapter, in the order of their ids.

    Examples
    --------
    >>> import numpy as np
    >>> one, two = Product(np.ones((3, 1)), np.ones((1, 2))), Product(np.eye(3, 2), np.eye(2), 10.0)
    >>> bank = AdapterBank.of({"one": one, "two": two})
    >>> bank
    AdapterBank(2 adapters of 3 x 2, ranks 1..2, float64)
    >>> bank.apply(np.array([[1.0, 2.0]] * 3), bank.ids(["two", None, "one"]))
    array([[10., 20.,  0.],
           [ 0.,  0.,  0.],
           [ 3.,  3.,  3.]])
    """

    down: Any
    up: Any
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, adapters: Mapping[str, Any] | Sequence[Any]) -> AdapterBank:
        """From adapters by name, or in a sequence whose names are their positions.

        Parameters
        ----------
        adapters : mapping or sequence
            :class:`~lowrank_sp.adapters.forms.Product`, anything else with ``up``, ``down`` and
            ``scale``, or ``LowRank``; of one shape, dtype and array library.

        Raises
        ------
        TypeError, ValueError
            If adapters do not fit each other, which names the one that does not fit the first.
        """
        if not isinstance(adapters, Mapping):
            adapters = {str(k): adapter for k, adapter in enumerate(adapters)}
        names = tuple(adapters)
        pairs = products_of(list(adapters.values()), "adapter", names, widen=False)
        check_alike(pairs, "adapter", ("shape",), names)
        ranks = tuple(pair.rank for pair in pairs)
        stored = [pairs[k] for k in np.argsort(ranks, kind="stable")]
        xp = namespace(stored[0].down)
        return cls(
            xp.concat([pair.down for pair in stored], axis=0),
            xp.concat([pair.up.mT for pair in stored], axis=0),
            ranks,
            tuple(pair.scale for pair in pairs),
            names,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        m, n = self.shape
        ranks = f"{min(self.ranks)}..{max(self.ranks)}"
        return f"AdapterBank({len(self)} adapters of {m} x {n}, ranks {ranks}, {self.down.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight."""
        return self.up.shape[1], self.down.shape[1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every adapter."""
        order = np.argsort(self.ranks, kind="stable")
        starts = np.zeros(len(self), dtype=int)
        starts[order] = np.cumsum([0, *np.asarray(self.ranks)[order][:-1]])
        return tuple(starts.tolist())

    def __getitem__(self, key: int | str) -> Product:
        """One adapter by its id or name, decoded where the bank is quantized."""
        k = self._id(key) if isinstance(key, str) else range(len(self))[key]
        down, up = self._factors(k)
        return Product(up.mT, down, self.scales[k])

    def items(self) -> Iterator[tuple[str, Product]]:
        """Names and adapters, in the order of the ids."""
        return ((name, self[k]) for k, name in enumerate(self.names))

    def ids(self, names: Sequence[str | None]) -> np.ndarray:
        """Ids of names, -1 for None."""
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence, got {names!r}; pass a list of names")
        return np.array([-1 if name is None else self._id(name) for name in names], dtype=int)

    def _id(self, name: str) -> int:
        if name not in self.names:
            some = ", ".join(map(repr, self.names[:5]))
            raise KeyError(f"no adapter {name!r} in the bank; names are strings, such as {some}")
        return self.names.index(name)

    def map(self, function: Callable[[Array], Any]) -> AdapterBank:
        """The bank with ``function`` applied to both arrays of rows.

        A cast, a move to a device, or a quantizer: ``bank.map(nf4)`` keeps the adapters in 4 bits,
        and :meth:`apply` decodes those that a batch asks for.
        """
        return replace(self, down=function(self.down), up=function(self.up))

    def apply(self, x: Array, ids: Any) -> Array:
        """``y[t] = scale_i * up_i @ (down_i @ x[t])`` with the adapter ``i = ids[t]`` of every row.

        Parameters
        ----------
        x : array, shape (T, ..., n)
        ids : array or sequence of int, shape (T,)
            In ``0..len(bank) - 1``, in any order; -1 where a row uses no adapter, whose ``y`` is 0.

        Returns
        -------
        array, shape (T, ..., m)
            Of the dtype of ``x``, if floating, computed in at least float32. PyTorch and
            JAX can differentiate it, where the bank is not quantized.

        Raises
        ------
        TypeError, ValueError
            If shapes do not fit or an id is out of range.

        Notes
        -----
        Rows are sorted by adapter :cite:p:`chen2024punica`. A long segment is multiplied by the
        factors of its adapter, ``2 r (m + n)`` flops a row and one read of the factors of the
        adapters in the batch. Short ones, and all on accelerators, are cut into tiles of one length
        that are multiplied together, at most twice as many rows.

        Where a bank is on another device than the host, ids cross over to it once; best keep them
        on the host.
        """
        xp = namespace(x, *[f for f in (self.down, self.up) if is_array(f)])
        if x.ndim < 2 or x.shape[-1] != self.shape[1]:
            raise ValueError(f"x must have shape (T, ..., {self.shape[1]}), got {tuple(x.shape)}")
        found = host_ids(ids, x.shape[0], len(self))
        dtype = compute_dtype(xp, xp.result_type(x.dtype, self.down.dtype))
        rows = xp.reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]))
        shape = (*rows.shape[:2], self.shape[0])
        y = assembled(self._parts(rows, found, dtype), shape, rows, dtype)
        return in_dtype_of(x, xp.reshape(y, (*x.shape[:-1], shape[-1])))

    def _parts(self, x: Array, ids: np.ndarray, dtype: Any) -> Iterator[Part]:
        """Products of the rows of one adapter, or of one rank, with where they belong."""
        xp = namespace(x)
        order, found = segments(ids)
        for rank in sorted({self.ranks[k] for k, _, _ in found}):
            same = [segment for segment in found if self.ranks[segment[0]] == rank]
            length = -(-sum(stop - start for _, start, stop in same) // len(same))
            if len(same) > 1 and _tiles_pay(length * x.shape[1] * sum(self.shape), x):
                yield self._tiled(x, order, same, length, dtype)
                continue
            for k, start, stop in same:
                places = order[start:stop]
                part = xp.astype(take(x, places), dtype, copy=False)
                flat = xp.reshape(part, (math.prod(part.shape[:2]), part.shape[-1]))
                down, up = (xp.astype(f, dtype, copy=False) for f in self._factors(k))
                y = (self.scales[k] * (flat @ down.mT)) @ up
                yield places, xp.reshape(y, (*part.shape[:2], self.shape[0]))

    def _tiled(
        self,
        x: Array,
        order: np.ndarray,
        same: Sequence[tuple[int, int, int]],
        length: int,
        dtype: Any,
    ) -> Part:
        """Rows of many adapters of one rank, as tiles of ``length`` rows of one adapter each."""
        xp = namespace(x)
        adapters, starts, stops = np.array(same).T
        counts = -(-(stops - starts) // length)
        tile = np.repeat(np.arange(len(same)), counts)
        within = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
        index = (starts[tile] + length * within)[:, None] + np.arange(length)
        real = (index < stops[tile][:, None]).reshape(-1)
        places = order[np.minimum(index, stops[tile][:, None] - 1).reshape(-1)]
        rank = self.ranks[same[0][0]]
        rows = (np.asarray(self.starts)[adapters[tile]][:, None] + np.arange(rank)).reshape(-1)
        down, up = (
            xp.reshape(xp.astype(decoded(f, rows), dtype, copy=False), (len(tile), rank, -1))
            for f in (self.down, self.up)
        )
        tiles = xp.astype(take(x, places), dtype, copy=False)
        tiles = xp.reshape(tiles, (len(tile), length * x.shape[1], x.shape[-1]))
        scales = np.asarray(self.scales)[adapters[tile], None, None]
        inner = (tiles @ down.mT) * xp.asarray(scales, dtype=dtype, device=device(x))
        y = xp.reshape(inner @ up, (len(places), *x.shape[1:2], self.shape[0]))
        return places[real], take(y, np.flatnonzero(real))

    def _factors(self, k: int) -> tuple[Array, Array]:
        rows = slice(self.starts[k], self.starts[k] + self.ranks[k])
        return decoded(self.down, rows), decoded(self.up, rows)


def _tiles_pay(numbers: int, like: Array) -> bool:
    """Whether to copy segments of so many numbers into tiles, rather than multiply one by one."""
    on_cpu = isinstance(like, np.ndarray) or getattr(device(like), "type", None) == "cpu"
    return not on_cpu or numbers <= _TILE
