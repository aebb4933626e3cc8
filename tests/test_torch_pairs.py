"""Factor pairs found in models: the right factors, and the scale that the model uses."""

import math
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, KasaConfig, LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import GPT2Config, GPT2Model
from update_cases import RULES

from lowrank_sp.adapters.forms import DiagonalCore, FullCore, Product
from lowrank_sp.torch import FactorOptimizer, ParameterPair, attach, attach_forms, lora_pairs
from lowrank_sp.updates import SAM, AdamW, Clip, EFlat, PoLAR, SkipNonFinite, StelLA


class Model(nn.Module):
    """One of each kind of layer that PEFT's LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.dense = nn.Linear(6, 4)
        self.conv = nn.Conv2d(4, 6, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Conv2d(4, 8, 1, groups=2)
        self.head = nn.Linear(6, 11)


class Own(nn.Module):
    def __init__(self, m=4, n=6, rank=2, scale=0.5):
        super().__init__()
        self.up = nn.Parameter(torch.randn(m, rank))
        self.down = nn.Parameter(torch.randn(rank, n))
        self.scale = scale


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def adapted(*targets, model=None, **options):
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
    return get_peft_model(model or Model(), config)


def assert_deltas_of_peft(model, adapter="default"):
    """Every pair says what the layer itself adds to its weight."""
    pairs = {pair.name: pair for pair in lora_pairs(model)}
    for name, pair in pairs.items():
        layer = model.get_submodule(name.removesuffix(f".{adapter}"))
        expected = layer.get_delta_weight(adapter)
        if getattr(layer, "fan_in_fan_out", False) or isinstance(layer, lora.Embedding):
            expected = expected.mT
        torch.testing.assert_close(pair.delta(), expected.flatten(1))
    return pairs


def test_every_kind_of_layer():
    targets = ("tokens", "dense", "conv", "attention")
    pairs = assert_deltas_of_peft(adapted(*targets, lora_alpha=6))
    shapes = {name.removeprefix("base_model.model."): pair.shape for name, pair in pairs.items()}
    assert shapes == {
        "tokens.default": (6, 11),
        "dense.default": (4, 6),
        "conv.default": (6, 36),
        "attention.default": (24, 8),
        "attention.base_layer.out_proj.default": (8, 8),
    }
    assert {pair.scale for pair in pairs.values()} == {3.0}


def test_transposed_weights_of_gpt2():
    config = GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    model = adapted("c_attn", "c_proj", model=GPT2Model(config), fan_in_fan_out=True)
    shapes = [pair.shape for pair in assert_deltas_of_peft(model).values()]
    assert shapes == [(36, 12), (12, 12), (12, 48)]


def test_scales_of_patterns_and_of_stabilized_ranks():
    model = adapted(
        "dense", "head", lora_alpha=8, rank_pattern={"head": 4}, alpha_pattern={"dense": 5}
    )
    scales = [(pair.rank, pair.scale) for pair in assert_deltas_of_peft(model).values()]
    assert scales == [(2, 2.5), (4, 2.0)]
    model = adapted("dense", "head", lora_alpha=8, rank_pattern={"head": 4}, use_rslora=True)
    scales = [(pair.rank, pair.scale) for pair in assert_deltas_of_peft(model).values()]
    assert scales == [(2, 8 / math.sqrt(2)), (4, 4.0)]


def test_adapters_that_are_active():
    model = adapted("dense")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["dense", "head"]))
    assert [pair.rank for pair in lora_pairs(model)] == [2]
    model.set_adapter("second")
    found = [(pair.name.rpartition(".")[2], pair.rank, pair.scale) for pair in lora_pairs(model)]
    assert found == [("second", 3, 3.0)] * 2
    model.base_model.set_adapter(["default", "second"])
    assert sorted(pair.rank for pair in lora_pairs(model)) == [2, 3, 3]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_an_adapter_adds_beside_its_product(options):
    model = adapted("dense", **options)
    [pair] = lora_pairs(model)
    beside = [p for p in model.parameters() if p.requires_grad and p not in set(pair.factors)]
    assert [p.shape for p in beside] == [(4,)]


def test_frozen_factor():
    config = LoraConfig(r=2, target_modules=["dense"], init_lora_weights="mica")
    [pair] = lora_pairs(get_peft_model(Model(), config))
    assert [p.requires_grad for p in pair.factors] == [False, True]


def test_modules_of_our_own():
    model = nn.Sequential(Own(scale=2), nn.ReLU(), Own(5, 4, 3))
    assert [(p.name, p.shape, p.rank, p.scale) for p in lora_pairs(model)] == [
        ("0", (4, 6), 2, 2.0),
        ("2", (5, 4), 3, 0.5),
    ]
    model[0].requires_grad_(False)
    assert [p.name for p in lora_pairs(model)] == ["2"]


def test_a_scale_of_zero_is_zero():
    model = nn.Sequential(nn.Linear(6, 4))
    attach_forms(model, {"0": Product(torch.ones(4, 2), torch.ones(2, 6), 0.0)})
    assert [pair.scale for pair in lora_pairs(model)] == [0.0]


# A core between the factors


def with_core(create, dtype=torch.float64):
    """A layer whose update is ``scale up core down``, the core not the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, dtype=dtype))
    attach(model, partial(create, rank=3, alpha=6), targets=["0"], rng=0)
    with torch.no_grad():
        core = model[0].adapter.core
        core.copy_(torch.randn(core.shape, dtype=dtype))
    return model


CORES = [DiagonalCore.create, DiagonalCore.at_identity, FullCore.create, FullCore.at_identity]


@pytest.mark.parametrize("create", CORES)
def test_pairs_with_a_core_say_what_the_form_adds(create):
    model = with_core(create)
    [pair] = lora_pairs(model)
    assert (pair.name, pair.rank, pair.scale) == ("0", 3, 2.0)
    assert pair.core is model[0].adapter.core
    torch.testing.assert_close(pair.delta(), model[0].form().delta().to_dense())
    product = pair.scale * pair.up @ pair.down
    assert torch.linalg.norm(pair.delta() - product) > 0.1 * torch.linalg.norm(product)


@pytest.mark.parametrize("name", RULES)
def test_only_rules_of_single_factors_move_pairs_with_a_core(name):
    rule, pairs = RULES[name], lora_pairs(with_core(FullCore.at_identity))
    for wrapped in (rule, SkipNonFinite(rule), SAM(rule)):
        if rule.factorwise:
            FactorOptimizer(pairs, wrapped)
        else:
            with pytest.raises(
                ValueError, match=r"moves a product of two factors, and 0 has a core"
            ):
                FactorOptimizer(pairs, wrapped)
    # What surrounds a product projects on its tangent space, whatever the rule inside.
    for wrapped in (Clip(rule), EFlat(rule)):
        with pytest.raises(ValueError, match="moves a product of two factors"):
            FactorOptimizer(pairs, wrapped)


@pytest.mark.parametrize("name", RULES)
def test_rules_of_single_factors_make_nothing_of_the_other(name):
    """The path of ``up`` under its own gradients, beside two paths of ``down`` and two scales."""
    rule = RULES[name]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    start, grads = draw(12, 3), draw(4, 12, 3)
    ends = []
    for scale in (0.7, 1.9):
        up, down = start, scale**4 * draw(3, 9)
        state = rule.init(up, down)
        for grad in grads:
            up, down, state = rule.step(up, down, grad, draw(3, 9), state, scale=scale)
        ends.append(up)
    assert torch.equal(*ends) == rule.factorwise


@pytest.mark.parametrize("rule", [StelLA(lr=0.02), PoLAR(lr=0.02, strength=1.0), AdamW(lr=0.02)])
def test_pairs_with_a_core_are_trained(rule):
    model = with_core(FullCore.at_identity)
    [pair] = lora_pairs(model)
    optimizer = FactorOptimizer([pair], rule, others=model.parameters())
    assert optimizer.param_groups[1]["params"] == [pair.core]
    x = torch.randn(20, 7, dtype=torch.float64)
    target, core, losses = model(x).detach().flip(0), pair.core.detach().clone(), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(pair.core, core)
    gap = torch.linalg.norm(pair.up.mT @ pair.up - torch.eye(3)).item()
    assert (gap <= 100 * torch.finfo(torch.float64).eps) == isinstance(rule, StelLA)


def test_cores_that_do_not_fit():
    up, down = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"core must be \(2,\) or \(2, 2\), got \(3,\) in query"):
        ParameterPair("query", up, down, core=torch.ones(3))


def test_model_without_a_pair():
    with pytest.raises(ValueError, match="no trainable factor pair in Model"):
        lora_pairs(Model())
    with pytest.raises(ValueError, match="no trainable factor pair in Sequential"):
        lora_pairs(nn.Sequential())
    with pytest.raises(ValueError, match="no trainable factor pair in PeftModel"):
        lora_pairs(adapted("dense").requires_grad_(False))


def unsuitable():
    yield (
        "AdaLoRA",
        lambda: get_peft_model(Model(), AdaLoraConfig(target_modules=["dense"], total_step=10)),
    )
    yield "a KasaLinearVariant", lambda: adapted("dense", kasa_config=KasaConfig())
    yield "a grouped convolution", lambda: adapted("experts")
    yield "a stack of 3 experts", stack_of_experts
    yield "a slice of a tensor-parallel layer", slice_of_a_parallel_layer


def slice_of_a_parallel_layer():
    # Its constructor needs Megatron.
    layer = lora.tp_layer.LoraParallelLinear.__new__(lora.tp_layer.LoraParallelLinear)
    nn.Module.__init__(layer)
    lora.LoraLayer.__init__(layer, nn.Linear(6, 4))
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(6, 2), nn.Linear(2, 4)
    return nn.ModuleDict({"dense": layer})


def stack_of_experts():
    model = nn.Module()
    model.weights = nn.Parameter(torch.randn(3, 6, 4))
    outer = nn.Module()
    outer.dense = model
    return get_peft_model(outer, LoraConfig(r=2, target_modules=[], target_parameters=["weights"]))


@pytest.mark.parametrize(("kind", "make"), list(unsuitable()))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own advice
def test_adapters_that_are_no_product_are_named(kind, make):
    model = make()
    with pytest.raises(ValueError, match=rf"\.default is {kind}, not a product of two factors"):
        lora_pairs(model)
    with pytest.raises(ValueError, match="no trainable factor pair"):
        lora_pairs(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("up", "down"),
    [((4, 2), (3, 6)), ((4,), (4, 6)), ((4, 2), (2,)), ((4, 2, 2), (2, 6)), ((4, 6), (4, 6))],
)
def test_shapes_that_do_not_fit(up, down):
    with pytest.raises(ValueError, match=r"up must be \(m, r\) and down \(r, n\).* in query"):
        ParameterPair("query", nn.Parameter(torch.ones(up)), nn.Parameter(torch.ones(down)))


def test_dtypes_that_do_not_fit():
    up, down = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 6).bfloat16())
    with pytest.raises(ValueError, match=r"of one floating dtype.*float32.*bfloat16.* in query"):
        ParameterPair("query", up, down)
