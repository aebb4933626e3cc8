"""Tensors in safetensors files: headers read once, data read and written in place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8},
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class CheckpointError(ValueError):
    """A checkpoint, an adapter or an option that cannot be worked with."""


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

    def read_bytes(self) -> bytes:
        """The raw data."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if len(data) != self.stop - self.start:
            raise CheckpointError(f"{self.path}: truncated inside {self.name}; fetch it again")
        return data

    def read(self) -> np.ndarray:
        """The tensor; bfloat16 is widened to float32, everything else keeps its dtype."""
        self.check_floating()
        raw = np.frombuffer(self.read_bytes(), dtype=_NUMPY[self.dtype]).reshape(self.shape)
        return _widened(raw) if self.dtype == "BF16" else raw

    def encode(self, values: np.ndarray) -> np.ndarray:
        """``values`` as they are stored, rounded to nearest."""
        if tuple(values.shape) != self.shape:
            raise CheckpointError(f"{self.name}: shape must be {self.shape}, got {values.shape}")
        return round_to(values, self.dtype)

    def write(self, stored: np.ndarray, path: Path) -> None:
        """Overwrite the data in ``path``, a copy of the file that this tensor lies in."""
        with path.open("r+b") as file:
            file.seek(self.start)
            file.write(np.ascontiguousarray(stored).data)


def _widened(raw: np.ndarray) -> np.ndarray:
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
        raise CheckpointError(f"{path}: no such file; is a shard missing?") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"header of {length} bytes in a file of {size}")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        tensor = Tensor(name, path, entry["dtype"], shape, 8 + length + begin, 8 + length + end)
        bytes_needed = math.prod(shape) * _SIZES.get(tensor.dtype, 0)
        if not 0 <= begin <= end or tensor.stop > size:
            raise ValueError(f"{name} ends at byte {tensor.stop} of {size}")
        if bytes_needed and bytes_needed != end - begin:
            raise ValueError(f"{name} of shape {shape} has {end - begin} bytes")
        tensors[name] = tensor
    return tensors
