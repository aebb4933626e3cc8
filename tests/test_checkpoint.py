"""Checkpoints: what goes in comes out, in any storage, and nothing half-written remains."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
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
    folder.mkdir()
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
    layers = checkpoint.read_adapter(folder / "adapter")
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


def test_verify_notices_one_changed_weight(model, tmp_path):
    initialize(model, "pissa", tmp_path / "out", rank=4)
    base = Checkpoint(tmp_path / "out" / "base")
    tensor = next(t for name, t in sorted(base.tensors.items()) if "q_proj" in name)
    values = tensor.read().copy()
    values[0, 0] += 1e-3 * np.linalg.norm(values)
    tensor.write(values, tensor.path)
    failed = [layer.name for layer in verify(tmp_path / "out", model).layers if not layer.passed]
    assert failed == [tensor.name.removesuffix(".weight")]


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
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
        ("quantized", r"stored quantized \(bitsandbytes\); dequantize"),
        ("no weights", r"no \.safetensors file"),
    ],
)
def test_bad_checkpoints_give_one_clear_error(kind, message, tmp_path):
    source = broken(tmp_path / "model", kind)
    with pytest.raises(CheckpointError, match=message):
        initialize(source, "pissa", tmp_path / "out", rank=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"down_proj: rank must be in 1\.\.96 for shape 96 x 288, got 0"),
        ({"rank": -1}, "got -1"),
        ({"rank": 97}, "got 97"),
        ({"rank": 4, "targets": "nothing"}, "match no linear layer"),
        ({"rank": 4, "targets": "("}, "not a regular expression"),
        ({"rank": 4, "alpha": 0}, "alpha must be positive"),
        ({"rank": 4, "rank_pattern": {"q_proj": 1000}}, "q_proj: rank must be in"),
        ({"rank": 4, "method": "unknown"}, "method must be one of"),
        ({"rank": 5, "method": "orthogonal"}, "rank must be even"),
        ({"rank": 4, "tol": 2.0}, "tol must be in"),
    ],
)
def test_bad_options_give_one_clear_error(options, message, model, tmp_path):
    arguments = {"method": "pissa", "out": tmp_path / "out"} | options
    with pytest.raises(CheckpointError, match=message):
        initialize(model, **arguments)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept_unless_overwritten(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already; pass --overwrite"):
        initialize(model, "lora", out, rank=4)
    with pytest.raises(CheckpointError, match="rank must be"):
        initialize(model, "lora", out, rank=1000, overwrite=True)
    assert (out / "precious.txt").read_text() == "keep"
    initialize(model, "lora", out, rank=4, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_failure_in_the_middle_restores_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")

    def fail():
        with atomic_directory(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert [p.name for p in out.iterdir()] == ["old"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="not a directory"),
        atomic_directory(tmp_path / "file", overwrite=True),
    ):
        pass


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
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    initialize(model, "pissa", out, rank=4)
    assert verify(out, model).passed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", "{", "not a readable report"),
        ("report.json", "{}", "not a readable report"),
        ("adapter/adapter_config.json", "{", "not a readable adapter config"),
        ("adapter/adapter_config.json", '{"peft_type": "IA3"}', "expected a plain LoRA adapter"),
        ("adapter/adapter_model.safetensors", None, "no such file"),
    ],
)
def test_verify_says_what_is_wrong_with_an_output(file, content, message, model, tmp_path):
    initialize(model, "pissa", tmp_path / "out", rank=4)
    if content is None:
        (tmp_path / "out" / file).unlink()
    else:
        (tmp_path / "out" / file).write_text(content)
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


def test_one_file_without_a_directory(model, tmp_path):
    file = shutil.copy(model / "model.safetensors", tmp_path / "weights.safetensors")
    initialize(file, "pissa", tmp_path / "out", rank=4, targets="q_proj")
    assert sorted(p.name for p in (tmp_path / "out" / "base").iterdir()) == ["weights.safetensors"]
    assert verify(tmp_path / "out", file).passed
