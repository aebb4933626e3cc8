"""LoRA adapters in the files that PEFT reads and writes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.tensors import CheckpointError, read_header, read_object

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory.

    The most frequent rank and alpha become the global ones, and every other layer is listed under
    both ``rank_pattern`` and ``alpha_pattern``, since PEFT takes the global alpha for a layer that
    has only a rank. The configuration names no initializer: PEFT would run it again on loading.

    Parameters
    ----------
    path : Path
        An existing directory.
    adapter : Adapter
        Of plain LoRA.
    """
    from safetensors.numpy import save_file

    layers = adapter.products()
    sizes = [(f.up.shape[1], _plain(f.scale * f.up.shape[1])) for f in layers.values()]
    rank, alpha = max(sorted(set(sizes)), key=sizes.count)
    other = {name: size for name, size in zip(layers, sizes, strict=True) if size != (rank, alpha)}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": {name: size[0] for name, size in other.items()},
        "alpha_pattern": {name: size[1] for name, size in other.items()},
        "fan_in_fan_out": adapter.fan_in_fan_out,
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


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a directory of plain LoRA.

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
    layers: dict[str, Form] = {}
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
        layers[name] = Product(up.read(), down.read(), scale)
    base = config.get("base_model_name_or_path")
    return Adapter(layers, base, fan_in_fan_out=bool(config.get("fan_in_fan_out")))


def check_number(value: Any, what: str) -> Any:
    """``value`` if it is a real number, or an error."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CheckpointError(f"{what} must be a number, got {value!r}")
    return value


def check_pattern(pattern: Any, what: str) -> dict[re.Pattern[str], Any]:
    """Numbers by compiled regular expression for the end of a module name, as PEFT reads them.

    ``what`` names the pattern in errors; None is an empty one.
    """
    if not isinstance(pattern, Mapping | None):
        raise CheckpointError(
            f"{what} must map regular expressions to numbers, got {type(pattern).__name__}"
        )
    compiled = {}
    for key, value in (pattern or {}).items():
        try:
            expression = re.compile(rf"(?:.*\.)?(?:{key})$")
        except re.error as error:
            raise CheckpointError(f"{what} {key!r}: not a regular expression ({error})") from error
        compiled[expression] = check_number(value, f"{what} of {key!r}")
    return compiled


def pattern_value(pattern: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    """The value of the first expression that matches a module name."""
    return next((value for key, value in pattern.items() if key.match(name)), default)
