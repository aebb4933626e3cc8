"""Rows of the grammar with LoRA's factors: plain, DoRA, KaSA, MiCA, AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import DiagonalCore, FixedUp, Product, RowMagnitude
from lowrank_sp.checkpoint.peft.config import Config, common, patterned, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, made
from lowrank_sp.checkpoint.tensors import CheckpointError

# What PEFT adds to AdaLoRA's rank where it divides by it.
_ADALORA = 1e-5


def is_dora(config: Config) -> bool:
    """Whether a configuration of LoRA means DoRA."""
    return bool(config.get("use_dora"))


def is_kasa(config: Config) -> bool:
    """Whether a configuration of LoRA means KaSA."""
    return config.get("kasa_config") is not None


def is_mica(config: Config) -> bool:
    """Whether a configuration of LoRA means MiCA."""
    return config.get("init_lora_weights") == "mica"


def load_lora(x: Found) -> Product:
    """Plain LoRA of a linear layer, an embedding or a convolution."""
    if x.get("lora_embedding_A") is not None:
        up, down = x["lora_embedding_B"], x["lora_embedding_A"]
    else:
        up, down = _factors(x)
    return made(Product, up=up, down=down, scale=x.scale(down.shape[0]))


def load_mica(x: Found) -> FixedUp:
    """A product of which ``down`` alone is trained."""
    up, down = _factors(x)
    return made(FixedUp, up=up, down=down, scale=x.scale(down.shape[0]))


def load_dora(x: Found) -> RowMagnitude:
    """Rows of the base weight plus a product, of trained lengths."""
    up, down = x["lora_B.weight"], x["lora_A.weight"]
    return made(
        RowMagnitude,
        weight=x.place.weight(),
        up=up,
        down=down,
        magnitude=x["lora_magnitude_vector"],
        scale=x.scale(down.shape[0]),
    )


def load_kasa(x: Found) -> DiagonalCore:
    """A product with a diagonal, beside a base that PEFT cuts when it loads the adapter."""
    up, core, down = x["lora_B.weight"], x["lora_diag"], x["lora_A.weight"]
    return made(DiagonalCore, up=up, core=core, down=down, scale=x.scale(down.shape[0]))


def load_adalora(x: Found) -> DiagonalCore:
    """What is left of the triplets; the scale belongs to the rank of the start."""
    up, core, down = x["lora_B"], x["lora_E"], x["lora_A"]
    start = x.config.number("init_r", 12)
    mask = (x.config.get("rank_pattern") or {}).get(f"{x.place.name}.lora_E")
    left = start if mask is None else int(np.sum(mask))
    if core.shape != (left, 1):
        raise CheckpointError(
            f"{x.place.name}: lora_E must have shape ({left}, 1) by init_r and rank_pattern, "
            f"got {core.shape}"
        )
    alpha = x.config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else start) / (start + _ADALORA)
    return made(DiagonalCore, up=up, core=core[:, 0], down=down, scale=scale)


def _factors(x: Found) -> tuple[np.ndarray, np.ndarray]:
    up, down = x["lora_B.weight"], x["lora_A.weight"]
    if down.ndim > 2 and up.ndim == down.ndim and set(up.shape[2:]) == {1}:
        return up.reshape(up.shape[:2]), down.reshape(down.shape[0], -1)
    return up, down


def save_lora(form: Product, place: Place) -> Arrays:  # noqa: ARG001
    """Two factors."""
    return {"lora_A.weight": form.down, "lora_B.weight": form.up}


def save_dora(form: RowMagnitude, place: Place) -> Arrays:  # noqa: ARG001
    """Two factors and the lengths."""
    return {
        "lora_A.weight": form.down,
        "lora_B.weight": form.up,
        "lora_magnitude_vector": form.magnitude,
    }


def save_kasa(form: DiagonalCore, place: Place) -> Arrays:  # noqa: ARG001
    """Two factors and the diagonal."""
    return {"lora_A.weight": form.down, "lora_B.weight": form.up, "lora_diag": form.core}


def save_adalora(form: DiagonalCore, place: Place) -> Arrays:  # noqa: ARG001
    """Two factors, and the diagonal as a column."""
    return {"lora_A": form.down, "lora_E": form.core[:, None], "lora_B": form.up}


def configure_lora(forms: Mapping[str, Any]) -> dict[str, Any]:
    """The initializer is not named: PEFT would run it again on loading, and change the base."""
    ranks = {name: form.up.shape[1] for name, form in forms.items()}
    return {
        **patterned(ranks, {name: form.scale for name, form in forms.items()}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def configure_dora(forms: Mapping[str, Any]) -> dict[str, Any]:
    """As plain LoRA."""
    return {**configure_lora(forms), "use_dora": True}


def configure_kasa(forms: Mapping[str, Any]) -> dict[str, Any]:
    """As plain LoRA; the weights of its penalties are the published ones."""
    return {**configure_lora(forms), "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}


def configure_mica(forms: Mapping[str, Any]) -> dict[str, Any]:
    """The initializer is named: it says what is trained, and changes no weight."""
    return {**configure_lora(forms), "init_lora_weights": "mica"}


def configure_adalora(forms: Mapping[str, Any]) -> dict[str, Any]:
    """One scale, the rank of the start, and which triplets of it are left."""
    ranks = {name: form.up.shape[1] for name, form in forms.items()}
    start = max(*ranks.values(), 1)
    scale = common({name: form.scale for name, form in forms.items()}, "scale", "AdaLoRA")
    return {
        "init_r": start,
        "target_r": max(1, min(ranks.values())),
        "lora_alpha": plain(scale * (start + _ADALORA)),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "total_step": 1,
        "rank_pattern": {
            f"{name}.lora_E": [i < rank for i in range(start)]
            for name, rank in ranks.items()
            if rank < start
        },
    }
