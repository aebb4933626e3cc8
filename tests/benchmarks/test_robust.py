"""Robust PCA against rpca, 2000 x 2000, rank 10, 20 % outliers.

``pip install rpca`` for the peer. It subtracts the mean of every column first, which would spoil
the outliers; so the rows come in pairs of opposite sign. Every row of the table reaches the same
error of the low-rank part.
"""

import contextlib
import io

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp.inverse import robust, synthetic

SIZE, RANK, ERROR = 2000, 10, 1e-6


@pytest.fixture(scope="module")
def problem():
    """Data, and their low-rank part."""
    shape = (SIZE // 2, SIZE)
    p = synthetic.robust(shape=shape, rank=RANK, outliers=0.2, amplitude=1.0, rng=0)
    truth = p.truth.to_dense()
    return np.concatenate([p.data, -p.data]), np.concatenate([truth, -truth])


def projections(data):
    stop = lr.Stop(tol=3e-4)
    found = robust.alternating_projections(data, rank=RANK, rng=0, decay=0.5, stop=stop)
    return found.value.low_rank.to_dense()


def default(data):
    stop = lr.Stop(tol=1e-4)
    found = robust.alternating_projections(data, rank=RANK, rng=0, stop=stop)
    return found.value.low_rank.to_dense()


def descent(data):
    stop = lr.Stop(tol=1e-6)
    found = robust.scaled_gd(data, rank=RANK, rng=0, decay=0.8, stop=stop)
    return found.value.low_rank.to_dense()


def pursuit(data):
    stop = lr.Stop(tol=1e-6)
    return robust.principal_component_pursuit(data, rng=0, stop=stop).value.low_rank.to_dense()


def rpca(data):
    from rpca import RobustPCA

    model = RobustPCA(n_components=RANK, tol=1e-6, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        return model.fit(data).low_rank_


@pytest.mark.parametrize(
    "method",
    [projections, default, descent, pursuit, rpca],
    ids=[
        "lowrank_sp alternating_projections, decay 0.5",
        "lowrank_sp alternating_projections",
        "lowrank_sp scaled_gd",
        "lowrank_sp principal_component_pursuit",
        "rpca",
    ],
)
def test_robust_pca(problem, method, benchmark):
    data, truth = problem
    found = benchmark.pedantic(method, (data,), rounds=3, warmup_rounds=1)
    error = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    benchmark.extra_info["accuracy"] = f"{error:.0e}"
    assert error <= ERROR
