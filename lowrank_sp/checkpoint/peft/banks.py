"""Rows of the grammar whose layers draw from one bank: VB-LoRA, Uni-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import BankFactors, DrawnFactors
from lowrank_sp.checkpoint.peft.config import common
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, host, made
from lowrank_sp.checkpoint.peft.shared import united
from lowrank_sp.checkpoint.tensors import CheckpointError


def load_vblora(x: Found) -> BankFactors:
    """Logits, or what is left of them, and the bank."""
    bank = _of_model(x, "vblora_vector_bank")
    up, down = (_logits(x, f"vblora_logits_{ab}", bank) for ab in "BA")
    top = int(x.config.number("topk", 2))
    return made(BankFactors, up_logits=up, down_logits=down, bank=bank, top=top)


def _logits(x: Found, end: str, bank: np.ndarray) -> np.ndarray:
    """Logits as they were saved, or of the shares of the largest of them.

    All shares but the last are in the file; they sum to one.
    """
    whole = x.get(end)
    if whole is not None:
        return whole
    first, indices = x[f"{end}_topk_weights"], x[f"{end}_topk_indices"].astype(np.int64)
    last = np.maximum(1 - np.sum(first, axis=-1, keepdims=True), 0)
    logits = np.full((*first.shape[:-1], len(bank)), -np.inf, first.dtype)
    with np.errstate(divide="ignore"):
        shares = np.log(np.concatenate([first, last], axis=-1))
    np.put_along_axis(logits, indices, shares, axis=-1)
    return logits


def save_vblora(form: BankFactors, place: Place) -> Arrays:  # noqa: ARG001
    """All logits."""
    return {"vblora_logits_A": form.down_logits, "vblora_logits_B": form.up_logits}


def share_vblora(forms: Mapping[str, BankFactors]) -> Arrays:
    """The bank."""
    banks = {name: form.bank for name, form in forms.items()}
    return {"vblora_vector_bank": united(banks, "bank", "VB-LoRA")}


def configure_vblora(forms: Mapping[str, BankFactors]) -> dict[str, Any]:
    """One rank, one bank, one number of vectors in a mixture."""
    sizes = {name: (f.down_logits.shape[0], *f.bank.shape, f.top) for name, f in forms.items()}
    rank, vectors, length, top = common(sizes, "(rank, vectors, length, top)", "VB-LoRA")
    return {
        "r": rank,
        "num_vectors": vectors,
        "vector_length": length,
        "topk": top,
        "save_only_topk_weights": False,
        "vblora_dropout": 0.0,
        "bias": "none",
    }


def load_unilora(x: Found) -> DrawnFactors:
    """Places of the entries, and the gains that the file repeats at every one of them."""
    entries = _of_model(x, "unilora_theta_d")
    up, down = (x[f"unilora_indices_{ab}"].astype(np.int64) for ab in "BA")
    found = x["unilora_scales_B"], x["unilora_scales_A"]
    gains = np.zeros_like(entries, dtype=found[0].dtype)
    for places, scales in zip((up, down), found, strict=True):
        gains[places] = scales
    if not (np.array_equal(gains[up], found[0]) and np.array_equal(gains[down], found[1])):
        raise CheckpointError(
            f"{x.place.name}: unilora_scales must be the same wherever unilora_indices are"
        )
    return made(DrawnFactors, entries=entries, gains=gains, up_places=up, down_places=down)


def save_unilora(form: DrawnFactors, place: Place) -> Arrays:  # noqa: ARG001
    """Places, and the gain of each."""
    up, down, gains = host(form.up_places), host(form.down_places), host(form.gains)
    return {
        "unilora_indices_A": down.astype(np.int64),
        "unilora_indices_B": up.astype(np.int64),
        "unilora_scales_A": gains[down],
        "unilora_scales_B": gains[up],
    }


def share_unilora(forms: Mapping[str, DrawnFactors]) -> Arrays:
    """The entries."""
    entries = {name: form.entries for name, form in forms.items()}
    return {"unilora_theta_d": united(entries, "entries", "Uni-LoRA")}


def configure_unilora(forms: Mapping[str, DrawnFactors]) -> dict[str, Any]:
    """One rank and one length; the places are saved."""
    sizes = {name: (f.down_places.shape[0], f.entries.shape[0]) for name, f in forms.items()}
    rank, length = common(sizes, "(rank, length)", "Uni-LoRA")
    return {
        "r": rank,
        "theta_d_length": length,
        "save_indices": True,
        "unilora_dropout": 0.0,
        "bias": "none",
    }


def _of_model(x: Found, key: str) -> np.ndarray:
    if key not in x.shared:
        raise CheckpointError(f"{x.place.name}: the file has no base_model.{key}")
    return x.shared[key]
