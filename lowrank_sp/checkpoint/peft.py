"""LoRA adapters in the files that PEFT reads and writes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.checkpoint.tensors import CheckpointError, read_header

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterLayer:
    """Factors of one layer: the weight, outputs by inputs, gains ``scale * up @ down``."""

    up: np.ndarray
    down: np.ndarray
    scale: float

    @property
    def alpha(self) -> float:
        """PEFT's ``lora_alpha``: ``scale * rank``."""
        return self.scale * self.up.shape[1]


def write_adapter(
    path: Path, layers: Mapping[str, AdapterLayer], *, base: str, fan_in_fan_out: bool = False
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory.

    The most frequent rank and alpha become the global ones, and every other layer is listed under
    both ``rank_pattern`` and ``alpha_pattern``, since PEFT takes the global alpha for a layer that
    has only a rank. The configuration names no initializer: PEFT would run it again on loading.

    Parameters
    ----------
    path : Path
        An existing directory.
    layers : mapping from module name to AdapterLayer
    base : str
        What the configuration names as the base model.
    fan_in_fan_out : bool
        Whether the base stores its weights inputs by outputs.
    """
    from safetensors.numpy import save_file

    sizes = [(layer.up.shape[1], _plain(layer.alpha)) for layer in layers.values()]
    rank, alpha = max(sorted(set(sizes)), key=sizes.count)
    other = {name: size for name, size in zip(layers, sizes, strict=True) if size != (rank, alpha)}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": {name: size[0] for name, size in other.items()},
        "alpha_pattern": {name: size[1] for name, size in other.items()},
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(layer.down)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(layer.up)
    save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
    (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _plain(alpha: float) -> float | int:
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def read_adapter(path: str | Path) -> dict[str, AdapterLayer]:
    """Layers of a LoRA adapter directory, by module name.

    Raises
    ------
    CheckpointError
        If a file is missing or unreadable, a factor has no partner, or the adapter is not LoRA.
    """
    path = Path(path)
    try:
        config = json.loads((path / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / _CONFIG}: not a readable adapter config ({error})"
        ) from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise CheckpointError(
            f"{path}: expected a plain LoRA adapter, got {config.get('peft_type')}"
        )
    tensors = read_header(path / _WEIGHTS)
    layers = {}
    for key, tensor in sorted(tensors.items()):
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_A\.weight", key)
        if match is None:
            continue
        name = match[1]
        partner = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if partner is None:
            raise CheckpointError(f"{path / _WEIGHTS}: {name} has lora_A but no lora_B")
        rank = tensor.shape[0]
        alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = AdapterLayer(partner.read(), tensor.read(), scale)
    if not layers:
        raise CheckpointError(f"{path / _WEIGHTS}: no lora_A weights")
    return layers


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The entry whose key matches the end of a module name, as PEFT reads its patterns."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
