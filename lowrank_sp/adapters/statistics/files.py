"""Statistics of many layers as one flat mapping of arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lowrank_sp._arrays import Array, namespace
from lowrank_sp.adapters.statistics.components import InputPCA
from lowrank_sp.adapters.statistics.means import (
    MeanGradient,
    MeanMagnitude,
    MeanSquare,
    SecondMoment,
)

Statistic = TypeVar("Statistic", SecondMoment, MeanSquare, MeanMagnitude, MeanGradient, InputPCA)


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


def _in_row_order(a: Array) -> Array:
    # safetensors writes the memory of a NumPy array as it lies.
    xp = namespace(a)
    return xp.reshape(xp.reshape(a, (-1,)), a.shape)
