"""Compiled Gram matrices and products along a mode, beside those of BLAS on as many threads."""

import numpy as np
import pytest

from lowrank_sp._arrays import inner
from lowrank_sp._compiled import gram, products

RNG = np.random.default_rng(0)
ROUNDS = {"rounds": 15, "warmup_rounds": 3}
# Sizes before, of, and after the mode.
MODES = {"middle": (200, 200, 200), "last": (40000, 200, 1)}


@pytest.mark.parametrize("method", ["compiled", "BLAS"])
@pytest.mark.parametrize("mode", MODES)
def test_ten_vectors_along_a_mode(mode, method, benchmark):
    x, u = RNG.standard_normal(MODES[mode]), RNG.standard_normal((10, 200))
    if mode == "middle":
        product = products.stacked_product if method == "compiled" else np.matmul
        found = benchmark.pedantic(product, (u, x), **ROUNDS)
    else:
        product = products.matmul if method == "compiled" else np.matmul
        found = benchmark.pedantic(product, (x[:, :, 0], u.T), **ROUNDS)
    exact = np.matmul(u, x)
    benchmark.extra_info["accuracy"] = f"{np.abs(found.reshape(exact.shape) - exact).max():.0e}"


GRAMS = {
    "200 rows of 40000": (200, 40000, False, np.float64),
    "60 rows of 216000": (60, 216000, False, np.float64),
    "100 columns of 80000": (100, 80000, True, np.float64),
    "100 columns of 80000, float32": (100, 80000, True, np.float32),
    "16 columns of 500000": (16, 500000, True, np.float64),
}


@pytest.mark.parametrize("method", ["compiled", "BLAS"])
@pytest.mark.parametrize("size", GRAMS)
def test_gram(size, method, benchmark, monkeypatch):
    n, length, tall, dtype = GRAMS[size]
    x = RNG.standard_normal((length, n) if tall else (n, length)).astype(dtype)
    if method == "compiled":
        found = benchmark.pedantic(gram.gram, (x,), {"tall": tall}, **ROUNDS)
    else:
        monkeypatch.setattr("lowrank_sp._arrays.has_numba", lambda: False)
        columns = x if tall else x.T
        found = benchmark.pedantic(inner, (columns, columns), **ROUNDS)
    wide = x.astype(float)
    exact = wide.T @ wide if tall else wide @ wide.T
    benchmark.extra_info["accuracy"] = f"{np.abs(found - exact).max() / exact.max():.0e}"
