"""Rows of the grammar for few numbers of a fixed structure: FourierFT, WaveFT, SHiRA, C3A.

FourierFT and WaveFT draw the places of their numbers again from a seed whenever they are loaded. A
form that has other places has no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import (
    BlockCirculant,
    FourierCoefficients,
    Sparse,
    WaveletCoefficients,
    daubechies,
    peft_places,
    wavelet_places,
)
from lowrank_sp.checkpoint.peft.config import common, counted, plain
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place, host, made
from lowrank_sp.checkpoint.tensors import CheckpointError


def load_fourier(x: Found) -> FourierCoefficients:
    """Frequencies at the places of the seed."""
    m, n = x.place.layer().shape
    spectrum, seed = x["fourierft_spectrum"], _seed(x)
    drawn = peft_places(m * n, len(spectrum), seed=seed)
    order = np.argsort(drawn)
    return made(
        FourierCoefficients,
        values=spectrum[order],
        places=drawn[order],
        size=(m, n),
        scale=x.config.number("scaling", 150),
        seed=seed,
    )


def save_fourier(form: FourierCoefficients, place: Place) -> Arrays:
    """Frequencies in the order of the draw."""
    drawn = _drawn(form, place)
    return {"fourierft_spectrum": _as_drawn(form, place, drawn)}


def configure_fourier(forms: Mapping[str, FourierCoefficients]) -> dict[str, Any]:
    """How many frequencies there are, the seed and one scale."""
    return {**_drawn_sizes(forms, "FourierFT"), "bias": "none", "init_weights": False}


def load_wave(x: Found) -> WaveletCoefficients:
    """Coefficients at the places of the seed."""
    family = str(x.config.get("wavelet_family", "db1"))
    order = re.fullmatch(r"db(\d+)", family)
    if not x.config.get("use_idwt", True) or order is None or int(order[1]) > 10:
        raise CheckpointError(
            f"{x.place.name}: WaveFT has a form here for wavelet_family db1 to db10 with "
            f"use_idwt, got {family}; convert the adapter to LoRA in PEFT"
        )
    m, n = x.place.layer().shape
    spectrum, seed = x["waveft_spectrum"], _seed(x)
    low = daubechies(int(order[1])).astype(spectrum.dtype)
    drawn = wavelet_places(peft_places(m * n, len(spectrum), seed=seed), (m, n), len(low))
    places = np.argsort(drawn)
    return made(
        WaveletCoefficients,
        values=spectrum[places],
        places=drawn[places],
        filter=low,
        size=(m, n),
        scale=x.config.number("scaling", 25),
        seed=seed,
    )


def save_wave(form: WaveletCoefficients, place: Place) -> Arrays:
    """Coefficients in the order of the draw."""
    low = host(form.filter)
    order = len(low) // 2
    if order > 10 or not np.allclose(low, daubechies(order), atol=np.finfo(low.dtype).eps ** 0.5):
        raise CheckpointError(
            f"{place.name}: WaveFT is written for the filters of daubechies(); convert the form by "
            "to_lora()"
        )
    drawn = wavelet_places(_drawn(form, place), form.size, len(low))
    return {"waveft_spectrum": _as_drawn(form, place, drawn)}


def configure_wave(forms: Mapping[str, WaveletCoefficients]) -> dict[str, Any]:
    """As FourierFT, and one wavelet."""
    taps = common({name: form.filter.shape[0] for name, form in forms.items()}, "filter", "WaveFT")
    return {
        **_drawn_sizes(forms, "WaveFT"),
        "wavelet_family": f"db{taps // 2}",
        "use_idwt": True,
        "bias": "none",
        "init_weights": True,
    }


def _seed(x: Found) -> int:
    return int(x.config.number("random_loc_seed", 777))


def _drawn(form: FourierCoefficients | WaveletCoefficients, place: Place) -> np.ndarray:
    if form.seed is None:
        raise CheckpointError(
            f"{place.name}: {place.method} draws its places from a seed, and the form has none; "
            "make it with seed=777, or convert it by to_lora()"
        )
    m, n = form.size
    return peft_places(m * n, form.values.shape[0], seed=form.seed)


def _as_drawn(
    form: FourierCoefficients | WaveletCoefficients, place: Place, drawn: np.ndarray
) -> np.ndarray:
    order = np.argsort(drawn)
    if not np.array_equal(drawn[order], host(form.places)):
        raise CheckpointError(
            f"{place.name}: the places are not those that {place.method} draws from the seed "
            f"{form.seed}; convert the form by to_lora()"
        )
    values = host(form.values)
    spectrum = np.empty_like(values)
    spectrum[order] = values
    return spectrum


def _drawn_sizes(forms: Mapping[str, Any], method: str) -> dict[str, Any]:
    return {
        **counted({name: form.values.shape[0] for name, form in forms.items()}, "n_frequency"),
        "random_loc_seed": common({name: f.seed for name, f in forms.items()}, "seed", method),
        "scaling": plain(common({name: f.scale for name, f in forms.items()}, "scale", method)),
    }


def load_shira(x: Found) -> Sparse:
    """Entries at places that the file has; on Windows PEFT stores places as floating numbers."""
    m, n = x.place.layer().shape
    i, j = x["shira_indices"].astype(np.int64)
    places = i * n + j
    order = np.argsort(places)
    return made(Sparse, values=x["shira_weight"][order], places=places[order], size=(m, n))


def save_shira(form: Sparse, place: Place) -> Arrays:  # noqa: ARG001
    """Rows and columns of the places, and the entries with their scale in them."""
    rows, columns = np.divmod(host(form.places), form.size[1])
    return {
        "shira_weight": host(form.values) * form.scale,
        "shira_indices": np.stack([rows, columns]).astype(np.int32),
    }


def configure_shira(forms: Mapping[str, Sparse]) -> dict[str, Any]:
    """The rank of which plain LoRA would have as many numbers: PEFT knows no other counts."""
    counts = {name: form.values.shape[0] / sum(form.size) for name, form in forms.items()}
    rank = common(counts, "number of entries over m + n", "SHiRA")
    if rank != int(rank):
        raise CheckpointError(
            f"PEFT has r (m + n) entries of SHiRA in a layer, got {rank:.4g} (m + n); add places "
            "with zeros"
        )
    return {"r": int(rank), "mask_type": "random", "random_seed": None, "init_weights": True}


def load_c3a(x: Found) -> BlockCirculant:
    """First rows of blocks; the scale is the inverse of the number of inputs."""
    kernel = x["c3a_kernel"]
    return made(BlockCirculant, kernel=kernel, scale=1 / (kernel.shape[1] * kernel.shape[2]))


def save_c3a(form: BlockCirculant, place: Place) -> Arrays:  # noqa: ARG001
    """First rows of blocks, with what the scale has beyond that of PEFT."""
    return {"c3a_kernel": host(form.kernel) * plain(form.scale * form.shape[1])}


def configure_c3a(forms: Mapping[str, BlockCirculant]) -> dict[str, Any]:
    """Sizes of blocks."""
    sizes = {name: form.kernel.shape[2] for name, form in forms.items()}
    return {**counted(sizes, "block_size"), "bias": "none", "init_weights": True}
