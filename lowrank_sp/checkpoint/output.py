"""Output that appears whole or not at all, and never in place of anything else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_sp.checkpoint.report import REPORT, JobReport, Report
from lowrank_sp.checkpoint.tensors import CheckpointError


def holds_report(folder: Path) -> bool:
    """Whether a directory is the output of an initialization or another job."""
    for kind in (Report, JobReport):
        with suppress(CheckpointError):
            kind.load(folder / REPORT)
            return True
    return False


@contextmanager
def atomic_directory(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    ours: Callable[[Path], bool] = holds_report,
) -> Iterator[Path]:
    """A directory to write into that is renamed to ``path`` at the end of the block.

    It lies beside ``path`` as ``.NAME.partial``. An exception removes it and leaves everything as
    it was. What a killed process left behind is removed by the next one; an output that it had
    moved aside as ``.NAME.old`` comes back first.

    Parameters
    ----------
    path : path
        A symbolic link stands for the directory that it leads to.
    overwrite : bool
        Whether ``path`` may exist; it is then replaced at the end.
    inputs : iterable of Path
        What is read meanwhile.
    ours : callable
        Tells the directories that may be overwritten, besides empty ones.

    Raises
    ------
    CheckpointError
        If ``path`` is, contains or lies inside an input, if it exists and ``overwrite`` is false,
        or if it is something that must not be overwritten.
    """
    path = _real(path)
    partial, old = (path.parent / f".{path.name}.{end}" for end in ("partial", "old"))
    if old.exists() and not path.exists():
        old.rename(path)
    _check_output(path, overwrite, inputs, ours)
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def final_path(path: Path) -> Path:
    """Where ``path`` will lie when the partial directories that it lies in have their names."""
    return Path(*(re.sub(r"^\.(.+)\.partial$", r"\1", part) for part in path.absolute().parts))


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _check_output(
    path: Path, overwrite: bool, inputs: Iterable[Path], ours: Callable[[Path], bool]
) -> None:
    for item in inputs:
        real = _real(item)
        if path == real or path in real.parents or real in path.parents:
            raise CheckpointError(
                f"{path}: must not be, contain or lie inside {item}, which is read; "
                "choose another --out"
            )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"{path}: exists and is not a directory; choose another --out")
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path}: exists already; pass --overwrite to replace it")
    if any(path.iterdir()) and not ours(path):
        raise CheckpointError(
            f"{path}: --overwrite replaces only what an earlier run wrote, and this has no "
            "report of one; choose another --out"
        )
