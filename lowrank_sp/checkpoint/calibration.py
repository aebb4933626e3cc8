"""Statistics of layers in a calibration file, read one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from lowrank_sp.adapters.statistics import SecondMoment
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError, Tensor, read_header

_INTEGERS = {"I32": "<i4", "I64": "<i8"}


class Calibration(Mapping[str, np.ndarray]):
    """One statistic of many layers, by layer.

    Parameters
    ----------
    path : path
        A safetensors file of what :func:`~lowrank_sp.adapters.statistics.pack` returned.
    statistic : str
        The end of its keys, such as ``second_moment``.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or has that statistic of no layer.
    """

    def __init__(self, path: str | Path, statistic: str):
        self.path, self.statistic = Path(path), statistic
        self._tensors: dict[str, Tensor] = {}
        tensors = read_header(self.path)
        end = f".{statistic}"
        self._tensors = {k.removesuffix(end): t for k, t in tensors.items() if k.endswith(end)}
        if not self._tensors:
            some = ", ".join(sorted(tensors)[:3]) or "nothing"
            raise CheckpointError(f"{self.path}: no {statistic} of any layer; the file has {some}")

    def __getitem__(self, layer: str) -> np.ndarray:
        return self._tensors[layer].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def check(self, layers: Collection[str]) -> None:
        """Raise CheckpointError unless the file has the statistic of all of these layers."""
        missing = [layer for layer in layers if layer not in self._tensors]
        if missing:
            raise CheckpointError(
                f"{missing[0]}: no {self.statistic} in {self.path} ({len(missing)} such layers); "
                "collect it, or choose other targets"
            )


class SecondMoments(Mapping[str, SecondMoment]):
    """The second moments of many layers with the numbers of their samples, by layer.

    Parameters
    ----------
    path : path
        As in :class:`Calibration`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._means = Calibration(path, SecondMoment.key)
        self._tensors = read_header(self.path)

    def __getitem__(self, layer: str) -> SecondMoment:
        name = f"{layer}.{SecondMoment.key}_count"
        mean, counted = self._means[layer], self._tensors.get(name)
        if counted is None or counted.dtype not in _INTEGERS:
            raise CheckpointError(
                f"{self.path}: {name} must be there, an integer; pack the statistics again"
            )
        (count,) = np.frombuffer(b"".join(counted.blocks()), _INTEGERS[counted.dtype])
        return SecondMoment(mean, int(count))

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)


def calibration_for(
    method: str, statistics: Mapping[str, str | None], path: str | Path | None
) -> Calibration | None:
    """What a method needs of every layer, or None for one that needs nothing.

    Raises
    ------
    CheckpointError
        If a file is missing, or given to a method that has no use for it.
    """
    needed = statistics[method]
    if needed is None and path is not None:
        takers = ", ".join(name for name, statistic in statistics.items() if statistic is not None)
        raise OptionError(f"a calibration is for {takers} only, got {path} for {method}")
    if needed is not None and path is None:
        raise OptionError(
            f"{method} needs the {needed} of every layer; pass --calibration FILE.safetensors"
        )
    return None if needed is None or path is None else Calibration(path, needed)
