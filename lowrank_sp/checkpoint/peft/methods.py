"""The grammar of PEFT's files: a row for every method that has a form here.

A row says which keys a layer has, how a form is made of their arrays, and how it is written again.
The ends of keys are those of PEFT, with ``.weight`` where PEFT keeps a module and without it where
it keeps a parameter: ``lora_A.weight`` of LoRA is ``lora_A`` of AdaLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_sp.adapters.forms import (
    BankFactors,
    BlockCirculant,
    BlockGrid,
    BlockRotations,
    ButterflyRotations,
    CombinedCore,
    DiagonalCore,
    DrawnFactors,
    FixedSides,
    FixedUp,
    Form,
    FourierCoefficients,
    Gains,
    HadamardProduct,
    HadamardWeight,
    KroneckerProduct,
    NormalizedProduct,
    PositionalRandomSum,
    Product,
    Reflections,
    RotatedCore,
    RowMagnitude,
    SharedShard,
    Sparse,
    WaveletCoefficients,
    WeightShards,
)
from lowrank_sp.checkpoint.peft import (
    banks,
    coefficients,
    lora,
    lycoris,
    rotations,
    shards,
    shared,
    sides,
)
from lowrank_sp.checkpoint.peft.config import Config
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place


def always(config: Config) -> bool:  # noqa: ARG001
    """That there is one method of this type."""
    return True


@dataclass(frozen=True)
class Method:
    """A row of the grammar.

    Attributes
    ----------
    peft_type, title : str
        As the configuration names it, and as errors do.
    form : type
        The form of its layers, itself and no subclass.
    layouts : tuple of tuples of str
        Sets of ends of keys that a layer may have.
    load : callable
        From what a file holds of a layer to its form.
    save : callable
        From a form and its place to arrays by end of their keys.
    configure : callable
        From all forms to the part of the configuration that depends on them.
    chosen : callable
        Whether a configuration of ``peft_type`` means this row.
    shared : tuple of str
        Expressions for the keys of what belongs to the whole model.
    share : callable, optional
        From all forms to the arrays of those keys.
    position : callable, optional
        Where a layer stands in the model, for methods that number layers.
    needs_model : bool
        Whether nothing can be read without the base model.
    by_value : bool
        Whether ``load`` looks at values, so that shapes alone do not do.
    ignored : tuple of str
        Ends of keys that layers may have beside a layout.
    conv1d : bool
        Whether PEFT has it for weights that are stored inputs by outputs.
    places : tuple of str
        Ends of keys whose tensors hold integers.
    remedy : str
        What errors say to do about a file without layers.
    """

    peft_type: str
    title: str
    form: type[Form]
    layouts: tuple[tuple[str, ...], ...]
    load: Callable[[Found], Form]
    save: Callable[[Any, Place], Arrays]
    configure: Callable[[Mapping[str, Any]], dict[str, Any]]
    chosen: Callable[[Config], bool] = always
    shared: tuple[str, ...] = ()
    share: Callable[[Mapping[str, Any]], Arrays] | None = None
    position: Callable[[Found], int] | None = None
    needs_model: bool = False
    by_value: bool = False
    ignored: tuple[str, ...] = ()
    conv1d: bool = True
    places: tuple[str, ...] = ()
    remedy: str = ""


_LORA = ("lora_A.weight", "lora_B.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_GRALORA = ("gralora_A", "gralora_B")
_PSOFT = tuple(
    ("psoft_R.weight", *(f"psoft_R.vector_{ab}" for ab in vectors))
    for vectors in ("ab", "a", "b", "")
)
_VBLORA = tuple(f"vblora_logits_{ab}" for ab in "AB")
_TOP = tuple(f"{end}_topk_{what}" for end in _VBLORA for what in ("indices", "weights"))
_UNILORA = tuple(f"unilora_{what}_{ab}" for what in ("indices", "scales") for ab in "AB")
_LEFT, _RIGHT = (((f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")) for i in (1, 2))

#: All rows; the first that a configuration chooses is taken.
METHODS = (
    Method(
        "LORA",
        "DoRA",
        RowMagnitude,
        ((*_LORA, "lora_magnitude_vector"),),
        lora.load_dora,
        lora.save_dora,
        lora.configure_dora,
        chosen=lora.is_dora,
        needs_model=True,
    ),
    Method(
        "LORA",
        "KaSA",
        DiagonalCore,
        ((*_LORA, "lora_diag"),),
        lora.load_kasa,
        lora.save_kasa,
        lora.configure_kasa,
        conv1d=False,
        chosen=lora.is_kasa,
    ),
    Method(
        "LORA",
        "MiCA",
        FixedUp,
        (_LORA,),
        lora.load_mica,
        lora.save_lora,
        lora.configure_mica,
        chosen=lora.is_mica,
    ),
    Method(
        "LORA",
        "plain LoRA",
        Product,
        (_LORA, ("lora_embedding_A", "lora_embedding_B")),
        lora.load_lora,
        lora.save_lora,
        lora.configure_lora,
    ),
    Method(
        "ADALORA",
        "AdaLoRA",
        DiagonalCore,
        (("lora_A", "lora_E", "lora_B"),),
        lora.load_adalora,
        lora.save_adalora,
        lora.configure_adalora,
    ),
    Method(
        "HIRA",
        "HiRA",
        HadamardWeight,
        (("hira_A", "hira_B"),),
        lycoris.load_hira,
        lycoris.save_hira,
        lycoris.configure_hira,
        needs_model=True,
    ),
    Method(
        "LOHA",
        "LoHa",
        HadamardProduct,
        (_LOHA,),
        lycoris.load_loha,
        lycoris.save_loha,
        lycoris.configure_loha,
        conv1d=False,
    ),
    Method(
        "LOKR",
        "LoKr",
        KroneckerProduct,
        tuple((*left, *right) for left in _LEFT for right in _RIGHT),
        lycoris.load_lokr,
        lycoris.save_lokr,
        lycoris.configure_lokr,
        conv1d=False,
    ),
    Method(
        "GRALORA",
        "GraLoRA",
        BlockGrid,
        (_GRALORA, (*_GRALORA, "gralora_A_general.weight", "gralora_B_general.weight")),
        lycoris.load_gralora,
        lycoris.save_gralora,
        lycoris.configure_gralora,
    ),
    Method(
        "VERA",
        "VeRA",
        Gains,
        (("vera_lambda_b", "vera_lambda_d"),),
        shared.load_vera,
        shared.save_vera,
        shared.configure_vera,
        shared=("vera_A", "vera_B"),
        share=shared.share_vera,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "RANDLORA",
        "RandLoRA",
        PositionalRandomSum,
        (("randlora_lambda", "randlora_gamma"),),
        shared.load_randlora,
        shared.save_randlora,
        shared.configure_randlora,
        shared=("randlora_A", "randlora_B"),
        ignored=("randlora_A", "randlora_B"),
        share=shared.share_randlora,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "TINYLORA",
        "TinyLoRA",
        CombinedCore,
        (("tinylora_A", "tinylora_B", "tinylora_P"),),
        shared.load_tinylora,
        shared.save_tinylora,
        shared.configure_tinylora,
        shared=(r"tinylora_v\.\d+",),
        share=shared.share_tinylora,
        position=shared.position_of_tinylora,
        by_value=True,
    ),
    Method(
        "PSOFT",
        "LoRA-XS",
        FixedSides,
        _PSOFT,
        sides.load_free,
        sides.save_free,
        sides.configure_free,
        chosen=sides.is_free,
        conv1d=False,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "PSOFT",
        "PSOFT",
        RotatedCore,
        _PSOFT,
        sides.load_psoft,
        sides.save_psoft,
        sides.configure_psoft,
        conv1d=False,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "FOURIERFT",
        "FourierFT",
        FourierCoefficients,
        (("fourierft_spectrum",),),
        coefficients.load_fourier,
        coefficients.save_fourier,
        coefficients.configure_fourier,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "WAVEFT",
        "WaveFT",
        WaveletCoefficients,
        (("waveft_spectrum",),),
        coefficients.load_wave,
        coefficients.save_wave,
        coefficients.configure_wave,
        needs_model=True,
        by_value=True,
    ),
    Method(
        "SHIRA",
        "SHiRA",
        Sparse,
        (("shira_weight", "shira_indices"),),
        coefficients.load_shira,
        coefficients.save_shira,
        coefficients.configure_shira,
        needs_model=True,
        by_value=True,
        conv1d=False,
        places=("shira_indices",),
    ),
    Method(
        "C3A",
        "C3A",
        BlockCirculant,
        (("c3a_kernel",),),
        coefficients.load_c3a,
        coefficients.save_c3a,
        coefficients.configure_c3a,
        conv1d=False,
    ),
    Method(
        "VBLORA",
        "VB-LoRA",
        BankFactors,
        (_VBLORA, _TOP),
        banks.load_vblora,
        banks.save_vblora,
        banks.configure_vblora,
        shared=("vblora_vector_bank",),
        share=banks.share_vblora,
        by_value=True,
        places=tuple(end for end in _TOP if end.endswith("indices")),
    ),
    Method(
        "UNILORA",
        "Uni-LoRA",
        DrawnFactors,
        (_UNILORA,),
        banks.load_unilora,
        banks.save_unilora,
        banks.configure_unilora,
        shared=("unilora_theta_d",),
        share=banks.share_unilora,
        by_value=True,
        places=tuple(end for end in _UNILORA if "indices" in end),
        remedy="; save the adapter in PEFT with save_indices=True",
    ),
    Method(
        "MISS",
        "Bone",
        WeightShards,
        (("miss_block",),),
        shards.load_bone,
        shards.save_bone,
        shards.configure_bone,
        chosen=shards.is_bone,
        needs_model=True,
        conv1d=False,
    ),
    Method(
        "MISS",
        "MiSS",
        SharedShard,
        (("miss_block",),),
        shards.load_miss,
        shards.save_miss,
        shards.configure_miss,
        needs_model=True,
        conv1d=False,
    ),
    Method(
        "DELORA",
        "DeLoRA",
        NormalizedProduct,
        (("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),),
        shards.load_delora,
        shards.save_delora,
        shards.configure_delora,
        conv1d=False,
    ),
    Method(
        "OFT",
        "OFT",
        BlockRotations,
        (("oft_R.weight",),),
        rotations.load_oft,
        rotations.save_oft,
        rotations.configure_oft,
        needs_model=True,
        conv1d=False,
    ),
    Method(
        "BOFT",
        "BOFT",
        ButterflyRotations,
        (("boft_R", "boft_s"),),
        rotations.load_boft,
        rotations.save_boft,
        rotations.configure_boft,
        needs_model=True,
        conv1d=False,
    ),
    Method(
        "HRA",
        "HRA",
        Reflections,
        (("hra_u",),),
        rotations.load_hra,
        rotations.save_hra,
        rotations.configure_hra,
        needs_model=True,
        conv1d=False,
    ),
)
