"""Attached forms: the layers compute what the forms say, train what is to be trained, and go."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from form_cases import random_values, weight_of
from form_cases_all import CASES, LAYERED
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from lowrank_sp.adapters import InputPCA, forms, initializers
from lowrank_sp.adapters.catalog import LayeredStart, variant
from lowrank_sp.torch import (
    Adapted,
    FactorOptimizer,
    attach,
    attach_forms,
    attach_shared,
    collect_gradients,
    collect_inputs,
    detach,
    forms_of,
    layered_forms_of,
    load_state_,
    lora_pairs,
    merge_,
    state,
)
from lowrank_sp.updates import ScaledGD

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
layered_cases = pytest.mark.parametrize("case", LAYERED, ids=[case.name for case in LAYERED])
EPS = torch.finfo(torch.float32).eps
TARGETS = ["query", "key", "value", "dense"]
plain = partial(forms.Product.create, rank=4, alpha=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, y, factor=1e3):
    assert torch.linalg.norm(x - y) <= factor * torch.finfo(x.dtype).eps * torch.linalg.norm(y)


def mlp(m=6, n=5):
    return nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, 3))


def tensors_of(weight):
    return torch.asarray(np.array(weight, np.float32))


def bert(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=40, num_attention_heads=2, **sizes, **options)
    model = BertModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))  # biases start at zero
    return model


def tokens():
    return torch.arange(24).reshape(2, 12)


def hidden(model):
    output = model(tokens())
    return torch.cat([output.last_hidden_state.flatten(), output.pooler_output.flatten()])


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, x, target, steps=3):
    """Losses before and after some steps on all that requires a gradient."""
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Every form


@cases
def test_every_form_trains_and_merges(case):
    m, n = case.shape
    model = attach(mlp(m, n), lambda w, rng: case.create(w, rng), targets=["0"], rng=0)
    layer, base = model[0], model[0].base
    form = layer.form()
    assert (
        form.num_trainable == case.num_trainable == sum(p.numel() for p in trained(model).values())
    )
    x, target = torch.randn(20, n), torch.randn(20, 3)
    losses = train(model, x, target)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in trained(model).values())
    assert all(p.grad is None for p in base.parameters())

    close(layer(x), form_of(layer).adapt(x, x @ base.weight.mT) + base.bias)
    expected = model(x).detach()
    assert merge_(model)[0] is base
    close(model(x), expected)


def form_of(layer):
    """The form, of copies of the arrays."""
    form = layer.form()
    return form.replace({name: a.detach().clone() for name, a in form.arrays().items()})


@cases
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_every_form_is_compiled(case):
    m, n = case.shape
    model = attach(mlp(m, n), lambda w, rng: case.create(w, rng), targets=["0"], rng=0)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.1 * torch.randn(p.shape))
    x = torch.randn(20, n)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    close(compiled(x), model(x))
    for name, p in trained(model).items():
        close(compiled.get_parameter(f"_orig_mod.{name}").grad, p.grad)


@layered_cases
def test_every_form_of_many_layers_trains_and_merges(case):
    model = nn.ModuleList(nn.Linear(n, m) for m, n in case.shapes)
    names = [str(k) for k in range(len(case.shapes))]
    attach_shared(model, case.create, targets=names, rng=0)
    assert sum(p.numel() for p in trained(model).values()) == case.num_trainable
    assert all(name.startswith("shared_adapters.0.") for name in trained(model))
    xs = [torch.randn(20, n) for _, n in case.shapes]
    targets = [torch.randn(20, m) for m, _ in case.shapes]

    def outputs(model):
        return [model[k](x) for k, x in enumerate(xs)]

    def loss(model):
        return sum((y - t).square().mean() for y, t in zip(outputs(model), targets, strict=True))

    optimizer, first = torch.optim.Adam(trained(model).values(), lr=1e-2), loss(model).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < first
    [(group, form)] = layered_forms_of(model).items()
    assert list(group) == names
    for k, (x, y) in enumerate(zip(xs, outputs(model), strict=True)):
        base = model[k].base
        close(y, form.layer(k).adapt(x, x @ base.weight.mT) + base.bias)

    expected = [y.detach() for y in outputs(model)]
    other = nn.ModuleList(copy.deepcopy(layer.base) for layer in list(model)[: len(names)])
    attach_forms(other, layered_forms_of(model))
    merge_(model)
    assert not hasattr(model, "shared_adapters")
    for pair in (
        zip(outputs(model), expected, strict=True),
        zip(outputs(other), expected, strict=True),
    ):
        for y, z in pair:
            close(y, z)


# Against PEFT


def peft_bert(model, **options):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **options
    )
    return get_peft_model(model, config)


def filled_from(theirs, ours):
    """Our adapters with the values of PEFT's."""
    values = {}
    for name, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            values[f"{name}.up"] = layer.lora_B["default"].weight
            values[f"{name}.down"] = layer.lora_A["default"].weight
            if "default" in layer.lora_magnitude_vector:
                values[f"{name}.magnitude"] = layer.lora_magnitude_vector["default"].weight
    return load_state_(ours, values)


def assert_same_step(ours, theirs, forward, factor=1e3):
    """Equal outputs, and equal gradients of all that is trained."""
    torch.manual_seed(1)
    expected = forward(theirs)
    torch.manual_seed(1)
    actual = forward(ours)
    close(actual, expected, factor)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, p in trained(ours).items():
        layer, _, array = name.rpartition(".adapter.")
        module = theirs.base_model.model.get_submodule(layer)
        found = {
            "up": lambda m: m.lora_B["default"].weight,
            "down": lambda m: m.lora_A["default"].weight,
            "magnitude": lambda m: m.lora_magnitude_vector["default"].weight,
        }[array](module)
        close(p.grad, found.grad, factor)
    assert len(grads) == len(trained(ours))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_of_peft(dora, dropout):
    base = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = peft_bert(copy.deepcopy(base), use_dora=dora, lora_dropout=dropout).train()
    create = partial((forms.RowMagnitude if dora else forms.Product).create, rank=4, alpha=6)
    ours = attach(base, create, targets=TARGETS, dropout=dropout).train()
    filled_from(theirs, ours)
    assert_same_step(ours, theirs, hidden)
    ours.eval(), theirs.eval()
    close(hidden(ours), hidden(theirs))


def test_transposed_weights_of_gpt2():
    config = GPT2Config(
        n_embd=12, n_layer=2, n_head=2, vocab_size=30, n_positions=16, resid_pdrop=0, attn_pdrop=0
    )
    base = GPT2Model(config).eval()
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    )
    ours = attach(base, plain, targets=["c_attn", "c_fc"], rng=0)
    filled_from(theirs, ours)
    assert_same_step(ours, theirs, lambda m: m(tokens()[:, :8]).last_hidden_state)
    expected = ours(tokens()).last_hidden_state.detach()
    close(merge_(ours)(tokens()).last_hidden_state, expected)


def test_half_precision_of_the_base():
    base = bert(hidden_dropout_prob=0.0).bfloat16()
    theirs = peft_bert(copy.deepcopy(base))
    ours = attach(base, plain, targets=TARGETS, rng=0)
    assert {p.dtype for p in trained(ours).values()} == {torch.float32}
    filled_from(theirs, ours)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    layer = ours.encoder.layer[0].attention.self.query
    assert layer(x).dtype == torch.bfloat16
    # Scaled before the product with up or after it: the last bit differs.
    close(layer(x), theirs.base_model.model.encoder.layer[0].attention.self.query(x), factor=2)


@pytest.mark.parametrize(
    "targets",
    [
        ["query"],
        ["self.query", "output.dense"],
        ["encoder.layer.1.attention.self.key"],
        r".*\.1\..*key",
    ],
)
def test_targets_mean_what_peft_means(targets):
    model = bert()
    config = LoraConfig(target_modules=targets)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    expected = [name for name in linear if check_target_module_exists(config, name)]
    assert expected
    assert list(forms_of(attach(model, plain, targets=targets))) == expected


def test_all_linear_layers_and_predicates():
    model = bert()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    ours = attach(copy.deepcopy(model), plain, targets="all-linear")
    assert list(forms_of(ours)) == linear
    wide = attach(model, plain, targets=lambda _, m: getattr(m, "out_features", 0) == 24)
    assert list(forms_of(wide)) == [name for name in linear if "intermediate" in name]


# What is trained, held and saved


def test_gradients_flow_to_trained_arrays_only():
    model = attach(bert(), plain, targets=TARGETS, rng=0)
    hidden(model).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (".adapter." in name)
        assert (p.grad is not None) == p.requires_grad


def test_each_layer_draws_its_own_start():
    models = [attach(bert(), plain, targets=TARGETS, rng=3) for _ in range(2)]
    downs = [form.down for form in forms_of(models[0]).values() if form.down.shape[1] == 16]
    assert len({down.sum().item() for down in downs}) == len(downs)
    for name, array in state(models[0]).items():
        assert torch.equal(array, state(models[1])[name])


def test_the_weight_is_referred_to():
    model = attach(mlp(), partial(forms.RowMagnitude.create, rank=2), targets=["0", "2"], rng=0)
    weight = model[0].base.weight
    assert model[0].form().weight.data_ptr() == weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in mlp().parameters()
    ) + sum(form.num_trainable for form in forms_of(model).values())
    assert not list(model.buffers())


def test_common_arrays_are_registered_once():
    basis = torch.randn(6, 2), torch.randn(2, 6)

    def create(weight, **_):
        m, n = weight.shape
        outer, inner = torch.zeros(m), torch.ones(2)
        return forms.Gains(basis[0][:m], basis[1][:, :n], outer, inner)

    model = attach(
        nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), create, targets="all-linear"
    )
    assert sum(b.numel() for b in model.buffers()) == 24
    assert model[0].form().up is model[2].form().up
    assert {name for name in state(model) if "shared" in name} == {
        "shared_adapters.0.0",
        "shared_adapters.0.1",
    }
    x = torch.randn(4, 6)
    assert train(model, x, torch.randn(4, 6))[-1] < train(model, x, torch.randn(4, 6), 0)[0]
    double = copy.deepcopy(model).double()
    assert double[0].form().up is double[1].form().up
    assert double[0].form().up.dtype == torch.float64
    assert double[0].form().up is not model[0].form().up
    close(double(x.double()).float(), model(x))


def test_state_goes_and_comes_back():
    first = attach(bert(), partial(forms.RowMagnitude.create, rank=2), targets=TARGETS, rng=0)
    train(first.pooler, torch.randn(3, 4, 16), torch.randn(3, 16))
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in trained(second).values():
            p.add_(torch.randn(p.shape))
    saved = state(first)
    assert set(saved) == {
        f"{name}.{array}" for name, form in forms_of(first).items() for array in form.parameters()
    }
    assert not any(array.requires_grad for array in saved.values())
    load_state_(second, saved)
    assert torch.equal(hidden(second), hidden(first))
    name = next(iter(saved))
    for wrong, message in [
        ({k: v for k, v in saved.items() if k != name}, f"{name} is missing"),
        ({**saved, "x.up": saved[name]}, "x.up is unknown"),
        ({**saved, name: saved[name][:1]}, f"{name} has shape"),
    ]:
        before = state(second)[name].clone()
        with pytest.raises(ValueError, match=re.escape(message)):
            load_state_(second, wrong)
        assert torch.equal(state(second)[name], before)


def test_forms_of_other_libraries_are_attached():
    model = mlp()
    start = initializers.pissa(model[0].weight.detach().numpy(), 2, rng=0)
    expected = model(torch.ones(1, 5))
    attach_forms(model, {"0": start})
    close(model(torch.ones(1, 5)), expected)
    assert isinstance(model[0].form().up, nn.Parameter)
    close(model[0].weight, torch.asarray(start.residual))


def test_detaching_gives_everything_back():
    model = mlp()
    model[0].bias.requires_grad_(False)
    before, modules = copy.deepcopy(model.state_dict()), list(model)
    attach(model, partial(forms.Product.create, rank=2), targets=["0", "2"], rng=0)
    train(model, torch.randn(9, 5), torch.randn(9, 3))
    expected = model(torch.ones(1, 5)).detach()
    taken = detach(model)
    assert list(model) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert set(trained(model)) == {"0.weight", "2.weight", "2.bias"}
    assert torch.equal(attach_forms(model, taken)(torch.ones(1, 5)), expected)
    for act in (detach, merge_, forms_of):
        with pytest.raises(ValueError, match="Sequential has no adapter"):
            act(mlp())


def test_starts_move_the_weight():
    model = bert()
    expected = hidden(model)
    attach(model, partial(initializers.pissa, rank=4, alpha=8), targets=TARGETS, rng=0)
    close(hidden(model), expected)
    layer = model.encoder.layer[0].attention.self.query
    assert torch.linalg.matrix_norm(layer.base.weight, 2) < torch.linalg.matrix_norm(
        layer.form().merge(layer.base.weight), 2
    )
    close(hidden(merge_(model)), expected)


def test_data_of_layers_reach_the_initializer():
    moment = torch.eye(5) + torch.ones(5, 5)
    model, x = mlp(), torch.randn(4, 5)
    weight, expected = model[0].weight.detach().clone(), model(x)
    attach(
        model,
        partial(initializers.corda_ipm, rank=2),
        targets=["0"],
        data={"0": {"second_moment": moment}},
    )
    direct = initializers.corda_ipm(weight, 2, second_moment=moment)
    close(model[0].weight, direct.residual)
    close(model(x), expected)
    with pytest.raises(ValueError, match="no data of 2"):
        attach(model, plain, targets=["2"], data={"0": {}})


# Variants by name


@pytest.mark.parametrize(
    "name", ["LoRA", "PiSSA", "DoRA", "LoHa", "EVA", "LoRA-GA", "CaRA", "LoTR"]
)
def test_variants_are_attached_by_name(name):
    model, x = mlp(), torch.randn(20, 5)
    expected = model(x)
    with torch.no_grad(), collect_inputs(model, partial(InputPCA.of, rank=4), targets=["0"]) as pca:
        model(x)
    with collect_gradients(model, targets=["0"]) as gradients:
        model(x).square().mean().backward()
    row = variant(name)
    if row.layered:
        attach_shared(model, partial(row.start, rank=2), targets=["0"], rng=0)
    else:
        data = {"components": pca, "gradient": gradients}.get(row.needs)
        attach(model, partial(row.start, rank=2), targets=["0"], data=data, rng=0)
    close(model(x), expected)
    losses = train(model, x, torch.randn(20, 3))
    assert losses[-1] < losses[0]


def test_a_start_that_leaves_the_weight_needs_none_that_can_be_changed():
    model = mlp(5, 5)
    model[2] = nn.Linear(5, 5)
    model[2].weight = model[0].weight
    attach(model, partial(variant("LoRA").start, rank=2), targets=["0"])
    quantized = nn.Sequential(Linear4bit(nn.Linear(6, 4)))
    attach(quantized, partial(variant("LoRA").start, rank=2), targets=["0"])
    shared = nn.Sequential(Linear4bit(nn.Linear(6, 4)))
    attach_shared(shared, partial(variant("LoTR").start, rank=2), targets=["0"])
    assert all(isinstance(m[0], Adapted) for m in (model, quantized, shared))


def test_a_start_of_many_layers_may_move_their_weights():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    weights = [torch.randn(5, 5) for _ in model]
    form = forms.SharedUp.create(weights, 2, rng=0)
    with pytest.raises(ValueError, match="weights of 2 layers, got 1"):
        attach_forms(model, {("0", "1"): LayeredStart(form, weights[:1])})
    attach_forms(model, {("0", "1"): LayeredStart(form, weights)})
    assert all(torch.equal(model[k].base.weight, w) for k, w in enumerate(weights))


# Optimizers, copies, checkpoints


@pytest.mark.parametrize(
    ("create", "count"),
    [
        (partial(forms.Product.create, rank=2, alpha=4), 1),
        (partial(forms.FixedDown.create, rank=2, alpha=4), 1),
        (partial(forms.RowMagnitude.create, rank=2, alpha=4), 1),
        (partial(forms.HadamardProduct.create, rank=2), 2),
        (partial(forms.FixedSides.create, rank=2), 0),
    ],
)
def test_products_are_pairs(create, count):
    model = attach(mlp(), create, targets=["0"], rng=0)
    model[2].requires_grad_(True)
    if not count:
        with pytest.raises(ValueError, match="no trainable factor pair"):
            lora_pairs(model)
        return
    pairs = lora_pairs(model)
    assert len(pairs) == count
    assert all(pair.name.startswith("0") for pair in pairs)
    optimizer = FactorOptimizer(pairs, ScaledGD(lr=0.05), others=model.parameters())
    x, target, losses = torch.randn(20, 5), torch.randn(20, 3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if count == 1:
        close(pairs[0].delta(), 2.0 * pairs[0].up @ pairs[0].down)


def test_copies_are_independent():
    weights = [nn.Linear(5, 5), nn.Linear(5, 5)]
    model = attach_shared(
        nn.Sequential(*weights), partial(forms.SharedUp.create, rank=2), targets="all-linear", rng=0
    )
    twin = copy.deepcopy(model)
    x = torch.randn(3, 5)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for p in trained(twin).values():
            p.add_(1.0)
    assert not torch.allclose(twin(x), model(x))
    assert twin[0].form().up is trained(twin)["shared_adapters.0.up"]


def test_checkpointed_layers_have_the_same_gradients():
    model = attach(mlp(), partial(forms.RowMagnitude.create, rank=2), targets=["0", "2"], rng=0)
    x = torch.randn(7, 5)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for name, p in trained(model).items():
        assert torch.equal(p.grad, expected[name])


def test_data_parallel_and_modules_in_several_places():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    attach(model, partial(forms.Product.create, rank=2), targets=["0"], rng=0)
    assert model[0] is model[2]
    assert isinstance(model[0], Adapted)
    x = torch.randn(3, 4)
    assert torch.equal(nn.DataParallel(model)(x), model(x))
    # Replicas get the arrays of the layers as they get all parameters.
    assert dict(model[0].named_parameters()).keys() == {
        "base.weight",
        "base.bias",
        "adapter.up",
        "adapter.down",
    }


def replicated(model):
    """A replica as of ``torch.nn.DataParallel``, whose tensors are results, not parameters."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    tensors = {t: t.clone() for t in [*model.parameters(), *model.buffers()]}
    for module, replica in copies.items():
        replica._former_parameters = {}
        for key, child in module._modules.items():
            if child is not None:
                replica._modules[key] = copies[child]
                setattr(replica, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, tensors[parameter])
                replica._former_parameters[key] = tensors[parameter]
        for key, buffer in module._buffers.items():
            replica._buffers[key] = None if buffer is None else tensors[buffer]
    return copies[model]


@pytest.mark.parametrize(
    "attached",
    [
        partial(attach, create=partial(forms.RowMagnitude.create, rank=2)),
        partial(attach, create=partial(variant("LoHa").start, rank=2)),
        partial(attach_shared, create=partial(forms.SharedUp.create, rank=2)),
        partial(attach_shared, create=partial(forms.Tied.create, rank=2)),
    ],
)
def test_replicas_have_the_same_outputs_and_their_gradients_add_up(attached):
    model = attached(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), targets=["0", "2"])
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.1 * torch.randn(p.shape))
    x = torch.randn(8, 5)
    expected = model(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    parts = [replicated(model)(rows) for rows in x.chunk(2)]
    close(torch.cat(parts), expected)
    torch.cat(parts).square().sum().backward()
    for name, p in trained(model).items():
        close(p.grad, grads[name])


# Refusals


class Linear4bit(nn.Linear):
    """As quantizers store it: two values a byte, in one column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.linear = linear
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return self.linear(x)


def test_quantized_bases_get_forms_that_need_no_weight():
    model = nn.Sequential(Linear4bit(nn.Linear(6, 4)))
    x = torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(TypeError, match=r"RowMagnitude is made from the weight itself.*\(4, 6\)"):
        attach(model, partial(forms.RowMagnitude.create, rank=2), targets=["0"])
    attach(model, partial(forms.Product.create, rank=2), targets=["0"], rng=0)
    assert torch.equal(model(x), expected)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    losses = train(model, x, torch.randn(3, 4))
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"0 is a quantized Linear4bit.*dequantize"):
        merge_(model)
    assert isinstance(model[0], Adapted)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["querry"], "no module of BertModel is called querry; the nearest names are.*query"),
        (["query", "valu"], "called valu; the nearest names are.*value"),
        ("query", "called query.*regular expression.*'query'"),
        ([], "at least one target"),
        (lambda *_: False, "satisfies the predicate"),
        (["LayerNorm"], "LayerNorm cannot be adapted.*a matrix.*LayerNorm"),
    ],
)
def test_targets_that_cannot_be(targets, message):
    model = bert()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        attach(model, plain, targets=targets)
    assert all(p.requires_grad for p in before.values())
    assert dict(model.named_parameters()).keys() == before.keys()


def test_layers_whose_weight_others_take():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleList([layer])
    with pytest.raises(ValueError, match=r"linear1 cannot be adapted: torch.nn.TransformerEncoder"):
        attach(model, plain, targets=["linear1"])
    with pytest.raises(
        ValueError, match=r"out_proj cannot be adapted: torch.nn.MultiheadAttention"
    ):
        attach(model, plain, targets=["out_proj"])


def test_adapted_layers_are_not_adapted_again():
    model = attach(bert(), plain, targets=["query"])
    with pytest.raises(ValueError, match="query cannot be adapted: it has an adapter"):
        attach(model, plain, targets=["query"])
    attach(model, plain, targets=["key"])
    assert len(forms_of(model)) == 4
    assert len(trained(model)) == 8


def test_tied_weights_are_not_moved():
    model = mlp(5, 5)
    model[2] = nn.Linear(5, 5)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0 shares its weight with 2.weight.*untie"):
        attach(model, partial(initializers.pissa, rank=2), targets=["0"])
    attach(model, partial(forms.Product.create, rank=2), targets=["0"])
    with pytest.raises(ValueError, match=r"0 shares its weight with 2.weight.*untie"):
        merge_(model)


def test_forms_that_do_not_fit():
    model, form = mlp(), forms.Product.create((6, 4), 2)
    shared = forms.SharedUp.create([(6, 5), (6, 5)], 2)
    for made, error, message in [
        ({"0": form}, ValueError, r"form of 0 must have its shape \(6, 5\), got \(6, 4\)"),
        ({"0": shared}, TypeError, "attach_shared"),
        ({("0", "2"): form}, TypeError, "needs a LayeredForm, got Product"),
        ({("0",): shared}, ValueError, "must be of 1 layers.*of 2"),
        (
            {("0", "2"): shared},
            ValueError,
            r"layer 1 of the form must have the shape of 2, \(3, 6\)",
        ),
        ({"0": form, ("0",): shared}, ValueError, "one form, got several for 0"),
        ({"1.x": form}, ValueError, "is called 1.x"),
    ]:
        with pytest.raises(error, match=message):
            attach_forms(model, made)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        attach(model, plain, targets=["0"], dropout=1.0)
    assert not any(isinstance(m, Adapted) for m in model.modules())


def test_random_values_of_every_form_survive(host):
    """Values of NumPy forms are those that the layers compute with."""
    for case in CASES[:3]:
        weight = weight_of(case)
        form = random_values(case.create(weight, 0), np.asarray)
        model = nn.Sequential(nn.Linear(case.shape[1], case.shape[0], bias=False).double())
        with torch.no_grad():
            model[0].weight.copy_(torch.asarray(weight))
        attach_forms(model, {"0": form})
        x = np.random.default_rng(1).standard_normal((4, case.shape[1]))
        y = host(model(torch.asarray(x)))
        np.testing.assert_allclose(y, form.adapt(x, x @ weight.T), rtol=1e-12, atol=1e-12)
