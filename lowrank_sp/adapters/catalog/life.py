"""Published methods for the life of a model: before, beside and after an adapter is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from lowrank_sp import updates
from lowrank_sp.adapters import compensate, compress, federated, serving, subspaces
from lowrank_sp.adapters.algebra import merge
from lowrank_sp.updates import Displacement


class Stage(StrEnum):
    """Where in the life of a model a method is of use."""

    PRETRAINING = "pre-training"
    CONTINUAL = "continual learning"
    SAFETY = "safety"
    UNLEARNING = "unlearning"
    MERGING = "merging"
    FEDERATED = "federated fine-tuning"
    QUANTIZED = "quantized bases"
    COMPRESSED = "compressed bases"
    SERVING = "serving"


@dataclass(frozen=True)
class Method:
    """One row: a name, and the function here that does it.

    Attributes
    ----------
    name : str
    stage : Stage
    reference : str
        Key in the bibliography.
    formula : str
        What it does, in LaTeX.
    function : callable
        A function, or the class of a rule.
    needs : tuple of str
        The arguments that have no default, by name.
    options : dict
        Further arguments that make the function this method.

    Examples
    --------
    >>> from lowrank_sp.adapters.catalog import METHODS
    >>> METHODS["FFA-LoRA"].function.__name__, METHODS["FFA-LoRA"].needs
    ('ffa', ('adapters',))
    >>> METHODS["Lotus"].call(rank=8).when
    Displacement(gap=50, least=0.1)
    """

    name: str
    stage: Stage
    reference: str
    formula: str
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> Callable[..., Any]:
        """The function, with the options filled in."""
        return partial(self.function, **self.options)


def _all(stage: Stage, *rows: tuple[Any, ...]) -> list[Method]:
    return [Method(name, stage, *rest) for name, *rest in rows]


_BY_MOMENT = ("weight", "rank", "second_moment")

_ROWS = [
    *_all(
        Stage.PRETRAINING,
        ("GaLore", "zhao2024galore", r"W - \eta P\,\mathrm{Adam}(P^T G)", updates.GaLore),
        (
            "Q-GaLore",
            "zhang2024qgalore",
            r"\mathrm{round}(W - \eta \hat P\,\mathrm{Adam}(\hat P^T G))",
            updates.QGaLore,
        ),
        (
            "Lotus",
            "miao2026lotus",
            r"W - \eta P\,\mathrm{Adam}(P^T G)",
            updates.GaLore,
            (),
            {"when": Displacement()},
        ),
        (
            "Fira",
            "chen2024fira",
            r"W - \eta (P\,\mathrm{Adam}(P^T G) + (I - P P^T) G\,\mathrm{diag}(\varphi))",
            updates.Fira,
        ),
        ("APOLLO", "zhu2024apollo", r"W - \eta G\,\mathrm{diag}(\varphi)", updates.APOLLO),
        ("APOLLO-Mini", "zhu2024apollo", r"W - \eta \varphi\, G", updates.APOLLOMini),
        ("LoQT", "loeschcke2024loqt", r"Q + P B", updates.LoQT),
        ("LORO", "mo2025loro", r"H_r(B A - \eta P_T(G))", updates.LORO),
        (
            "ReLoRA",
            "lialin2023relora",
            r"W + s B A,\; B \leftarrow 0",
            updates.merge_and_restart,
            ("weight", "up", "down", "state"),
        ),
        (
            "SLTrain",
            "han2024sltrain",
            r"s B A \oplus_{\mathcal I} v",
            updates.low_rank_plus_sparse,
            ("up", "down", "values", "support"),
        ),
    ),
    *_all(
        Stage.CONTINUAL,
        (
            "O-LoRA",
            "wang2023olora",
            r"\ell + \lambda \sum_i \lVert A_i A^T \rVert^2",
            subspaces.overlap_penalty,
            ("down", "earlier"),
        ),
        (
            "null-space projection",
            "saha2021gradient",
            r"\Delta (I - V V^T)",
            subspaces.restricted,
            ("adapter", "inputs"),
        ),
        (
            "InfLoRA",
            "liang2024inflora",
            r"A = U_r^T,\; (I - P) C = U \Sigma V^T",
            subspaces.inflora,
            _BY_MOMENT,
        ),
        (
            "OSF",
            "nayak2026sculpting",
            r"W_k + (I - U_k U_k^T) B S A (I - V_k V_k^T)",
            subspaces.TrailingPart.of_weight,
            ("weight",),
        ),
    ),
    *_all(
        Stage.SAFETY,
        (
            "Safe LoRA",
            "hsu2024safelora",
            r"C \Delta \text{ where } \cos(C \Delta, \Delta) \le \tau",
            subspaces.safe_lora,
            ("adapter", "outputs"),
        ),
        (
            "SaLoRA",
            "li2025salora",
            r"W + (I - U U^T) B A",
            subspaces.SafeProduct.for_task,
            ("weight", "rank", "protected", "second_moment"),
        ),
        (
            "GuardSpace",
            "zhang2026guardrail",
            r"W + (B A - B_0 A_0) (I - V V^T)",
            subspaces.BlindProduct.for_inputs,
            ("weight", "rank", "hidden", "second_moment"),
        ),
    ),
    *_all(
        Stage.UNLEARNING,
        (
            "task-vector negation",
            "ilharco2023editing",
            r"W - \lambda \Delta",
            subspaces.negated,
            ("adapter",),
        ),
        (
            "LoKU",
            "cha2025towards",
            r"\min \lVert \mathrm{diag}(d) (W - B A) \rVert",
            subspaces.fila,
            ("weight", "rank", "importance"),
        ),
    ),
    *_all(
        Stage.MERGING,
        ("cat", "mangrulkar2022peft", r"\sum w_i \Delta_i", merge.cat, ("deltas",)),
        (
            "TIES",
            "yadav2023ties",
            r"\text{mean of what has the elected sign}",
            merge.entrywise,
            ("deltas", "rank"),
            {"rule": merge.ties(0.2)},
        ),
        (
            "DARE",
            "yu2024dare",
            r"\sum w_i \Delta_i \circ M_i / p",
            merge.entrywise,
            ("deltas", "rank"),
            {"rule": merge.dare(0.2)},
        ),
        (
            "KnOTS",
            "stoica2025knots",
            r"U \,\mathrm{TIES}(\Sigma V_i^T)",
            merge.knots,
            ("deltas",),
            {"rule": merge.ties(0.2)},
        ),
        ("TSV", "gargiulo2025tsv", r"\text{whitened } [U_i], [V_i]", merge.tsv, ("deltas",)),
    ),
    *_all(
        Stage.FEDERATED,
        ("FedIT", "zhang2024building", r"\bar B \bar A", federated.fedit, ("adapters",)),
        (
            "FLoRA",
            "wang2024flora",
            r"W + \sum p_k B_k A_k",
            federated.flora,
            ("adapters",),
        ),
        (
            "FedEx-LoRA",
            "singhal2025fedex",
            r"\bar B \bar A,\; W + \sum p_k B_k A_k - \bar B \bar A",
            federated.fedex,
            ("adapters",),
        ),
        (
            "FFA-LoRA",
            "sun2024improving",
            r"\bar B A_0",
            federated.ffa,
            ("adapters",),
        ),
        (
            "RoLoRA",
            "chen2025robust",
            r"\bar B A,\; B \bar A \text{ in turn}",
            federated.rolora,
            ("adapters", "frozen"),
        ),
        (
            "FlexLoRA",
            "bai2024federated",
            r"[\sum p_k B_k A_k]_{r_k}",
            federated.flexlora,
            ("adapters",),
        ),
        (
            "LoRA-FAIR",
            "bian2025lorafair",
            r"(\bar B + E A^T (A A^T + \lambda I)^{-1}) \bar A",
            federated.lora_fair,
            ("adapters",),
        ),
        (
            "FLoRA-NA",
            "nguyen2025flora",
            r"[\sum p_k B_k A_k]_r",
            federated.flora_na,
            ("adapters",),
        ),
    ),
    *_all(
        Stage.QUANTIZED,
        ("LoRC", "yao2024lorc", r"Q + E_r", compensate.lorc, ("weight", "rank")),
        (
            "LQER",
            "zhang2024lqer",
            r"Q + (E S)_r S^{-1}",
            compensate.lqer,
            ("weight", "rank", "magnitude"),
        ),
        (
            "QERA-approx",
            "zhang2025qera",
            r"Q + (E S)_r S^{-1}",
            compensate.qera_approx,
            ("weight", "rank", "mean_square"),
        ),
        (
            "QERA",
            "zhang2025qera",
            r"Q + (E C^{1/2})_r C^{-1/2}",
            compensate.qera,
            _BY_MOMENT,
        ),
        (
            "EoRA",
            "liu2024eora",
            r"Q + (E M)_r M^{-1},\; M M^T = C",
            compensate.qera,
            _BY_MOMENT,
        ),
        (
            "LQ-LoRA",
            "guo2024lqlora",
            r"Q + D_1^{-1} (D_1 E D_2)_r D_2^{-1}",
            compensate.lq_lora,
            ("weight", "rank", "fisher"),
        ),
        (
            "SRR",
            "cho2026preserve",
            r"q(W - W_k) + B A",
            compensate.srr,
            _BY_MOMENT,
        ),
        (
            "SVDQuant",
            "li2025svdquant",
            r"(q(R) + (W D)_r) D^{-1}",
            compensate.svdquant,
            ("weight", "rank"),
        ),
    ),
    *_all(
        Stage.COMPRESSED,
        ("SVD-LLM", "wang2025svdllm", r"(W M)_r M^{-1}", compress.svd_llm, _BY_MOMENT),
        (
            "ASVD",
            "yuan2023asvd",
            r"(W D)_r D^{-1}",
            compress.asvd,
            ("weight", "rank", "magnitude"),
        ),
    ),
    *_all(
        Stage.SERVING,
        (
            "JD-Full",
            "gabrielsson2025compress",
            r"B_i A_i \approx U \Sigma_i V^T",
            serving.jd_full,
            ("adapters", "rank"),
        ),
        (
            "JD-Diag",
            "gabrielsson2025compress",
            r"B_i A_i \approx U \mathrm{diag}(s_i) V^T",
            serving.jd_diag,
            ("adapters", "rank"),
        ),
        (
            "clustered JD",
            "gabrielsson2025compress",
            r"B_i A_i \approx U_{c(i)} \Sigma_i V_{c(i)}^T",
            serving.jd_clustered,
            ("adapters", "rank", "clusters"),
        ),
    ),
]

#: All methods by name.
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
