"""Statistics of layers in a calibration file, read one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from lowrank_sp.checkpoint.tensors import CheckpointError, read_header


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
