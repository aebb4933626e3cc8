"""The command line: parse, call one function, print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lowrank_sp import __version__
from lowrank_sp.checkpoint import CheckpointError, OptionError
from lowrank_sp.cli import adapters, models
from lowrank_sp.cli._printing import say

_COMMANDS = (
    models.init,
    models.verify,
    models.inspect,
    models.quantize,
    models.compress,
    models.demo,
    adapters.extract,
    adapters.resize,
    adapters.merge,
    adapters.convert,
    adapters.check,
    adapters.share,
    adapters.federate,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in _COMMANDS:
    app.command()(_command)


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
    """Certified low-rank factorizations of model checkpoints and their adapters."""


def main() -> None:
    """Run the command line; an expected error becomes one line and exit status 1, or 2.

    2 is for options that are wrong whatever the files hold, as typer has it.
    """
    try:
        app()
    except (CheckpointError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, OptionError) else 1)
