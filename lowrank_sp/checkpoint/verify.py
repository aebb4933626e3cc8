"""Whether an initialized adapter and its base still make up the model they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from lowrank_sp._arrays import frobenius, slices
from lowrank_sp.adapters.forms import Product
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.peft import read_adapter
from lowrank_sp.checkpoint.report import REPORT, Report
from lowrank_sp.checkpoint.tensors import CheckpointError
from lowrank_sp.tasks import Executor, run

# Of the storage of a residual: unit roundoff, to nearest, and the distance of the smallest values.
_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_SMALLEST = {"F64": 2.0**-1022, "F32": 2.0**-126, "F16": 2.0**-24, "BF16": 2.0**-126}


@dataclass(frozen=True)
class LayerCheck:
    """How well ``W = residual + scale * up @ down`` holds in one layer.

    Attributes
    ----------
    name : str
    error : float
        ``||W - residual - scale up down||_F / ||W||_F``.
    excess : float
        Largest error of an entry, in units of what rounding of the stored parts explains there.
    """

    name: str
    error: float
    excess: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error of every entry."""
        return self.excess <= 1


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`.

    Attributes
    ----------
    fingerprint_matches : bool
        Whether the model is the one that was initialized.
    changed : list of str
        Tensors without an adapter that differ between base and model.
    layers : list of LayerCheck
    """

    fingerprint_matches: bool
    changed: list[str]
    layers: list[LayerCheck]

    @property
    def passed(self) -> bool:
        """Whether the model is the one recorded, and base and adapter add up to it."""
        adds_up = not self.changed and all(layer.passed for layer in self.layers)
        return self.fingerprint_matches and adds_up


def verify(
    folder: str | Path,
    model: str | Path,
    *,
    executor: Executor | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Check the output of :func:`~lowrank_sp.checkpoint.initialize.initialize` against its model.

    Parameters
    ----------
    folder : path
        The output directory.
    model : path
        The original checkpoint.
    executor, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Raises
    ------
    CheckpointError
        If files are missing or unreadable, hold other tensors than the model or the report has, or
        NaN or infinite entries.
    """
    folder = Path(folder)
    report = Report.load(folder / REPORT)
    original = Checkpoint(model)
    residual = Checkpoint(folder / report.base)  # an absolute base stands for itself
    adapter = read_adapter(folder / "adapter").products()
    reported = [row.name for row in report.layers]
    _check_same_names({folder / REPORT: reported, folder / "adapter": adapter})
    _check_same_names({original.path: original.tensors, residual.path: residual.tensors})
    tasks = []
    for row in report.layers:
        layer, parts = original.layer(row.name), adapter[row.name]
        if layer.shape != tuple(row.shape):
            layer = Layer(layer.name, layer.tensor, not layer.transposed)
        base = residual.tensors[layer.tensor.name]
        if (base.dtype, base.shape) != (layer.tensor.dtype, layer.tensor.shape):
            raise CheckpointError(f"{base.name}: dtype or shape differ in {residual.path}")
        if layer.shape != (parts.up.shape[0], parts.down.shape[1]):
            raise CheckpointError(f"{row.name}: the adapter does not fit shape {layer.shape}")
        tasks.append((layer, Layer(layer.name, base, layer.transposed), parts))
    checks = []
    for check in run(_check_layer, tasks, executor):
        checks.append(check)
        if progress is not None:
            progress(len(checks), len(tasks), check.name)
    adapted = {layer.tensor.name for layer, _, _ in tasks}
    changed = [
        name
        for name in sorted(set(original.tensors) - adapted)
        if not original.tensors[name].equals(residual.tensors[name])
    ]
    return Verification(original.fingerprint() == report.fingerprint, changed, checks)


def _check_same_names(holders: Mapping[Path, Collection[str]]) -> None:
    for one, other in permutations(holders, 2):
        alone = sorted(set(holders[one]) - set(holders[other]))
        if alone:
            raise CheckpointError(f"{alone[0]}: in {one} but not in {other}")


def _check_layer(task: tuple[Layer, Layer, Product]) -> LayerCheck:
    original, residual, adapter = task
    weight, base = original.tensor.read(), residual.tensor.read()
    if original.transposed:
        weight, base = weight.T, base.T
    # Rounded once when stored, after r products, their sum, the scale and one difference.
    storage = residual.tensor.dtype
    working = 2 * (adapter.down.shape[0] + 2) * _ROUNDOFF["F64" if storage == "F64" else "F32"]
    down = adapter.down.astype(np.float64) * adapter.scale
    error, excess = 0.0, 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in slices(weight.shape[0], max(1, 2**20 // weight.shape[1])):
            up, stored = adapter.up[rows].astype(np.float64), base[rows].astype(np.float64)
            difference = weight[rows] - stored - up @ down
            explained = _ROUNDOFF[storage] * abs(stored) + _SMALLEST[storage]
            explained += working * (abs(up) @ abs(down) + abs(stored))
            excess = np.maximum(excess, np.max(abs(difference) / explained))
            error = math.hypot(error, frobenius(difference))
    if not math.isfinite(error + excess):
        raise CheckpointError(
            f"{original.name}: model, base and adapter must be finite, got NaN or infinite entries"
        )
    return LayerCheck(original.name, error / (frobenius(weight) or 1.0), float(excess))
