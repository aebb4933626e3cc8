"""Many adapters as small cores between bases that they share, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.adapters import serving
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.serving import SharedAdapters
from lowrank_sp.checkpoint.job import (
    Progress,
    all_layers,
    capped,
    check_choice,
    check_size,
    output,
    per_layer,
    read_adapters,
    read_products,
    save_adapter,
    save_report,
    seeds,
    taken,
)
from lowrank_sp.checkpoint.report import JobReport, LayerOutcome
from lowrank_sp.checkpoint.tensors import (
    CheckpointError,
    OptionError,
    read_header,
    read_metadata,
    write_tensors,
)
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.tasks import Executor

SHARED = "shared.safetensors"
_ARRAYS = ("left", "right", "cores")
_NUMBERS = ("errors", "norms")

#: Ways to share, by name.
SHARINGS: dict[str, Callable[..., Solution]] = {
    "full": serving.jd_full,
    "diag": serving.jd_diag,
    "clustered": serving.jd_clustered,
}


def share(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    rank: int,
    clusters: int | None = None,
    stop: Stop = Stop(),
    assume_same_base: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Compress adapters of one base into bases that they share, and say what each of them loses.

    Parameters
    ----------
    adapters : mapping from str to path
        Directories of plain LoRA, by a name that a directory can have.
    out : path
        Directory to create, which appears at the end, whole. It gets ``shared.safetensors``
        (:func:`read_shared`), ``adapters/NAME/`` (PEFT, the shared adapters one by one, as engines
        load them) and ``report.json``.
    method : str
        A name in :data:`SHARINGS`.
    rank : int
        Columns of the bases. A layer that cannot have as many gets the most it can.
    clusters : int, optional
        For ``clustered``, which needs it. A layer that fewer adapters have gets one for each.
    stop : Stop
        When to stop improving the bases of a layer.
    assume_same_base : bool
        Whether to share adapters that name different bases, or whose fingerprints differ.
    seed, overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport
        A row for every adapter of every layer. Layers whose steps did not settle are noted.

    Raises
    ------
    CheckpointError
        If adapters were made for different bases or shapes, which are named, or anything is wrong
        with the options or the output directory. Nothing is left behind.
    """
    check_choice(method, SHARINGS, "method")
    check_size(rank, None)
    if method == "clustered" and clusters is None:
        raise OptionError("clustered needs the number of clusters; pass --clusters")
    options = taken(method, SHARINGS, {"clusters": clusters})
    for name in adapters:
        if name in ("", ".", "..") or Path(name).name != name:
            raise OptionError(f"{name!r} is no name of a directory; name the adapter otherwise")
    sources = read_adapters(adapters, assume_same_base=assume_same_base)
    layers = all_layers(sources)
    children = seeds(seed, layers)

    def arguments(layer: str) -> tuple[Any, ...]:
        products = read_products(sources, layer)
        return SHARINGS[method], products, rank, options, stop, children[layer]

    with output(out, adapters, overwrite=overwrite) as folder:
        found: dict[str, dict[str, Product]] = {name: {} for name in sources}
        shared: dict[str, tuple[list[str], SharedAdapters]] = {}
        rows, unsettled = [], []
        calls = per_layer(
            _share, layers, arguments, executor=executor, ahead=ahead, progress=progress
        )
        for name, (solution, owners, note), seconds in calls:
            value = solution.value
            shared[name] = (owners, value)
            if not solution.converged:
                unsettled.append(f"{name}: {solution.reason}")
            for i, (owner, norm, error) in enumerate(
                zip(owners, value.norms, value.errors, strict=True)
            ):
                product = Product(*value.adapter(i).factors())
                found[owner][name] = product
                row = LayerOutcome(
                    name, product.shape, product.rank, norm, error, seconds, owner, note
                )
                rows.append(row)
        for name, adapter in sources.items():
            save_adapter(folder / "adapters" / name, replace(adapter, layers=found[name]))
        _save(folder / SHARED, shared)
        said = {"method": method, "rank": rank, "clusters": clusters, "max_iter": stop.max_iter}
        said |= {"seed": seed, "assume_same_base": assume_same_base or None}
        notes = {"layers whose steps did not settle": unsettled}
        return save_report(folder, "share", adapters, said, rows, notes)


def read_shared(path: str | Path) -> dict[str, tuple[list[str], SharedAdapters]]:
    """What :func:`share` wrote to ``shared.safetensors``.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    dict from layer to (list of str, SharedAdapters)
        The names of the adapters that have the layer, in order, and the adapters.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable or of another kind.
    """
    path = Path(path)
    tensors = read_header(path)
    try:
        owners = json.loads(read_metadata(path)["owners"])
        found = {}
        for layer, (names, clusters) in owners.items():
            left, right, cores = (tensors[f"{layer}.{part}"].read() for part in _ARRAYS)
            errors, norms = (tuple(tensors[f"{layer}.{n}"].read().tolist()) for n in _NUMBERS)
            shared = SharedAdapters(left, right, cores, tuple(clusters), errors, norms)
            found[layer] = names, shared
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a file of shared adapters ({error})") from error
    return found


def _save(path: Path, shared: Mapping[str, tuple[list[str], SharedAdapters]]) -> None:
    tensors, owners = {}, {}
    for layer, (names, value) in shared.items():
        tensors |= {f"{layer}.{part}": getattr(value, part) for part in _ARRAYS}
        tensors |= {f"{layer}.{part}": np.array(getattr(value, part)) for part in _NUMBERS}
        owners[layer] = names, value.clusters
    write_tensors(path, tensors, {"owners": json.dumps(owners)})


def _share(
    function: Callable[..., Solution],
    products: Mapping[str, Product],
    rank: int,
    options: Mapping[str, Any],
    stop: Stop,
    seed: np.random.SeedSequence,
) -> tuple[Solution, list[str], str]:
    first, *_ = products.values()
    options, notes = dict(options), []
    if "clusters" in options and options["clusters"] > len(products):
        options["clusters"] = len(products)
        notes.append(f"{len(products)} clusters, one an adapter")
    # With diagonal cores, all factors side by side are bases that lose nothing.
    columns = sum(product.rank for product in products.values())
    rank, note = capped(rank, columns if function is serving.jd_diag else min(first.shape))
    notes += [note] if note else []
    solution = function(
        list(products.values()),
        rank=rank,
        rng=np.random.default_rng(seed),
        stop=stop,
        **options,
    )
    return solution, list(products), "; ".join(notes)
