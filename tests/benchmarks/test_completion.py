"""Completion: alternating least squares against cmfrec, and its memory.

``pip install cmfrec`` for the peer. Every row reaches the same error on unseen entries.
"""

import os

import numpy as np
import pytest
import scipy.sparse

import lowrank_sp as lr
from lowrank_sp.inverse import completion, synthetic

from .test_process import peak_bytes

SHAPE, RANK, ERROR = (20_000, 10_000), 10, 1e-6
THREADS = int(os.environ.get("BENCHMARK_THREADS", "2"))


@pytest.fixture(scope="module")
def problem():
    """Two million entries of a noiseless matrix."""
    return synthetic.completion(shape=SHAPE, rank=RANK, oversampling=6.67, rng=1)


def ours(problem, steps):
    stop = lr.Stop(max_iter=steps, tol=0.0)
    # Far above the information limit the problem needs no continuation.
    solution = completion.als(problem.entries, rank=RANK, rng=0, stop=stop, continuation=0.0)
    return solution.value.factors()


def scaled_asd(problem, steps):
    stop = lr.Stop(max_iter=steps, tol=0.0)
    return completion.scaled_asd(problem.entries, rank=RANK, rng=0, stop=stop).value.factors()


def cmfrec(problem, steps, use_cg):
    from cmfrec import CMF

    e = problem.entries
    model = CMF(
        k=RANK,
        lambda_=1e-8,
        use_cg=use_cg,
        finalize_chol=False,
        user_bias=False,
        item_bias=False,
        center=False,
        niter=steps,
        nthreads=THREADS,
        verbose=False,
        random_state=1,
        precompute_for_predictions=False,
    )
    model.fit(scipy.sparse.coo_matrix((e.values, (e.rows, e.cols)), shape=e.shape))
    return model.A_, model.B_.T


def unseen_error(problem, left, right):
    """Relative error on positions drawn at random, of which 1 % were observed."""
    rng = np.random.default_rng(5)
    i, j = (rng.integers(size, size=200_000) for size in SHAPE)
    u, v = problem.truth.factors()
    truth = np.sum(u[i] * v.T[j], axis=1)
    return np.linalg.norm(np.sum(left[i] * right.T[j], axis=1) - truth) / np.linalg.norm(truth)


#: Sweeps that take each method below the error.
METHODS = {
    "lowrank_sp als": (ours, 10),
    "lowrank_sp scaled_asd": (scaled_asd, 48),
    "cmfrec, Cholesky": (lambda p, steps: cmfrec(p, steps, False), 16),
    "cmfrec, conjugate gradients": (lambda p, steps: cmfrec(p, steps, True), 16),
}


@pytest.mark.parametrize("name", METHODS)
def test_completion(name, problem, benchmark):
    method, steps = METHODS[name]
    left, right = benchmark.pedantic(method, (problem, steps), rounds=3, warmup_rounds=1)
    error = unseen_error(problem, left, right)
    benchmark.extra_info["accuracy"] = f"{error:.1e} after {steps} sweeps"
    assert error <= ERROR


def test_peak_memory(tmp_path, benchmark):
    """Ten million entries of a 200000 x 50000 matrix, from arrays on disk to the answer."""
    p = synthetic.completion(shape=(200_000, 50_000), rank=10, oversampling=4.0, rng=0)
    for name in ("rows", "cols", "values"):
        np.save(tmp_path / f"{name}.npy", getattr(p.entries, name))
    load = (
        "import numpy as np\n"
        "from lowrank_sp import Stop\n"
        "from lowrank_sp.inverse import Entries, completion\n"
        f"rows, cols, values = (np.load({str(tmp_path)!r} + f'/{{name}}.npy')"
        " for name in ('rows', 'cols', 'values'))\n"
    )
    warm = (
        "small = Entries([0, 0, 1, 1], [0, 1, 0, 1], np.ones(4), (2, 2))\n"
        "completion.als(small, rank=1, stop=Stop(max_iter=1))\n"
    )
    solve = (
        "entries = Entries(rows, cols, values, (200_000, 50_000))\n"
        "del rows, cols, values\n"
        "completion.als(entries, rank=10, stop=Stop(max_iter=3))"
    )
    peak = benchmark.pedantic(peak_bytes, (load + warm + solve,), rounds=1)
    above = peak - peak_bytes(load.replace("np.load", "np.size") + warm)
    own = sum(getattr(p.entries, name).nbytes for name in ("rows", "cols", "values"))
    benchmark.extra_info["accuracy"] = f"peak {above / own:.1f} times the entries' own memory"
    assert above <= 6 * own
