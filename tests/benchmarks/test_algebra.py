"""Resizing and merging the adapters of a 32-layer model of width 4096, 224 pairs of rank 64.

One pair of each shape is timed with each method, and the time of the model is the sum over its
layers, ``model s`` in the extra information. The dense routes of PEFT and kohya's scripts form
``up @ down`` and take a full SVD of it (kohya's, today, ``torch.svd_lowrank`` where both sides
exceed 2048).
"""

import numpy as np
import pytest
import torch

import lowrank_sp as lr
from lowrank_sp.adapters.algebra import merge, resize

RANK, NEW_RANK, ADAPTERS = 64, 32, 3
#: Shape of a weight: how many there are in the model (query, key, value, output | gate, up | down).
SHAPES = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} x {s[1]}")


def pairs(shape, count):
    """Factors whose product has singular values that decay like 1/j, as trained ones do."""
    rng = np.random.default_rng(0)
    decay = 1 / np.arange(1, RANK + 1, dtype=np.float32)
    return [
        (
            rng.standard_normal((shape[0], RANK), dtype=np.float32) * decay,
            rng.standard_normal((RANK, shape[1]), dtype=np.float32) / np.float32(shape[1] ** 0.5),
        )
        for _ in range(count)
    ]


def ours(factors):
    f = resize(lr.LowRank(*factors[0]), rank=NEW_RANK)
    return f.split("left").factors()


def ours_in_torch(factors):
    up, down = map(torch.from_numpy, factors[0])
    return resize(lr.LowRank(up, down), rank=NEW_RANK).split("left").factors()


def dense(total, rank):
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def resize_by_dense_svd(factors):
    up, down = map(torch.from_numpy, factors[0])
    return dense(up @ down, NEW_RANK)


def resize_by_svd_lowrank(factors):
    up, down = map(torch.from_numpy, factors[0])
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(up @ down, q=2 * NEW_RANK, niter=2)
    return u[:, :NEW_RANK] * s[:NEW_RANK], v[:, :NEW_RANK].T


def merge_ours(factors):
    f = merge.svd([lr.LowRank(*pair) for pair in factors], rank=RANK).value
    return f.split("left").factors()


def merge_in_torch(factors):
    updates = [lr.LowRank(*map(torch.from_numpy, pair)) for pair in factors]
    return merge.svd(updates, rank=RANK).value.split("left").factors()


def merge_by_dense_svd(factors):
    total = sum(torch.from_numpy(up) @ torch.from_numpy(down) for up, down in factors)
    return dense(total, RANK)


def excess(answer, factors, rank):
    """Squared error above the optimum, relative to the energy, in double precision."""
    left, right = (np.asarray(x, dtype=np.float64) for x in answer)
    exact = lr.LowRank(
        np.concatenate([up for up, _ in factors], axis=1).astype(np.float64),
        np.concatenate([down for _, down in factors], axis=0).astype(np.float64),
    )
    s = exact.svd().s
    error = (exact - lr.LowRank(left, right)).norm()
    return (error**2 - np.sum(s[rank:] ** 2)) / np.sum(s**2)


def timed(benchmark, method, factors, shape, rank, *, slow):
    answer = benchmark.pedantic(
        method, (factors,), rounds=1 if slow else 10, warmup_rounds=0 if slow else 1
    )
    benchmark.extra_info["accuracy"] = f"{excess(answer, factors, rank):.1e}"
    benchmark.extra_info["layers"] = SHAPES[shape]
    benchmark.extra_info["model s"] = round(SHAPES[shape] * benchmark.stats.stats.median, 2)


@shapes
@pytest.mark.parametrize(
    "method",
    [ours, ours_in_torch, resize_by_svd_lowrank, resize_by_dense_svd],
    ids=["lowrank_sp, NumPy", "lowrank_sp, torch", "torch svd_lowrank (kohya)", "dense SVD"],
)
def test_resize(method, shape, benchmark):
    slow = method is resize_by_dense_svd
    timed(benchmark, method, pairs(shape, 1), shape, NEW_RANK, slow=slow)


@shapes
@pytest.mark.parametrize(
    "method",
    [merge_ours, merge_in_torch, merge_by_dense_svd],
    ids=["lowrank_sp, NumPy", "lowrank_sp, torch", "dense SVD (PEFT)"],
)
def test_merge_svd(method, shape, benchmark):
    slow = method is merge_by_dense_svd
    timed(benchmark, method, pairs(shape, ADAPTERS), shape, RANK, slow=slow)
