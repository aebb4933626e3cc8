"""Round trips through files with PEFT itself, for every method that has a form here."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from lowrank_sp.adapters import forms
from lowrank_sp.checkpoint import Checkpoint, read_adapter, write_adapter
from lowrank_sp.operators import LinearOperator

pytestmark = [
    # PEFT says so of every file without projections.
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    # It wants the basis, which all layers share, once more for every layer.
    pytest.mark.filterwarnings(r"ignore:Found missing adapter keys.*randlora_A:UserWarning"),
]

EPS = np.finfo(np.float32).eps
#: In the order of the model, which is not that of the alphabet.
SHAPES = {"wide": (12, 24), "even": (24, 24), "blocks.tall": (24, 12)}
TARGETS = list(SHAPES)


class Tiny(nn.Module):
    """Layers of three shapes, one of them behind a dot."""

    def __init__(self):
        super().__init__()
        self.even_in = nn.Linear(8, 24)
        self.wide = nn.Linear(24, 12)
        self.even = nn.Linear(24, 24, bias=False)
        self.blocks = nn.ModuleDict({"tall": nn.Linear(12, 24)})

    def forward(self, x):
        x = self.even(torch.tanh(self.even_in(x)))
        return self.blocks["tall"](torch.tanh(self.wide(torch.tanh(x))))


@dataclass(frozen=True)
class Case:
    """A method of PEFT with its options, and a form made without PEFT."""

    config: type
    form: type
    options: dict = field(default_factory=dict)
    create: object = None


CASES = {
    "lora": Case(peft.LoraConfig, forms.Product, {"r": 4, "lora_alpha": 10}),
    "rslora": Case(peft.LoraConfig, forms.Product, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "patterns": Case(
        peft.LoraConfig,
        forms.Product,
        {"r": 4, "rank_pattern": {"tall": 2, "even": 3}, "alpha_pattern": {"^even": 5}},
    ),
    "dora": Case(peft.LoraConfig, forms.RowMagnitude, {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "kasa": Case(peft.LoraConfig, forms.DiagonalCore, {"r": 3, "kasa_config": peft.KasaConfig()}),
    "mica": Case(peft.LoraConfig, forms.FixedUp, {"r": 3, "init_lora_weights": "mica"}),
    "adalora": Case(
        peft.AdaLoraConfig, forms.DiagonalCore, {"init_r": 5, "lora_alpha": 7, "total_step": 10}
    ),
    "vera": Case(peft.VeraConfig, forms.Gains, {"r": 6}),
    "vera without projections": Case(
        peft.VeraConfig, forms.Gains, {"r": 6, "save_projection": False, "projection_prng_key": 3}
    ),
    "hira": Case(peft.HiraConfig, forms.HadamardWeight, {"r": 3, "rank_pattern": {"even": 2}}),
    "loha": Case(
        peft.LoHaConfig, forms.HadamardProduct, {"r": 3, "alpha": 5, "rank_pattern": {"even": 2}}
    ),
    "lokr": Case(peft.LoKrConfig, forms.KroneckerProduct, {"r": 2, "alpha": 3}),
    "lokr whole": Case(peft.LoKrConfig, forms.KroneckerProduct, {"r": 20, "alpha": 3}),
    "lokr both": Case(
        peft.LoKrConfig,
        forms.KroneckerProduct,
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr factor": Case(
        peft.LoKrConfig, forms.KroneckerProduct, {"r": 2, "alpha": 3, "decompose_factor": 6}
    ),
    "randlora": Case(
        peft.RandLoraConfig, forms.PositionalRandomSum, {"r": 5, "randlora_alpha": 30}
    ),
    "randlora sparse": Case(
        peft.RandLoraConfig, forms.PositionalRandomSum, {"r": 5, "sparse": True}
    ),
    "gralora": Case(peft.GraloraConfig, forms.BlockGrid, {"r": 4, "gralora_k": 2, "alpha": 6}),
    "gralora hybrid": Case(
        peft.GraloraConfig, forms.BlockGrid, {"r": 4, "gralora_k": 4, "hybrid_r": 3, "alpha": 6}
    ),
    "psoft": Case(peft.PsoftConfig, forms.RotatedCore, {"r": 4, "psoft_alpha": 8}),
    "psoft without vectors": Case(
        peft.PsoftConfig,
        forms.RotatedCore,
        {"r": 4, "psoft_alpha": 8, "psoft_mag_a": False, "psoft_mag_b": False},
    ),
    "tinylora": Case(peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 5}),
    "tinylora tied": Case(
        peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 5, "weight_tying": 0.34}
    ),
    "tinylora all tied": Case(
        peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 2, "weight_tying": 1.0}
    ),
}


def base() -> Tiny:
    torch.manual_seed(1)
    return Tiny().eval()


def trained(case: Case) -> peft.PeftModel:
    """A model of PEFT, all of whose trained parameters have moved."""
    model = peft.get_peft_model(base(), case.config(target_modules=TARGETS, **case.options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    weights = {name: a.numpy() for name, a in base().state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(7, 8, generator=torch.Generator().manual_seed(3))


def svd(weight):
    return torch.linalg.svd(torch.from_numpy(weight), full_matrices=False)


def outputs(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def load(folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base(), str(folder)).eval()


def assert_close(actual, expected, size=1.0):
    """Equal to the rounding of a few products in single precision."""
    error = np.linalg.norm(actual - expected)
    assert error <= 50 * EPS * max(size, np.linalg.norm(expected))


def dense(form: forms.Form) -> np.ndarray:
    delta = form.delta()
    return np.asarray(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


@pytest.fixture(params=CASES, scope="module")
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    """What PEFT has made of the case: its model, and the directory that it wrote."""
    model = trained(case)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(str(folder))
    return model, folder


def test_files_of_peft_give_its_updates(case, saved, checkpoint):
    model, folder = saved
    adapter = read_adapter(folder, model=checkpoint, svd=svd)
    assert sorted(adapter.layers) == sorted(TARGETS)
    for name, form in adapter.layers.items():
        assert type(form) is case.form
        assert form.shape == SHAPES[name]
    weights = {
        name: model.base_model.model.get_submodule(name).base_layer.weight.detach().clone().numpy()
        for name in TARGETS
    }
    x = torch.eye(24)
    for name, form in adapter.layers.items():
        layer = model.base_model.model.get_submodule(name)
        n = SHAPES[name][1]
        with torch.no_grad():
            change = (layer(x[:n, :n]) - layer.base_layer(x[:n, :n])).numpy().T
        assert_close(dense(form), change, np.linalg.norm(weights[name]))


def test_files_written_here_load_in_peft(saved, checkpoint, inputs, tmp_path):
    model, folder = saved
    adapter = read_adapter(folder, model=checkpoint, svd=svd)
    write_adapter(tmp_path, adapter, model=checkpoint, svd=svd)
    expected = outputs(model, inputs)
    assert np.linalg.norm(expected - outputs(base(), inputs)) > 0.01 * np.linalg.norm(expected)
    assert_close(outputs(load(tmp_path), inputs), expected)


def test_values_survive_reading_and_writing(saved, checkpoint, tmp_path):
    _, folder = saved
    first = read_adapter(folder, model=checkpoint, svd=svd)
    write_adapter(tmp_path, first, model=checkpoint, svd=svd)
    second = read_adapter(tmp_path, model=checkpoint, svd=svd)
    assert list(first.layers) == list(second.layers)
    for name, form in first.layers.items():
        arrays = second.layers[name].arrays()
        for key, array in form.arrays().items():
            assert np.array_equal(array, arrays[key]), (name, key)
        assert getattr(form, "scale", 1.0) == pytest.approx(
            getattr(second.layers[name], "scale", 1.0), rel=1e-15
        )
