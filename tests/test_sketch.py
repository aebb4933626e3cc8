"""Sketches: streamed, one-pass, positive semidefinite."""

import numpy as np
import pytest
import scipy.sparse
from cases import exact, gaussian, matrix, orthonormal, with_spectrum

import lowrank_sp as lr
from lowrank_sp.testing import assert_same_product

M, N, RANK = 160, 120, 4
DTYPES = [np.float32, np.float64, np.complex128]
ORDERS = {
    "in order": [(0, 50), (50, 120), (120, 160)],
    "backwards": [(120, 160), (50, 120), (0, 50)],
    "single rows": [(i, i + 1) for i in range(M)],
    "with empty blocks": [(0, 0), (0, 160), (160, 160)],
}


def noisy(dtype=np.float64):
    return (matrix("low rank + noise") * 10).astype(dtype)


def stream(a, order="in order", *, rank=RANK, rng=0):
    s = lr.StreamingSVD(a.shape, rank, rng=rng)
    for start, stop in ORDERS[order]:
        s.update(start, a[start:stop])
    return s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_blocks_does_not_matter(order, dtype):
    a = noisy(dtype)
    expected = stream(a).svd()
    found = stream(a, order).svd()
    assert found.u.dtype == dtype
    assert_same_product(expected, found, tol=1e5 * np.finfo(dtype).eps)
    assert abs(found.error / expected.error - 1) <= 1e5 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_add_up(dtype):
    a = noisy(dtype)
    s = stream(0.25 * a)
    s.update(0, a[:100] / 4)
    s.update(60, a[60:] / 2)
    s.update(100, a[100:] / 4)
    s.update(0, a[:60] / 2)
    assert_same_product(stream(a).svd(), s.svd(), tol=1e5 * np.finfo(dtype).eps)


def test_blocks_of_higher_precision_keep_theirs():
    a = noisy()
    s = lr.StreamingSVD(a.shape, RANK, rng=0)
    s.update(0, a[:60].astype(np.float32))
    s.update(60, a[60:])
    assert all(sketch.dtype == np.float64 for sketch in s._sketches)


def test_updates_do_not_copy_the_sketch_of_all_rows():
    s = lr.StreamingSVD((1000, N), RANK, rng=0)
    s.update(0, gaussian(10, N))
    range_ = s._sketches[1]
    s.update(500, gaussian(10, N))
    assert s._sketches[1] is range_


def test_merge_equals_one_pass():
    a = noisy()
    parts = [lr.StreamingSVD(a.shape, RANK, rng=0) for _ in range(3)]
    for part, (start, stop) in zip(parts, ORDERS["in order"], strict=True):
        part.update(start, a[start:stop])
    whole = lr.StreamingSVD(a.shape, RANK, rng=0)
    for part in parts:
        whole.merge(part)
    whole.merge(lr.StreamingSVD(a.shape, RANK, rng=0))
    for mine, one_pass in zip(whole._sketches, stream(a)._sketches, strict=True):
        assert_same_product(one_pass, mine)
    assert_same_product(stream(a).svd(), whole.svd(), tol=1e5 * np.finfo(float).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(M, N), (N, M), (M, 3), (3, N), (5, 5)])
def test_low_rank_is_reproduced(shape, dtype):
    r = min(3, *shape)
    a = gaussian(shape[0], r, dtype=dtype) @ gaussian(r, shape[1], seed=1, dtype=dtype)
    s = lr.StreamingSVD(shape, r, rng=0)
    s.update(0, a)
    f = s.svd()
    tol = 1000 * np.finfo(dtype).eps
    assert_same_product(a, f, tol=tol)
    assert f.error <= tol * np.linalg.norm(a)
    for gram in (f.u.conj().T @ f.u, f.vh @ f.vh.conj().T):
        assert abs(gram - np.eye(r)).max() <= tol


def test_error_is_near_the_optimum():
    a = matrix("exp(-j/5)")
    errors = [
        np.linalg.norm(a - stream(a, rank=10, rng=seed).svd().to_dense()) for seed in range(10)
    ]
    # Tropp et al., theorem 5.1 with k = 4 r + 1 and s = 2 k + 1, at its best split of the ranks.
    assert np.mean(errors) <= 2 * np.linalg.norm(exact(a)[10:])


@pytest.mark.parametrize("name", ["slow", "low rank + noise"])
def test_error_estimate_is_unbiased_in_its_square(name):
    a = matrix(name)
    found = [stream(a, rng=seed) for seed in range(40)]
    true = [np.linalg.norm(a - s.svd().to_dense()) for s in found]
    ratios = np.array([s.error_estimate() for s in found]) ** 2 / np.square(true)
    # Ten probes: standard deviation at most sqrt(2 / 10) each, so their mean of 40 is within 4 of
    # its own.
    assert abs(ratios.mean() - 1) <= 4 * np.sqrt(2 / 10) / np.sqrt(len(ratios))
    assert ratios.std() <= 2 * np.sqrt(2 / 10)


def test_zero_stream():
    s = lr.StreamingSVD((20, 10), 2, rng=0)
    s.update(0, np.zeros((20, 10)))
    f = s.svd()
    assert (f.rank, f.norm(), f.error) == (2, 0.0, 0.0)
    assert_same_product(np.eye(2), f.u.T @ f.u)


def test_stream_on_every_library(xp):
    a = noisy()[:40, :30]
    streams = [lr.StreamingSVD(a.shape, 3, rng=0) for _ in range(2)]
    for s, convert in zip(streams, (np.asarray, xp.asarray), strict=True):
        s.update(0, convert(a))
    expected, found = (s.svd() for s in streams)
    assert_same_product(
        expected.to_dense(), xp.host(found.to_dense()), tol=1e5 * np.finfo(float).eps
    )


def test_half_precision_stream():
    a = noisy(np.float16)
    f = stream(a).svd()
    assert f.u.dtype == np.float32
    tol = 1e5 * np.finfo(np.float32).eps
    assert_same_product(stream(a.astype(np.float32)).svd(), f, tol=tol)


def seen():
    return stream(noisy())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lr.StreamingSVD((5, 4), 0), r"rank must be in 1\.\.4 for shape 5 x 4, got 0"),
        (lambda: lr.StreamingSVD((5, 4), 5), r"rank must be in 1\.\.4 for shape 5 x 4, got 5"),
        (lambda: lr.StreamingSVD((5, 4), 1).svd(), "nothing was seen yet; call update first"),
        (lambda: seen().update(0, np.ones((2, 3))), r"must have shape \(rows, 120\), got \(2, 3\)"),
        (lambda: seen().update(0, np.ones(120)), r"must have shape \(rows, 120\), got \(120,\)"),
        (lambda: seen().update(159, np.ones((2, N))), r"rows must lie in 0\.\.160, got 159\.\.161"),
        (lambda: seen().update(-1, np.ones((2, N))), r"rows must lie in 0\.\.160, got -1\.\.1"),
        (lambda: seen().update(0, np.full((1, N), np.nan)), r"must be finite, got NaN or inf in"),
        (lambda: seen().merge(lr.StreamingSVD((M, N), RANK, rng=1)), "only sketches of one shape"),
        (lambda: seen().merge(lr.StreamingSVD((M, N), 5, rng=0)), "only sketches of one shape"),
    ],
)
def test_stream_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# -- one pass, two sides --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(M, N), (N, M), (6, 5)])
def test_generalized_nystrom_reproduces_low_rank(shape, dtype):
    a = gaussian(shape[0], 3, dtype=dtype) @ gaussian(3, shape[1], seed=1, dtype=dtype)
    for rank in (3, 5):
        f = lr.generalized_nystrom(a, rank, rng=0)
        assert f.rank <= rank
        assert_same_product(a, f, tol=1e4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["exp(-j/5)", "1/j^2", "graded 1..1e-9"])
def test_generalized_nystrom_is_near_the_optimum(name):
    a, rank = matrix(name), 20
    errors = [
        np.linalg.norm(a - lr.generalized_nystrom(a, rank, rng=seed).to_dense())
        for seed in range(10)
    ]
    # Nakatsukasa, (1.3): a factor sqrt(1 + r / (l - 1)) of the sketched error of fewer columns.
    least = np.linalg.norm(exact(a)[rank // 2 :])
    assert np.median(errors) <= 10 * least + 1e4 * np.finfo(float).eps


def test_generalized_nystrom_on_every_library(xp):
    a = matrix("exp(-j/5)")
    expected = lr.generalized_nystrom(a, 5, rng=0).to_dense()
    found = lr.generalized_nystrom(xp.asarray(a), 5, rng=0).to_dense()
    assert_same_product(expected, xp.host(found), tol=1e5 * np.finfo(float).eps)


def test_generalized_nystrom_of_zero():
    assert lr.generalized_nystrom(np.zeros((6, 5)), 2, rng=0).norm() == 0.0


# -- positive semidefinite --


def definite(values, dtype=np.float64):
    complex_ = np.issubdtype(dtype, np.complexfloating)
    q = orthonormal(len(values), len(values), np.random.default_rng(0), complex_)
    a = (q * values) @ q.conj().T
    return ((a + a.conj().T) / 2).astype(dtype)


VALUES = {
    "1/j^2": 1.0 / np.arange(1, 101) ** 2,
    "exp": np.exp(-np.arange(100) / 3),
    "flat": np.ones(100),
    "rank 3": np.where(np.arange(100) < 3, 2.0, 0.0),
    "zero": np.zeros(100),
    "large": 1e150 / np.arange(1, 101),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in VALUES
        for dtype in DTYPES
        if (name, dtype) != ("large", np.float32)
    ],
)
def test_nystrom_never_exceeds_the_eigenvalues(name, dtype):
    values, rank = VALUES[name], 8
    f = lr.nystrom(definite(values, dtype), rank, rng=0)
    eps = np.finfo(dtype).eps
    noise = 20 * eps * np.linalg.norm(values)
    assert np.all(f.s <= values[:rank] + noise)
    assert np.all(f.s >= 0)
    assert abs(f.u.conj().T @ f.u - np.eye(rank)).max() <= 40 * eps
    assert abs(f.vh - f.u.conj().T).max() <= 40 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_nystrom_reproduces_low_rank(dtype):
    a = definite(VALUES["rank 3"], dtype)
    f = lr.nystrom(a, 3, rng=0)
    assert_same_product(a, f, tol=1000 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["1/j^2", "exp", "flat"])
def test_nystrom_error_estimate(name):
    a = definite(VALUES[name])
    found = [lr.nystrom(a, 8, rng=seed) for seed in range(20)]
    true = [np.linalg.norm(a - f.to_dense()) for f in found]
    assert abs(np.mean([f.error for f in found]) / np.mean(true) - 1) <= 0.3


def test_nystrom_of_every_column_is_exact():
    a = definite(VALUES["1/j^2"][:20])
    f = lr.nystrom(a, 20, rng=0)
    assert_same_product(a, f, tol=1000 * np.finfo(float).eps)


def test_nystrom_on_every_library(xp):
    a = definite(VALUES["exp"])
    expected, found = lr.nystrom(a, 6, rng=0), lr.nystrom(xp.asarray(a), 6, rng=0)
    eps = np.finfo(float).eps
    assert_same_product(expected.to_dense(), xp.host(found.to_dense()), tol=1e5 * eps)
    assert abs(found.error / expected.error - 1) <= np.sqrt(eps)


def test_nystrom_of_a_sparse_matrix():
    a = scipy.sparse.diags_array(VALUES["1/j^2"])
    assert_same_product(
        lr.nystrom(a.toarray(), 5, rng=0), lr.nystrom(a, 5, rng=0), tol=1e5 * np.finfo(float).eps
    )


@pytest.mark.parametrize(
    ("a", "text"),
    [
        (-np.eye(5), "must be positive semidefinite, got a Rayleigh quotient of -1"),
        (np.diag([1.0, -0.5, 1.0, 1.0]), "must be positive semidefinite"),
        (np.ones((4, 3)), r"a must be square, got shape \(4, 3\)"),
        (np.full((4, 4), np.nan), "must be finite"),
    ],
)
def test_nystrom_refusals(a, text):
    with pytest.raises(ValueError, match=text):
        lr.nystrom(a, 2, rng=0)


@pytest.mark.parametrize("function", [lr.nystrom, lr.generalized_nystrom])
@pytest.mark.parametrize("rank", [0, 6, -1])
def test_bad_ranks(function, rank):
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.5 for shape 5 x 5"):
        function(np.eye(5), rank)


def test_seeds():
    a = with_spectrum(1.0 / np.arange(1, 31), 40, 30)
    for function in (lr.generalized_nystrom, lambda a, r, rng: lr.nystrom(a.T @ a, r, rng=rng)):
        one, same, other = (function(a, 3, rng=seed).to_dense() for seed in (0, 0, 1))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("function", [lr.nystrom, lr.generalized_nystrom])
def test_oversampling_is_not_negative(function):
    with pytest.raises(ValueError, match="oversampling must be at least 0, got -2"):
        function(np.eye(20), 10, oversampling=-2)
