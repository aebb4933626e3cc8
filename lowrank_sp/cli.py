"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lowrank_sp import __version__, checkpoint
from lowrank_sp.adapters.initializers import INITIALIZERS
from lowrank_sp.checkpoint import CheckpointError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Method = StrEnum("Method", list(INITIALIZERS))

Model = Annotated[Path, typer.Argument(help="Model directory, or one .safetensors file.")]
Targets = Annotated[str | None, typer.Option(help="Regular expression for the names of layers.")]
Workers = Annotated[int, typer.Option(min=1, help="Layers to work on at a time.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowrank-sp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Certified low-rank factorizations of model checkpoints."""


@app.command()
def init(
    method: Annotated[Method, typer.Argument(help="Initializer.")],
    model: Model,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    alpha: Annotated[float | None, typer.Option(help="Default: the rank, for scale 1.")] = None,
    targets: Targets = None,
    patterns: Annotated[
        Path | None,
        typer.Option(help="JSON file with rank_pattern and alpha_pattern, as inspect --json has."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    tol: Annotated[float | None, typer.Option(help="Accuracy of the singular triplets.")] = None,
    workers: Workers = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Initialize adapters: writes OUT/adapter (PEFT), OUT/base and OUT/report.json."""
    own = _read_patterns(patterns)
    with _progress("layers") as progress, _executor(workers) as executor:
        report = checkpoint.initialize(
            model,
            method.value,
            out,
            rank=rank,
            alpha=alpha,
            targets=targets,
            rank_pattern=own.get("rank_pattern"),
            alpha_pattern=own.get("alpha_pattern"),
            seed=seed,
            tol=tol,
            overwrite=overwrite,
            executor=executor,
            ahead=workers,
            progress=progress,
        )
    _print(asdict(report), as_json, lambda: _report_table(report))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Output directory of init.")],
    base: Annotated[Path, typer.Option(help="The original model.")],
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Check that residual base and adapter add up to the original model."""
    with _progress("layers") as progress, _executor(workers) as executor:
        outcome = checkpoint.verify(folder, base, executor=executor, progress=progress)
    _print(asdict(outcome) | {"passed": outcome.passed}, as_json, lambda: _check_table(outcome))
    raise typer.Exit(0 if outcome.passed else 1)


@app.command()
def inspect(
    model: Model,
    targets: Targets = None,
    rank: Annotated[int, typer.Option(min=1, help="Budget of the suggested ranks.")] = 16,
    leading: Annotated[int, typer.Option(min=1, help="Singular values to print.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="Save the spectra as a figure.")] = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Print spectra, effective ranks and suggested ranks, layer by layer."""
    if plot is not None:
        checkpoint.check_figure(plot)
    with _progress("layers") as progress, _executor(workers) as executor:
        spectra = checkpoint.spectra(model, targets=targets, executor=executor, progress=progress)
    ranks = checkpoint.suggest_ranks(spectra, rank)
    if plot is not None:
        checkpoint.save_spectra(spectra, rank, plot)
    content = {"layers": [asdict(s) for s in spectra], "rank_pattern": ranks}
    _print(content, as_json, lambda: _spectra_table(spectra, ranks, leading))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to create.")] = Path("demo"),
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Initialize PiSSA on a small model made up on the spot, verify it, plot its spectra."""
    report, outcome = checkpoint.run_demo(out, rank=rank, overwrite=overwrite)
    content = asdict(report) | {"passed": outcome.passed}
    _print(content, as_json, lambda: _report_table(report))
    _say(f"verified: {_verdict(outcome)}. Written to {out}: model/, pissa/, spectra.png")
    raise typer.Exit(0 if outcome.passed else 1)


def main() -> None:
    """Run the command line; an expected error becomes one line and exit status 1."""
    try:
        app()
    except (CheckpointError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print(content: dict[str, Any], as_json: bool, table: Callable[[], Table]) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        # A pipe has no width of its own; tables are then as wide as they need to be.
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(table())


def _read_patterns(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = checkpoint.read_object(path, "JSON object")
    content.pop("layers", None)  # inspect --json has them beside its rank_pattern
    unknown = sorted(content.keys() - {"rank_pattern", "alpha_pattern"})
    if unknown:
        raise CheckpointError(
            f"{path}: keys must be rank_pattern and alpha_pattern, got {unknown[0]!r}"
        )
    return content


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.description}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )


@contextmanager
def _executor(workers: int) -> Iterator[Any]:
    if workers == 1:
        yield None
        return
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    threads = max(1, (os.cpu_count() or 1) // workers)
    with threadpool_limits(threads), ThreadPoolExecutor(workers) as executor:
        yield executor


def _table(*columns: str, caption: str | None = None) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left"
    )
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _report_table(report: checkpoint.Report) -> Table:
    table = _table(
        *("layer", "shape", "rank", "alpha", "sigma_1", "sigma_r", "energy", "bound", "ms"),
        caption="energy: share of ||W||_F^2 that the adapter takes over. "
        "bound: certified error of its singular values, relative to sigma_1.",
    )
    for row in report.layers:
        s = row.singular_values
        table.add_row(
            row.name,
            _shape(row.shape),
            str(row.rank),
            f"{row.alpha:g}",
            _number(s[0] if s else None, ".3f"),
            _number(s[-1] if s else None, ".3f"),
            _number(row.energy, ".1%"),
            _number(row.bound, ".0e"),
            f"{1e3 * row.seconds:.0f}",
        )
    return table


def _verdict(outcome: checkpoint.Verification) -> str:
    if not outcome.fingerprint_matches:
        return "the model is not the one that was initialized"
    if outcome.changed:
        count = len(outcome.changed)
        return f"{count} tensors without an adapter were changed, first {outcome.changed[0]}"
    failed = [layer.name for layer in outcome.layers if not layer.passed]
    if failed:
        return f"{len(failed)} of {len(outcome.layers)} layers do not add up, first {failed[0]}"
    worst = max(layer.error for layer in outcome.layers)
    return f"W = residual + scale * up @ down in {len(outcome.layers)} layers, to {worst:.0e}"


def _check_table(outcome: checkpoint.Verification) -> Table:
    table = _table(
        *("layer", "error", "excess", ""),
        caption="error: ||W - residual - scale up down||_F / ||W||_F. "
        "excess: largest error of an entry, in units of what rounding explains.",
    )
    for layer in outcome.layers:
        mark = "ok" if layer.passed else "FAILED"
        table.add_row(layer.name, f"{layer.error:.1e}", f"{layer.excess:.2g}", mark)
    table.add_row()
    table.add_row(_verdict(outcome))
    return table


def _spectra_table(
    spectra: list[checkpoint.LayerSpectrum], ranks: dict[str, int], leading: int
) -> Table:
    table = _table(
        *("layer", "shape", "spectrum", "effective", "stable", "50%", "90%", "99%", "suggested"),
        caption="effective rank: exponential of the entropy of the spectrum. "
        "stable rank: ||W||_F^2 / ||W||_2^2. 50%, 90%, 99%: ranks that hold this share of "
        "||W||_F^2. suggested: ranks for the budget of --rank.",
    )
    for s in spectra:
        table.add_row(
            s.name,
            _shape(s.shape),
            " ".join(f"{x:.3g}" for x in s.singular_values[:leading]),
            f"{s.effective_rank:.1f}",
            f"{s.stable_rank:.1f}",
            *(str(k) for k in (s.rank_50, s.rank_90, s.rank_99, ranks[s.name])),
        )
    return table
