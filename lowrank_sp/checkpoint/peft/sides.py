"""PSOFT and LoRA-XS, whose sides PEFT does not save but computes again from the weight.

The signs of singular vectors are an accident of the routine and its build, and the trained numbers
depend on them. So reader and writer ask for the routine, and refuse weights whose leading singular
vectors no routine can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import FixedSides, RotatedCore
from lowrank_sp.checkpoint.peft.config import Config, common, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, NotGiven, Place, host, made
from lowrank_sp.checkpoint.tensors import CheckpointError


def is_free(config: Config) -> bool:
    """Whether a configuration of PSOFT does without the constraint on its rotation."""
    return config.get("psoft_orth") is False


def load_psoft(x: Found) -> RotatedCore:
    """Principal triplets of the weight, turned and stretched."""
    sides, left, right = _sides(x)
    return made(RotatedCore, skew=x["psoft_R.weight"], left=left, right=right, **sides)


def load_free(x: Found) -> FixedSides:
    """Any core in the place of the rotation: the functions of LoRA-XS."""
    sides, left, right = _sides(x)
    core = left[:, None] * x["psoft_R.weight"] * right
    return made(FixedSides, core=core - np.eye(len(core), dtype=core.dtype), **sides)


def _sides(x: Found) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What is not in the file, and the two vectors, of ones where there are none."""
    for option, known in _READ.items():
        if x.config.get(option, known) != known:
            raise CheckpointError(
                f"{x.place.name}: {option}={x.config.get(option)} of PSOFT has no form here, only "
                f"{known}; convert the adapter to LoRA in PEFT"
            )
    rank = int(x.config.number("r", 32))
    scale = x.scale(rank, "psoft_alpha", 32)
    u, s, vh = _triplets(x.place, rank)
    left, right = (x.arrays.get(f"psoft_R.vector_{ab}", np.ones(rank, s.dtype)) for ab in "ba")
    return {"up": u * (s / scale), "down": vh, "scale": scale}, left, right


#: Options with their values that the forms here have.
_READ = {"use_cayley_neumann": False, "psoft_svd": "full", "ab_svd_init": "psoft_init"}


def save_psoft(form: RotatedCore, place: Place) -> Arrays:
    """The trained numbers, for the sides that PEFT will compute."""
    lengths, signs, s = _along_triplets(form, place)
    known = np.finfo(s.dtype).eps ** 0.5
    if np.max(abs(lengths * signs * form.scale / s - 1)) > known or np.any(abs(signs) < 1 - known):
        raise CheckpointError(
            f"{place.name}: scale * up @ down must be the principal part of the weight of the "
            "model, with down of unit rows; convert the form by to_lora()"
        )
    signs = np.sign(signs)
    above = np.triu_indices(len(signs), 1)
    return {
        "psoft_R.weight": host(form.skew) * (signs[above[0]] * signs[above[1]]),
        "psoft_R.vector_a": form.right,
        "psoft_R.vector_b": form.left,
    }


def save_free(form: FixedSides, place: Place) -> Arrays:
    """The core that PEFT needs between its sides, plus the identity that it subtracts."""
    left, right, s = _along_triplets(form, place)
    core = host(form.core) * (form.scale * left / s)[:, None] * right
    return {"psoft_R.weight": np.eye(len(s), dtype=core.dtype) + core}


def _along_triplets(
    form: RotatedCore | FixedSides, place: Place
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of the sides of a form along the singular vectors of PEFT, and singular values."""
    u, s, vh = _triplets(place, form.up.shape[1])
    lengths = []
    for side, vectors in ((host(form.up).T, u.T), (host(form.down), vh)):
        along = np.sum(side * vectors, axis=1)
        apart = np.linalg.norm(side - along[:, None] * vectors, axis=1)
        if np.any(apart > np.finfo(s.dtype).eps ** 0.5 * abs(along)):
            raise CheckpointError(
                f"{place.name}: the sides of the form must lie along the leading singular vectors "
                "of the weight of the model, which PEFT computes again; convert the form by "
                "to_lora()"
            )
        lengths.append(along)
    return lengths[0], lengths[1], s


def configure_psoft(forms: Mapping[str, Any]) -> dict[str, Any]:
    """One rank and one alpha, and how PEFT shall compute the sides."""
    sizes = {name: (form.up.shape[1], form.scale) for name, form in forms.items()}
    rank, scale = common(sizes, "(rank, scale)", "PSOFT")
    return {
        "r": rank,
        "psoft_alpha": plain(scale * rank),
        "psoft_dropout": 0.0,
        "psoft_orth": True,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
        **_READ,
    }


def configure_free(forms: Mapping[str, FixedSides]) -> dict[str, Any]:
    """As PSOFT, without the vectors."""
    free = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}
    return {**configure_psoft(forms), **free}


def _triplets(place: Place, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triplets in the signs of PEFT."""
    weight = place.weight().astype(np.float32)
    if place.svd is None:
        raise NotGiven(
            f"{place.name}: PSOFT trains numbers in a basis of singular vectors that it does not "
            "save; give svd, the routine that PEFT uses (torch.linalg.svd), for their signs"
        )
    if rank > min(weight.shape):
        raise CheckpointError(f"{place.name}: rank {rank} is too large for {weight.shape}")
    u, s, vh = (host(part) for part in place.svd(weight))
    gaps = -np.diff(s[: rank + 1])
    if gaps.size and np.min(gaps) <= 64 * np.finfo(s.dtype).eps * s[0]:
        k = int(np.argmin(gaps))
        raise CheckpointError(
            f"{place.name}: singular values {k + 1} and {k + 2} of the weight agree to rounding, "
            "so that the sides of PSOFT, which are not in the file, are not determined"
        )
    return u[:, :rank], s[:rank], vh[:rank]
