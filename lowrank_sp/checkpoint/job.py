"""What all jobs share: one function on every layer, checks of their options, the files they write.

A job reads models or adapters, works on one layer at a time over any executor, and writes one
directory that appears whole or not at all, with a report of every layer in it.
"""

from __future__ import annotations

import inspect
import math
import operator
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from lowrank_sp._arrays import as_compute
from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.checkpoint.adapter import Adapter, check_same_base
from lowrank_sp.checkpoint.output import atomic_directory
from lowrank_sp.checkpoint.peft import read_adapter, write_adapter
from lowrank_sp.checkpoint.report import REPORT, JobReport, LayerOutcome
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.tasks import Executor, run

#: Called as ``progress(done, total, name)``.
Progress = Callable[[int, int, str], None]


class Done(NamedTuple):
    """What a function made of one layer."""

    name: str
    value: Any
    seconds: float


@dataclass(frozen=True)
class _Call:
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def _timed(call: _Call) -> Done:
    started = time.perf_counter()
    try:
        # What overflows is found when it is checked or encoded.
        with np.errstate(over="ignore", invalid="ignore"):
            value = call.function(*call.arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{call.name}: {error}") from error
    return Done(call.name, value, time.perf_counter() - started)


def per_layer(
    function: Callable[..., Any],
    layers: Collection[str],
    arguments: Callable[[str], tuple[Any, ...]],
    *,
    executor: Executor | None,
    ahead: int,
    progress: Progress | None,
) -> Iterator[Done]:
    """``function(*arguments(name))`` of every layer, in order; an error names the layer.

    Arguments are read here, when it is the turn of a layer, and travel to the executor.
    """
    calls = (_Call(name, function, arguments(name)) for name in layers)
    for count, done in enumerate(run(_timed, calls, executor, ahead), start=1):
        name = done.name
        yield done
        del done  # or it would stay while the next layer is computed
        if progress is not None:
            progress(count, len(layers), name)


class Adapted(NamedTuple):
    """Plain LoRA that a function made for one layer, None where the layer needs none.

    ``norm`` is that of what it stands for, ``error`` what it lacks of it.
    """

    product: Product | None
    norm: float
    error: float
    note: str = ""


def adapt(
    function: Callable[..., Adapted],
    layers: Collection[str],
    arguments: Callable[[str], tuple[Any, ...]],
    *,
    executor: Executor | None,
    ahead: int,
    progress: Progress | None,
) -> tuple[dict[str, Product], list[LayerOutcome]]:
    """The layers of one adapter, and their rows in the report: see :func:`per_layer`."""
    found, rows = {}, []
    calls = per_layer(
        function, layers, arguments, executor=executor, ahead=ahead, progress=progress
    )
    for name, (product, norm, error, note), seconds in calls:
        if product is not None:
            found[name] = product
            rows.append(
                LayerOutcome(name, product.shape, product.rank, norm, error, seconds, note=note)
            )
    return found, rows


def seeds(seed: Any, layers: Sequence[str]) -> dict[str, np.random.SeedSequence]:
    """One child a layer, so that results do not depend on the executor."""
    try:
        children = np.random.SeedSequence(operator.index(seed)).spawn(len(layers))
    except (TypeError, ValueError) as error:
        raise OptionError(f"seed must be a non-negative integer, got {seed!r}") from error
    return dict(zip(layers, children, strict=True))


def check_choice(name: str, choices: Collection[str], what: str) -> str:
    """``name`` if it is one of the choices; the error gives the closest."""
    if name not in choices:
        close = get_close_matches(name.lower().replace("-", "_"), choices, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"{what} must be one of {', '.join(choices)}, got {name!r}{hint}")
    return name


def taken(
    method: str, methods: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that are not None, if the function of that name takes them."""
    given = {option: value for option, value in options.items() if value is not None}
    parameters = {name: inspect.signature(f).parameters for name, f in methods.items()}
    for option, value in given.items():
        if option not in parameters[method]:
            takers = [name for name, known in parameters.items() if option in known]
            raise OptionError(
                f"{option} is for {', '.join(takers)} only, got {option} {value} for {method}"
            )
    return given


def check_size(rank: int | None, tol: float | None) -> None:
    """Raise unless a rank and a tolerance are in range, for whatever layer."""
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1, got {rank}")
    if tol is not None and not 0 < tol < 1:
        raise OptionError(f"tol must be in (0, 1), got {tol}; it is relative")


@overload
def capped(rank: int, most: int) -> tuple[int, str]: ...


@overload
def capped(rank: None, most: int) -> tuple[None, str]: ...


def capped(rank: int | None, most: int) -> tuple[int | None, str]:
    """A rank that a layer can have, and a note where it is not the one that was asked for."""
    if rank is None or rank <= most:
        return rank, ""
    return most, f"rank {most} is all there is"


def read_adapters(
    paths: Mapping[str, str | Path], *, assume_same_base: bool = False
) -> dict[str, Adapter]:
    """Adapters of one base, by name; their arrays are read when a layer is asked for.

    ``assume_same_base`` leaves out the comparison of their bases.
    """
    if not paths:
        raise OptionError("at least one adapter is needed, got none")
    adapters = {name: read_adapter(path) for name, path in paths.items()}
    if not assume_same_base:
        try:
            check_same_base(adapters)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; pass --assume-same-base to go on") from error
    return adapters


def all_layers(adapters: Mapping[str, Adapter]) -> list[str]:
    """Names of the layers that any of the adapters has, sorted."""
    return sorted({layer for adapter in adapters.values() for layer in adapter.layers})


def read_products(adapters: Mapping[str, Adapter], layer: str) -> dict[str, Product]:
    """Plain LoRA of a layer, by adapter, of those that have it: of one shape and one dtype.

    Raises
    ------
    CheckpointError
        If one is of another form, or two of different shapes, which are named.
    """
    products: dict[str, Product] = {}
    for name, adapter in adapters.items():
        if layer not in adapter.layers:
            continue
        product = as_product(adapter.layers[layer], layer)
        for other, known in products.items():
            if known.shape != product.shape:
                raise CheckpointError(
                    f"{layer}: adapters must have one shape, got {known.shape} of {other} and "
                    f"{product.shape} of {name}"
                )
        products[name] = product
    dtypes = [as_compute(f).dtype for p in products.values() for f in (p.up, p.down)]
    dtype = np.result_type(*dtypes)
    return {
        name: Product(p.up.astype(dtype), p.down.astype(dtype), p.scale)
        for name, p in products.items()
    }


def as_product(form: Form, layer: str) -> Product:
    """A form that is plain LoRA, or an error."""
    if not isinstance(form, Product):
        raise CheckpointError(
            f"{layer}: plain LoRA is needed, got {type(form).__name__}; convert it first"
        )
    return form


def joined(adapters: Mapping[str, Adapter], layers: Mapping[str, Product]) -> Adapter:
    """An adapter of the base of the given ones, with other layers."""
    every = list(adapters.values())
    return replace(
        every[0],
        layers=layers,
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in every),
        embeddings=frozenset().union(*(adapter.embeddings for adapter in every)),
        kernels={name: size for adapter in every for name, size in adapter.kernels.items()},
    )


def check_weights(weights: Sequence[float] | None, names: Collection[str]) -> list[float] | None:
    """One finite weight an adapter, or an error."""
    if weights is None:
        return None
    if len(weights) != len(names):
        raise OptionError(
            f"weights must be one for each adapter, got {len(weights)} for {len(names)}"
        )
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"weights must be finite, got {list(weights)}")
    return [float(weight) for weight in weights]


def output(
    out: str | Path, inputs: Mapping[str, str | Path], *, overwrite: bool
) -> AbstractContextManager[Path]:
    """The directory that a job writes into: see :func:`atomic_directory`."""
    return atomic_directory(out, overwrite=overwrite, inputs=[Path(p) for p in inputs.values()])


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into a directory that does not exist yet."""
    folder.mkdir(parents=True)
    write_adapter(folder, adapter)


def save_report(
    folder: Path,
    job: str,
    inputs: Mapping[str, str | Path],
    options: Mapping[str, Any],
    layers: Sequence[LayerOutcome],
    notes: Mapping[str, list[str]] | None = None,
    *,
    totals: Mapping[str, float] | None = None,
) -> JobReport:
    """Write the report of a job beside its files."""
    from lowrank_sp import __version__

    report = JobReport(
        job,
        __version__,
        {name: str(path) for name, path in inputs.items()},
        {name: value for name, value in options.items() if value is not None},
        list(layers),
        {what: names for what, names in (notes or {}).items() if names},
        dict(totals or {}),
    )
    report.save(folder / REPORT)
    return report
