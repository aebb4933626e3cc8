"""Variants that are products of factors: their starts, and what stands between or around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_sp._arrays import RNG, Array
from lowrank_sp.adapters import forms, initializers
from lowrank_sp.adapters.catalog._variant import Axis, Scale, Variant
from lowrank_sp.adapters.forms import RowMagnitude, SparseCore, Start, banded_places
from lowrank_sp.updates import PoLAR, StelLA


def _started(
    name: str,
    reference: str,
    create: Callable[..., Any],
    *,
    needs: str | None = None,
    peft: str | None = None,
    options: dict[str, Any] | None = None,
) -> Variant:
    """Plain LoRA from another start."""
    return Variant(
        name,
        Axis.START,
        reference,
        r"s B A",
        create,
        needs=needs,
        peft=peft and f'LoraConfig(init_lora_weights="{peft}")',
        options=options or {},
        trainable="r * (m + n)",
        rank_bound="r",
    )


def _dude(weight: Array, rank: int, *, alpha: float | None = None, rng: RNG = None) -> Start:
    return RowMagnitude.from_start(initializers.pissa(weight, rank, alpha=alpha, rng=rng))


def _svft(weight: Array, *, width: int, rng: RNG = None) -> SparseCore:
    places = banded_places(min(weight.shape), width, like=weight)
    return SparseCore.create(weight, places=places, rng=rng)


def _svdiff(weight: Array, *, scale: float = 1.0, rng: RNG = None) -> forms.SpectralShift:
    return forms.SpectralShift.create(weight, scale=scale, rng=rng)


STARTS = [
    Variant(
        "LoRA",
        Axis.START,
        "hu2022lora",
        r"s B A",
        forms.Product.create,
        peft="LoraConfig",
        trainable="r * (m + n)",
        rank_bound="r",
    ),
    Variant(
        "rsLoRA",
        Axis.START,
        "kalajdzievski2023rslora",
        r"s B A",
        forms.Product.create,
        scale=Scale.OVER_ROOT,
        peft="LoraConfig(use_rslora=True)",
        trainable="r * (m + n)",
        rank_bound="r",
    ),
    _started("PiSSA", "meng2024pissa", initializers.pissa, peft="pissa"),
    _started("MiLoRA", "wang2025milora", initializers.milora),
    _started("OLoRA", "buyukakyuz2024olora", initializers.olora, peft="olora"),
    _started("orthogonal", "mangrulkar2022peft", initializers.orthogonal, peft="orthogonal"),
    _started("NoRA", "li2025nora", initializers.nora),
    _started("EVA", "paischer2024eva", initializers.eva, needs="components", peft="eva"),
    _started(
        "CorDA, instruction-previewed",
        "yang2024corda",
        initializers.corda_ipm,
        needs="second_moment",
        peft="corda",
    ),
    _started(
        "CorDA, knowledge-preserved",
        "yang2024corda",
        initializers.corda_kpm,
        needs="second_moment",
        peft="corda",
    ),
    _started("LoRA-GA", "wang2024loraga", initializers.lora_ga, needs="gradient"),
    _started("LoRA-One", "zhang2025loraone", initializers.lora_one, needs="gradient"),
    _started("LoftQ", "li2024loftq", initializers.loftq, peft="loftq", options={"steps": 5}),
    _started("QPiSSA", "meng2024pissa", initializers.qpissa, options={"steps": 5}),
]

FACTORS = [
    Variant(
        "MiCA",
        Axis.FACTORS,
        "rudiger2026mica",
        r"s U_{-r} A",
        forms.FixedUp.create,
        trainable="r * n",
        rank_bound="r",
        peft='LoraConfig(init_lora_weights="mica")',
    ),
    Variant(
        "AdaLoRA",
        Axis.FACTORS,
        "zhang2023adalora",
        r"s B \operatorname{diag}(d) A",
        forms.DiagonalCore.create,
        trainable="r * (m + n + 1)",
        rank_bound="r",
        peft="AdaLoraConfig",
    ),
    Variant(
        "SORSA",
        Axis.FACTORS,
        "cao2024sorsa",
        r"s B \operatorname{diag}(d) A",
        forms.DiagonalCore.principal,
        trainable="r * (m + n + 1)",
        rank_bound="r",
    ),
    Variant(
        "KaSA",
        Axis.FACTORS,
        "wang2025kasa",
        r"s B \operatorname{diag}(d) A",
        forms.DiagonalCore.beside_truncated,
        trainable="r * (m + n + 1)",
        rank_bound="r",
        peft="LoraConfig(kasa_config=...)",
    ),
    Variant(
        "PoLAR",
        Axis.FACTORS,
        "lion2025polar",
        r"s\, U S V^T",
        forms.FullCore.create,
        trainable="r * (m + n + r)",
        rank_bound="r",
        rule=PoLAR(),
    ),
    Variant(
        "StelLA",
        Axis.FACTORS,
        "li2025stella",
        r"s\, U S V^T",
        forms.FullCore.at_identity,
        trainable="r * (m + n + r)",
        rank_bound="r",
        rule=StelLA(),
    ),
    Variant(
        "LoRA-XS",
        Axis.FACTORS,
        "balazy2024loraxs",
        r"s\, U_r R\, \Sigma_r V_r^T",
        forms.FixedSides.create,
        trainable="r**2",
        rank_bound="r",
    ),
    Variant(
        "LoRA-SB",
        Axis.FACTORS,
        "ponkshe2024lorasb",
        r"U_r R\, V_r^T",
        forms.FixedSides.along_gradient,
        trainable="r**2",
        rank_bound="r",
        scale=Scale.NONE,
        needs="gradient",
        options={"step": 1e-3},
    ),
    Variant(
        "TinyLoRA",
        Axis.FACTORS,
        "morris2026tinylora",
        r"B \big(\textstyle\sum_i v_i P_i\big) A",
        forms.CombinedCore.create,
        trainable="size",
        rank_bound="r",
        scale=Scale.NONE,
        options={"size": 16},
        peft="TinyLoraConfig",
    ),
    Variant(
        "PSOFT",
        Axis.FACTORS,
        "wu2026psoft",
        r"s B \big(\operatorname{diag}(b)\, Q \operatorname{diag}(a) - I\big) A",
        forms.RotatedCore.create,
        trainable="r * (r - 1) // 2 + 2 * r",
        rank_bound="r",
        peft="PsoftConfig",
    ),
    Variant(
        "DoRA",
        Axis.FACTORS,
        "liu2024dora",
        r"\operatorname{diag}(\mu / c)\,(W + s B A) - W",
        RowMagnitude.create,
        trainable="r * (m + n) + m",
        rank_bound="min(m, n)",
        peft="LoraConfig(use_dora=True)",
    ),
    Variant(
        "DuDe",
        Axis.FACTORS,
        "han2025dude",
        r"\operatorname{diag}(\mu / c)\,(W + s B A) - W",
        _dude,
        trainable="r * (m + n) + m",
        rank_bound="min(m, n)",
    ),
    Variant(
        "BoRA, bi-dimensional",
        Axis.FACTORS,
        "wang2024bora",
        r"\text{rows, then columns of } W + s B A \text{ rescaled} - W",
        forms.BothMagnitudes.create,
        trainable="r * (m + n) + m + n",
        rank_bound="min(m, n)",
    ),
    Variant(
        "DeLoRA",
        Axis.FACTORS,
        "bini2025delora",
        r"\tfrac{\lambda}{r} B \operatorname{diag}\big(1 / (\lVert b_i \rVert "
        r"\lVert a_i \rVert)\big) A \operatorname{diag}(c)",
        forms.NormalizedProduct.create,
        trainable="r * (m + n) + 1",
        rank_bound="r",
        scale=Scale.NONE,
        options={"strength": 15.0},
        peft="DeloraConfig",
    ),
    Variant(
        "OFT",
        Axis.FACTORS,
        "qiu2023controlling",
        r"W \big(\operatorname{blkdiag}(R_i)^T - I\big)",
        forms.BlockRotations.create,
        trainable="n * (block - 1) // 2",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        options={"block": 32, "shared": False, "order": None},
        peft="OFTConfig",
    ),
    Variant(
        "BOFT",
        Axis.FACTORS,
        "liu2024boft",
        r"\operatorname{diag}(g)\, W (M_f \cdots M_1)^T - W",
        forms.ButterflyRotations.create,
        trainable="stages * n * block + m",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        options={"block": 4, "stages": 1},
        peft="BOFTConfig",
    ),
    Variant(
        "HRA",
        Axis.FACTORS,
        "yuan2024bridging",
        r"W (H_1 \cdots H_r - I)",
        forms.Reflections.create,
        trainable="r * n",
        rank_bound="r",
        scale=Scale.NONE,
        peft="HRAConfig",
    ),
    Variant(
        "MiSS",
        Axis.FACTORS,
        "kang2026miss",
        r"\begin{pmatrix} S & S & \dots & S \end{pmatrix}",
        forms.SharedShard.create,
        trainable="r * m",
        rank_bound="r",
        scale=Scale.NONE,
        peft="MissConfig",
    ),
    Variant(
        "SVDiff",
        Axis.FACTORS,
        "han2023svdiff",
        r"U \operatorname{diag}\big(\max(s \delta, -\sigma)\big) V^T",
        _svdiff,
        trainable="min(m, n)",
        rank_bound="min(m, n)",
        scale=Scale.DIRECT,
    ),
    Variant(
        "SVFT",
        Axis.FACTORS,
        "lingam2024svft",
        r"\operatorname{sigmoid}(g)\, U M V^T,\ M \text{ banded}",
        _svft,
        trainable="min(m, n) * (2 * width + 1) - width * (width + 1) + 1",
        rank_bound="min(m, n)",
        scale=Scale.NONE,
        options={"width": 2},
    ),
    Variant(
        "VeRA",
        Axis.FACTORS,
        "kopiczko2024vera",
        r"\operatorname{diag}(b)\, B \operatorname{diag}(d)\, A",
        forms.SharedBasis.create,
        trainable="L * (m + r)",
        rank_bound="r",
        scale=Scale.NONE,
        peft="VeraConfig",
    ),
]
