"""Rows of the grammar for rotations of the input: OFT, BOFT, HRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_sp.adapters.forms import BlockRotations, ButterflyRotations, Reflections
from lowrank_sp.checkpoint.peft.config import Config, common
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, host, made
from lowrank_sp.checkpoint.tensors import CheckpointError

# Since then the last term of the series is not doubled, and OFT turns pieces of the input.
_SERIES = "0.18.0"


def load_oft(x: Found) -> BlockRotations:
    """Rotations of pieces, by the inverse or by a series.

    PEFT turns by ``K`` with the series and by ``-K`` with the inverse.
    """
    if x.config.get("coft"):
        raise CheckpointError(
            f"{x.place.name}: coft=True of OFT moves the numbers in the file before it uses them; "
            "merge the adapter in PEFT"
        )
    skew, weight = x["oft_R.weight"], x.place.weight()
    if not x.config.get("use_cayley_neumann", True):
        return made(BlockRotations, skew=-skew, weight=weight)
    terms = int(x.config.number("num_cayley_neumann_terms", 5))
    if terms < 3 or _version(x.config) < _numbers(_SERIES):
        raise CheckpointError(
            f"{x.place.name}: OFT by a series has a form here from {_SERIES} of PEFT on and for at "
            f"least 3 terms, got {x.config.get('peft_version')} and {terms}"
        )
    # Three and four terms are the same in PEFT.
    return made(BlockRotations, skew=skew, weight=weight, order=max(terms, 4) - 1)


def save_oft(form: BlockRotations, place: Place) -> Arrays:
    """The skew-symmetric matrices."""
    if form.order is not None and form.order < 3:
        raise CheckpointError(
            f"{place.name}: the series of OFT in PEFT has an order of 3 or more, got {form.order}"
        )
    return {"oft_R.weight": host(form.skew) * (-1 if form.order is None else 1)}


def configure_oft(forms: Mapping[str, BlockRotations]) -> dict[str, Any]:
    """One size of pieces, one order, and whether pieces share their rotation."""
    sizes = {name: (form.size, form.order) for name, form in forms.items()}
    size, order = common(sizes, "(block size, order)", "OFT")
    shared = any(_is_shared(form) for form in forms.values())
    for name, form in forms.items():
        if shared and form.skew.shape[0] > 1:
            raise CheckpointError(
                f"{name}: pieces share their rotation in all layers of OFT or in none, "
                f"got {form.skew.shape[0]} rotations"
            )
    return {
        "r": 0,
        "oft_block_size": size,
        "block_share": shared,
        "use_cayley_neumann": order is not None,
        "num_cayley_neumann_terms": 5 if order is None else order + 1,
        "peft_version": _SERIES,
        "coft": False,
        "module_dropout": 0.0,
        "bias": "none",
    }


def _is_shared(form: BlockRotations) -> bool:
    return form.skew.shape[0] * form.size < form.shape[1]


def _version(config: Config) -> tuple[int, ...]:
    return _numbers(str(config.get("peft_version", "0")))


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: of ``0.21.2.dev0@main`` the first three."""
    found = []
    for part in version.split("@")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def load_boft(x: Found) -> ButterflyRotations:
    """Stages of rotations, and gains."""
    return made(ButterflyRotations, blocks=x["boft_R"], gains=x["boft_s"], weight=x.place.weight())


def save_boft(form: ButterflyRotations, place: Place) -> Arrays:  # noqa: ARG001
    """Stages of rotations, and gains."""
    return {"boft_R": form.blocks, "boft_s": form.gains}


def configure_boft(forms: Mapping[str, ButterflyRotations]) -> dict[str, Any]:
    """One size of pieces and one number of stages, of which PEFT has but one without CUDA."""
    sizes = {name: (f.blocks.shape[2], f.blocks.shape[0]) for name, f in forms.items()}
    size, stages = common(sizes, "(block size, stages)", "BOFT")
    return {
        "boft_block_size": size,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": stages,
        "boft_dropout": 0.0,
        "bias": "none",
        "init_weights": True,
    }


def load_hra(x: Found) -> Reflections:
    """Vectors to reflect the inputs of the weight at."""
    return made(
        Reflections,
        vectors=x["hra_u"],
        weight=x.place.weight(),
        orthogonal=bool(x.config.get("apply_GS", False)),
    )


def save_hra(form: Reflections, place: Place) -> Arrays:  # noqa: ARG001
    """The vectors."""
    return {"hra_u": form.vectors}


def configure_hra(forms: Mapping[str, Reflections]) -> dict[str, Any]:
    """One number of vectors, all of them orthogonal or none."""
    sizes = {name: (form.vectors.shape[1], form.orthogonal) for name, form in forms.items()}
    rank, orthogonal = common(sizes, "(rank, orthogonal)", "HRA")
    return {"r": rank, "apply_GS": orthogonal, "bias": "none", "init_weights": True}
