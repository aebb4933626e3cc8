"""Rank-16 truncated SVD of one matrix: time and per-vector error of every method."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd

import lowrank_sp as lr

from .conftest import MATRICES

RANK = 16


def svds_with(solver):
    def solve(a):
        u, s, _ = svds(a, k=RANK, tol=1e-2, solver=solver, rng=np.random.default_rng(0))
        return u[:, np.argsort(-s)]

    return solve


METHODS = {
    "lowrank_sp truncated_svd (tol=2e-2)": lambda a: lr.truncated_svd(a, RANK, tol=2e-2, rng=0).u,
    "lowrank_sp truncated_svd (default)": lambda a: lr.truncated_svd(a, RANK, rng=0).u,
    "torch svd_lowrank (q=16, niter=16)": lambda a: torch.svd_lowrank(
        torch.from_numpy(a if a.flags.writeable else a.copy()), q=RANK, niter=16
    )[0].numpy(),
    "scipy svds arpack (tol=1e-2)": svds_with("arpack"),
    "scipy svds propack (tol=1e-2)": svds_with("propack"),
    "sklearn randomized_svd (n_iter=16)": lambda a: randomized_svd(
        a, RANK, n_iter=16, random_state=0
    )[0],
    "sklearn randomized_svd (auto)": lambda a: randomized_svd(a, RANK, random_state=0)[0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", MATRICES, indirect=True, ids=str)
def test_truncated_svd(problem, method, benchmark):
    torch.manual_seed(0)
    u = benchmark.pedantic(METHODS[method], (problem.a,), rounds=7, warmup_rounds=1)
    benchmark.extra_info["accuracy"] = f"{problem.per_vector_error(u):.1e}"
