"""Variants that are plain LoRA, trained by a rule of its own."""

from __future__ import annotations

from lowrank_sp import updates
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.catalog._variant import Axis, Variant
from lowrank_sp.updates import Rule


def _trained(name: str, reference: str, rule: Rule) -> Variant:
    return Variant(
        name,
        Axis.RULE,
        reference,
        r"s B A",
        forms.Product.create,
        trainable="r * (m + n)",
        rank_bound="r",
        rule=rule,
        peft="LoraConfig",
    )


RULES = [
    _trained("LoRA+", "hayou2024loraplus", updates.LoRAPlus()),
    _trained("ScaledGD", "tong2021accelerating", updates.ScaledGD()),
    _trained("Riemannian-preconditioned LoRA", "zhang2024riemannian", updates.ScaledAdamW()),
    _trained("RiemannianGD", "vandereycken2013low", updates.RiemannianGD()),
    _trained("LoRA-Pro", "wang2025lorapro", updates.LoRAPro()),
    _trained("AltLoRA", "yu2025altlora", updates.AltLoRA()),
    _trained("AltLoRA+", "yu2025altlora", updates.AltLoRAPlus()),
    Variant(
        "LoRA-FA",
        Axis.RULE,
        "zhang2023lorafa",
        r"s B A",
        forms.FixedDown.create,
        trainable="r * m",
        rank_bound="r",
        rule=updates.FrozenDown(),
        peft="LoraConfig",
    ),
    _trained("LoRA-RITE", "yen2025lorarite", updates.LoRARite()),
    _trained("LoFT", "tastan2026loft", updates.LoFT()),
    _trained("RefLoRA", "zhang2025reflora", updates.RefLoRA()),
    _trained("RefLoRA-S", "zhang2025reflora", updates.RefLoRAScalar()),
    _trained("BaLoRA", "castin2026balanced", updates.BaLoRA()),
    _trained("nBAR", "li2024implicit", updates.NBAR()),
    _trained("oBAR", "li2024implicit", updates.OBAR()),
    _trained("LoRA-Muon", "cesista2026loramuon", updates.LoRAMuon()),
    _trained("Spectron", "janson2026stabilizing", updates.Spectron()),
    _trained("AdaPreLoRA", "bian2026adaprelora", updates.AdaPreLoRA()),
    _trained("Flat-LoRA", "li2025flatlora", updates.AdamW()),
    _trained("LoRA-SAM", "foret2021sharpness", updates.SAM(updates.AdamW())),
    _trained("EFMLoRA", "deng2025flat", updates.EFlat(updates.AdamW())),
]
