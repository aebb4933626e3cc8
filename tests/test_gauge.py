"""Gauge maps keep the product; each has a law of its own."""

import numpy as np
import pytest
from cases import gaussian, orthonormal

from lowrank_sp.gauge import align, balance, fix_signs, geometric_mean, thin_svd
from lowrank_sp.testing import assert_same_product

SHAPES = [(9, 7, 3), (7, 9, 3), (5, 5, 5), (6, 4, 1), (2, 12, 8, 3)]
DTYPES = [np.float32, np.float64, np.complex128]


def pair(shape, dtype, seed=0):
    *batch, m, n, r = shape
    return gaussian(*batch, m, r, dtype=dtype, seed=seed), gaussian(*batch, r, n, dtype=dtype)


def adjoint(a):
    return np.conj(np.swapaxes(a, -1, -2))


def polish(left, right):
    u, s, vh = thin_svd(left, right)
    return u * s[..., None, :].astype(left.dtype), vh


MAPS = {
    "fix_signs": fix_signs,
    "balance": balance,
    "thin_svd": polish,
    "align": lambda left, right: align(left, right, left[..., ::-1]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAPS)
def test_product_is_kept(name, shape, dtype):
    left, right = pair(shape, dtype)
    new_left, new_right = MAPS[name](left, right)
    assert (new_left.shape, new_right.shape) == (left.shape, right.shape)
    assert_same_product(left @ right, new_left @ new_right)


@pytest.mark.parametrize("name", ["fix_signs", "balance", "align"])
def test_on_every_library(name, xp):
    left, right = pair((9, 7, 3), np.float64)
    found = (
        MAPS[name](xp.asarray(left), xp.asarray(right))
        if name != "align"
        else align(*(xp.asarray(a) for a in (left, right, left[:, ::-1])))
    )
    for new, expected in zip(found, MAPS[name](left, right), strict=True):
        assert_same_product(expected, xp.host(new), tol=1000 * np.finfo(float).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_balance(shape, condition, dtype):
    left, right = pair(shape, dtype)
    stretch = np.geomspace(1, condition, shape[-1]).astype(left.real.dtype)
    left, right = left * stretch, right / stretch[:, None]
    new_left, new_right = balance(left, right)
    grams = adjoint(new_left) @ new_left, new_right @ adjoint(new_right)
    s = np.linalg.svd((left @ right).astype(complex), compute_uv=False)[..., : shape[-1]]
    eps = np.finfo(dtype).eps
    slack = 100 * eps * condition * s.max()
    for gram in grams:
        assert abs(gram - s[..., None] * np.eye(shape[-1])).max() <= slack
    least = 2 * s.sum()
    assert (
        abs(np.linalg.norm(new_left) ** 2 + np.linalg.norm(new_right) ** 2 - least)
        <= slack * s.size
    )


def test_balance_of_more_columns_than_fit():
    left, right = gaussian(4, 6), gaussian(6, 5)
    new_left, new_right = balance(left, right)
    assert new_left.shape == (4, 4)
    assert_same_product(left @ right, new_left @ new_right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_are_fixed_once(dtype):
    u, vh = pair((9, 7, 4), dtype)
    first = fix_signs(u, vh)
    again = fix_signs(*first)
    eps = np.finfo(dtype).eps
    for a, b in zip(first, again, strict=True):
        assert abs(a - b).max() <= 8 * eps * abs(a).max()
    top = np.take_along_axis(first[0], abs(first[0]).argmax(axis=0)[None], axis=0)
    assert np.all(top.real > 0)
    assert abs(top.imag).max() <= 4 * eps * abs(top).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_do_not_hang_on_rounding(dtype):
    eps = np.finfo(dtype).eps
    vh = np.ones((1, 2), dtype)
    for noise in (-eps, 0.0, eps):
        u = np.array([[0.0], [-1.0], [1.0 + 4 * noise]], dtype)
        fixed = fix_signs(u, vh)[0]
        assert abs(fixed - np.array([[0], [1], [-1]])).max() <= 8 * eps


@pytest.mark.parametrize("phase", [1.0, -1.0, 1j, np.exp(0.3j)])
def test_phase_does_not_matter(phase):
    u, vh = pair((9, 7, 4), np.complex128)
    for a, b in zip(fix_signs(u, vh), fix_signs(u * phase, vh * np.conj(phase)), strict=True):
        assert_same_product(a, b)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_zero_columns_and_empty_factors_have_signs(dtype):
    u, vh = np.zeros((4, 2), dtype), np.ones((2, 3), dtype)
    assert np.array_equal(fix_signs(u, vh)[1], vh)
    assert fix_signs(u[:, :0], vh[:0])[0].shape == (4, 0)
    assert fix_signs(u[:0], vh)[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_align_undoes_a_rotation(dtype):
    left, right = pair((9, 7, 3), dtype)
    q = orthonormal(3, 3, np.random.default_rng(5), dtype == np.complex128)
    found = align(left @ q, q.conj().T @ right, left)
    assert_same_product(left, found[0])
    assert_same_product(right, found[1])


def test_align_is_closest():
    left, right = pair((9, 7, 3), np.float64)
    reference = gaussian(9, 3, seed=7)
    best = np.linalg.norm(align(left, right, reference)[0] - reference)
    for seed in range(20):
        q = orthonormal(3, 3, np.random.default_rng(seed))
        assert np.linalg.norm(left @ q - reference) >= best


def definite(r, condition, dtype, seed):
    q = orthonormal(r, r, np.random.default_rng(seed), np.issubdtype(dtype, np.complexfloating))
    return ((q * np.geomspace(1, condition, r)) @ q.conj().T).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 1e2])
def test_geometric_mean(condition, dtype):
    p, q = (definite(5, condition, dtype, seed) for seed in (0, 1))
    x = geometric_mean(p, q)
    tol = 100 * np.finfo(dtype).eps * condition**2
    assert_same_product(q, x @ np.linalg.inv(p) @ x, tol=tol)
    assert_same_product(x, x.conj().T, tol=tol)
    assert_same_product(x, geometric_mean(q, p), tol=tol)
    assert_same_product(np.linalg.inv(x), geometric_mean(*map(np.linalg.inv, (p, q))), tol=tol)
    assert np.linalg.eigvalsh(x).min() > 0


def test_geometric_mean_of_commuting_matrices_on_every_library(xp):
    p, q = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    x = geometric_mean(xp.asarray(np.stack([p, q])), xp.asarray(np.stack([q, p])))
    expected = np.stack([np.diag([2.0, 4.0, 3.0])] * 2)
    assert_same_product(expected, xp.host(x))
