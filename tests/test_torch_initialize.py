"""PEFT's adapters filled by initializers, and what models show of themselves meanwhile."""

import copy
import sys
import types
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from lowrank_sp.adapters import INITIALIZERS, InputPCA, MeanGradient, SecondMoment, initializers
from lowrank_sp.adapters.initializers import CALIBRATED
from lowrank_sp.adapters.quantize import nf4
from lowrank_sp.torch import (
    Codec,
    attach,
    collect_gradients,
    collect_inputs,
    initialize_,
    lora_pairs,
)

TARGETS = ["query", "key", "value", "dense"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, y, factor=1e3):
    assert torch.linalg.norm(x - y) <= factor * torch.finfo(x.dtype).eps * torch.linalg.norm(y)


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=40, num_attention_heads=2, **sizes)).eval()


IDS = torch.arange(24).reshape(2, 12)
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def outputs(model):
    found = model(input_ids=IDS, attention_mask=MASK)
    return torch.cat([found.last_hidden_state.flatten(), found.pooler_output.flatten()])


def adapted(model, targets, **options):
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), **options}
    return get_peft_model(model, LoraConfig(**config))


# Starts


@pytest.mark.parametrize("name", INITIALIZERS)
def test_outputs_stay_the_same(name):
    base = bert()
    expected = outputs(base)
    model = initialize_(adapted(base, TARGETS), INITIALIZERS[name], rng=0)
    close(outputs(model), expected)
    assert {pair.scale for pair in lora_pairs(model)} == {1.5}


def test_factors_and_residuals_are_those_of_the_initializer():
    base = bert()
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    model = initialize_(adapted(base, ["query"], use_rslora=True), initializers.pissa, rng=0)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            start = initializers.pissa(weights[f"{name}.weight"], 4, alpha=12, rng=0)
            assert layer.scaling["default"] == start.scale == 3.0
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            close(up @ down, start.up @ start.down)
            close(layer.base_layer.weight, start.residual)
            assert layer.lora_A["default"].weight.requires_grad


@pytest.mark.parametrize("name", CALIBRATED)
def test_starts_made_of_data(name):
    base = bert()
    expected = outputs(base)
    statistic = CALIBRATED[name].statistic
    if statistic == "gradient":
        with collect_gradients(base, targets=TARGETS) as data:
            outputs(base).square().sum().backward()
    else:
        first = SecondMoment.of if statistic == "second_moment" else partial(InputPCA.of, rank=4)
        with torch.no_grad(), collect_inputs(base, first, targets=["query", "value"]) as data:
            outputs(base)
    model = adapted(base, ["query", "value"])
    initialize_(model, CALIBRATED[name].initializer, data=data, rng=0)
    if name != "lora_one":
        close(outputs(model), expected)
    assert all(float(pair.down.detach().abs().max()) > 0 for pair in lora_pairs(model))
    with pytest.raises(ValueError, match=r"no data of base_model.model.*query"):
        initialize_(model, CALIBRATED[name].initializer, data={"other": {}})


def test_ranks_and_scales_of_patterns():
    base = bert()
    expected = outputs(base)
    model = adapted(base, TARGETS, rank_pattern={"query": 7}, alpha_pattern={"key": 3})
    initialize_(model, initializers.pissa, rng=0)
    assert {(pair.rank, pair.scale) for pair in lora_pairs(model)} == {
        (7, 6 / 7),
        (4, 3 / 4),
        (4, 6 / 4),
    }
    close(outputs(model), expected)


class Kinds(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.dense = nn.Linear(6, 5)
        self.conv = nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, ids):
        x = self.dense(self.tokens(ids))
        return self.conv(x.mT[:, :, None, :].expand(-1, -1, 3, -1))


@pytest.mark.parametrize("dora", [False, True])
def test_every_kind_of_layer(dora):
    base, ids = Kinds(), torch.arange(10).reshape(2, 5)
    expected = base(ids)
    model = adapted(base, ["tokens", "dense", "conv"], use_dora=dora)
    initialize_(model, initializers.pissa, rng=0)
    close(model(ids), expected)
    assert all(float(pair.up.detach().abs().max()) > 0 for pair in lora_pairs(model))


def test_transposed_weights_of_gpt2():
    base = GPT2Model(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=30, n_positions=16))
    base.eval()
    expected = base(IDS).last_hidden_state
    model = adapted(base, ["c_attn", "c_fc"], fan_in_fan_out=True)
    initialize_(model, initializers.pissa, rng=0)
    close(model(IDS).last_hidden_state, expected)


def test_half_precision():
    base = bert().bfloat16()
    weight = base.pooler.dense.weight.detach().float().clone()
    model = initialize_(adapted(base, ["pooler.dense"]), initializers.pissa, rng=0)
    layer = model.base_model.model.pooler.dense
    [pair] = lora_pairs(model)
    assert pair.up.dtype == torch.float32
    assert layer.base_layer.weight.dtype == torch.bfloat16
    rest = weight - layer.base_layer.weight.float() - pair.delta().detach()
    # What is left is one rounding of the residual.
    assert torch.linalg.norm(rest) <= 2**-8 * torch.linalg.norm(layer.base_layer.weight.float())


def test_quantized_starts_leave_the_decoded_base():
    base = bert()
    weight = base.pooler.dense.weight.detach().clone()
    model = initialize_(adapted(base, ["pooler.dense"]), initializers.loftq, rng=0)
    start = initializers.loftq(weight, 4, alpha=6, rng=0)
    close(model.base_model.model.pooler.dense.base_layer.weight, start.base.to_dense())
    attached = attach(bert(), partial(initializers.loftq, rank=4), targets=["pooler.dense"], rng=0)
    assert len(attached.pooler.dense.base.weight.unique()) < weight.numel()


class Linear4bit(nn.Linear):
    """As quantizers store it: two values a byte, in one column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Coded(nn.Linear):
    """Four bits an entry, and no weight: what a quantizer of one's own may look like."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias.data.copy_(linear.bias)
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.uint8), requires_grad=False)
        self.coded = nf4(linear.weight.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.coded.to_dense(), self.bias)


def encode(layer, weight):
    layer.coded = nf4(weight)


CODECS = {Coded: Codec(lambda layer: layer.coded.to_dense(), encode)}


def over_quantized(make, *, m=48, n=64, rank=4):
    """A PEFT model of one quantized layer and one that is not, and what they had before."""
    torch.manual_seed(0)
    left, right = torch.randn(m, rank), torch.randn(rank, n)
    base = nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, 8))
    with torch.no_grad():
        # A few directions stand out, so that what PiSSA leaves is smaller than the weight.
        base[0].weight.copy_(left @ right / rank + 0.1 * torch.randn(m, n))
    base[0] = make(base[0])
    return adapted(base, ["0", "2"])


def test_residuals_of_quantized_bases_are_quantized_again():
    model = over_quantized(Coded)
    coded, other = (model.base_model.model[k] for k in (0, 2))
    weight, codes = coded.base_layer.coded.to_dense(), coded.base_layer.coded.codes.clone()
    x = torch.randn(5, 64)
    first = coded(x)
    errors = {}
    initialize_(model, initializers.pissa, codecs=CODECS, callback=errors.__setitem__, rng=0)
    pair, _ = lora_pairs(model)
    assert pair.name == "base_model.model.0.default"
    now = coded.base_layer.coded.to_dense()
    lost = weight - now - pair.delta().detach()
    assert not torch.equal(coded.base_layer.coded.codes, codes)
    # What the layer computes has changed by what the quantizer loses of the residual, no more.
    close(coded(x) - first, -x @ lost.mT, factor=1e4)
    residual = initializers.pissa(weight, 4, alpha=6, rng=0).residual
    close(torch.linalg.norm(lost), torch.linalg.norm(residual - nf4(residual).to_dense()), 1e4)
    assert errors.keys() == {"base_model.model.0", "base_model.model.2"}
    assert errors["base_model.model.0"] == pytest.approx(
        float(torch.linalg.norm(lost) / torch.linalg.norm(weight)), rel=1e-4
    )
    # Less than quantizing the weight has lost before.
    exact = over_quantized(lambda linear: linear).base_model.model[0].base_layer.weight.detach()
    alone = torch.linalg.norm(exact - weight) / torch.linalg.norm(exact)
    assert 1e-3 < errors["base_model.model.0"] < 0.7 * float(alone)
    assert errors["base_model.model.2"] <= 10 * torch.finfo(torch.float32).eps
    assert other.base_layer.weight.is_floating_point()


def test_starts_that_leave_the_weight_leave_its_codes():
    model = over_quantized(Coded)
    layer = model.base_model.model[0]
    coded, errors = layer.base_layer.coded, {}
    first = layer(torch.ones(1, 64))
    initialize_(model, initializers.lora, codecs=CODECS, callback=errors.__setitem__, rng=0)
    assert layer.base_layer.coded is coded
    assert torch.equal(layer(torch.ones(1, 64)), first)
    assert set(errors.values()) == {0.0}
    assert float(layer.lora_A["default"].weight.detach().abs().max()) > 0


class BitsAndBytes(types.ModuleType):
    """The few names of bitsandbytes that are used, as of 0.50, without its kernels."""

    class Params4bit(nn.Parameter):
        def __new__(cls, data, requires_grad=False, quant_state=None, **options):
            self = torch.Tensor._make_subclass(cls, data, requires_grad)
            self.quant_state, self.options = quant_state, options
            self.blocksize, self.module = options["blocksize"], options["module"]
            self.compress_statistics = options["compress_statistics"]
            self.quant_type, self.quant_storage = options["quant_type"], options["quant_storage"]
            return self

        def to(self, device):
            del device
            if self.quant_state is None:
                coded = nf4(self.data, block=self.blocksize)
                self.quant_state = types.SimpleNamespace(coded=coded, dtype=self.data.dtype)
                self.data = coded.codes.reshape(-1, 1)
            return self

    class Linear4bit(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.quant_state.coded.to_dense(), self.bias)

    class Int8Params(nn.Parameter):
        def __new__(cls, data, requires_grad=True, has_fp16_weights=False):
            self = torch.Tensor._make_subclass(cls, data, requires_grad)
            assert not has_fp16_weights
            self.CB = self.SCB = None
            return self

        def to(self, device):
            del device
            half = self.data.half().float()
            self.SCB = half.abs().amax(1)
            self.CB = self.data = (half * (127 / self.SCB[:, None])).round().to(torch.int8)
            return self

    class Linear8bitLt(nn.Linear):
        def init_8bit_state(self):
            self.state = types.SimpleNamespace(CB=self.weight.CB, SCB=self.weight.SCB)
            self.weight.CB = self.weight.SCB = None

        def forward(self, x):
            if self.weight.CB is not None:
                self.init_8bit_state()
            dense = self.state.CB * (self.state.SCB[:, None] / 127)
            return nn.functional.linear(x, dense, self.bias)

    def __init__(self):
        super().__init__("bitsandbytes")
        self.nn = self
        self.functional = types.SimpleNamespace(
            dequantize_4bit=lambda _, state: state.coded.to_dense(),
            int8_vectorwise_dequant=lambda codes, scales: codes * (scales[:, None] / 127),
        )

    def coded(self, linear, bits):
        m, n = linear.out_features, linear.in_features
        if bits == 4:
            layer = self.Linear4bit(n, m)
            options = {"blocksize": 32, "compress_statistics": False, "quant_type": "nf4"}
            layer.weight = self.Params4bit(
                linear.weight.detach(), quant_storage=torch.uint8, module=layer, **options
            )
        else:
            layer = self.Linear8bitLt(n, m)
            layer.weight = self.Int8Params(linear.weight.detach(), requires_grad=False)
        layer.weight = layer.weight.to("cpu")
        return layer


@pytest.mark.parametrize(("bits", "most"), [(4, 0.07), (8, 0.02)])
@pytest.mark.parametrize("called", [False, True])
def test_layers_of_bitsandbytes(bits, most, called, monkeypatch):
    library = BitsAndBytes()
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    same, model = (over_quantized(partial(library.coded, bits=bits)) for _ in range(2))
    layer, x = model.base_model.model[0], torch.randn(5, 64)
    before = same.base_model.model[0](x)
    if called:
        layer(x)
    errors = {}
    initialize_(model, initializers.pissa, callback=errors.__setitem__, rng=0)
    assert not layer.base_layer.weight.is_floating_point()
    assert 1e-4 < errors["base_model.model.0"] < most
    change = torch.linalg.norm(layer(x) - before) / torch.linalg.norm(
        before - layer.base_layer.bias
    )
    assert float(change.detach()) < 2 * errors["base_model.model.0"]
    if bits == 4:
        assert layer.base_layer.weight.blocksize == 32
        assert layer.base_layer.weight.module is layer.base_layer
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(ValueError, match=r"model\.0 was packed for CPUs by bitsandbytes"):
            initialize_(model, initializers.pissa)


def quantized():
    model = adapted(nn.Sequential(nn.Linear(6, 4)), ["0"])
    layer = model.base_model.model[0]
    layer.base_layer = Linear4bit(layer.base_layer)
    return model


def without_values():
    return adapted(nn.Sequential(nn.Linear(6, 4, device="meta")), ["0"])


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    return adapted(model, ["0"])


def with_core(weight, rank, *, alpha, rng, dtype):
    del alpha
    gradient = torch.ones_like(weight)
    return initializers.lora_sb(weight, rank, gradient=gradient, step=1.0, rng=rng, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "initializer", "error", "message"),
    [
        (
            quantized,
            initializers.pissa,
            ValueError,
            r"quantized Linear4bit.*give codecs={Linear4bit: Codec\(decode, encode\)}",
        ),
        (without_values, initializers.pissa, ValueError, "model.0 is on the meta device.*load"),
        (tied, initializers.pissa, ValueError, r"shares its weight with .*\.1\.weight.*untie"),
        (lambda: bert(), initializers.pissa, ValueError, "no trainable LoRA adapter of PEFT"),
        (lambda: adapted(bert(), ["query"]), with_core, TypeError, "two factors, got a CoreStart"),
        (
            lambda: adapted(nn.ModuleList([nn.MultiheadAttention(8, 2)]), ["0"]),
            initializers.pissa,
            ValueError,
            "MultiheadAttention has no single weight",
        ),
    ],
)
def test_what_cannot_be_initialized(make, initializer, error, message):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        initialize_(model, initializer)
    for name, v in model.state_dict().items():
        assert v.is_meta or torch.equal(v, before[name])


# Collectors


def test_second_moments_of_tokens_that_are_not_padding():
    model = bert()
    states = []
    hook = model.encoder.layer[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad(), collect_inputs(model, SecondMoment.of, targets=TARGETS) as seen:
        for _ in range(2):
            outputs(model)
    hook.remove()
    rows = torch.cat([x[MASK.bool()] for x in states]).double()
    query = seen["encoder.layer.0.attention.self.query"]
    assert query.count == len(rows) == 38
    close(query.mean, rows.T @ rows / len(rows), factor=1e9)
    # The pooler sees one token of every sentence.
    assert seen["pooler.dense"].count == 4
    assert seen["encoder.layer.1.intermediate.dense"].count == 38
    for name in ("key", "value"):
        assert seen[f"encoder.layer.0.attention.self.{name}"] is query
    assert seen["encoder.layer.1.attention.self.query"] is not query
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_masks():
    model = bert()
    with (
        torch.no_grad(),
        collect_inputs(model, SecondMoment.of, targets=["key"], mask=None) as seen,
    ):
        outputs(model)
    assert {statistic.count for statistic in seen.values()} == {24}
    with (
        torch.no_grad(),
        collect_inputs(model, SecondMoment.of, targets=["key"]) as seen,
        pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, length\)"),
    ):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 12, 12))
    with torch.no_grad(), collect_inputs(model, SecondMoment.of, targets=["key"]) as seen:
        model(input_ids=IDS, attention_mask=torch.zeros(2, 12))
    assert not seen


def test_principal_components_of_a_stream():
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 7, 6)
    statistic = partial(InputPCA.of, rank=6, rng=0)
    with torch.no_grad(), collect_inputs(model, statistic, targets=["0"]) as seen:
        for batch in x:
            model(batch)
    rows = x.flatten(0, 1) - x.mean((0, 1))
    _, s, _ = torch.linalg.svd(rows, full_matrices=False)
    close(seen["0"].values, s)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: adapted(m, ["query", "c_attn"])])
def test_mean_gradients(wrap):
    plain = bert()
    model = wrap(copy.deepcopy(plain))
    weight = plain.encoder.layer[0].attention.self.query.weight
    expected = []
    for k in (1, 2):
        plain.zero_grad()
        (k * outputs(plain).square().sum()).backward()
        expected.append(weight.grad.clone())
    kept = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 3.0)
        kept[name] = p.requires_grad, p.grad
    with collect_gradients(model, targets=["query"], device="cpu") as seen:
        for k in (1, 2):
            (k * outputs(model).square().sum()).backward()
            assert all(p.grad is None or (p.grad == 3).all() for p in model.parameters())
    assert set(seen) == {f"encoder.layer.{k}.attention.self.query" for k in (0, 1)}
    statistic = seen["encoder.layer.0.attention.self.query"]
    assert isinstance(statistic, MeanGradient)
    assert statistic.count == 2
    close(statistic.mean, (expected[0] + expected[1]) / 2)
    for name, p in model.named_parameters():
        assert p.requires_grad == kept[name][0]
        assert p.grad is kept[name][1]
        assert not p._post_accumulate_grad_hooks


def test_mean_gradients_of_attached_and_transposed_layers():
    base = GPT2Model(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=30, n_positions=16))
    base.eval()
    gradients = []
    for model in (
        base,
        attach(copy.deepcopy(base), partial(initializers.lora, rank=2), targets=["c_fc"]),
    ):
        with collect_gradients(model, targets=["c_fc"]) as seen:
            model(IDS).last_hidden_state.square().sum().backward()
        gradients.append(seen["h.0.mlp.c_fc"].mean)
    assert gradients[0].shape == (48, 12)
    close(*gradients)


def test_gradients_that_are_not_finite_and_layers_without():
    model = nn.Sequential(nn.Linear(3, 2))
    with (
        collect_gradients(model, targets=["0"]) as seen,
        pytest.raises(ValueError, match="finite"),
    ):
        model(torch.full((1, 3), float("nan"))).sum().backward()
    assert not seen
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with (
        pytest.raises(ValueError, match="quantized Linear4bit"),
        collect_gradients(nn.Sequential(Linear4bit(nn.Linear(4, 2))), targets=["0"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="1 must be a linear layer, got a ReLU"),
        collect_inputs(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), SecondMoment.of, targets=["1"]),
    ):
        pass
