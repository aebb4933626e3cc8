"""Embeddings and convolutions with adapters: as PEFT's LoRA computes them, and in its files."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lowrank_sp.adapters import forms, initializers
from lowrank_sp.checkpoint import Adapter, Checkpoint, read_adapter, write_adapter
from lowrank_sp.torch import (
    FactorOptimizer,
    attach,
    attach_forms,
    attach_shared,
    detach,
    forms_of,
    initialize_,
    layout,
    load_state_,
    lora_pairs,
    merge_,
    state,
)
from lowrank_sp.updates import ScaledGD

TARGETS = ["table", "image", "point", "line", "last"]
plain = partial(forms.Product.create, rank=3, alpha=5)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    # PEFT says so of layers that it turns by itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]


class Mixed(nn.Module):
    """One layer of every kind, with strides, padding, and an entry for padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 16, padding_idx=2)
        self.image = nn.Conv2d(1, 6, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1, bias=False)
        self.line = nn.Conv1d(5, 4, 3, padding="same")
        self.last = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.table(tokens).reshape(-1, 1, 4, 4)
        x = self.point(torch.tanh(self.image(x))).flatten(2)
        return self.last(torch.tanh(self.line(x)).mean(2))


TOKENS = torch.arange(12).reshape(3, 4) % 9


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, y, factor=1e3):
    assert torch.linalg.norm(x - y) <= factor * torch.finfo(x.dtype).eps * torch.linalg.norm(y)


def moved(model):
    """All that is trained given other values, so that no update is zero."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model


def attached(base=None, **options):
    return moved(attach(base or Mixed(), plain, targets=TARGETS, rng=0, **options))


def parameters_of_peft(model):
    """What PEFT trains, under the names that our state has."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        for ours, theirs, embedding in (
            ("up", "lora_B", "lora_embedding_B"),
            ("down", "lora_A", "lora_embedding_A"),
            ("magnitude", "lora_magnitude_vector", None),
        ):
            for place in filter(None, (theirs, embedding)):
                if "default" in getattr(layer, place, {}):
                    array = getattr(layer, place)["default"]
                    found[f"{name}.{ours}"] = getattr(array, "weight", array)
    return found


def like_peft(create, targets, **options):
    """Two models with the same values: PEFT's and ours."""
    base = Mixed()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    theirs = moved(get_peft_model(copy.deepcopy(base), config))
    dropout = options.get("lora_dropout", 0.0)
    ours = attach(base, create, targets=targets, rng=0, dropout=dropout)
    own = state(ours)
    values = {k: v.reshape(own[k].shape) for k, v in parameters_of_peft(theirs).items()}
    return theirs, load_state_(ours, values)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_outputs_and_gradients_of_peft(dora, dropout):
    create = partial(forms.RowMagnitude.create, rank=3, alpha=5) if dora else plain
    targets = TARGETS[1:] if dora else TARGETS
    theirs, ours = like_peft(create, targets, use_dora=dora, lora_dropout=dropout)
    outputs = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        outputs.append(model(TOKENS))
    close(*outputs)
    weights = torch.randn(outputs[0].shape)
    for output in outputs:
        (output * weights).sum().backward()
    expected = {name: p.grad for name, p in parameters_of_peft(theirs).items()}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(expected)
    for name, p in trained.items():
        close(p.grad.flatten(), expected[name.replace(".adapter", "")].flatten())


CONVOLUTIONS = [
    nn.Conv1d(3, 4, 5, stride=2),
    nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"),
    nn.Conv2d(3, 4, 3, padding="same", dilation=2),
    nn.Conv2d(3, 4, (1, 2), padding=(2, 1), padding_mode="reflect"),
    nn.Conv3d(2, 4, 2, stride=(1, 2, 1)),
]
CREATE = {
    "product": partial(forms.Product.create, rank=2),
    "core": partial(forms.FullCore.at_identity, rank=2),
    "magnitudes": partial(forms.RowMagnitude.create, rank=2),
    "Hadamard": partial(forms.HadamardProduct.create, rank=2),
    "Kronecker": partial(forms.KroneckerProduct.create, rank=2),
    "columns": partial(forms.BothMagnitudes.create, rank=2),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_convolutions_of_every_kind_are_those_of_the_merged_kernel(conv, create):
    model = moved(attach(nn.Sequential(copy.deepcopy(conv)), create, targets=["0"], rng=0))
    size = (2, conv.in_channels, 9, 8, 7)[: conv.weight.ndim]
    for x in (torch.randn(size), torch.randn(size[1:])):
        expected = model(x).detach()
        assert not torch.allclose(expected, conv(x))
        merged = merge_(copy.deepcopy(model))
        assert type(merged[0]) is type(conv)
        close(merged(x), expected)
    assert detach(model)["0"].shape == (4, conv.weight[0].numel())


def test_a_product_is_never_multiplied_out():
    """Of a wide table and a wide kernel no array of their size is made, forwards or backwards."""
    model = attach(
        nn.Sequential(nn.Embedding(3000, 64), nn.Conv1d(64, 96, 9)), plain, targets=["0", "1"]
    )
    moved(model)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = model[1](model[0](torch.arange(12)).mT)
    y.sum().backward()
    # Autograd keeps the frozen weights themselves, and nothing else of this size.
    sizes = {p.numel() for p in model.parameters() if not p.requires_grad}
    assert max(n for n in saved if n not in sizes) <= 3 * 3000


def test_merging_and_detaching():
    base = Mixed()
    before = copy.deepcopy(base.state_dict())
    modules = dict(base.named_modules())
    model = attached(base)
    expected = model(TOKENS).detach()
    copied = copy.deepcopy(model)
    taken = detach(copied)
    assert copied.state_dict().keys() == before.keys()
    assert torch.equal(attach_forms(copied, taken)(TOKENS), expected)
    assert merge_(model) is base
    assert dict(base.named_modules()) == modules
    close(base(TOKENS), expected)
    for name in TARGETS:
        assert not torch.equal(base.get_parameter(f"{name}.weight"), before[f"{name}.weight"])


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_and_compiled_layers_have_the_same_gradients(compiled):
    model = attached()
    other = copy.deepcopy(model)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(other, backend="aot_eager", fullgraph=True)
    else:
        run = partial(checkpoint, other, use_reentrant=False)
    model(TOKENS).square().sum().backward()
    run(TOKENS).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        close(other.get_parameter(name).grad, grad)


def test_data_parallel_has_the_same_outputs():
    model = attached()
    assert torch.equal(nn.DataParallel(model)(TOKENS), model(TOKENS))


def test_half_precision_of_the_base():
    base = Mixed().bfloat16()
    model = attached(base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wide = copy.deepcopy(model).float()
    for name, x in (
        ("table", TOKENS),
        ("image", torch.randn(2, 1, 4, 4)),
        ("line", torch.randn(2, 5, 7)),
    ):
        layer, exact = model.get_submodule(name), wide.get_submodule(name)
        half = x.bfloat16() if x.is_floating_point() else x
        y = layer(half)
        assert y.dtype == torch.bfloat16
        # Two roundings, of the base and of the sum.
        close(y, exact(half.float() if x.is_floating_point() else x).bfloat16(), factor=2)
    model(TOKENS).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_shared_forms_and_starts_that_move_the_weight():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6))
    tokens = torch.arange(7)
    attach_shared(model, partial(forms.SharedUp.create, rank=2), targets=["0", "1"], rng=0)
    expected = moved(model)(tokens).detach()
    close(merge_(model)(tokens), expected)
    base = Mixed()
    expected = base(TOKENS).detach()
    attach(base, partial(initializers.pissa, rank=1), targets=TARGETS, rng=0)
    close(base(TOKENS), expected)


def test_kernels_in_another_memory_format_get_their_values():
    for channels_last in (lambda m: m, lambda m: m.to(memory_format=torch.channels_last)):
        conv = channels_last(nn.Conv2d(3, 4, 2))
        x = torch.randn(1, 3, 5, 5)
        expected = conv(x).detach()
        model = attach(nn.Sequential(conv), partial(initializers.pissa, rank=2), targets=["0"])
        close(model(x), expected)
        close(merge_(model)(x), expected)
        config = LoraConfig(r=2, target_modules=["0"])
        model = initialize_(get_peft_model(nn.Sequential(conv), config), initializers.pissa)
        close(model(x), expected)
        assert float(lora_pairs(model)[0].delta().detach().abs().max()) > 0.01


def test_pairs_are_trained():
    model = attached()
    pairs = lora_pairs(model)
    assert [pair.name for pair in pairs] == TARGETS
    optimizer = FactorOptimizer(pairs, ScaledGD(lr=1.0))
    target, losses = torch.randn(12, 3), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(TOKENS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# Files of PEFT


class Turned(nn.Module):
    """A layer of GPT-2 beside one that is not."""

    def __init__(self):
        super().__init__()
        self.turned = Conv1D(6, 4)
        nn.init.normal_(self.turned.weight)

    def forward(self, x):
        return self.turned(x)


@pytest.mark.parametrize("dora", [False, True])
def test_states_go_through_files_of_peft(dora, tmp_path):
    base, options = Mixed(), {}
    targets, create = TARGETS, plain
    if dora:
        # Read and written beside the weights, which it depends on.
        (tmp_path / "base").mkdir()
        save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
        options = {"model": Checkpoint(tmp_path / "base")}
        targets, create = ["last"], partial(forms.RowMagnitude.create, rank=3, alpha=5)
    model = moved(attach(copy.deepcopy(base), create, targets=targets, rng=0))
    expected = model(TOKENS).detach()
    write_adapter(tmp_path, Adapter(forms_of(model), **layout(model)), **options)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close(theirs(TOKENS), expected)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = read_adapter(tmp_path / "theirs", **options)
    again = attach_forms(copy.deepcopy(base), adapter.layers)
    assert state(again).keys() == state(model).keys()
    for name, array in state(model).items():
        assert torch.equal(state(again)[name], array)
    assert torch.equal(again(TOKENS), expected)
    # Into a model that has the adapters already.
    other = attach(copy.deepcopy(base), create, targets=targets, rng=1)
    assert torch.equal(load_state_(other, state(again))(TOKENS), expected)


def test_layouts_say_what_files_must_say():
    model = attached()
    kernels = {"image": (3, 2), "point": (1, 1), "line": (3,)}
    assert layout(model) == {
        "embeddings": frozenset({"table"}),
        "kernels": kernels,
        "fan_in_fan_out": False,
    }
    turned = attach(Turned(), plain, targets=["turned"])
    assert layout(turned)["fan_in_fan_out"]
    with pytest.raises(ValueError, match="Mixed has no adapter"):
        layout(Mixed())


# Refusals


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "create", "message"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), plain, r"0 cannot.*norm 1.0.*set max_norm"),
        (Scaled(9, 4), plain, "0 cannot be adapted: Scaled does not look up rows alone"),
        (nn.EmbeddingBag(9, 4), plain, "update of a matrix, and it is a EmbeddingBag"),
        (
            nn.Embedding(9, 4),
            partial(forms.KroneckerProduct.create, rank=2),
            "0 is an embedding.*KroneckerProduct is none; take a form such as Product",
        ),
        (
            nn.Embedding(9, 4),
            partial(forms.RowMagnitude.create, rank=2),
            "0 is an embedding.*RowMagnitude is none",
        ),
        (nn.Conv2d(4, 8, 3, groups=2), plain, "its 2 groups of channels are matrices of their own"),
        (Standardized(4, 8, 3), plain, "Standardized does not convolve alone"),
        (nn.ConvTranspose2d(4, 8, 3), plain, "update of a matrix, and it is a ConvTranspose2d"),
        (nn.Linear(4, 4, device="meta"), plain, "0 is on the meta device.*load the weights first"),
        (nn.Conv1d(4, 4, 1, device="meta"), plain, "0 is on the meta device"),
    ],
)
def test_layers_that_cannot_be_adapted(layer, create, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        attach(model, create, targets=["0"], rng=0)
    assert list(model) == [layer]
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_layers_are_linear():
    assert list(forms_of(attach(Mixed(), plain, targets="all-linear"))) == ["last"]
    with pytest.raises(ValueError, match="called tabel; the nearest names are table"):
        attach(Mixed(), plain, targets=["tabel"])
