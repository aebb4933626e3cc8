"""Every variant of the catalog is built, trained on a known truth, and does what its row says."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog_cases import OPTIONS, ROWS, WEIGHTS, M, N, R, evaluated, grid_of, start_of

from lowrank_sp.adapters import catalog, forms
from lowrank_sp.adapters.catalog import CATALOG, Axis, variant
from lowrank_sp.operators import LinearOperator
from lowrank_sp.updates import Pair

DOCS = Path(__file__).parents[1] / "docs"
rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
#: Starts that leave the layer, as published.
MOVED = {"KaSA", "SLTrain", "LoRA-One", "LoRA-SB", "StelLA", "SVFT", "LoftQ", "QPiSSA"}
MOVED |= {"TT-LoRA", "TT-LoRA, interleaved", "LoRETTA", "TensorGuide", "LoRA-XS"}
MOVED |= {"C3A", "FourierFT", "VB-LoRA", "Uni-LoRA"}


def shares(start):
    """Forms and base weights of single layers."""
    if isinstance(start.form, forms.LayeredForm):
        return [(start.form.layer(k), w) for k, w in enumerate(start.weights)]
    return [(start.form, start.weight)]


def dense(form):
    delta = form.delta()
    return delta.to_dense() if isinstance(delta, LinearOperator) else delta


def test_what_the_issue_of_the_survey_lists_is_there():
    listed = """
        LoRA rsLoRA LoRA+ DoRA AdaLoRA PiSSA MiLoRA OLoRA EVA LoRA-GA LoRA-One LoRA-SB NoRA LoftQ
        QPiSSA MiCA KaSA DuDe SVDiff SVFT LoRA-XS TinyLoRA PoLAR StelLA SORSA VeRA ReLoRA COLA
        Delta-LoRA HiRA LoHa ABBA LoKr KronA RandLoRA SLTrain RoSA Sine-LoRA KRAdapter MELoRA
        GraLoRA LoTR FacT-TT FacT-TK LoRTA CaRA MetaTT-4D MetaTT-5D Tied-LoRA TT-LoRA LoRETTA
        QuanTA AltLoRA LoRA-RITE LoRA-Pro RefLoRA BaLoRA LoRA-Muon nBAR oBAR Flat-LoRA
    """
    wanted = listed.split()
    wanted += ["CorDA, instruction-previewed", "CorDA, knowledge-preserved", "MoRA, type 1"]
    wanted += ["MiSS", "Bone", "SHiRA", "C3A", "FourierFT", "WaveFT", "DeLoRA", "HRA", "OFT"]
    wanted += ["BOFT", "VB-LoRA", "Uni-LoRA", "MoRA, type 2", "MoRA, type 3", "MoRA, type 4"]
    wanted += ["MoRA, type 6", "BoRA, bi-dimensional", "BoRA, block-diversified", "ShareLoRA, A"]
    assert set(wanted) <= CATALOG.keys()


@rows
def test_sizes_are_what_the_row_says(row):
    form = start_of(row).form
    assert form.num_trainable == evaluated(row.trainable, row, form)
    assert form.rank_bound == evaluated(row.rank_bound, row, form)


@rows
def test_it_starts_where_the_layer_is_unless_it_is_published_otherwise(row):
    for k, (form, base) in enumerate(shares(start_of(row))):
        moved = np.linalg.norm(base + dense(form) - WEIGHTS[k]) / np.linalg.norm(WEIGHTS[k])
        assert moved > 1e-9 if row.name in MOVED else moved < 1e-13


@rows
def test_it_learns_a_low_rank_change(row):
    """A few steps of its own rule, or of Adam, lower the distance to the weight wanted."""
    start = start_of(row, torch.as_tensor)
    parameters = {k: p.clone().requires_grad_() for k, p in start.form.parameters().items()}
    rng = np.random.default_rng(1)
    x = torch.as_tensor(rng.standard_normal((64, N)))
    change = rng.standard_normal((M, R)) @ rng.standard_normal((R, N)) / N
    targets = [x @ torch.as_tensor(w + change).T for w in WEIGHTS]

    def loss():
        now = start._replace(form=start.form.replace(parameters))
        errors = [
            form.adapt(x, x @ base.mT) - targets[k] for k, (form, base) in enumerate(shares(now))
        ]
        return sum((error**2).mean() for error in errors)

    adam = torch.optim.Adam(parameters.values(), lr=1e-3)
    pair = {"up", "down"} <= parameters.keys() and row.rule is not None
    state = row.rule.init(parameters["up"], parameters["down"]) if pair else None
    first = loss().item()
    for _ in range(12):
        adam.zero_grad()
        value = loss()
        value.backward()
        if not pair:
            adam.step()
            continue
        factors = Pair(parameters["up"].detach(), parameters["down"].detach())
        grads = [parameters[k].grad for k in ("up", "down")]
        up, down, state = row.rule.step(*factors, *grads, state, scale=start.form.scale)
        others = [p for k, p in parameters.items() if k not in ("up", "down")]
        for p, new in zip((parameters["up"], parameters["down"]), (up, down), strict=True):
            p.data, p.grad = new, None
        if others:
            adam.step()
    assert loss().item() < first


@rows
def test_alpha_is_scaled_as_the_row_says(row):
    weight = WEIGHTS if row.layered else WEIGHTS[0]
    arguments = {"rng": 0, "grid": grid_of(row), "options": OPTIONS.get(row.name)}
    rank = R if row.takes("rank") else None
    if row.needs is not None:
        return
    if row.scale is catalog.Scale.NONE:
        with pytest.raises(ValueError, match="has no use for alpha"):
            row.start(weight, rank, alpha=6.0, **arguments)
        return
    form = row.start(weight, rank, alpha=6.0, **arguments).form
    # Delta-LoRA counts its product 1 + gain times.
    times = 1 + row.options.get("gain", 0.0)
    assert form.scale == pytest.approx(times * row.scale.of(6.0, R))


def test_layers_of_cara_start_from_a_normal_distribution():
    factor = variant("cara").start([(8, 6)] * 900, 4, rng=0).form.factors[0]
    assert abs(np.std(factor) / np.sqrt(2 / 904) - 1) < 0.1
    assert np.linalg.norm(factor.T @ factor - np.eye(4)) > 1


def test_arguments_that_a_row_cannot_use_are_refused():
    with pytest.raises(ValueError, match="SVDiff has no use for rank"):
        variant("svdiff").start(WEIGHTS[0], 2)
    with pytest.raises(ValueError, match="PiSSA needs rank"):
        variant("pissa").start(WEIGHTS[0])
    with pytest.raises(ValueError, match="EVA needs components"):
        variant("eva").start(WEIGHTS[0], 2)
    with pytest.raises(ValueError, match="LoRA has no use for gradient"):
        variant("lora").start(WEIGHTS[0], 2, gradient=WEIGHTS[0])
    with pytest.raises(ValueError, match="LoRA-GA has no use for components"):
        variant("lora-ga").start(WEIGHTS[0], 2, components=WEIGHTS[0], gradient=WEIGHTS[0])
    with pytest.raises(ValueError, match="MetaTT-4D needs grid with the axes layer, type"):
        variant("metatt-4d").start(WEIGHTS, 2)
    with pytest.raises(ValueError, match="LoRETTA has the options bond, got order"):
        variant("loretta").start(WEIGHTS[0], 2, options={"order": 2})
    with pytest.raises(ValueError, match="did you mean one of"):
        variant("lorra")
    with pytest.raises(TypeError, match=r"LoTR makes one form of many layers.* or \[weight\]"):
        variant("lotr").start(WEIGHTS[0], 2)
    with pytest.raises(TypeError, match="DoRA makes a form of one weight, got a list of 4"):
        variant("dora").start(WEIGHTS, 2)


def test_the_tables_of_the_guide_are_those_of_the_catalog():
    tables = runpy.run_path(str(DOCS / "make_catalog_table.py"))["tables"]()
    for file, text in tables.items():
        assert (DOCS / "_tables" / file).read_text(encoding="utf-8") == text


def test_every_reference_is_in_the_bibliography():
    text = (DOCS / "references.bib").read_text(encoding="utf-8")
    keys = set(re.findall(r"@\w+\{([^,]+),", text))
    assert {row.reference for row in ROWS} <= keys
    assert {row.axis for row in ROWS} == set(Axis)
