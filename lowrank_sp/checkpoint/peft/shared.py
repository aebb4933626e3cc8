"""Rows of the grammar whose layers share arrays: VeRA, RandLoRA, TinyLoRA.

An array of all layers is as large as the largest of them needs it, and a layer uses its leading
part. So the shared array can be told from the parts, up to entries that no layer uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import CombinedCore, Gains, PositionalRandomSum, peft_basis
from lowrank_sp.checkpoint.peft.config import common, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, host, made
from lowrank_sp.checkpoint.tensors import CheckpointError


def load_vera(x: Found) -> Gains:
    """Gains around the leading parts of two factors, drawn again if they were not saved."""
    m, n = x.place.layer().shape
    outer, inner = x["vera_lambda_b"], x["vera_lambda_d"]
    up, down = x.shared.get("vera_B"), x.shared.get("vera_A")
    if up is None or down is None:
        up, down = _drawn_vera(x, inner.shape[0])
    return made(Gains, up=up[:m], down=down[:, :n], outer=outer, inner=inner)


def _drawn_vera(x: Found, rank: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = [replace(x.place, name=name).layer().shape for name in x.names]
    rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
    seed = int(x.config.number("projection_prng_key", 0))
    return peft_basis(rank, rows, columns, np.empty(0, np.float32), seed=seed)


def save_vera(form: Gains, place: Place) -> Arrays:  # noqa: ARG001
    """Two gains."""
    return {"vera_lambda_b": form.outer, "vera_lambda_d": form.inner}


def share_vera(forms: Mapping[str, Gains]) -> Arrays:
    """Two factors."""
    return {
        "vera_A": united({name: form.down for name, form in forms.items()}, "down", "VeRA"),
        "vera_B": united({name: form.up for name, form in forms.items()}, "up", "VeRA"),
    }


def configure_vera(forms: Mapping[str, Gains]) -> dict[str, Any]:
    """One rank; the factors are saved."""
    ranks = {name: form.inner.shape[0] for name, form in forms.items()}
    return {
        "r": common(ranks, "rank", "VeRA"),
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "bias": "none",
    }


def load_randlora(x: Found) -> PositionalRandomSum:
    """Gains in the leading parts of a random basis, which must have been saved."""
    m, n = x.place.layer().shape
    gains, columns = x["randlora_lambda"], x["randlora_gamma"]
    if not {"randlora_A", "randlora_B"} <= set(x.shared):
        raise CheckpointError(
            f"{x.place.name}: the file has no randlora_A and randlora_B, and PEFT draws them in a "
            "precision that depends on the machine; save the adapter there with "
            "save_projection=True"
        )
    small = x.shared["randlora_A"][:, 0, : min(m, n)]
    large = x.shared["randlora_B"][: max(m, n), : columns.shape[0]]
    form = made(
        PositionalRandomSum,
        small=small,
        large=large,
        gains=gains,
        columns=columns,
        wide=m < n,
        scale=x.scale(gains.shape[0], "randlora_alpha", 640),
    )
    if form.shape != (m, n):
        raise CheckpointError(f"{x.place.name}: the basis is too small for a layer {m} x {n}")
    return form


def save_randlora(form: PositionalRandomSum, place: Place) -> Arrays:  # noqa: ARG001
    """Two sets of gains."""
    return {"randlora_lambda": form.gains, "randlora_gamma": form.columns}


def share_randlora(forms: Mapping[str, PositionalRandomSum]) -> Arrays:
    """The basis, once: PEFT itself writes it again for every layer."""
    small = united({name: form.small for name, form in forms.items()}, "small", "RandLoRA")
    large = united({name: form.large for name, form in forms.items()}, "large", "RandLoRA")
    return {"randlora_A": small[:, None, :], "randlora_B": large}


def configure_randlora(forms: Mapping[str, PositionalRandomSum]) -> dict[str, Any]:
    """One rank and one alpha; the basis is saved."""
    sizes = {name: (form.gains.shape[0], form.scale) for name, form in forms.items()}
    rank, scale = common(sizes, "(rank, scale)", "RandLoRA")
    for name, form in forms.items():
        needed = -(-form.small.shape[1] // rank)
        if form.gains.shape[1] != needed:
            raise CheckpointError(
                f"{name}: PEFT takes {needed} terms of rank {rank} for the sides {form.shape}, "
                f"got {form.gains.shape[1]}"
            )
    return {
        "r": rank,
        "randlora_alpha": plain(scale * rank),
        "projection_prng_key": 0,
        "save_projection": True,
        "randlora_dropout": 0.0,
        "bias": "none",
    }


def load_tinylora(x: Found) -> CombinedCore:
    """A combination of fixed cores, with the coefficients of the group of the layer."""
    groups = len([key for key in x.shared if key.startswith("tinylora_v.")])
    group = 0 if groups == 1 else _group(position_of_tinylora(x), len(x.names), groups)
    coefficients = x.shared.get(f"tinylora_v.{group}")
    if coefficients is None:
        raise CheckpointError(f"{x.place.name}: base_model.tinylora_v.{group} is missing")
    return made(
        CombinedCore,
        up=x["tinylora_B"],
        coefficients=coefficients,
        basis=x["tinylora_P"],
        down=x["tinylora_A"],
    )


def _group(position: int, layers: int, groups: int) -> int:
    """Whose coefficients the layer at a position has, as PEFT ties them."""
    return min(position // max(1, layers // groups), groups - 1)


def position_of_tinylora(x: Found) -> int:
    """Where a layer stands in the model.

    The file does not say it; but PEFT has drawn the cores with a seed that counts the layers.
    """
    if x.position is not None:
        return x.position
    cores = x["tinylora_P"]
    seed = int(x.config.number("projection_seed", 42))
    for position in range(len(x.names)):
        drawn = _torch_normal(seed + position, cores.size) / cores.shape[1] ** 0.5
        if np.allclose(drawn, cores.ravel()[: drawn.size], rtol=0, atol=2**-6):
            return position
    if len([key for key in x.shared if key.startswith("tinylora_v.")]) == 1:
        return 0
    raise CheckpointError(
        f"{x.place.name}: the file does not tell which tinylora_v is that of the layer, since its "
        "cores are not those that PEFT draws"
    )


def _torch_normal(seed: int, count: int) -> np.ndarray:
    """The first of ``count`` normal numbers that PyTorch draws: sixteen of them, or all.

    PyTorch fills by sixteen, with the method of Box and Muller on uniform numbers of 24 bits, and
    draws the last sixteen again if they are cut short.
    """
    if count < 16:
        return np.full(1, np.nan)
    bits = np.random.RandomState(seed)

    def sixteen(raw: np.ndarray) -> np.ndarray:
        u = (raw & np.uint32(2**24 - 1)) * 2.0**-24
        radius, angle = np.sqrt(-2 * np.log1p(-u[:8])), 2 * np.pi * u[8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])

    raw = bits.randint(0, 2**32, size=count if count < 32 else 16, dtype=np.uint32)
    if count % 16 == 0 or count >= 32:
        return sixteen(raw[:16])
    last = sixteen(bits.randint(0, 2**32, size=16, dtype=np.uint32))
    return np.concatenate([sixteen(raw[:16])[: count - 16], last])


def save_tinylora(form: CombinedCore, place: Place) -> Arrays:
    """Everything but the coefficients."""
    if form.scale != 1.0:
        raise CheckpointError(
            f"{place.name}: TinyLoRA has no scale in PEFT, got {form.scale}; move it into up"
        )
    return {"tinylora_A": form.down, "tinylora_B": form.up, "tinylora_P": form.basis}


def share_tinylora(forms: Mapping[str, CombinedCore]) -> Arrays:
    """The coefficients, once for each group of layers."""
    return {f"tinylora_v.{i}": a for i, (_, a) in enumerate(_tied(forms))}


def _tied(forms: Mapping[str, CombinedCore]) -> list[tuple[str, np.ndarray]]:
    """Layers in a row that have the same coefficients: the first of them, and those."""
    groups: list[tuple[str, np.ndarray]] = []
    for name, form in forms.items():
        values = host(form.coefficients)
        if not groups or not np.array_equal(groups[-1][1], values):
            groups.append((name, values))
    return groups


def configure_tinylora(forms: Mapping[str, CombinedCore]) -> dict[str, Any]:
    """One rank, one number of coefficients, and how many layers share them.

    PEFT gives coefficients to layers in the order of the modules of the model.
    """
    size = common({n: f.coefficients.shape[0] for n, f in forms.items()}, "size", "TinyLoRA")
    ranks = {name: form.up.shape[1] for name, form in forms.items()}
    rank = max(ranks.values())
    for name, form in forms.items():
        if ranks[name] != min(rank, *form.shape):
            raise CheckpointError(
                f"{name}: a file of TinyLoRA has one rank for all layers, got {ranks[name]} and "
                f"{rank}"
            )
    firsts = [name for name, _ in _tied(forms)]
    count, groups = len(forms), len(firsts)
    starts = [name for i, name in enumerate(forms) if i == 0 or _begins(i, count, groups)]
    if starts != firsts:
        raise CheckpointError(
            f"PEFT ties the coefficients of TinyLoRA among equally many neighbours: {groups} "
            f"groups begin at {', '.join(starts)}, got {', '.join(firsts)}"
        )
    return {
        "r": rank,
        "u": size,
        "weight_tying": 1.0 - groups / count if groups > 1 else 1.0,
        "save_projection": True,
        "tinylora_dropout": 0.0,
        "bias": "none",
    }


def _begins(i: int, layers: int, groups: int) -> bool:
    return _group(i, layers, groups) != _group(i - 1, layers, groups)


def united(parts: Mapping[str, Any], what: str, method: str) -> np.ndarray:
    """The smallest array of which all parts are leading ones; zero where none reaches."""
    arrays = {name: host(part) for name, part in parts.items()}
    shape = tuple(map(max, zip(*(part.shape for part in arrays.values()), strict=True)))
    whole = np.zeros(shape, np.result_type(*arrays.values()))
    known = np.zeros(shape, bool)
    for name, part in arrays.items():
        place = tuple(map(slice, part.shape))
        if np.any(known[place] & (whole[place] != part)):
            raise CheckpointError(
                f"{name}: {what} must be a part of one array that all layers of {method} share"
            )
        whole[place], known[place] = part, True
    return whole
