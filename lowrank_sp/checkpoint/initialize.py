"""Adapters for a whole checkpoint: factors, residual base and report, written in one go."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import frobenius
from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.adapters.initializers import CALIBRATED, INITIALIZERS
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.base_copy import BaseCopy
from lowrank_sp.checkpoint.calibration import Calibration, calibration_for
from lowrank_sp.checkpoint.job import (
    Progress,
    check_choice,
    check_size,
    per_layer,
    save_adapter,
    seeds,
    taken,
)
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.output import atomic_directory, final_path
from lowrank_sp.checkpoint.peft import check_number, check_pattern, pattern_value
from lowrank_sp.checkpoint.report import REPORT, LayerReport, Report
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.factors import check_rank
from lowrank_sp.tasks import Executor

# A smaller or larger update has no digits in common with the weight in float32.
_SCALES = (1e-7, 1e7)
_METHODS = INITIALIZERS | {name: known.initializer for name, known in CALIBRATED.items()}
_STATISTICS = dict.fromkeys(INITIALIZERS) | {k: known.statistic for k, known in CALIBRATED.items()}


@dataclass(frozen=True)
class _Task:
    layer: Layer
    method: str
    rank: int
    alpha: float
    seed: np.random.SeedSequence
    options: Mapping[str, Any]
    calibration: Calibration | None


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
    calibration: str | Path | None = None,
    targets: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    tol: float | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Initialize adapters for the linear layers of a checkpoint and write what PEFT loads.

    Layers are read, factorized and written one at a time; PyTorch is not needed.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    method : str
        A name in :data:`~lowrank_sp.adapters.initializers.INITIALIZERS`, or in
        :data:`~lowrank_sp.adapters.initializers.CALIBRATED` with a calibration file.
    out : path
        Directory to create. It gets ``adapter/`` (PEFT), ``base/`` (the residual model, with the
        sharding, dtypes and side files of the input; only for methods that change weights) and
        ``report.json``. It appears at the end, whole.
    rank : int
    alpha : float, optional
        ``rank`` by default, which makes the scale 1.
    calibration : path, optional
        A safetensors file with the statistic that the method needs of every layer, under
        ``<layer>.<statistic>``: what :func:`~lowrank_sp.adapters.statistics.pack` returns. It is
        read layer by layer.
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
    check_choice(method, _METHODS, "method")
    options = taken(method, _METHODS, {"tol": None if tol is None else check_number(tol, "tol")})
    check_size(None, tol)
    sizes = _sizes(layers, rank, alpha, rank_pattern, alpha_pattern)
    statistics = calibration_for(method, _STATISTICS, calibration)
    if statistics is not None:
        statistics.check([layer.name for layer in layers])
    children = seeds(seed, [layer.name for layer in layers])
    tasks = {
        layer.name: (_Task(layer, method, *size, children[layer.name], options, statistics),)
        for layer, size in zip(layers, sizes, strict=True)
    }
    inputs = [checkpoint.path, *checkpoint.files]
    if statistics is not None:
        inputs.append(statistics.path)
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as folder:
        adapters: dict[str, Form] = {}
        rows = []
        base = BaseCopy(checkpoint, folder / "base")
        calls = per_layer(
            _initialize_layer,
            tasks,
            tasks.__getitem__,
            executor=executor,
            ahead=ahead,
            progress=progress,
        )
        for name, done, _ in calls:
            adapters[name] = done.adapter
            rows.append(done.report)
            if done.stored is not None:
                base.replace(done.layer, done.stored)
            del done  # or its residual would stay while the next layer is computed
        final = final_path(base.path)
        fingerprint = checkpoint.fingerprint()
        adapter = Adapter(
            adapters,
            str(final),
            base.fingerprint() if base.changed else fingerprint,
            fan_in_fan_out=any(layer.transposed for layer in layers),
        )
        save_adapter(folder / "adapter", adapter)
        report = Report(
            method=method,
            rank=int(rank),
            alpha=float(rank if alpha is None else alpha),
            seed=seed,
            tol=tol,
            version=__version__,
            model=str(final_path(checkpoint.path)),
            fingerprint=fingerprint,
            base="base" if base.changed else str(final),
            layers=rows,
            calibration=None if calibration is None else str(final_path(Path(calibration))),
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
            raise OptionError(
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


def _initialize_layer(task: _Task) -> _Done:
    started = time.perf_counter()
    layer = task.layer
    weight = layer.tensor.read()
    weight = weight.T if layer.transposed else weight
    norm = frobenius(weight)
    if not np.isfinite(norm):
        raise ValueError("the weight must be finite, got NaN or infinite entries")
    options = dict(task.options)
    if task.calibration is not None:
        options[task.calibration.statistic] = task.calibration[layer.name]
    start = _METHODS[task.method](
        weight, task.rank, alpha=task.alpha, rng=np.random.default_rng(task.seed), **options
    )
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
        start.error,
    )
    return _Done(layer, Product(start.up, start.down, start.scale), stored, report)
