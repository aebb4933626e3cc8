"""The command line: what it prints, where, and how it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import lowrank_sp as lr
from lowrank_sp import checkpoint
from lowrank_sp.adapters import CALIBRATED, INITIALIZERS, statistics
from lowrank_sp.adapters.compensate import COMPENSATIONS
from lowrank_sp.adapters.forms import Product
from lowrank_sp.cli import _printing, app, main


def errors(*arguments, monkeypatch, capsys, status=1):
    """The one line that a failing command prints, run in this process."""
    monkeypatch.setattr("sys.argv", ["lowrank-sp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == status
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
    assert "energy: share of ||W||_F^2 that these have" in done.stdout
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
    table = command("inspect", model, "--leading", 20, cwd=tmp_path).stdout
    assert "effective rank: exponential of the entropy" in table
    assert len(max(table.splitlines(), key=len)) > 160  # nothing is cut
    assert "\N{HORIZONTAL ELLIPSIS}" not in table
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
        (("init", "pissa", "{model}", "--rank", 4, "--out", "."), "exists already"),
        (
            ("init", "pissa", "{model}", "--rank", 4, "--out", "out", "--targets", "x"),
            "match no linear layer",
        ),
        (
            ("init", "pissa", "{model}", "--rank", 4, "--out", "out", "--patterns", "none.json"),
            "none.json",
        ),
        (("verify", "missing", "--base", "{model}"), "there is no such report"),
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
        (("--targets", "("), "not a regular expression"),
        (("--calibration", "c.safetensors"), "a calibration is for eva, weighted"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    options, message, model, tmp_path, monkeypatch, capsys
):
    arguments = ("init", "milora", model, "--rank", 4, "--out", tmp_path / "out", *options)
    assert message in errors(*arguments, monkeypatch=monkeypatch, capsys=capsys, status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "status"), [("x.xyz", 2), ("x", 2), ("none/x.png", 1)])
def test_figures_that_cannot_be_saved_are_refused_first(
    name, status, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "spectra", None)
    arguments = ("inspect", model, "--plot", tmp_path / name)
    assert name in errors(*arguments, monkeypatch=monkeypatch, capsys=capsys, status=status)
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


# Jobs on adapters


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model of the same shape."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint.write_demo_model(folder, hidden=48, layers=1, seed=1)
    return folder


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two adapters of one base and one shape; both in directories called ``adapter``."""
    folder, name = tmp_path_factory.mktemp("adapters"), "model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(0)
    for who in ("ann", "bob"):
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((48, 3), (3, 48)))
        (folder / who / "adapter").mkdir(parents=True)
        adapter = checkpoint.Adapter({name: Product(up, down, 0.5)}, str(model))
        checkpoint.write_adapter(folder / who / "adapter", adapter)
    return [folder / who / "adapter" for who in ("ann", "bob")]


@pytest.fixture(scope="module")
def moments(model, tmp_path_factory):
    """Second moments of all layers, of enough samples for each."""
    arrays = {}
    for k, layer in enumerate(checkpoint.Checkpoint(model).layers()):
        x = np.random.default_rng(k).standard_normal((400, layer.shape[1]))
        arrays |= statistics.pack({layer.name: statistics.SecondMoment.of(x)})
    file = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    save_file(arrays, file)
    return file


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The model with other weights in one layer, and another norm."""
    folder = tmp_path_factory.mktemp("tuned")
    checkpoint.write_demo_model(folder, hidden=48, layers=1)
    for name in ("model.layers.0.self_attn.q_proj", "model.norm"):
        tensor = checkpoint.Checkpoint(folder).tensors[f"{name}.weight"]
        tensor.write(tensor.read() * np.float32(1.5), tensor.path)
    return folder


def run(*arguments, monkeypatch, capsys):
    """Exit status and what is printed, in this process."""
    monkeypatch.setattr("sys.argv", ["lowrank-sp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


NAMED = {"ann": 0, "bob": 1}
JOBS = {
    "extract": (
        ("extract", "{tuned}", "{model}", "--rank", 3, "--tol", 1e-4, "--seed", 1),
        lambda c, out: checkpoint.extract(c["tuned"], c["model"], out, rank=3, tol=1e-4, seed=1),
    ),
    "resize": (
        ("resize", "{ann}", "--rule", "sv_ratio", "--threshold", 1.1, "--rank", 2),
        lambda c, out: checkpoint.resize(c["ann"], out, rank=2, rule="sv_ratio", threshold=1.1),
    ),
    "merge": (
        ("merge", "dare", "{ann}", "{bob}", "--density", 0.5, "--rank", 2, "--weights", "1,-0.5"),
        lambda c, out: checkpoint.merge(
            {k: c[k] for k in NAMED}, out, method="dare", density=0.5, rank=2, weights=[1, -0.5]
        ),
    ),
    "convert": (
        ("convert", "{ann}", "--to", "kohya", "--prefix", "lora_te", "--tol", 0.5),
        lambda c, out: checkpoint.convert(c["ann"], out, to="kohya", prefix="lora_te", tol=0.5),
    ),
    "share": (
        ("share", "clustered", "a={ann}", "b={bob}", "--rank", 2, "--clusters", 2, "--steps", 9),
        lambda c, out: checkpoint.share(
            {"a": c["ann"], "b": c["bob"]},
            out,
            method="clustered",
            rank=2,
            clusters=2,
            stop=lr.Stop(max_iter=9),
        ),
    ),
    "federate": (
        ("federate", "fedex", "{ann}", "{bob}", "--weights", "0.25,0.75", "--base", "{model}"),
        lambda c, out: checkpoint.federate(
            {k: c[k] for k in NAMED}, out, method="fedex", weights=[0.25, 0.75], base=c["model"]
        ),
    ),
    "quantize": (
        (
            *("quantize", "{model}", "--to", "int", "--bits", 3, "--compensate", "qera"),
            *("--rank", 2, "--calibration", "{moments}", "--targets", "q_proj"),
        ),
        lambda c, out: checkpoint.quantize(
            c["model"],
            out,
            to="int",
            bits=3,
            compensate="qera",
            rank=2,
            calibration=c["moments"],
            targets="q_proj",
        ),
    ),
    "init": (
        ("init", "weighted", "{model}", "--rank", 2, "--calibration", "{moments}"),
        lambda c, out: checkpoint.initialize(
            c["model"], "weighted", out, rank=2, calibration=c["moments"]
        ),
    ),
    "compress": (
        ("compress", "{model}", "--keep", 0.5, "--calibration", "{moments}"),
        lambda c, out: checkpoint.compress(
            c["model"], out, checkpoint.SecondMoments(c["moments"]), keep=0.5
        ),
    ),
}


def files(folder):
    """Tensors and configurations below a directory, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(folder))] = {
                k: v.tobytes() for k, v in load_file(path).items()
            }
    return found


def without_seconds(content):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in content.get("layers", [])]


@pytest.mark.parametrize("name", JOBS)
def test_a_command_is_one_function(
    name, model, tuned, adapters, moments, tmp_path, monkeypatch, capsys
):
    arguments, function = JOBS[name]
    places = {"model": model, "tuned": tuned, "moments": moments}
    places |= dict(zip(NAMED, adapters, strict=True))
    filled = [str(a).format(**places) for a in arguments]
    out = tmp_path / "out"
    code, printed, err = run(
        *filled, "--out", out, "--jobs", 2, "--json", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    with threadpool_limits(1):
        report = function(places, tmp_path / "same")
    content = json.loads(printed)
    expected = json.loads(json.dumps(asdict(report)))
    assert content.keys() == expected.keys()
    assert without_seconds(content) == without_seconds(expected)
    assert files(out) == files(tmp_path / "same")
    if name == "extract":
        lines = err.splitlines()
        assert "6 unchanged layers: model.layers.0.mlp.down_proj, " in lines[0]
        assert lines[0].endswith(", ...")
        assert lines[1] == "1 changed tensors that are no target: model.norm.weight"
    # A table, and the guard of what is there.
    code, table, _ = run(
        *filled, "--out", out, "--overwrite", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert "q_proj" in table
    assert "--overwrite" in errors(*filled, "--out", out, monkeypatch=monkeypatch, capsys=capsys)


def test_check_says_what_engines_refuse(adapters, monkeypatch, capsys):
    arguments = ("check", adapters[0], "--engine")
    code, out, _ = run(*arguments, "peft", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out.strip()) == (0, "nothing wrong")
    odd = ("vllm", "--max-lora-rank", 1, "--json")
    code, out, _ = run(*arguments, *odd, monkeypatch=monkeypatch, capsys=capsys)
    findings = json.loads(out)["findings"]
    assert code == 1
    assert any(f["severity"] == "error" and "rank" in f["message"] for f in findings)
    only = ("peft", "--max-lora-rank", 8)
    line = errors(*arguments, *only, monkeypatch=monkeypatch, capsys=capsys, status=2)
    assert "max_lora_rank is for vllm only, got 8 for peft" in line
    line = errors(*arguments, "vlm", monkeypatch=monkeypatch, capsys=capsys, status=2)
    assert "engine must be one of peft, vllm, got 'vlm'; did you mean vllm?" in line


HELP = {
    "init": [*INITIALIZERS, *CALIBRATED, "--calibration"],
    "extract": ["--rank", "--tol", "--targets"],
    "resize": [*checkpoint.RANK_RULES, "--rank", "--tol", "--threshold"],
    "merge": [
        *checkpoint.MERGES,
        "--weights",
        "--density",
        "--rank",
        "--tol",
        "--assume-same-base",
    ],
    "convert": ["--start", "--base", "--to", "--prefix", "--rank", "--tol"],
    "check": ["--engine", "--base", "--max-lora-rank"],
    "share": [*checkpoint.SHARINGS, "--clusters", "--steps", "--assume-same-base"],
    "federate": [*checkpoint.AGGREGATES, "--weights", "--frozen", "--base", "--assume-same-base"],
    "quantize": [*checkpoint.FORMATS, *COMPENSATIONS, "--bits", "--block", "--rank"],
    "compress": ["--keep", "--calibration"],
    "verify": ["--base"],
    "inspect": ["--plot", "--leading"],
    "demo": ["--rank"],
}
READS_ONLY = {"check", "verify", "inspect"}


def test_help_lists_everything():
    def page(*arguments):
        done = CliRunner().invoke(
            app, [*arguments, "--help"], env={"COLUMNS": "400", "TERM": "dumb"}
        )
        assert done.exit_code == 0
        return done.output

    assert {
        re.split(r"\s+", line)[1] for line in page().splitlines() if "│ " in line
    } >= HELP.keys()
    assert len(app.registered_commands) == len(HELP)
    for name, words in HELP.items():
        shared = ["--json"] if name in READS_ONLY else ["--json", "--out", "--overwrite"]
        own = page(name)
        for word in (*words, *shared):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", own), (name, word)


@pytest.mark.parametrize(
    ("arguments", "closest"),
    [
        (("init", "pisa", "{model}", "--rank", 2), "pissa"),
        (("init", "PiSSA", "{model}", "--rank", 2), "pissa"),
        (("federate", "LoRA-FAIR", "{ann}"), "lora_fair"),
        (("merge", "tie", "{ann}"), "ties"),
        (("share", "cluster", "{ann}", "--rank", 2), "clustered"),
        (("federate", "flexlor", "{ann}"), "flexlora"),
        (("federate", "fedavg", "{ann}"), "fedit"),
        (("resize", "{ann}", "--rule", "sv_ration", "--threshold", 2), "sv_ratio"),
        (("quantize", "{model}", "--to", "nf3"), "nf4"),
        (("quantize", "{model}", "--compensate", "lqlora", "--rank", 2), "lq_lora"),
    ],
)
def test_the_closest_name_is_given(
    arguments, closest, model, adapters, tmp_path, monkeypatch, capsys
):
    filled = [str(a).format(model=model, ann=adapters[0]) for a in arguments]
    filled += ["--out", tmp_path / "out"]
    line = errors(*filled, monkeypatch=monkeypatch, capsys=capsys, status=2)
    assert line.endswith(f"did you mean {closest}?\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("merge", "cat", "{ann}", "{ann}"), "both called 'ann'; name them, as in ann1=", 2),
        (("merge", "cat", "{ann}", "{bob}", "--weights", "1;2"), "must be numbers between", 2),
        (("merge", "cat", "{ann}", "{bob}", "--weights", "1"), "each adapter, got 1 for 2", 2),
        (("merge", "cat", "{ann}", "--weights", "1", "0.5"), "such as --weights 0.5,0.5", 2),
        (("merge", "cat", "{ann}", "none"), "none/adapter_config.json", 1),
        (("resize", "{ann}"), "pass --rank, --tol or --rule", 2),
        (
            ("resize", "{ann}", "--rule", "sv_fro", "--threshold", "90"),
            "threshold of sv_fro: share must be in (0, 1], got 90.0",
            2,
        ),
        (
            ("resize", "{ann}", "--rule", "sv_ratio", "--threshold", "0.5"),
            "threshold of sv_ratio: ratio must be finite and above 1, got 0.5",
            2,
        ),
        (("convert", "{ann}", "--to", "kohya"), "pass --prefix: lora_unet, lora_te", 2),
        (("convert", "a.safetensors"), "pass --prefix: lora_unet, lora_te", 2),
        (("convert", "{ann}", "--prefix", "lora_te"), "leave out --prefix, or pass --to kohya", 2),
        (("convert", "{ann}", "--base", "{other}"), "whose tensors are not those of", 1),
        (("federate", "fedit", "{ann}", "--base", "{model}"), "base is for flora and fedex", 2),
        (("federate", "flexlora", "{ann}", "--base", "{model}"), "base is for flora and fedex", 2),
        (("federate", "fedex", "{ann}", "--base", "{other}"), "whose tensors are not those of", 1),
        (("federate", "fedit", "{ann}", "--weights", "2"), "weights must sum to 1, got 2", 2),
        (("init", "pissa", "{model}", "--rank", "2", "--tol", "2"), "tol must be in (0, 1)", 2),
        (("federate", "rolora", "{ann}", "--frozen", "b"), "frozen must be one of up, down", 2),
        (
            ("compress", "{model}", "--keep", "0.5", "--calibration", "nowhere"),
            "nowhere: no such file\n",
            1,
        ),
        (("compress", "{model}", "--keep", "50", "--calibration", "{moments}"), "keep must be", 2),
        (("quantize", "{model}", "--rank", "4"), "pass --compensate and --rank, or neither", 2),
        (("extract", "{model}", "{model}"), "pass --rank or --tol", 2),
        (
            ("init", "pissa", "{model}", "--rank", "2", "--targets", "q_proj,v_proj"),
            "in a regular expression, | means or: q_proj|v_proj\n",
            1,
        ),
        (
            ("init", "pissa", "{model}", "--rank", "2", "--targets", "q_prj"),
            "match no linear layer; the nearest names are q_proj",
            1,
        ),
        (
            ("extract", "{ann}", "{model}", "--rank", "2"),
            "an adapter, not a model; pass a model's directory\n",
            1,
        ),
        (("init", "pissa", "{model}", "--rank", "49"), "rank must be in 1..48 for shape", 1),
    ],
)
def test_errors_name_the_remedy_and_leave_nothing(
    arguments, message, status, model, other, adapters, moments, tmp_path, monkeypatch, capsys
):
    places = {"ann": adapters[0], "bob": adapters[1], "model": model, "other": other}
    filled = [a.format(**places, moments=moments) for a in arguments]
    monkeypatch.chdir(tmp_path)
    line = errors(*filled, "--out", "out", monkeypatch=monkeypatch, capsys=capsys, status=status)
    assert message in line
    assert not list(tmp_path.iterdir())


def test_clients_of_different_ranks_are_named(adapters, tmp_path, monkeypatch, capsys):
    checkpoint.resize(adapters[1], tmp_path / "bob", rank=1)
    clients = (f"ann={adapters[0]}", f"bob={tmp_path / 'bob' / 'adapter'}")
    arguments = (*clients, "--out", tmp_path / "out")
    line = errors("federate", "fedex", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "must have one rank, got 3 and, of client bob, 1; flexlora, flora, flora_na take" in line
    for method in ("flexlora", "flora", "flora_na"):
        out = ("--out", tmp_path / method)
        code, _, _ = run("federate", method, *clients, *out, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0


def test_verify_says_what_it_verifies(adapters, model, tmp_path, monkeypatch, capsys):
    checkpoint.resize(adapters[0], tmp_path / "small", rank=1)
    arguments = ("verify", tmp_path / "small", "--base", model)
    line = errors(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert line.endswith("the report of 'resize'; only what init wrote can be verified\n")


@pytest.mark.parametrize(
    "words",
    [
        ("init", "pissa", "{model}", "--rnak", "4"),
        ("init", "pissa", "{model}", "--rank", "four"),
        ("init", "pissa", "{model}", "--rank", "0"),
        ("init", "pissa", "{model}"),
        ("init", "pissa", "--rank", "4"),
        ("merge", "svd", "{ann}", "--rank", "-1"),
        ("share", "clustered", "{ann}", "--rank", "2", "--clusters", "0"),
        ("quantize", "{model}", "--to", "int", "--bits", "9"),
        ("quantize", "{model}", "--block", "0"),
        ("federate", "fedex", "{ann}", "--rank", "0"),
        ("int", "{model}"),
    ],
)
def test_options_that_are_not_understood_are_status_2(words, model, adapters, tmp_path):
    filled = [word.format(model=model, ann=adapters[0]) for word in words]
    done = CliRunner().invoke(app, [*filled, "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("-h",), ("--help",), ("merge", "-h")])
def test_the_module_is_the_command_and_helps(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "lowrank_sp", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout


def test_every_job_says_what_its_numbers_are():
    jobs = set(HELP) - READS_ONLY - {"init", "demo"}
    assert set(_printing._MEANINGS) == jobs
