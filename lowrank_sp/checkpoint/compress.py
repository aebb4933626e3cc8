"""A model with two factors in place of weights, at a budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import as_compute, frobenius, to_host
from lowrank_sp.adapters.compress import RankPlan, output_spectrum, plan_ranks, svd_llm
from lowrank_sp.adapters.statistics import SecondMoment
from lowrank_sp.checkpoint.factored import as_stored, save_factored
from lowrank_sp.checkpoint.job import Progress, output, per_layer, save_report, seeds
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.report import JobReport, LayerOutcome
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.weighted import output_norm
from lowrank_sp.tasks import Executor


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
) -> JobReport:
    """Compress the linear layers of a checkpoint to a share of their parameters.

    Ranks by :func:`~lowrank_sp.adapters.compress.plan_ranks` from the spectra of the outputs, then
    :func:`~lowrank_sp.adapters.compress.svd_llm` of every layer; PyTorch is not needed.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    out : path
        Directory to create: the files of ``model``, with two factors in place of weights, and
        ``report.json``. It appears at the end, whole.
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
        Whether to replace ``out``, if it is empty or holds the report of an earlier run.
    executor : Executor, optional
        Where to factorize: any executor with ``submit``, with access to the files of ``model``.
    ahead : int
        Layers in work at a time with an executor.
    progress : callable, optional
        Called as ``progress(done, total, name)``, once for the spectra and once for the factors.

    Returns
    -------
    JobReport
        The layers in two factors. Norms are root mean squares of the outputs, ``E[||W x||^2]^0.5``
        over the calibration data, errors those of what they lose with the factors as they are
        stored. Layers that stay as they are are noted. ``totals`` has the parameters of all these
        layers, ``parameters_before`` and ``parameters``; the root mean square over all of them of
        the planned error, relative if ``relative``, ``error``; and ``bound``: no ranks within the
        budget have less.

    Raises
    ------
    CheckpointError
        For anything wrong with the checkpoint, the second moments, the budget or the output
        directory. Nothing is left behind.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep must be in (0, 1], got {keep}")
    checkpoint = Checkpoint(model)
    layers = {x.name: x for x in checkpoint.layers(targets, fan_in_fan_out=fan_in_fan_out)}
    _check_moments(second_moments, layers)
    children = seeds(seed, list(layers))
    steps = {"executor": executor, "ahead": ahead, "progress": progress}

    def given(name: str) -> tuple[Layer, np.ndarray]:
        return layers[name], to_host(second_moments[name].mean)

    inputs = {"model": checkpoint.path}
    if (file := getattr(second_moments, "path", None)) is not None:
        inputs["calibration"] = file
    with output(out, inputs, overwrite=overwrite) as folder:
        spectra = {done.name: done.value for done in per_layer(_spectrum, layers, given, **steps)}
        plan = _plan(spectra, layers, keep, relative)

        def chosen(name: str) -> tuple[Any, ...]:
            return *given(name), plan.ranks[name], children[name]

        factors, rows = {}, []
        for name, (f, error), seconds in per_layer(_factors, plan.ranks, chosen, **steps):
            factors[name] = f
            norm = frobenius(spectra[name])
            rows.append(LayerOutcome(name, layers[name].shape, f.rank, norm, error, seconds))
        save_factored(folder, checkpoint, factors, fan_in_fan_out=fan_in_fan_out)
        options = {"keep": keep, "targets": targets, "relative": relative, "seed": seed}
        notes = {"layers that stay as they are": list(plan.dense)}
        return save_report(
            folder, "compress", inputs, options, rows, notes, totals=_totals(plan, layers)
        )


def _check_moments(moments: Mapping[str, SecondMoment], layers: Mapping[str, Layer]) -> None:
    missing = [name for name in layers if name not in moments]
    if missing:
        raise CheckpointError(
            f"there is no second moment of {missing[0]} ({len(missing)} such); collect it, or "
            "choose other targets"
        )
    for name, layer in layers.items():
        count, n = moments[name].count, layer.shape[1]
        if count < n:
            raise CheckpointError(
                f"{name}: too few samples: its second moment has seen {count}, fewer than the "
                f"layer has inputs, and what it has not seen would be lost; feed at least {n}"
            )


def _plan(
    spectra: Mapping[str, np.ndarray], layers: Mapping[str, Layer], keep: float, relative: bool
) -> RankPlan:
    shapes = {name: layer.shape for name, layer in layers.items()}
    budget = int(keep * sum(m * n for m, n in shapes.values()))
    try:
        return plan_ranks(spectra, shapes, budget, relative=relative)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _totals(plan: RankPlan, layers: Mapping[str, Layer]) -> dict[str, float]:
    root = math.sqrt(len(layers))
    return {
        "parameters_before": sum(math.prod(layer.shape) for layer in layers.values()),
        "parameters": plan.parameters,
        "error": plan.error / root,
        "bound": plan.bound / root,
    }


def _spectrum(layer: Layer, second_moment: np.ndarray) -> np.ndarray:
    return output_spectrum(_weight(layer), second_moment=second_moment)


def _factors(
    layer: Layer, second_moment: np.ndarray, rank: int, seed: np.random.SeedSequence
) -> tuple[LowRank, float]:
    """The factors as they are stored, and their error."""
    weight, generator = _weight(layer), np.random.default_rng(seed)
    exact = svd_llm(weight, rank, second_moment=second_moment, rng=generator).approximation
    f = as_stored(exact, layer.tensor)
    return f, output_norm(as_compute(weight) - f.to_dense(), covariance=second_moment)


def _weight(layer: Layer) -> np.ndarray:
    """Outputs by inputs."""
    weight = layer.tensor.read()
    return weight.T if layer.transposed else weight
