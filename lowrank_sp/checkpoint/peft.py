"""LoRA adapters in the files that PEFT reads and writes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.checkpoint.tensors import CheckpointError, read_header, read_object

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
        If a file is missing or unreadable, or holds anything but pairs of LoRA factors.
    """
    path = Path(path)
    config = read_object(path / _CONFIG, "adapter config")
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise CheckpointError(
            f"{path}: expected a plain LoRA adapter, got {config.get('peft_type')}"
        )
    alphas = check_pattern(config.get("alpha_pattern"), "alpha_pattern")
    default = check_number(config.get("lora_alpha", 8), "lora_alpha")
    tensors = read_header(path / _WEIGHTS)
    names = set()
    for key in tensors:
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight", key)
        if match is None:
            raise CheckpointError(f"{path / _WEIGHTS}: {key} is not a factor of plain LoRA")
        names.add(match[1])
    if not names:
        raise CheckpointError(f"{path / _WEIGHTS}: no lora_A weights")
    layers = {}
    for name in sorted(names):
        down, up = (tensors.get(f"{_PREFIX}{name}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            raise CheckpointError(f"{path / _WEIGHTS}: {name} lacks one of lora_A and lora_B")
        if len(down.shape) != 2 or len(up.shape) != 2 or not up.shape[1] == down.shape[0] > 0:
            raise CheckpointError(
                f"{path / _WEIGHTS}: the factors of {name} do not fit, "
                f"got lora_B {up.shape} and lora_A {down.shape}"
            )
        rank = down.shape[0]
        alpha = pattern_value(alphas, name, default)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = AdapterLayer(up.read(), down.read(), scale)
    return layers


def check_number(value: Any, what: str) -> Any:
    """``value`` if it is a real number, or an error."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CheckpointError(f"{what} must be a number, got {value!r}")
    return value


def check_pattern(pattern: Any, what: str) -> Mapping[str, Any]:
    """``pattern`` if it maps regular expressions to numbers, or an error; None is an empty one."""
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping):
        raise CheckpointError(
            f"{what} must map regular expressions to numbers, got {type(pattern).__name__}"
        )
    for key, value in pattern.items():
        check_number(value, f"{what} of {key!r}")
        try:
            _matches(key, "")
        except (re.error, TypeError) as error:
            raise CheckpointError(f"{what} {key!r}: not a regular expression ({error})") from error
    return pattern


def unmatched(pattern: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Keys that match none of the names."""
    names = list(names)
    return [key for key in pattern if not any(_matches(key, name) for name in names)]


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The first entry whose key matches the end of a module name, as PEFT reads its patterns."""
    return next((value for key, value in pattern.items() if _matches(key, name)), default)


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
