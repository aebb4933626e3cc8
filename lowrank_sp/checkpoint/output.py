"""Output that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_sp.checkpoint.tensors import CheckpointError


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that is renamed to ``path`` at the end of the block.

    It lies beside ``path`` as ``.NAME.partial``. An exception removes it and leaves ``path`` as it
    was; what a killed process left behind is removed by the next one.

    Parameters
    ----------
    path : path
    overwrite : bool
        Whether ``path`` may exist; it is then replaced at the end.

    Raises
    ------
    CheckpointError
        If ``path`` exists and ``overwrite`` is false, or it is not a directory.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: exists and is not a directory; choose another --out")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists already; pass --overwrite to replace it")
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
