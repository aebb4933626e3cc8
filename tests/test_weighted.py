"""Weighted low-rank approximation against a naive Cholesky reference."""

import numpy as np
import pytest
from cases import gaussian, orthonormal

import lowrank_sp as lr
from lowrank_sp.linalg.weighted import covariance_root
from lowrank_sp.testing import assert_same_product

M, N, SAMPLES, RANK = 12, 9, 40, 3
DTYPES = [np.float32, np.float64, np.complex128]
EPS = np.finfo(np.float64).eps


def weight(dtype=np.float64):
    return gaussian(M, N, dtype=dtype)


def samples(count=SAMPLES, dtype=np.float64):
    mixing = np.diag(np.geomspace(1, 0.05, N)) @ orthonormal(N, N, np.random.default_rng(3))
    return (gaussian(count, N, seed=1, dtype=dtype) @ mixing).astype(dtype)


def covariance(x):
    """``E[x x^H]`` of samples in rows."""
    return x.T @ x.conj() / len(x)


def naive(w, c, rank):
    """``trunc(W L) inv(L)`` with the Cholesky factor of the covariance, and the error it makes."""
    root = np.linalg.cholesky(c)
    u, s, vh = np.linalg.svd(w @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root), np.linalg.norm(s[rank:])


def routes(x):
    return {"inputs": x}, {"covariance": covariance(x)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, RANK, N - 1, N])
@pytest.mark.parametrize("route", [0, 1], ids=["inputs", "covariance"])
def test_optimal(route, rank, dtype):
    w, x = weight(dtype), samples(dtype=dtype)
    wide = np.complex128 if dtype == np.complex128 else np.float64
    expected, least = naive(w.astype(wide), covariance(x.astype(wide)), rank)
    found, error = lr.weighted_low_rank(w, rank, **routes(x)[route], rng=0)
    tol = 1000 * np.finfo(dtype).eps * np.linalg.cond(x)
    assert found.dtype == dtype
    assert found.rank == rank
    assert_same_product(expected, found.to_dense(), tol=tol)
    assert abs(error - least) <= tol * np.linalg.norm(w)
    made = np.linalg.norm((w - found.to_dense()) @ x.T) / len(x) ** 0.5
    assert abs(error - made) <= tol * np.linalg.norm(w)
    assert abs(found.left.conj().T @ found.left - np.eye(rank)).max() <= 40 * np.finfo(dtype).eps


def test_no_other_matrix_of_that_rank_is_better():
    w, x = weight(), samples()
    found, error = lr.weighted_low_rank(w, RANK, inputs=x)
    for seed in range(20):
        step = 1e-3 * gaussian(M, RANK, seed=seed) @ found.right
        other = found.to_dense() + step + 1e-3 * found.left @ gaussian(RANK, N, seed=seed)
        assert np.linalg.norm((w - other) @ x.T) / len(x) ** 0.5 > error


def test_unit_covariance_is_the_plain_truncation():
    w = weight()
    found, error = lr.weighted_low_rank(w, RANK, covariance=np.eye(N))
    truth = lr.truncated_svd(w).truncate(RANK)
    assert_same_product(truth, found)
    assert abs(error - truth.error) <= 100 * EPS * truth.norm()


@pytest.mark.parametrize("route", [0, 1], ids=["inputs", "covariance"])
@pytest.mark.parametrize("count", [N - 1, 5, 2, 1])
def test_fewer_samples_than_inputs(count, route):
    """A singular second moment: optimal still, and exact once the rank reaches the samples."""
    w, x = weight(), samples(count)
    found, error = lr.weighted_low_rank(w, RANK, **routes(x)[route], rng=0)
    s = np.linalg.svd(w @ x.T / count**0.5, compute_uv=False)
    slack = 1e4 * EPS * s[0] if route == 0 else 10 * np.sqrt(EPS) * s[0]
    assert abs(error - np.linalg.norm(s[RANK:])) <= slack
    made = np.linalg.norm((w - found.to_dense()) @ x.T) / count**0.5
    assert abs(made - error) <= slack
    assert np.all(np.isfinite(found.to_dense()))


def test_zero_covariance():
    found, error = lr.weighted_low_rank(weight(), RANK, covariance=np.zeros((N, N)))
    assert error == 0.0
    assert np.all(np.isfinite(found.to_dense()))


@pytest.mark.parametrize("route", [0, 1], ids=["inputs", "covariance"])
def test_every_library(route, xp):
    w, data = weight(), routes(samples())[route]
    expected, error = lr.weighted_low_rank(w, RANK, **data)
    found, same = lr.weighted_low_rank(
        xp.asarray(w), RANK, **{name: xp.asarray(value) for name, value in data.items()}
    )
    assert_same_product(expected.to_dense(), xp.host(found.to_dense()), tol=1e4 * EPS)
    assert abs(same - error) <= 1e4 * EPS * error


def test_half_precision():
    w, x = weight(np.float16), samples(dtype=np.float16)
    found, _ = lr.weighted_low_rank(w, RANK, inputs=x)
    expected, _ = lr.weighted_low_rank(w.astype(np.float32), RANK, inputs=x.astype(np.float32))
    assert_same_product(expected, found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("count", [SAMPLES, 4])
def test_roots(count, dtype, xp):
    """The Cholesky factor where all eigenvalues are above rounding, eigenvectors elsewhere."""
    c = covariance(samples(count, dtype=dtype).astype(np.result_type(dtype, np.float64)))
    c = c.astype(dtype)
    root = xp.host(covariance_root(xp.asarray(c), N, least=4))
    assert root.shape == (N, min(count, N))
    assert root.dtype == np.result_type(dtype, np.float64)
    rounding = 20 * N * np.finfo(dtype).eps * np.linalg.norm(c, 2)
    assert abs(root @ root.conj().T - c).max() <= rounding
    assert np.array_equal(np.tril(root), root) == (count == SAMPLES)


def test_a_root_of_too_few_samples(xp):
    c = xp.asarray(covariance(samples(4)))
    with pytest.raises(
        ValueError, match="too few samples: moment has rank 4, less than the rank 5"
    ):
        covariance_root(c, N, name="moment", least=5)


@pytest.mark.parametrize("small", [1e-8, 1e-14, 1e-17, 0.0])
def test_roots_of_moments_that_are_almost_singular(small):
    """Whichever way is taken, the error that is reported is the one that is made."""
    q = orthonormal(N, N, np.random.default_rng(5))
    c = (q * np.append(np.full(N - 1, small), 1.0)) @ q.T
    w = weight()
    found, error = lr.weighted_low_rank(w, 1, covariance=(c + c.T) / 2)
    s = np.linalg.svd(w @ q * np.append(np.full(N - 1, small), 1.0) ** 0.5, compute_uv=False)
    slack = 10 * N * EPS**0.5 * s[0]
    assert abs(error - np.linalg.norm(s[1:])) <= slack
    left = lr.output_norm(w - found.to_dense(), covariance=(c + c.T) / 2)
    assert abs(left - error) <= slack


@pytest.mark.parametrize("route", [0, 1], ids=["inputs", "covariance"])
def test_output_norm(route, xp):
    w, x = weight(), samples()
    data = {name: xp.asarray(value) for name, value in routes(x)[route].items()}
    expected = np.linalg.norm(w @ x.T) / len(x) ** 0.5
    f = lr.LowRank(xp.asarray(w), xp.asarray(np.eye(N)))
    for a in (xp.asarray(w), f):
        assert abs(lr.output_norm(a, **data) - expected) <= 1e3 * EPS * expected


NEGATIVE = np.diag([1.0] * (N - 1) + [-0.5])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give exactly one of inputs and covariance"),
        ({"inputs": samples(), "covariance": np.eye(N)}, "give exactly one of"),
        ({"inputs": np.ones((5, N + 1))}, r"inputs must have shape \(N, 9\), got \(5, 10\)"),
        ({"inputs": np.ones(N)}, r"inputs must have shape \(N, 9\), got \(9,\)"),
        ({"covariance": np.ones((N, M))}, r"covariance must have shape \(9, 9\), got \(9, 12\)"),
        ({"covariance": np.ones((M, N))}, r"covariance must have shape \(9, 9\), got \(12, 9\)"),
        ({"inputs": np.ones((0, N))}, "too few samples: inputs must hold at least 1, got 0"),
        ({"covariance": np.triu(np.ones((N, N)))}, "covariance must be Hermitian"),
        ({"covariance": NEGATIVE}, "must be positive semidefinite, got eigenvalue -0.5"),
        ({"inputs": np.full((5, N), np.nan)}, "must be finite"),
        ({"covariance": np.full((N, N), np.nan)}, "covariance must be finite"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(ValueError, match=text):
        lr.weighted_low_rank(weight(), RANK, **options)


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (10, ValueError), (True, TypeError)])
def test_bad_ranks(rank, error):
    with pytest.raises(error, match="rank must be"):
        lr.weighted_low_rank(weight(), rank, covariance=np.eye(N))


@pytest.mark.parametrize("kind", ["inputs", "covariance"])
def test_complex_data_needs_a_complex_matrix(kind):
    data = np.eye(4) + 0j
    with pytest.raises(TypeError, match="w must be complex where its inputs are"):
        lr.weighted_low_rank(gaussian(5, 4), 2, **{kind: data})
