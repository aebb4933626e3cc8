"""``orthonormalize`` on blocks of every condition."""

import numpy as np
import pytest
from cases import gaussian, orthonormal, with_spectrum

import lowrank_sp as lr

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def check(x, q, r, *, lost=0.0):
    """``q`` is orthonormal and ``q r = x``, save for directions shorter than ``lost``."""
    eps = np.finfo(x.dtype).eps
    assert (
        abs(q.conj().T @ q - np.eye(q.shape[1])).max(initial=0.0) <= (8 + x.shape[0] ** 0.5) * eps
    )
    size = np.linalg.norm(x, 2) if x.size else 0.0
    assert np.linalg.norm(x - q @ r) <= 100 * eps * size + lost * x.shape[1] ** 0.5
    assert q.dtype == r.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", range(0, 15, 2))
def test_conditions(power, dtype):
    x = with_spectrum(np.geomspace(1, 10.0**-power, 12), 300, 12, complex_=True)
    x = (x if np.issubdtype(dtype, np.complexfloating) else x.real).astype(dtype)
    q, r = lr.orthonormalize(x)
    check(x, q, r)
    resolved = np.linalg.svd(x, compute_uv=False)
    assert q.shape[1] >= np.sum(resolved > 30 * np.finfo(dtype).eps * resolved[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_null_space_is_dropped(rank, dtype):
    x = gaussian(200, rank, dtype=dtype) @ gaussian(rank, 10, seed=1, dtype=dtype)
    q, r = lr.orthonormalize(x)
    assert q.shape == (200, rank)
    check(x, q, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_repeated_and_zero_columns(scale, dtype):
    x = gaussian(100, 3, dtype=dtype)
    x = np.concatenate([x, 0 * x[:, :2], x[:, :1], -x], axis=1) * np.asarray(scale, dtype)
    q, r = lr.orthonormalize(x)
    assert q.shape == (100, 3)
    check(x, q, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 1, 5])
def test_zero_block(columns, dtype):
    q, r = lr.orthonormalize(np.zeros((20, columns), dtype))
    assert q.shape == (20, 0)
    assert r.shape == (0, columns)


@pytest.mark.parametrize("floor", [3e-7, 3e-4, 10.0])
def test_floor(floor):
    spectrum = np.geomspace(1, 1e-9, 10)
    x = with_spectrum(spectrum, 80, 10)
    q, r = lr.orthonormalize(x, floor=floor)
    assert q.shape[1] == np.sum(spectrum > floor)
    check(x, q, r, lost=floor)


@pytest.mark.parametrize("case", ["good", "bad", "square"])
def test_every_library(case, xp):
    x = {
        "good": gaussian(60, 5),
        "bad": with_spectrum(np.geomspace(1, 1e-12, 5), 60, 5),
        "square": orthonormal(6, 6, np.random.default_rng(0)),
    }[case]
    q, r = lr.orthonormalize(xp.asarray(x))
    check(x, xp.host(q), xp.host(r))


def test_more_columns_than_rows():
    with pytest.raises(ValueError, match="no more columns than rows, got shape 3 x 4"):
        lr.orthonormalize(np.ones((3, 4)))
