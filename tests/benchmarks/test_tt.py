"""Tensor trains: decomposition, rounding and cross approximation, time and error."""

import tracemalloc

import numpy as np
import pytest
from tensorly.contrib.decomposition import tensor_train_cross
from tensorly.decomposition import tensor_train

from lowrank_sp import tensors
from lowrank_sp.tensors import TT

# A train of Gaussian cores with 10 % noise.
PROBLEMS = {
    "200^3, rank 10": ((200,) * 3, 10),
    "60^4, rank 10": ((60,) * 4, 10),
}


def train(shape, rank, *, decay=0.0, seed=0):
    """Gaussian cores whose bonds are scaled by ``j^-decay``, of norm 1."""
    rng = np.random.default_rng(seed)
    bonds = [1, *[rank] * (len(shape) - 1), 1]
    cores = [
        rng.standard_normal((bonds[k], n, bonds[k + 1]))
        * (np.arange(1.0, bonds[k] + 1) ** -decay / np.sqrt(n))[:, None, None]
        for k, n in enumerate(shape)
    ]
    t = TT(cores)
    return t * (1 / t.norm())


class Problem:
    """A noisy train."""

    def __init__(self, shape, rank):
        x, e = train(shape, rank).to_dense(), np.random.default_rng(1).standard_normal(shape)
        self.x = x + 0.1 / np.linalg.norm(e) * e
        self.ranks = (1, *[rank] * (len(shape) - 1), 1)

    def error(self, cores):
        return np.linalg.norm(self.x - TT(cores).to_dense()) / np.linalg.norm(self.x)


@pytest.fixture(scope="module")
def problem(request):
    return Problem(*PROBLEMS[request.param])


METHODS = {
    "lowrank_sp tt_svd": lambda p: tensors.tt_svd(p.x, p.ranks),
    "lowrank_sp tt_svd (tol=0.11)": lambda p: tensors.tt_svd(p.x, tol=0.11),
    "tensorly tensor_train": lambda p: tensor_train(p.x, list(p.ranks)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_tt_svd(problem, method, benchmark):
    peer = method.startswith("tensorly")
    result = benchmark.pedantic(
        METHODS[method], (problem,), rounds=1 if peer else 5, warmup_rounds=0 if peer else 1
    )
    benchmark.extra_info["accuracy"] = f"{problem.error(list(result)):.6f}"


@pytest.mark.parametrize("problem", PROBLEMS, indirect=True, ids=str)
def test_tt_memory(problem, benchmark):
    """Most memory beyond the tensor, in units of it."""
    tracemalloc.start()
    benchmark.pedantic(METHODS["lowrank_sp tt_svd"], (problem,), rounds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    benchmark.extra_info["accuracy"] = f"{peak / problem.x.nbytes:.2f} of the tensor"


ROUNDED = {
    "lowrank_sp tt_round": lambda a, b, rank: tensors.tt_round(a + b, rank),
    "lowrank_sp tt_round_randomized": lambda a, b, rank: tensors.tt_round_randomized(
        [a, b], rank, rng=0
    ),
}


@pytest.mark.parametrize("method", ROUNDED)
@pytest.mark.parametrize("rank", [20, 30, 100])
def test_tt_round(rank, method, benchmark):
    """Of a sum of two trains of rank 100 and 8 modes of 30, whose bonds decay like ``j^-2``."""
    a, b = (train((30,) * 8, 100, decay=2.0, seed=seed) for seed in (0, 1))
    t = benchmark.pedantic(ROUNDED[method], (a, b, rank), rounds=3, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{(t - (a + b)).norm() / (a + b).norm():.2e}"


def rational(i):
    return 1.0 / (1.0 + i.sum(axis=1))


SHAPE = (20,) * 5
CROSSED = {
    "lowrank_sp tt_cross": lambda: tensors.tt_cross(rational, SHAPE, rank=12, rng=0).value,
    "tensorly tensor_train_cross (dense tensor given)": lambda: tensor_train_cross(
        rational(np.argwhere(np.ones(SHAPE))).reshape(SHAPE), [1, 8, 8, 8, 8, 1], random_state=0
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CROSSED)
def test_tt_cross(method, benchmark):
    result = benchmark.pedantic(CROSSED[method], rounds=3, warmup_rounds=1)
    x = rational(np.argwhere(np.ones(SHAPE))).reshape(SHAPE)
    error = np.linalg.norm(x - TT(list(result)).to_dense()) / np.linalg.norm(x)
    benchmark.extra_info["accuracy"] = f"{error:.1e}"
