"""One step on 64 pairs of 4096 x 4096 at rank 16 in float32: all rules, AdamW, and PEFT's wrapper.

Gradients are the same for all, and not computed. Times are to be read beside those of AdamW.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from lowrank_sp import updates
from lowrank_sp.torch import FactorOptimizer, lora_pairs

PAIRS, SIDE, RANK = 64, 4096, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(PAIRS)))
    for layer in base:
        # The weight is never read: one number stands for all of its entries.
        layer.in_features = layer.out_features = SIDE
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(SIDE, SIDE), requires_grad=False)
    names = [str(i) for i in range(PAIRS)]
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=names))
    for pair in lora_pairs(model):
        for factor in pair.factors:
            nn.init.normal_(factor, std=SIDE**-0.5)
            factor.grad = 1e-3 * torch.randn_like(factor)
    return model


def factors(model):
    return [p for p in model.parameters() if p.requires_grad]


def ours(rule, **options):
    return lambda model: FactorOptimizer(lora_pairs(model), rule, **options)


LR = 1e-6
PEERS = {
    "torch AdamW (foreach)": lambda model: torch.optim.AdamW(factors(model), LR, foreach=True),
    "torch AdamW (fused)": lambda model: torch.optim.AdamW(factors(model), LR, fused=True),
    "torch SGD (foreach)": lambda model: torch.optim.SGD(factors(model), LR, foreach=True),
    "PEFT Riemannian SGD": lambda model: create_riemannian_optimizer(
        model, torch.optim.SGD, lr=LR, foreach=True
    ),
    "PEFT Riemannian AdamW": lambda model: create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=LR, foreach=True
    ),
}
OURS = {
    "GradientDescent": updates.GradientDescent(lr=LR),
    "AdamW": updates.AdamW(lr=LR),
    "ScaledGD": updates.ScaledGD(lr=LR),
    "ScaledGD, undamped": updates.ScaledGD(lr=LR, damping=0.0),
    "ScaledAdamW": updates.ScaledAdamW(lr=LR),
    "AltLoRA": updates.AltLoRA(lr=LR),
    "FrozenDown": updates.FrozenDown(lr=LR),
    "LoRARite": updates.LoRARite(lr=LR),
    "RefLoRA": updates.RefLoRA(lr=LR),
    "BaLoRA": updates.BaLoRA(lr=LR),
    "LoRAMuon": updates.LoRAMuon(lr=LR),
    "Spectron": updates.Spectron(lr=LR),
    "RiemannianGD": updates.RiemannianGD(lr=LR),
    "StelLA": updates.StelLA(lr=LR),
}
METHODS = PEERS | {f"lowrank_sp {name}": ours(rule) for name, rule in OURS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_step(method, model, benchmark):
    optimizer = METHODS[method](model)
    benchmark.pedantic(optimizer.step, rounds=9, warmup_rounds=2)
