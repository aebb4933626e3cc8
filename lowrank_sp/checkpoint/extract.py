"""An adapter from two checkpoints, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import frobenius
from lowrank_sp.adapters import algebra
from lowrank_sp.adapters.forms import Product
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.job import (
    Adapted,
    Progress,
    adapt,
    capped,
    check_size,
    output,
    save_adapter,
    save_report,
    seeds,
)
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.output import final_path
from lowrank_sp.checkpoint.report import JobReport
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.tasks import Executor


def extract(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    tol: float | None = None,
    targets: str | None = None,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Write what fine-tuning changed in the linear layers of a model as an adapter of it.

    :func:`lowrank_sp.adapters.algebra.extract` of every layer. One weight of each model is in
    memory at a time; PyTorch is not needed.

    Parameters
    ----------
    tuned, base : path
        Model directories of Hugging Face layout, or ``.safetensors`` files.
    out : path
        Directory to create. It gets ``adapter/`` (PEFT, of scale 1) and ``report.json``, and
        appears at the end, whole.
    rank, tol
        The most a layer may have, and how far each may be from what was changed, relative to its
        norm. At least one of them. A layer that cannot have the rank gets the largest it can.
    targets : str, optional
        Regular expression for the names of layers; by default all linear layers.
    fan_in_fan_out, seed, overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport
        Its notes name layers that did not change, which get no adapter, and tensors that differ
        and are no target, or that only one model has, which the adapter does not hold.

    Raises
    ------
    CheckpointError
        If a layer is missing in one of the models or has another shape, if nothing changed, or if
        anything is wrong with the checkpoints, the options or the output directory. Nothing is
        left behind.
    """
    if rank is None and tol is None:
        raise OptionError("extract needs a rank, a tol or both, got neither; pass --rank or --tol")
    check_size(rank, tol)
    new, old = Checkpoint(tuned), Checkpoint(base)
    layers = {
        layer.name: (_in(new, layer), layer)
        for layer in old.layers(targets, fan_in_fan_out=fan_in_fan_out)
    }
    names = {layer.tensor.name for _, layer in layers.values()}
    same = [name for name, (one, two) in layers.items() if one.tensor.equals(two.tensor)]
    differ = [name for name in layers if name not in same]
    children = seeds(seed, list(layers))
    inputs = {"tuned": new.path, "base": old.path}
    with output(out, inputs, overwrite=overwrite) as folder:
        found, rows = adapt(
            _extract,
            differ,
            lambda name: (*layers[name], rank, tol, children[name]),
            executor=executor,
            ahead=ahead,
            progress=progress,
        )
        same += [name for name in differ if name not in found]
        if not found:
            raise CheckpointError(
                f"{new.path}: no layer differs from {old.path}; nothing to extract"
            )
        adapter = Adapter(
            found,
            str(final_path(old.path)),
            old.fingerprint(),
            fan_in_fan_out=any(layer.transposed for _, layer in layers.values()),
        )
        save_adapter(folder / "adapter", adapter)
        options = {"rank": rank, "tol": tol, "targets": targets, "seed": seed}
        notes = {"unchanged layers": sorted(same), **_others(new, old, names)}
        return save_report(folder, "extract", inputs, options, rows, notes)


def _in(model: Checkpoint, layer: Layer) -> Layer:
    """The layer of that name and shape in another model."""
    other = model.layer(layer.name, fan_in_fan_out=layer.transposed)
    if other.shape != layer.shape:
        raise CheckpointError(
            f"{layer.name}: both models must have one shape, got {layer.shape} and {other.shape} "
            f"in {model.path}; leave it out by --targets"
        )
    return other


def _others(new: Checkpoint, old: Checkpoint, targets: set[str]) -> dict[str, list[str]]:
    """What is different about tensors that are no target."""
    both = sorted((new.tensors.keys() & old.tensors.keys()) - targets)
    return {
        "changed tensors that are no target": [
            name for name in both if not new.tensors[name].equals(old.tensors[name])
        ],
        "tensors in the tuned model only": sorted(new.tensors.keys() - old.tensors.keys()),
        "tensors in the base only": sorted(old.tensors.keys() - new.tensors.keys()),
    }


def _extract(
    tuned: Layer, base: Layer, rank: int | None, tol: float | None, seed: np.random.SeedSequence
) -> Adapted:
    new, old = _weight(tuned), _weight(base)
    rank, note = capped(rank, min(base.shape))
    f = algebra.extract(new, old, rank=rank, tol=tol, rng=np.random.default_rng(seed))
    if float(f.s[0]) == 0.0:
        return Adapted(None, 0.0, 0.0)
    left, right = f.split().factors()
    norm = float(np.hypot(frobenius(f.s), f.error))
    return Adapted(Product(left, right), norm, float(f.error), note)


def _weight(layer: Layer) -> Any:
    weight = layer.tensor.read()
    return weight.T if layer.transposed else weight
