"""Jobs on models and adapters: the numbers of the functions in memory, files that PEFT loads."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import gaussian, processes
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from lowrank_sp import checkpoint
from lowrank_sp.adapters import algebra, compensate, federated, serving, statistics
from lowrank_sp.adapters import quantize as formats
from lowrank_sp.adapters.algebra import merge as merging
from lowrank_sp.adapters.forms import HadamardProduct, Product, RowMagnitude
from lowrank_sp.adapters.initializers import CALIBRATED
from lowrank_sp.checkpoint import Adapter, Checkpoint, CheckpointError, read_adapter
from lowrank_sp.checkpoint.report import JobReport
from lowrank_sp.iterate import Stop
from lowrank_sp.torch import collect_inputs

LAYERS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
NAMES = sorted(f"model.layers.0.{name}" for name in LAYERS)
ATTENTION = NAMES[1:]
RANKS = {"ann": 2, "bob": 3, "cid": 2}
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.write_demo_model(folder, hidden=48, layers=1)
    return folder


def pair(shape, rank, seed, scale=0.5):
    m, n = shape
    up = gaussian(m, rank, seed=seed, dtype=np.float32) / m**0.5
    down = gaussian(rank, n, seed=seed + 50, dtype=np.float32) / n**0.5
    return Product(up, down, scale)


def write(folder, layers, **said):
    folder.mkdir(parents=True)
    checkpoint.write_adapter(folder, Adapter(layers, **said))
    return folder


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Three adapters of one base, of several ranks and scales; only one has all layers."""
    folder, base = tmp_path_factory.mktemp("adapters"), Checkpoint(model)
    paths = {}
    for k, (name, rank) in enumerate(RANKS.items()):
        layers = {
            layer: pair(base.layer(layer).shape, rank, 10 * k + i, scale=0.4 * (k + 1))
            for i, layer in enumerate(NAMES if name == "ann" else ATTENTION)
        }
        paths[name] = write(folder / name, layers, base=str(model), fingerprint=base.fingerprint())
    return paths


@pytest.fixture(scope="module")
def apart(model, tmp_path_factory):
    """Two adapters of the same layers, ranks and scales, with nothing in common."""
    folder, base = tmp_path_factory.mktemp("apart"), Checkpoint(model)
    paths = {}
    for k, name in enumerate(("one", "two")):
        layers = {
            layer: pair(base.layer(layer).shape, 3, 100 * k + i) for i, layer in enumerate(NAMES)
        }
        paths[name] = write(folder / name, layers, base=str(model))
    return paths


@pytest.fixture(scope="module")
def clients(model, tmp_path_factory):
    """Two adapters of the same layers, ranks and scales; their ``down`` is one."""
    folder, base = tmp_path_factory.mktemp("clients"), Checkpoint(model)
    paths = {}
    for k, name in enumerate(("one", "two")):
        layers = {}
        for i, layer in enumerate(NAMES):
            own = pair(base.layer(layer).shape, 3, 100 * k + i)
            layers[layer] = replace(own, down=pair(base.layer(layer).shape, 3, i).down)
        paths[name] = write(folder / name, layers, base=str(model))
    return paths


def parts(path):
    return dict(read_adapter(path).layers)


def dense(form):
    return np.asarray(form.delta().to_dense(), dtype=np.float64)


def close(a, b, like=None, slack=100):
    """Equal to rounding in single precision."""
    scale = np.linalg.norm(b if like is None else like)
    return np.linalg.norm(np.asarray(a, np.float64) - b) <= slack * EPS * scale


def logits(model, adapter=None):
    net = LlamaForCausalLM.from_pretrained(model)
    if adapter is not None:
        net = PeftModel.from_pretrained(net, str(adapter))
    with torch.no_grad():
        return net.eval()(torch.arange(12)[None]).logits.double().numpy()


def merged_model(model, updates, folder):
    """The model with dense updates in its weights."""
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    for name, update in updates.items():
        key = f"{name}.weight"
        tensors[key] = (tensors[key] + update).astype(tensors[key].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


def assert_peft_gives(model, adapter, updates, tmp_path):
    """PEFT with the adapter computes what the model with the updates in its weights does."""
    expected = logits(merged_model(model, updates, tmp_path / "merged"))
    found = logits(model, adapter)
    assert close(found, expected)
    assert not close(logits(model), expected, slack=1e4)


def assert_reported(report, out):
    assert JobReport.load(out / "report.json") == replace(
        report, layers=[replace(row, shape=list(row.shape)) for row in report.layers]
    )


def by_name(report):
    return {row.name: row for row in report.layers}


# Extraction


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """Two layers, one norm and the output head are changed."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    updates = {name: dense(pair((48, 48), 6, k)) for k, name in enumerate(ATTENTION)}
    merged_model(model, updates, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(0.5)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(1.5)
    tensors["extra.weight"] = np.ones(3, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "size", [{"rank": 3}, {"tol": 0.3}, {"rank": 4, "tol": 1e-3}, {"tol": 0.9}]
)
def test_extract_is_the_function_on_every_layer(size, model, tuned, tmp_path):
    report = checkpoint.extract(tuned, model, tmp_path / "out", **size)
    found = parts(tmp_path / "out" / "adapter")
    assert list(found) == ATTENTION == [row.name for row in report.layers]
    for name, product in found.items():
        new, old = (Checkpoint(m).tensors[f"{name}.weight"].read() for m in (tuned, model))
        expected = algebra.extract(new, old, **size, rng=0)
        difference = new.astype(np.float64) - old
        assert close(dense(product), expected.to_dense(), difference)
        row = by_name(report)[name]
        assert (row.rank, product.scale) == (expected.rank, 1.0)
        error = np.linalg.norm(difference - dense(product))
        assert row.error == pytest.approx(error, rel=1e-3, abs=100 * EPS * row.norm)
        assert row.norm == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    assert report.notes["changed tensors that are no target"] == [
        "lm_head.weight",
        "model.norm.weight",
    ]
    assert report.notes["tensors in the tuned model only"] == ["extra.weight"]
    assert len(report.notes["unchanged layers"]) == 5
    assert_reported(report, tmp_path / "out")
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert (adapter.base, adapter.fingerprint) == (str(model), Checkpoint(model).fingerprint())


def test_extracted_adapters_in_peft(model, tuned, tmp_path):
    checkpoint.extract(tuned, model, tmp_path / "out", rank=6)
    updates = {name: dense(pair((48, 48), 6, k)) for k, name in enumerate(ATTENTION)}
    assert_peft_gives(model, tmp_path / "out" / "adapter", updates, tmp_path)


def test_extract_caps_ranks_and_says_so(model, tuned, tmp_path):
    report = checkpoint.extract(tuned, model, tmp_path / "out", rank=100, targets="q_proj")
    (row,) = report.layers
    assert (row.rank, row.note) == (48, "rank 48 is all there is")
    assert row.error <= 100 * EPS * row.norm


def test_extract_from_transposed_half_precision_shards(tmp_path):
    base, new = gaussian(20, 30, seed=1), gaussian(20, 30, seed=2) / 8
    for name, weight in (("base", base), ("tuned", base + new)):
        (tmp_path / name).mkdir()
        tensors = {"c_fc.weight": weight.astype(np.float16), "x.weight": np.ones((4, 4))}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt2"}')
    checkpoint.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=20)
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert adapter.fan_in_fan_out
    difference = (base + new).astype(np.float16).astype(float) - base.astype(np.float16)
    assert close(dense(adapter.layers["c_fc"]), difference.T)


# Resizing


@pytest.mark.parametrize(
    ("options", "choose"),
    [
        ({"rank": 2}, lambda _: 2),
        ({"tol": 0.6}, lambda f: f.truncate(tol=0.6).rank),
        ({"rank": 1, "tol": 0.1}, lambda _: 1),
        ({"rule": "sv_ratio", "threshold": 1.3}, lambda f: algebra.sv_ratio(f.s, 1.3)),
        ({"rule": "sv_cumulative", "threshold": 0.8}, lambda f: algebra.sv_cumulative(f.s, 0.8)),
        ({"rule": "sv_fro", "threshold": 0.9}, lambda f: algebra.sv_fro(f.s, 0.9)),
        ({"rule": "sv_fro", "threshold": 1.0, "rank": 2}, lambda _: 2),
    ],
)
def test_resize_is_the_function_on_every_layer(options, choose, adapters, tmp_path):
    report = checkpoint.resize(adapters["bob"], tmp_path / "out", **options)
    before, after = parts(adapters["bob"]), parts(tmp_path / "out" / "adapter")
    assert before.keys() == after.keys()
    for name, product in after.items():
        every = algebra.resize(before[name])
        expected = every.truncate(choose(every))
        assert close(dense(product), expected.to_dense(), every.to_dense())
        assert product.scale == pytest.approx(before[name].scale)
        row = by_name(report)[name]
        assert row.rank == product.rank == expected.rank
        assert row.error == pytest.approx(float(expected.error), rel=1e-3, abs=100 * EPS * row.norm)
        assert row.norm == pytest.approx(np.linalg.norm(dense(before[name])), rel=1e-5)
    assert_reported(report, tmp_path / "out")
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert adapter.fingerprint == read_adapter(adapters["bob"]).fingerprint is not None


def test_resized_adapters_in_peft(model, adapters, tmp_path):
    checkpoint.resize(adapters["ann"], tmp_path / "out", rank=1)
    updates = {k: algebra.resize(p, rank=1).to_dense() for k, p in parts(adapters["ann"]).items()}
    assert_peft_gives(model, tmp_path / "out" / "adapter", updates, tmp_path)


# Merging

MERGE_OPTIONS = {
    "linear": {},
    "cat": {},
    "svd": {"rank": 3},
    "ties": {"density": 0.5, "rank": 3},
    "dare": {"density": 0.5, "rank": 3},
    "dare_ties": {"density": 0.5, "tol": 0.5},
    "magnitude_prune": {"density": 0.4, "rank": 3},
    "knots": {"density": 0.5, "rank": 3},
    "tsv": {"rank": 4},
}


def test_every_way_to_merge_is_tried():
    assert MERGE_OPTIONS.keys() == checkpoint.MERGES.keys()


@pytest.mark.parametrize("weights", [None, [0.7, -0.2]])
@pytest.mark.parametrize("method", MERGE_OPTIONS)
def test_merge_is_the_function_on_every_layer(method, weights, adapters, tmp_path):
    # Both of rank 2, since factors merge one by one in some methods.
    paths, options = {k: adapters[k] for k in ("ann", "cid")}, MERGE_OPTIONS[method]
    out = tmp_path / "out"
    report = checkpoint.merge(paths, out, method=method, weights=weights, seed=3, **options)
    found, sources = parts(out / "adapter"), [parts(path) for path in paths.values()]
    assert list(found) == NAMES
    children = np.random.SeedSequence(3).spawn(len(NAMES))
    function, rule = checkpoint.MERGES[method]
    for name, child in zip(NAMES, children, strict=True):
        own = dict(options)
        if rule is not None:
            own["rule"] = rule(own.pop("density"))
            own["rng"] = np.random.default_rng(child)
        have = [k for k, source in enumerate(sources) if name in source]
        if "rank" in own and function is not merging.entrywise:
            own["rank"] = min(own["rank"], sum(sources[k][name].rank for k in have))
        w = None if weights is None else [weights[k] for k in have]
        expected = function([sources[k][name] for k in have], w, **own)
        assert close(dense(found[name]), expected.value.to_dense(), expected.exact.to_dense())
        row = by_name(report)[name]
        assert row.error == pytest.approx(expected.error, rel=1e-4, abs=100 * EPS * row.norm)
        assert row.norm == pytest.approx(expected.exact.norm(), rel=1e-4)
        assert ("in ann only" in row.note) == (len(have) == 1)
    assert_reported(report, out)


def test_merged_adapters_in_peft(model, adapters, tmp_path):
    checkpoint.merge(adapters, tmp_path / "out", method="svd", weights=[1, 0.5, -1], tol=1e-6)
    updates = {
        name: sum(
            w * dense(parts(path)[name])
            for w, path in zip([1, 0.5, -1], adapters.values(), strict=True)
            if name in parts(path)
        )
        for name in NAMES
    }
    assert_peft_gives(model, tmp_path / "out" / "adapter", updates, tmp_path)


def test_adapters_in_several_dtypes_are_merged_in_the_widest(tmp_path):
    wide = Product(gaussian(6, 2), gaussian(2, 5), 1.0)
    half = Product(wide.up.astype(np.float16), wide.down.astype(np.float16), 1.0)
    paths = {"wide": write(tmp_path / "a", {"x": wide}), "half": write(tmp_path / "b", {"x": half})}
    checkpoint.merge(paths, tmp_path / "out", method="cat", weights=[1, -1])
    product = parts(tmp_path / "out" / "adapter")["x"]
    assert product.up.dtype == np.float64
    expected = dense(wide) - half.up.astype(float) @ half.down.astype(float)
    np.testing.assert_allclose(dense(product), expected, atol=1e-14)


def test_bases_decide_who_is_merged(adapters, tmp_path):
    other = write(tmp_path / "other", parts(adapters["cid"]), base="elsewhere")
    paths = {"ann": adapters["ann"], "other": other}
    with pytest.raises(CheckpointError, match=r"one base, got .* of ann and 'elsewhere' of other"):
        checkpoint.merge(paths, tmp_path / "out", method="cat")
    assert not (tmp_path / "out").exists()
    checkpoint.merge(paths, tmp_path / "out", method="cat", assume_same_base=True)
    # The same fingerprint under another name is the same base.
    prints = Checkpoint(read_adapter(adapters["ann"]).base).fingerprint()
    moved = write(tmp_path / "moved", parts(other), base="elsewhere", fingerprint=prints)
    checkpoint.merge(paths | {"other": moved}, tmp_path / "two", method="cat")


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, processes])
def test_executor_does_not_change_the_result(pool, adapters, tmp_path):
    options, seen = {"method": "dare", "density": 0.5, "rank": 2}, []
    one = checkpoint.merge(
        adapters, tmp_path / "one", progress=lambda *row: seen.append(row), **options
    )
    with pool(2) as executor:
        two = checkpoint.merge(adapters, tmp_path / "two", executor=executor, ahead=2, **options)
    assert seen == [(k + 1, 3, name) for k, name in enumerate(NAMES)]
    assert [replace(row, seconds=0) for row in one.layers] == [
        replace(row, seconds=0) for row in two.layers
    ]
    layers = parts(tmp_path / "two" / "adapter")
    for name, product in parts(tmp_path / "one" / "adapter").items():
        assert np.array_equal(product.up, layers[name].up)
        assert np.array_equal(product.down, layers[name].down)


def test_embeddings_and_kernels_stay_what_they_are(tmp_path):
    layers = {"conv": pair((6, 45), 2, 0), "embed": pair((8, 20), 2, 1), "fc": pair((4, 6), 2, 2)}
    kinds = {"base": "b", "embeddings": frozenset({"embed"}), "kernels": {"conv": (3, 3)}}
    paths = {name: write(tmp_path / name, layers, **kinds) for name in ("a", "b")}
    checkpoint.resize(paths["a"], tmp_path / "resize", rank=1)
    checkpoint.merge(paths, tmp_path / "merge", method="cat")
    checkpoint.convert(paths["a"], tmp_path / "convert", rank=1)
    checkpoint.federate(paths, tmp_path / "federate", method="fedit")
    checkpoint.share(paths, tmp_path / "share", method="full", rank=2)
    for out in ("resize", "merge", "convert", "federate", "share/adapters/a"):
        folder = tmp_path / out if "/" in out else tmp_path / out / "adapter"
        found = read_adapter(folder)
        assert found.embeddings == kinds["embeddings"]
        assert found.kernels == kinds["kernels"]
        assert {name: form.shape for name, form in found.layers.items()} == {
            name: form.shape for name, form in layers.items()
        }


def test_embeddings_of_the_base_are_corrected_by_their_width(tmp_path):
    weight = gaussian(20, 8).astype(np.float32)
    save_file({"embed.weight": weight}, tmp_path / "model.safetensors")
    kinds = {"base": "b", "embeddings": frozenset({"embed"})}
    form = pair((8, 20), 2, 1)
    paths = {"a": write(tmp_path / "a", {"embed": form}, **kinds)}
    base = tmp_path / "model.safetensors"
    checkpoint.federate(paths, tmp_path / "out", method="flora", base=base)
    assert close(decoded(tmp_path / "out" / "base", "embed"), weight + dense(form).T)


# Conversion


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """PiSSA, and the adapter after a few steps away from it."""
    folder = tmp_path_factory.mktemp("pissa")
    checkpoint.initialize(model, "pissa", folder / "start", rank=4, alpha=8)
    start = read_adapter(folder / "start" / "adapter")
    moved = {
        name: replace(
            p,
            up=p.up + gaussian(*p.up.shape, seed=k, dtype=np.float32) / 50,
            down=p.down + gaussian(*p.down.shape, seed=k + 9, dtype=np.float32) / 50,
        )
        for k, (name, p) in enumerate(start.layers.items())
    }
    write(folder / "trained", moved, base=start.base)
    return folder


@pytest.mark.parametrize("size", [{}, {"rank": 4}, {"tol": 0.4}])
def test_pissa_becomes_lora_of_the_original(size, model, trained, tmp_path):
    start = trained / "start" / "adapter"
    report = checkpoint.convert(trained / "trained", tmp_path / "out", start=start, **size)
    new, old = parts(trained / "trained"), parts(start)
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert (adapter.base, adapter.fingerprint) == (str(model), Checkpoint(model).fingerprint())
    for name, product in adapter.layers.items():
        exact = dense(new[name]) - dense(old[name])
        s = np.linalg.svd(exact, compute_uv=False)
        row = by_name(report)[name]
        error = np.linalg.norm(exact - dense(product))
        assert row.rank == product.rank <= 8
        assert row.rank == size.get("rank", product.rank)
        assert product.scale == 2.0
        rounding = 100 * EPS * np.linalg.norm(dense(new[name]))
        assert abs(row.error - error) <= rounding
        assert abs(error - np.linalg.norm(s[row.rank :])) <= rounding
        assert error <= size.get("tol", 1.0) * np.linalg.norm(exact)
    if not size:
        expected = logits(trained / "start" / "base", trained / "trained")
        assert close(logits(model, tmp_path / "out" / "adapter"), expected, slack=1000)


def test_conversion_needs_to_know_the_original(model, trained, tmp_path):
    start = write(tmp_path / "start", parts(trained / "start" / "adapter"), base="residual")
    new = write(tmp_path / "new", parts(trained / "trained"), base="residual")
    with pytest.raises(CheckpointError, match=r"no report .*; pass --base"):
        checkpoint.convert(new, tmp_path / "out", start=start)
    checkpoint.convert(new, tmp_path / "out", start=start, base=model)
    assert read_adapter(tmp_path / "out" / "adapter").base == str(model)
    few = write(tmp_path / "few", {NAMES[0]: parts(new)[NAMES[0]]}, base="residual")
    with pytest.raises(CheckpointError, match="only the untrained adapter has it"):
        checkpoint.convert(few, tmp_path / "two", start=start, base=model)
    other = write(tmp_path / "other", parts(new), base="other")
    with pytest.raises(CheckpointError, match="one base"):
        checkpoint.convert(other, tmp_path / "two", start=start, base=model)


def test_starts_of_another_scale_are_subtracted_as_they_count(trained, tmp_path, model):
    old = parts(trained / "start" / "adapter")
    halves = {k: replace(p, up=p.up * 2, scale=p.scale / 2) for k, p in old.items()}
    start = write(tmp_path / "start", halves, base=read_adapter(trained / "trained").base)
    checkpoint.convert(trained / "trained", tmp_path / "out", start=start, base=model)
    for name, product in parts(tmp_path / "out" / "adapter").items():
        exact = dense(parts(trained / "trained")[name]) - dense(old[name])
        assert close(dense(product), exact, dense(old[name]))


def test_other_forms_become_lora(model, tmp_path):
    forms = {
        name: HadamardProduct(
            *(
                gaussian(*shape, seed=k + i, dtype=np.float32)
                for i, shape in enumerate([(48, 2), (2, 48), (48, 2), (2, 48)])
            ),
            scale=0.1,
        )
        for k, name in enumerate(ATTENTION)
    }
    source = write(tmp_path / "loha", forms, base=str(model))
    exact = checkpoint.convert(source, tmp_path / "exact")
    report = checkpoint.convert(source, tmp_path / "out", rank=3)
    for name, form in forms.items():
        delta = dense(form)
        assert close(dense(parts(tmp_path / "exact" / "adapter")[name]), delta)
        assert (by_name(exact)[name].rank, by_name(exact)[name].error) == (4, 0.0)
        s = np.linalg.svd(delta, compute_uv=False)
        row = by_name(report)[name]
        assert row.error == pytest.approx(np.linalg.norm(s[3:]), rel=1e-4)
        assert row.norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
        product = parts(tmp_path / "out" / "adapter")[name]
        assert np.linalg.norm(delta - dense(product)) == pytest.approx(row.error, rel=1e-4)
    assert_peft_gives(
        model, tmp_path / "exact" / "adapter", {k: dense(f) for k, f in forms.items()}, tmp_path
    )


def test_forms_that_need_the_weight_get_it_from_the_base(model, tmp_path):
    name = NAMES[0]
    weight = Checkpoint(model).tensors[f"{name}.weight"].read()
    p = pair(weight.shape, 2, 0)
    form = RowMagnitude(
        weight, p.up, p.down, np.linalg.norm(weight, axis=1) * np.float32(1.1), p.scale
    )
    source = write(tmp_path / "dora", {name: form}, base=str(model))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.convert(source, tmp_path / "out", rank=4)
    with pytest.raises(CheckpointError, match="give rank or tol"):
        checkpoint.convert(source, tmp_path / "out", base=model)
    report = checkpoint.convert(source, tmp_path / "out", base=model, rank=4)
    delta = np.asarray(form.merge(weight), np.float64) - weight
    s = np.linalg.svd(delta, compute_uv=False)
    (row,) = report.layers
    assert row.error == pytest.approx(np.linalg.norm(s[4:]), rel=1e-3)
    product = parts(tmp_path / "out" / "adapter")[name]
    assert np.linalg.norm(delta - dense(product)) == pytest.approx(row.error, rel=1e-3)


def test_kohya_and_back(model, adapters, tmp_path):
    out, prefix = tmp_path / "kohya", "lora_te"
    checkpoint.convert(adapters["bob"], out, to="kohya", prefix=prefix)
    file = out / "adapter.safetensors"
    assert f"{prefix}_{NAMES[0].replace('.', '_')}.alpha" not in load_file(file)
    assert f"{prefix}_{ATTENTION[0].replace('.', '_')}.alpha" in load_file(file)
    checkpoint.convert(file, tmp_path / "peft", prefix=prefix, base=model)
    adapter = read_adapter(tmp_path / "peft" / "adapter")
    assert adapter.base == str(model)
    before = parts(adapters["bob"])
    assert before.keys() == adapter.layers.keys()
    for name, product in adapter.layers.items():
        assert np.array_equal(product.up, before[name].up)
        assert np.array_equal(product.down, before[name].down)
        assert product.scale == pytest.approx(before[name].scale)
    report = checkpoint.convert(file, tmp_path / "less", prefix=prefix, base=model, rank=1)
    assert {row.rank for row in report.layers} == {1}


@pytest.mark.parametrize("known", ["by the adapter", "by the name of its base", "to nobody"])
def test_files_of_kohya_know_their_base(known, model, tmp_path):
    """As PEFT saves what it trained, an adapter of PiSSA has the name of its residual base only."""
    checkpoint.initialize(model, "pissa", tmp_path / "pissa", rank=2)
    trained = read_adapter(tmp_path / "pissa" / "adapter")
    right = trained.fingerprint
    if known != "by the adapter":
        trained = replace(trained, fingerprint=None)
    if known == "to nobody":
        trained = replace(trained, base="hub/residual")
    (tmp_path / "trained").mkdir()
    checkpoint.write_adapter(tmp_path / "trained", trained)
    said = {"prefix": "lora_te"}
    report = checkpoint.convert(tmp_path / "trained", tmp_path / "kohya", to="kohya", **said)
    file = tmp_path / "kohya" / "adapter.safetensors"
    checkpoint.convert(file, tmp_path / "right", base=tmp_path / "pissa" / "base", **said)
    again = read_adapter(tmp_path / "right" / "adapter")
    assert again.base == trained.base
    if known == "to nobody":
        assert list(report.notes.values()) == [["hub/residual"]]
        assert again.fingerprint is None
        return
    assert not report.notes
    assert again.fingerprint == right
    with pytest.raises(CheckpointError, match="whose tensors are not those of"):
        checkpoint.convert(file, tmp_path / "wrong", base=model, **said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "kohya"}, "pass --prefix: lora_unet, lora_te"),
        ({"prefix": "lora_unet"}, "a prefix is for names in files of kohya, got 'lora_unet'"),
        ({"to": "koya"}, "to must be one of peft, kohya, got 'koya'; did you mean kohya"),
    ],
)
def test_names_of_kohya_need_a_prefix(options, message, adapters, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.convert(adapters["bob"], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_jobs_on_plain_lora_refuse_other_forms(tmp_path, model):
    form = HadamardProduct(*(np.ones(s, np.float32) for s in [(4, 1), (1, 4), (4, 1), (1, 4)]))
    source = write(tmp_path / "loha", {"x": form}, base=str(model))
    with pytest.raises(CheckpointError, match="x: plain LoRA is needed, got HadamardProduct"):
        checkpoint.resize(source, tmp_path / "out", rank=1)
    with pytest.raises(CheckpointError, match="x: plain LoRA is needed, got HadamardProduct"):
        checkpoint.merge({"a": source}, tmp_path / "out", method="cat")
    assert not (tmp_path / "out").exists()


# Calibrated starts


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    """All statistics of all linear layers, from a seeded batch of inputs."""
    arrays = {}
    for k, layer in enumerate(Checkpoint(model).layers()):
        m, n = layer.shape
        x = gaussian(300, n, seed=k) * np.linspace(0.2, 2, n)
        gradient = gaussian(m, n, seed=k + 40, dtype=np.float32)
        for statistic in (
            statistics.SecondMoment.of(x),
            statistics.MeanSquare.of(x),
            statistics.MeanMagnitude.of(x),
            statistics.InputPCA.of(x, rank=6, rng=0),
            statistics.MeanGradient.of(gradient),
        ):
            arrays |= statistics.pack({layer.name: statistic})
        arrays[f"{layer.name}.fisher"] = gradient**2
    file = tmp_path_factory.mktemp("calibration") / "statistics.safetensors"
    save_file(arrays, file)
    return file


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_starts_are_the_functions_on_every_layer(method, model, calibration, tmp_path):
    report = checkpoint.initialize(
        model, method, tmp_path / "out", rank=4, alpha=8, calibration=calibration, seed=2
    )
    assert report.calibration == str(calibration)
    function, statistic = CALIBRATED[method]
    arrays, weights = load_file(calibration), Checkpoint(model).tensors
    found = parts(tmp_path / "out" / "adapter")
    children = np.random.SeedSequence(2).spawn(len(report.layers))
    for row, child in zip(report.layers, children, strict=True):
        data = {statistic: arrays[f"{row.name}.{statistic}"]}
        weight = weights[f"{row.name}.weight"].read()
        start = function(weight, 4, alpha=8, rng=np.random.default_rng(child), **data)
        assert close(dense(found[row.name]), start.delta().to_dense(), weight)
        assert row.error == (None if start.error is None else pytest.approx(start.error, rel=1e-6))
    if method != "lora_one":  # which moves the layers on purpose
        assert checkpoint.verify(tmp_path / "out", model).passed


def test_calibration_files_are_checked_first(model, calibration, tmp_path):
    def start(method, file, match):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.initialize(model, method, tmp_path / "out", rank=4, calibration=file)
        assert not (tmp_path / "out").exists()

    start("weighted", None, "needs the second_moment of every layer; pass --calibration")
    start("pissa", calibration, "a calibration is for eva, weighted, .* only")
    start("weighted", tmp_path / "none.safetensors", "no such file")
    few, name = load_file(calibration), "model.layers.0.mlp.up_proj"
    del few[f"{name}.second_moment"]
    save_file(few, tmp_path / "few.safetensors")
    start("weighted", tmp_path / "few.safetensors", rf"{name}: no second_moment in .* \(1 such")
    checkpoint.initialize(
        model,
        "weighted",
        tmp_path / "part",
        rank=4,
        calibration=tmp_path / "few.safetensors",
        targets="q_proj",
    )
    only = {k: v for k, v in few.items() if "gradient" in k}
    save_file(only, tmp_path / "only.safetensors")
    start("eva", tmp_path / "only.safetensors", "no components of any layer; the file has")
    few[f"{name}.second_moment"] = np.ones((5, 5))
    save_file(few, tmp_path / "wrong.safetensors")
    start("weighted", tmp_path / "wrong.safetensors", f"{name}: second_moment must")


# Quantized bases


def decoded(folder, name):
    return Checkpoint(folder).tensors[f"{name}.weight"].read()


@pytest.mark.parametrize("method", compensate.COMPENSATIONS)
def test_quantize_is_the_function_on_every_layer(method, model, calibration, tmp_path):
    function, statistic = compensate.COMPENSATIONS[method]
    file = None if statistic is None else calibration
    out = tmp_path / "out"
    report = checkpoint.quantize(
        model, out, to="int", bits=3, block=16, compensate=method, rank=4, calibration=file
    )
    found, arrays = parts(out / "adapter"), load_file(calibration)
    quantizer = partial(formats.int_symmetric, bits=3, block=16)
    children = np.random.SeedSequence(0).spawn(len(report.layers))
    for row, child in zip(report.layers, children, strict=True):
        weight = decoded(model, row.name)
        data = {} if statistic is None else {statistic: arrays[f"{row.name}.{statistic}"]}
        rng = np.random.default_rng(child)
        expected = function(weight, 4, quantize=quantizer, rng=rng, **data)
        assert close(decoded(out / "base", row.name), expected.base.to_dense(), weight)
        assert close(dense(found[row.name]), expected.correction.to_dense(), weight)
        lost = weight - decoded(out / "base", row.name) - dense(found[row.name])
        assert row.error == pytest.approx(np.linalg.norm(lost), rel=1e-4)
        assert row.norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
    assert_reported(report, out)
    assert read_adapter(out / "adapter").base == str(out / "base")


@pytest.mark.parametrize("to", checkpoint.FORMATS)
def test_bases_have_the_values_of_their_format(to, model, tmp_path):
    report = checkpoint.quantize(model, tmp_path / "out", to=to, targets="q_proj")
    (name,) = (row.name for row in report.layers)
    weight, stored = decoded(model, name), decoded(tmp_path / "out" / "base", name)
    assert np.array_equal(stored, checkpoint.FORMATS[to](weight).to_dense())
    again = checkpoint.FORMATS[to](stored).to_dense()
    assert close(again, stored)
    assert not (tmp_path / "out" / "adapter").exists()
    (row,) = report.layers
    assert (row.rank, row.note) == (0, "")
    assert row.error == pytest.approx(np.linalg.norm(weight - stored), rel=1e-5)
    before, after = (load_file(m / "model.safetensors") for m in (model, tmp_path / "out" / "base"))
    changed = [key for key, tensor in before.items() if not np.array_equal(tensor, after[key])]
    assert changed == [f"{name}.weight"]


def test_a_quantized_base_and_its_adapter_in_peft(model, tmp_path):
    checkpoint.quantize(model, tmp_path / "out", compensate="lorc", rank=100)
    found = logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    assert close(found, logits(model), slack=1000)
    assert not close(logits(tmp_path / "out" / "base"), logits(model), slack=1e5)


def test_transposed_weights_are_quantized_by_outputs(tmp_path):
    (tmp_path / "model").mkdir()
    weight = gaussian(20, 30).astype(np.float32)
    save_file({"c_fc.weight": weight}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    report = checkpoint.quantize(tmp_path / "model", tmp_path / "out", compensate="lorc", rank=3)
    stored = decoded(tmp_path / "out" / "base", "c_fc")
    assert close(stored, formats.nf4(weight.T).to_dense().T)
    lost = weight.T - stored.T - dense(parts(tmp_path / "out" / "adapter")["c_fc"])
    assert report.layers[0].error == pytest.approx(np.linalg.norm(lost), rel=1e-4)
    assert read_adapter(tmp_path / "out" / "adapter").fan_in_fan_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "nf5"}, "to must be one of nf4, .*; did you mean nf4"),
        ({"bits": 3}, "bits is for int, int_affine only, got bits 3 for nf4"),
        ({"rank": 3}, "a compensation needs a rank, and only it does"),
        ({"compensate": "lorc"}, "a compensation needs a rank, and only it does"),
        ({"compensate": "lor", "rank": 2}, "did you mean lorc"),
        ({"compensate": "qera", "rank": 2}, "qera needs the second_moment of every layer"),
        ({"compensate": "lorc", "rank": 2, "calibration": "x"}, "a calibration is for lqer, "),
        ({"calibration": "x"}, "a calibration is for a compensation"),
        ({"to": "int", "bits": 9}, r"mlp\.down_proj: bits must be in 2\.\.8"),
    ],
)
def test_bad_options_of_quantize_are_named(options, message, model, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.quantize(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_what_torch_collects_is_a_calibration_file(model, tmp_path):
    net = LlamaForCausalLM.from_pretrained(model).eval()
    targets = [layer.name for layer in Checkpoint(model).layers()]
    batches = torch.randint(512, (4, 8, 20), generator=torch.Generator().manual_seed(0))
    moments = statistics.SecondMoment.of
    with torch.no_grad(), collect_inputs(net, moments, targets=targets) as seen:
        for batch in batches:
            net(batch)
    file = tmp_path / "moments.safetensors"
    save_file({k: v.numpy(force=True) for k, v in statistics.pack(seen).items()}, file)
    checkpoint.initialize(model, "weighted", tmp_path / "out", rank=4, calibration=file)
    assert checkpoint.verify(tmp_path / "out", model).passed
    moments = checkpoint.SecondMoments(file)
    report = checkpoint.compress(model, tmp_path / "small", moments, keep=0.5)
    dense = report.notes.get("layers that stay as they are", [])
    assert {row.name for row in report.layers} | set(dense) == set(targets)
    assert_reported(report, tmp_path / "small")


def test_second_moments_come_with_their_samples(calibration, tmp_path):
    found = checkpoint.SecondMoments(calibration)
    arrays = load_file(calibration)
    expected = statistics.unpack(statistics.SecondMoment, arrays)
    assert len(found) == len(expected) == 7
    for name, statistic in expected.items():
        assert found[name].count == statistic.count == 300
        assert np.array_equal(found[name].mean, statistic.mean)
    del arrays[f"{NAMES[0]}.second_moment_count"]
    save_file(arrays, tmp_path / "few.safetensors")
    with pytest.raises(CheckpointError, match=f"{NAMES[0]}.second_moment_count must be there"):
        checkpoint.SecondMoments(tmp_path / "few.safetensors")[NAMES[0]]


# Sharing

SHARE_OPTIONS = {"full": {}, "diag": {}, "clustered": {"clusters": 2}}
FUNCTIONS = {
    "full": serving.jd_full,
    "diag": serving.jd_diag,
    "clustered": serving.jd_clustered,
}


@pytest.mark.parametrize("method", checkpoint.SHARINGS)
def test_share_is_the_function_on_every_layer(method, adapters, tmp_path):
    options, out = SHARE_OPTIONS[method], tmp_path / "out"
    report = checkpoint.share(adapters, out, method=method, rank=3, seed=1, **options)
    sources = {name: parts(path) for name, path in adapters.items()}
    children = np.random.SeedSequence(1).spawn(len(NAMES))
    rows = {(row.name, row.adapter): row for row in report.layers}
    assert len(rows) == 7
    shared = checkpoint.read_shared(out / "shared.safetensors")
    assert sorted(shared) == NAMES
    for layer, child in zip(NAMES, children, strict=True):
        have = [name for name in adapters if layer in sources[name]]
        own = {k: min(v, len(have)) for k, v in options.items()}
        expected = FUNCTIONS[method](
            [sources[name][layer] for name in have], rank=3, rng=np.random.default_rng(child), **own
        ).value
        names, value = shared[layer]
        assert names == have
        assert value.clusters == expected.clusters
        for i, name in enumerate(have):
            product = parts(out / "adapters" / name)[layer]
            norm = expected.norms[i]
            assert close(
                dense(product), expected.adapter(i).to_dense(), dense(sources[name][layer])
            )
            assert close(value.adapter(i).to_dense(), expected.adapter(i).to_dense(), slack=1e3)
            row = rows[layer, name]
            assert row.error == pytest.approx(expected.errors[i], rel=1e-3, abs=100 * EPS * norm)
            assert row.norm == pytest.approx(norm, rel=1e-6)
            lost = np.linalg.norm(dense(sources[name][layer]) - dense(product))
            assert row.error == pytest.approx(lost, rel=1e-2, abs=1e3 * EPS * norm)
    assert_reported(report, out)


def test_shared_adapters_in_peft(model, adapters, tmp_path):
    checkpoint.share(adapters, tmp_path / "out", method="full", rank=7)
    updates = {name: dense(p) for name, p in parts(adapters["bob"]).items()}
    assert_peft_gives(model, tmp_path / "out" / "adapters" / "bob", updates, tmp_path)


def test_diagonal_cores_have_all_columns_at_most(adapters, tmp_path):
    report = checkpoint.share(
        adapters, tmp_path / "out", method="diag", rank=9999, stop=Stop(max_iter=3)
    )
    for row in report.layers:
        products = (parts(path).get(row.name) for path in adapters.values())
        columns = sum(p.rank for p in products if p is not None)
        assert f"rank {columns} is all there is" in row.note


def test_steps_that_did_not_settle_are_noted(adapters, tmp_path):
    report = checkpoint.share(
        adapters, tmp_path / "out", method="diag", rank=2, stop=Stop(max_iter=1, tol=1e-9)
    )
    (noted,) = report.notes.values()
    assert [line.split(":")[0] for line in noted] == NAMES


def test_other_files_are_no_shared_adapters(model):
    with pytest.raises(CheckpointError, match="not a file of shared adapters"):
        checkpoint.read_shared(model / "model.safetensors")


# Federated rounds

ROUND_OPTIONS = {
    "fedit": {},
    "flora": {},
    "fedex": {},
    "ffa": {},
    "rolora": {"frozen": "down"},
    "flexlora": {},
    "lora_fair": {},
    "flora_na": {"rank": 2},
}


def test_every_way_to_aggregate_is_tried():
    assert ROUND_OPTIONS.keys() == checkpoint.AGGREGATES.keys()


@pytest.mark.parametrize("method", ROUND_OPTIONS)
def test_federate_is_the_function_on_every_layer(method, model, clients, tmp_path):
    weights, options, out = [0.25, 0.75], ROUND_OPTIONS[method], tmp_path / "out"
    report = checkpoint.federate(clients, out, method=method, weights=weights, **options)
    corrected = method in ("flora", "fedex")
    based = {"method": method, "weights": weights, "base": model, **options}
    if corrected:
        updated = checkpoint.federate(clients, tmp_path / "based", **based)
        for one, two in zip(report.layers, updated.layers, strict=True):
            size = np.linalg.norm(Checkpoint(model).tensors[f"{one.name}.weight"].read())
            assert abs(one.error - two.error) <= 10 * EPS * size
            assert replace(one, seconds=0, error=0) == replace(two, seconds=0, error=0)
    else:
        with pytest.raises(CheckpointError, match="base is for flora and fedex only"):
            checkpoint.federate(clients, tmp_path / "based", **based)
    sources = [parts(path) for path in clients.values()]
    for layer in NAMES:
        own = [source[layer] for source in sources]
        made = getattr(federated, method)(own, weights, **options)
        mean = sum(w * dense(p) for w, p in zip(weights, own, strict=True))
        each = dict(zip(clients, made, strict=True)) if isinstance(made, tuple) else {None: made}
        for client, expected in each.items():
            folder = out / "adapter" if client is None else out / "adapters" / client
            total = np.zeros_like(mean)
            if expected.adapter is not None:
                total += dense(parts(folder)[layer])
            if expected.correction is not None:
                correction = dense(parts(out / "correction")[layer])
                total += correction
                old, new = (
                    Checkpoint(m).tensors[f"{layer}.weight"].read().astype(np.float64)
                    for m in (model, tmp_path / "based" / "base")
                )
                assert close(new - old, correction, old)
            assert close(total, expected.update().to_dense(), mean)
            (row,) = (r for r in report.layers if (r.name, r.adapter) == (layer, client))
            assert row.norm == pytest.approx(np.linalg.norm(mean), rel=1e-5)
            lost = np.linalg.norm(mean - total)
            assert row.error == pytest.approx(lost, rel=1e-3, abs=100 * EPS * row.norm)
    assert (out / "correction").exists() == (tmp_path / "based" / "base").exists() == corrected
    assert (out / "adapter").exists() == (method not in ("flora", "flexlora"))
    assert_reported(report, out)


def test_errors_are_those_of_the_base_as_it_is_stored(model, apart, tmp_path):
    """In bfloat16 much of a small correction is lost."""
    tensors = load_file(model / "model.safetensors")
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    options = {"method": "fedex", "base": tmp_path / "half.safetensors", "assume_same_base": True}
    report = checkpoint.federate(apart, tmp_path / "out", **options)
    old, new = Checkpoint(tmp_path / "half.safetensors"), Checkpoint(tmp_path / "out" / "base")
    sources = [parts(path) for path in apart.values()]
    for row in report.layers:
        one, two = (c.tensors[f"{row.name}.weight"].read().astype(np.float64) for c in (old, new))
        mean = sum(0.5 * dense(source[row.name]) for source in sources)
        adapter = dense(parts(tmp_path / "out" / "adapter")[row.name])
        lost = np.linalg.norm(mean - adapter + one - two)
        assert lost > 1e-3 * row.norm
        assert row.error == pytest.approx(lost, rel=1e-4)


def test_a_corrected_base_and_its_adapter_in_peft(model, clients, tmp_path):
    checkpoint.federate(clients, tmp_path / "out", method="fedex", base=model)
    updates = {
        name: np.mean([dense(parts(path)[name]) for path in clients.values()], axis=0)
        for name in NAMES
    }
    expected = logits(merged_model(model, updates, tmp_path / "merged"))
    found = logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    assert close(found, expected)
    assert read_adapter(tmp_path / "out" / "adapter").base == str(tmp_path / "out" / "base")


def test_rounds_that_do_not_fit_are_refused(model, clients, adapters, tmp_path):
    def refused(match, paths=clients, **options):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.federate(paths, tmp_path / "out", **({"method": "fedit"} | options))
        assert not (tmp_path / "out").exists()

    refused("weights must sum to 1, got 1.5", weights=[0.5, 1.0])
    refused("weights must be one for each adapter, got 1 for 2", weights=[1.0])
    refused("rolora needs the factor that was frozen", method="rolora")
    refused("frozen must be one of up, down, got 'both'", method="rolora", frozen="both")
    refused("rank is for fedex, flora_na only, got rank 2 for fedit", rank=2)
    refused("up must be frozen, but that of client 1 differs", method="rolora", frozen="up")
    refused(r"mlp\.down_proj: all clients must have the same layers, but bob lacks", adapters)
    other = Checkpoint(model)
    one = {
        name: write(tmp_path / name, parts(path), fingerprint="sha256:0")
        for name, path in clients.items()
    }
    refused("one: made for .*, whose tensors are not", one, method="fedex", base=other.path)


# Bounded memory


@pytest.mark.parametrize(
    "job",
    [
        lambda paths, out: checkpoint.resize(paths["a"], out, rank=2),
        lambda paths, out: checkpoint.merge(paths, out, method="svd", rank=4),
        lambda paths, out: checkpoint.merge(paths, out, method="tsv", rank=4),
        lambda paths, out: checkpoint.merge(paths, out, method="knots", density=0.5, rank=4),
        lambda paths, out: checkpoint.merge(paths, out, method="ties", density=0.5, rank=4),
        lambda paths, out: checkpoint.share(paths, out, method="full", rank=4),
        lambda paths, out: checkpoint.federate(paths, out, method="fedex"),
    ],
    ids=["resize", "svd", "tsv", "knots", "ties", "share", "federate"],
)
def test_nothing_of_the_size_of_a_weight_is_formed(job, tmp_path):
    size = 3000
    paths = {
        name: write(tmp_path / name, {"x": pair((size, size), 4, k)}, base="b")
        for k, name in enumerate("ab")
    }
    tracemalloc.start()
    try:
        job(paths, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * 4 * size**2


# Bad input


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (lambda a, o: checkpoint.resize(a["ann"], o), "resize needs a rank, a tol or a rule"),
        (lambda a, o: checkpoint.resize(a["ann"], o, rank=0), "rank must be at least 1, got 0"),
        (lambda a, o: checkpoint.resize(a["ann"], o, tol=2.0), r"tol must be in \(0, 1\), got 2"),
        (
            lambda a, o: checkpoint.resize(a["ann"], o, rule="sv_fra", threshold=1.0),
            "got 'sv_fra'; did you mean sv_fro?",
        ),
        (lambda a, o: checkpoint.resize(a["ann"], o, rule="sv_fro"), "a rule needs a threshold"),
        (lambda a, o: checkpoint.resize(a["ann"], o, rank=1, threshold=2.0), "only a rule does"),
        (
            lambda a, o: checkpoint.resize(a["ann"], o, tol=0.1, rule="sv_fro", threshold=0.9),
            "tol or a rule choose ranks",
        ),
        (
            lambda a, o: checkpoint.resize(a["ann"], o, rule="sv_ratio", threshold=0.5),
            "threshold of sv_ratio: ratio must be finite and above 1, got 0.5",
        ),
        (lambda a, o: checkpoint.resize(a["ann"].parent, o, rank=1), "adapter_config.json"),
        (lambda a, o: checkpoint.merge(a, o, method="tiez"), "got 'tiez'; did you mean ties?"),
        (lambda a, o: checkpoint.merge(a, o, method="ties", rank=2), "ties needs a density"),
        (
            lambda a, o: checkpoint.merge(a, o, method="ties", density=2, rank=2),
            r"density must be in \(0, 1\], got 2",
        ),
        (
            lambda a, o: checkpoint.merge(a, o, method="svd", density=0.5),
            "density is for ties, dare, dare_ties, magnitude_prune, knots only",
        ),
        (lambda a, o: checkpoint.merge(a, o, method="dare", density=0.5), "pass --rank or --tol"),
        (lambda a, o: checkpoint.merge(a, o, method="cat", rank=2), "rank is for svd, ties"),
        (lambda a, o: checkpoint.merge(a, o, method="cat", weights=[1.0]), "got 1 for 3"),
        (
            lambda a, o: checkpoint.merge(a, o, method="cat", weights=[1, 2, np.nan]),
            "weights must be finite",
        ),
        (
            lambda a, o: checkpoint.merge(a, o, method="linear"),
            r"q_proj: factors of one rank are needed to merge them, got ranks \[2, 3, 2\]",
        ),
        (lambda a, o: checkpoint.merge(a, o, method="cat", seed=-1), "seed must be a non-negative"),
        (lambda _, o: checkpoint.merge({}, o, method="cat"), "at least one adapter"),
        (
            lambda a, _: checkpoint.merge(a, a["ann"] / "x", method="cat"),
            "must not be, contain or lie inside",
        ),
        (
            lambda a, o: checkpoint.share(a, o, method="clustered", rank=2),
            "clustered needs the number of clusters",
        ),
        (
            lambda a, o: checkpoint.share(a, o, method="full", rank=2, clusters=2),
            "clusters is for clustered only",
        ),
        (
            lambda a, o: checkpoint.share({"../x": a["ann"]}, o, method="full", rank=2),
            "no name of a directory",
        ),
        (lambda a, o: checkpoint.share(a, o, method="ful", rank=2), "did you mean full"),
        (lambda a, o: checkpoint.federate(a, o, method="fedx"), "did you mean fedex"),
    ],
)
def test_bad_options_give_one_clear_error(job, message, adapters, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        job(adapters, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_are_refused(model, tuned, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"no layer differs from .*; nothing to extract"):
        checkpoint.extract(model, model / "model.safetensors", out, rank=2)
    with pytest.raises(CheckpointError, match="extract needs a rank, a tol or both"):
        checkpoint.extract(tuned, model, out)
    tensors = load_file(tuned / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    save_file(
        tensors | {f"{name}.weight": np.ones((7, 48), np.float32)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=rf"{name}: both models must have one shape"):
        checkpoint.extract(tmp_path / "a.safetensors", model, out, rank=2)
    del tensors[f"{name}.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"no linear layer {name}"):
        checkpoint.extract(tmp_path / "a.safetensors", model, out, rank=2)
    checkpoint.extract(tmp_path / "a.safetensors", model, out, rank=2, targets="q_proj")


def test_shapes_that_differ_are_named(adapters, tmp_path):
    layers = {ATTENTION[0]: pair((48, 40), 2, 0)}
    other = write(tmp_path / "other", layers, base=read_adapter(adapters["ann"]).base)
    paths = {"ann": adapters["ann"], "other": other}
    message = r"q_proj: adapters must have one shape, got \(48, 48\) of ann and \(48, 40\) of other"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.merge(paths, tmp_path / "out", method="cat")


def test_only_outputs_of_jobs_are_overwritten(adapters, tmp_path):
    out = tmp_path / "out"
    checkpoint.resize(adapters["ann"], out, rank=1)
    with pytest.raises(CheckpointError, match="exists already; pass --overwrite"):
        checkpoint.resize(adapters["ann"], out, rank=1)
    checkpoint.resize(adapters["ann"], out, rank=2, overwrite=True)
    assert json.loads((out / "report.json").read_text())["options"] == {"rank": 2}
    (out / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="only what an earlier run wrote"):
        checkpoint.resize(adapters["ann"], out, rank=1, overwrite=True)


@pytest.mark.parametrize(
    ("job", "base"),
    [
        (lambda m, a, o: checkpoint.initialize(m, "pissa", o, rank=2), "base"),  # noqa: ARG005
        (lambda m, a, o: checkpoint.initialize(m, "lora", o, rank=2), None),  # noqa: ARG005
        (lambda m, a, o: checkpoint.quantize(m, o, compensate="lorc", rank=2), "base"),  # noqa: ARG005
        (lambda m, a, o: checkpoint.federate(a, o, method="fedex", base=m), "base"),
    ],
)
def test_adapters_carry_the_fingerprint_of_the_base_they_are_for(job, base, model, apart, tmp_path):
    """So an engine, a merge or a conversion with the original model in its place is noticed."""
    job(model, apart, tmp_path / "out")
    adapter = read_adapter(tmp_path / "out" / "adapter")
    right = model if base is None else tmp_path / "out" / base
    assert adapter.base == str(right)
    assert adapter.fingerprint == Checkpoint(right).fingerprint()
    findings = checkpoint.preflight(
        tmp_path / "out" / "adapter", engine="peft", model=Checkpoint(model)
    )
    assert [f.severity for f in findings] == ([] if base is None else ["error"])


def test_conversion_names_the_model_that_was_initialized(model, tmp_path):
    start = tmp_path / "start"
    checkpoint.initialize(model, "pissa", start, rank=2)
    convert = partial(checkpoint.convert, start / "adapter", start=start / "adapter")
    with pytest.raises(CheckpointError, match=r"not the model that .* was initialized from"):
        convert(tmp_path / "out", base=start / "base")
    convert(tmp_path / "out", base=model)
    assert read_adapter(tmp_path / "out" / "adapter").fingerprint == Checkpoint(model).fingerprint()
