"""Ranks, thresholds and angles against closed forms."""

import math

import numpy as np
import pytest
from cases import gaussian, orthonormal, with_spectrum

import lowrank_sp as lr
from lowrank_sp.linalg.spectrum import marchenko_pastur_median

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_closed_forms(scale, xp):
    flat, one = (xp.asarray(scale * np.array(s)) for s in ([1.0] * 8, [1.0, 0.0, 0.0]))
    two = xp.asarray(scale * np.array([3.0, 4.0 / 3.0]))
    assert lr.effective_rank(flat) == pytest.approx(8.0, rel=100 * EPS)
    assert lr.effective_rank(one) == pytest.approx(1.0, rel=100 * EPS)
    assert lr.stable_rank(flat) == pytest.approx(8.0, rel=100 * EPS)
    assert lr.stable_rank(one) == 1.0
    assert lr.stable_rank(two) == pytest.approx(1 + 16 / 81, rel=100 * EPS)
    p = np.array([9, 4]) / 13
    assert lr.effective_rank(two) == pytest.approx(math.exp(-p @ np.log(p)), rel=100 * EPS)


def test_zero_spectrum(xp):
    zero = xp.asarray(np.zeros(3))
    assert lr.effective_rank(zero) == lr.stable_rank(zero) == lr.energy_rank(zero, 0.9) == 0


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_energy_rank_of_equal_values(share, expected, xp):
    assert lr.energy_rank(xp.asarray(np.full(4, 1e-170)), share) == expected


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_energy_rank_is_the_smallest(share):
    s = 1.0 / np.arange(1, 101)
    k = lr.energy_rank(s, share)
    held = np.cumsum(s**2) / np.sum(s**2)
    assert held[k - 1] >= share
    assert k == 1 or held[k - 2] < share


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_bad_share(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        lr.energy_rank(np.ones(3), share)


# -- Gavish and Donoho --


def test_known_constants():
    square = (100, 100)
    assert lr.gavish_donoho_threshold(np.ones(100), square, 1.0) == pytest.approx(
        10 * 4 / math.sqrt(3), rel=10 * EPS
    )
    assert lr.gavish_donoho_threshold(np.ones(9), (9, 9)) == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0])
def test_median_by_the_midpoint_rule(beta):
    n = 100_000
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    angle = (np.arange(n) + 0.5) * math.pi / n
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * beta * x)
    mass = np.cumsum(density * (high - low) / 2 * np.sin(angle)) * math.pi / n
    median = np.interp(0.5, mass, x)
    assert abs(marchenko_pastur_median(beta) - median) <= (high - low) * 10 / n


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.7, 1.0])
def test_median_of_the_marchenko_pastur_law(beta):
    n = 1000
    m = round(beta * n)
    values = np.linalg.svd(gaussian(m, n), compute_uv=False) ** 2 / n
    # Eigenvalues are rigid: a quantile of m of them is known to O(log m / m) of the width.
    width = 4 * math.sqrt(beta)
    assert abs(np.median(values) - marchenko_pastur_median(m / n)) <= 2 * math.log(m) / m * width


@pytest.mark.parametrize("beta", [0.0, -1.0, 1.5, math.nan])
def test_bad_aspect_ratio(beta):
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\], got"):
        marchenko_pastur_median(beta)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
@pytest.mark.parametrize("noise", [0.1, None])
def test_rank_of_a_noisy_matrix(noise, shape):
    signal = with_spectrum(np.array([30.0, 20.0, 12.0, 9.0]), *shape)
    s = lr.singular_values(signal + 0.1 * gaussian(*shape))
    assert lr.gavish_donoho_rank(s, shape, noise) == 4


def test_threshold_scales_with_the_data(xp):
    s = np.linspace(3, 1, 5)
    one, ten = (lr.gavish_donoho_threshold(xp.asarray(k * s), (5, 7)) for k in (1.0, 10.0))
    assert ten == pytest.approx(10 * one, rel=10 * EPS)


def test_median_of_an_even_number():
    even, odd = (
        lr.gavish_donoho_threshold(np.array(s), (4, 4)) for s in ([4, 3, 1, 0.0], [2.0] * 4)
    )
    assert even == pytest.approx(odd, rel=10 * EPS)


def test_median_needs_all_values():
    with pytest.raises(ValueError, match="the median needs all 10 singular values, got 3; or pass"):
        lr.gavish_donoho_threshold(np.ones(3), (10, 20))


# -- angles --


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("angle", [0.0, 1e-15, 1e-10, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_angles_keep_their_digits(angle, dtype):
    q = orthonormal(30, 4, np.random.default_rng(0), dtype == np.complex128)
    turned = np.stack([q[:, 0], math.cos(angle) * q[:, 1] + math.sin(angle) * q[:, 2]], axis=1)
    angles = lr.principal_angles(q[:, :2], turned)
    assert np.all(angles[:-1] <= angles[1:])
    assert abs(angles[0]) <= 20 * EPS
    assert abs(angles[1] - angle) <= 20 * EPS


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3)])
def test_angles_of_different_dimensions(shape, xp):
    u, v = (orthonormal(20, k, np.random.default_rng(k)) for k in shape)
    angles = xp.host(lr.principal_angles(xp.asarray(u), xp.asarray(v)))
    cosines = np.linalg.svd(u.T @ v, compute_uv=False)
    assert angles.shape == (min(shape),)
    assert abs(np.cos(angles) - cosines).max() <= 100 * EPS
    overlap = lr.subspace_overlap(xp.asarray(u), xp.asarray(v))
    assert overlap == pytest.approx(np.sum(cosines**2) / min(shape), rel=100 * EPS)


def test_overlap_of_nested_and_orthogonal_ranges():
    q = orthonormal(20, 6, np.random.default_rng(0))
    assert lr.subspace_overlap(q[:, :2], q) == pytest.approx(1.0, rel=100 * EPS)
    assert lr.subspace_overlap(q[:, :2], q[:, 2:]) <= 100 * EPS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_effective_rank_needs_finite_values(bad):
    with pytest.raises(ValueError, match="singular values must be finite"):
        lr.effective_rank(np.array([1.0, bad]))


def test_effective_rank_of_the_largest_floats():
    assert lr.effective_rank(np.full(10, 3e38, np.float32)) == pytest.approx(10.0)
