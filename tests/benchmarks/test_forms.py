"""Forms of augmented rank on a 4096 x 4096 layer: applied, beside forming the update first.

``pytest tests/benchmarks/test_forms.py``; a few minutes. ``peak MB`` is what a call allocates at
most, its output included, by NumPy's count; the factors and the update have ``factors MB`` and
64 MB. The peer is what PEFT does: the update as a dense array, from products of PyTorch's or
NumPy's, and one product with it.
"""

import tracemalloc

import numpy as np
import pytest
import torch

from lowrank_sp.adapters import forms
from lowrank_sp.updates import random_support

SIZE = 4096
SHAPE = (SIZE, SIZE)
WEIGHT = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
#: Takes the place of the weight where its values do not matter.
LIKE = np.broadcast_to(np.float32(1), SHAPE)


def sparse():
    places = random_support(SHAPE, 0.03, like=LIKE, rng=0)
    return forms.ProductPlusSparse.create(LIKE, 16, places=places, rng=0)


FORMS = {
    "LoHa r=16": lambda: forms.HadamardProduct.create(LIKE, 16, rng=0),
    "LoHa r=64": lambda: forms.HadamardProduct.create(LIKE, 64, rng=0),
    "ABBA r=8": lambda: forms.HadamardProduct.create(LIKE, 8, rng=0),
    "HiRA r=32": lambda: forms.HadamardWeight.create(WEIGHT, 32, rng=0),
    "LoKr r=16": lambda: forms.KroneckerProduct.create(LIKE, 16, rng=0),
    "KronA 64 x 64": lambda: forms.KroneckerProduct.create(LIKE, 64, rng=0),
    "MoRA r=16, type 1": lambda: forms.SharedSquare.create(LIKE, 16),
    "MoRA r=16, type 6": lambda: forms.RotatedSquare.create(LIKE, 16),
    "RandLoRA r=32": lambda: forms.PositionalRandomSum.create(LIKE, 32, rng=0),
    "SLTrain r=16, 3 %": sparse,
    "Sine r=16": lambda: forms.Sine.create(LIKE, 16, rng=0),
    "KRAdapter": lambda: forms.KhatriRao.create(LIKE, rng=0),
    "GraLoRA r=16, 4 blocks": lambda: forms.BlockGrid.create(LIKE, 16, blocks=4, rng=0),
    "BoRA r=16, 8 blocks": lambda: forms.DiagonalGrid.create(LIKE, 16, blocks=8, rng=0),
    "MELoRA r=2, 8 blocks": lambda: forms.BlockDiagonal.create(LIKE, 2, blocks=8, rng=0),
}


def update(form):
    """The dense update, as directly as its formula allows."""
    match form:
        case forms.HadamardProduct():
            return (form.up1 @ form.down1) * (form.up2 @ form.down2) * form.scale
        case forms.HadamardWeight():
            return form.weight * (form.up @ form.down)
        case forms.KroneckerProduct():
            kron = torch.kron if torch.is_tensor(form.left) else np.kron
            full = form.right_down is None
            return (
                kron(form.left, form.right if full else form.right @ form.right_down) * form.scale
            )
    delta = form.delta()
    return delta.to_dense() if hasattr(delta, "to_dense") else delta


def applied(form, x):
    return form.apply(x)


def materialized(form, x):
    return x @ update(form).T


@pytest.mark.parametrize("method", [applied, materialized], ids=lambda f: f.__name__)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("count", [1, 64, 2048])
@pytest.mark.parametrize("name", FORMS)
def test_apply(name, count, library, method, benchmark):
    rng = np.random.default_rng(1)
    form = FORMS[name]()
    form = form.replace(
        {k: rng.standard_normal(a.shape, dtype=np.float32) for k, a in form.parameters().items()}
    )
    x = rng.standard_normal((count, SIZE), dtype=np.float32)
    expected = materialized(form, x[:2])
    error = np.linalg.norm(method(form, x)[:2] - expected) / np.linalg.norm(expected)
    benchmark.extra_info["accuracy"] = f"{error:.1e}"
    if library == "numpy":
        tracemalloc.start()
        method(form, x)
        benchmark.extra_info["peak MB"] = round(tracemalloc.get_traced_memory()[1] / 2**20, 1)
        tracemalloc.stop()
        numbers = sum(a.size for a in form.arrays(forms.Trained, forms.Fixed).values())
        benchmark.extra_info["factors MB"] = round(4 * numbers / 2**20, 1)
    else:
        form = form.replace({k: torch.from_numpy(a) for k, a in form.arrays().items()})
        x = torch.from_numpy(x)
    with torch.no_grad():
        benchmark.pedantic(method, (form, x), rounds=3, warmup_rounds=1)
