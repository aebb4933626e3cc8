"""A base whose weights have the values of a quantized one, and an adapter for what that loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import as_compute, frobenius
from lowrank_sp.adapters import quantize as formats
from lowrank_sp.adapters.compensate import COMPENSATIONS
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.quantize import Quantized
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.base_copy import BaseCopy
from lowrank_sp.checkpoint.calibration import calibration_for
from lowrank_sp.checkpoint.job import (
    Progress,
    capped,
    check_choice,
    check_size,
    output,
    per_layer,
    save_adapter,
    save_report,
    seeds,
    taken,
)
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.output import final_path
from lowrank_sp.checkpoint.report import JobReport, LayerOutcome
from lowrank_sp.checkpoint.tensors import OptionError
from lowrank_sp.tasks import Executor

#: Formats of a quantized weight, by name.
FORMATS: dict[str, Callable[..., Quantized]] = {
    "nf4": formats.nf4,
    "int": formats.int_symmetric,
    "int_affine": formats.int_affine,
    "fp8_e4m3": formats.fp8_e4m3,
    "fp8_e5m2": formats.fp8_e5m2,
}
_STATISTICS = {name: known.statistic for name, known in COMPENSATIONS.items()}


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "nf4",
    bits: int | None = None,
    block: int | None = None,
    compensate: str | None = None,
    rank: int | None = None,
    calibration: str | Path | None = None,
    targets: str | None = None,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Round the linear layers of a model to a format of few bits, and make up for the loss.

    A function of :mod:`lowrank_sp.adapters.compensate` on every layer. The base is written with the
    values of the quantized weights in the dtypes of the model, which any engine loads, and which a
    quantizer of the same format and blocks leaves as they are.

    Parameters
    ----------
    model : path
        A model directory of Hugging Face layout, or one ``.safetensors`` file.
    out : path
        Directory to create, which appears at the end, whole. It gets ``base/``, ``report.json``
        and, with ``compensate``, ``adapter/`` (PEFT, of scale 1).
    to : str
        A name in :data:`FORMATS`.
    bits, block : int, optional
        Of an integer, and entries that share a scale: as in the function of that format.
    compensate : str, optional
        A name in :data:`~lowrank_sp.adapters.compensate.COMPENSATIONS`; by default nothing is done
        about the loss.
    rank : int, optional
        Of the adapter. A layer that cannot have it gets the largest it can.
    calibration : path, optional
        For methods that need data, as in
        :func:`~lowrank_sp.checkpoint.initialize.initialize`.
    targets, fan_in_fan_out, seed, overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport
        Norms are those of the weights, errors what base and adapter lack of them, as they are
        stored.

    Raises
    ------
    CheckpointError
        If a layer or a statistic is missing, or anything is wrong with the checkpoint, the options
        or the output directory. Nothing is left behind.
    """
    check_choice(to, FORMATS, "to")
    quantizer = partial(FORMATS[to], **taken(to, FORMATS, {"bits": bits, "block": block}))
    check_size(rank, None)
    if (compensate is None) != (rank is None):
        raise OptionError(
            f"a compensation needs a rank, and only it does, got {compensate} and rank {rank}; "
            "pass --compensate and --rank, or neither"
        )
    data = None
    if compensate is not None:
        check_choice(compensate, COMPENSATIONS, "compensate")
        data = calibration_for(compensate, _STATISTICS, calibration)
    elif calibration is not None:
        raise OptionError("a calibration is for a compensation; pass --compensate")
    checkpoint = Checkpoint(model)
    layers = {x.name: x for x in checkpoint.layers(targets, fan_in_fan_out=fan_in_fan_out)}
    if data is not None:
        data.check(layers)
    children = seeds(seed, list(layers))

    def arguments(name: str) -> tuple[Any, ...]:
        return layers[name], quantizer, compensate, rank, data, children[name]

    inputs = {"model": checkpoint.path}
    inputs |= {} if calibration is None else {"calibration": Path(calibration)}
    with output(out, inputs, overwrite=overwrite) as folder:
        found, rows = {}, []
        base = BaseCopy(checkpoint, folder / "base")
        calls = per_layer(
            _quantize, layers, arguments, executor=executor, ahead=ahead, progress=progress
        )
        for name, (stored, product, norm, error, note), seconds in calls:
            base.replace(layers[name], stored)
            if product is not None:
                found[name] = product
            size = 0 if product is None else product.rank
            shape = layers[name].shape
            rows.append(LayerOutcome(name, shape, size, norm, error, seconds, note=note))
            del stored  # or it would stay while the next layer is computed
        if found:
            transposed = any(layer.transposed for layer in layers.values())
            final = str(final_path(base.path))
            adapter = Adapter(found, final, base.fingerprint(), fan_in_fan_out=transposed)
            save_adapter(folder / "adapter", adapter)
        options = {"to": to, "bits": bits, "block": block, "compensate": compensate}
        options |= {"rank": rank, "targets": targets, "seed": seed}
        return save_report(folder, "quantize", inputs, options, rows)


def _quantize(
    layer: Layer,
    quantizer: Callable[..., Quantized],
    compensate: str | None,
    rank: int | None,
    data: Mapping[str, np.ndarray] | None,
    seed: np.random.SeedSequence,
) -> tuple[np.ndarray, Product | None, float, float, str]:
    """The base as it is stored, the adapter, the norm of the weight, the error and a note."""
    weight = layer.tensor.read()
    weight = as_compute(weight.T if layer.transposed else weight)
    norm = frobenius(weight)
    if not np.isfinite(norm):
        raise ValueError("the weight must be finite, got NaN or infinite entries")
    product, note = None, ""
    if compensate is None or rank is None:
        dense = quantizer(weight).to_dense()
    else:
        function, statistic = COMPENSATIONS[compensate]
        options = {} if data is None or statistic is None else {statistic: data[layer.name]}
        rank, note = capped(rank, min(layer.shape))
        generator = np.random.default_rng(seed)
        made = function(weight, rank, quantize=quantizer, rng=generator, **options)
        product, dense = Product(*made.correction.factors()), made.base.to_dense()
    stored = layer.tensor.encode(dense.T if layer.transposed else dense)
    written = layer.tensor.decode(stored)
    rest = weight - (written.T if layer.transposed else written)
    if product is not None:
        rest -= product.up @ product.down
    return stored, product, norm, frobenius(rest), note
