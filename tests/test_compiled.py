"""Compiled products against plain ones."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from cases import gaussian
from test_svd import check

import lowrank_sp as lr
from lowrank_sp import _arrays, _threads
from lowrank_sp._compiled import products
from lowrank_sp._compiled.gram import gram
from lowrank_sp.operators import _sources
from lowrank_sp.tensors import modes
from lowrank_sp.testing import assert_adjoint, assert_same_product

LAYOUTS = {
    "contiguous": lambda a: a,
    "rows of a wider array": lambda a: np.concatenate([a, a], axis=1)[:, : a.shape[1]],
    "shifted by one entry": lambda a: np.concatenate([a[:, :1], a], axis=1)[:, 1:],
    "rows backwards": lambda a: a[::-1].copy()[::-1],
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "one row repeated": lambda a: np.broadcast_to(a[0], a.shape),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("shape", [(3, 16), (4, 17), (100, 70), (257, 1003), (1000, 31)])
def test_product(shape, columns, dtype):
    w, p = gaussian(*shape, dtype=dtype), gaussian(shape[1], columns, seed=1, dtype=dtype)
    check_product(w, p)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, order):
    w = LAYOUTS[layout](gaussian(101, 133))
    check_product(w, np.asarray(gaussian(133, 6, seed=1), order=order))


def check_product(w, p):
    before = w.copy(), p.copy()
    y, z = products.normal(w, p)
    eps = np.finfo(w.dtype).eps
    wide = w.astype(np.float64) @ p.astype(np.float64)
    assert (y.dtype, z.dtype) == (w.dtype, w.dtype)
    assert np.linalg.norm(y - wide) <= 10 * eps * np.linalg.norm(w) * np.linalg.norm(p)
    size = np.linalg.norm(w) ** 2 * np.linalg.norm(p)
    assert np.linalg.norm(z - w.T.astype(np.float64) @ wide) <= 10 * eps * size
    assert np.array_equal(products.rmatmul(w, y), z)
    assert np.array_equal(products.matmul(w, p), y)
    for now, then in zip((w, p), before, strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 4, 7, 16])
@pytest.mark.parametrize("shape", [(1, 3, 16), (5, 4, 17), (3, 100, 70)])
def test_product_with_a_stack(shape, rows, dtype):
    x, y = gaussian(*shape, dtype=dtype), gaussian(rows, shape[1], seed=1, dtype=dtype)
    for stack in (x, np.concatenate([x, x], axis=1)[:, : shape[1]]):
        z = products.stacked_product(y, stack)
        size = np.linalg.norm(x) * np.linalg.norm(y)
        wide = y.astype(np.float64) @ x.astype(np.float64)
        assert z.dtype == dtype
        assert np.linalg.norm(z - wide) <= 10 * np.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 4), (5, 5), (300, 8), (5120, 12), (9000, 37)])
def test_gram_matrix(shape, dtype, monkeypatch):
    x = gaussian(*shape, dtype=dtype)
    wide = x.astype(np.float64)
    exact = wide.T @ wide
    for threads in (1, 2, 3):
        monkeypatch.setattr(_threads, "count", lambda n=threads: n)
        tall, broad = gram(x, tall=True), gram(np.ascontiguousarray(x.T), tall=False)
        assert np.array_equal(tall, broad)
        assert np.array_equal(tall, tall.T)
        assert np.linalg.norm(tall - exact) <= 10 * np.finfo(float).eps * np.linalg.norm(wide) ** 2


def test_gram_matrices_of_large_arrays_are_compiled(monkeypatch):
    monkeypatch.setattr(_arrays, "_LARGE", 1)
    x = gaussian(400, 9, dtype=np.float32)
    exact = x.T.astype(np.float64) @ x
    for a in (x, np.asfortranarray(x), torch.asarray(x)):
        assert _arrays._compiled_gram(a) is not None
        assert_same_product(exact, _arrays.to_host(_arrays.inner(a, a)))
        assert _arrays.dtype_name(_arrays.inner(a, a).dtype) == "float64"
    for a in (x[::2], x[:, :7], x.T, x.astype(complex), torch.asarray(x).requires_grad_()):
        assert _arrays._compiled_gram(a) is None


def test_modes_of_large_tensors_are_compiled(monkeypatch):
    monkeypatch.setattr(modes, "_COMPILED_SIZE", 1)
    calls = []
    for name in ("matmul", "stacked_product"):
        original = getattr(products, name)
        spy = partial(lambda original, *a: (calls.append(1), original(*a))[1], original)
        monkeypatch.setattr(products, name, spy)
    x, matrix = gaussian(5, 7, 120), gaussian(6, 120, seed=1)
    for mode, m in ((1, matrix[:, :7]), (2, matrix)):
        found = modes.mode_dot(x, m, mode)
        assert_same_product(np.moveaxis(np.tensordot(m, x, (1, mode)), 0, mode), found)
    assert len(calls) == 2
    for other in (x.astype(complex), x[..., ::2], x[..., :90], x.astype(np.float32)):
        modes.mode_dot(other, matrix[:, :7], 1)
    assert modes.mode_dot(x, matrix[:0, :7], 1).shape == (5, 0, 120)
    assert len(calls) == 2


def test_not_every_array_takes_it(monkeypatch):
    monkeypatch.setattr(_sources, "_FUSED_SIZE", 1)
    a = gaussian(100, 100)
    assert lr.as_operator(a).one_read
    for other in (a.T, a[:, ::2], a.astype(complex), a.astype(">f8"), a[:2], a[:, :4]):
        assert not lr.as_operator(other).one_read


def test_not_finite_values_are_passed_on():
    w, p = gaussian(30, 40), gaussian(40, 3)
    w[7, 39] = np.nan
    y, z = products.normal(w, p)
    assert np.all(np.isnan(y[7]))
    assert np.all(np.isfinite(np.delete(y, 7, axis=0)))
    assert np.all(np.isnan(z))


def test_same_bits_every_run():
    w, p = gaussian(301, 203), gaussian(203, 5)
    first, second = products.normal(w, p), products.normal(w, p)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1500, 400), (400, 1500)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_arrays_take_it(dtype, shape, order, monkeypatch):
    monkeypatch.setattr(_sources, "_FUSED_SIZE", shape[0] * shape[1])
    calls = []
    original = products.normal
    monkeypatch.setattr(products, "normal", lambda *a: (calls.append(1), original(*a))[1])
    a = gaussian(*shape) / np.arange(1, shape[1] + 1)
    a = np.asarray(a.astype(dtype), order=order)
    assert_adjoint(a)
    check(a, lr.truncated_svd(a, 6, rng=0), 6)
    assert calls
    blocks = lr.as_operator(a), lr.as_operator(a).mH
    for operator, dense in zip(blocks, (a, a.T), strict=True):
        for columns in (1, 5, 20):
            x = gaussian(dense.shape[1], columns, dtype=dtype)
            y, z = operator.normal(x)
            assert_same_product(dense @ x, y)
            assert_same_product(dense.T @ (dense @ x), z)
            assert_same_product(dense.T @ y, operator.rmatmul(y))


def test_the_number_of_threads_of_other_libraries_stays():
    """PyTorch takes it from OpenMP, whose number the threads of numba would have changed."""
    program = """
import numba
import numpy as np
from lowrank_sp._compiled import products
products.normal(np.ones((300, 200)), np.ones((200, 4)))
import torch
print(torch.get_num_threads(), numba.get_num_threads())
"""
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["1", "2"]
