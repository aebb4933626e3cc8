"""Synthetic problems are what they say they are."""

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.inverse import HankelLift, RankOneSensing, synthetic

LIKES = [np.float32, np.float64, np.complex128]


def dense(f):
    return to_host(f.to_dense())


@pytest.mark.parametrize("dtype", LIKES)
@pytest.mark.parametrize("rank", [1, 4])
def test_truth_has_the_spectrum_asked_for(rank, dtype, xp):
    like = xp.asarray(np.zeros(1, dtype))
    f = synthetic.low_rank((30, 20), rank, condition=100.0, like=like, rng=0)
    assert type(f.u) is type(like)
    assert f.u.dtype == like.dtype
    s = np.linalg.svd(dense(f).astype(np.complex128), compute_uv=False)
    expected = 100.0 ** -np.linspace(0, 1, rank) if rank > 1 else np.ones(1)
    assert np.allclose(s[:rank] / s[0], expected, rtol=1000 * eps(dtype))
    assert np.all(s[rank:] <= 100 * eps(dtype) * s[0])
    # Entries have mean square one.
    assert abs(np.sum(s**2) / 600 - 1) <= 100 * eps(dtype)


def test_spectrum_itself():
    f = synthetic.low_rank((30, 20), 3, spectrum=[5, 2, 2], like=np.zeros(1), rng=0)
    assert list(f.s) == [5.0, 2.0, 2.0]


def test_coherence_gathers_leverage():
    largest = [
        np.max(synthetic.low_rank((400, 300), 5, coherence=c, like=np.zeros(1), rng=0).u ** 2)
        for c in (0.0, 0.5, 1.0)
    ]
    assert largest[0] < largest[1] < largest[2]


@pytest.mark.parametrize("mask", ["uniform", "conditioned", "power-law"])
@pytest.mark.parametrize("oversampling", [1.1, 2.0, 5.0])
def test_masks(mask, oversampling):
    p = synthetic.completion(shape=(60, 50), rank=3, oversampling=oversampling, mask=mask, rng=1)
    assert p.entries.size == round(oversampling * 3 * (110 - 3))
    assert p.dof == 321
    assert abs(p.oversampling - oversampling) <= 1 / 321
    least = min(p.entries.pattern.row_counts.min(), p.entries.pattern.column_counts.min())
    assert mask == "uniform" or least >= 3
    assert np.array_equal(p.entries.values, p.entries.sample(p.truth))


def test_power_law_rates():
    p = synthetic.completion(shape=(2000, 50), rank=1, oversampling=10, mask="power-law", rng=0)
    counts = np.sort(p.entries.pattern.row_counts)[::-1]
    # The busiest tenth of lines has the share sqrt(0.1) of the entries.
    assert abs(counts[:200].sum() / counts.sum() - np.sqrt(0.1)) < 0.08


def test_uniform_masks_are_uniform():
    counts = np.zeros((8, 6))
    for seed in range(600):
        rows, cols = synthetic.positions((8, 6), 12, rng=seed)
        counts[rows, cols] += 1
    # Every position has 150 hits on average, with deviation sqrt(600 / 4 * 3 / 4).
    assert np.abs(counts - 150).max() <= 4.5 * np.sqrt(150 * 0.75)


@pytest.mark.parametrize("shape", [(40, 40), (15, 90)])
def test_masks_near_the_limit(shape):
    size = 2 * max(shape) + 10
    rows, cols = synthetic.positions(shape, size, least=2, rng=0)
    assert len(rows) == size
    assert len(np.unique(rows * shape[1] + cols)) == size
    assert np.bincount(rows, minlength=shape[0]).min() >= 2
    assert np.bincount(cols, minlength=shape[1]).min() >= 2


@pytest.mark.parametrize("dtype", LIKES)
def test_noise_is_in_units_of_the_data(dtype):
    p = synthetic.completion(
        shape=(200, 150), rank=4, oversampling=8, noise=0.3, like=np.zeros(1, dtype), rng=0
    )
    clean = p.entries.sample(p.truth)
    share = np.linalg.norm(p.entries.values - clean) / np.linalg.norm(clean)
    assert abs(share - 0.3) <= 4 * 0.3 / np.sqrt(2 * p.entries.size)
    q = synthetic.sensing(shape=(30, 20), oversampling=8, noise=0.3, rng=0)
    clean = q.measurement.forward(q.truth)
    share = np.linalg.norm(q.data - clean) / np.linalg.norm(clean)
    assert abs(share - 0.3) <= 4 * 0.3 / np.sqrt(2 * q.measurement.size)


def test_sensing(xp):
    like = xp.asarray(np.zeros(1))
    p = synthetic.sensing(shape=(12, 10), rank=2, oversampling=2.0, like=like, rng=0)
    assert (p.rank, p.dof, p.oversampling) == (2, 40, 2.0)
    assert type(p.data) is type(like)
    difference = to_host(p.data) - to_host(p.measurement.forward(p.truth))
    assert np.abs(difference).max() == 0.0
    rng = np.random.default_rng(0)
    given = RankOneSensing(
        xp.asarray(rng.standard_normal((70, 12))), xp.asarray(rng.standard_normal((70, 9)))
    )
    q = synthetic.sensing(measurement=given, rank=1, rng=0)
    assert q.truth.shape == (12, 9)
    assert q.oversampling == 70 / 20


@pytest.mark.parametrize("dtype", LIKES)
def test_robust(dtype, xp):
    p = synthetic.robust(
        shape=(40, 30),
        rank=2,
        outliers=0.2,
        amplitude=5.0,
        missing=3,
        like=xp.asarray(np.zeros(1, dtype)),
        rng=0,
    )
    truth, gross, data = dense(p.truth), to_host(p.outliers), to_host(p.data)
    assert np.abs(truth + gross - data).max() <= 10 * eps(dtype) * np.abs(data).max()
    assert np.array_equal(p.support, gross != 0)
    assert len(p.missing) == 3
    assert np.all(data[:, p.missing] == 0)
    present = np.setdiff1d(np.arange(30), p.missing)
    assert np.abs(gross[:, present]).max() <= 5.0 * np.mean(np.abs(truth)) * 1.001
    assert abs(p.support[:, present].mean() - 0.2) < 0.05
    assert p.oversampling == np.sum(~p.support) / p.dof


@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_harmonics(dtype, damping, xp):
    like = xp.asarray(np.zeros(1, dtype))
    p = synthetic.harmonics(length=60, rank=4, damping=damping, separation=2.0, like=like, rng=3)
    signal = to_host(p.signal)
    assert signal.dtype == dtype
    assert (p.rank, p.dof, p.oversampling) == (4, 8, 60 / 8)
    assert isinstance(p.lift, HankelLift)
    s = np.linalg.svd(dense(p.truth), compute_uv=False)
    assert np.all(s[4:] <= 1e-12 * s[0])
    # Amplitudes are at least one half and frequencies apart, so the rank is not less.
    assert s[3] >= 1e-6 * s[0]
    t = np.arange(60)[:, None]
    model = np.exp(t * (2j * np.pi * p.frequencies - p.damping)) @ p.amplitudes
    assert np.abs(model - signal).max() <= 1e-12 * np.abs(signal).max()
    gaps = np.diff(np.sort(p.frequencies % 1.0), append=np.min(p.frequencies % 1.0) + 1)
    assert gaps.min() >= 2.0 / 60 * (1 - 1e-9)


MAKERS = {
    "completion": lambda seed: synthetic.completion(noise=0.1, rng=seed).entries.values,
    "sensing": lambda seed: synthetic.sensing(noise=0.1, rng=seed).data,
    "robust": lambda seed: synthetic.robust(noise=0.1, rng=seed).data,
    "harmonics": lambda seed: synthetic.harmonics(noise=0.1, rng=seed).data,
}


@pytest.mark.parametrize("name", MAKERS)
def test_one_seed_gives_one_problem(name):
    make = MAKERS[name]
    assert np.array_equal(make(3), make(3))
    assert not np.array_equal(make(3), make(4))


def test_one_seed_gives_one_problem_on_every_library(xp):
    ours = synthetic.completion(noise=0.1, rng=0).entries
    theirs = synthetic.completion(noise=0.1, like=xp.asarray(np.zeros(1)), rng=0).entries
    assert np.array_equal(ours.cols, theirs.cols)
    assert np.allclose(ours.values, to_host(theirs.values), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: synthetic.completion(rank=81), r"rank must be in 1\.\.80"),
        (lambda: synthetic.completion(oversampling=99), "lower it to at most 15.1"),
        (lambda: synthetic.completion(oversampling=0.1), "raise oversampling"),
        (lambda: synthetic.completion(mask="round"), "got 'round'"),
        (lambda: synthetic.completion(noise=-1), "noise must be at least 0, got -1"),
        (lambda: synthetic.completion(condition=0.5), "condition must be at least 1, got 0.5"),
        (lambda: synthetic.completion(rank=2, spectrum=[1, 2]), "from large to small"),
        (lambda: synthetic.completion(rank=2, spectrum=[1]), "must be 2 positive values"),
        (lambda: synthetic.robust(outliers=1.0), r"share in \[0, 1\), got 1.0"),
        (lambda: synthetic.robust(missing=80), r"columns in 0\.\.79, got 80"),
        (lambda: synthetic.harmonics(rank=101), r"rank must be in 1\.\.100"),
        (lambda: synthetic.harmonics(rank=3, like=np.zeros(1)), "must be even for a real signal"),
        (lambda: synthetic.harmonics(rank=90, separation=3.0), "lower separation"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_relative_error_of_the_truth_is_zero():
    p = synthetic.completion(rng=0)
    assert lr.relative_error(p.truth, p.truth) <= 100 * eps(np.float64)
