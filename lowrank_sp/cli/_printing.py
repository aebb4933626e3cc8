"""Tables and JSON to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lowrank_sp.checkpoint import JobReport

# Names that a message gives of many.
_SOME = 3


def say(line: str) -> None:
    """A line to standard error."""
    print(line, file=sys.stderr)


def show(content: dict[str, Any], as_json: bool, make_table: Callable[[], Table]) -> None:
    """Print a result."""
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        # A pipe has no width of its own; tables are then as wide as they need to be.
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(make_table())


def show_job(report: JobReport, as_json: bool) -> None:
    """Print the layers of a job, and say what one should know about others."""
    show(asdict(report), as_json, lambda: _job_table(report))
    for what, names in report.notes.items():
        more = ", ..." if len(names) > _SOME else ""
        say(f"{len(names)} {what}: {', '.join(names[:_SOME])}{more}")


@contextmanager
def progress(unit: str = "layers") -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal."""
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


def table(*columns: str, caption: str | None = None) -> Table:
    """A table without lines whose first column is text and whose others are numbers."""
    made = Table(
        box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left"
    )
    made.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def size(shape: tuple[int, int]) -> str:
    """A shape."""
    return f"{shape[0]} x {shape[1]}"


def number(x: float | None, form: str) -> str:
    """A number that may be missing."""
    return "-" if x is None else format(x, form)


def _job_table(report: JobReport) -> Table:
    several = any(row.adapter is not None for row in report.layers)
    noted = any(row.note for row in report.layers)
    made = table(
        *("layer", "shape", "rank", "norm", "error", "relative", "ms"),
        *(("adapter",) if several else ()),
        *(("",) if noted else ()),
        caption="norm: Frobenius norm of what was asked for. error: of what is missing of it. "
        "relative: error over norm.",
    )
    for row in report.layers:
        made.add_row(
            row.name,
            size(row.shape),
            str(row.rank),
            f"{row.norm:.3g}",
            f"{row.error:.2g}",
            f"{row.relative_error:.1e}",
            f"{1e3 * row.seconds:.0f}",
            *((row.adapter or "",) if several else ()),
            *((row.note,) if noted else ()),
        )
    return made
