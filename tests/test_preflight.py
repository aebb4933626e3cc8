"""What the check before a flight finds, and that PEFT behaves as it says."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lowrank_sp.adapters import forms
from lowrank_sp.checkpoint import Adapter, Checkpoint, CheckpointError, preflight, write_adapter

SHAPES = {"layers.0": (6, 4), "layers.1": (4, 6)}
PREFIX = "base_model.model."


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter that nothing is wrong with."""
    layers = {
        name: forms.Product.create(shape, 2, alpha=4, rng=0) for name, shape in SHAPES.items()
    }
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", Adapter(layers, base="base"))
    return tmp_path / "adapter"


@pytest.fixture
def model(tmp_path) -> Checkpoint:
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal(shape) for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path / "model.safetensors")


def change(folder: Path, config=(), tensors=(), metadata=None) -> None:
    """Other values in the configuration, and other tensors; None takes one out."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict(config)}))
    path = folder / "adapter_model.safetensors"
    arrays = {**load_file(path), **dict(tensors)}
    save_file({key: a for key, a in arrays.items() if a is not None}, path, metadata=metadata)


@pytest.mark.parametrize("engine", ["peft", "vllm"])
def test_nothing_is_found_where_nothing_is_wrong(engine, folder, model):
    assert preflight(folder, engine=engine, model=model) == []


A0, B0 = (f"{PREFIX}layers.0.lora_{part}.weight" for part in "AB")
EYE = np.ones((2, 4))
#: Changes, and for each engine the severity, the layer and a part of the message, or None.
WRONG = {
    "rank": (
        {"r": 32, "rank_pattern": {}},
        {},
        {"peft": ("error", "layers.0", "rank 2 in the file and 32"), "vllm": ("error", None, "32")},
    ),
    "rank without alpha": (
        {"r": 4, "lora_alpha": 4, "rank_pattern": {r"layers\.[01]": 2}},
        {},
        {
            "peft": ("warning", "layers.0", "scale 2, not 1"),
            "vllm": ("error", "layers.0", "scale 1 instead of 2"),
        },
    ),
    "alphas": (
        {"alpha_pattern": {"layers.1": 8}},
        {},
        {"peft": None, "vllm": ("error", "layers.1", "scale 2 instead of 4")},
    ),
    "dora": (
        {"use_dora": True},
        {
            f"{PREFIX}layers.0.lora_magnitude_vector": np.ones(6),
            f"{PREFIX}layers.1.lora_magnitude_vector": np.ones(4),
        },
        {"peft": None, "vllm": ("error", None, "DoRA is refused")},
    ),
    "modules_to_save": (
        {"modules_to_save": ["score"]},
        {f"{PREFIX}score.weight": np.ones((2, 4))},
        {"peft": None, "vllm": ("error", None, "modules_to_save")},
    ),
    "bias": ({"bias": "all"}, {}, {"peft": None, "vllm": ("error", None, "biases")}),
    "foreign tensor": (
        {},
        {f"{PREFIX}score.weight": np.ones((2, 4))},
        {"peft": ("error", None, "score.weight is not a part"), "vllm": ("error", None, "score")},
    ),
    "lone factor": (
        {},
        {B0: None},
        dict.fromkeys(("peft", "vllm"), ("error", None, "lacks lora_B.weight")),
    ),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        {},
        dict.fromkeys(("peft", "vllm"), ("error", None, "at random")),
    ),
    "targets": (
        {"target_modules": ["layers.1"]},
        {},
        dict.fromkeys(("peft", "vllm"), ("error", "layers.0", "dropped")),
    ),
    "no targets": (
        {"target_modules": None},
        {},
        dict.fromkeys(("peft", "vllm"), ("error", None, "target_modules is missing")),
    ),
    "module": (
        {"target_modules": ["layers.0", "layers.1", "other"]},
        {f"{PREFIX}other.lora_A.weight": EYE, f"{PREFIX}other.lora_B.weight": EYE.T},
        dict.fromkeys(("peft", "vllm"), ("error", "other", "no module")),
    ),
    "shape": (
        {},
        {A0: np.ones((2, 5))},
        dict.fromkeys(("peft", "vllm"), ("error", "layers.0", "[5, 6] for a weight (6, 4)")),
    ),
    "method": (
        {"peft_type": "VERA", "save_projection": False},
        {A0: None},
        {"peft": ("warning", None, "drawn again"), "vllm": ("error", None, "VERA, not LORA")},
    ),
    "kasa": (
        {"kasa_config": {"beta": 0.1}},
        {f"{PREFIX}layers.{i}.lora_diag": np.ones(2) for i in (0, 1)},
        {"peft": ("warning", None, "KaSA cuts"), "vllm": ("error", None, "without its diagonal")},
    ),
    "convolution": (
        {},
        {A0: np.ones((2, 4, 3, 3)), B0: np.ones((6, 2, 1, 1))},
        {"peft": None, "vllm": ("error", "layers.0", "convolution")},
    ),
}


@pytest.mark.parametrize("engine", ["peft", "vllm"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found(kind, engine, folder, model):
    config, tensors, expected = WRONG[kind]
    change(folder, config, tensors)
    found = preflight(folder, engine=engine, model=model)
    if expected[engine] is None:
        assert found == []
        return
    severity, layer, part = expected[engine]
    assert any(
        f.severity == severity and f.layer == layer and part in f.message and f.remedy
        for f in found
    ), "\n".join(map(str, found))
    assert [f.severity for f in found] == sorted(f.severity for f in found)


def test_fingerprints_tell_bases_apart(folder, model):
    for wanted, count in ((model.fingerprint(), 0), ("sha256:other", 1)):
        change(folder, metadata={"base_fingerprint": wanted})
        found = preflight(folder, engine="peft", model=model)
        assert len(found) == count
        assert all("made for base, whose tensors are not those of" in str(f) for f in found)


def test_without_a_fingerprint_the_base_is_found_by_its_name(folder, model, tmp_path):
    """PEFT does not keep the fingerprint; a name on a hub decides nothing."""
    tensors = load_file(model.path)
    save_file(tensors, tmp_path / "copy.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, tmp_path / "other.safetensors")
    (tmp_path / "no model").mkdir()
    for name, count in {"model": 0, "copy": 0, "other": 1, "missing": 0}.items():
        change(folder, {"base_model_name_or_path": str(tmp_path / f"{name}.safetensors")})
        found = preflight(folder, engine="peft", model=model)
        assert len(found) == count, name
        assert all("other.safetensors, whose tensors are not those" in str(f) for f in found)
    for name in (str(tmp_path / "no model"), None, 5):
        change(folder, {"base_model_name_or_path": name})
        assert preflight(folder, engine="peft", model=model) == []


def test_a_missing_adapter_is_named_by_its_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such adapter config; is it the right directory"):
        preflight(tmp_path / "nowhere", engine="peft")


def test_arguments_that_no_engine_takes(folder):
    with pytest.raises(CheckpointError, match="engine must be one of peft, vllm, got 'sglang'"):
        preflight(folder, engine="sglang")
    with pytest.raises(CheckpointError, match=r"max_lora_rank must be one of 1, 8, .*, got 24"):
        preflight(folder, engine="vllm", max_lora_rank=24)


def test_rank_above_the_limit_names_the_next_one(folder):
    layers = {"layers.0": forms.Product.create((80, 70), 33, rng=0)}
    write_adapter(folder, Adapter(layers))
    (finding,) = preflight(folder, engine="vllm")
    assert "rank 33 is above 16" in finding.message
    assert finding.remedy == "start vLLM with max_lora_rank=64"
    assert preflight(folder, engine="vllm", max_lora_rank=64) == []


class Two(nn.Module):
    """The model of the adapter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])


def test_peft_scales_and_refuses_as_the_findings_say(folder):
    change(folder, {"r": 4, "lora_alpha": 4, "rank_pattern": {r"layers\.[01]": 2}})
    loaded = peft.PeftModel.from_pretrained(Two(), str(folder))
    assert loaded.base_model.model.layers[0].scaling == {"default": 2.0}
    change(folder, {"rank_pattern": {}})
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Two(), str(folder))
    change(folder, {"r": 2, "target_modules": ["layers.1"]})
    torch.manual_seed(0)
    two = Two()
    peft.PeftModel.from_pretrained(two, str(folder))
    assert type(two.layers[0]) is nn.Linear
