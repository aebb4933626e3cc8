"""SVD of a rank-64 product at 5120 x 5120: from the factors, and by way of the dense matrix."""

import numpy as np
import pytest
import torch

import lowrank_sp as lr


@pytest.fixture(scope="module")
def factors():
    rng = np.random.default_rng(0)
    left = rng.standard_normal((5120, 64), dtype=np.float32)
    return left, rng.standard_normal((64, 5120), dtype=np.float32)


def ours(left, right):
    return lr.LowRank(left, right).svd().s


def dense(left, right):
    delta = torch.from_numpy(left) @ torch.from_numpy(right)
    return torch.linalg.svd(delta, full_matrices=False)[1].numpy()[:64]


@pytest.mark.parametrize(
    ("method", "rounds"),
    [(ours, 20), (dense, 1)],
    ids=["lowrank_sp LowRank.svd", "torch dense SVD"],
)
def test_svd_of_a_product(factors, method, rounds, benchmark):
    s = benchmark.pedantic(method, factors, rounds=rounds, warmup_rounds=rounds > 1)
    left, right = (f.astype(np.float64) for f in factors)
    exact = np.linalg.svd(np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T, compute_uv=False)
    benchmark.extra_info["accuracy"] = f"{np.max(abs(s - exact) / exact):.1e}"
