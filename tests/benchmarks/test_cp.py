"""CP decompositions: time and error of every method from the same start with the same sweeps.

pyttb and pygenten need an interpreter of their own with both installed, named by the environment
variable ``CP_PEERS``; without it their rows are left out::

    python -m venv peers && peers/bin/pip install pyttb pygenten
    CP_PEERS=peers/bin/python python -m pytest tests/benchmarks/test_cp.py
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorly as tl
from tensorly.decomposition import non_negative_parafac_hals, parafac, randomised_parafac

from lowrank_sp import Stop
from lowrank_sp.tensors import CP, TensorEntries, cp_als, cp_arls, cp_completion, cp_hals

from .conftest import THREADS

SWEEPS = 20
PEERS = os.environ.get("CP_PEERS")
# Gaussian factors of norm 1 with 10 % noise.
PROBLEMS = {
    "200^3, rank 10": ((200, 200, 200), 10),
    "200^3, rank 50": ((200, 200, 200), 50),
    "60^4, rank 10": ((60, 60, 60, 60), 10),
}


class Problem:
    """A noisy tensor, its truth and a common start."""

    def __init__(self, shape, rank, draw, noise=0.1):
        rng = np.random.default_rng(0)
        self.rank, self.truth = rank, CP.of_factors([draw(rng, (n, rank)) for n in shape])
        x, e = self.truth.to_dense(), rng.standard_normal(shape)
        self.x = x + noise * np.linalg.norm(x) / np.linalg.norm(e) * e
        rng = np.random.default_rng(1)
        self.start = CP.of_factors([draw(rng, (n, rank)) for n in shape])
        self.norm = np.linalg.norm(x)

    def tensorly_start(self):
        return np.ones(self.rank), [f.copy() for f in self.start.factors]

    def error(self, weights, factors):
        return np.linalg.norm(self.x - CP(weights, factors).to_dense()) / self.norm

    def distance(self, weights, factors):
        return (CP(weights, factors) - self.truth).norm() / self.norm


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def uniform(rng, shape):
    return rng.random(shape)


@pytest.fixture(scope="module")
def problem(request):
    shape, rank = PROBLEMS[request.param]
    return Problem(shape, rank, gaussian)


class Peer:
    """pyttb or pygenten at work in the other interpreter; its start and its data are not timed."""

    def __init__(self, name, problem, folder):
        self.result = folder / "result.npz"
        factors = {f"factor{k}": f for k, f in enumerate(problem.start.factors)}
        np.savez(folder / "data.npz", x=problem.x, sweeps=SWEEPS, **factors)
        script = Path(__file__).with_name("cp_peer.py")
        self.process = subprocess.Popen(
            [PEERS, script, name, folder / "data.npz"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )

    def ask(self, command):
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()).strip() != "done":
            assert line, "the peer ended"

    def __call__(self):
        self.ask("run")
        return self

    def factors(self):
        self.ask(f"save {self.result}")
        with np.load(self.result) as saved:
            return saved["weights"], [saved[f"factor{k}"] for k in range(len(saved) - 1)]

    def close(self):
        self.process.communicate()


def ours(p, **options):
    stop = Stop(SWEEPS, tol=None)
    return cp_als(p.x, rank=p.rank, init=p.start, stop=stop, **options).value


METHODS = {
    "lowrank_sp cp_als": ours,
    "lowrank_sp cp_als (compress=False)": lambda p: ours(p, compress=False),
    "lowrank_sp cp_als (compress=False, line_search=False)": lambda p: ours(
        p, compress=False, line_search=False
    ),
    "tensorly parafac": lambda p: parafac(
        p.x, p.rank, n_iter_max=SWEEPS, tol=0, init=p.tensorly_start()
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_cp(problem, method, benchmark):
    result = benchmark.pedantic(METHODS[method], (problem,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{problem.error(*result):.6f}"


@pytest.mark.parametrize("name", ["pyttb", "pygenten"] if PEERS else [])
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_cp_of_peers(problem, name, benchmark, tmp_path):
    peer = Peer(name, problem, tmp_path)
    try:
        result = benchmark.pedantic(peer, rounds=3, warmup_rounds=1)
        benchmark.extra_info["accuracy"] = f"{problem.error(*result.factors()):.6f}"
    finally:
        peer.close()


SAMPLED = {
    "lowrank_sp cp_arls (4 epochs)": lambda p: (
        cp_arls(p.x, rank=p.rank, init=p.start, rng=0, stop=Stop(4, tol=None)).value
    ),
    "lowrank_sp cp_als": ours,
    "tensorly randomised_parafac": lambda p: randomised_parafac(
        p.x,
        p.rank,
        n_samples=661,  # as many as cp_arls
        n_iter_max=SWEEPS,
        init=p.tensorly_start(),
        tol=0,
        max_stagnation=0,
        random_state=0,
    ),
}


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("problem", ["200^3, rank 10"], indirect=True, ids=str)
def test_sampled_cp(problem, method, benchmark):
    result = benchmark.pedantic(SAMPLED[method], (problem,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{problem.error(*result):.6f}"


NONNEGATIVE = {
    "lowrank_sp cp_hals": lambda p: (
        cp_hals(p.x, rank=p.rank, init=p.start, stop=Stop(SWEEPS, tol=None)).value
    ),
    "tensorly non_negative_parafac_hals": lambda p: non_negative_parafac_hals(
        p.x, p.rank, n_iter_max=SWEEPS, init=p.tensorly_start(), tol=0
    ),
}


@pytest.mark.parametrize("method", NONNEGATIVE)
def test_nonnegative_cp(method, benchmark):
    problem = Problem((120, 110, 100), 10, uniform)
    result = benchmark.pedantic(NONNEGATIVE[method], (problem,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{problem.error(*result):.6f}"


def completed(p, mask):
    entries = TensorEntries.from_mask(p.x, mask)
    return cp_completion(entries, rank=p.rank, init=p.start, stop=Stop(SWEEPS, tol=None)).value


def imputed(p, mask):
    start = tl.cp_tensor.CPTensor(p.tensorly_start())
    return parafac(p.x * mask, p.rank, n_iter_max=SWEEPS, tol=0, init=start, mask=mask)


@pytest.mark.parametrize("method", [completed, imputed], ids=["lowrank_sp", "tensorly parafac"])
def test_cp_completion(method, benchmark):
    problem = Problem((60, 60, 60), 5, gaussian, noise=0.01)
    mask = np.random.default_rng(2).random(problem.x.shape) < 0.2
    result = benchmark.pedantic(method, (problem, mask), rounds=3, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{problem.distance(*result):.1e} from the truth"
