"""Commands on adapters: made, resized, merged, converted, shared, aggregated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lowrank_sp import checkpoint
from lowrank_sp.checkpoint import AGGREGATES, MERGES, RANK_RULES, SHARINGS
from lowrank_sp.cli._options import (
    Adapters,
    Jobs,
    Json,
    Out,
    Overwrite,
    Rank,
    SameBase,
    Seed,
    Targets,
    Tol,
    Weights,
    executor,
    named,
    numbers,
)
from lowrank_sp.cli._printing import progress, show, show_job
from lowrank_sp.iterate import Stop

Adapter = Annotated[Path, typer.Argument(metavar="DIR", help="PEFT directory.")]


def extract(
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model.")],
    base: Annotated[Path, typer.Argument(help="The model that it was tuned from.")],
    out: Out,
    rank: Rank = None,
    tol: Tol = None,
    targets: Targets = None,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of what fine-tuning changed: writes OUT/adapter and OUT/report.json."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.extract(
            tuned,
            base,
            out,
            rank=rank,
            tol=tol,
            targets=targets,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def resize(
    adapter: Adapter,
    out: Out,
    rank: Rank = None,
    tol: Tol = None,
    rule: Annotated[
        str | None, typer.Option(help=f"What chooses ranks: {', '.join(RANK_RULES)}.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="What the rule takes.")] = None,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Bring an adapter to a lower rank: writes OUT/adapter and OUT/report.json."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.resize(
            adapter,
            out,
            rank=rank,
            tol=tol,
            rule=rule,
            threshold=threshold,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def merge(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(MERGES)}.")],
    adapters: Adapters,
    out: Out,
    weights: Weights = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries to keep, where a method drops some.")
    ] = None,
    rank: Rank = None,
    tol: Tol = None,
    assume_same_base: SameBase = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge adapters of one base into one: writes OUT/adapter and OUT/report.json."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.merge(
            named(adapters),
            out,
            method=method,
            weights=numbers(weights),
            density=density,
            rank=rank,
            tol=tol,
            assume_same_base=assume_same_base,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def convert(
    adapter: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="PEFT directory, or file of kohya.")
    ],
    out: Out,
    to: Annotated[str, typer.Option(help="What to write: peft or kohya.")] = "peft",
    prefix: Annotated[
        str | None,
        typer.Option(
            help="What names in files of kohya begin with, such as lora_unet; they need it."
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="The untrained adapter, where it did not start at zero (PiSSA)."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The base model, for forms like DoRA and for names in files of kohya."),
    ] = None,
    rank: Rank = None,
    tol: Tol = None,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn an adapter into plain LoRA: writes OUT/adapter, or OUT/adapter.safetensors."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.convert(
            adapter,
            out,
            start=start,
            base=base,
            to=to,
            prefix=prefix,
            rank=rank,
            tol=tol,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def check(
    adapter: Adapter,
    engine: Annotated[str, typer.Option(help="What shall load it: peft or vllm.")] = "peft",
    base: Annotated[Path | None, typer.Option(help="The base model, to compare layers.")] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="What vLLM will be started with; 16 by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what an engine would refuse, or get wrong, of an adapter."""
    model = None if base is None else checkpoint.Checkpoint(base)
    findings = checkpoint.preflight(
        adapter, engine=engine, model=model, max_lora_rank=max_lora_rank
    )
    content = {"findings": [asdict(f) for f in findings]}
    show(content, as_json, lambda: (None, "\n".join(map(str, findings)) or "nothing wrong"))
    raise typer.Exit(1 if any(f.severity == "error" for f in findings) else 0)


def share(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(SHARINGS)}.")],
    adapters: Adapters,
    rank: Annotated[int, typer.Option(min=1, help="Columns of the shared bases.")],
    out: Out,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Number of pairs of bases, for clustered.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Most steps to improve the bases.")] = 500,
    assume_same_base: SameBase = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress adapters into shared bases: writes OUT/shared.safetensors and OUT/adapters/NAME."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.share(
            named(adapters),
            out,
            method=method,
            rank=rank,
            clusters=clusters,
            stop=Stop(max_iter=steps),
            assume_same_base=assume_same_base,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def federate(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(AGGREGATES)}.")],
    adapters: Adapters,
    out: Out,
    weights: Weights = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the correction (fedex) or the adapter (flora_na).")
    ] = None,
    frozen: Annotated[
        str | None, typer.Option(help="The factor that nobody trained (rolora): up or down.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The base model, to write it with its correction (flora, fedex)."),
    ] = None,
    assume_same_base: SameBase = False,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Aggregate the adapters of clients: writes OUT/adapter, and OUT/correction or OUT/base."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.federate(
            named(adapters),
            out,
            method=method,
            weights=numbers(weights),
            rank=rank,
            frozen=frozen,
            base=base,
            assume_same_base=assume_same_base,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)
