"""Commands on models: adapters that start from their weights, and what those look like."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowrank_sp import checkpoint
from lowrank_sp.adapters.compensate import COMPENSATIONS
from lowrank_sp.adapters.initializers import CALIBRATED, INITIALIZERS
from lowrank_sp.checkpoint import FORMATS, CheckpointError
from lowrank_sp.cli._options import Jobs, Json, Model, Out, Overwrite, Seed, Targets, executor
from lowrank_sp.cli._printing import number, progress, say, show, show_job, size, table

Calibration = Annotated[
    Path | None,
    typer.Option(help="Safetensors file with a statistic of every layer, LAYER.STATISTIC."),
]
_NEED_DATA = {f"{name} ({known.statistic})" for name, known in CALIBRATED.items()}


def init(
    method: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(INITIALIZERS)}; with --calibration, of "
            f"{', '.join(sorted(_NEED_DATA))}."
        ),
    ],
    model: Model,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")],
    out: Out,
    alpha: Annotated[float | None, typer.Option(help="Default: the rank, for scale 1.")] = None,
    calibration: Calibration = None,
    targets: Targets = None,
    patterns: Annotated[
        Path | None,
        typer.Option(help="JSON file with rank_pattern and alpha_pattern, as inspect --json has."),
    ] = None,
    seed: Seed = 0,
    tol: Annotated[float | None, typer.Option(help="Accuracy of the singular triplets.")] = None,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Initialize adapters: writes OUT/adapter (PEFT), OUT/base and OUT/report.json."""
    own = _read_patterns(patterns)
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.initialize(
            model,
            method,
            out,
            rank=rank,
            alpha=alpha,
            calibration=calibration,
            targets=targets,
            rank_pattern=own.get("rank_pattern"),
            alpha_pattern=own.get("alpha_pattern"),
            seed=seed,
            tol=tol,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show(asdict(report), as_json, lambda: _report_table(report))


def verify(
    folder: Annotated[Path, typer.Argument(help="Output directory of init.")],
    base: Annotated[Path, typer.Option(help="The original model.")],
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Check that residual base and adapter add up to the original model."""
    with progress() as bar, executor(jobs) as pool:
        outcome = checkpoint.verify(folder, base, executor=pool, progress=bar)
    show(asdict(outcome) | {"passed": outcome.passed}, as_json, lambda: _check_table(outcome))
    raise typer.Exit(0 if outcome.passed else 1)


def inspect(
    model: Model,
    targets: Targets = None,
    rank: Annotated[int, typer.Option(min=1, help="Budget of the suggested ranks.")] = 16,
    leading: Annotated[int, typer.Option(min=1, help="Singular values to print.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="Save the spectra as a figure.")] = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Print spectra, effective ranks and suggested ranks, layer by layer."""
    if plot is not None:
        checkpoint.check_figure(plot)
    with progress() as bar, executor(jobs) as pool:
        spectra = checkpoint.spectra(model, targets=targets, executor=pool, progress=bar)
    ranks = checkpoint.suggest_ranks(spectra, rank)
    if plot is not None:
        checkpoint.save_spectra(spectra, rank, plot)
    content = {"layers": [asdict(s) for s in spectra], "rank_pattern": ranks}
    show(content, as_json, lambda: _spectra_table(spectra, ranks, rank, leading))


def quantize(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.")] = "nf4",
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="Of an integer; 4 by default.")
    ] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Entries that share a scale.")] = None,
    compensate: Annotated[
        str | None,
        typer.Option(help=f"What makes up for the loss: {', '.join(COMPENSATIONS)}."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapter that does.")] = None,
    calibration: Calibration = None,
    targets: Targets = None,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a model: writes OUT/base and, with --compensate METHOD, OUT/adapter."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.quantize(
            model,
            out,
            to=to,
            bits=bits,
            block=block,
            compensate=compensate,
            rank=rank,
            calibration=calibration,
            targets=targets,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def compress(
    model: Model,
    keep: Annotated[float, typer.Option(help="Share of the parameters of the layers, in (0, 1].")],
    calibration: Annotated[
        Path, typer.Option(help="Safetensors file with the second moment of every layer.")
    ],
    out: Out,
    targets: Targets = None,
    seed: Seed = 0,
    jobs: Jobs = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a model (SVD-LLM): OUT has two factors in place of weights."""
    with progress() as bar, executor(jobs) as pool:
        report = checkpoint.compress(
            model,
            out,
            checkpoint.SecondMoments(calibration),
            keep=keep,
            targets=targets,
            seed=seed,
            overwrite=overwrite,
            executor=pool,
            ahead=jobs,
            progress=bar,
        )
    show_job(report, as_json)


def demo(
    out: Out = Path("demo"),
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Initialize PiSSA on a small model made up on the spot, verify it, plot its spectra."""
    report, outcome = checkpoint.run_demo(out, rank=rank, overwrite=overwrite)
    content = asdict(report) | {"passed": outcome.passed}
    show(content, as_json, lambda: _report_table(report))
    say(f"verified: {_verdict(outcome)}. Written to {out}: model/, pissa/, spectra.png")
    raise typer.Exit(0 if outcome.passed else 1)


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


def _report_table(report: checkpoint.Report) -> tuple[Table, str]:
    lines = ["alpha: the update is scale * up @ down, with scale = alpha / rank. ms: milliseconds"]
    spectral = any(row.singular_values for row in report.layers)
    measured = any(row.error is not None for row in report.layers)
    if spectral:
        lines += [
            "sigma_1, sigma_r: largest and smallest singular value that the adapter is made of",
            "energy: share of ||W||_F^2 that these have",
            "bound: certified error of each of them, relative to sigma_1",
        ]
    if measured:
        lines += [
            "error: root mean square of what the residual makes of the inputs in the calibration "
            "data"
        ]
    made = table(
        *("layer", "shape", "rank", "alpha"),
        *(("sigma_1", "sigma_r", "energy", "bound") if spectral else ()),
        *(("error",) if measured else ()),
        "ms",
    )
    for row in report.layers:
        s = row.singular_values
        values = (
            number(s[0] if s else None, ".4g"),
            number(s[-1] if s else None, ".4g"),
            number(row.energy, ".1%"),
            number(row.bound, ".0e"),
        )
        made.add_row(
            row.name,
            size(row.shape),
            str(row.rank),
            f"{row.alpha:g}",
            *(values if spectral else ()),
            *((number(row.error, ".3g"),) if measured else ()),
            f"{1e3 * row.seconds:.0f}",
        )
    return made, "\n".join(lines)


def _verdict(outcome: checkpoint.Verification) -> str:
    if not outcome.fingerprint_matches:
        return "the model is not the one that was initialized; pass that one as --base"
    if outcome.changed:
        count = len(outcome.changed)
        return f"{count} tensors without an adapter were changed, first {outcome.changed[0]}"
    failed = [layer.name for layer in outcome.layers if not layer.passed]
    if failed:
        return f"{len(failed)} of {len(outcome.layers)} layers do not add up, first {failed[0]}"
    worst = max(layer.error for layer in outcome.layers)
    return f"W = residual + scale * up @ down in {len(outcome.layers)} layers, to {worst:.0e}"


def _check_table(outcome: checkpoint.Verification) -> tuple[Table, str]:
    made = table("layer", "error", "excess", "")
    lines = (
        "error: ||W - residual - scale * up @ down||_F / ||W||_F\n"
        "excess: largest error of an entry, over what rounding explains there; fails above 1\n"
        f"{_verdict(outcome)}"
    )
    for layer in outcome.layers:
        mark = "ok" if layer.passed else "FAILED"
        made.add_row(layer.name, f"{layer.error:.1e}", f"{layer.excess:.2g}", mark)
    return made, lines


def _spectra_table(
    spectra: list[checkpoint.LayerSpectrum], ranks: dict[str, int], rank: int, leading: int
) -> tuple[Table, str]:
    made = table(
        *("layer", "shape", "spectrum", "effective", "stable", "50%", "90%", "99%", "suggested")
    )
    lines = (
        f"spectrum: the {leading} largest singular values of the weight W\n"
        "effective rank: exponential of the entropy of the singular values\n"
        "stable rank: ||W||_F^2 / ||W||_2^2\n"
        "50%, 90%, 99%: smallest ranks that hold this share of ||W||_F^2\n"
        f"suggested: ranks with no more parameters together than rank {rank} in every layer"
    )
    for s in spectra:
        made.add_row(
            s.name,
            size(s.shape),
            " ".join(f"{x:.3g}" for x in s.singular_values[:leading]),
            f"{s.effective_rank:.1f}",
            f"{s.stable_rank:.1f}",
            *(str(k) for k in (s.rank_50, s.rank_90, s.rank_99, ranks[s.name])),
        )
    return made, lines
