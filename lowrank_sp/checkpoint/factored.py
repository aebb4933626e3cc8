"""Checkpoints whose linear layers are two factors.

In place of ``<layer>.weight`` there are ``<layer>.up`` of shape ``(m, r)`` and ``<layer>.down`` of
shape ``(r, n)``, whose product is the weight, outputs by inputs whatever the storage was. Under
``factored`` the configuration has the ranks by layer. Everything else is as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import as_compute
from lowrank_sp.checkpoint.base_copy import side_files
from lowrank_sp.checkpoint.model import INDEX, Checkpoint
from lowrank_sp.checkpoint.output import atomic_directory
from lowrank_sp.checkpoint.tensors import CheckpointError, Tensor, read_object
from lowrank_sp.factors import LowRank

_KEY = "factored"


def write_factored(
    model: str | Path,
    out: str | Path,
    factors: Mapping[str, LowRank],
    *,
    fan_in_fan_out: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in which some linear layers are two factors.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    out : path
        Directory to create, with the sharding, dtypes and side files of ``model``. It appears at
        the end, whole.
    factors : mapping from layer to LowRank, shape (m, n)
        NumPy arrays, outputs by inputs. They are stored in the dtype of the weight.
    fan_in_fan_out : bool, optional
        Whether weights are stored inputs by outputs; by default what the model's configuration
        implies (GPT-2).
    overwrite : bool
        Whether to replace ``out``, if it is empty or a factored checkpoint.

    Raises
    ------
    CheckpointError
        If a layer is not in the checkpoint, is of another shape, or its factors leave the range of
        its dtype. Nothing is left behind.
    """
    checkpoint = Checkpoint(model)
    inputs = [checkpoint.path, *checkpoint.files]
    with atomic_directory(out, overwrite=overwrite, inputs=inputs, ours=is_factored) as folder:
        save_factored(folder, checkpoint, factors, fan_in_fan_out=fan_in_fan_out)


def save_factored(
    folder: Path,
    checkpoint: Checkpoint,
    factors: Mapping[str, LowRank],
    *,
    fan_in_fan_out: bool | None = None,
) -> None:
    """Write what :func:`write_factored` does into an empty directory."""
    ranks = dict(_ranks_in(checkpoint.config) or {})
    new: dict[str, list[_Entry]] = {}
    for name, f in factors.items():
        layer = checkpoint.layer(name, fan_in_fan_out=fan_in_fan_out)
        if f.shape != layer.shape:
            raise CheckpointError(f"{name}: shape must be {layer.shape}, got {f.shape}")
        ranks[name] = f.rank
        new[layer.tensor.name] = [
            _encoded(layer.tensor, f"{name}.{part}", values)
            for part, values in (("up", f.left), ("down", f.right))
        ]
    if checkpoint.path.is_dir():
        for item in side_files(checkpoint.path):
            target = folder / item.relative_to(checkpoint.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item, target)
    where, size = {}, 0
    for file in checkpoint.files:
        own = [t for t in checkpoint.tensors.values() if t.path == file]
        entries = [entry for t in own for entry in new.get(t.name, [_Entry.of(t)])]
        _write(folder / file.name, entries)
        where |= dict.fromkeys((entry.name for entry in entries), file.name)
        size += sum(entry.size for entry in entries)
    if (checkpoint.path / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = {**checkpoint.config, _KEY: {"ranks": ranks}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_factored(path: str | Path) -> dict[str, LowRank]:
    """The factorized layers of a checkpoint, by name.

    Raises
    ------
    CheckpointError
        If it is none, or if factors are missing or do not fit the ranks in its configuration.
    """
    checkpoint = Checkpoint(path)
    ranks = _ranks_in(checkpoint.config)
    if ranks is None:
        raise CheckpointError(f"{path}: not a factored checkpoint, its configuration has no ranks")
    layers = {}
    for name, rank in ranks.items():
        up, down = (checkpoint.tensors.get(f"{name}.{part}") for part in ("up", "down"))
        if up is None or down is None:
            raise CheckpointError(f"{path}: {name} lacks one of up and down; fetch it again")
        if up.shape[1:] != (rank,) or down.shape[:1] != (rank,) or len(down.shape) != 2:
            raise CheckpointError(
                f"{path}: the factors of {name} must have rank {rank}, got shapes {up.shape} and "
                f"{down.shape}"
            )
        layers[name] = LowRank(up.read(), down.read())
    return layers


def as_stored(f: LowRank, weight: Tensor) -> LowRank:
    """Factors rounded to the dtype of a weight, as those in its place will be."""
    parts = ((replace(weight, shape=tuple(part.shape)), part) for part in (f.left, f.right))
    left, right = (as_compute(tensor.decode(tensor.encode(part))) for tensor, part in parts)
    return LowRank(left, right)


def is_factored(path: Path) -> bool:
    """Whether a directory is a factored checkpoint."""
    try:
        return _ranks_in(read_object(path / "config.json", "config")) is not None
    except CheckpointError:
        return False


def _ranks_in(config: Mapping[str, Any]) -> dict[str, int] | None:
    entry = config.get(_KEY)
    ranks = entry.get("ranks") if isinstance(entry, dict) else None
    valid = isinstance(ranks, dict) and all(type(rank) is int for rank in ranks.values())
    return ranks if valid else None


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: bytes in memory, or those of a tensor on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    blocks: Callable[[], Iterable[Any]]

    @classmethod
    def of(cls, tensor: Tensor) -> _Entry:
        """The tensor as it is."""
        size = tensor.stop - tensor.start
        return cls(tensor.name, tensor.dtype, tensor.shape, size, tensor.blocks)


def _encoded(weight: Tensor, name: str, values: np.ndarray) -> _Entry:
    """A factor in the dtype of the weight."""
    stored = replace(weight, name=name, shape=tuple(values.shape)).encode(values)
    data = np.ascontiguousarray(stored).data
    return _Entry(name, weight.dtype, tuple(values.shape), stored.nbytes, lambda: [data])


def _write(path: Path, entries: list[_Entry]) -> None:
    """A safetensors file, its data copied block by block."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        offsets = [start, start + entry.size]
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        start += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            for block in entry.blocks():
                file.write(block)
