"""Rows of the grammar for entrywise, Kronecker and block products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_sp.adapters.forms import (
    BlockGrid,
    HadamardProduct,
    HadamardWeight,
    KroneckerProduct,
    factorization,
)
from lowrank_sp.checkpoint.peft.config import common, patterned, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, made
from lowrank_sp.checkpoint.tensors import CheckpointError


def load_hira(x: Found) -> HadamardWeight:
    """The base weight times a product, entry by entry."""
    return made(HadamardWeight, up=x["hira_B"], down=x["hira_A"], weight=x.place.weight())


def save_hira(form: HadamardWeight, place: Place) -> Arrays:  # noqa: ARG001
    """Two factors."""
    return {"hira_A": form.down, "hira_B": form.up}


def configure_hira(forms: Mapping[str, HadamardWeight]) -> dict[str, Any]:
    """Ranks; there is no scale."""
    sizes = patterned(
        {name: form.up.shape[1] for name, form in forms.items()},
        {name: 1.0 / form.up.shape[1] for name, form in forms.items()},
    )
    return {"r": sizes["r"], "rank_pattern": sizes["rank_pattern"], "hira_dropout": 0.0}


def load_loha(x: Found) -> HadamardProduct:
    """Two products, multiplied entry by entry."""
    up1, down1, up2, down2 = (x[f"hada_w{i}_{ab}"] for i in (1, 2) for ab in "ab")
    scale = x.scale(down1.shape[0], "alpha")
    return made(HadamardProduct, up1=up1, down1=down1, up2=up2, down2=down2, scale=scale)


def save_loha(form: HadamardProduct, place: Place) -> Arrays:
    """Four factors."""
    ranks = form.up1.shape[1], form.up2.shape[1]
    if ranks[0] != ranks[1]:
        raise CheckpointError(
            f"{place.name}: a file of LoHa has one rank for both products, got {ranks[0]} and "
            f"{ranks[1]}; add zero columns and rows to the smaller one"
        )
    return {
        "hada_w1_a": form.up1,
        "hada_w1_b": form.down1,
        "hada_w2_a": form.up2,
        "hada_w2_b": form.down2,
    }


def configure_loha(forms: Mapping[str, HadamardProduct]) -> dict[str, Any]:
    """Ranks and alphas."""
    ranks = {name: form.up1.shape[1] for name, form in forms.items()}
    scales = {name: form.scale for name, form in forms.items()}
    return {**patterned(ranks, scales, alpha="alpha"), "use_effective_conv2d": False}


def load_lokr(x: Found) -> KroneckerProduct:
    """A Kronecker product of two matrices, either of which may be factored.

    The scale is ``alpha / r`` whatever is factored, unlike in LyCORIS. The rank of a product in
    which nothing is factored stands in the configuration only.
    """
    left, left_down = _either(x, 1)
    right, right_down = _either(x, 2)
    rank = int(x.config.rank(x.place.name))
    for down in (left_down, right_down):
        if down is not None and down.shape[0] != rank:
            raise CheckpointError(
                f"{x.place.name}: the factors must have the rank of the configuration, {rank}, "
                f"got {down.shape[0]}"
            )
    return made(
        KroneckerProduct,
        left=left,
        right=right,
        left_down=left_down,
        right_down=right_down,
        scale=x.scale(rank, "alpha"),
    )


def _either(x: Found, i: int) -> tuple[Any, Any]:
    whole = x.get(f"lokr_w{i}")
    return (whole, None) if whole is not None else (x[f"lokr_w{i}_a"], x[f"lokr_w{i}_b"])


def save_lokr(form: KroneckerProduct, place: Place) -> Arrays:  # noqa: ARG001
    """Two matrices, or their factors."""
    parts = ((form.left, form.left_down), (form.right, form.right_down))
    arrays = {}
    for i, (first, second) in enumerate(parts, start=1):
        if second is None:
            arrays[f"lokr_w{i}"] = first
        else:
            arrays |= {f"lokr_w{i}_a": first, f"lokr_w{i}_b": second}
    return arrays


def configure_lokr(forms: Mapping[str, KroneckerProduct]) -> dict[str, Any]:
    """Ranks, alphas, and the options by which PEFT finds the same shapes again.

    PEFT does not read the shapes of the factors from the file: it derives them from the rank, from
    one ``decompose_factor`` and from ``decompose_both``.
    """
    both = any(form.left_down is not None for form in forms.values())
    ranks = {name: _lokr_rank(name, form, both) for name, form in forms.items()}
    scales = {name: form.scale for name, form in forms.items()}
    return {
        **patterned(ranks, scales, alpha="alpha"),
        "decompose_both": both,
        "decompose_factor": _decompose_factor(forms),
        "use_effective_conv2d": False,
        "init_weights": True,
    }


def _lokr_sizes(form: KroneckerProduct) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the two matrices."""
    left = form.left if form.left_down is None else form.left_down
    right = form.right if form.right_down is None else form.right_down
    return (form.left.shape[0], left.shape[1]), (form.right.shape[0], right.shape[1])


def _lokr_rank(name: str, form: KroneckerProduct, both: bool) -> int:
    downs = [down for down in (form.left_down, form.right_down) if down is not None]
    left, right = _lokr_sizes(form)
    # Without factors any rank will do that is so large that PEFT does not factor.
    rank = downs[0].shape[0] if downs else max(*left, *right)
    factored = both and rank < max(left) / 2, rank < max(right) / 2
    found = form.left_down is not None, form.right_down is not None
    if factored != found or any(down.shape[0] != rank for down in downs):
        raise CheckpointError(
            f"{name}: PEFT factors the parts {left} and {right} of a LoKr of rank {rank} by their "
            f"sizes, {factored[0]} and {factored[1]}, got {found[0]} and {found[1]}; multiply the "
            "factors of a part out"
        )
    return rank


def _decompose_factor(forms: Mapping[str, KroneckerProduct]) -> int:
    sizes = {name: _lokr_sizes(form) for name, form in forms.items()}
    candidates = sorted({size for left, _ in sizes.values() for size in left})
    for factor in (-1, *candidates):
        if all(
            factorization(m1 * m2, factor) == (m1, m2)
            and factorization(n1 * n2, factor) == (n1, n2)
            for (m1, n1), (m2, n2) in sizes.values()
        ):
            return factor
    raise CheckpointError(
        "PEFT splits the sides of all LoKr layers by one decompose_factor, and none gives "
        + ", ".join(f"{left} x {right} of {name}" for name, (left, right) in sizes.items())
    )


def load_gralora(x: Found) -> BlockGrid:
    """A grid of products, with or without a plain one beside them."""
    down, up = x["gralora_A"], x["gralora_B"]
    wide, tall = x.get("gralora_A_general.weight"), x.get("gralora_B_general.weight")
    rank = up.shape[1] + (0 if wide is None else wide.shape[0])
    return made(
        BlockGrid,
        up=up.swapaxes(1, 2),
        down=down.swapaxes(1, 2),
        common_up=tall,
        common_down=wide,
        scale=x.scale(rank, "alpha", 64),
    )


def save_gralora(form: BlockGrid, place: Place) -> Arrays:  # noqa: ARG001
    """Stacks of factors, transposed."""
    arrays = {"gralora_A": form.down.mT, "gralora_B": form.up.mT}
    if form.common_up is not None:
        arrays |= {
            "gralora_A_general.weight": form.common_down,
            "gralora_B_general.weight": form.common_up,
        }
    return arrays


def configure_gralora(forms: Mapping[str, BlockGrid]) -> dict[str, Any]:
    """One rank, one alpha and one grid for all layers."""
    sizes = {
        name: (
            form.up.shape[2],
            0 if form.common_up is None else form.common_up.shape[1],
            form.up.shape[0],
            form.scale,
        )
        for name, form in forms.items()
    }
    rank, hybrid, blocks, scale = common(sizes, "(rank, hybrid rank, blocks, scale)", "GraLoRA")
    return {
        "r": rank,
        "hybrid_r": hybrid,
        "gralora_k": blocks,
        "alpha": plain(scale * (rank + hybrid)),
        "gralora_dropout": 0.0,
        "bias": "none",
    }
