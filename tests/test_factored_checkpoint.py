"""Checkpoints in two factors: written, read, counted, and loaded into PyTorch models."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import gaussian
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaForCausalLM

import lowrank_sp as lr
from lowrank_sp import checkpoint
from lowrank_sp.adapters import SecondMoment
from lowrank_sp.adapters.compress import svd_llm
from lowrank_sp.checkpoint import (
    Checkpoint,
    CheckpointError,
    compress,
    read_factored,
    write_factored,
)
from lowrank_sp.testing import assert_same_product
from lowrank_sp.torch import FactoredLinear, collect_inputs, load_factored_

HIDDEN = 48
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.write_demo_model(folder, hidden=HIDDEN, layers=1)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return folder


def moments(folder):
    """Second moments of inputs whose variances decay."""
    found = {}
    for layer in Checkpoint(folder).layers():
        n = layer.shape[1]
        x = gaussian(3 * n, n, seed=len(layer.name)) * np.geomspace(1, 0.1, n)
        found[layer.name] = SecondMoment.of(x)
    return found


def weights(folder):
    return {x.name: x.tensor.read() for x in Checkpoint(folder).layers()}


def ranks(report):
    return {row.name: row.rank for row in report.layers}


def sizes(folder):
    """Parameters by tensor, as the files have them."""
    return {k: math.prod(t.shape) for k, t in Checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("keep", [0.35, 0.6, 0.9])
def test_the_budget_is_met_in_the_file(keep, model, tmp_path):
    report = compress(model, tmp_path / "out", moments(model), keep=keep)
    before, after = sizes(model), sizes(tmp_path / "out")
    every = weights(model)
    total = sum(w.size for w in every.values())
    others = sum(before.values()) - total
    assert report.totals["parameters_before"] == total
    parameters = report.totals["parameters"]
    assert sum(after.values()) - others == parameters <= keep * total
    assert parameters > keep * total - sum(max(w.shape) * 2 for w in every.values())
    dense = report.notes.get("layers that stay as they are", [])
    assert ranks(report).keys() | set(dense) == set(every)
    for name in ranks(report):
        assert f"{name}.weight" not in after


def test_factors_are_those_of_svd_llm(model, tmp_path):
    report = compress(model, tmp_path / "out", moments(model), keep=0.5)
    found, losses = read_factored(tmp_path / "out"), []
    for row in report.layers:
        w, c = weights(model)[row.name], moments(model)[row.name].mean
        expected, error = svd_llm(w, row.rank, second_moment=c)
        f = found.pop(row.name)
        assert f.rank == row.rank
        assert_same_product(expected, f, tol=1e-4)
        norm = lr.output_norm(w, covariance=c)
        assert abs(row.norm - norm) <= 1e-5 * norm
        assert abs(row.error - error) <= 1e-3 * error
        losses.append(row.relative_error**2)
    assert not found
    error = np.sqrt(np.sum(losses) / len(weights(model)))
    assert abs(report.totals["error"] - error) <= 1e-3 * error
    assert report.totals["bound"] <= report.totals["error"]
    assert checkpoint.JobReport.load(tmp_path / "out" / "report.json").totals == report.totals


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_errors_are_those_of_the_stored_factors(dtype, tmp_path):
    w = lr.truncated_svd(gaussian(30, 40), 4, rng=0).to_dense().astype(dtype)
    save_file({"a.weight": w}, tmp_path / "model.safetensors")
    moment = SecondMoment.of(gaussian(200, 40))
    report = compress(tmp_path / "model.safetensors", tmp_path / "out", {"a": moment}, keep=0.3)
    (row,), (f,) = report.layers, read_factored(tmp_path / "out").values()
    up, down = (np.asarray(part, np.float64) for part in (f.left, f.right))
    rest = w.astype(np.float64) - up @ down
    error = np.sqrt(np.trace(rest @ moment.mean @ rest.T))
    assert error > 0.1 * float(ml_dtypes.finfo(dtype).eps) * row.norm
    assert abs(row.error - error) <= 1e-4 * error


def test_all_else_is_as_it_was(model, tmp_path):
    report = compress(model, tmp_path / "out", moments(model), keep=0.5)
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for name in before.keys() & after.keys():
        np.testing.assert_array_equal(before[name], after[name])
    changed = {f"{name}.weight" for name in ranks(report)}
    assert before.keys() - after.keys() == changed
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("factored") == {"ranks": ranks(report)}
    assert config == json.loads((model / "config.json").read_text())


def test_executors_do_not_change_the_file(model, tmp_path):
    seen = []
    with ThreadPoolExecutor(2) as pool:
        compress(
            model,
            tmp_path / "two",
            moments(model),
            keep=0.4,
            executor=pool,
            progress=lambda *step: seen.append(step),
        )
    compress(model, tmp_path / "one", moments(model), keep=0.4)
    one, two = ((tmp_path / k / "model.safetensors").read_bytes() for k in ("one", "two"))
    assert one == two
    assert seen[6][:2] == (7, 7)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_dtypes_and_shards(dtype, shards, tmp_path):
    tensors = {f"block.{i}.linear.weight": gaussian(20, 30, seed=i).astype(dtype) for i in range(2)}
    tensors["norm.weight"] = np.ones(30, dtype)
    folder = tmp_path / "model"
    folder.mkdir()
    names, where = sorted(tensors), {}
    for k in range(shards):
        file = f"model-{k}.safetensors"
        save_file({name: tensors[name] for name in names[k::shards]}, folder / file)
        where |= dict.fromkeys(names[k::shards], file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    f = lr.truncated_svd(gaussian(20, 30).astype(np.float64), 3, rng=0).split()
    write_factored(folder, tmp_path / "out", {"block.1.linear": f})
    (found,) = read_factored(tmp_path / "out").values()
    unit = float(ml_dtypes.finfo(dtype).eps)
    assert_same_product(f.to_dense(), found.to_dense().astype(np.float64), tol=4 * unit)
    stored = Checkpoint(tmp_path / "out").tensors
    same = Checkpoint(folder).tensors["block.0.linear.weight"]
    assert stored["block.0.linear.weight"].equals(same)
    assert stored["block.1.linear.up"].dtype == same.dtype
    # Loaded again, with another layer factorized on top.
    write_factored(tmp_path / "out", tmp_path / "both", {"block.0.linear": f})
    assert set(read_factored(tmp_path / "both")) == {"block.0.linear", "block.1.linear"}


def test_overwriting(model, tmp_path):
    out = tmp_path / "out"
    compress(model, out, moments(model), keep=0.4)
    with pytest.raises(CheckpointError, match="exists already"):
        compress(model, out, moments(model), keep=0.5)
    report = compress(model, out, moments(model), keep=0.5, overwrite=True)
    assert {name: f.rank for name, f in read_factored(out).items()} == ranks(report)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="replaces only what an earlier run wrote"):
        compress(model, tmp_path / "foreign", moments(model), keep=0.5, overwrite=True)


def bad_moment(kind):
    def change(given):
        name = next(iter(given))
        n = len(given[name].mean)
        nan = SecondMoment(np.full((n, n), np.nan), 3 * n)
        return given | {name: nan if kind == "nan" else SecondMoment.of(gaussian(n - 1, n))}

    return change


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (lambda given: {}, {"keep": 0.5}, r"no second moment of .* \(7 such\)"),  # noqa: ARG005
        (dict, {"keep": 0.0}, r"keep must be in \(0, 1\], got 0"),
        (dict, {"keep": 0.01}, "cannot be met: rank 1 in every layer takes"),
        (dict, {"keep": 0.5, "targets": "nothing"}, "match no linear layer"),
        (bad_moment("nan"), {"keep": 0.5}, r"model\..*: second_moment must be finite"),
        (
            bad_moment("few"),
            {"keep": 0.9},
            r"model\..*: too few samples: its second moment has seen",
        ),
    ],
)
def test_refusals_leave_nothing(change, options, text, model, tmp_path):
    with pytest.raises(CheckpointError, match=text):
        compress(model, tmp_path / "out", change(moments(model)), **options)
    assert not list(tmp_path.iterdir())


def test_factors_that_do_not_fit(model, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    f = lr.truncated_svd(gaussian(HIDDEN, HIDDEN), 2, rng=0).split()
    with pytest.raises(CheckpointError, match=r"shape must be \(48, 48\), got \(48, 20\)"):
        write_factored(model, tmp_path / "out", {name: f[:, :20]})
    with pytest.raises(CheckpointError, match=r"no linear layer model\.missing"):
        write_factored(model, tmp_path / "out", {"model.missing": f})
    with pytest.raises(CheckpointError, match="must be finite in F32"):
        write_factored(model, tmp_path / "out", {name: 1e300 * f})
    with pytest.raises(CheckpointError, match="not a factored checkpoint"):
        read_factored(model)
    write_factored(model, tmp_path / "out", {name: f})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["factored"]["ranks"][name] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="must have rank 3, got shapes"):
        read_factored(tmp_path / "out")
    config["factored"]["ranks"] = {"model.other": 3}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks one of up and down"):
        read_factored(tmp_path / "out")


JOBS = {
    "init": lambda path, out: checkpoint.initialize(path, "pissa", out, rank=2),
    "inspect": lambda path, out: checkpoint.spectra(path),  # noqa: ARG005
    "quantize": lambda path, out: checkpoint.quantize(path, out),
    "compress": lambda path, out: compress(path, out, {}, keep=0.5),
    "extract": lambda path, out: checkpoint.extract(path, path, out, rank=2),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("part", ["", "model.safetensors"])
def test_a_compressed_model_is_refused_where_weights_are_read(job, part, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    f = lr.truncated_svd(gaussian(HIDDEN, HIDDEN), 2, rng=0).split()
    name = "model.layers.0.self_attn.q_proj"
    write_factored(model, tmp_path / "small", {name: f})
    text = rf"a compressed model, .* weight of {name} \(1 such layers\); pass the model"
    with pytest.raises(CheckpointError, match=text):
        JOBS[job](tmp_path / "small" / part, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "small"]


# PyTorch.


def assert_same(actual, expected, depth):
    error = torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)
    assert error <= 20 * depth * EPS


def test_a_llama_loads_and_computes_the_same(model, tmp_path):
    report = compress(model, tmp_path / "out", moments(model), keep=0.5)
    dense = LlamaForCausalLM.from_pretrained(model).eval()
    for name, f in read_factored(tmp_path / "out").items():
        product = f.to_dense().astype(np.float32)
        dense.get_submodule(name).weight.data = torch.from_numpy(product)
    torch.manual_seed(1)
    fresh = LlamaForCausalLM(dense.config).eval()
    loaded = load_factored_(fresh, tmp_path / "out")
    layers = {k: m for k, m in loaded.named_modules() if isinstance(m, FactoredLinear)}
    assert {k: m.rank for k, m in layers.items()} == ranks(report)
    assert not any(m.training for m in layers.values())
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert_same(loaded(tokens).logits, dense(tokens).logits, depth=20)
    count = sum(p.numel() for p in loaded.parameters())
    assert count == sum(sizes(tmp_path / "out").values())


def test_gpt2_with_its_transposed_layers_and_tied_head(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    original = GPT2LMHeadModel(config).eval()
    original.save_pretrained(tmp_path / "model")
    tokens = torch.arange(16)[None]
    targets = ["c_attn", "c_fc"]
    with torch.no_grad(), collect_inputs(original, SecondMoment.of, targets=targets) as seen:
        original(torch.randint(40, (4, 16)))
    report = compress(tmp_path / "model", tmp_path / "out", seen, keep=0.5, targets="c_attn|c_fc")
    assert report.layers
    for name, f in read_factored(tmp_path / "out").items():
        product = f.to_dense().astype(np.float32)
        original.get_submodule(name).weight.data = torch.from_numpy(product.T.copy())
    loaded = load_factored_(GPT2LMHeadModel(config).eval(), tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with torch.no_grad():
        assert_same(loaded(tokens).logits, original(tokens).logits, depth=4)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def small(tmp_path):
    """A network, its checkpoint, and the same with its first layer in two factors."""
    net = network()
    (tmp_path / "model").mkdir()
    arrays = {name: p.numpy() for name, p in net.state_dict().items()}
    save_file(arrays, tmp_path / "model" / "model.safetensors")
    f = lr.truncated_svd(arrays["0.weight"], 3, rng=0).split()
    write_factored(tmp_path / "model", tmp_path / "out", {"0": f})
    return net, f, tmp_path / "out"


def test_any_module_in_its_own_dtype(small):
    net, f, path = small
    other = network(torch.float32).requires_grad_(False)
    loaded = load_factored_(other, path)
    assert loaded[0].up.dtype == torch.float32
    assert not loaded[0].up.requires_grad
    assert loaded[0].bias is None
    assert "rank=3" in repr(loaded)
    net[0].weight.data = torch.from_numpy(f.to_dense())
    x = torch.from_numpy(gaussian(4, 6))
    assert_same(loaded(x.float()).double(), net(x), depth=2)


def test_a_factored_layer_trains(small):
    _, _, path = small
    net = load_factored_(network(), path)
    x = torch.from_numpy(gaussian(4, 6))
    net(x).square().sum().backward()
    layer = net[0]
    product = (layer.up @ layer.down).detach().requires_grad_(True)
    net[2](torch.tanh(x @ product.mT)).square().sum().backward()
    torch.testing.assert_close(layer.up.grad, product.grad @ layer.down.mT)
    torch.testing.assert_close(layer.down.grad, layer.up.mT @ product.grad)
    again = load_factored_(network(), path)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8, bias=False)), None),
        (lambda: nn.Sequential(nn.Tanh()), "0 cannot be adapted"),
        (lambda: nn.ModuleDict({"a": nn.Linear(6, 8)}), "no module of ModuleDict is called 0"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh()), "there is no 0.bias"),
        (lambda: nn.Sequential(nn.Linear(6, 9, bias=False)), r"0.up must have shape \(9, 3\), got"),
        (lambda: nn.Sequential(nn.Linear(6, 8, bias=False, device="meta")), "meta device"),
    ],
)
def test_models_that_do_not_fit_stay_as_they_are(other, text, small):
    _, _, path = small
    module = other()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    if text is None:
        assert isinstance(load_factored_(module, path)[0], FactoredLinear)
        return
    with pytest.raises(ValueError, match=text):
        load_factored_(module, path)
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, p in before.items():
        assert p.is_meta or torch.equal(p, after[name])


def test_tied_layers_and_other_directories_are_refused(small, tmp_path):
    _, _, path = small
    net = network()
    net.append(nn.Linear(6, 8, bias=False).double())
    net[3].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0 shares its weight with 3\.weight"):
        load_factored_(net, path)
    with pytest.raises(ValueError, match="not a factored checkpoint"):
        load_factored_(network(), tmp_path / "model")
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not readable"):
        load_factored_(network(), path)


def test_a_whole_gpt2_with_everything_dense_is_itself(tmp_path):
    """A budget of all parameters changes nothing."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    GPT2Model(config).save_pretrained(tmp_path / "model")
    report = compress(tmp_path / "model", tmp_path / "out", moments(tmp_path / "model"), keep=1.0)
    assert not report.layers
    assert report.totals["error"] == report.totals["bound"] == 0.0
    one, two = (load_file(tmp_path / k / "model.safetensors") for k in ("model", "out"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
