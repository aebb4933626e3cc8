"""Rows of the grammar for shards and normalized products: MiSS, Bone, DeLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_sp.adapters.forms import NormalizedProduct, SharedShard, WeightShards
from lowrank_sp.checkpoint.peft.config import Config, common, counted
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, made


def is_bone(config: Config) -> bool:
    """Whether a configuration of MiSS means shards times blocks of the weight."""
    return config.get("init_weights") == "bat"


def load_miss(x: Found) -> SharedShard:
    """A shard, transposed, for all outputs or for as many as it has."""
    return made(SharedShard, shard=x["miss_block"].T, size=x.place.layer().shape)


def save_miss(form: SharedShard, place: Place) -> Arrays:  # noqa: ARG001
    """A shard, transposed."""
    return {"miss_block": form.shard.mT}


def configure_miss(forms: Mapping[str, SharedShard]) -> dict[str, Any]:
    """One rank; and one number of rows where shards are repeated."""
    ranks = {name: form.shard.shape[1] for name, form in forms.items()}
    rows = {name: form.shard.shape[0] for name, form in forms.items()}
    whole = all(rows[name] == form.size[0] for name, form in forms.items())
    return {
        "r": common(ranks, "rank", "MiSS"),
        "init_weights": whole or "mini",
        "mini_r": 1 if whole else common(rows, "number of rows of shards", "MiSS"),
        "miss_dropout": 0.0,
        "bias": "none",
    }


def load_bone(x: Found) -> WeightShards:
    """A shard for every row of blocks of the weight."""
    return made(WeightShards, shards=x["miss_block"], weight=x.place.weight())


def save_bone(form: WeightShards, place: Place) -> Arrays:  # noqa: ARG001
    """The shards."""
    return {"miss_block": form.shards}


def configure_bone(forms: Mapping[str, WeightShards]) -> dict[str, Any]:
    """One size of blocks."""
    sizes = {name: form.shards.shape[1] for name, form in forms.items()}
    return {
        "r": common(sizes, "size of blocks", "Bone"),
        "init_weights": "bat",
        "miss_dropout": 0.0,
        "bias": "none",
    }


def load_delora(x: Found) -> NormalizedProduct:
    """Two factors, a strength, and the lengths of the columns of the weight."""
    return made(
        NormalizedProduct,
        up=x["delora_B"],
        down=x["delora_A"],
        strength=x["delora_lambda"],
        gains=x["delora_w_norm"],
    )


def save_delora(form: NormalizedProduct, place: Place) -> Arrays:  # noqa: ARG001
    """All arrays."""
    return {
        "delora_A": form.down,
        "delora_B": form.up,
        "delora_lambda": form.strength,
        "delora_w_norm": form.gains,
    }


def configure_delora(forms: Mapping[str, NormalizedProduct]) -> dict[str, Any]:
    """Ranks; strengths are in the file, whatever the configuration says."""
    ranks = counted({name: form.up.shape[1] for name, form in forms.items()}, "r", "rank_pattern")
    return {**ranks, "delora_lambda": 15, "module_dropout": 0.0, "bias": "none"}
