"""The command line: what it prints, where, and how it fails."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import lowrank_sp as lr
from lowrank_sp import checkpoint
from lowrank_sp.cli import main


def errors(*arguments, monkeypatch, capsys):
    """The one line that a failing command prints, run in this process."""
    monkeypatch.setattr("sys.argv", ["lowrank-sp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.write_demo_model(folder, hidden=48, layers=1)
    return folder


def command(*arguments, cwd):
    program = [sys.executable, "-W", "error", "-c", "from lowrank_sp.cli import main; main()"]
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "80"}
    return subprocess.run(
        [*program, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_does_the_main_job(tmp_path):
    done = command("demo", "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.mlp.down_proj" in done.stdout
    assert "energy: share of ||W||_F^2" in done.stdout
    assert "bound: certified error" in done.stdout
    assert done.stderr.startswith("verified: W = residual + scale * up @ down in 14 layers")
    assert (tmp_path / "demo" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    again = command("demo", "--out", "demo", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr
    assert command("demo", "--out", "demo", "--overwrite", cwd=tmp_path).returncode == 0


def test_init_verify_inspect_speak_json(model, tmp_path):
    spectra = command("inspect", model, "--rank", 4, "--json", "--plot", "s.png", cwd=tmp_path)
    content = json.loads(spectra.stdout)
    assert len(content["layers"]) == len(content["rank_pattern"]) == 7
    assert (tmp_path / "s.png").exists()
    (tmp_path / "patterns.json").write_text(spectra.stdout)
    arguments = ("init", "pissa", model, "--rank", 4, "--out", "out", "--patterns", "patterns.json")
    report = json.loads(command(*arguments, "--json", cwd=tmp_path).stdout)
    assert {r["name"]: r["rank"] for r in report["layers"]} == content["rank_pattern"]
    table = command("inspect", model, cwd=tmp_path).stdout
    assert "effective rank: exponential of the entropy" in table
    verdict = command("verify", "out", "--base", model, "--json", cwd=tmp_path)
    assert json.loads(verdict.stdout)["passed"]
    assert verdict.stderr == ""


def test_verify_fails_with_its_exit_status(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.write_demo_model(other, hidden=48, layers=1, seed=1)
    arguments = ("init", "lora", model, "--rank", 2, "--out", "out")
    assert command(*arguments, cwd=tmp_path).returncode == 0
    done = command("verify", "out", "--base", other, cwd=tmp_path)
    assert done.returncode == 1
    assert "not the one that was initialized" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "pissa", "missing", "--rank", 4, "--out", "out"), "no such file or directory"),
        (("init", "pissa", "{model}", "--rank", 0, "--out", "out"), "rank must be in 1..48"),
        (("init", "pissa", "{model}", "--rank", 4, "--out", "."), "exists already"),
        (
            ("init", "pissa", "{model}", "--rank", 4, "--out", "out", "--targets", "x"),
            "match no linear layer",
        ),
        (
            ("init", "pissa", "{model}", "--rank", 4, "--out", "out", "--patterns", "none.json"),
            "none.json",
        ),
        (("verify", "missing", "--base", "{model}"), "missing/report.json: not a readable report"),
        (("inspect", "missing"), "no such file or directory"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, model, tmp_path):
    filled = [str(a).format(model=model) for a in arguments]
    done = command(*filled, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("[]", "patterns.json: not a readable JSON object"),
        ("{", "patterns.json: not a readable JSON object"),
        ('{"ranks": {"q_proj": 8}}', "patterns.json: keys must be rank_pattern and alpha_pattern"),
        ('{"rank_pattern": {"q_proj": "8"}}', "rank_pattern of 'q_proj' must be a number"),
        ('{"rank_pattern": {"qproj": 8}}', "rank_pattern 'qproj': must match the end"),
        ('{"alpha_pattern": 5}', "alpha_pattern must map"),
    ],
)
def test_bad_patterns_are_one_line(patterns, message, model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "patterns.json"
    file.write_text(patterns)
    arguments = ("init", "lora", model, "--rank", 4, "--out", tmp_path / "out", "--patterns", file)
    assert message in errors(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", -1), "seed must be a non-negative integer"),
        (("--alpha", "inf"), "alpha must be positive"),
        (("--alpha", "1e300"), "alpha / rank in 1e-07..1e+07"),
        (("--tol", 0.1), "tol is for pissa only"),
    ],
)
def test_bad_numbers_are_one_line(options, message, model, tmp_path, monkeypatch, capsys):
    arguments = ("init", "milora", model, "--rank", 4, "--out", tmp_path / "out", *options)
    assert message in errors(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.xyz", "x", "none/x.png"])
def test_figures_that_cannot_be_saved_are_refused_first(name, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "spectra", None)
    arguments = ("inspect", model, "--plot", tmp_path / name)
    assert name in errors(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_zero_matrices_are_inspected_and_drawn_quietly(tmp_path):
    save_file({"a.weight": np.zeros((4, 6), np.float32)}, tmp_path / "a.safetensors")
    done = command("inspect", "a.safetensors", "--plot", "a.pdf", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.pdf").exists()


def test_version(tmp_path):
    assert command("--version", cwd=tmp_path).stdout == f"lowrank-sp {lr.__version__}\n"


def test_changed_tensors_are_named(model, tmp_path):
    command("init", "pissa", model, "--rank", 2, "--out", "out", cwd=tmp_path)
    tensor = checkpoint.Checkpoint(tmp_path / "out" / "base").tensors["model.norm.weight"]
    tensor.write(np.zeros(48, np.float32), tensor.path)
    done = command("verify", "out", "--base", model, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 tensors without an adapter were changed, first model.norm.weight" in done.stdout
