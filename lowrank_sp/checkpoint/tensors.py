"""Tensors in safetensors files: headers read once, data read and written in place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8},
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class CheckpointError(ValueError):
    """A checkpoint, an adapter or an option that cannot be worked with."""


class OptionError(CheckpointError):
    """An option that is wrong whatever the files hold."""


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object that a file holds; ``what`` says in errors what it should be.

    Raises
    ------
    CheckpointError
        If the file is missing, or holds anything else.
    """
    if not path.exists():
        beside = [path.parent.parent / path.name, *sorted(path.parent.glob(f"*/{path.name}"))]
        found = next((other for other in beside if other.exists()), None)
        hint = "is it the right directory" if found is None else f"did you mean {found.parent}"
        raise CheckpointError(f"{path}: there is no such {what}; {hint}?")
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable {what} ({error})") from error


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that ``text`` spells; ValueError for anything else."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected {{...}}, got {text[:20]!r}")
    return content


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies on disk. It holds no data, so it travels to other processes.

    Attributes
    ----------
    name : str
    path : Path
        The safetensors file.
    dtype : str
        As the format spells it: "F32", "BF16", ...
    shape : tuple of int
    start, stop : int
        Bytes within the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def check_floating(self) -> None:
        """Raise CheckpointError unless the storage is one that can be computed with."""
        if self.dtype in _NUMPY:
            return
        kind = "fp8" if self.dtype.startswith("F8") else "integer or packed"
        raise CheckpointError(
            f"{self.name}: a weight must be stored as {', '.join(_NUMPY)}, got {self.dtype} "
            f"({kind}); dequantize the model to bf16 first"
        )

    def blocks(self) -> Iterator[bytes]:
        """The raw data, piece by piece."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                block = file.read(min(left, 2**24))
                if not block:
                    raise CheckpointError(
                        f"{self.path}: truncated inside {self.name}; fetch it again"
                    )
                yield block
                left -= len(block)

    def equals(self, other: Tensor) -> bool:
        """Whether dtype, shape and every byte are the same."""
        if (self.path, self.start) == (other.path, other.start):
            return True
        mine = (self.dtype, self.shape, self.stop - self.start)
        return mine == (other.dtype, other.shape, other.stop - other.start) and all(
            one == two for one, two in zip(self.blocks(), other.blocks(), strict=True)
        )

    def read(self) -> np.ndarray:
        """The tensor; bfloat16 is widened to float32, everything else keeps its dtype."""
        self.check_floating()
        data = b"".join(self.blocks())
        raw = np.frombuffer(data, dtype=_NUMPY[self.dtype]).reshape(self.shape)
        return self.decode(raw)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """What :meth:`encode` made of an array, as :meth:`read` gives it."""
        return widen(stored) if self.dtype == "BF16" else stored

    def encode(self, values: np.ndarray) -> np.ndarray:
        """``values`` as they are stored, rounded to nearest.

        Raises
        ------
        CheckpointError
            If the shape is another one, or a value is not finite or becomes infinite when rounded.
        """
        if tuple(values.shape) != self.shape:
            raise CheckpointError(f"{self.name}: shape must be {self.shape}, got {values.shape}")
        # Rounding is monotone, so the largest magnitude speaks for all.
        largest = np.max([values.max(initial=0), -values.min(initial=0)], keepdims=True)
        with np.errstate(over="ignore"):
            limit = round_to(largest, self.dtype)
        if not np.isfinite(self.decode(limit)).all():
            raise CheckpointError(
                f"{self.name}: values must be finite in {self.dtype}, got magnitude "
                f"{largest[0]:.3g}; store the model in a wider dtype first"
            )
        return round_to(values, self.dtype)

    def write(self, stored: np.ndarray, path: Path) -> None:
        """Overwrite the data in ``path``, a copy of the file that this tensor lies in."""
        with path.open("r+b") as file:
            file.seek(self.start)
            file.write(np.ascontiguousarray(stored).data)


def widen(raw: np.ndarray) -> np.ndarray:
    """float32 from bfloat16, which NumPy lacks, in uint16."""
    wide = raw.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in the storage of a safetensors dtype, rounded to nearest, ties to even.

    bfloat16, which NumPy lacks, is returned as the upper halves of float32 in uint16.
    """
    if dtype != "BF16":
        return values.astype(_NUMPY[dtype], copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)


def read_header(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, or its header corrupt.
    """
    try:
        return _header(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors.

    Raises
    ------
    CheckpointError
        As :func:`read_header`.
    """
    try:
        said = _entries(path)[0].get("__metadata__", {})
        return {key: value for key, value in said.items() if isinstance(value, str)}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, in the form that PyTorch libraries expect.

    Arrays may lie in memory in any order: the writer of safetensors takes their bytes as they lie,
    and would store a transposed array wrongly without a word.
    """
    from safetensors.numpy import save_file

    rows = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    save_file(rows, path, metadata={"format": "pt", **(metadata or {})})


def _entries(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, its length, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"header of {length} bytes in a file of {size}")
        return parse_object(file.read(length)), length, size


def _header(path: Path) -> dict[str, Tensor]:
    entries, length, size = _entries(path)
    entries.pop("__metadata__", None)
    tensors = {name: _entry(name, path, entry, 8 + length, size) for name, entry in entries.items()}
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop))
    for one, two in pairwise(in_order):
        if two.start < one.stop:
            raise ValueError(f"{one.name} and {two.name} lie on the same bytes")
    return tensors


def _entry(name: str, path: Path, entry: dict[str, Any], first: int, size: int) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [begin, end, *shape]
    valid = isinstance(dtype, str) and isinstance(shape, list)
    if not valid or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name}: dtype {dtype!r}, shape {shape}, bytes {begin} to {end}")
    if begin > end or first + end > size:
        raise ValueError(f"{name} ends at byte {first + end} of {size}")
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != end - begin:
        raise ValueError(f"{name} of shape {shape} has {end - begin} bytes")
    return Tensor(name, path, dtype, tuple(shape), first + begin, first + end)
