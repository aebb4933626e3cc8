"""Output that appears whole or not at all, and never in place of anything else."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_sp.checkpoint.report import REPORT, JobReport, Report
from lowrank_sp.checkpoint.tensors import CheckpointError

_PARTIAL = re.compile(r"^\.(.+)\.[0-9a-f]{8}\.partial$")


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

    It lies beside ``path`` as ``.NAME.XXXXXXXX.partial``, one for every run, locked while the run
    lasts. An exception removes it and leaves everything as it was. What a killed process left
    behind is removed by the next one; an output that it had moved aside as ``.NAME.old`` comes
    back first. Of runs at the same time with one ``path``, the first to end has it; the others are
    checked against its output as if they had come later.

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
    old = path.parent / f".{path.name}.old"
    if old.exists() and not path.exists():
        old.rename(path)
    _check_output(path, overwrite, inputs, ours)
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        _remove_leftovers(path)
        with _working_folder(path) as partial:
            yield partial
            _check_output(path, overwrite, inputs, ours)
            if path.exists():
                path.rename(old)
            partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def final_path(path: Path) -> Path:
    """Where ``path`` will lie when the partial directories that it lies in have their names."""
    return Path(*(_PARTIAL.sub(r"\1", part) for part in path.absolute().parts))


@contextmanager
def _working_folder(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``, locked; removed at the end unless it was renamed."""
    while True:
        folder = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        with _locked(folder) as alone:
            # Before the lock, another run may have taken it for a leftover.
            if alone is False or not folder.exists():
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _remove_leftovers(path: Path) -> None:
    """Remove the working folders of runs that were killed: nobody holds their locks."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if _PARTIAL.fullmatch(folder.name):
            with _locked(folder) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether this process alone holds the lock of a directory; None where there are no locks.

    The system gives it back when a process ends, however it ends.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError:
            alone = None
        yield alone
    finally:
        os.close(descriptor)


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
