"""Rows of a batch by the adapter that they use: sorted into segments, multiplied, put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    device,
    is_array,
    is_complex,
    is_inexact,
    namespace,
    to_host,
)
from lowrank_sp.adapters.quantize import Quantized

#: Positions of rows in the batch, and their products.
Part = tuple[np.ndarray, Array]


def host_ids(ids: Any, length: int, adapters: int) -> np.ndarray:
    """Ids as an array on the host, checked."""
    found = to_host(ids) if is_array(ids) else np.asarray(ids)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, got {found.dtype}; bank.ids() makes them of names")
    if found.shape != (length,):
        raise ValueError(f"ids must have shape ({length},) as x has rows, got {found.shape}")
    low, high = (int(found.min()), int(found.max())) if length else (-1, -1)
    if low < -1 or high >= adapters:
        wrong = low if low < -1 else high
        raise ValueError(f"ids must be in 0..{adapters - 1}, or -1 for no adapter, got {wrong}")
    return found.astype(int)


def in_dtype_of(x: Array, y: Array) -> Array:
    """``y`` in the dtype of ``x``, where that can hold it: integers and real numbers may not."""
    fits = is_inexact(x.dtype) and is_complex(x.dtype) >= is_complex(y.dtype)
    return namespace(x).astype(y, x.dtype, copy=False) if fits else y


def segments(ids: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Positions sorted by id, and ``(id, start, stop)`` of every id but -1 in that order."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ids)]
    found = [(int(ordered[a]), a, b) for a, b in pairwise(edges) if a < b]
    return order, [segment for segment in found if segment[0] >= 0]


def assembled(parts: Iterable[Part], shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An array of ``shape`` with the rows of ``parts`` in their places, and zeros elsewhere."""
    xp = namespace(like)
    if isinstance(like, np.ndarray):
        y = np.zeros(shape, dtype)
        for places, part in parts:
            y[places] = part
        return y
    parts = list(parts)
    count = sum(len(places) for places, _ in parts)
    # Rows without a part read the row of zeros behind all others.
    source = np.full(shape[0], count)
    source[[place for places, _ in parts for place in places]] = np.arange(count)
    zeros = xp.zeros((1, *shape[1:]), dtype=dtype, device=device(like))
    return take(xp.concat([*[part for _, part in parts], zeros], axis=0), source)


def take(x: Array, rows: np.ndarray) -> Array:
    """Rows of ``x`` by an index on the host."""
    if isinstance(x, np.ndarray):
        return x.take(rows, axis=0)
    xp = namespace(x)
    return xp.take(x, xp.asarray(rows, device=device(x)), axis=0)


def decoded(factor: Any, rows: slice | np.ndarray) -> Array:
    """Rows of a factor, which may be quantized."""
    if not isinstance(factor, Quantized):
        return factor[rows, :] if isinstance(rows, slice) else take(factor, rows)
    scales = factor.scales
    if isinstance(scales, Quantized):
        scales = namespace(factor.codes).reshape(scales.to_dense(), (factor.shape[0], -1))
    parts = {"codes": factor.codes, "scales": scales, "offsets": factor.offsets}
    chosen = {name: None if a is None else decoded(a, rows) for name, a in parts.items()}
    return replace(factor, **chosen).to_dense()
