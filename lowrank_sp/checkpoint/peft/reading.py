"""Adapters from the directories that PEFT writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lowrank_sp.adapters.forms import Form
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.peft.config import Config
from lowrank_sp.checkpoint.peft.method import Method
from lowrank_sp.checkpoint.peft.methods import METHODS
from lowrank_sp.checkpoint.peft.parts import INTEGERS, Found, Place, Svd, hollow, read
from lowrank_sp.checkpoint.tensors import CheckpointError, Tensor, read_header, read_metadata

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = "base_model."
FINGERPRINT, ORDER = "base_fingerprint", "module_order"


def read_adapter(
    path: str | Path, *, model: Checkpoint | None = None, svd: Svd | None = None
) -> Adapter:
    """The adapter in a directory of PEFT.

    Keys and shapes are checked at once; the arrays of a layer are read whenever the layer is asked
    for.

    Parameters
    ----------
    path : path
        A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
    model : Checkpoint, optional
        The base model. It is needed where the update depends on the weight, as in DoRA, or where
        the file does not tell the shapes of layers, as in VeRA; where it is given, shapes are
        checked.
    svd : callable, optional
        From a matrix to its ``(u, s, vh)``, with the signs of the routine that PEFT used. PSOFT
        needs it, since its files hold numbers in the basis of singular vectors without the vectors;
        ``torch.linalg.svd``, on the same kind of device.

    Returns
    -------
    Adapter
        ``layers`` is a mapping that holds no arrays.

    Raises
    ------
    CheckpointError
        If a file is missing or unreadable; if the method has no form here; if a tensor is missing,
        unknown or of a wrong shape, which is named; if ``model`` or ``svd`` is needed and not
        given.
    """
    path = Path(path)
    config = Config.read(path)
    method = _method(path, config)
    tensors = read_header(path / WEIGHTS)
    metadata = read_metadata(path / WEIGHTS)
    layers, shared = _sorted(path / WEIGHTS, tensors, method)
    files = Files(path / WEIGHTS, config, method, layers, shared, model, svd)
    for name in layers:
        files.check(name)
    if method.position is not None:
        files = files.ordered(metadata.get(ORDER, "").splitlines())
    kernels = {
        name: found["lora_A.weight"].shape[2:]
        for name, found in layers.items()
        if "lora_A.weight" in found and len(found["lora_A.weight"].shape) > 2
    }
    return Adapter(
        files,
        config.get("base_model_name_or_path"),
        metadata.get(FINGERPRINT),
        bool(config.get("fan_in_fan_out")),
        frozenset(name for name, found in layers.items() if "lora_embedding_A" in found),
        kernels,
        method.title,
    )


def _method(path: Path, config: Config) -> Method:
    known = [m for m in METHODS if m.peft_type == config.get("peft_type")]
    for method in known:
        if method.chosen(config):
            return method
    raise CheckpointError(
        f"{path}: peft_type must be one of {', '.join(sorted({m.peft_type for m in METHODS}))}, "
        f"got {config.get('peft_type')}"
    )


def _sorted(
    file: Path, tensors: Mapping[str, Tensor], method: Method
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by layer and end of their key, and those of the whole model."""
    ends = sorted({end for layout in method.layouts for end in layout}, key=len, reverse=True)
    of_layer = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, ends))})")
    ignored = re.compile(rf"{re.escape(PREFIX)}.+\.({'|'.join(method.ignored) or '(?!)'})")
    of_model = re.compile(rf"{re.escape(SHARED)}({'|'.join(method.shared) or '(?!)'})")
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := of_layer.fullmatch(key):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif match := of_model.fullmatch(key):
            shared[match[1]] = tensor
        elif not ignored.fullmatch(key):
            raise CheckpointError(f"{file}: {key} is not a part of {method.title}")
    if not layers:
        raise CheckpointError(
            f"{file}: no layer with {' and '.join(method.layouts[0])}{method.remedy}"
        )
    for name, found in layers.items():
        if set(found) not in [set(layout) for layout in method.layouts]:
            nearest = max(method.layouts, key=lambda layout: len(set(layout) & set(found)))
            missing = [end for end in nearest if end not in found]
            extra = [end for end in found if end not in nearest]
            problem = f"lacks {', '.join(missing)}" if missing else f"must not have {extra[0]}"
            raise CheckpointError(f"{file}: {name} {problem}")
    return dict(sorted(layers.items())), shared


@dataclass(frozen=True, eq=False, repr=False)
class Files(Mapping[str, Form]):
    """The layers of an adapter on disk: read, one at a time, when they are asked for."""

    file: Path
    config: Config
    method: Method
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]
    model: Checkpoint | None
    svd: Svd | None
    in_order: bool = False

    def __getitem__(self, name: str) -> Form:
        return self._fitting(name, self._load(self._found(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Files({len(self)} layers of {self.method.title} in {self.file})"

    @cached_property
    def _of_model(self) -> dict[str, np.ndarray]:
        """What layers share, which is read once."""
        return {key: tensor.read() for key, tensor in self.shared.items()}

    def check(self, name: str) -> None:
        """Raise unless the tensors of a layer fit each other, and the model."""
        for end, tensor in (*self.tensors[name].items(), *self.shared.items()):
            if end not in self.method.places or tensor.dtype not in INTEGERS:
                tensor.check_floating()
        if self.method.by_value:
            self._expected(name)
            return
        arrays = {end: hollow(tensor.shape) for end, tensor in self.tensors[name].items()}
        place = replace(self._place(name), hollow=True)
        self._fitting(name, self._load(Found(place, self.config, arrays, {}, tuple(self))))

    def _fitting(self, name: str, form: Form) -> Form:
        expected = self._expected(name)
        if expected not in (None, form.shape):
            raise CheckpointError(
                f"{self.file}: {name} has the shape {expected} in the model, got {form.shape}"
            )
        return form

    def _expected(self, name: str) -> tuple[int, int] | None:
        """Shape of a layer in the model, as forms have it; None where neither is needed."""
        if self.model is None and not self.method.needs_model:
            return None
        weight = None if self.model is None else self.model.tensors.get(f"{name}.weight")
        if weight is not None and "lora_embedding_A" in self.tensors[name]:
            return weight.shape[1], weight.shape[0]
        if weight is not None and len(weight.shape) > 2:
            return weight.shape[0], math.prod(weight.shape[1:])
        return self._place(name).layer().shape

    def ordered(self, names: list[str]) -> Files:
        """The same in the order of the model: that of ``names``, or what the arrays say."""
        if set(names) != set(self) and self.method.position is not None:
            positions = {name: self.method.position(self._found(name)) for name in self}
            names = sorted(positions, key=lambda name: positions[name])
        return replace(self, tensors={name: self.tensors[name] for name in names}, in_order=True)

    def _place(self, name: str) -> Place:
        flag = bool(self.config.get("fan_in_fan_out"))
        return Place(name, self.method.title, self.model, flag, self.svd)

    def _found(self, name: str) -> Found:
        arrays = {end: read(tensor) for end, tensor in self.tensors[name].items()}
        names = tuple(self)
        position = names.index(name) if self.in_order else None
        return Found(self._place(name), self.config, arrays, self._of_model, names, position)

    def _load(self, found: Found) -> Form:
        try:
            return self.method.load(found)
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            shapes = ", ".join(f"{end} {a.shape}" for end, a in found.arrays.items())
            raise CheckpointError(
                f"{self.file}: {found.place.name}: {error}; the file has {shapes}"
            ) from error
