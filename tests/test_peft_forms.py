"""Round trips through files with PEFT itself, for every method that has a form here."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_sp.adapters import forms
from lowrank_sp.checkpoint import (
    Adapter,
    Checkpoint,
    CheckpointError,
    check_same_base,
    read_adapter,
    write_adapter,
)
from lowrank_sp.checkpoint.peft import METHODS
from lowrank_sp.operators import LinearOperator

pytestmark = [
    # PEFT says so of every file without projections.
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    # It looks for modules by the names of AdaLoRA's masks, and takes an empty layer for broken.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. 2 LoRA tensor:peft.utils.warning.PeftWarning"
    ),
    # SHiRA makes a sparse tensor without saying whether PyTorch shall check it.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
    # It wants the basis, which all layers share, once more for every layer.
    pytest.mark.filterwarnings(r"ignore:Found missing adapter keys.*randlora_A:UserWarning"),
]

EPS = np.finfo(np.float32).eps
#: In the order of the model, which is not that of the alphabet.
SHAPES = {"wide": (12, 24), "even": (24, 24), "blocks.tall": (24, 12)}
TARGETS = list(SHAPES)


class Tiny(nn.Module):
    """Layers of three shapes, one of them behind a dot."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.even_in = nn.Linear(8, 24)
        self.wide = linear(24, 12)
        self.even = linear(24, 24)
        self.blocks = nn.ModuleDict({"tall": linear(12, 24)})

    def forward(self, x):
        x = self.even(torch.tanh(self.even_in(x)))
        return self.blocks["tall"](torch.tanh(self.wide(torch.tanh(x))))


def transposed(inputs, outputs):
    """A layer of GPT-2, which stores inputs by outputs."""
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.weight, std=0.2)
    return layer


@dataclass(frozen=True)
class Case:
    """A method of PEFT, the form that it has here, its options, and the kind of layers."""

    config: type
    form: type
    options: dict = field(default_factory=dict)
    linear: Callable[[int, int], nn.Module] = nn.Linear


CASES = {
    "lora": Case(peft.LoraConfig, forms.Product, {"r": 4, "lora_alpha": 10}),
    "rslora": Case(peft.LoraConfig, forms.Product, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "patterns": Case(
        peft.LoraConfig,
        forms.Product,
        {"r": 4, "rank_pattern": {"tall": 2, "even": 3}, "alpha_pattern": {"^even": 5, "wide": 3}},
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
    "psoft, free": Case(
        peft.PsoftConfig, forms.FixedSides, {"r": 4, "psoft_alpha": 8, "psoft_orth": False}
    ),
    "tinylora": Case(peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 5}),
    "tinylora tied": Case(
        peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 5, "weight_tying": 0.34}
    ),
    "tinylora all tied": Case(
        peft.TinyLoraConfig, forms.CombinedCore, {"r": 2, "u": 2, "weight_tying": 1.0}
    ),
}

CASES |= {
    "fourierft": Case(peft.FourierFTConfig, forms.FourierCoefficients, {"n_frequency": 40}),
    "fourierft, patterns": Case(
        peft.FourierFTConfig,
        forms.FourierCoefficients,
        {
            "n_frequency": 40,
            "n_frequency_pattern": {"wide": 30},
            "scaling": 70.5,
            "random_loc_seed": 3,
        },
    ),
    "waveft": Case(peft.WaveFTConfig, forms.WaveletCoefficients, {"n_frequency": 40}),
    "waveft, proportional": Case(
        peft.WaveFTConfig,
        forms.WaveletCoefficients,
        {
            "n_frequency": 40,
            "wavelet_family": "db4",
            "random_loc_seed": 3,
            "proportional_parameters": True,
        },
    ),
    "shira": Case(peft.ShiraConfig, forms.Sparse, {"r": 2}),
    "c3a": Case(peft.C3AConfig, forms.BlockCirculant, {"block_size": 6}),
    "c3a, patterns": Case(
        peft.C3AConfig,
        forms.BlockCirculant,
        {"block_size": 4, "block_size_pattern": {"even": 3, "wide": 12}},
    ),
    "vblora": Case(
        peft.VBLoRAConfig,
        forms.BankFactors,
        {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 3},
    ),
    "vblora, largest": Case(
        peft.VBLoRAConfig,
        forms.BankFactors,
        {"r": 3, "num_vectors": 10, "vector_length": 4, "save_only_topk_weights": True},
    ),
    "unilora": Case(
        peft.UniLoraConfig, forms.DrawnFactors, {"r": 3, "theta_d_length": 20, "save_indices": True}
    ),
    "miss": Case(peft.MissConfig, forms.SharedShard, {"r": 5}),
    "miss, mini": Case(
        peft.MissConfig, forms.SharedShard, {"r": 4, "init_weights": "mini", "mini_r": 6}
    ),
    "bone": Case(peft.MissConfig, forms.WeightShards, {"r": 4, "init_weights": "bat"}),
    "delora": Case(
        peft.DeloraConfig,
        forms.NormalizedProduct,
        {"r": 3, "delora_lambda": 3, "rank_pattern": {"even": 2}},
    ),
    "oft": Case(peft.OFTConfig, forms.BlockRotations, {"oft_block_size": 4}),
    "oft of three terms": Case(
        peft.OFTConfig, forms.BlockRotations, {"oft_block_size": 4, "num_cayley_neumann_terms": 3}
    ),
    "oft, exact": Case(
        peft.OFTConfig,
        forms.BlockRotations,
        {"oft_block_size": 6, "use_cayley_neumann": False},
    ),
    "oft, shared": Case(
        peft.OFTConfig, forms.BlockRotations, {"oft_block_size": 6, "block_share": True}
    ),
    "boft": Case(peft.BOFTConfig, forms.ButterflyRotations, {"boft_block_size": 6}),
    "hra": Case(peft.HRAConfig, forms.Reflections, {"r": 4}),
    "hra, orthogonal": Case(
        peft.HRAConfig, forms.Reflections, {"r": 4, "apply_GS": True, "init_weights": False}
    ),
}

#: The same for layers of GPT-2, as far as PEFT has them.
WITHOUT_CONV1D = {peft.LoHaConfig, peft.LoKrConfig, peft.PsoftConfig, peft.ShiraConfig}
WITHOUT_CONV1D |= {peft.C3AConfig, peft.MissConfig, peft.DeloraConfig, peft.HRAConfig}
WITHOUT_CONV1D |= {peft.OFTConfig, peft.BOFTConfig}
for name, of_linear in list(CASES.items()):
    if of_linear.config not in WITHOUT_CONV1D and name != "kasa":
        options = {**of_linear.options, "fan_in_fan_out": True}
        CASES[f"{name}, Conv1D"] = Case(of_linear.config, of_linear.form, options, transposed)


def base(linear=nn.Linear) -> Tiny:
    torch.manual_seed(1)
    return Tiny(linear).eval()


def checkpoint_of(model: nn.Module, folder: Path) -> Checkpoint:
    save_file({n: a.numpy() for n, a in model.state_dict().items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def trained(case: Case) -> peft.PeftModel:
    """A model of PEFT, all of whose trained parameters have moved."""
    model = peft.get_peft_model(
        base(case.linear), case.config(target_modules=TARGETS, **case.options)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(autouse=True, scope="module")
def without_cuda():
    """BOFT would compile an extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
        yield


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory) -> Checkpoint:
    return checkpoint_of(base(case.linear), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(7, 8, generator=torch.Generator().manual_seed(3))


def svd(weight):
    return torch.linalg.svd(torch.from_numpy(weight), full_matrices=False)


def outputs(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def load(folder: Path, linear=nn.Linear) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base(linear), str(folder)).eval()


def changes(model: peft.PeftModel) -> dict[str, np.ndarray]:
    """What PEFT adds to every weight, outputs by inputs, and beside it the size of the weight."""
    found = {}
    for name, (_, n) in SHAPES.items():
        layer = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            found[name] = (layer(torch.eye(n)) - layer.base_layer(torch.eye(n))).numpy().T
    return found


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
    expected = changes(model)
    for name, form in adapter.layers.items():
        weight = checkpoint.tensors[f"{name}.weight"].read()
        assert_close(dense(form), expected[name], np.linalg.norm(weight))


def test_merging_is_that_of_peft(case, saved, checkpoint):
    model, folder = saved
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, form in read_adapter(folder, model=checkpoint, svd=svd).layers.items():
        # That of the model, of which KaSA has cut a part.
        weight = model.base_model.model.get_submodule(name).base_layer.weight.detach().numpy()
        theirs = merged[f"{name}.weight"].numpy()
        if case.linear is transposed:
            weight, theirs = weight.T, theirs.T
        assert_close(form.merge(weight), theirs)


def test_files_written_here_load_in_peft(case, saved, checkpoint, inputs, tmp_path):
    model, folder = saved
    adapter = read_adapter(folder, model=checkpoint, svd=svd)
    write_adapter(tmp_path, adapter, model=checkpoint, svd=svd)
    expected = outputs(model, inputs)
    alone = outputs(base(case.linear), inputs)
    assert np.linalg.norm(expected - alone) > 0.01 * np.linalg.norm(expected)
    assert_close(outputs(load(tmp_path, case.linear), inputs), expected)


def test_values_survive_reading_and_writing(case, saved, checkpoint, tmp_path):
    _, folder = saved
    first = read_adapter(folder, model=checkpoint, svd=svd)
    write_adapter(tmp_path, first, model=checkpoint, svd=svd)
    second = read_adapter(tmp_path, model=checkpoint, svd=svd)
    assert list(first.layers) == list(second.layers)
    for name, form in first.layers.items():
        arrays = second.layers[name].arrays()
        for key, array in form.arrays().items():
            if (case.form, key) == (forms.FixedSides, "core"):  # PEFT saves the identity plus it
                assert_close(arrays[key], array)
            else:
                assert np.array_equal(array, arrays[key]), (name, key)
        assert getattr(form, "scale", 1.0) == pytest.approx(
            getattr(second.layers[name], "scale", 1.0), rel=1e-15
        )


def per_layer(create):
    return lambda weights: {
        name: create(weight, rng=i) for i, (name, weight) in enumerate(weights.items())
    }


def at_zero(create):
    """For forms that draw nothing."""
    return lambda weights: {name: create(weight) for name, weight in weights.items()}


def layered(create):
    def made(weights):
        form = create(list(weights.values()))
        return {name: form.layer(i) for i, name in enumerate(weights)}

    return made


def pruned(weights):
    """Of five triplets of every layer three, all, and none are left."""
    keep = [np.array([True, False, True, True, False]), np.ones(5, bool), np.zeros(5, bool)]
    whole = per_layer(partial(forms.DiagonalCore.create, rank=5, alpha=6))(weights)
    return {name: form.kept(mask) for (name, form), mask in zip(whole.items(), keep, strict=True)}


def mixed_ranks(weights):
    return {
        name: forms.Product.create(weight, rank, alpha=3, rng=rank)
        for rank, (name, weight) in enumerate(weights.items(), start=2)
    }


def random_sums(weights):
    some = next(iter(weights.values()))
    basis = forms.random_basis(np.zeros((24, 24), some.dtype), 5, rng=0)
    return {
        name: forms.PositionalRandomSum.create(weight, 5, basis=basis)
        for name, weight in weights.items()
    }


def tied_by_two(weights):
    """The last two layers share their coefficients, the first has its own."""
    first, second, third = weights
    alone = forms.CombinedCore.create(weights[first], rank=2, size=3, rng=1)
    form = forms.TiedCores.create([weights[second], weights[third]], rank=2, size=3, rng=0)
    return {first: alone, second: form.layer(0), third: form.layer(1)}


def scaled_circulant(weights):
    """Blocks of three sizes, at a scale that PEFT does not have."""
    layers = {}
    for block, (name, weight) in zip((12, 6, 12), weights.items(), strict=True):
        form = forms.BlockCirculant.create(weight, block=block, rng=block)
        layers[name] = forms.BlockCirculant(form.kernel, 0.7)
    return layers


MADE_HERE = {
    "product": per_layer(partial(forms.Product.create, rank=3, alpha=5)),
    "product, third": per_layer(partial(forms.Product.create, rank=3, alpha=1)),
    "product, mixed ranks": mixed_ranks,
    "fixed up": per_layer(partial(forms.FixedUp.create, rank=3)),
    "row magnitude": per_layer(partial(forms.RowMagnitude.create, rank=3, alpha=5)),
    "diagonal core": per_layer(partial(forms.DiagonalCore.create, rank=3, alpha=5)),
    "diagonal core, pruned": pruned,
    "shared basis": layered(partial(forms.SharedBasis.create, rank=5, rng=0)),
    "hadamard weight": per_layer(partial(forms.HadamardWeight.create, rank=3)),
    "hadamard product": per_layer(partial(forms.HadamardProduct.create, rank=3, alpha=5)),
    "abba": per_layer(partial(forms.HadamardProduct.from_weight, rank=3, scale=0.7)),
    "kronecker": per_layer(partial(forms.KroneckerProduct.create, rank=2, alpha=5)),
    "kronecker, whole": per_layer(partial(forms.KroneckerProduct.create, rank=12, alpha=5)),
    "kronecker, both": per_layer(
        partial(forms.KroneckerProduct.create, rank=1, factor=4, both=True, alpha=5)
    ),
    "random sum": random_sums,
    "block grid": per_layer(partial(forms.BlockGrid.create, rank=4, blocks=2, alpha=5)),
    "rotated core": per_layer(partial(forms.RotatedCore.create, rank=3, alpha=5)),
    "fixed sides": per_layer(partial(forms.FixedSides.create, rank=3, alpha=5)),
    "combined core": per_layer(partial(forms.CombinedCore.create, rank=2, size=3)),
    "combined core, tied": layered(partial(forms.TiedCores.create, rank=2, size=3, rng=0)),
    "combined core, tied by two": tied_by_two,
    "fourier": per_layer(partial(forms.FourierCoefficients.create, count=30, seed=7)),
    "wavelets": per_layer(partial(forms.WaveletCoefficients.create, count=30, order=2, seed=7)),
    "sparse": per_layer(partial(forms.Sparse.create_random, rank=2)),
    "circulant": per_layer(partial(forms.BlockCirculant.create, block=4)),
    "circulant, scaled": scaled_circulant,
    "bank": layered(partial(forms.VectorBank.create, rank=3, vectors=9, length=6, rng=0)),
    "drawn entries": layered(partial(forms.DrawnEntries.create, rank=3, length=20, rng=0)),
    "shards": at_zero(partial(forms.SharedShard.create, rank=5)),
    "shards, repeated": at_zero(partial(forms.SharedShard.create, rank=5, rows=4)),
    "shards of the weight": at_zero(partial(forms.WeightShards.create, rank=4)),
    "normalized product": per_layer(partial(forms.NormalizedProduct.create, rank=3)),
    "rotations": at_zero(partial(forms.BlockRotations.create, block=6)),
    "rotations, shared, by a series": at_zero(
        partial(forms.BlockRotations.create, block=4, shared=True, order=6)
    ),
    "butterfly of one stage": at_zero(partial(forms.ButterflyRotations.create, block=4)),
    "reflections": per_layer(partial(forms.Reflections.create, rank=4)),
}


def moved(layers):
    """All trained arrays changed, those that layers share alike."""
    rng = np.random.default_rng(5)
    steps = {}
    for form in layers.values():
        for a in form.parameters().values():
            step = 0.3 * rng.standard_normal(a.shape)
            steps.setdefault(id(a), (a + step).astype(a.dtype))
    return {
        name: form.replace({key: steps[id(a)] for key, a in form.parameters().items()})
        for name, form in layers.items()
    }


@pytest.mark.parametrize("kind", MADE_HERE)
def test_forms_made_here_are_the_same_in_peft(kind, tmp_path):
    model = checkpoint_of(base(), tmp_path)
    weights = {name: model.tensors[f"{name}.weight"].read() for name in TARGETS}
    layers = moved(MADE_HERE[kind](weights))
    write_adapter(tmp_path, Adapter(layers), model=model, svd=svd)
    loaded = changes(load(tmp_path))
    again = read_adapter(tmp_path, model=model, svd=svd).layers
    for name, form in layers.items():
        expected, size = dense(form), np.linalg.norm(weights[name])
        assert_close(loaded[name], expected, size)
        assert_close(dense(again[name]), expected, size)


def test_cut_ranks_of_adalora_are_read_with_the_scale_of_the_start(tmp_path):
    case = CASES["adalora"]
    model = trained(case)
    masks = {"wide": [True, False, True, True, False], "even": [False] * 5}
    config = model.peft_config["default"]
    config.rank_pattern = {f"{name}.lora_E.default": mask for name, mask in masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            model.base_model.model.get_submodule(name).lora_E["default"][~torch.tensor(mask)] = 0
    model.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path)
    assert [adapter.layers[name].up.shape[1] for name in TARGETS] == [3, 0, 5]
    for name, change in changes(model).items():
        assert_close(dense(adapter.layers[name]), change, 2.0)


class Mixed(nn.Module):
    """An embedding, two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.conv = nn.Conv2d(1, 6, (3, 2))
        self.point = nn.Conv2d(6, 4, 1)
        self.last = nn.Linear(4, 5)

    def forward(self, tokens):
        x = self.table(tokens).reshape(-1, 1, 4, 4)
        return self.last(torch.tanh(self.point(self.conv(x))).mean((2, 3)))


def test_embeddings_and_convolutions(tmp_path):
    def model():
        torch.manual_seed(1)
        return Mixed().eval()

    targets = ["table", "conv", "point", "last"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    original = peft.get_peft_model(model(), config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    original.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "model").mkdir()
    disk = checkpoint_of(model(), tmp_path / "model")
    adapter = read_adapter(tmp_path / "adapter", model=disk)
    assert adapter.embeddings == {"table"}
    assert adapter.kernels == {"conv": (3, 2), "point": (1, 1)}
    merged = {name: a.numpy() for name, a in original.merge_and_unload().state_dict().items()}
    for name, form in adapter.layers.items():
        weight = model().get_submodule(name).weight.detach().numpy()
        change = merged[f"{name}.weight"] - weight
        change = change.T if name == "table" else change.reshape(change.shape[0], -1)
        assert_close(dense(form), change, np.linalg.norm(weight))
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", adapter)
    again = peft.PeftModel.from_pretrained(model(), str(tmp_path / "again")).merge_and_unload()
    for name, a in again.state_dict().items():
        assert_close(a.numpy(), merged[name])


def test_every_method_stands_in_the_guide():
    guide = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    for method in METHODS:
        row = next(line for line in guide.splitlines() if line.startswith(f"| {method.title}"))
        assert f"forms.{method.form.__name__}`" in row
        assert ("`model`" in row) == method.needs_model


def test_every_layer_is_read_when_it_is_asked_for(tmp_path):
    layers = MADE_HERE["product"]({name: np.zeros(shape) for name, shape in SHAPES.items()})
    write_adapter(tmp_path, Adapter(layers, "base", "sha256:1"))
    adapter = pickle.loads(pickle.dumps(read_adapter(tmp_path)))
    assert (adapter.base, adapter.fingerprint) == ("base", "sha256:1")
    assert "3 layers of plain LoRA" in repr(adapter.layers)
    assert adapter.products().keys() == layers.keys()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model"):
        adapter.layers["even"]


def test_transposed_arrays_are_stored_by_rows(tmp_path):
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((3, 24)).T, np.asfortranarray(rng.standard_normal((3, 12)))
    write_adapter(tmp_path, Adapter({"tall": forms.Product(up, down)}))
    again = read_adapter(tmp_path).layers["tall"]
    assert np.array_equal(again.up, up)
    assert np.array_equal(again.down, down)


def test_arrays_of_any_library(tmp_path):
    create = partial(forms.DiagonalCore.create, rank=3, rng=0)
    layers = {"tall": create(torch.zeros(24, 12)), "wide": create(torch.zeros(12, 24))}
    half = {
        name: form.replace({key: a.bfloat16() for key, a in form.arrays().items()})
        for name, form in layers.items()
    }
    write_adapter(tmp_path, Adapter(half))
    for name, form in read_adapter(tmp_path).layers.items():
        for key, array in form.arrays().items():
            assert array.dtype == np.float32
            assert np.array_equal(array, half[name].arrays()[key].float().numpy())


def test_patterns_match_no_other_layer(tmp_path):
    layers = {
        name: forms.Product.create((6, 4), rank, rng=0)
        for name, rank in {"q": 1, "a.q": 2, "b.q": 2, "c.q": 2}.items()
    }
    write_adapter(tmp_path, Adapter(layers))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^q": 1}
    read = read_adapter(tmp_path).layers
    assert {name: form.scale for name, form in read.items()} == dict.fromkeys(layers, 1.0)


def test_bases_are_told_apart():
    def made_for(base, fingerprint=None):
        return Adapter({"q": forms.Product.create((6, 4), 2)}, base, fingerprint)

    check_same_base({"a": made_for("x", "1"), "b": made_for("y", "1")})
    check_same_base({"a": made_for("x", "1"), "b": made_for("x")})
    with pytest.raises(CheckpointError, match="one base, got 'x' of a and 'x' of b, whose"):
        check_same_base({"a": made_for("x", "1"), "b": made_for("x", "2")})
    with pytest.raises(CheckpointError, match="one base, got 'x' of a and 'y' of b"):
        check_same_base({"a": made_for("x"), "b": made_for("y", "2")})


PRODUCT = forms.Product.create((12, 24), 3, rng=0)
NOT_WRITTEN = {
    "no layer": ({}, "at least one layer"),
    "two forms": (
        {"a": PRODUCT, "b": forms.HadamardProduct.create((12, 24), 3)},
        "one form for all layers, got Product of a and HadamardProduct of b",
    ),
    "no method": (
        {"a": forms.RandomSum.create((12, 24), 3)},
        "RandomSum has no method in PEFT; convert it by",
    ),
    "scales of AdaLoRA": (
        {
            "a": forms.DiagonalCore.create((12, 24), 3),
            "b": forms.DiagonalCore.create((12, 24), 3, alpha=5),
        },
        "AdaLoRA has one scale for all layers, got 1.0 of a and .* of b",
    ),
    "ranks of LoHa": (
        {"a": forms.HadamardProduct.from_weight(np.ones((12, 24)), 3, rank2=2)},
        "one rank for both products, got 3 and 2",
    ),
    "factor of LoKr": (
        {"a": forms.KroneckerProduct(np.ones((2, 4)), np.ones((6, 6)))},
        r"none gives \(2, 4\) x \(6, 6\) of a",
    ),
    "unfactored part of LoKr": (
        {
            "a": forms.KroneckerProduct(
                np.ones((3, 4)), np.ones((4, 1)), right_down=np.ones((1, 6))
            ),
            "b": forms.KroneckerProduct(
                np.ones((3, 1)), np.ones((4, 1)), np.ones((1, 4)), np.ones((1, 6))
            ),
        },
        "a: PEFT factors the parts",
    ),
    "grids": (
        {
            "a": forms.BlockGrid.create((12, 24), 4, blocks=2),
            "b": forms.BlockGrid.create((12, 24), 4, blocks=4),
        },
        "GraLoRA has one .* for all layers",
    ),
    "bases of VeRA": (
        {"a": forms.Gains.create((12, 24), 3, rng=0), "b": forms.Gains.create((12, 24), 3, rng=1)},
        "b: down must be a part of one array that all layers of VeRA share",
    ),
    "terms of RandLoRA": (
        {
            "a": forms.PositionalRandomSum(
                np.ones((5, 12)), np.ones((24, 2, 5)), np.ones((5, 2)), np.ones((2, 12)), True
            )
        },
        "a: PEFT takes 3 terms of rank 5",
    ),
    "ties of TinyLoRA": (
        dict(
            zip(
                "abcd",
                [
                    forms.CombinedCore.create(np.eye(6), rng=0, size=2).replace(
                        {"coefficients": np.array([1.0, min(i, 1)])}
                    )
                    for i in range(4)
                ],
                strict=True,
            )
        ),
        "2 groups begin at a, c, got a, b",
    ),
    "places without a seed": (
        {"a": forms.FourierCoefficients.create((12, 24), 5, rng=0)},
        "a: FourierFT draws its places from a seed, and the form has none",
    ),
    "places of another seed": (
        {"a": forms.FourierCoefficients(np.ones(2), np.array([3, 8]), (12, 24), seed=777)},
        "a: the places are not those that FourierFT draws from the seed 777",
    ),
    "seeds": (
        {
            "a": forms.WaveletCoefficients.create((12, 24), 5, seed=1),
            "b": forms.WaveletCoefficients.create((12, 24), 5, seed=2),
        },
        "WaveFT has one seed for all layers, got 1 of a and 2 of b",
    ),
    "another wavelet": (
        {
            "a": forms.WaveletCoefficients(
                np.ones(1), np.array([4]), np.array([0.6, 0.8]), (12, 24), seed=777
            )
        },
        r"a: WaveFT is written for the filters of daubechies\(\)",
    ),
    "number of entries": (
        {"a": forms.Sparse.create((12, 24), places=np.arange(40))},
        r"PEFT has r \(m \+ n\) entries of SHiRA in a layer, got 1.111 \(m \+ n\)",
    ),
    "banks": (
        {
            "a": forms.BankFactors.create((12, 24), 3, length=4, rng=0),
            "b": forms.BankFactors.create((12, 24), 3, length=4, rng=1),
        },
        "b: bank must be a part of one array that all layers of VB-LoRA share",
    ),
    "rows of shards": (
        {
            "a": forms.SharedShard.create((12, 24), 3, rows=4),
            "b": forms.SharedShard.create((12, 24), 3, rows=6),
        },
        "MiSS has one number of rows of shards for all layers, got 4 of a and 6 of b",
    ),
    "series of two terms": (
        {"a": forms.BlockRotations.create(np.ones((12, 24)), block=4, order=2)},
        "a: the series of OFT in PEFT has an order of 3 or more, got 2",
    ),
    "rotations shared by some": (
        {
            "a": forms.BlockRotations.create(np.ones((12, 24)), block=4, shared=True),
            "b": forms.BlockRotations.create(np.ones((12, 24)), block=4),
        },
        "b: pieces share their rotation in all layers of OFT or in none, got 6 rotations",
    ),
    "PSOFT without a model": (
        {"a": forms.RotatedCore.create(np.diag([3.0, 2.0, 1.0]), 2)},
        "a: PSOFT cannot be read or written without the base model; give model",
    ),
}


@pytest.mark.parametrize("kind", NOT_WRITTEN)
def test_what_a_file_cannot_say_is_not_written(kind, tmp_path):
    layers, message = NOT_WRITTEN[kind]
    with pytest.raises(CheckpointError, match=message):
        write_adapter(tmp_path, Adapter(layers))


def test_methods_that_peft_lacks_for_transposed_weights_and_embeddings(tmp_path):
    layers = {"a": forms.HadamardProduct.create((12, 24), 3)}
    with pytest.raises(CheckpointError, match="no LoHa for weights that are stored inputs by"):
        write_adapter(tmp_path, Adapter(layers, fan_in_fan_out=True))
    with pytest.raises(CheckpointError, match="a: embeddings and convolutions are written as"):
        write_adapter(tmp_path, Adapter(layers, embeddings=frozenset("a")))


Q = "base_model.model.wide"
#: A case, changes of its configuration and tensors, and the error.
NOT_READ = {
    "missing": ("loha", {}, {f"{Q}.hada_w2_a": None}, r"wide lacks hada_w2_a"),
    "unknown": (
        "loha",
        {},
        {f"{Q}.hada_t1": np.ones((3, 3, 1, 1))},
        r"hada_t1 is not a part of LoHa",
    ),
    "suffix of another method": (
        "adalora",
        {},
        {f"{Q}.lora_A.weight": np.ones((5, 24), np.float32)},
        r"lora_A\.weight is not a part of AdaLoRA",
    ),
    "shape": (
        "hira",
        {},
        {f"{Q}.hira_A": np.ones((3, 23), np.float32)},
        r"wide: .* hira_A \(3, 23\)",
    ),
    "mask": (
        "adalora",
        {"rank_pattern": {"wide.lora_E": [True, False, True, True, False]}},
        {},
        r"wide: lora_E must have shape \(3, 1\) by init_r and rank_pattern, got \(5, 1\)",
    ),
    "rank of LoKr": (
        "lokr",
        {"r": 3},
        {},
        "the factors must have the rank of the configuration, 3",
    ),
    "no projection": (
        "randlora",
        {"save_projection": False},
        {"base_model.randlora_A": None},
        "save the adapter there with save_projection=True",
    ),
    "wavelet": ("waveft", {"wavelet_family": "sym2"}, {}, "db1 to db10 with use_idwt, got sym2"),
    "no transform": ("waveft", {"use_idwt": False}, {}, "convert the adapter to LoRA in PEFT"),
    "places": (
        "unilora",
        {},
        {f"{Q}.unilora_scales_A": np.arange(72, dtype=np.float32).reshape(3, 24)},
        "wide: unilora_scales must be the same wherever unilora_indices are",
    ),
    "places for data": (
        "unilora",
        {},
        {f"{Q}.unilora_scales_A": np.ones((3, 24), np.int32)},
        "unilora_scales_A: a weight must be stored as",
    ),
    "no bank": (
        "vblora",
        {},
        {"base_model.vblora_vector_bank": None},
        "the file has no base_model.vblora_vector_bank",
    ),
    "constrained rotations": ("oft", {"coft": True}, {}, "coft=True of OFT moves the numbers"),
    "series of old": (
        "oft",
        {"peft_version": "0.17.1"},
        {},
        r"from 0\.18\.0 of PEFT on and for at least 3 terms, got 0\.17\.1 and 5",
    ),
    "option": ("psoft", {"use_cayley_neumann": True}, {}, "use_cayley_neumann=True of PSOFT"),
    "type": ("lora", {"peft_type": "IA3"}, {}, "peft_type must be one of ADALORA, .*, got IA3"),
    "expression": ("lora", {"alpha_pattern": {"(": 2}}, {}, "not a regular expression"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_wrong_with_a_file_is_named(kind, tmp_path):
    name, config, tensors, message = NOT_READ[kind]
    trained(CASES[name]).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    path = tmp_path / "adapter_model.safetensors"
    changed = {**load_file(path), **tensors}
    save_file({key: a for key, a in changed.items() if a is not None}, path)
    (tmp_path / "base").mkdir()
    model = checkpoint_of(base(), tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        dict(read_adapter(tmp_path, model=model, svd=svd).layers)


def test_files_of_unilora_without_places(tmp_path):
    case = CASES["unilora"]
    trained(replace(case, options={**case.options, "save_indices": False})).save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(CheckpointError, match=r"no layer with .* in PEFT with save_indices=True"):
        read_adapter(tmp_path)


def test_places_of_shira_as_windows_stores_them(tmp_path):
    trained(CASES["shira"]).save_pretrained(str(tmp_path))
    (tmp_path / "base").mkdir()
    model = checkpoint_of(base(), tmp_path / "base")
    first = dict(read_adapter(tmp_path, model=model).layers)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: a.astype(np.float32) for key, a in load_file(path).items()}
    save_file(tensors, path)
    second = read_adapter(tmp_path, model=model).layers
    for name, form in first.items():
        assert np.array_equal(dense(form), dense(second[name]))


def test_places_are_those_of_the_generator_of_pytorch():
    for size, count, seed in ((96, 96, 777), (10_007, 50, 3)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randperm(size, generator=generator)[:count].numpy()
        assert np.array_equal(forms.peft_places(size, count, seed=seed), expected)


def test_butterflies_of_many_stages_are_those_of_peft():
    """PEFT allows more than one on CUDA only, but has its parts everywhere."""
    n, size, stages = 24, 6, 3
    form = forms.ButterflyRotations.create(np.eye(n), block=size, stages=stages)
    blocks = 0.5 * np.random.default_rng(0).standard_normal(form.blocks.shape)
    layer = peft.tuners.boft.layer.BOFTLayer(nn.Linear(n, n))
    turn = torch.eye(n, dtype=torch.float64)
    for i, stage in enumerate(torch.asarray(blocks)):
        order = layer.block_butterfly_perm(n, (n // size) >> i, size // 2, stages - 1)
        permutation = layer.perm2mat(order).double()
        rotations = torch.block_diag(*layer.cayley_batch(stage))
        turn = permutation @ rotations @ permutation.mT @ turn
    found = form.replace({"blocks": blocks}).merge(np.eye(n))
    assert np.allclose(found, turn.mT, atol=1e-6)  # PEFT solves in single precision


def test_counts_of_layers_of_which_one_name_ends_another(tmp_path):
    """Patterns of FourierFT ask for a dot before them, which the first of these names has not."""
    layers = {
        name: forms.FourierCoefficients.create((6, 4), count, seed=777, rng=0)
        for name, count in {"q": 3, "a.q": 5, "b.q": 5, "c.q": 7}.items()
    }
    write_adapter(tmp_path, Adapter(layers))
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(4, 6)})
    model.update({name: nn.ModuleDict({"q": nn.Linear(4, 6)}) for name in "abc"})
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path)).base_model.model
    for name, form in layers.items():
        update = loaded.get_submodule(name).get_delta_weight("default").detach().numpy()
        assert_close(update, form.delta())


@pytest.mark.parametrize(
    "name",
    [
        "dora",
        "hira",
        "vera",
        "randlora",
        "psoft",
        "fourierft",
        "shira",
        "miss",
        "bone",
        "oft",
        "boft",
        "hra",
    ],
)
def test_methods_that_need_the_model_say_so(name, tmp_path):
    trained(CASES[name]).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="read or written without the base model; give model"):
        read_adapter(tmp_path)


def test_shapes_are_those_of_the_model(tmp_path):
    trained(CASES["loha"]).save_pretrained(str(tmp_path))
    (tmp_path / "base").mkdir()
    shapes = {**SHAPES, "even": (24, 25)}
    weights = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    message = r"even has the shape \(24, 25\) in the model, got \(24, 24\)"
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, model=Checkpoint(tmp_path / "base"))


def test_bases_of_psoft_that_no_routine_determines(tmp_path):
    layers = {"q": forms.RotatedCore.create(np.diag([3.0, 2.0, 1.0]), 2)}
    model = checkpoint_of(nn.ModuleDict({"q": nn.Linear(3, 3)}), tmp_path)
    with pytest.raises(CheckpointError, match="must lie along the leading singular vectors"):
        write_adapter(tmp_path, Adapter(layers), model=model, svd=svd)
    with pytest.raises(CheckpointError, match="give svd, the routine that PEFT uses"):
        write_adapter(tmp_path, Adapter(layers), model=model)
    save_file({"q.weight": np.eye(3, dtype=np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="singular values 1 and 2 of the weight agree"):
        write_adapter(tmp_path, Adapter(layers), model=Checkpoint(tmp_path), svd=svd)
