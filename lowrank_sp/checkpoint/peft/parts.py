"""What the rows of the grammar are given: a layer of a file, and its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lowrank_sp._arrays import Array, as_compute, dtype_name, to_host
from lowrank_sp.adapters.forms import Form
from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.peft.config import Config
from lowrank_sp.checkpoint.tensors import CheckpointError, Tensor

#: Arrays by end of their keys.
Arrays = dict[str, Any]

#: A singular value decomposition: ``(u, s, vh)`` of a matrix.
Svd = Callable[[np.ndarray], tuple[Any, Any, Any]]

#: Dtypes of places in files.
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1"}

AnyForm = TypeVar("AnyForm", bound=Form)


class NotGiven(CheckpointError):
    """Something that a method needs beside its file: the base model, or an SVD."""


@dataclass(frozen=True)
class Place:
    """A layer of the base model, if that is at hand.

    Attributes
    ----------
    name : str
    method : str
        What errors call the method of the adapter.
    model : Checkpoint, optional
    fan_in_fan_out : bool
        Whether weights are stored inputs by outputs, for models without a configuration.
    svd : callable, optional
        The singular value decomposition of PEFT.
    hollow : bool
        Give weights without values, to check shapes with.
    """

    name: str
    method: str
    model: Checkpoint | None
    fan_in_fan_out: bool = False
    svd: Svd | None = None
    hollow: bool = False

    def layer(self) -> Layer:
        """Where the weight lies, or an error."""
        if self.model is None:
            raise NotGiven(
                f"{self.name}: {self.method} cannot be read or written without the base model; "
                "give model"
            )
        known = None if self.model.config else self.fan_in_fan_out
        return self.model.layer(self.name, fan_in_fan_out=known)

    def weight(self) -> np.ndarray:
        """The weight, outputs by inputs."""
        layer = self.layer()
        if self.hollow:
            return hollow(layer.shape)
        weight = layer.tensor.read()
        return weight.T if layer.transposed else weight


@dataclass(frozen=True)
class Found:
    """What a file holds of a layer.

    Attributes
    ----------
    place : Place
    config : Config
    arrays : mapping from end of key to array
    shared : mapping from key to array
        Of the whole model.
    names : tuple of str
        All layers.
    position : int, optional
        Where the layer stands among them in the model, if that is known.
    """

    place: Place
    config: Config
    arrays: Mapping[str, np.ndarray]
    shared: Mapping[str, np.ndarray]
    names: tuple[str, ...]
    position: int | None = None

    def __getitem__(self, end: str) -> np.ndarray:
        return self.arrays[end]

    def get(self, end: str) -> np.ndarray | None:
        """An array that the layer may lack."""
        return self.arrays.get(end)

    def scale(self, rank: int, key: str = "lora_alpha", default: float = 8) -> float:
        """``alpha / rank``."""
        return self.config.scale(self.place.name, rank, key, default)


def hollow(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.float32(0), shape)


def made(form: type[AnyForm], **fields: Any) -> AnyForm:
    """A form with these fields, of which the arrays of data get the widest of their dtypes."""
    data = {
        name: a for name, a in fields.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"
    }
    dtype = np.result_type(*data.values())
    return form(**{**fields, **{name: a.astype(dtype, copy=False) for name, a in data.items()}})


def read(tensor: Tensor) -> np.ndarray:
    """A tensor of data or of places."""
    kind = INTEGERS.get(tensor.dtype)
    if kind is None:
        return tensor.read()
    return np.frombuffer(b"".join(tensor.blocks()), kind).reshape(tensor.shape)


def host(array: Array) -> np.ndarray:
    """As a NumPy array, in float32 for bfloat16, which NumPy lacks."""
    return to_host(as_compute(array) if dtype_name(array.dtype) == "bfloat16" else array)
