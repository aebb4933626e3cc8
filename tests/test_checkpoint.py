"""Checkpoints: what goes in comes out, in any storage, and nothing half-written remains."""

import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import processes
from safetensors.numpy import load_file, save_file

from lowrank_sp import checkpoint
from lowrank_sp.adapters import INITIALIZERS
from lowrank_sp.checkpoint import Checkpoint, CheckpointError, initialize, verify
from lowrank_sp.checkpoint.demo import transformer_like
from lowrank_sp.checkpoint.output import atomic_directory
from lowrank_sp.checkpoint.tensors import round_to

CHANGES_WEIGHTS = {"pissa", "milora", "olora", "orthogonal"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.write_demo_model(folder, hidden=96, layers=1)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    return folder


def stored_as(folder: Path, dtype, shards: int) -> Path:
    """A model of a few matrices in some dtype, over several shards with an index."""
    rng = np.random.default_rng(3)
    tensors = {
        f"block.{i}.linear.weight": transformer_like(120, 130, rng).astype(dtype) for i in range(4)
    }
    tensors["norm.weight"] = np.ones(130, dtype)
    folder.mkdir(parents=True)
    names = sorted(tensors)
    where = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[k::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def products(folder: Path) -> dict[str, np.ndarray]:
    layers = checkpoint.read_adapter(folder / "adapter").layers
    return {name: layer.scale * layer.up @ layer.down for name, layer in layers.items()}


def test_bfloat16_is_rounded_to_nearest_even():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000).astype(np.float32)
    ties = (np.arange(1000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for x in (values, ties):
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        np.testing.assert_array_equal(round_to(x, "BF16"), expected)


@pytest.mark.parametrize("method", INITIALIZERS)
def test_every_method_verifies_and_leaves_the_rest_alone(method, model, tmp_path):
    report = initialize(model, method, tmp_path / "out", rank=4, alpha=8)
    assert verify(tmp_path / "out", model).passed
    assert {layer.alpha for layer in report.layers} == {8}
    changed = method in CHANGES_WEIGHTS
    assert (tmp_path / "out" / "base").exists() == changed
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    if not changed:
        assert config["base_model_name_or_path"] == str(model)
        return
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "base" / "model.safetensors")
    targets = {f"{layer.name}.weight" for layer in report.layers}
    for name, tensor in before.items():
        same = np.array_equal(tensor, after[name])
        assert same == (name not in targets) or method == "orthogonal"
    assert (tmp_path / "out" / "base" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert not (tmp_path / "out" / "base" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_storage_is_kept(dtype, shards, tmp_path):
    source = stored_as(tmp_path / "model", dtype, shards)
    report = initialize(source, "pissa", tmp_path / "out", rank=8)
    assert verify(tmp_path / "out", source).passed
    assert len(report.layers) == 4
    for file in Checkpoint(source).files:
        before = Checkpoint(file).tensors
        after = Checkpoint(tmp_path / "out" / "base" / file.name).tensors
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert replace(tensor, path=after[name].path) == after[name]


def test_report_holds_what_it_promises(model, tmp_path):
    initialize(model, "pissa", tmp_path / "out", rank=4, seed=7, tol=1e-5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {"method": "pissa", "rank": 4, "seed": 7, "tol": 1e-5}
    assert expected.items() <= report.items()
    assert report["fingerprint"] == Checkpoint(model).fingerprint()
    for row in report["layers"]:
        weight = Checkpoint(model).tensors[f"{row['name']}.weight"].read()
        s = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        assert np.all(abs(s[:4] - row["singular_values"]) <= row["bound"] * s[0])
        rounding = max(weight.shape) * np.finfo(np.float32).eps * s[0]
        assert row["bound"] * s[0] <= 1e-5 * s[3] + rounding
        assert row["energy"] == pytest.approx(np.sum(s[:4] ** 2) / np.sum(s**2), rel=1e-4)


def test_fingerprint_sees_values_not_sharding(tmp_path):
    one = stored_as(tmp_path / "one", np.float32, 1)
    three = stored_as(tmp_path / "three", np.float32, 3)
    assert Checkpoint(one).fingerprint() == Checkpoint(three).fingerprint()
    tensor = Checkpoint(three).tensors["norm.weight"]
    tensor.write(np.full(130, 2.0, np.float32), tensor.path)
    assert Checkpoint(one).fingerprint() != Checkpoint(three).fingerprint()
    initialize(one, "lora", tmp_path / "out", rank=2)
    assert not verify(tmp_path / "out", three).passed


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_verify_notices_one_changed_entry(dtype, tmp_path):
    source = stored_as(tmp_path / "model", dtype, 2)
    initialize(source, "pissa", tmp_path / "out", rank=8)
    tensor = Checkpoint(tmp_path / "out" / "base").tensors["block.1.linear.weight"]
    values = tensor.read().copy()
    values[3, 4] += 0.05
    tensor.write(tensor.encode(values), tensor.path)
    outcome = verify(tmp_path / "out", source)
    assert [layer.name for layer in outcome.layers if not layer.passed] == ["block.1.linear"]
    assert not outcome.passed


def test_verify_notices_a_changed_tensor_without_an_adapter(tmp_path):
    source = stored_as(tmp_path / "model", np.float16, 2)
    initialize(source, "pissa", tmp_path / "out", rank=8)
    tensor = Checkpoint(tmp_path / "out" / "base").tensors["norm.weight"]
    tensor.write(np.zeros(130, np.float16), tensor.path)
    outcome = verify(tmp_path / "out", source)
    assert all(layer.passed for layer in outcome.layers)
    assert outcome.changed == ["norm.weight"]
    assert not outcome.passed


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tensor missing", r"norm\.weight: in .*model but not in .*base"),
        ("tensor too many", r"extra\.weight: in .*base but not in .*model"),
        ("shape of tensor", r"block\.0\.linear\.weight: dtype or shape differ in .*base"),
        ("layer too many", r"norm: in .*adapter but not in .*report\.json"),
        ("layer missing", r"block\.0\.linear: in .*report\.json but not in .*adapter"),
        ("lone factor", r"block\.0\.linear lacks lora_B\.weight"),
        ("foreign tensor", r"magnitude is not a part of plain LoRA"),
        ("factors that do not fit", r"block\.0\.linear: down .* lora_B\.weight \(120, 7\)"),
        ("wrong factors", r"block\.0\.linear: the adapter does not fit shape \(120, 130\)"),
        ("infinite base", r"block\.0\.linear: model, base and adapter must be finite"),
    ],
)
def test_verify_refuses_other_content(kind, message, tmp_path):
    source = stored_as(tmp_path / "model", np.float32, 1)
    initialize(source, "pissa", tmp_path / "out", rank=8)
    base = next((tmp_path / "out" / "base").glob("*.safetensors"))
    factors = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors, adapter = load_file(base), load_file(factors)
    name, prefix = "block.0.linear", "base_model.model."
    down, up = (f"{prefix}{name}.lora_{part}.weight" for part in "AB")
    match kind:
        case "tensor missing":
            del tensors["norm.weight"]
            (tmp_path / "out" / "base" / "model.safetensors.index.json").unlink()
        case "tensor too many":
            tensors["extra.weight"] = np.ones(3, np.float32)
        case "shape of tensor":
            tensors[f"{name}.weight"] = np.ones((3, 3), np.float32)
        case "layer too many":
            adapter |= {f"{prefix}norm.lora_{part}.weight": np.ones((1, 1)) for part in "AB"}
        case "layer missing":
            del adapter[down], adapter[up]
        case "lone factor":
            del adapter[up]
        case "foreign tensor":
            adapter[f"{prefix}{name}.magnitude"] = np.ones(3)
        case "factors that do not fit":
            adapter[up] = np.ones((120, 7))
        case "wrong factors":
            adapter[up] = np.ones((121, 8))
        case "infinite base":
            tensors[f"{name}.weight"][2, 3] = np.inf
    save_file(tensors, base)
    save_file(adapter, factors)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "out", source)


def test_verify_reads_only_the_layers_of_the_report(tmp_path):
    source = stored_as(tmp_path / "model", np.float32, 1)
    file = Checkpoint(source).files[0]
    save_file(load_file(file) | {"packed.weight": np.ones((4, 4), np.int8)}, file)
    initialize(source, "pissa", tmp_path / "out", rank=8, targets="block")
    assert verify(tmp_path / "out", source).passed


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, processes])
def test_executor_does_not_change_the_result(pool, model, tmp_path):
    seen = []
    initialize(model, "pissa", tmp_path / "one", rank=4, progress=lambda *row: seen.append(row))
    with pool(2) as executor:
        initialize(model, "pissa", tmp_path / "two", rank=4, executor=executor, ahead=2)
    one, two = products(tmp_path / "one"), products(tmp_path / "two")
    assert [row[:2] for row in seen] == [(k, 7) for k in range(1, 8)]
    for name, product in one.items():
        error = np.linalg.norm(product - two[name]) / np.linalg.norm(product)
        assert error <= 100 * np.finfo(np.float32).eps


def test_another_seed_gives_the_same_products_to_the_tolerance(model, tmp_path):
    tol = 1e-4
    for seed in (1, 2):
        initialize(model, "pissa", tmp_path / str(seed), rank=4, seed=seed, tol=tol)
    one, two = products(tmp_path / "1"), products(tmp_path / "2")
    for name, product in one.items():
        s = np.linalg.svd(Checkpoint(model).tensors[f"{name}.weight"].read(), compute_uv=False)
        # A residual of tol s_k turns the subspace by at most tol s_k / (s_k - s_(k+1)).
        allowed = 2 * tol * s[0] * s[3] / (s[3] - s[4])
        assert np.linalg.norm(product - two[name], 2) <= allowed


def test_patterns_keep_the_scale_unless_told(model, tmp_path):
    report = initialize(
        model,
        "pissa",
        tmp_path / "out",
        rank=4,
        alpha=8,
        rank_pattern={"q_proj": 6, "k_proj": 2},
        alpha_pattern={"k_proj": 1},
    )
    sizes = {row.name.split(".")[-1]: (row.rank, row.alpha) for row in report.layers}
    assert (sizes["q_proj"], sizes["k_proj"], sizes["v_proj"]) == ((6, 12), (2, 1), (4, 8))
    assert verify(tmp_path / "out", model).passed


def test_transposed_layers_are_read_as_outputs_by_inputs(tmp_path):
    rng = np.random.default_rng(0)
    weight = transformer_like(96, 130, rng)
    for folder, stored, config in (
        ("linear", weight, {"model_type": "llama"}),
        ("conv1d", np.ascontiguousarray(weight.T), {"model_type": "gpt2"}),
    ):
        (tmp_path / folder).mkdir()
        save_file({"h.0.attn.c_attn.weight": stored}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        initialize(tmp_path / folder, "pissa", tmp_path / f"out-{folder}", rank=4)
        assert verify(tmp_path / f"out-{folder}", tmp_path / folder).passed
    one, two = products(tmp_path / "out-linear"), products(tmp_path / "out-conv1d")
    np.testing.assert_allclose(
        one["h.0.attn.c_attn"], two["h.0.attn.c_attn"], atol=1e-4 * np.linalg.norm(weight, 2)
    )
    config = json.loads((tmp_path / "out-conv1d" / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def json_start(file: Path) -> int:
    """Where the data of a safetensors file begin."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def edit_header(file: Path, name: str, entry=None, **fields) -> None:
    """Change what the header of a safetensors file says of one tensor."""
    data, start = file.read_bytes(), json_start(file)
    header = json.loads(data[8:start])
    header[name] = header[name] | fields if entry is None else entry
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def broken(folder: Path, kind: str) -> Path:
    """A checkpoint with one thing wrong."""
    name = "block.1.linear.weight"
    source = stored_as(folder, np.float32, 2)
    shard = Checkpoint(source).tensors[name].path
    tensors = load_file(shard)
    index = source / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    match kind:
        case "nan" | "inf":
            tensors[name][3, 5] = float(kind)
            save_file(tensors, shard)
        case "int8" | "float8_e4m3fn" | "uint8":
            dtype = getattr(ml_dtypes, kind, None) or np.dtype(kind)
            tensors[name] = np.ones((120, 130)).astype(dtype)
            save_file(tensors, shard)
        case "missing shard":
            shard.unlink()
        case "truncated header":
            shard.write_bytes(shard.read_bytes()[:60])
        case "truncated data":
            shard.write_bytes(shard.read_bytes()[:-1000])
        case "corrupt header":
            data = bytearray(shard.read_bytes())
            data[8:20] = b"not json at "
            shard.write_bytes(data)
        case "escaping index":
            index.write_text(json.dumps({"weight_map": where | {name: "../model.safetensors"}}))
        case "stale index":
            index.write_text(json.dumps({"weight_map": where | {"gone.weight": shard.name}}))
        case "broken index":
            index.write_text("{")
        case "quantized":
            config = {"quantization_config": {"quant_method": "bitsandbytes"}}
            (source / "config.json").write_text(json.dumps(config))
        case "index of numbers" | "index of lists" | "mixed index":
            value = {"index of numbers": 5, "index of lists": [shard.name], "mixed index": None}
            index.write_text(json.dumps({"weight_map": where | {name: value[kind]}}))
        case "list as index":
            index.write_text("[]")
        case "quantized by a word":
            (source / "config.json").write_text('{"quantization_config": "awq"}')
        case "config list" | "config number" | "config null" | "config too deep":
            content = {"config list": "[]", "config number": "5", "config null": "null"}
            (source / "config.json").write_text(content.get(kind, "[" * 100_000))
        case "header dtype number":
            edit_header(shard, name, dtype=5)
        case "header dtype null":
            edit_header(shard, name, dtype=None)
        case "header shape float":
            edit_header(shard, name, shape=[120.0, 130])
        case "header shape object":
            edit_header(shard, name, shape={})
        case "header offsets float":
            edit_header(shard, name, data_offsets=[0.0, 62400.0])
        case "header offsets short":
            edit_header(shard, name, data_offsets=[0])
        case "header empty with bytes":
            edit_header(shard, name, shape=[0, 130])
        case "header of a list":
            edit_header(shard, name, entry=[])
        case "shared bytes":
            other = Checkpoint(source).tensors["block.3.linear.weight"]
            mine = Checkpoint(source).tensors[name]
            assert other.path == mine.path
            first = mine.start - json_start(shard)
            edit_header(shard, other.name, data_offsets=[first, first + 62400])
        case "no weights":
            for file in source.glob("*.safetensors*"):
                file.unlink()
    return source


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"block\.1\.linear: the weight must be finite"),
        ("inf", r"block\.1\.linear: the weight must be finite"),
        ("int8", r"block\.1\.linear\.weight: .*got I8 .*dequantize"),
        ("uint8", r"block\.1\.linear\.weight: .*got U8 .*dequantize"),
        ("float8_e4m3fn", r"block\.1\.linear\.weight: .*got F8_E4M3 \(fp8\).*dequantize"),
        ("missing shard", r"shard model-0000\d-of-00002\.safetensors is missing"),
        ("truncated header", "not a readable safetensors file"),
        ("truncated data", "not a readable safetensors file"),
        ("corrupt header", "not a readable safetensors file"),
        ("escaping index", r"shard '\.\./model\.safetensors' lies outside"),
        ("stale index", r"the index names gone\.weight"),
        ("broken index", "not a readable index"),
        ("index of numbers", "not a readable index, weight_map must give a file name"),
        ("index of lists", "not a readable index, weight_map must give a file name"),
        ("mixed index", "not a readable index, weight_map must give a file name"),
        ("list as index", "not a readable index"),
        ("quantized by a word", r"stored quantized \(awq\); dequantize"),
        ("config list", r"config\.json: not a readable config .*got b'\[\]'"),
        ("config number", r"config\.json: not a readable config .*got b'5'"),
        ("config null", r"config\.json: not a readable config .*got b'null'"),
        ("config too deep", r"config\.json: not a readable config \(nested too deeply\)"),
        ("header dtype number", r"block\.1\.linear\.weight: dtype 5"),
        ("header dtype null", r"block\.1\.linear\.weight: dtype None"),
        ("header shape float", r"block\.1\.linear\.weight: .*shape \[120\.0, 130\]"),
        ("header shape object", r"block\.1\.linear\.weight: .*shape \{\}"),
        ("header offsets float", r"block\.1\.linear\.weight: .*bytes 0\.0"),
        ("header offsets short", "not a readable safetensors file"),
        (
            "header empty with bytes",
            r"block\.1\.linear\.weight of shape \[0, 130\] has 62400 bytes",
        ),
        ("header of a list", "not a readable safetensors file"),
        ("shared bytes", r"lie on the same bytes"),
        ("quantized", r"stored quantized \(bitsandbytes\); dequantize"),
        ("no weights", r"no \.safetensors file"),
    ],
)
def test_bad_checkpoints_give_one_clear_error(kind, message, tmp_path):
    source = broken(tmp_path / "model", kind)
    with pytest.raises(CheckpointError, match=message):
        initialize(source, "pissa", tmp_path / "deep" / "er" / "out", rank=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("config", ['{"quantization_config": null}', '{"model_type": []}'])
def test_harmless_configs(config, tmp_path):
    source = stored_as(tmp_path / "model", np.float32, 1)
    (source / "config.json").write_text(config)
    assert len(Checkpoint(source).layers()) == 4


def test_empty_matrices_are_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a.weight": transformer_like(20, 30, rng), "row.weight": np.ones((1, 9), np.float32)}
    tensors |= {"b.weight": np.ones((0, 5), np.float32), "c.weight": np.ones((5, 0), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    assert [s.name for s in checkpoint.spectra(file)] == ["a", "row"]
    initialize(file, "pissa", tmp_path / "out", rank=1)
    assert verify(tmp_path / "out", file).passed
    with pytest.raises(CheckpointError, match="targets 'b' match no linear layer"):
        initialize(file, "pissa", tmp_path / "none", rank=1, targets="b")
    save_file({"b.weight": tensors["b.weight"]}, file)
    with pytest.raises(CheckpointError, match="no linear layer; its matrices: none"):
        checkpoint.spectra(file)


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(np.float16, "milora"), (np.float16, "olora"), (np.float32, "olora"), (np.float64, "olora")],
)
def test_residuals_that_storage_cannot_hold_are_an_error(dtype, method, tmp_path):
    largest = float(np.finfo(dtype).max)
    weight = np.random.default_rng(0).standard_normal((64, 48)).clip(-1, 1) * largest
    save_file({"a.weight": weight.astype(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a(\.weight)?: .* must be finite"):
        initialize(tmp_path / "model.safetensors", method, tmp_path / "out", rank=8, alpha=800)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_encode_refuses_what_rounds_to_infinity(dtype, tmp_path):
    stored = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]
    save_file({"a.weight": np.zeros((2, 2), stored)}, tmp_path / "a.safetensors")
    tensor = Checkpoint(tmp_path / "a.safetensors").tensors["a.weight"]
    largest = float(ml_dtypes.finfo(stored).max)
    values = np.array([[0.0, -largest], [1.0, largest]])
    kept = tensor.encode(values)
    assert np.array_equal(kept.view(stored).astype(np.float64), values)
    for beyond in (largest * 1.01, -largest * 1.01, np.inf, np.nan):
        with pytest.raises(CheckpointError, match=rf"a\.weight: values must be finite in {dtype}"):
            tensor.encode(np.array([[0.0, 1.0], [beyond, 0.0]]))


@pytest.mark.parametrize("size", [1.0, 1e90])
@pytest.mark.parametrize("method", sorted(CHANGES_WEIGHTS))
def test_float64_models_keep_their_digits(method, size, tmp_path):
    weight = size * np.random.default_rng(0).standard_normal((40, 60))
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    initialize(tmp_path / "model.safetensors", method, tmp_path / "out", rank=8, alpha=12)
    check = verify(tmp_path / "out", tmp_path / "model.safetensors").layers[0]
    assert check.passed
    assert check.error <= 8 * np.finfo(np.float64).eps
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(np.all(np.isfinite(f)) and np.any(f) for f in factors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"down_proj: rank must be in 1\.\.96 for shape 96 x 288, got 0"),
        ({"rank": -1}, "got -1"),
        ({"rank": 97}, "got 97"),
        (
            {"rank": 4, "targets": "nothing"},
            "targets 'nothing' match no linear layer; its matrices",
        ),
        ({"rank": 4, "targets": "("}, "not a regular expression"),
        ({"rank": 4, "alpha": "x"}, "alpha must be a number"),
        ({"rank": 4, "alpha": 0}, "alpha must be positive"),
        ({"rank": 4, "alpha": float("inf")}, "alpha must be positive, .* got alpha inf"),
        ({"rank": 4, "alpha": float("nan")}, "got alpha nan"),
        ({"rank": 4, "alpha": 1e300}, r"alpha / rank in 1e-07\.\.1e\+07, got alpha 1e\+300"),
        ({"rank": 4, "alpha": 1e-300}, "got alpha 1e-300"),
        ({"rank": 4.5}, "rank must be an integer, got 4.5"),
        ({"rank": 4, "seed": -1}, "seed must be a non-negative integer, got -1"),
        ({"rank": 4, "seed": 0.5}, "seed must be a non-negative integer, got 0.5"),
        ({"rank": 4, "rank_pattern": {"q_proj": "8"}}, "rank_pattern of 'q_proj' must be a number"),
        (
            {"rank": 4, "rank_pattern": {"q_proj": None}},
            "rank_pattern of 'q_proj' must be a number",
        ),
        (
            {"rank": 4, "rank_pattern": {"q_proj": True}},
            "rank_pattern of 'q_proj' must be a number",
        ),
        ({"rank": 4, "rank_pattern": {"q_proj": 8.0}}, "q_proj: rank must be an integer, got 8.0"),
        ({"rank": 4, "rank_pattern": {"q_proj": 8.5}}, "q_proj: rank must be an integer, got 8.5"),
        ({"rank": 4, "rank_pattern": {"(": 8}}, r"rank_pattern '\(': not a regular expression"),
        ({"rank": 4, "rank_pattern": [8]}, "rank_pattern must map .* got list"),
        ({"rank": 4, "rank_pattern": {"qproj": 8}}, "rank_pattern 'qproj': must match"),
        (
            {"rank": 4, "alpha_pattern": {"q_proj": "x"}},
            "alpha_pattern of 'q_proj' must be a number",
        ),
        ({"rank": 4, "alpha_pattern": {"q_proj": 1e99}}, "q_proj: alpha must be positive, with"),
        ({"rank": 4, "alpha_pattern": {"qproj": 8}}, "alpha_pattern 'qproj': must match"),
        (
            {"rank": 4, "tol": 0.1, "method": "milora"},
            "tol is for pissa only, got tol 0.1 for milora",
        ),
        ({"rank": 4, "tol": "x"}, "tol must be a number"),
        ({"rank": 4, "rank_pattern": {"q_proj": 1000}}, "q_proj: rank must be in"),
        ({"rank": 4, "method": "unknown"}, "method must be one of"),
        ({"rank": 5, "method": "orthogonal"}, "rank must be even"),
        ({"rank": 4, "tol": 2.0}, "tol must be in"),
    ],
)
def test_bad_options_give_one_clear_error(options, message, model, tmp_path):
    arguments = {"method": "pissa", "out": tmp_path / "deep" / "er" / "out"} | options
    with pytest.raises(CheckpointError, match=message):
        initialize(model, **arguments)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept_unless_overwritten(model, tmp_path):
    out = tmp_path / "out"
    initialize(model, "pissa", out, rank=4)
    before = (out / "report.json").read_text()
    with pytest.raises(CheckpointError, match="exists already; pass --overwrite"):
        initialize(model, "lora", out, rank=4)
    with pytest.raises(CheckpointError, match="rank must be"):
        initialize(model, "lora", out, rank=1000, overwrite=True)
    with pytest.raises(CheckpointError, match="rank must be even"):
        initialize(model, "orthogonal", out, rank=5, overwrite=True)
    assert (out / "report.json").read_text() == before
    initialize(model, "lora", out, rank=4, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("home/model", "must not be, contain or lie inside"),
        ("home/model/", "must not be, contain or lie inside"),
        ("home/link", "must not be, contain or lie inside"),
        ("home", "must not be, contain or lie inside"),
        (".", "must not be, contain or lie inside"),
        ("home/new/..", "must not be, contain or lie inside"),
        ("home/model/out", "must not be, contain or lie inside"),
        ("home/link/deep/out", "must not be, contain or lie inside"),
        ("thesis", "replaces only what an earlier run wrote"),
        ("reports", "replaces only what an earlier run wrote"),
        ("thesis/new/..", "replaces only what an earlier run wrote"),
        ("thesis/chapter", "is not a directory"),
        ("loop", "is not a directory"),
    ],
)
def test_nothing_but_an_earlier_output_is_overwritten(out, message, tmp_path):
    source = stored_as(tmp_path / "home" / "model", np.float32, 1)
    (tmp_path / "home" / "notes").write_text("notes")
    (tmp_path / "home" / "link").symlink_to(source)
    (tmp_path / "loop").symlink_to("loop")
    for folder, file in (("thesis", "chapter"), ("reports", "report.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    before = contents(tmp_path)
    for model in (source, Checkpoint(source).files[0]):
        if model.is_file() and out in ("home/model/out", "home/link/deep/out"):
            continue  # beside a file is fine
        with pytest.raises(CheckpointError, match=message):
            initialize(model, "lora", f"{tmp_path}/{out}", rank=4, overwrite=True)
    assert contents(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


def test_output_around_the_data_of_a_linked_shard_is_refused(tmp_path):
    source = stored_as(tmp_path / "cache", np.float32, 1)
    initialize(source, "pissa", tmp_path / "out", rank=4)
    view = tmp_path / "view"
    view.mkdir()
    file = next((tmp_path / "out" / "base").glob("*.safetensors"))
    (view / "model.safetensors").symlink_to(file)
    with pytest.raises(CheckpointError, match="must not be, contain or lie inside"):
        initialize(view, "lora", tmp_path / "out", rank=4, overwrite=True)
    assert file.exists()


@pytest.mark.parametrize("state", ["output", "empty", "dangling"])
def test_a_link_stands_for_its_directory(state, model, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if state == "output":
        initialize(model, "pissa", target, rank=4)
    if state == "empty":
        target.mkdir()
    initialize(model, "lora", link, rank=4, overwrite=True)
    assert link.is_symlink()
    assert sorted(p.name for p in target.iterdir()) == ["adapter", "report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]


def test_output_moved_aside_by_a_killed_run_comes_back(model, tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    initialize(model, "lora", out, rank=4)
    before = contents(out)
    out.rename(old)  # all that is left if the process dies between its two renames
    with pytest.raises(CheckpointError, match="rank must be even"):
        initialize(model, "orthogonal", out, rank=5, overwrite=True)
    assert contents(out) == before
    assert not old.exists()
    out.rename(old)
    with pytest.raises(CheckpointError, match="exists already"):
        initialize(model, "lora", out, rank=4)
    assert contents(out) == before
    shutil.copytree(out, old)  # and here between the renames and the removal
    initialize(model, "pissa", out, rank=4, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_failure_in_the_middle_restores_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")

    def fail(path):
        with atomic_directory(path, overwrite=True, ours=Path.exists) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail(out)
    assert [p.name for p in out.iterdir()] == ["old"]
    with pytest.raises(RuntimeError, match="boom"):
        fail(tmp_path / "a" / "b" / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_demo_appears_whole_or_not_at_all(model, tmp_path):
    demo = tmp_path / "deep" / "demo"
    with pytest.raises(CheckpointError, match=r"rank must be in 1\.\.192"):
        checkpoint.run_demo(demo, rank=1000)
    assert not list(tmp_path.iterdir())
    report, outcome = checkpoint.run_demo(demo, rank=2)
    assert outcome.passed
    assert (report.model, report.base) == (str(demo / "model"), "base")
    config = json.loads((demo / "pissa" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(demo / "pissa" / "base")
    assert checkpoint.Report.load(demo / "pissa" / "report.json").model == report.model
    initialize(model, "lora", tmp_path / "work" / "pissa", rank=4)
    (tmp_path / "work" / "model").mkdir()
    with pytest.raises(CheckpointError, match="replaces only what an earlier run wrote"):
        checkpoint.run_demo(tmp_path / "work", rank=2, overwrite=True)
    checkpoint.run_demo(demo, rank=3, overwrite=True)
    assert checkpoint.Report.load(demo / "pissa" / "report.json").rank == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_runs_at_the_same_time_do_not_touch_each_other(overwrite, tmp_path):
    """The first to end has the name; the second comes later, or is refused."""
    out = tmp_path / "out"

    def write(folder, text):
        (folder / "one").write_text(text)
        (folder / "report.json").write_text("{}")

    def second(first_done):
        with atomic_directory(out, overwrite=overwrite, ours=Path.exists) as folder:
            write(folder, "second")
            with atomic_directory(out, ours=Path.exists) as other:
                assert other != folder
                write(other, "first")
            assert (folder / "one").read_text() == "second"
            first_done.append((out / "one").read_text())

    done = []
    if overwrite:
        second(done)
    else:
        with pytest.raises(CheckpointError, match="exists already; pass --overwrite"):
            second(done)
    assert done == ["first"]
    assert (out / "one").read_text() == ("second" if overwrite else "first")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_process_leaves_nothing_under_the_final_name(model, tmp_path):
    out = tmp_path / "out"
    script = (
        "import time; from lowrank_sp import checkpoint\n"
        f"checkpoint.initialize({str(model)!r}, 'pissa', {str(out)!r}, rank=4,"
        " progress=lambda *row: (print(row, flush=True), time.sleep(60)))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.partial", left.name)
    (tmp_path / ".out.mine.partial").mkdir()
    initialize(model, "pissa", out, rank=4)
    (tmp_path / ".out.mine.partial").rmdir()
    assert verify(out, model).passed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", "{", "not a readable report"),
        ("report.json", "{}", "not a readable report"),
        ("report.json", "[]", "not a readable report"),
        ("report.json", {"layers": []}, "not a readable report"),
        ("report.json", {"layers": 5}, "not a readable report"),
        ("report.json", {"base": 5}, "not a readable report"),
        ("adapter/adapter_config.json", "[]", "not a readable adapter config"),
        ("adapter/adapter_config.json", {"lora_alpha": "x"}, "lora_alpha must be a number"),
        ("adapter/adapter_config.json", {"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ("adapter/adapter_config.json", {"alpha_pattern": [1]}, "alpha_pattern must map"),
        ("adapter/adapter_config.json", "{", "not a readable adapter config"),
        ("adapter/adapter_config.json", '{"peft_type": "IA3"}', "peft_type must be one of ADALORA"),
        ("adapter/adapter_model.safetensors", None, "no such file"),
    ],
)
def test_verify_says_what_is_wrong_with_an_output(file, content, message, model, tmp_path):
    initialize(model, "pissa", tmp_path / "out", rank=4)
    path = tmp_path / "out" / file
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "out", model)


def test_spectra_and_suggested_ranks(model):
    spectra = checkpoint.spectra(model)
    assert len(spectra) == 7
    for layer in spectra:
        weight = Checkpoint(model).tensors[f"{layer.name}.weight"].read().astype(np.float64)
        s = np.linalg.svd(weight, compute_uv=False)
        assert np.max(abs(s - layer.singular_values)) <= 1e3 * np.finfo(np.float32).eps * s[0]
        shares = np.cumsum(s**2) / np.sum(s**2)
        for share, rank in ((0.5, layer.rank_50), (0.9, layer.rank_90), (0.99, layer.rank_99)):
            assert shares[rank - 1] >= share - 1e-6
            assert rank == 1 or shares[rank - 2] < share + 1e-6
    ranks = checkpoint.suggest_ranks(spectra, 8)
    price = sum(ranks[s.name] * sum(s.shape) for s in spectra)
    budget = sum(8 * sum(s.shape) for s in spectra)
    assert budget - max(sum(s.shape) for s in spectra) < price <= budget


def test_suggested_ranks_do_not_depend_on_the_size_of_the_weights(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"{k}.weight": rng.standard_normal((20, 30)) for k in "ab"}
    ranks = []
    for size in (1.0, 2.0**600):
        file = tmp_path / "model.safetensors"
        save_file({name: size * weight for name, weight in tensors.items()}, file)
        ranks.append(checkpoint.suggest_ranks(checkpoint.spectra(file), 5))
    assert ranks[0] == ranks[1]


def test_one_file_without_a_directory(model, tmp_path):
    file = shutil.copy(model / "model.safetensors", tmp_path / "weights.safetensors")
    initialize(file, "pissa", tmp_path / "out", rank=4, targets="q_proj")
    assert sorted(p.name for p in (tmp_path / "out" / "base").iterdir()) == ["weights.safetensors"]
    assert verify(tmp_path / "out", file).passed
