"""Whether an initialized adapter and its base still make up the model they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_sp._arrays import frobenius, slices
from lowrank_sp.checkpoint.initialize import REPORT, Report
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.peft import AdapterLayer, read_adapter
from lowrank_sp.checkpoint.tensors import CheckpointError
from lowrank_sp.tasks import Executor, run

# Unit roundoff of the storage of a residual, to nearest.
_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


@dataclass(frozen=True)
class LayerCheck:
    """How well ``W = residual + scale * up @ down`` holds in one layer.

    Attributes
    ----------
    name : str
    error : float
        ``||W - residual - scale up down||_F / ||W||_F``.
    allowed : float
        What rounding of the stored parts explains.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is explained by rounding."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`."""

    fingerprint_matches: bool
    layers: list[LayerCheck]

    @property
    def passed(self) -> bool:
        """Whether the base is the one recorded, and every layer adds up."""
        return self.fingerprint_matches and all(layer.passed for layer in self.layers)


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
        If files are missing, unreadable, or belong to different layers.
    """
    folder = Path(folder)
    report = Report.load(folder / REPORT)
    original = Checkpoint(model)
    residual = Checkpoint(folder / report.base)  # an absolute base stands for itself
    adapter = read_adapter(folder / "adapter")
    layers = {layer.name: layer for layer in original.layers(".", fan_in_fan_out=None)}
    tasks = []
    for row in report.layers:
        if row.name not in adapter or row.name not in layers:
            where = "the adapter" if row.name not in adapter else str(model)
            raise CheckpointError(f"{row.name}: in {folder / REPORT} but not in {where}")
        layer = layers[row.name]
        if layer.shape != tuple(row.shape):
            layer = Layer(layer.name, layer.tensor, not layer.transposed)
        base = residual.tensors.get(layer.tensor.name)
        if base is None or base.shape != layer.tensor.shape:
            raise CheckpointError(
                f"{layer.tensor.name}: not in {residual.path}, or of another shape"
            )
        tasks.append((layer, Layer(layer.name, base, layer.transposed), adapter[row.name]))
    checks = []
    for check in run(_check_layer, tasks, executor):
        checks.append(check)
        if progress is not None:
            progress(len(checks), len(tasks), check.name)
    return Verification(original.fingerprint() == report.fingerprint, checks)


def _check_layer(task: tuple[Layer, Layer, AdapterLayer]) -> LayerCheck:
    original, residual, adapter = task
    weight, base = original.tensor.read(), residual.tensor.read()
    if original.transposed:
        weight, base = weight.T, base.T
    wide = np.result_type(weight, adapter.up, np.float32)
    down = adapter.down.astype(wide) * wide.type(adapter.scale)
    error = product_size = 0.0
    for rows in slices(weight.shape[0], 1024):
        product = adapter.up[rows].astype(wide) @ down
        error += frobenius(weight[rows].astype(wide) - base[rows].astype(wide) - product) ** 2
        product_size += frobenius(product) ** 2
    size, base_size = frobenius(weight), frobenius(base)
    # The residual is rounded once when stored; the product is recomputed in single precision.
    rounding = 2 * _ROUNDOFF[residual.tensor.dtype] * base_size
    rounding += adapter.up.shape[1] * _ROUNDOFF["F32"] * (product_size**0.5 + base_size)
    scale = size or 1.0
    return LayerCheck(original.name, error**0.5 / scale, rounding / scale)
