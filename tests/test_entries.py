"""Laws of observed entries: products, samples, least squares, and what they identify."""

import jax
import numpy as np
import pytest
import scipy.sparse
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import lowrank_sp as lr
from lowrank_sp._arrays import adjoint, eps, to_host
from lowrank_sp.inverse import Entries, Pattern, completion, synthetic
from lowrank_sp.inverse._compiled import Compiled
from lowrank_sp.inverse._kernels import Portable
from lowrank_sp.testing import assert_adjoint

M, N, R = 40, 30, 3
DTYPES = [np.float32, np.float64, np.complex128]
RNG = np.random.default_rng(0)
#: Lines of every length from none to full, so that buckets and panels of all sizes occur.
MASK = RNG.random((M, N)) < np.linspace(0.05, 0.9, M)[:, None]
MASK[4], MASK[:, 7], MASK[-1] = False, False, True


def gaussian(*shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def close(a, b, factor=100):
    a, b = to_host(a), np.asarray(b)
    size = max(np.abs(b).max(initial=0.0), 1e-300)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.abs(a - b).max(initial=0.0) <= factor * np.finfo(b.dtype).eps * size


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def data(request):
    """A matrix, its observed entries as a sparse matrix made dense, and two factors."""
    dtype = request.param
    x = gaussian(M, N, dtype=dtype)
    left, right = gaussian(M, R, dtype=dtype, seed=1), gaussian(R, N, dtype=dtype, seed=2)
    return x, np.where(MASK, x, 0), left, right


def entries_of(data, xp):
    return Entries.from_mask(xp.asarray(data[0]), MASK)


# -- kernels --


def test_products(data, xp):
    _, s, left, right = data
    entries = entries_of(data, xp)
    x = xp.asarray(right.T)
    close(entries @ x, s @ right.T)
    close(entries.rmatmul(xp.asarray(left)), s.conj().T @ left)
    close(entries @ x[:, 0], (s @ right.T)[:, 0])
    close(entries @ x[:, :0], np.zeros((M, 0), s.dtype))
    close(entries.mT @ xp.asarray(left), s.T @ left)
    close(entries.to_dense(), s)
    assert_adjoint(entries)
    assert abs(entries.norm() - np.linalg.norm(s)) <= 10 * eps(s.dtype) * np.linalg.norm(s)


def test_samples(data, xp):
    x, _, left, right = data
    entries = entries_of(data, xp)
    factors = lr.LowRank(xp.asarray(left), xp.asarray(right))
    expected = (left @ right)[MASK]
    close(entries.sampled(factors.left, factors.right), expected)
    close(entries.sample(factors), expected)
    close(entries.sample(factors.svd()), expected, 1000)
    close(entries.sample(xp.asarray(x)), x[MASK])
    assert type(entries.values) is type(xp.asarray(x))


def normal_equations(data, ridge, mask=MASK):
    """Row by row, in double precision, and the squares that are left before."""
    wide = np.result_type(data[0].dtype, np.float64)
    x, _, left, right = (a.astype(wide) for a in data)
    grams = np.stack([right[:, o].conj() @ right[:, o].T for o in mask])
    sides = np.stack([right[:, o].conj() @ row[o] for o, row in zip(mask, x, strict=True)])
    unit = np.eye(len(right))
    solved = np.linalg.solve(grams + ridge[:, None, None] * unit, sides[:, :, None])
    return grams, solved[:, :, 0], np.sum(abs((x - left @ right)[mask]) ** 2)


def test_least_squares(data, xp):
    x, _, left, right = data
    entries = entries_of(data, xp)
    ridge = np.linspace(0.5, 1.5, M).astype(np.finfo(x.dtype).dtype)
    grams, solved, squares = normal_equations(data, ridge)
    close(entries.grams(xp.asarray(right)), grams.astype(x.dtype))
    new, before = entries.least_squares(xp.asarray(left), xp.asarray(right), xp.asarray(ridge))
    close(new, solved.astype(x.dtype), 1000)
    assert abs(before - squares) <= 100 * eps(x.dtype) * squares


def test_least_squares_leaves_no_residual_along_the_factors(data, xp):
    _, _, left, right = data
    entries = entries_of(data, xp)
    left, right = xp.asarray(left), xp.asarray(right)
    # Corrections, so a second time removes the rounding of the first.
    for _ in range(2):
        left, squares = entries.least_squares(left, right)
    residual = entries.with_values(entries.values - entries.sampled(left, right))
    along = residual @ adjoint(right)
    assert np.abs(to_host(along)).max() <= 1000 * eps(left.dtype) * squares**0.5


def test_an_empty_row_keeps_its_factor(xp):
    data = (gaussian(M, N), None, gaussian(M, R, seed=1), gaussian(R, N, seed=2))
    entries, left, right = entries_of(data, xp), xp.asarray(data[2]), xp.asarray(data[3])
    close(entries.least_squares(left, right)[0][4, :], data[2][4])
    penalized = to_host(entries.least_squares(left, right, 1.0)[0][4, :])
    assert np.abs(penalized).max() <= eps(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_portable_kernels_agree(dtype, monkeypatch):
    # Small panels and buckets, so that lines are split and several buckets are needed.
    monkeypatch.setattr("lowrank_sp.inverse._kernels._CHUNK", 50)
    monkeypatch.setattr("lowrank_sp.inverse._kernels._BUCKET", 64)
    m, n, r = 12, 700, 5
    rng = np.random.default_rng(3)
    entries = Entries.from_mask(gaussian(m, n, dtype=dtype), rng.random((m, n)) < 0.7)
    left, right = gaussian(m, r, dtype=dtype, seed=4), gaussian(r, n, dtype=dtype, seed=5)
    values, real = entries.values, np.finfo(dtype).dtype
    ridge = np.ones(m, real)
    portable, compiled = Portable(entries.pattern, values), Compiled(entries.pattern)
    close(portable.matmul(values, right.T), compiled.matmul(values, right.T))
    close(portable.rmatmul(values, left), compiled.rmatmul(values, left))
    close(portable.sampled(left, right), compiled.sampled(left, right))
    close(portable.grams(right), compiled.grams(right))
    ours, theirs = (k.least_squares(values, left, right, ridge) for k in (portable, compiled))
    close(ours[0], theirs[0], 1000)
    assert abs(ours[1] - theirs[1]) <= 100 * eps(dtype) * ours[1]


def test_portable_kernels_of_every_library(xp):
    # Host arrays take the compiled path elsewhere; on other devices this is the only one.
    mask = (np.arange(9)[:, None] + np.arange(6)) % 3 > 0
    mask[4] = False
    x, left, right = gaussian(9, 6), gaussian(9, 2, seed=1), gaussian(2, 6, seed=2)
    s = np.where(mask, x, 0)
    values, u, v, ridge = (xp.asarray(a) for a in (x[mask], left, right, np.ones(9)))
    kernels = Portable(Pattern.sort(*np.nonzero(mask), mask.shape)[0], values)
    close(kernels.matmul(values, v.mT), s @ right.T)
    close(kernels.rmatmul(values, u), s.T @ left)
    close(kernels.sampled(u, v), (left @ right)[mask])
    grams, solved, squares = normal_equations((x, s, left, right), np.ones(9), mask)
    close(kernels.grams(v), grams)
    new, before = kernels.least_squares(values, u, v, ridge)
    close(new, solved, 1000)
    assert abs(before - squares) <= 100 * eps(np.float64) * squares


def test_threads_share_the_lines(monkeypatch):
    monkeypatch.setattr("lowrank_sp.inverse._compiled._SERIAL", 0)
    monkeypatch.setattr("lowrank_sp._threads.count", lambda: 3)
    monkeypatch.setattr("lowrank_sp.inverse._compiled.count", lambda: 3)
    x, left, right = gaussian(M, N), gaussian(M, R, seed=1), gaussian(R, N, seed=2)
    entries, s = Entries.from_mask(x, MASK), np.where(MASK, x, 0)
    close(entries @ right.T, s @ right.T)
    close(entries.rmatmul(left), s.T @ left)
    close(entries.sampled(left, right), (left @ right)[MASK])


def test_which_kernels_run():
    assert isinstance(Entries.from_mask(gaussian(M, N), MASK)._kernels, Compiled)
    for library in (lambda a: torch.asarray(a), jax.numpy.asarray):
        kernels = Entries.from_mask(library(gaussian(M, N)), MASK)._kernels
        assert type(kernels).__name__ == "OnHost"


def test_without_numba(monkeypatch):
    monkeypatch.setattr("lowrank_sp.inverse._kernels.has_numba", lambda: False)
    entries = Entries.from_mask(gaussian(M, N), MASK)
    assert isinstance(entries._kernels, Portable)
    close(entries.to_dense(), np.where(MASK, gaussian(M, N), 0))


# -- making entries --


def test_all_constructors_agree(xp):
    x = gaussian(M, N)
    rows, cols = np.nonzero(MASK)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = Entries(rows[order], cols[order], xp.asarray(x[rows, cols][order]), (M, N))
    masked = Entries.from_mask(xp.asarray(x), MASK)
    missing = Entries.from_nan(xp.asarray(np.where(MASK, x, np.nan)))
    for entries in (shuffled, masked, missing):
        assert np.array_equal(entries.rows, rows)
        assert np.array_equal(entries.cols, cols)
        assert np.array_equal(to_host(entries.values), x[MASK])
        assert (entries.shape, entries.size) == ((M, N), len(rows))


def test_from_sparse_keeps_explicit_zeros():
    a = scipy.sparse.csr_array(([1.0, 0.0], ([0, 2], [1, 0])), shape=(3, 2))
    entries = Entries.from_sparse(a)
    assert (entries.size, list(entries.rows), list(entries.cols)) == (2, [0, 2], [1, 0])


def test_positions_are_owned():
    rows, cols = np.array([0, 1]), np.array([1, 0])
    entries = Entries(rows, cols, np.ones(2), (2, 2))
    rows[0] = 1
    assert entries.rows[0] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.bool_])
def test_values_become_the_compute_dtype(dtype):
    entries = Entries([0, 1], [0, 1], np.ones(2, dtype), (2, 2))
    assert entries.dtype == (np.float32 if dtype == np.float16 else np.float64)


def test_transpose_and_selection(xp):
    x = gaussian(M, N)
    entries = Entries.from_mask(xp.asarray(x), MASK)
    turned = entries.mT
    assert np.array_equal(turned.rows, np.nonzero(MASK.T)[0])
    assert np.array_equal(to_host(turned.values), x.T[MASK.T])
    assert np.array_equal(to_host(turned.mT.values), x[MASK])
    chosen = np.arange(entries.size) % 3 == 0
    part = entries.select(chosen)
    assert np.array_equal(to_host(part.values), x[MASK][chosen])
    kept, withheld = entries.split(0.25, rng=0)
    assert withheld.size == round(0.25 * entries.size)
    assert kept.size + withheld.size == entries.size
    close(kept.to_dense() + withheld.to_dense(), np.where(MASK, x, 0), 1)


def test_relative_residual():
    x = gaussian(M, N)
    entries = Entries.from_mask(x, MASK)
    assert entries.relative_residual(x) == 0.0
    assert abs(entries.relative_residual(1.5 * x) - 0.5) <= 1e-15
    assert entries.with_values(entries.values * 0).relative_residual(x) == np.inf


ONE = np.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Entries([0, 0], [1, 1], np.ones(2), (2, 2)), ValueError, r"got \(0, 1\) more"),
        (lambda: Entries([2], [0], ONE, (2, 2)), ValueError, r"row indices must be in 0\.\.1"),
        (lambda: Entries([0], [-1], ONE, (2, 2)), ValueError, r"column indices .* got -1"),
        (lambda: Entries([0.0], [0], ONE, (2, 2)), TypeError, "one-dimensional integer array"),
        (lambda: Entries([0], [0, 1], ONE, (2, 2)), ValueError, "equally long, got 1 and 2"),
        (lambda: Entries([0], [0], np.ones(2), (2, 2)), ValueError, r"shape \(1,\)"),
        (lambda: Entries([0], [0], [1.0], (2, 2)), ValueError, "got list"),
        (lambda: Entries([0], [0], ONE * np.nan, (2, 2)), ValueError, "got NaN or inf"),
        (lambda: Entries([0], [0], ONE * np.inf, (2, 2)), ValueError, "got NaN or inf"),
        (lambda: Entries.from_mask(np.ones((2, 2)), np.ones((2, 2))), ValueError, "boolean"),
        (lambda: Entries.from_mask(np.ones((2, 2)), np.ones(2, bool)), ValueError, "of the shape"),
        (lambda: Entries([0], [0], ONE, (2, 2)).split(0.0), ValueError, r"in \(0, 1\), got 0.0"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


# -- identifiability --


def pattern_of(*rows):
    mask = np.array([[c == "x" for c in row] for row in rows])
    return Pattern.sort(*np.nonzero(mask), mask.shape)[0]


def test_short_lines_are_reported():
    report = pattern_of("xxx", "x..", "xxx", "xxx").check_identifiable(2)
    assert list(report.short_rows) == [1]
    assert list(report.lost_rows) == [1]
    assert len(report.lost_columns) == 0
    assert not report.complete
    assert "row 1 with fewer than 2 entries" in str(report)


def test_lines_that_depend_on_short_ones_are_lost():
    # Without row 0 the first column has one entry, and then row 1 has one.
    report = pattern_of("x....", "xx...", ".xxxx", ".xxxx", "..xxx").check_identifiable(2)
    assert list(report.short_rows) == [0]
    assert list(report.lost_rows) == [0, 1]
    assert list(report.lost_columns) == [0]


def test_parts_are_reported_and_the_largest_is_kept():
    pattern = pattern_of("xx...", "xx...", "..xxx", "..xxx")
    report = pattern.check_identifiable(1)
    assert report.components == 2
    assert list(report.lost_rows) == [0, 1]
    assert "2 parts that no entry connects" in str(report)
    rows, cols = pattern.core(1, connected=False)
    assert rows.all()
    assert cols.all()


def test_too_few_entries_for_the_unknowns():
    report = pattern_of("xx.", ".xx", "x.x").check_identifiable(2)
    assert (report.size, report.dof) == (6, 8)
    assert str(report) == "6 entries for 8 degrees of freedom"


def test_a_full_pattern_is_complete():
    report = pattern_of("xxx", "xxx", "xxx").check_identifiable(2)
    assert report.complete
    assert str(report) == "every line has the entries that rank 2 needs"


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 3)])
def test_no_entries(shape):
    none = np.zeros(0, int)
    entries = Entries(none, none, np.zeros(0), shape)
    assert not entries.check_identifiable(1).complete
    close(entries.to_dense(), np.zeros(shape))


def blas_threads():
    return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}


def test_blas_leaves_the_cores_to_compiled_kernels(monkeypatch):
    monkeypatch.setattr("lowrank_sp.inverse._compiled._LARGE", 0)
    problem = synthetic.completion(shape=(30, 25), rank=1, rng=0)
    with threadpool_limits(3, user_api="blas"):
        before, seen = blas_threads(), []

        def callback(*_):
            seen.append(blas_threads())
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            completion.als(problem.entries, rank=1, rng=0, callback=callback)
        assert seen == [{1}, {1}]
        assert blas_threads() == before
