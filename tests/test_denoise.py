"""Denoising against asymptotic theory, closed forms and optimality of each shrinker."""

import math

import numpy as np
import pytest
from cases import gaussian, orthonormal

import lowrank_sp as lr
from lowrank_sp.inverse import denoise, synthetic

EPS = np.finfo(np.float64).eps
SHRINKERS = {
    f.__name__: f
    for f in (
        denoise.hard,
        denoise.frobenius_loss,
        denoise.operator_loss,
        denoise.nuclear_loss,
        denoise.variational_bayes,
    )
}
shrinkers = pytest.mark.parametrize("name", SHRINKERS)
betas = pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])


def spiked(x, m, n, seed, noise=1.0):
    """Truth with singular values ``x`` in units of ``sqrt(max(m, n)) noise``, and noisy data."""
    rng = np.random.default_rng(seed)
    u, v = orthonormal(m, len(x), rng), orthonormal(n, len(x), rng)
    truth = (u * (np.asarray(x) * math.sqrt(max(m, n)) * noise)) @ v.T
    return truth, truth + noise * rng.standard_normal((m, n))


def appears(x, beta):
    return np.sqrt((x + 1 / x) * (x + beta / x))


# -- The formulas --


def test_hard_threshold_is_four_over_root_three():
    threshold = 4 / math.sqrt(3)
    y = np.array([threshold * (1 - 8 * EPS), threshold * (1 + 8 * EPS)])
    assert np.array_equal(denoise.hard(y, 1.0), [0.0, y[1]])


@shrinkers
@betas
def test_shrinkers_drop_the_noise_keep_the_order_and_shrink(name, beta):
    y = np.linspace(0.0, 8.0, 2001)
    eta = SHRINKERS[name](y, beta)
    assert np.all(eta[y <= 1 + math.sqrt(beta)] == 0.0)
    assert np.all(np.diff(eta) >= 0)
    assert np.all(eta <= y)
    assert eta[-1] > 7.5


def test_operator_loss_of_square_matrices_undoes_the_noise():
    x = np.linspace(1.01, 6.0, 50)
    assert np.allclose(denoise.operator_loss(appears(x, 1.0), 1.0), x, rtol=1e-6)


@betas
def test_frobenius_loss_is_the_projection(beta):
    x = np.linspace(beta**0.25 * 1.01, 6.0, 50)
    cosines = (x**4 - beta) / np.sqrt((x**4 + beta * x**2) * (x**4 + x**2))
    eta = denoise.frobenius_loss(appears(x, beta), beta)
    assert np.allclose(eta, x * cosines, rtol=1e-6)
    error = denoise.asymptotic_error(x, beta)
    assert np.allclose(error, x**2 - eta**2, rtol=1e-6)


NORMS = {
    "frobenius_loss": lambda s: np.sum(s**2, axis=-1),
    "operator_loss": lambda s: np.max(s, axis=-1),
    "nuclear_loss": lambda s: np.sum(s, axis=-1),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("x", [1.2, 1.5, 2.0, 4.0])
@betas
def test_each_shrinker_has_the_least_loss_of_its_norm(name, x, beta):
    """The error is asymptotically a 2 x 2 matrix in the bases of true and found vectors."""
    c = math.sqrt((x**4 - beta) / (x**4 + beta * x**2))
    d = math.sqrt((x**4 - beta) / (x**4 + x**2))
    found = np.outer([c, math.sqrt(1 - c * c)], [d, math.sqrt(1 - d * d)])
    y = appears(x, beta)

    def loss(eta):
        errors = np.diag([x, 0.0]) - np.asarray(eta)[..., None, None] * found
        return NORMS[name](np.linalg.svd(errors, compute_uv=False))

    best = loss(SHRINKERS[name](np.array(y), beta))
    assert best <= np.min(loss(np.linspace(0.0, 1.2 * y, 500))) * (1 + 1e-12)


def test_hard_threshold_minimizes_the_worst_error():
    x = np.linspace(0.5, 5.0, 400)
    worst = {
        t: np.max(denoise.asymptotic_error(x, 1.0, lambda y, _, t=t: np.where(y > t, y, 0.0)))
        for t in np.linspace(2.05, 2.8, 76)
    }
    assert min(worst, key=worst.__getitem__) == pytest.approx(4 / math.sqrt(3), abs=0.02)


@betas
def test_variational_bayes_threshold(beta):
    """The minimum of the free energy: its two branches cost the same at the threshold."""
    tau = denoise._vb_root(beta)
    balance = math.log1p(tau) / tau + beta * math.log1p(tau / beta) / tau
    assert balance == pytest.approx(1.0, rel=1e-9)
    threshold = math.sqrt((1 + tau) * (1 + beta / tau))
    y = threshold * np.array([1 - 1e-9, 1 + 1e-9])
    eta = denoise.variational_bayes(y, beta)
    assert eta[0] == 0.0
    # The discarded branch of the quadratic eta^2 - (y - (1 + beta)/y) eta + beta/y^2.
    assert eta[1] ** 2 - (y[1] - (1 + beta) / y[1]) * eta[1] + beta / y[1] ** 2 == pytest.approx(
        0.0, abs=1e-9
    )
    assert threshold > 1 + math.sqrt(beta)


# -- Monte Carlo --


@shrinkers
@pytest.mark.parametrize(("m", "n"), [(200, 200), (120, 300), (300, 120)])
def test_error_agrees_with_the_asymptotic_formula(name, m, n):
    x, trials = np.array([3.0, 2.0, 1.6]), 12
    beta = min(m, n) / max(m, n)
    predicted = float(np.sum(denoise.asymptotic_error(x, beta, SHRINKERS[name])))
    errors = []
    for seed in range(trials):
        truth, data = spiked(x, m, n, seed)
        f = denoise.shrink(data, SHRINKERS[name], noise=1.0)
        errors.append(np.linalg.norm(f.to_dense() - truth) ** 2 / max(m, n))
    standard_error = np.std(errors, ddof=1) / math.sqrt(trials)
    # Finite matrices deviate from the limit by a term of the order of their size to the -2/3.
    assert abs(np.mean(errors) - predicted) <= 4 * standard_error + predicted / min(m, n) ** (2 / 3)


def test_optshrink_reaches_the_optimum_in_noise_of_unknown_law():
    """Noise whose variance differs from row to row: no longer the Marchenko-Pastur law."""
    m, n, x = 200, 300, np.array([6.0, 4.0])
    rng = np.random.default_rng(0)
    ours, best, white = [], [], []
    deviations = np.repeat([0.4, 2.0], m // 2)
    for seed in range(6):
        truth, _ = spiked(x, m, n, seed)
        rotation = orthonormal(m, m, rng)
        data = truth + rotation @ (deviations[:, None] * rng.standard_normal((m, n)))
        f = denoise.optshrink(data, rank=2)
        oracle = np.sum((f.u.T @ truth) * f.vh, axis=1)
        for errors, s in ((ours, f.s), (best, oracle), (white, denoise.shrink(data).s)):
            product = (f.u * np.resize(s, 2)) @ f.vh if len(s) else 0.0
            errors.append(np.linalg.norm(product - truth) ** 2)
    assert np.mean(best) <= np.mean(ours) <= 1.02 * np.mean(best)
    assert np.mean(white) > 1.02 * np.mean(ours)


@pytest.mark.parametrize(("m", "n"), [(200, 200), (120, 300), (300, 120)])
def test_optshrink_agrees_with_the_shrinker_in_white_noise(m, n):
    _, data = spiked([4.0, 2.0], m, n, 0)
    f, g = denoise.optshrink(data, rank=2), denoise.shrink(data, noise=1.0)
    assert np.allclose(f.s, g.s, rtol=0.05)


def test_optshrink_of_too_large_a_rank_does_little_harm():
    truth, data = spiked([4.0], 200, 150, 0)
    errors = [lr.relative_error(denoise.optshrink(data, rank=k), truth) for k in (1, 5)]
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize(("m", "n"), [(300, 300), (150, 400)])
def test_noise_level(m, n):
    _, data = spiked([5.0, 3.0], m, n, 0, noise=0.3)
    s = lr.singular_values(data)
    assert denoise.noise_level(s, (m, n)) == pytest.approx(0.3, rel=0.02)
    known, estimated = denoise.shrink(data, noise=0.3), denoise.shrink(data)
    assert lr.relative_error(known, estimated) < 0.02


# -- The functions --


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_shrink_on_every_library(dtype, xp):
    a = 10 * gaussian(60, 3, dtype=dtype) @ gaussian(3, 40, seed=1, dtype=dtype)
    a = (a + gaussian(60, 40, seed=2, dtype=dtype)).astype(dtype)
    data = xp.asarray(a)
    eps = float(np.finfo(dtype).eps)
    for f in (denoise.shrink(data), denoise.optshrink(data, rank=3)):
        for part in f:
            assert type(part) is type(data)
            assert part.device == data.device
        assert f.dtype == data.dtype
        assert f.rank == 3
        dense = xp.host(f.to_dense())
        assert f.error == pytest.approx(np.linalg.norm(dense - a), rel=100 * eps)
    reference = denoise.shrink(a)
    error = lr.relative_error(xp.host(denoise.shrink(data).to_dense()), reference)
    assert error <= 1e3 * eps


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_units(scale):
    _, data = spiked([4.0, 2.0], 80, 60, 0)
    one, other = denoise.shrink(data, noise=1.0), denoise.shrink(scale * data, noise=scale)
    assert np.allclose(other.s / scale, one.s, rtol=1e-12)
    other = denoise.shrink(scale * data)
    assert np.allclose(other.s / scale, denoise.shrink(data).s, rtol=1e-12)
    ratio = denoise.optshrink(scale * data, 2).s / denoise.optshrink(data, 2).s
    assert np.allclose(ratio / scale, 1.0, rtol=1e-12)


def test_nothing_but_noise_has_rank_zero(xp):
    data = xp.asarray(gaussian(50, 40))
    f = denoise.shrink(data, denoise.hard)
    assert f.rank == 0
    assert f.shape == (50, 40)
    assert not np.any(xp.host(f.to_dense()))
    assert f.error == pytest.approx(np.linalg.norm(xp.host(data)), rel=1e-12)


def test_no_noise_changes_nothing():
    a = gaussian(50, 3) @ gaussian(3, 40, seed=1)
    assert lr.relative_error(denoise.shrink(a, noise=0.0), a) <= 100 * EPS
    # The median of the singular values of an exactly low-rank matrix is rounding.
    assert lr.relative_error(denoise.shrink(a), a) <= 100 * EPS
    assert lr.relative_error(denoise.optshrink(a, 3), a) <= 100 * EPS
    assert not np.any(denoise.shrink(np.zeros((5, 4))).to_dense())
    assert not np.any(denoise.optshrink(np.zeros((5, 4)), 2).to_dense())


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise must be at least 0 and finite"):
        denoise.shrink(gaussian(5, 4), noise=noise)


def test_bad_ranks():
    with pytest.raises(ValueError, match=r"rank must be in 1..3 for shape 5 x 4, got 4"):
        denoise.optshrink(gaussian(5, 4), 4)
    with pytest.raises(ValueError, match=r"rank must be in 1..5 for shape 6 x 5, got 6"):
        denoise.cadzow(gaussian(10), rank=6)


# -- Cadzow --


def harmonics(dtype=np.complex128, **options):
    like = np.zeros(0, dtype)
    return synthetic.harmonics(**{"length": 80, "rank": 4, **options}, like=like, rng=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_cadzow_of_a_clean_signal_is_the_signal(dtype):
    p = harmonics(dtype)
    found = denoise.cadzow(p.signal, rank=p.rank, rng=0)
    assert found.value.dtype == dtype
    assert found.converged
    error = np.linalg.norm(found.value - p.signal) / np.linalg.norm(p.signal)
    assert error <= 100 * np.finfo(dtype).eps ** 0.75


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_cadzow_on_every_library(dtype, xp):
    p = harmonics(dtype, noise=0.1, length=40)
    data = xp.asarray(p.data)
    found = denoise.cadzow(data, rank=p.rank, rng=0)
    assert type(found.value) is type(data)
    assert found.value.dtype == data.dtype
    assert found.value.device == data.device
    reference = denoise.cadzow(p.data, rank=p.rank, rng=0).value
    error = np.linalg.norm(xp.host(found.value) - reference) / np.linalg.norm(reference)
    assert error <= 8 * np.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_cadzow_reaches_the_noise_floor(dtype):
    """Of ``N`` samples of noise, the part along the ``2 r`` parameters stays."""
    errors = []
    for seed in range(10):
        p = synthetic.harmonics(
            length=80, rank=4, separation=4.0, noise=0.05, like=np.zeros(0, dtype), rng=seed
        )
        found = denoise.cadzow(p.data, rank=p.rank, rng=0)
        assert found.converged
        s = np.linalg.svd(p.lift.lift(found.value).to_dense(), compute_uv=False)
        assert s[4] <= 1e-5 * s[0]
        errors.append(np.sum(abs(found.value - p.signal) ** 2) / np.sum(abs(p.signal) ** 2))
    # Real signals have 2 real parameters an exponential, complex ones 4 for 2 N real samples.
    floor = 0.05**2 * 2 * p.rank / 80
    assert 0.5 * floor < np.mean(errors) < 1.5 * floor


def test_cadzow_rows_start_and_bad_input():
    p = harmonics(noise=0.1)
    square = denoise.cadzow(p.data, rank=4, rng=0).value
    other = denoise.cadzow(p.data, rank=4, rows=50, rng=0).value
    started = denoise.cadzow(p.data, rank=4, init=square, rng=0)
    assert 0 < np.linalg.norm(square - other) < np.linalg.norm(p.data - p.signal)
    assert started.n_iter <= 2
    with pytest.raises(ValueError, match="init must have shape"):
        denoise.cadzow(p.data, rank=4, init=square[:-1])
    with pytest.raises(ValueError, match="signal must have shape"):
        denoise.cadzow(p.data[:, None], rank=4)
