"""Whole processes: the peak memory of ``init`` and the time of ``import lowrank_sp``."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowrank_sp.checkpoint.demo import transformer_like

# Not ru_maxrss, which a child inherits from the process that started it.
PEAK = (
    "import sys\n"
    "{body}\n"
    "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "print(1024 * int(peak.split()[1]), file=sys.stderr)"
)


def peak_bytes(body: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(body=body)], capture_output=True, text=True, check=True
    )
    return int(done.stderr.split()[-1])


@pytest.mark.parametrize("fast", [False, True], ids=["plain install", "with numba"])
@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("pissa", (4096, 11008)),
        ("olora", (4096, 11008)),
        ("lora", (4096, 11008)),
        ("pissa", (2048, 2048)),
        ("milora", (2048, 2048)),
    ],
    ids=str,
)
def test_peak_memory_of_init(method, shape, fast, tmp_path, benchmark):
    rng = np.random.default_rng(0)
    weights = {f"layer.{i}.weight": transformer_like(*shape, rng) for i in range(2)}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    hidden = "sys.modules['numba'] = None"  # as where it is not installed
    body = (
        f"{'' if fast else hidden}\n"
        "from lowrank_sp.checkpoint import initialize\n"
        f"initialize({str(tmp_path / 'model')!r}, {method!r}, {str(tmp_path / 'out')!r},"
        " rank=16, overwrite=True)"
    )
    peak = benchmark.pedantic(peak_bytes, (body,), rounds=1)
    largest = 4 * shape[0] * shape[1]
    above = peak - peak_bytes("pass")
    benchmark.extra_info["accuracy"] = (
        f"{above / 2**20:.0f} MiB above the interpreter; allowed {(3 * largest) / 2**20 + 143:.0f}"
    )


@pytest.mark.parametrize("module", ["numpy", "lowrank_sp"])
def test_import(module, benchmark):
    command = [sys.executable, "-c", f"import {module}"]
    benchmark.pedantic(subprocess.run, (command,), {"check": True}, rounds=15, warmup_rounds=2)
