"""Variants that raise the rank of the update beyond that of their factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, namespace
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.catalog._variant import Axis, Scale, Variant
from lowrank_sp.adapters.forms import Chain, Product, ProductPlusSparse, Start, largest_places
from lowrank_sp.updates import random_support


def _delta(
    weight: Any, rank: int, *, gain: float, alpha: float | None = None, rng: RNG = None
) -> Chain:
    return forms.delta_updates(Product.create(weight, rank, alpha=alpha, rng=rng), gain)


def _sltrain(
    weight: Array, rank: int, *, density: float, alpha: float | None = None, rng: RNG = None
) -> Start:
    generator = np.random.default_rng(rng)
    places = random_support(weight.shape, density, like=weight, rng=generator)
    form = ProductPlusSparse.create_values(weight, rank, places=places, alpha=alpha, rng=generator)
    # It is trained from nothing, in the place of the weight.
    return Start(form, namespace(weight).zeros_like(weight))


def _rosa(
    weight: Array,
    rank: int,
    *,
    gradient: Array,
    density: float,
    alpha: float | None = None,
    rng: RNG = None,
) -> ProductPlusSparse:
    places = largest_places(gradient, density)
    return ProductPlusSparse.create(weight, rank, places=places, alpha=alpha, rng=rng)


RANK = [
    Variant(
        "ReLoRA",
        Axis.RANK,
        "lialin2023relora",
        r"\textstyle\sum_{i \le K} s B_i A_i",
        Chain.create,
        trainable="r * (m + n)",
        rank_bound="r",
    ),
    Variant(
        "COLA",
        Axis.RANK,
        "xia2024chain",
        r"\textstyle\sum_{i \le K} s B_i A_i",
        Chain.create,
        trainable="r * (m + n)",
        rank_bound="r",
    ),
    Variant(
        "Delta-LoRA",
        Axis.RANK,
        "zi2023delta",
        r"(1 + \lambda)\, s B A - \lambda s B_0 A_0",
        _delta,
        trainable="r * (m + n)",
        rank_bound="2 * r",
        options={"gain": 2.0},
    ),
    Variant(
        "HiRA",
        Axis.RANK,
        "huang2025hira",
        r"W \circ (B A)",
        forms.HadamardWeight.create,
        trainable="r * (m + n)",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        peft="HiraConfig",
    ),
    Variant(
        "LoHa",
        Axis.RANK,
        "hyeonwoo2022fedpara",
        r"s\, (B_1 A_1) \circ (B_2 A_2)",
        forms.HadamardProduct.create,
        trainable="2 * r * (m + n)",
        rank_bound="min(r**2, m, n)",
        peft="LoHaConfig",
    ),
    Variant(
        "ABBA",
        Axis.RANK,
        "singhal2025abba",
        r"s\, (B_1 A_1) \circ (B_2 A_2)",
        forms.HadamardProduct.from_weight,
        trainable="2 * r * (m + n)",
        rank_bound="min(r**2, m, n)",
        scale=Scale.DIRECT,
    ),
    Variant(
        "LoKr",
        Axis.RANK,
        "yeh2024navigating",
        r"s\, W_1 \otimes W_2",
        forms.KroneckerProduct.create,
        trainable="a * e + r * (c + d)",
        rank_bound="min(a, e) * min(c, d, r)",
        peft="LoKrConfig",
    ),
    Variant(
        "KronA",
        Axis.RANK,
        "edalati2022krona",
        r"s\, W_1 \otimes W_2",
        forms.KroneckerProduct.create_right_zero,
        trainable="a * e + r * (c + d)",
        rank_bound="min(a, e) * min(c, d, r)",
    ),
    Variant(
        "MoRA, type 1",
        Axis.RANK,
        "jiang2024mora",
        r"D M C",
        forms.SharedSquare.create,
        trainable="round(((m + n) * r) ** 0.5) ** 2",
        rank_bound="min(round(((m + n) * r) ** 0.5), m, n)",
        scale=Scale.NONE,
    ),
    Variant(
        "MoRA, type 2",
        Axis.RANK,
        "jiang2024mora",
        r"D M C",
        forms.SharedSquare.create,
        trainable="round(((m + n) * r) ** 0.5) ** 2",
        rank_bound="min(round(((m + n) * r) ** 0.5), m, n)",
        scale=Scale.NONE,
        options={"neighbours_in": True, "neighbours_out": True},
    ),
    Variant(
        "MoRA, type 3",
        Axis.RANK,
        "jiang2024mora",
        r"D M C",
        forms.SharedSquare.create,
        trainable="round(((m + n) * r) ** 0.5) ** 2",
        rank_bound="min(round(((m + n) * r) ** 0.5), m, n)",
        scale=Scale.NONE,
        options={"neighbours_in": True, "neighbours_out": False},
    ),
    Variant(
        "MoRA, type 4",
        Axis.RANK,
        "jiang2024mora",
        r"D M C",
        forms.SharedSquare.create,
        trainable="round(((m + n) * r) ** 0.5) ** 2",
        rank_bound="min(round(((m + n) * r) ** 0.5), m, n)",
        scale=Scale.NONE,
        options={"neighbours_in": False, "neighbours_out": True},
    ),
    Variant(
        "MoRA, type 6",
        Axis.RANK,
        "jiang2024mora",
        r"\textstyle\sum_i e_i e_i^T \otimes M R_i",
        forms.RotatedSquare.create,
        trainable="(round(((m + n) * r) ** 0.5) // 2 * 2) ** 2",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
    ),
    Variant(
        "RandLoRA",
        Axis.RANK,
        "albert2025randlora",
        r"s \textstyle\sum_j B_j \Lambda_j A\, \Gamma_j",
        forms.RandomSum.create,
        trainable="-(-min(m, n) // r) * (r + min(m, n))",
        rank_bound="min(m, n)",
        peft="RandLoraConfig",
    ),
    Variant(
        "SLTrain",
        Axis.RANK,
        "han2024sltrain",
        r"s B A + S",
        _sltrain,
        trainable="r * (m + n) + round(density * m * n)",
        rank_bound="min(m, n)",
        options={"density": 0.1},
    ),
    Variant(
        "RoSA",
        Axis.RANK,
        "nikdan2024rosa",
        r"s B A + S",
        _rosa,
        trainable="r * (m + n) + int(density * m * n)",
        rank_bound="min(m, n)",
        needs="gradient",
        options={"density": 0.1},
    ),
    Variant(
        "Sine-LoRA",
        Axis.RANK,
        "ji2025sine",
        r"s \sin(\omega B A) / \sqrt n",
        forms.Sine.create,
        trainable="r * (m + n)",
        rank_bound="min(m, n)",
    ),
    Variant(
        "KRAdapter",
        Axis.RANK,
        "albert2025kradapter",
        r"2\, (U \bullet V)",
        forms.KhatriRao.create,
        trainable="min(m, n) * (isqrt(min(m, n)) - -max(m, n) // isqrt(min(m, n)))",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
    ),
    Variant(
        "BoRA, block-diversified",
        Axis.RANK,
        "li2026bora",
        r"s B_i \Sigma_{ij} A_j",
        forms.DiagonalGrid.create,
        trainable="r * (m + n) + blocks**2 * r",
        rank_bound="min(blocks * r, m, n)",
        options={"blocks": 2},
    ),
    Variant(
        "MELoRA",
        Axis.RANK,
        "ren2024melora",
        r"s \operatorname{blkdiag}(B_i A_i)",
        forms.BlockDiagonal.create,
        trainable="r * (m + n)",
        rank_bound="min(blocks * r, m, n)",
        options={"blocks": 2},
    ),
    Variant(
        "GraLoRA",
        Axis.RANK,
        "jung2025gralora",
        r"s B_{ij} A_{ij}",
        forms.BlockGrid.create,
        trainable="r * (m + n)",
        rank_bound="min(blocks * r, m, n)",
        options={"blocks": 2},
        peft="GraloraConfig",
    ),
    Variant(
        "Bone",
        Axis.RANK,
        "kang2026miss",
        r"(W_{ij} + I)\, S_i",
        forms.WeightShards.create,
        trainable="r * m",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        peft='MissConfig(init_weights="bat")',
    ),
    Variant(
        "SHiRA",
        Axis.RANK,
        "bhardwaj2024sparse",
        r"S",
        forms.Sparse.create_random,
        trainable="r * (m + n)",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        peft="ShiraConfig",
    ),
    Variant(
        "C3A",
        Axis.RANK,
        "chen2025parameter",
        r"\operatorname{circ}(w_{ij}) / n",
        forms.BlockCirculant.create,
        trainable="m * n // block",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        options={"block": 256},
        peft="C3AConfig",
    ),
    Variant(
        "FourierFT",
        Axis.RANK,
        "gao2024parameter",
        r"s \operatorname{Re} F_m^{-1} S F_n^{-1}",
        forms.FourierCoefficients.create,
        trainable="count",
        rank_bound="min(m, n, 2 * count)",
        scale=Scale.DIRECT,
        options={"count": 1000, "seed": 777},
        peft="FourierFTConfig",
    ),
    Variant(
        "WaveFT",
        Axis.RANK,
        "bilican2025exploring",
        r"s\, T_m S\, T_n^T",
        forms.WaveletCoefficients.create,
        trainable="count",
        rank_bound="min(m, n, count)",
        scale=Scale.DIRECT,
        options={"count": 2592, "seed": 777, "order": 1},
        peft="WaveFTConfig",
    ),
]
