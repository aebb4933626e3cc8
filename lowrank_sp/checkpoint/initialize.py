"""Adapters for a whole checkpoint: factors, residual base and report, written in one go."""

from __future__ import annotations

import inspect
import operator
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import frobenius
from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.adapters.initializers import INITIALIZERS, Initialization
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.output import atomic_directory, final_path
from lowrank_sp.checkpoint.peft import check_number, check_pattern, pattern_value, write_adapter
from lowrank_sp.checkpoint.report import REPORT, LayerReport, Report
from lowrank_sp.checkpoint.tensors import CheckpointError
from lowrank_sp.factors import check_rank
from lowrank_sp.tasks import Executor, run

# A smaller or larger update has no digits in common with the weight in float32.
_SCALES = (1e-7, 1e7)
# Weights in other formats would contradict the residual base beside them.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")


@dataclass(frozen=True)
class _Task:
    layer: Layer
    method: Callable[..., Initialization]
    rank: int
    alpha: float
    seed: np.random.SeedSequence
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Done:
    layer: Layer
    adapter: Product
    stored: np.ndarray | None  # the residual as it is written, None where the weight is unchanged
    report: LayerReport


def initialize(
    model: str | Path,
    method: str,
    out: str | Path,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    tol: float | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Initialize adapters for the linear layers of a checkpoint and write what PEFT loads.

    Layers are read, factorized and written one at a time; PyTorch is not needed.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    method : str
        A name in :data:`~lowrank_sp.adapters.initializers.INITIALIZERS`.
    out : path
        Directory to create. It gets ``adapter/`` (PEFT), ``base/`` (the residual model, with the
        sharding, dtypes and side files of the input; only for methods that change weights) and
        ``report.json``. It appears at the end, whole.
    rank : int
    alpha : float, optional
        ``rank`` by default, which makes the scale 1.
    targets : str, optional
        Regular expression for the names of layers; by default all linear layers.
    rank_pattern, alpha_pattern : mapping from regular expression to number, optional
        Exceptions for layers whose name ends with a match; every one must match a layer. A layer
        with its own rank but no own alpha keeps the scale ``alpha / rank`` of the others.
    fan_in_fan_out : bool, optional
        Whether weights are stored inputs by outputs; by default what the model's configuration
        implies (GPT-2).
    seed : int
        Every layer draws from its own child, so the executor does not change results.
    tol : float, optional
        Accuracy of the singular triplets, for methods that use them.
    overwrite : bool
        Whether to replace ``out``, if it is empty or holds the report of an earlier run.
    executor : Executor, optional
        Where to factorize: any executor with ``submit``, with access to the files of ``model``.
    ahead : int
        Layers in work at a time with an executor; memory grows with it.
    progress : callable, optional
        Called as ``progress(done, total, name)``.

    Returns
    -------
    Report

    Raises
    ------
    CheckpointError
        For anything wrong with the checkpoint, the options or the output directory. Nothing is left
        behind.
    """
    from lowrank_sp import __version__

    checkpoint = Checkpoint(model)
    layers = checkpoint.layers(targets, fan_in_fan_out=fan_in_fan_out)
    sizes = _sizes(layers, rank, alpha, rank_pattern, alpha_pattern)
    options = _options(method, tol)
    tasks = [
        _Task(layer, INITIALIZERS[method], own, own_alpha, child, options)
        for layer, (own, own_alpha), child in zip(
            layers, sizes, _seeds(seed, len(layers)), strict=True
        )
    ]
    inputs = [checkpoint.path, *checkpoint.files]
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as folder:
        adapters: dict[str, Form] = {}
        rows = []
        base = _Base(checkpoint, folder / "base")
        for done in run(_initialize_layer, tasks, executor, ahead):
            adapters[done.layer.name] = done.adapter
            rows.append(done.report)
            if done.stored is not None:
                base.replace(done.layer, done.stored)
            if progress is not None:
                progress(len(rows), len(tasks), done.layer.name)
            del done  # or its residual would stay while the next layer is computed
        final = final_path(folder / "base" if base.changed else checkpoint.path)
        (folder / "adapter").mkdir()
        transposed = any(layer.transposed for layer in layers)
        adapter = Adapter(adapters, str(final), fan_in_fan_out=transposed)
        write_adapter(folder / "adapter", adapter)
        report = Report(
            method=method,
            rank=int(rank),
            alpha=float(rank if alpha is None else alpha),
            seed=seed,
            tol=tol,
            version=__version__,
            model=str(final_path(checkpoint.path)),
            fingerprint=checkpoint.fingerprint(),
            base="base" if base.changed else str(final),
            layers=rows,
        )
        report.save(folder / REPORT)
    return report


def _sizes(
    layers: list[Layer], rank: Any, alpha: Any, rank_pattern: Any, alpha_pattern: Any
) -> list[tuple[int, float]]:
    """Rank and alpha of every layer."""
    ranks = _pattern(rank_pattern, "rank_pattern", layers)
    alphas = _pattern(alpha_pattern, "alpha_pattern", layers)
    _check_rank(rank, max(layers, key=lambda layer: min(layer.shape)))
    scale = 1.0 if alpha is None else check_number(alpha, "alpha") / rank
    sizes = []
    for layer in layers:
        own = _check_rank(pattern_value(ranks, layer.name, rank), layer)
        own_alpha = pattern_value(alphas, layer.name, scale * own)
        if not _SCALES[0] <= own_alpha / own <= _SCALES[1]:
            raise CheckpointError(
                f"{layer.name}: alpha must be positive, with alpha / rank in "
                f"{_SCALES[0]:.0e}..{_SCALES[1]:.0e}, got alpha {own_alpha:g} for rank {own}"
            )
        sizes.append((own, float(own_alpha)))
    return sizes


def _pattern(pattern: Any, what: str, layers: list[Layer]) -> dict[re.Pattern[str], Any]:
    compiled = check_pattern(pattern, what)
    for key, expression in zip(pattern or (), compiled, strict=True):
        if not any(expression.match(layer.name) for layer in layers):
            raise CheckpointError(
                f"{what} {key!r}: must match the end of a layer's name, such as "
                f"{layers[0].name}, got no match"
            )
    return compiled


def _check_rank(rank: Any, layer: Layer) -> int:
    try:
        return check_rank(rank, min(layer.shape), layer.shape)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{layer.name}: {error}") from error


def _options(method: str, tol: float | None) -> dict[str, Any]:
    if method not in INITIALIZERS:
        raise CheckpointError(f"method must be one of {', '.join(INITIALIZERS)}, got {method!r}")
    if tol is None:
        return {}
    takers = [n for n, f in INITIALIZERS.items() if "tol" in inspect.signature(f).parameters]
    if method not in takers:
        raise CheckpointError(f"tol is for {', '.join(takers)} only, got tol {tol} for {method}")
    return {"tol": check_number(tol, "tol")}


def _seeds(seed: Any, count: int) -> list[np.random.SeedSequence]:
    try:
        return np.random.SeedSequence(operator.index(seed)).spawn(count)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"seed must be a non-negative integer, got {seed!r}") from error


class _Base:
    """The residual model: a copy of the checkpoint in which some tensors are overwritten."""

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self._checkpoint, self._folder = checkpoint, folder
        self.changed = False

    def replace(self, layer: Layer, stored: np.ndarray) -> None:
        """Overwrite the weight of a layer; the first call makes the copy."""
        if not self.changed:
            self._copy()
            self.changed = True
        layer.tensor.write(stored, self._folder / layer.tensor.path.name)

    def _copy(self) -> None:
        self._folder.mkdir()
        for file in self._checkpoint.files:
            shutil.copyfile(file, self._folder / file.name)
        if self._checkpoint.path.is_dir():
            for item in _side_files(self._checkpoint.path):
                target = self._folder / item.relative_to(self._checkpoint.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(item, target)


def _side_files(folder: Path) -> Iterable[Path]:
    for item in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in item.relative_to(folder).parts)
        if item.is_file() and not hidden and item.suffix not in _OTHER_WEIGHTS:
            yield item


def _initialize_layer(task: _Task) -> _Done:
    started = time.perf_counter()
    layer = task.layer
    weight = layer.tensor.read()
    weight = weight.T if layer.transposed else weight
    try:
        norm = frobenius(weight)
        if not np.isfinite(norm):
            raise ValueError("the weight must be finite, got NaN or infinite entries")
        with np.errstate(over="ignore", invalid="ignore"):  # found when the residual is encoded
            start = task.method(
                weight,
                task.rank,
                alpha=task.alpha,
                rng=np.random.default_rng(task.seed),
                **task.options,
            )
    except ValueError as error:
        raise CheckpointError(f"{layer.name}: {error}") from error
    stored = None
    if start.residual is not weight:
        residual = start.residual.T if layer.transposed else start.residual
        stored = layer.tensor.encode(residual)
    values, energy, bound = [], None, None
    if start.svd is not None:
        values = [float(s) for s in start.svd.s]
        energy = float(start.svd.norm() / norm) ** 2 if norm else 1.0
        bound = float(np.max(start.svd.bounds)) / values[0] if values[0] else 0.0
    report = LayerReport(
        layer.name,
        layer.shape,
        task.rank,
        task.alpha,
        values,
        energy,
        bound,
        time.perf_counter() - started,
    )
    return _Done(layer, Product(start.up, start.down, start.scale), stored, report)
