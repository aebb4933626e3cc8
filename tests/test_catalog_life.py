"""Every method of the catalog runs on small data under the arguments that its row names."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from lowrank_sp.adapters import catalog, federated, subspaces
from lowrank_sp.adapters.catalog import METHODS, Stage
from lowrank_sp.adapters.forms import Product
from lowrank_sp.updates import AdamW, Rule
from lowrank_sp.updates.full_weight import ProjectedRule

M, N, R = 24, 16, 2
rng = np.random.default_rng(0)
WEIGHT, INPUTS = rng.standard_normal((M, N)), rng.standard_normal((200, N))
UP, DOWN = rng.standard_normal((M, R)), rng.standard_normal((R, N))
ADAPTER = Product(UP, DOWN)
#: Of four clients, who have trained one factor.
ADAPTERS = [Product(rng.standard_normal((M, R)), DOWN) for _ in range(4)]
DATA = {
    "weight": WEIGHT,
    "rank": R,
    "up": UP,
    "down": DOWN,
    "state": AdamW().init(UP, DOWN),
    "values": np.ones(5),
    "support": np.arange(5) * 7,
    "earlier": rng.standard_normal((3, N)),
    "second_moment": INPUTS.T @ INPUTS / len(INPUTS),
    "magnitude": abs(INPUTS).mean(axis=0),
    "mean_square": (INPUTS**2).mean(axis=0),
    "fisher": rng.standard_normal((M, N)) ** 2,
    "importance": np.linspace(0.1, 1, M),
    "adapter": ADAPTER,
    "inputs": subspaces.input_span(inputs=INPUTS[:3]).complement,
    "outputs": subspaces.span(UP),
    "protected": subspaces.span(rng.standard_normal((M, 3))),
    "hidden": subspaces.input_span(inputs=INPUTS[:3]),
    "adapters": ADAPTERS,
    "frozen": "down",
    "deltas": [adapter.delta() for adapter in ADAPTERS],
    "clusters": 2,
}
rows = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS.keys())


@rows
def test_it_runs_on_what_its_row_says_that_it_needs(row):
    made = row.call(**{name: DATA[name] for name in row.needs})
    assert made is not None
    if isinstance(made, Rule):
        up, down, state = made.step(UP, DOWN, UP, DOWN, made.init(UP, DOWN))
        assert np.linalg.norm(up - UP) + np.linalg.norm(down - DOWN) > 0
    elif isinstance(made, ProjectedRule):
        made = row.call(rank=1)
        new, state = made.step(WEIGHT, WEIGHT, made.init(WEIGHT))
        assert state["renewals"] == 1
        assert 0 < np.linalg.norm(new - WEIGHT) < np.linalg.norm(WEIGHT)
    elif isinstance(made, federated.Aggregate):
        ideal = sum(0.25 * c.delta().to_dense() for c in ADAPTERS)
        error = np.linalg.norm(made.update().to_dense() - ideal)
        assert abs(error - made.error) <= 1e-9


@rows
def test_what_it_needs_is_what_has_no_default(row):
    parameters = inspect.signature(row.function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.name not in row.options]
    # Some defaults stand for an argument that one of several has to fill.
    filled = {"inputs", "second_moment", "rank"}
    assert set(required) <= set(row.needs) <= set(required) | filled
    with pytest.raises(TypeError, match="unexpected keyword"):
        row.call(nonsense=1, **{name: DATA[name] for name in row.needs})


@pytest.mark.parametrize("name", ["PiSSA", "LoftQ", "QPiSSA"])
def test_a_base_has_the_dtype_of_its_weight(name):
    for dtype in (np.float16, np.float32, np.float64):
        form, base = catalog.variant(name).start(WEIGHT.astype(dtype), R, rng=0)
        assert base.dtype == dtype
        lost = np.linalg.norm(base + form.delta().to_dense() - WEIGHT) / np.linalg.norm(WEIGHT)
        assert lost < (0.1 if "Q" in name else 1e-3)


def test_what_the_issue_of_the_life_of_a_model_lists_is_there():
    listed = """
        GaLore Q-GaLore Lotus Fira APOLLO APOLLO-Mini LoQT ReLoRA LORO SLTrain O-LoRA InfLoRA OSF
        SaLoRA LoKU FedIT FLoRA FedEx-LoRA FFA-LoRA RoLoRA FlexLoRA LoRA-FAIR FLoRA-NA LoRC LQER
        QERA EoRA LQ-LoRA SVDQuant SVD-LLM ASVD JD-Full JD-Diag TIES DARE KnOTS TSV SRR
    """
    assert {*listed.split(), "Safe LoRA", "task-vector negation"} <= METHODS.keys()
    assert {row.stage for row in METHODS.values()} == set(Stage)


def test_every_reference_is_in_the_bibliography():
    text = (Path(__file__).parents[1] / "docs" / "references.bib").read_text(encoding="utf-8")
    keys = set(re.findall(r"@\w+\{([^,]+),", text))
    assert {row.reference for row in METHODS.values()} <= keys


def test_a_name_is_a_variant_and_a_method_where_both_are_one():
    """What is trained as a form and as a rule of its own: the same publication."""
    both = catalog.CATALOG.keys() & METHODS.keys()
    assert both <= {"SLTrain", "ReLoRA", "O-LoRA", "InfLoRA", "FFA-LoRA"}
    assert all(catalog.CATALOG[name].reference == METHODS[name].reference for name in both)
