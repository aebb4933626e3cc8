"""Plain LoRA for the original base, of adapters in other forms or that did not start at zero."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_sp._arrays import frobenius
from lowrank_sp.adapters import algebra
from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.checkpoint.adapter import Adapter, base_fingerprint, check_base, check_same_base
from lowrank_sp.checkpoint.job import (
    Adapted,
    Progress,
    adapt,
    capped,
    check_choice,
    check_size,
    output,
    read_products,
    save_adapter,
    save_report,
)
from lowrank_sp.checkpoint.kohya import read_kohya, write_kohya
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.output import final_path
from lowrank_sp.checkpoint.peft import read_adapter
from lowrank_sp.checkpoint.report import REPORT, JobReport, Report
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.operators import LinearOperator
from lowrank_sp.tasks import Executor


def convert(
    adapter: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    base: str | Path | None = None,
    to: str = "peft",
    prefix: str | None = None,
    rank: int | None = None,
    tol: float | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Write an adapter as plain LoRA, for the original base where it was trained on a residual.

    Without ``start``, :meth:`~lowrank_sp.adapters.forms.Form.to_lora` of every layer. With it,
    :func:`lowrank_sp.adapters.algebra.subtract`: PiSSA and its kin become an update of the weight
    that they were made of, of twice the rank, or of ``rank`` with the error that this makes.

    Parameters
    ----------
    adapter : path
        A directory of PEFT, in a form that :func:`~lowrank_sp.checkpoint.peft.read_adapter` knows,
        or a file that :func:`~lowrank_sp.checkpoint.kohya.read_kohya` does.
    out : path
        Directory to create. It gets ``report.json`` and ``adapter/`` or ``adapter.safetensors``,
        and appears at the end, whole.
    start : path, optional
        The untrained adapter, in the ``adapter/`` that
        :func:`~lowrank_sp.checkpoint.initialize.initialize` wrote. Scale and base of the result are
        then those that it left.
    base : path, optional
        The base model, where the form depends on its weights, as DoRA does, and for files of
        kohya, whose names of modules are told by it. With ``start``, the original model; by default
        the one in the report of the initialization.
    to : {"peft", "kohya"}
        How to write it: a directory of PEFT, or a file with the names of kohya. A fingerprint that
        PEFT dropped in training is computed for that, if the base that the adapter names is here.
    prefix : str, optional
        For files of kohya, read or written, which need it: the beginning of their names, such as
        ``lora_unet``.
    rank, tol
        The most a layer may have, and how far each may be from what it was, relative to its norm.
        Without them nothing is dropped, which forms that are no product of two factors refuse.
    overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport

    Raises
    ------
    CheckpointError
        If a layer has no plain LoRA without ``rank`` or ``tol``, if ``start`` has other layers or
        another base, or anything is wrong with the options or the output directory. Nothing is
        left behind.
    """
    check_size(rank, tol)
    check_choice(to, ("peft", "kohya"), "to")
    is_file = Path(adapter).suffix == ".safetensors"
    if prefix is None and (is_file or to == "kohya"):
        raise OptionError(
            "names in files of kohya begin with the model that they are for; pass --prefix: "
            "lora_unet, lora_te (text encoders), lycoris, or another"
        )
    if prefix is not None and not (is_file or to == "kohya"):
        raise OptionError(
            f"a prefix is for names in files of kohya, got {prefix!r} for directories of PEFT; "
            "leave out --prefix, or pass --to kohya"
        )
    inputs = {"adapter": adapter, "start": start, "base": base}
    inputs = {name: path for name, path in inputs.items() if path is not None}
    model = None if base is None else Checkpoint(base)
    if start is None:
        trained = _read(Path(adapter), model, prefix)
        if model is not None:
            check_base(model, {str(adapter): trained})

        def arguments(name: str) -> tuple[Any, ...]:
            return trained.layers[name], rank, tol

        function = _convert
    else:
        both = {"adapter": _read(Path(adapter), model, prefix), "start": read_adapter(start)}
        _check_start(both)
        origin = _origin(Path(start), model)
        trained = replace(both["adapter"], base=origin.name, fingerprint=origin.fingerprint)

        def arguments(name: str) -> tuple[Any, ...]:
            return *read_products(both, name).values(), rank, tol

        function = _subtract
    with output(out, inputs, overwrite=overwrite) as folder:
        notes: dict[str, list[str]] = {}
        if to == "kohya":
            trained, notes = _recognizable(trained)
        found, rows = adapt(
            function,
            trained.layers,
            arguments,
            executor=executor,
            ahead=ahead,
            progress=progress,
        )
        lora = replace(trained, layers=found)
        if to == "peft":
            save_adapter(folder / "adapter", lora)
        else:
            assert prefix is not None
            write_kohya(folder / "adapter.safetensors", lora, prefix=prefix)
        options = {"to": to, "prefix": prefix, "rank": rank, "tol": tol}
        return save_report(folder, "convert", inputs, options, rows, notes)


def _read(path: Path, model: Checkpoint | None, prefix: str | None) -> Adapter:
    if path.suffix != ".safetensors":
        return read_adapter(path, model=model)
    assert prefix is not None
    adapter = read_kohya(path, prefix=prefix, modules=model, model=model)
    if adapter.base is not None or model is None:
        return adapter
    return replace(adapter, base=str(final_path(model.path)))


def _recognizable(adapter: Adapter) -> tuple[Adapter, dict[str, list[str]]]:
    """With the fingerprint of its base, or a note where that cannot be known."""
    found = base_fingerprint(base=adapter.base, fingerprint=adapter.fingerprint)
    alone = [] if found is not None or adapter.base is None else [adapter.base]
    return replace(adapter, fingerprint=found), {
        "base recorded by its name alone, as it is not on this machine; the file is for no other "
        "base": alone
    }


class _Origin(NamedTuple):
    name: str
    fingerprint: str | None


def _origin(start: Path, model: Checkpoint | None) -> _Origin:
    """The model that was initialized: by the report beside the untrained adapter, or as given."""
    try:
        report = Report.load(start.absolute().parent / REPORT)
    except CheckpointError as error:
        if model is None:
            raise CheckpointError(
                f"{start}: no report of init beside it says what the original model was; "
                "pass --base"
            ) from error
        return _Origin(str(final_path(model.path)), model.fingerprint())
    if model is None:
        return _Origin(report.model, report.fingerprint)
    if model.fingerprint() != report.fingerprint:
        raise CheckpointError(
            f"{model.path}: not the model that {start} was initialized from, which was "
            f"{report.model}; pass that one, or leave out --base"
        )
    return _Origin(str(final_path(model.path)), report.fingerprint)


def _check_start(both: dict[str, Adapter]) -> None:
    check_same_base(both)
    trained, start = (both[name].layers.keys() for name in ("adapter", "start"))
    alone = sorted(trained ^ start)
    if alone:
        where = "trained" if alone[0] in trained else "untrained"
        raise CheckpointError(
            f"{alone[0]}: only the {where} adapter has it; both must be of one training run"
        )


def _convert(form: Form, rank: int | None, tol: float | None) -> Adapted:
    note = ""
    if isinstance(form, Product) and rank is None and tol is None:
        return Adapted(Product(form.up, form.down, form.scale), float(form.delta().norm()), 0.0)
    if rank is not None:
        rank, note = capped(rank, min(form.rank_bound, *form.shape))
    product, error = form.to_lora(rank, tol=tol)
    return Adapted(product, _norm(form, product, error), error, note)


def _norm(form: Form, product: Product, error: float) -> float:
    """Of the update; what is left out of it is orthogonal to what is kept."""
    if error:
        return math.hypot(float(product.delta().norm()), error)
    delta = form.delta()
    if isinstance(delta, Factored):
        return float(delta.norm())
    return frobenius(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


def _subtract(trained: Product, start: Product, rank: int | None, tol: float | None) -> Adapted:
    if trained.scale == start.scale:
        # Stored factors are subtracted as they are: they differ by less than they are large.
        scale = trained.scale
        new, old = LowRank(trained.up, trained.down), LowRank(start.up, start.down)
    else:
        scale = 1.0
        new, old = trained.delta(), start.delta()
    every = algebra.subtract(new, old)
    rank, note = capped(rank, every.rank)
    f: SVD = every.truncate(rank, tol=tol)
    left, right = f.split().factors()
    size = abs(scale)
    product = Product(left, right, scale)
    return Adapted(product, size * float(every.norm()), size * float(f.error), note)
