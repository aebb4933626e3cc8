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
_WIDE = 1000
# By job: what its norm is of, and its error.
_MEANINGS = {
    "extract": ("||D||_F of D = tuned - base", "||D - adapter||_F"),
    "resize": ("||D||_F of the update D = scale * up @ down as it was", "||D - resized||_F"),
    "merge": (
        "||D||_F of D, the weighted sum of the updates; over their number for ties, dare_ties and "
        "knots, which elect signs",
        "||D - merged||_F",
    ),
    "convert": (
        "||D||_F of the update D of the adapter, with --start of its change since then",
        "||D - converted||_F",
    ),
    "share": ("||D||_F of the update D of this adapter", "||D - its update in the bases||_F"),
    "federate": (
        "||D||_F of D, the weighted mean of the updates of the clients",
        "||D - adapter - correction||_F, of what this client gets",
    ),
    "quantize": ("||W||_F of the weight W", "||W - base - adapter||_F, as they are stored"),
    "compress": (
        "root mean square of ||W x||, the outputs of the weight W in the calibration data",
        "root mean square of ||(W - up @ down) x||, the same of what they lose",
    ),
}


def say(line: str) -> None:
    """A line to standard error."""
    print(line, file=sys.stderr)


def show(
    content: dict[str, Any], as_json: bool, make: Callable[[], tuple[Table | None, str]]
) -> None:
    """Print a result: as JSON, or as the table and the lines below it that ``make`` gives."""
    if as_json:
        print(json.dumps(content, indent=2))
        return
    made, lines = make()
    if made is not None:
        # As wide as it needs to be: a narrow terminal wraps lines, where rich would cut numbers.
        Console(width=_WIDE, height=1).print(made)
    print(lines)


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


def table(*columns: str) -> Table:
    """A table without lines whose first column is text and whose others are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
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


def _job_table(report: JobReport) -> tuple[Table, str]:
    several = any(row.adapter is not None for row in report.layers)
    noted = any(row.note for row in report.layers)
    made = table(
        *("layer", "shape", "rank", "norm", "error", "relative", "ms"),
        *(("adapter",) if several else ()),
        *(("",) if noted else ()),
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
    return made, "\n".join(_captions(report))


def _captions(report: JobReport) -> Iterator[str]:
    norm, error = _MEANINGS[report.job]
    yield f"norm: {norm}"
    yield f"error: {error}"
    yield "relative: error / norm. ms: milliseconds"
    if report.totals:
        before, after = report.totals["parameters_before"], report.totals["parameters"]
        yield f"parameters of all layers: {after} of {before}, {after / before:.1%}"
        yield (
            f"relative, root mean square over all layers: {report.totals['error']:.3g} as planned; "
            f"no ranks within the budget have less than {report.totals['bound']:.3g}"
        )
