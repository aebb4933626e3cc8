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

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters.compress import RankPlan, output_spectrum, plan_ranks, svd_llm
from lowrank_sp.adapters.statistics import SecondMoment
from lowrank_sp.checkpoint.base_copy import side_files
from lowrank_sp.checkpoint.job import Progress, per_layer, seeds
from lowrank_sp.checkpoint.model import INDEX, Checkpoint, Layer
from lowrank_sp.checkpoint.output import atomic_directory
from lowrank_sp.checkpoint.tensors import CheckpointError, Tensor, read_object
from lowrank_sp.factors import LowRank
from lowrank_sp.tasks import Executor

_KEY = "factored"


def compress(
    model: str | Path,
    out: str | Path,
    second_moments: Mapping[str, SecondMoment],
    *,
    keep: float,
    targets: str | None = None,
    fan_in_fan_out: bool | None = None,
    relative: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> RankPlan:
    """Compress the linear layers of a checkpoint to a share of their parameters.

    Ranks by :func:`~lowrank_sp.adapters.compress.plan_ranks` from the spectra of the outputs, then
    :func:`~lowrank_sp.adapters.compress.svd_llm` of every layer; PyTorch is not needed.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    out : path
        Directory to create: the files of ``model``, with two factors in place of weights. It
        appears at the end, whole.
    second_moments : mapping from layer to SecondMoment
        Of all layers that are meant, of at least as many samples as the layer has inputs: from
        :func:`lowrank_sp.torch.collect_inputs`, or by
        :func:`~lowrank_sp.adapters.statistics.unpack` from a file.
    keep : float
        In (0, 1]: the share of the parameters of these layers to keep, biases left out.
    targets : str, optional
        Regular expression for the names of layers; by default all linear layers.
    fan_in_fan_out : bool, optional
        Whether weights are stored inputs by outputs; by default what the model's configuration
        implies (GPT-2).
    relative : bool
        As in :func:`~lowrank_sp.adapters.compress.plan_ranks`.
    seed : int
        Every layer draws from its own child, so the executor does not change results.
    overwrite : bool
        Whether to replace ``out``, if it is empty or a factored checkpoint.
    executor : Executor, optional
        Where to factorize: any executor with ``submit``, with access to the files of ``model``.
    ahead : int
        Layers in work at a time with an executor.
    progress : callable, optional
        Called as ``progress(done, total, name)``, once for the spectra and once for the factors.

    Returns
    -------
    RankPlan
        The ranks, with the error that they make and a bound of what any ranks could make.

    Raises
    ------
    CheckpointError
        For anything wrong with the checkpoint, the second moments, the budget or the output
        directory. Nothing is left behind.
    """
    checkpoint = Checkpoint(model)
    layers = {x.name: x for x in checkpoint.layers(targets, fan_in_fan_out=fan_in_fan_out)}
    missing = [name for name in layers if name not in second_moments]
    if missing:
        raise CheckpointError(
            f"there is no second moment of {missing[0]} ({len(missing)} such); collect it, or "
            "choose other targets"
        )
    for name, layer in layers.items():
        count, n = second_moments[name].count, layer.shape[1]
        if count < n:
            raise CheckpointError(
                f"{name}: too few samples: its second moment has seen {count}, fewer than the "
                f"layer has inputs, and what it has not seen would be lost; feed at least {n}"
            )
    if not 0 < keep <= 1:
        raise CheckpointError(f"keep must be in (0, 1], got {keep}")
    steps = {"executor": executor, "ahead": ahead, "progress": progress}

    def given(name: str) -> tuple[Layer, np.ndarray]:
        return layers[name], to_host(second_moments[name].mean)

    spectra = {done.name: done.value for done in per_layer(_spectrum, layers, given, **steps)}
    shapes = {name: layer.shape for name, layer in layers.items()}
    budget = int(keep * sum(m * n for m, n in shapes.values()))
    try:
        plan = plan_ranks(spectra, shapes, budget, relative=relative)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    children = seeds(seed, list(layers))

    def chosen(name: str) -> tuple[Any, ...]:
        return *given(name), plan.ranks[name], children[name]

    factors = {done.name: done.value for done in per_layer(_factors, plan.ranks, chosen, **steps)}
    write_factored(model, out, factors, fan_in_fan_out=fan_in_fan_out, overwrite=overwrite)
    return plan


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
    inputs = [checkpoint.path, *checkpoint.files]
    with atomic_directory(out, overwrite=overwrite, inputs=inputs, ours=is_factored) as folder:
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


def _spectrum(layer: Layer, second_moment: np.ndarray) -> np.ndarray:
    return output_spectrum(_weight(layer), second_moment=second_moment)


def _factors(
    layer: Layer, second_moment: np.ndarray, rank: int, seed: np.random.SeedSequence
) -> LowRank:
    generator = np.random.default_rng(seed)
    found = svd_llm(_weight(layer), rank, second_moment=second_moment, rng=generator)
    return found.approximation


def _weight(layer: Layer) -> np.ndarray:
    """Outputs by inputs."""
    weight = layer.tensor.read()
    return weight.T if layer.transposed else weight


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
