"""The scikit-learn faces: scikit-learn's own checks, and what the functions behind them promise."""

from functools import partial

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD as Reference
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import lowrank_sp as lr
from lowrank_sp.estimators import LowRankImputer, RobustPCA, TruncatedSVD
from lowrank_sp.inverse import completion, robust


@parametrize_with_checks([LowRankImputer(), RobustPCA(), TruncatedSVD()])
# Data of the checks need not be low-rank plus sparse, and the warning says so.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_checks_of_scikit_learn(estimator, check):
    if check.func.__name__ == "check_array_api_input":
        # It would skip itself. They take NumPy arrays, and say so.
        assert not estimator.__sklearn_tags__().array_api_support
    else:
        check(estimator)


def low_rank(m, n, rank, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) + rng.normal(size=n)


def with_gaps(x, share, seed=1):
    return np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x)


# -- LowRankImputer --


@pytest.mark.parametrize(
    "solver",
    [
        None,
        partial(completion.lmafit, rng=0),
        partial(completion.scaled_asd, rng=0),
        partial(completion.als, rng=0, regularization=1e-8),
    ],
    ids=["default", "lmafit", "scaled_asd", "als"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_imputer_recovers_rows_seen_and_new(solver, dtype):
    truth = low_rank(150, 40, 3).astype(dtype)
    x = with_gaps(truth, 0.3)
    imputer = LowRankImputer(rank=4, solver=solver, regularization=1e-8, center=False)
    imputer.fit(x[:100])
    for part in (slice(0, 100), slice(100, 150)):
        filled = imputer.transform(x[part])
        assert filled.dtype == dtype
        missing = np.isnan(x[part])
        assert np.array_equal(filled[~missing], x[part][~missing])
        error = np.linalg.norm((filled - truth[part])[missing])
        assert error <= 4 * np.finfo(dtype).eps ** 0.25 * np.linalg.norm(truth[part][missing])


def test_imputer_fits_rows_by_the_penalized_formula():
    x = with_gaps(low_rank(60, 8, 2), 0.3)
    imputer = LowRankImputer(rank=2, regularization=0.3).fit(x)
    seen = ~np.isnan(x)
    centered = np.where(seen, x - np.nanmean(x, axis=0), 0.0)
    rms = np.linalg.norm(centered) / np.sqrt(seen.sum())
    ridge = 0.3 * rms * seen.sum() / np.sqrt(x.size) * np.eye(2)
    r = imputer.components_[:, [1, 4, 5]]
    row = np.full(8, np.nan)
    row[[1, 4, 5]] = [1.0, -2.0, 3.0]
    scores = np.linalg.solve(r @ r.T + ridge, r @ (row - imputer.mean_)[[1, 4, 5]])
    expected = np.where(np.isnan(row), imputer.mean_ + scores @ imputer.components_, row)
    assert np.allclose(imputer.transform(row[None])[0], expected, rtol=1e-10)


def test_imputer_edges():
    x = with_gaps(low_rank(30, 6, 1), 0.2)
    x[4] = np.nan
    imputer = LowRankImputer(rank=1)
    filled = imputer.fit_transform(x)
    assert np.allclose(filled[4], imputer.mean_)
    assert np.isfinite(filled).all()
    assert np.array_equal(imputer.get_feature_names_out(), [f"x{j}" for j in range(6)])
    full = low_rank(30, 6, 1)
    assert np.array_equal(imputer.fit_transform(full), full)
    assert not np.any(imputer.fit_transform(np.where(np.isnan(x), x, 0.0)[:, :3]))


@pytest.mark.parametrize(
    ("options", "column", "message"),
    [
        ({"rank": 7}, None, "rank must be in 1..6 for shape 30 x 6, got 7"),
        ({"regularization": 0.0}, None, "regularization must be positive"),
        ({}, 3, r"every feature needs a value, got none in columns \[3\]"),
    ],
)
def test_imputer_refuses(options, column, message):
    x = low_rank(30, 6, 1)
    if column is not None:
        x[:, column] = np.nan
    with pytest.raises(ValueError, match=message):
        LowRankImputer(**options).fit(x)


def test_imputer_in_a_pipeline():
    x = low_rank(200, 10, 2)
    y = x @ np.arange(10.0)
    pipeline = make_pipeline(StandardScaler(), LowRankImputer(rank=2), Ridge(1e-3))
    gaps = with_gaps(x, 0.2)
    assert clone(pipeline).fit(gaps[:150], y[:150]).score(gaps[150:], y[150:]) > 0.99
    # Filling by the mean alone: as many rows and features, less information.
    mean = np.where(np.isnan(gaps), np.nanmean(gaps, axis=0), gaps)
    assert Ridge(1e-3).fit(mean[:150], y[:150]).score(mean[150:], y[150:]) < 0.99


def test_a_solver_that_does_not_converge_warns():
    x = with_gaps(low_rank(60, 20, 2), 0.3)
    solver = partial(completion.als, rng=0, stop=lr.Stop(max_iter=1, tol=1e-12))
    with pytest.warns(ConvergenceWarning, match="LowRankImputer: max_iter = 1 reached"):
        LowRankImputer(solver=solver).fit(x)


# -- RobustPCA --


@pytest.mark.parametrize(
    "solver",
    [None, partial(robust.scaled_gd, rng=0), partial(robust.alternating_projections, decay=0.8)],
    ids=["default", "scaled_gd", "partial"],
)
def test_robust_pca_of_rows_seen_and_new(solver):
    rng = np.random.default_rng(0)
    clean = low_rank(260, 80, 3)
    spikes = np.where(rng.random(clean.shape) < 0.1, rng.normal(0, 30, clean.shape), 0.0)
    x = clean + spikes
    pca = RobustPCA(n_components=4, solver=solver, center=False).fit(x[:200])
    for part in (slice(0, 200), slice(200, 260)):
        scores = pca.transform(x[part])
        assert scores.shape[1] == 4
        error = np.linalg.norm(pca.inverse_transform(scores) - clean[part])
        assert error <= 1e-4 * np.linalg.norm(clean[part])
    low, sparse = pca.decomposition_.low_rank.to_dense(), pca.decomposition_.sparse
    assert np.allclose(low + sparse + pca.center_, x[:200], atol=1e-5)
    plain = Reference(n_components=4, algorithm="arpack").fit(x[:200])
    again = plain.inverse_transform(plain.transform(x[200:]))
    assert np.linalg.norm(again - clean[200:]) > 0.1 * np.linalg.norm(clean[200:])


def test_robust_pca_warns_where_nothing_is_separated():
    x = np.random.default_rng(0).standard_normal((30, 10))
    with pytest.warns(ConvergenceWarning, match="RobustPCA: nothing separated"):
        RobustPCA(n_components=10).fit(x)
    with pytest.raises(ValueError, match=r"rank must be in 1..10 "):
        RobustPCA(n_components=11).fit(x)


# -- TruncatedSVD --


@pytest.mark.parametrize("make", [np.asarray, scipy.sparse.csr_array, scipy.sparse.csc_matrix])
def test_truncated_svd_is_certified(make):
    x = np.random.default_rng(0).standard_normal((150, 40))
    x[abs(x) < 1.0] = 0.0
    svd = TruncatedSVD(n_components=5)
    scores = svd.fit_transform(make(x))
    s = np.linalg.svd(x, compute_uv=False)
    assert np.all(abs(svd.singular_values_ - s[:5]) <= svd.bounds_)
    reference = Reference(n_components=5, algorithm="arpack").fit(x)
    for name in ("explained_variance_", "explained_variance_ratio_", "singular_values_"):
        assert np.allclose(getattr(svd, name), getattr(reference, name), rtol=1e-8)
    assert np.allclose(abs(svd.components_ @ reference.components_.T), np.eye(5), atol=1e-6)
    error = np.linalg.norm(svd.inverse_transform(scores) - x)
    assert error == pytest.approx(np.linalg.norm(s[5:]), rel=1e-8)


def test_truncated_svd_by_tolerance():
    x = np.random.default_rng(0).standard_normal((150, 40)) * 0.8 ** np.arange(40)
    svd = TruncatedSVD(n_components=None, tol=0.1).fit(x)
    s = np.linalg.svd(x, compute_uv=False)
    rank = len(svd.singular_values_)
    tails = [np.linalg.norm(s[k:]) / np.linalg.norm(s) for k in (rank, rank - 1)]
    assert tails[0] <= 0.1 < tails[1]
    assert len(svd.get_feature_names_out()) == rank
    with pytest.raises(ValueError, match="n_components or tol must be given"):
        TruncatedSVD(n_components=None).fit(x)
