"""A model on disk: its tensors, its configuration, its linear layers, its fingerprint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank_sp.checkpoint.tensors import (
    CheckpointError,
    OptionError,
    Tensor,
    read_header,
    read_object,
)

INDEX = "model.safetensors.index.json"
# Architectures whose linear layers are Conv1D modules, which store inputs by outputs.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl")
_CONV1D_LAYERS = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
# Matrices that are not linear layers: tables of vectors, and output heads tied to them.
_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|\w*embeddings?|shared|lm_head|relative_attention_bias)([._]|$)"
)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a checkpoint.

    Attributes
    ----------
    name : str
        Of the module: the name of its weight without ``.weight``.
    tensor : Tensor
    transposed : bool
        Whether the weight is stored inputs by outputs (``fan_in_fan_out``).
    """

    name: str
    tensor: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs by inputs, whatever the storage."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.transposed else (rows, columns)


class Checkpoint:
    """A model directory of Hugging Face layout, or one safetensors file. Nothing is loaded.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file, or a directory with ``model.safetensors``, with an index of shards
        or with one safetensors file.

    Raises
    ------
    CheckpointError
        If it cannot be read as such.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if (self.path / "adapter_config.json").exists():
            raise CheckpointError(f"{self.path}: an adapter, not a model; pass a model's directory")
        self.files = self._weight_files()
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            self.tensors.update(read_header(file))
        if self._index is not None:
            missing = sorted(set(self._index) - set(self.tensors))
            if missing:
                raise CheckpointError(
                    f"{self.path}: the index names {missing[0]}, which no shard holds "
                    f"({len(missing)} such); fetch the checkpoint again"
                )

    @cached_property
    def _index(self) -> dict[str, str] | None:
        index = self.path / INDEX
        if not index.is_file():
            return None
        where = read_object(index, "index").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise CheckpointError(
                f"{index}: not a readable index, weight_map must give a file name for every tensor"
            )
        return where

    def _weight_files(self) -> list[Path]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise CheckpointError(f"{self.path}: expected a .safetensors file or a directory")
            return [self.path]
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such file or directory")
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        if self._index is not None:
            return [self._shard(name) for name in sorted(set(self._index.values()))]
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found
        what = f"{len(found)} .safetensors files and no index" if found else "no .safetensors file"
        raise CheckpointError(
            f"{self.path}: {what}; convert the model with save_pretrained(safe_serialization=True)"
        )

    def _shard(self, name: str) -> Path:
        path = self.path / name
        if Path(name).name != name:
            raise CheckpointError(f"{self.path / INDEX}: shard {name!r} lies outside the directory")
        if not path.is_file():
            raise CheckpointError(f"{self.path}: shard {name} is missing; fetch it again")
        return path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, or an empty dictionary."""
        path = self.path / "config.json"
        return read_object(path, "config") if path.is_file() else {}

    def layers(
        self, targets: str | None = None, *, fan_in_fan_out: bool | None = None
    ) -> list[Layer]:
        """Linear layers, sorted by name: weights that are matrices with at least one entry.

        Parameters
        ----------
        targets : str, optional
            A regular expression, searched for in the names of the layers. By default all but
            embeddings and output heads.
        fan_in_fan_out : bool, optional
            Whether weights are stored inputs by outputs; by default what the configuration's
            ``model_type`` implies.

        Raises
        ------
        CheckpointError
            If nothing matches, or the model is stored quantized or in factors.
        """
        if self.factored:
            raise CheckpointError(self._factored_error(self.factored[0]))
        quantized = self.config.get("quantization_config")
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise CheckpointError(
                f"{self.path}: the model is stored quantized ({method or 'unknown'}); "
                "dequantize it to bf16 first"
            )
        try:
            pattern = re.compile(targets) if targets else None
        except re.error as error:
            raise OptionError(f"targets {targets!r}: not a regular expression ({error})") from error
        names = [
            name.removesuffix(".weight")
            for name, tensor in sorted(self.tensors.items())
            if name.endswith(".weight") and len(tensor.shape) == 2 and 0 not in tensor.shape
        ]
        chosen = [n for n in names if (pattern.search(n) if pattern else not _NOT_LINEAR.search(n))]
        if not chosen:
            which = f"targets {targets!r} match no linear layer" if targets else "no linear layer"
            some = _nearest(targets or "", names)
            hint = ""
            if targets and "," in targets:
                hint = f"; in a regular expression, | means or: {targets.replace(',', '|')}"
            raise CheckpointError(f"{self.path}: {which}; {some}{hint}")
        return [self.layer(name, fan_in_fan_out=fan_in_fan_out) for name in chosen]

    def layer(self, name: str, *, fan_in_fan_out: bool | None = None) -> Layer:
        """The linear layer of that name.

        Raises
        ------
        CheckpointError
            If there is none, or its storage cannot be computed with.
        """
        tensor = self.tensors.get(f"{name}.weight")
        if name in self.factored:
            raise CheckpointError(self._factored_error(name))
        if tensor is None or len(tensor.shape) != 2:
            raise CheckpointError(f"{self.path}: no linear layer {name}")
        tensor.check_floating()
        return Layer(name, tensor, self._is_transposed(name, fan_in_fan_out))

    @cached_property
    def factored(self) -> list[str]:
        """Layers with two factors in place of a weight, as ``compress`` writes them, sorted."""
        found = []
        for name, up in sorted(self.tensors.items()):
            layer = name.removesuffix(".up")
            down = self.tensors.get(f"{layer}.down")
            if layer == name or down is None or f"{layer}.weight" in self.tensors:
                continue
            if len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0]:
                found.append(layer)
        return found

    def _factored_error(self, name: str) -> str:
        return (
            f"{self.path}: a compressed model, with two factors in place of the weight of {name} "
            f"({len(self.factored)} such layers); pass the model that it was made of"
        )

    def _is_transposed(self, module: str, fan_in_fan_out: bool | None) -> bool:
        if fan_in_fan_out is not None:
            return fan_in_fan_out
        conv1d = self.config.get("model_type") in _CONV1D_MODELS
        return conv1d and _CONV1D_LAYERS.search(module) is not None

    def fingerprint(self) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of all tensors, however sharded."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            for block in tensor.blocks():
                total.update(block)
        return f"sha256:{total.hexdigest()}"


def _nearest(targets: str, names: list[str]) -> str:
    """Names of layers like the one that was meant, or some of the matrices that there are."""
    layers = [name for name in names if not _NOT_LINEAR.search(name)]
    known = dict.fromkeys(part for name in layers for part in (name.rpartition(".")[2], name))
    if near := get_close_matches(targets, known):
        return f"the nearest names are {', '.join(near)}"
    some = (layers or names)[:3]
    return f"its matrices: {'for example ' + ', '.join(some) if some else 'none'}"
