"""Work shared among threads, and BLAS that stays out of its way."""

import threading
from functools import partial

import numpy as np
import pytest
from cases import gaussian
from threadpoolctl import threadpool_limits

from lowrank_sp import _threads
from lowrank_sp._threads import blas_on_one_thread, count, gram, matmul, run, shares


def test_every_job_runs_once(monkeypatch):
    monkeypatch.setattr(_threads, "count", lambda: 3)
    done = []
    for number in range(6):
        run([partial(done.append, (number, k)) for k in range(number)])
    assert sorted(done) == [(number, k) for number in range(6) for k in range(number)]


def test_jobs_are_shared(monkeypatch):
    monkeypatch.setattr(_threads, "count", lambda: 2)
    both = threading.Barrier(2, timeout=30)
    run([both.wait, both.wait])


def test_no_more_threads_than_wanted(monkeypatch):
    monkeypatch.setattr(_threads, "count", lambda: 3)
    seen = set()
    meet = threading.Barrier(2)
    jobs = [lambda: (meet.wait(60), seen.add(threading.get_ident())) for _ in range(4)]
    run(jobs, most=2)
    assert len(seen) == 2


def test_an_error_is_raised_when_all_threads_are_done(monkeypatch):
    monkeypatch.setattr(_threads, "count", lambda: 2)
    both, done = threading.Barrier(2, timeout=30), []

    def fail():
        both.wait()
        raise ValueError("no")

    for jobs in ([fail, lambda: (both.wait(), done.append(1))], [lambda: both.wait(), fail]):
        with pytest.raises(ValueError, match="no"):
            run(jobs)
    assert done == [1]


def test_shares_cover_everything(monkeypatch):
    monkeypatch.setattr(_threads, "count", lambda: 3)
    assert shares(8) == [(0, 2), (2, 5), (5, 8)]
    assert shares(2) == [(0, 1), (1, 2)]
    assert shares(0) == [(0, 0)]


def test_as_many_threads_as_blas_has():
    with threadpool_limits(3, user_api="blas"):
        assert count() == 3
        with blas_on_one_thread:
            assert count() == 3
            with threadpool_limits(1, user_api="blas"), blas_on_one_thread:
                assert count() == 3
    with threadpool_limits(1, user_api="blas"), blas_on_one_thread:
        assert count() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, complex])
def test_shared_products(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(_threads, "_SHARED", 1)
    monkeypatch.setattr(_threads, "run", lambda jobs: (calls.append(len(jobs)), run(jobs)))
    pairs = [
        (gaussian(7, 5, dtype=dtype), gaussian(5, 3, dtype=dtype, seed=1)),
        (gaussian(2, 5, dtype=dtype), gaussian(5, 9, dtype=dtype, seed=1)),
        (gaussian(2, 5, dtype=dtype), gaussian(4, 5, 6, dtype=dtype, seed=1)),
        (gaussian(2, 5).astype(dtype), gaussian(5, 9)),
    ]
    with threadpool_limits(2, user_api="blas"):
        for inside in (False, True):
            with blas_on_one_thread if inside else threadpool_limits(2):
                for a, b in pairs:
                    product = matmul(a, b)
                    assert product.dtype == (a @ b).dtype
                    assert np.allclose(product, a @ b, rtol=1e-5)
                    assert np.allclose(gram(a), a.conj().T @ a, rtol=1e-5)
            assert calls == ([2] * 8 if inside else [])
