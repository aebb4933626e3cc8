"""Many adapters of one base as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp.adapters.algebra import merge as merging
from lowrank_sp.adapters.forms import Product
from lowrank_sp.checkpoint.job import (
    Adapted,
    Progress,
    adapt,
    all_layers,
    capped,
    check_choice,
    check_size,
    check_weights,
    joined,
    output,
    read_adapters,
    read_products,
    save_adapter,
    save_report,
    seeds,
    taken,
)
from lowrank_sp.checkpoint.report import JobReport
from lowrank_sp.checkpoint.tensors import OptionError
from lowrank_sp.factors import SVD
from lowrank_sp.tasks import Executor


class Merge(NamedTuple):
    """A function of :mod:`lowrank_sp.adapters.algebra.merge`, and its rule of entries."""

    function: Callable[..., merging.Merged]
    rule: Callable[[float], merging.EntryRule] | None = None


#: Ways to merge, by name.
MERGES: dict[str, Merge] = {
    "linear": Merge(merging.linear),
    "cat": Merge(merging.cat),
    "svd": Merge(merging.svd),
    "ties": Merge(merging.entrywise, merging.ties),
    "dare": Merge(merging.entrywise, merging.dare),
    "dare_ties": Merge(merging.entrywise, merging.dare_ties),
    "magnitude_prune": Merge(merging.entrywise, merging.magnitude_prune),
    "knots": Merge(merging.knots, merging.ties),
    "tsv": Merge(merging.tsv),
}


def merge(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    tol: float | None = None,
    assume_same_base: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Merge adapters of one base into one, and say of every layer what that loses.

    A function of :mod:`lowrank_sp.adapters.algebra.merge` on every layer. A layer that not all of
    them have is merged of those that have it. Entries of updates are computed by blocks of rows
    where a method needs them; no update is formed.

    Parameters
    ----------
    adapters : mapping from str to path
        Directories of plain LoRA, by the name that reports and errors give them.
    out : path
        Directory to create. It gets ``adapter/`` (PEFT, of scale 1) and ``report.json``, and
        appears at the end, whole.
    method : str
        A name in :data:`MERGES`; ``knots`` elects signs as ``ties`` does.
    weights : sequence of float, optional
        One an adapter; by default all one, which is the sum.
    density : float, optional
        For the methods that sparsify, which need it: the share of entries to keep, in (0, 1].
    rank, tol
        As in the function of that name. A layer that cannot have the rank gets the largest it can.
    assume_same_base : bool
        Whether to merge adapters that name different bases, or whose fingerprints differ.
    seed, overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport
        Norms are those of the weighted sums, errors the distances from them.

    Raises
    ------
    CheckpointError
        If adapters were made for different bases or shapes, which are named, or anything is wrong
        with the options or the output directory. Nothing is left behind.
    """
    check_choice(method, MERGES, "method")
    function, rule = MERGES[method]
    check_size(rank, tol)
    weights = check_weights(weights, adapters)
    functions = {name: known.function for name, known in MERGES.items()}
    sizes = taken(method, functions, {"rank": rank, "tol": tol})
    if function is merging.entrywise and not sizes:
        raise OptionError(f"{method} merges entries, which gives full rank; pass --rank or --tol")
    options = sizes | _rule(method, rule, density)
    sources = read_adapters(adapters, assume_same_base=assume_same_base)
    own = [1.0] * len(adapters) if weights is None else weights
    named = dict(zip(adapters, own, strict=True))
    layers = all_layers(sources)
    children = seeds(seed, layers)

    def arguments(layer: str) -> tuple[Any, ...]:
        return function, read_products(sources, layer), named, options, children[layer]

    with output(out, adapters, overwrite=overwrite) as folder:
        found, rows = adapt(
            _merge, layers, arguments, executor=executor, ahead=ahead, progress=progress
        )
        save_adapter(folder / "adapter", joined(sources, found))
        said = {"method": method, "weights": weights, "density": density, "rank": rank, "tol": tol}
        said |= {"assume_same_base": assume_same_base or None, "seed": seed}
        return save_report(folder, "merge", adapters, said, rows)


def _rule(
    method: str, rule: Callable[[float], merging.EntryRule] | None, density: float | None
) -> dict[str, Any]:
    if rule is None and density is None:
        return {}
    if rule is None:
        takers = ", ".join(name for name, known in MERGES.items() if known.rule is not None)
        raise OptionError(f"density is for {takers} only, got density {density} for {method}")
    if density is None:
        raise OptionError(f"{method} needs a density, the share of entries to keep; pass --density")
    try:
        return {"rule": rule(density)}
    except ValueError as error:
        raise OptionError(str(error)) from error


def _merge(
    function: Callable[..., merging.Merged],
    products: Mapping[str, Product],
    weights: Mapping[str, float],
    options: Mapping[str, Any],
    seed: np.random.SeedSequence,
) -> Adapted:
    options = dict(options)
    first, *_ = products.values()
    notes = []
    if len(products) < len(weights):
        notes.append(f"in {', '.join(products)} only")
    if "rank" in options:
        most = min(first.shape)
        if function is not merging.entrywise:
            most = min(most, sum(product.rank for product in products.values()))
        options["rank"], note = capped(options["rank"], most)
        notes += [note] if note else []
    if "rule" in options:
        options["rng"] = np.random.default_rng(seed)
    own = [weights[name] for name in products]
    merged = function(list(products.values()), own, **options)
    value = merged.value.split() if isinstance(merged.value, SVD) else merged.value
    product = Product(*value.factors())
    return Adapted(product, float(merged.exact.norm()), merged.error, "; ".join(notes))
