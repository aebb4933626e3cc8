"""A model on disk with some of its weights changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lowrank_sp.checkpoint.model import Checkpoint, Layer

# Weights in other formats would contradict the changed ones beside them.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")


class BaseCopy:
    """A copy of a checkpoint in which some tensors are overwritten; made when the first one is.

    Parameters
    ----------
    checkpoint : Checkpoint
    folder : Path
        Where to make the copy: a directory that does not exist yet.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self._checkpoint, self._folder = checkpoint, folder
        self.changed = False

    @property
    def path(self) -> Path:
        """The copy, or the checkpoint while nothing was changed."""
        return self._folder if self.changed else self._checkpoint.path

    def fingerprint(self) -> str:
        """Of the model as it is now."""
        return Checkpoint(self.path).fingerprint()

    def replace(self, layer: Layer, stored: np.ndarray) -> None:
        """Overwrite the weight of a layer with what :meth:`Tensor.encode` made of another one."""
        if not self.changed:
            self._copy()
            self.changed = True
        layer.tensor.write(stored, self._folder / layer.tensor.path.name)

    def _copy(self) -> None:
        self._folder.mkdir()
        for file in self._checkpoint.files:
            shutil.copyfile(file, self._folder / file.name)
        if self._checkpoint.path.is_dir():
            for item in side_files(self._checkpoint.path):
                target = self._folder / item.relative_to(self._checkpoint.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(item, target)


def side_files(folder: Path) -> Iterable[Path]:
    """What a model directory holds beside weights: configuration, tokenizer and the like."""
    for item in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in item.relative_to(folder).parts)
        if item.is_file() and not hidden and item.suffix not in _OTHER_WEIGHTS:
            yield item
