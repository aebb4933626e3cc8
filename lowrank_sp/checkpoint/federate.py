"""A round of federated training: adapters of many clients as one, and what the base gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp._arrays import as_compute, frobenius
from lowrank_sp.adapters import federated
from lowrank_sp.adapters._products import check_alike
from lowrank_sp.adapters.federated import Aggregate
from lowrank_sp.adapters.forms import Product
from lowrank_sp.checkpoint.adapter import Adapter, check_base
from lowrank_sp.checkpoint.base_copy import BaseCopy
from lowrank_sp.checkpoint.job import (
    Progress,
    all_layers,
    capped,
    check_choice,
    check_size,
    check_weights,
    joined,
    output,
    per_layer,
    read_adapters,
    read_products,
    save_adapter,
    save_report,
    seeds,
    taken,
)
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.output import final_path
from lowrank_sp.checkpoint.report import JobReport, LayerOutcome
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.factors import LowRank
from lowrank_sp.tasks import Executor

#: Ways to aggregate, by name.
AGGREGATES: dict[str, Callable[..., Aggregate | tuple[Aggregate, ...]]] = {
    "fedit": federated.fedit,
    "flora": federated.flora,
    "fedex": federated.fedex,
    "ffa": federated.ffa,
    "rolora": federated.rolora,
    "flexlora": federated.flexlora,
    "lora_fair": federated.lora_fair,
    "flora_na": federated.flora_na,
}

# Those with a correction of the base.
_CORRECTING = ("flora", "fedex")
# Those for clients of different ranks and scales.
_MIXING = ("flexlora", "flora", "flora_na")


def federate(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    frozen: str | None = None,
    base: str | Path | None = None,
    assume_same_base: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Aggregate the adapters of clients, and say of every layer how far that is from their mean.

    A function of :mod:`lowrank_sp.adapters.federated` on every layer; nothing of the size of a
    weight is formed, unless ``base`` is given, whose weights are corrected one at a time.

    Parameters
    ----------
    adapters : mapping from str to path
        Directories of plain LoRA, of the same layers, by the name of the client.
    out : path
        Directory to create, which appears at the end, whole. It gets ``report.json`` and, as the
        method has it, ``adapter/``, or ``adapters/NAME/`` for every client, and the correction of
        the base: as an adapter in ``correction/``, or applied, in ``base/``.
    method : str
        A name in :data:`AGGREGATES`.
    weights : sequence of float, optional
        One a client, of sum 1; by default all equal.
    rank : int, optional
        Of the correction (``fedex``) or the adapter (``flora_na``).
    frozen : {"up", "down"}, optional
        For ``rolora``, which needs it: the factor that nobody trained.
    base : path, optional
        For methods that correct the base: the base model, to write it with the correction in it.
    assume_same_base : bool
        Whether to aggregate adapters that name different bases, or whose fingerprints differ.
    seed, overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport
        Norms are those of the weighted means of the updates, errors the distances from them; with
        ``base``, as its corrected weights are stored.

    Raises
    ------
    CheckpointError
        If adapters were made for different bases, layers or shapes, which are named, if they do
        not fit the method or the base, or anything is wrong with the options or the output
        directory. Nothing is left behind.
    """
    check_choice(method, AGGREGATES, "method")
    check_size(rank, None)
    if method == "rolora" and frozen is None:
        raise OptionError("rolora needs the factor that was frozen; pass --frozen up or down")
    if frozen is not None:
        check_choice(frozen, ("up", "down"), "frozen")
    if base is not None and method not in _CORRECTING:
        raise OptionError(
            f"base is for {' and '.join(_CORRECTING)} only, which correct it, got base {base} for "
            f"{method}"
        )
    options = taken(method, AGGREGATES, {"rank": rank, "frozen": frozen})
    weights = _check_shares(check_weights(weights, adapters))
    sources = read_adapters(adapters, assume_same_base=assume_same_base)
    layers = all_layers(sources)
    _check_same_layers(sources, layers)
    model = None if base is None else _checked_base(base, sources, assume_same_base)
    places = {} if model is None else {name: _layer(model, name, sources) for name in layers}
    children = seeds(seed, layers)

    def arguments(name: str) -> tuple[Any, ...]:
        products = read_products(sources, name)
        if method not in _MIXING:
            _check_alike(products, name)
        place = places.get(name)
        return AGGREGATES[method], products, weights, options, children[name], place

    inputs = dict(adapters) if base is None else {**adapters, "base": base}
    with output(out, inputs, overwrite=overwrite) as folder:
        common, corrections, rows = {}, {}, []
        own: dict[str, dict[str, Product]] = {name: {} for name in sources}
        copy = None if model is None else BaseCopy(model, folder / "base")
        calls = per_layer(
            _aggregate, layers, arguments, executor=executor, ahead=ahead, progress=progress
        )
        for name, (found, stored, norm, note), seconds in calls:
            for client, part in found.items():
                shape, rank_written = _size(part)
                rows.append(
                    LayerOutcome(name, shape, rank_written, norm, part.error, seconds, client, note)
                )
                if part.adapter is not None:
                    (common if client is None else own[client])[name] = part.adapter
                if part.correction is not None:
                    corrections[name] = Product(*part.correction.factors())
            if copy is not None and stored is not None:
                copy.replace(places[name], stored)
        target = joined(sources, {})
        if copy is not None and copy.changed:
            target = replace(
                target, base=str(final_path(copy.path)), fingerprint=copy.fingerprint()
            )
        elif corrections:
            save_adapter(folder / "correction", replace(target, layers=corrections))
        if common:
            save_adapter(folder / "adapter", replace(target, layers=common))
        for client, found in own.items():
            if found:
                save_adapter(folder / "adapters" / client, replace(target, layers=found))
        said = {"method": method, "weights": weights, "rank": rank, "frozen": frozen, "seed": seed}
        said |= {"assume_same_base": assume_same_base or None}
        return save_report(folder, "federate", inputs, said, rows)


def _check_shares(weights: list[float] | None) -> list[float] | None:
    """The weights, if the functions take them for any clients."""
    one = Product(np.ones((1, 1)), np.ones((1, 1)))
    try:
        federated.flora([one] * len(weights or [1.0]), weights)
    except ValueError as error:
        raise OptionError(str(error)) from error
    return weights


def _check_same_layers(sources: Mapping[str, Adapter], layers: Sequence[str]) -> None:
    for name, adapter in sources.items():
        missing = [layer for layer in layers if layer not in adapter.layers]
        if missing:
            raise CheckpointError(
                f"{missing[0]}: all clients must have the same layers, but {name} lacks it "
                f"({len(missing)} such)"
            )


def _check_alike(products: Mapping[str, Product], layer: str) -> None:
    try:
        check_alike(list(products.values()), "client", ("rank", "scale"), list(products))
    except ValueError as error:
        raise CheckpointError(
            f"{layer}: {error}; {', '.join(_MIXING)} take clients of different ranks and scales"
        ) from error


def _checked_base(
    base: str | Path, sources: Mapping[str, Adapter], assume_same_base: bool
) -> Checkpoint:
    model = Checkpoint(base)
    if not assume_same_base:
        check_base(model, sources)
    return model


def _layer(model: Checkpoint, name: str, sources: Mapping[str, Adapter]) -> Layer:
    first = next(iter(sources.values()))
    turned = first.fan_in_fan_out or name in first.embeddings
    layer = model.layer(name, fan_in_fan_out=turned or None)
    shape = first.layers[name].shape
    if layer.shape != shape:
        raise CheckpointError(
            f"{name}: adapters must have the shape of the base, {layer.shape}, got {shape}"
        )
    return layer


def _size(part: Aggregate) -> tuple[tuple[int, int], int]:
    written: Product | LowRank | None = part.adapter or part.correction
    assert written is not None
    return (written.shape[0], written.shape[1]), written.rank


def _aggregate(
    function: Callable[..., Aggregate | tuple[Aggregate, ...]],
    products: Mapping[str, Product],
    weights: Sequence[float] | None,
    options: Mapping[str, Any],
    seed: np.random.SeedSequence,
    layer: Layer | None,
) -> tuple[dict[str | None, Aggregate], np.ndarray | None, float, str]:
    """Aggregates by client, or for all of them; the corrected weight; the norm of the mean."""
    clients = list(products.values())
    options, note = dict(options), ""
    if "rank" in options:
        most = min(*clients[0].shape, sum(client.rank for client in clients))
        options["rank"], note = capped(options["rank"], most)
    if function in (federated.fedex, federated.flexlora, federated.flora_na):
        options["rng"] = np.random.default_rng(seed)
    made = function(clients, weights, **options)
    found: dict[str | None, Aggregate] = {}
    if isinstance(made, Aggregate):
        found[None] = made
    else:
        found.update(zip(products, made, strict=True))
    mean = federated.flora(clients, weights).update()
    stored = None
    common = found.get(None)
    if layer is not None and common is not None and common.correction is not None:
        stored, change = _corrected(layer, common.correction)
        rest = mean.to_dense() - change
        if common.adapter is not None:
            rest -= common.adapter.delta().to_dense()
        found[None] = replace(common, error=frobenius(rest))
    return found, stored, float(mean.norm()), note


def _corrected(layer: Layer, correction: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """The weight of the base with the correction, as it is stored, and how far that moves it."""
    weight = layer.tensor.read()
    product = Product(*(correction.mT if layer.transposed else correction).factors())
    stored = layer.tensor.encode(product.merge(weight))
    change = as_compute(layer.tensor.decode(stored)) - as_compute(weight)
    return stored, change.T if layer.transposed else change
