"""What the commands have in common: options, how adapters are named, where layers are worked on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_sp.checkpoint import OptionError

Model = Annotated[Path, typer.Argument(help="Model directory, or one .safetensors file.")]
Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]DIR...", help="PEFT directories; without a name, called by their own."
    ),
]
Out = Annotated[Path, typer.Option(help="Directory to create.")]
Targets = Annotated[str | None, typer.Option(help="Regular expression for the names of layers.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Most that a layer may have.")]
Tol = Annotated[
    float | None, typer.Option(help="Error allowed in every layer, relative to its norm.")
]
Weights = Annotated[
    str | None, typer.Option(metavar="W,W,...", help="One number for each adapter.")
]
SameBase = Annotated[
    bool,
    typer.Option(
        "--assume-same-base",
        help="Go on where names or fingerprints of the bases of the adapters differ.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "--workers", min=1, help="Layers to work on at a time.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Paths by name: the one before ``=``, or the last part of the path that is not ``adapter``."""
    found: dict[str, Path] = {}
    for text in adapters:
        name, equals, path = text.partition("=")
        if not equals or os.sep in name:
            path = text
            parts = [part for part in Path(path).absolute().parts if part != "adapter"]
            name = parts[-1]
        if _is_number(path) and not Path(path).exists():
            raise OptionError(
                f"{path} is no adapter; weights are one option with commas, such as "
                "--weights 0.5,0.5"
            )
        if name in found:
            raise OptionError(
                f"{found[name]} and {path} are both called {name!r}; name them, as in "
                f"{name}1={found[name]} {name}2={path}"
            )
        found[name] = Path(path)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def numbers(text: str | None) -> list[float] | None:
    """Numbers between commas."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(
            f"weights must be numbers between commas, such as 0.5,0.5, got {text!r}"
        ) from error


@contextmanager
def executor(jobs: int) -> Iterator[Any]:
    """Threads that share the cores, or None for one job."""
    if jobs == 1:
        yield None
        return
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    threads = max(1, (os.cpu_count() or 1) // jobs)
    with threadpool_limits(threads), ThreadPoolExecutor(jobs) as pool:
        yield pool
