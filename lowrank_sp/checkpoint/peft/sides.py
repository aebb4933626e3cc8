"""PSOFT, whose sides are not in the file: PEFT computes them again from the weight.

The signs of singular vectors are an accident of the routine and its build, and the trained numbers
depend on them. So reader and writer ask for the routine, and refuse weights whose leading singular
vectors no routine can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import RotatedCore
from lowrank_sp.checkpoint.peft.config import common, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, NotGiven, Place, host, made
from lowrank_sp.checkpoint.tensors import CheckpointError


def load_psoft(x: Found) -> RotatedCore:
    """Principal triplets of the weight, turned and stretched."""
    for option, known in _READ.items():
        if x.config.get(option, known) != known:
            raise CheckpointError(
                f"{x.place.name}: {option}={x.config.get(option)} of PSOFT has no form here, only "
                f"{known}; convert the adapter to LoRA in PEFT"
            )
    rank = int(x.config.number("r", 32))
    scale = x.scale(rank, "psoft_alpha", 32)
    u, s, vh = _triplets(x.place, rank)
    one = np.ones(rank, s.dtype)
    left, right = x.get("psoft_R.vector_b"), x.get("psoft_R.vector_a")
    return made(
        RotatedCore,
        up=u * (s / scale),
        skew=x["psoft_R.weight"],
        left=one if left is None else left,
        right=one if right is None else right,
        down=vh,
        scale=scale,
    )


#: Options with their values that the form here has.
_READ = {
    "psoft_orth": True,
    "use_cayley_neumann": False,
    "psoft_svd": "full",
    "ab_svd_init": "psoft_init",
}


def save_psoft(form: RotatedCore, place: Place) -> Arrays:
    """The trained numbers, for the sides that PEFT will compute."""
    up, down = host(form.up) * form.scale, host(form.down)
    u, s, vh = _triplets(place, up.shape[1])
    signs = np.sign(np.sum(down * vh, axis=1))
    known = np.finfo(s.dtype).eps ** 0.5 * s[0]
    if np.max(abs(up - u * (s * signs))) > known or np.max(abs(down - signs[:, None] * vh)) > known:
        raise CheckpointError(
            f"{place.name}: the sides of the form must be the leading singular vectors of the "
            "weight of the model, which PEFT computes again; convert the form to LoRA"
        )
    above = np.triu_indices(up.shape[1], 1)
    return {
        "psoft_R.weight": host(form.skew) * (signs[above[0]] * signs[above[1]]),
        "psoft_R.vector_a": form.right,
        "psoft_R.vector_b": form.left,
    }


def configure_psoft(forms: Mapping[str, RotatedCore]) -> dict[str, Any]:
    """One rank and one alpha, and how PEFT shall compute the sides."""
    sizes = {name: (form.left.shape[0], form.scale) for name, form in forms.items()}
    rank, scale = common(sizes, "(rank, scale)", "PSOFT")
    return {
        "r": rank,
        "psoft_alpha": plain(scale * rank),
        "psoft_dropout": 0.0,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
        **_READ,
    }


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
