"""The command line: what it prints, where, and how it fails."""

import json
import os
import subprocess
import sys

import pytest

from lowrank_sp import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.write_demo_model(folder, hidden=48, layers=1)
    return folder


def lowrank_sp(*arguments, cwd):
    command = [sys.executable, "-c", "from lowrank_sp.cli import main; main()"]
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "80"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_does_the_main_job(tmp_path):
    done = lowrank_sp("demo", "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.mlp.down_proj" in done.stdout
    assert done.stderr.startswith("verified: W = residual + scale * up @ down in 14 layers")
    assert (tmp_path / "demo" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    again = lowrank_sp("demo", "--out", "demo", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr
    assert lowrank_sp("demo", "--out", "demo", "--overwrite", cwd=tmp_path).returncode == 0


def test_init_verify_inspect_speak_json(model, tmp_path):
    spectra = lowrank_sp("inspect", model, "--rank", 4, "--json", "--plot", "s.png", cwd=tmp_path)
    content = json.loads(spectra.stdout)
    assert len(content["layers"]) == len(content["rank_pattern"]) == 7
    assert (tmp_path / "s.png").exists()
    (tmp_path / "patterns.json").write_text(spectra.stdout)
    arguments = ("init", "pissa", model, "--rank", 4, "--out", "out", "--patterns", "patterns.json")
    report = json.loads(lowrank_sp(*arguments, "--json", cwd=tmp_path).stdout)
    assert {r["name"]: r["rank"] for r in report["layers"]} == content["rank_pattern"]
    verdict = lowrank_sp("verify", "out", "--base", model, "--json", cwd=tmp_path)
    assert json.loads(verdict.stdout)["passed"]
    assert verdict.stderr == ""


def test_verify_fails_with_its_exit_status(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.write_demo_model(other, hidden=48, layers=1, seed=1)
    arguments = ("init", "lora", model, "--rank", 2, "--out", "out")
    assert lowrank_sp(*arguments, cwd=tmp_path).returncode == 0
    done = lowrank_sp("verify", "out", "--base", other, cwd=tmp_path)
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
    done = lowrank_sp(*filled, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
