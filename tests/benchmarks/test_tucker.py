"""Tucker decompositions: time and error of every method at equal ranks and sweeps.

The rows of pyttb need an interpreter with it, named by the environment variable ``CP_PEERS`` as in
``test_cp.py``; without it they are left out.
"""

import os
import subprocess
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from tensorly.decomposition import partial_tucker, tucker

from lowrank_sp import Stop, tensors
from lowrank_sp.tensors import Tucker

from .conftest import THREADS
from .test_cp import PEERS, Peer

SWEEPS = 10
# Orthonormal factors and a Gaussian core with 10 % noise.
PROBLEMS = {
    "200^3, rank 10": ((200, 200, 200), (10, 10, 10)),
    "200^3, rank 50": ((200, 200, 200), (50, 50, 50)),
}


class Problem:
    """A noisy Tucker tensor."""

    def __init__(self, shape, ranks):
        rng = np.random.default_rng(0)
        factors = [
            np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in zip(shape, ranks, strict=True)
        ]
        x = Tucker(rng.standard_normal(ranks), factors).to_dense()
        e = rng.standard_normal(shape)
        self.ranks, self.x = ranks, x + 0.1 * np.linalg.norm(x) / np.linalg.norm(e) * e

    def error(self, core, factors):
        return np.linalg.norm(self.x - Tucker(core, factors).to_dense()) / np.linalg.norm(self.x)


@pytest.fixture(scope="module")
def problem(request):
    return Problem(*PROBLEMS[request.param])


def tensorly_tucker(p):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tucker(p.x, p.ranks, n_iter_max=SWEEPS, tol=0)


METHODS = {
    "lowrank_sp hooi": lambda p: tensors.hooi(p.x, rank=p.ranks, stop=Stop(SWEEPS, tol=None)).value,
    "lowrank_sp st_hosvd": lambda p: tensors.st_hosvd(p.x, p.ranks),
    "lowrank_sp hosvd": lambda p: tensors.hosvd(p.x, p.ranks),
    "tensorly tucker": tensorly_tucker,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_tucker(problem, method, benchmark):
    peer = method.startswith("tensorly")
    result = benchmark.pedantic(
        METHODS[method], (problem,), rounds=1 if peer else 5, warmup_rounds=0 if peer else 1
    )
    benchmark.extra_info["accuracy"] = f"{problem.error(*result):.6f}"


class HosvdPeer(Peer):
    """``pyttb.hosvd`` at work in the other interpreter; its start and its data are not timed."""

    def __init__(self, problem, folder):
        self.result = folder / "result.npz"
        np.savez(folder / "data.npz", x=problem.x, ranks=problem.ranks)
        self.process = subprocess.Popen(
            [PEERS, Path(__file__).with_name("hosvd_peer.py"), folder / "data.npz"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )


@pytest.mark.parametrize("name", ["pyttb"] if PEERS else [])
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_hosvd_of_peers(problem, name, benchmark, tmp_path):  # noqa: ARG001
    peer = HosvdPeer(problem, tmp_path)
    try:
        result = benchmark.pedantic(peer, rounds=5, warmup_rounds=1)
        benchmark.extra_info["accuracy"] = f"{problem.error(*result.factors()):.6f}"
    finally:
        peer.close()


@pytest.mark.parametrize("method", ["lowrank_sp hooi", "lowrank_sp st_hosvd", "lowrank_sp hosvd"])
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_tucker_memory(problem, method, benchmark):
    """Most memory beyond the tensor, in units of it."""
    tracemalloc.start()
    benchmark.pedantic(METHODS[method], (problem,), rounds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    benchmark.extra_info["accuracy"] = f"{peak / problem.x.nbytes:.2f} of the tensor"


SHARED = {
    "lowrank_sp tucker2": lambda x: (
        tensors.tucker2(x, rank=16, stop=Stop(SWEEPS, tol=None)).value.core
    ),
    "tensorly partial_tucker": lambda x: partial_tucker(
        x, (16, 16), modes=[1, 2], n_iter_max=SWEEPS, tol=0
    ),
}


@pytest.mark.parametrize("method", SHARED)
def test_shared_basis(method, benchmark):
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((512, 16)), rng.standard_normal((16, 384))
    stack = u @ rng.standard_normal((24, 16, 16)) @ v + rng.standard_normal((24, 512, 384))
    benchmark.pedantic(SHARED[method], (stack,), rounds=3, warmup_rounds=1)
