"""Tensor forms of a layer: applied, beside forming the update and multiplying by it.

``pytest tests/benchmarks/test_tensor_forms.py``; half a minute.
"""

import numpy as np
import pytest

from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import LayerGrid
from lowrank_sp.operators import LinearOperator

SIZE = 2048
WEIGHT = np.zeros((SIZE, SIZE), np.float32)
HEADS = LayerGrid.indexed([WEIGHT] * 4, [(0, 0), (1, 0), (0, 1), (1, 1)], block=(128, SIZE))
FORMS = {
    "TensorTrain, bonds 8": lambda: forms.TensorTrain.create(WEIGHT, 8, rng=0),
    "TrainMatrix, bonds 8": lambda: forms.TrainMatrix.create(WEIGHT, 8, rng=0),
    "TrainFactors, rank 8": lambda: forms.TrainFactors.create(WEIGHT, 8, rng=0),
    "GeneratedFactors, rank 8": lambda: forms.GeneratedFactors.create(WEIGHT, 8, rng=0),
    "PairGates": lambda: forms.PairGates.create(WEIGHT, rng=0),
    "SharedTT with heads, rank 16": lambda: forms.SharedTT.create([WEIGHT] * 4, 16, grid=HEADS),
    "SharedCP with heads, rank 16": lambda: forms.SharedCP.create([WEIGHT] * 4, 16, grid=HEADS),
}


def applied(form, x):
    form = form.layer(1) if hasattr(form, "layer") else form
    return form.apply(x)


def materialized(form, x):
    form = form.layer(1) if hasattr(form, "layer") else form
    delta = form.delta()
    return x @ (delta.to_dense() if isinstance(delta, LinearOperator) else delta).T


@pytest.mark.parametrize("method", [applied, materialized], ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [1, 64, 4096])
@pytest.mark.parametrize("name", FORMS)
def test_apply(name, count, method, benchmark):
    form = FORMS[name]()
    x = np.random.default_rng(0).standard_normal((count, SIZE)).astype(np.float32)
    np.testing.assert_allclose(
        applied(form, x[:2]), materialized(form, x[:2]), rtol=1e-3, atol=1e-4
    )
    benchmark.extra_info["numbers"] = form.num_trainable
    benchmark.pedantic(method, (form, x), rounds=3, warmup_rounds=1)
