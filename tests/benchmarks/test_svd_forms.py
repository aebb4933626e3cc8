"""Forms between two factors, beside PEFT's layers of the same arrays, in float32.

One training step of a 2048 x 2048 layer on 256 inputs, rank 16: outputs and gradients of all
trained arrays. Accuracies are relative errors of the outputs against float64. The sparse core is
applied beside the same core as a dense matrix.
"""

import peft
import pytest
import torch

from lowrank_sp.adapters import forms

WIDTH, INPUTS, RANK = 2048, 256, 16

CONFIGS = {
    "DoRA": lambda: peft.LoraConfig(r=RANK, lora_alpha=RANK, use_dora=True, target_modules=["0"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=RANK, lora_alpha=RANK, total_step=100, target_modules=["0"]
    ),
    "VeRA": lambda: peft.VeraConfig(r=256, target_modules=["0"]),
    "PSOFT": lambda: peft.PsoftConfig(r=RANK, psoft_alpha=RANK, target_modules=["0"]),
}


def form_of(name, layer):
    """Our form with the arrays of a layer of PEFT."""
    if name == "DoRA":
        return forms.RowMagnitude(
            layer.base_layer.weight.detach(),
            layer.lora_B["default"].weight,
            layer.lora_A["default"].weight,
            layer.lora_magnitude_vector["default"].weight,
        )
    if name == "AdaLoRA":
        return forms.DiagonalCore(
            layer.lora_B["default"],
            layer.lora_E["default"][:, 0],
            layer.lora_A["default"],
            RANK / (RANK + 1e-5),
        )
    if name == "VeRA":
        return forms.Gains(
            layer.vera_B["default"],
            layer.vera_A["default"],
            layer.vera_lambda_b["default"],
            layer.vera_lambda_d["default"],
        )
    inner = layer.psoft_R["default"]
    a, b = layer._get_psoft_ab_cache_buffers("default")
    return forms.RotatedCore(b, inner.weight, inner.vector_b, inner.vector_a, a)


@pytest.mark.parametrize("who", ["lowrank_sp", "peft"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.benchmark(group="forms: one training step, 2048 x 2048, 256 inputs")
def test_training_step(benchmark, name, who):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))
    model = peft.get_peft_model(net, CONFIGS[name]())
    layer = model.base_model.model[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(0.1 * torch.randn_like(p))
    form = form_of(name, layer)
    weight = layer.base_layer.weight.detach()
    x = torch.randn(INPUTS, WIDTH)

    def outputs():
        return layer(x) if who == "peft" else form_of(name, layer).adapt(x, x @ weight.mT)

    def step():
        return torch.autograd.grad(outputs().sum(), trained)

    with torch.no_grad():
        exact = form.replace({k: a.double() for k, a in form.arrays().items()}).adapt(
            x.double(), x.double() @ weight.double().mT
        )
        benchmark.extra_info["accuracy"] = float((outputs() - exact).norm() / exact.norm())
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("core", ["jagged diagonals", "dense"])
@pytest.mark.benchmark(group="forms: sparse core of 5 diagonals, 1024 x 1024, 256 inputs")
def test_sparse_core(benchmark, core):
    torch.manual_seed(0)
    weight, x = torch.randn(1024, 1024), torch.randn(INPUTS, 1024)
    form = forms.SparseCore.create(weight, places=forms.banded_places(1024, 2, like=weight), rng=0)

    def dense():
        return (x @ form.vh.mT) @ (form.core_matrix().mT * 0.5) @ form.u.mT

    run = dense if core == "dense" else lambda: form.apply(x)
    exact = x.double() @ form.delta().to_dense().double().mT
    benchmark.extra_info["accuracy"] = float((run() - exact).norm() / exact.norm())
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
