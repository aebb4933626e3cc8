"""Laws of tensor trains: format, decomposition, rounding, cross approximation, matrices."""

import numpy as np
import pytest
import tensorly as tl
from cases import gaussian
from conftest import Backend
from tensorly.decomposition import tensor_train

import lowrank_sp as lr
from lowrank_sp import Stop, tensors
from lowrank_sp.tensors import TT, TTMatrix
from lowrank_sp.testing import assert_adjoint

DTYPES = [np.float32, np.float64, np.complex128]
NUMPY = Backend("numpy", np.asarray)
EPS64 = np.finfo(np.float64).eps


def wide(a):
    return np.asarray(a).astype(np.result_type(a, np.float64))


def random_train(shape, rank, *, decay=0.0, dtype=np.float64, seed=0):
    """Gaussian cores whose bonds are scaled by ``j^-decay``, of norm about 1."""
    bonds = [1, *[rank] * (len(shape) - 1), 1] if isinstance(rank, int) else rank
    cores = []
    for k, n in enumerate(shape):
        scale = np.arange(1.0, bonds[k] + 1) ** -decay / np.sqrt(n * bonds[k])
        core = gaussian(bonds[k], n, bonds[k + 1], dtype=dtype, seed=seed + k)
        cores.append((core * scale[:, None, None]).astype(dtype))
    return TT(cores)


def moved(xp, t):
    return t.map(xp.asarray)


def multiplied(cores):
    whole = np.ones((1, 1))
    for c in cores:
        whole = (whole @ c.reshape(c.shape[0], -1)).reshape(-1, c.shape[-1])
    return whole.reshape([c.shape[1] for c in cores])


def dense(xp, t):
    """A train on the host, multiplied out in double precision."""
    return multiplied([wide(xp.host(c)) for c in t.cores])


def tails(x, ranks):
    """What the best truncation of each unfolding ``(n_1 ... n_k, n_(k+1) ... n_N)`` loses."""
    lost = []
    for k in range(1, x.ndim):
        s = np.linalg.svd(wide(x).reshape(int(np.prod(x.shape[:k])), -1), compute_uv=False)
        lost.append(np.linalg.norm(s[ranks[k] :]))
    return np.array(lost)


def near(a, b, dtype, size=None):
    size = np.linalg.norm(b) if size is None else size
    return np.linalg.norm(a - b) <= 100 * np.finfo(dtype).eps * size


def noisy(shape, rank, noise=0.1, dtype=np.float64):
    x = random_train(shape, rank, dtype=dtype).to_dense()
    e = gaussian(*shape, dtype=dtype, seed=9)
    return (x + noise * np.linalg.norm(x) / np.linalg.norm(e) * e).astype(dtype)


def left_orthogonal(xp, core):
    matrix = wide(xp.host(core)).reshape(-1, core.shape[2])
    return abs(matrix.conj().T @ matrix - np.eye(matrix.shape[1])).max()


def right_orthogonal(xp, core):
    matrix = wide(xp.host(core)).reshape(core.shape[0], -1)
    return abs(matrix @ matrix.conj().T - np.eye(matrix.shape[0])).max()


# -- decomposition --

CASES = {
    "order 3": lambda dtype: noisy((12, 11, 10), 3, dtype=dtype),
    "order 5": lambda dtype: noisy((4, 5, 3, 4, 5), 3, dtype=dtype),
    "first mode longest": lambda dtype: noisy((30, 4, 6), 3, dtype=dtype),
    "last mode longest": lambda dtype: noisy((5, 4, 40), 3, dtype=dtype),
    "matrix": lambda dtype: noisy((20, 30), 4, dtype=dtype),
    "vector": lambda dtype: gaussian(9, dtype=dtype),
    "modes of size 1": lambda dtype: noisy((1, 8, 1, 7, 1), (1, 1, 3, 3, 1, 1), dtype=dtype),
    "gaussian": lambda dtype: gaussian(6, 7, 8, dtype=dtype),
}


def check_tt(xp, x, t):
    """The error that is promised, and cores that are orthogonal but for one."""
    eps = np.finfo(x.dtype).eps
    error, size = np.linalg.norm(wide(x) - dense(xp, t)), np.linalg.norm(wide(x))
    assert t.shape == x.shape
    assert abs(error - t.error) <= 50 * eps * size + 1e-6 * error
    from_left = [left_orthogonal(xp, c) <= 50 * eps for c in t.cores[:-1]]
    from_right = [right_orthogonal(xp, c) <= 50 * eps for c in t.cores[1:]]
    assert all(from_left) or all(from_right)
    return error


def check_bounds(xp, x):
    t = tensors.tt_svd(xp.asarray(x), 3 if x.ndim > 1 else 1)
    error = check_tt(xp, x, t)
    lost, slack = tails(x, t.rank), 50 * np.finfo(x.dtype).eps * np.linalg.norm(x)
    assert error <= np.linalg.norm(lost) * (1 + 1e-5) + slack
    assert error >= lost.max(initial=0.0) - slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_error_within_the_bounds_of_every_bond(case, dtype):
    check_bounds(NUMPY, CASES[case](dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_within_the_bounds_in_every_library(dtype, xp):
    check_bounds(xp, CASES["order 5"](dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_exact(case, dtype):
    x = CASES[case](dtype)
    t = tensors.tt_svd(x)
    assert check_tt(NUMPY, x, t) <= 100 * np.finfo(dtype).eps * np.linalg.norm(x)
    for k, r in enumerate(t.rank):
        assert r == min(np.prod(x.shape[:k]), np.prod(x.shape[k:]))


@pytest.mark.parametrize("tol", [0.3, 0.02, 1e-5, 1e-9])
@pytest.mark.parametrize("decay", [0.0, 3.0, 8.0])
def test_tolerance_is_respected_and_used(decay, tol):
    x = random_train((9, 8, 7, 10), 7, decay=decay).to_dense()
    size = np.linalg.norm(x)
    t = tensors.tt_svd(x, tol=tol)
    assert check_tt(NUMPY, x, t) <= tol * size
    for k in range(1, 4):
        fewer = [r - 1 if j == k else 10**9 for j, r in enumerate(t.rank)]
        assert t.rank[k] == 1 or tails(x, fewer)[k - 1] > 0.99 * tol * size / 3**0.5


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda x: x[::-1].copy()[::-1]])
@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 5), (8, 7, 6)])
def test_layouts(layout, shape):
    x = noisy(shape, 3)
    t = tensors.tt_svd(layout(x), 3)
    assert check_tt(NUMPY, x, t) <= 1.1 * tensors.tt_svd(x, 3).error


def test_tolerance_in_every_library(xp):
    x = random_train((6, 7, 8), 6, decay=6.0).to_dense()
    t = tensors.tt_svd(xp.asarray(x), tol=1e-3)
    assert check_tt(xp, x, t) <= 1e-3 * np.linalg.norm(x)
    assert t.rank == tensors.tt_svd(x, tol=1e-3).rank


def test_agrees_with_tensorly():
    x, ranks = noisy((6, 12, 13, 14), 4), (1, 4, 5, 3, 1)
    theirs = tl.tt_to_tensor(tensor_train(x, list(ranks)))
    t = tensors.tt_svd(x, ranks)
    assert abs(t.error - np.linalg.norm(x - theirs)) <= 1e-9 * t.error
    assert np.linalg.norm(t.to_dense() - theirs) <= 1e-6 * t.error
    # They go from the left; from the right, where the last mode is the shortest.
    mirrored = tensors.tt_svd(np.transpose(x), ranks[::-1])
    assert np.linalg.norm(np.transpose(mirrored.to_dense()) - theirs) <= 1e-6 * t.error


def test_errors_are_right_below_the_root_of_eps():
    x = noisy((12, 13, 14), 4, noise=1e-11)
    t = tensors.tt_svd(x, 4)
    truth = np.linalg.norm(x - t.to_dense())
    assert truth < 1e-9
    assert abs(t.error - truth) <= 1e-3 * truth


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e300), (np.float64, 1e-300), (np.float32, 1e30)]
)
def test_extreme_scales(dtype, scale):
    x = noisy((6, 7, 8), 3, dtype=dtype)
    expected, found = tensors.tt_svd(x, 3), tensors.tt_svd(x * dtype(scale), 3)
    assert abs(found.error / scale - expected.error) <= 1e-5 * np.linalg.norm(x)


def test_zero_tensor(xp):
    zero = xp.asarray(np.zeros((4, 5, 6)))
    for t in (tensors.tt_svd(zero, 2), tensors.tt_svd(zero, tol=0.1)):
        assert t.error == 0.0
        assert not dense(xp, t).any()
    assert t.rank == (1, 1, 1, 1)
    assert tensors.tt_round(t + t, tol=0.1).rank == (1, 1, 1, 1)


def test_matrices_agree_with_the_truncated_svd():
    x = noisy((30, 20), 5)
    f, t = lr.truncated_svd(x, 4), tensors.tt_svd(x, 4)
    assert np.linalg.norm(t.to_dense() - f.to_dense()) <= 1e-7


# -- the format --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 4), (7,)])
def test_algebra_is_that_of_the_dense_tensors(shape, dtype):
    check_algebra(NUMPY, shape, dtype)


def test_algebra_in_every_library(xp):
    check_algebra(xp, (5, 4, 6), np.complex128)


def check_algebra(xp, shape, dtype):
    a, b = random_train(shape, 3, dtype=dtype), random_train(shape, 2, dtype=dtype, seed=5)
    x, y = dense(NUMPY, a), dense(NUMPY, b)
    s, t = moved(xp, a), moved(xp, b)
    assert near(xp.host(s.to_dense()), x, dtype)
    for found, truth in (
        (s + t, x + y),
        (s - 2.5 * t, x - 2.5 * y),
        (s.hadamard(t), x * y),
        (s[1:3], x[1:3]),
    ):
        assert near(dense(xp, found), truth, dtype)
    assert abs(s.norm() - np.linalg.norm(x)) <= 100 * np.finfo(dtype).eps * np.linalg.norm(x)
    bound = 100 * np.finfo(dtype).eps * np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(complex(s.inner(t)) - np.vdot(x, y)) <= bound
    indices = np.argwhere(np.ones(x.shape))[::3]
    assert near(xp.host(s.sample(indices)), x[tuple(indices.T)], dtype)


def test_norm_of_a_difference_keeps_its_digits(xp):
    a, step = random_train((5, 6, 4), 3), 1e-12 * random_train((5, 6, 4), 2, seed=7)
    difference = (moved(xp, a + step) - moved(xp, a)).norm()
    assert abs(difference - step.norm()) <= 100 * EPS64 * a.norm()


def check_canonical(xp, center, dtype):
    a = random_train((5, 4, 6, 3), (1, 3, 4, 2, 1), dtype=dtype)
    x, eps = dense(NUMPY, a), np.finfo(dtype).eps
    t = moved(xp, a).canonical(center)
    assert near(dense(xp, t), x, dtype)
    for k, core in enumerate(t.cores):
        if k < center:
            assert left_orthogonal(xp, core) <= 50 * eps
        if k > center:
            assert right_orthogonal(xp, core) <= 50 * eps
    assert abs(np.linalg.norm(xp.host(t.cores[center])) - np.linalg.norm(x)) <= 100 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", range(4))
def test_canonical_gauge(center, dtype):
    check_canonical(NUMPY, center, dtype)


def test_canonical_gauge_in_every_library(xp):
    check_canonical(xp, 2, np.complex128)


@pytest.mark.parametrize("center", range(3))
def test_canonical_gauge_is_one_for_all_cores_of_a_tensor(center):
    a = random_train((5, 6, 4), (1, 3, 2, 1))
    mixed = [gaussian(r, r, seed=r) for r in a.rank[1:-1]]
    g = [np.eye(1), *mixed, np.eye(1)]
    cores = [
        np.einsum("ab,bic,cd->aid", np.linalg.inv(g[k]), c, g[k + 1]) for k, c in enumerate(a.cores)
    ]
    for u, v in zip(a.canonical(center), TT(cores).canonical(center), strict=True):
        assert abs(u - v).max() <= 1e-10


def test_tensorly_and_back():
    a = random_train((5, 4, 6), 3)
    theirs = a.to_tensorly()
    assert near(theirs.to_tensor(), a.to_dense(), np.float64)
    back = TT.from_tensorly(theirs)
    assert all(x is y for x, y in zip(back, a, strict=True))
    assert (a.ndim, a.shape, a.rank, a.parameters) == (3, (5, 4, 6), (1, 3, 3, 1), 15 + 36 + 18)


# -- rounding --


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_removes_what_is_superfluous(dtype, xp):
    a = random_train((6, 5, 7, 6), 3, dtype=dtype)
    s = moved(xp, a + 2.0 * a)
    for t in (tensors.tt_round(s), tensors.tt_round(s, 3)):
        assert t.rank == a.rank
        assert near(dense(xp, t), 3.0 * dense(NUMPY, a), dtype)


@pytest.mark.parametrize("tol", [0.2, 1e-3, 1e-9])
def test_rounding_to_a_tolerance(tol, xp):
    a = random_train((6, 7, 8, 9), 8, decay=5.0)
    t = tensors.tt_round(moved(xp, a), tol=tol)
    error = np.linalg.norm(dense(xp, t) - dense(NUMPY, a))
    assert error <= tol * a.norm()
    assert abs(t.error - error) <= 1e-6 * error + 50 * EPS64
    assert t.rank == tensors.tt_svd(a.to_dense(), tol=tol).rank


def test_rounding_to_a_rank_is_the_tt_svd():
    a = random_train((6, 7, 8, 9), 8, decay=1.0)
    t, expected = tensors.tt_round(a, 4), tensors.tt_svd(a.to_dense(), 4)
    assert abs(t.error - expected.error) <= 1e-6 * expected.error
    assert np.linalg.norm(t.to_dense() - expected.to_dense()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_randomized_rounding_of_a_sum(dtype, xp):
    shape = (9, 8, 10, 9, 8)
    terms = [random_train(shape, 9, decay=3.0, dtype=dtype, seed=s) for s in (0, 20)]
    expected = tensors.tt_round(terms[0] + terms[1], 6)
    t = tensors.tt_round_randomized([moved(xp, a) for a in terms], 6, rng=0)
    assert t.rank == expected.rank
    x = dense(NUMPY, terms[0]) + dense(NUMPY, terms[1])
    error = np.linalg.norm(dense(xp, t) - x)
    assert error <= 2 * expected.error
    assert 0.3 * error <= t.error <= 3 * error


def test_randomized_rounding_is_exact_where_it_can_be(xp):
    a = random_train((6, 7, 5, 6), 3)
    t = tensors.tt_round_randomized(moved(xp, a + a), 3, oversampling=0, rng=1)
    assert near(dense(xp, t), 2 * dense(NUMPY, a), np.float64)
    assert t.error <= 100 * EPS64


def test_one_seed_gives_one_rounding_on_every_library(xp):
    a = random_train((9, 8, 10, 9), 7)
    expected = tensors.tt_round_randomized(a, 4, rng=3)
    t = tensors.tt_round_randomized(moved(xp, a), 4, rng=3)
    assert near(dense(xp, t), dense(NUMPY, expected), np.float64, a.norm())
    assert abs(t.error - expected.error) <= 1e-6


# -- cross approximation --

FUNCTIONS = {
    "rational": lambda i: 1.0 / (1.0 + i.sum(axis=1)),
    "oscillating": lambda i: np.sin(i.sum(axis=1) / 4.0) + np.cos(i[:, 0] * i[:, -1] / 9.0),
    "peak": lambda i: np.exp(-((i - 4.0) ** 2).sum(axis=1) / 3.0),
    "complex": lambda i: np.exp(0.3j * i.sum(axis=1)) / (1.0 + i.sum(axis=1)),
    "constant": lambda i: np.ones(len(i)),
    "zero": lambda i: np.zeros(len(i)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(8, 9, 7, 8), (10, 12), (15,), (1, 6, 1, 7)])
def test_cross_of_a_function(shape, name):
    f = FUNCTIONS[name]
    solution = tensors.tt_cross(f, shape, rank=15, rng=0, stop=Stop(max_iter=20, tol=1e-8))
    x = f(np.argwhere(np.ones(shape))).reshape(shape)
    assert solution.converged
    error = np.linalg.norm(solution.value.to_dense() - x)
    assert error <= 1e-7 * np.linalg.norm(x)
    assert solution.value.shape == shape


def test_cross_in_every_library(xp):
    f = FUNCTIONS["rational"]
    seen = []
    t = tensors.tt_cross(
        lambda i: xp.asarray(f(i)),
        (9,) * 5,
        rank=12,
        rng=0,
        callback=lambda _, change, t: seen.append((change, t.error)),
    ).value
    expected = tensors.tt_cross(f, (9,) * 5, rank=12, rng=0).value
    assert type(t.cores[0]) is type(xp.asarray(np.ones(1)))
    assert near(dense(xp, t), dense(NUMPY, expected), np.float64)
    assert len(seen) >= 1


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_error_of_a_cross_of_any_size(size):
    # Squares of values like these are not numbers of single precision.
    shape, size = (9, 8, 7), np.float32(size)

    def function(i):
        return size / (1 + i.sum(axis=1)).astype(np.float32)

    t = tensors.tt_cross(function, shape, rank=2, rng=0).value
    truth = function(np.indices(shape).reshape(3, -1).T).reshape(shape).astype(float)
    rest = np.linalg.norm(t.to_dense().astype(float) - truth)
    assert 0.5 * rest <= t.error <= 2 * rest


def test_cross_says_when_its_rank_is_too_small():
    x = gaussian(8, 8, 8)
    solution = tensors.tt_cross(
        lambda i: x[tuple(i.T)], x.shape, rank=3, rng=0, stop=Stop(max_iter=3)
    )
    assert solution.converged is False
    error = np.linalg.norm(solution.value.to_dense() - x)
    assert 0.5 * error <= solution.value.error <= 2 * error


def test_cross_sees_few_entries_and_the_peak_it_is_told_of():
    count = []

    def narrow(i):
        count.append(len(i))
        return np.exp(-((i - 20.0) ** 2).sum(axis=1) / 2.0)

    peak = np.full((1, 8), 20)
    solution = tensors.tt_cross(narrow, (30,) * 8, rank=5, init=peak, rng=0)
    assert sum(count) < 2e5
    truth = np.linalg.norm(np.exp(-((np.arange(30) - 20.0) ** 2) / 2)) ** 8
    assert abs(solution.value.norm() - truth) <= 1e-6 * truth


# -- matrices --

ROWS, COLUMNS = (2, 4, 3), (3, 2, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_of_full_rank(dtype):
    check_matrix(NUMPY, dtype)


def test_matrix_in_every_library(xp):
    check_matrix(xp, np.complex128)


def check_matrix(xp, dtype):
    a = gaussian(24, 30, dtype=dtype)
    t = tensors.tt_matrix(xp.asarray(a), ROWS, COLUMNS)
    assert (t.shape, t.rows, t.columns) == (a.shape, ROWS, COLUMNS)
    assert near(xp.host(t.to_dense()), a, dtype)
    assert_adjoint(t)
    x, y = gaussian(30, 4, dtype=dtype, seed=1), gaussian(24, 3, dtype=dtype, seed=2)
    assert near(xp.host(t @ xp.asarray(x)), a @ x, dtype)
    assert near(xp.host(t.mH @ xp.asarray(y)), a.conj().T @ y, dtype)
    assert near(xp.host(t @ xp.asarray(x[:, 0])), a @ x[:, 0], dtype)


def test_matrix_algebra():
    a, b = gaussian(24, 30), gaussian(24, 30, seed=1)
    s, t = (tensors.tt_matrix(m, ROWS, COLUMNS) for m in (a, b))
    for found, truth in (
        (s + t, a + b),
        (s - 3.0 * t, a - 3.0 * b),
        (-s, -a),
        (s.hadamard(t), a * b),
        (s.canonical(1), a),
        (s.mT, a.T),
    ):
        assert near(found.to_dense(), truth, np.float64)
    assert abs(float(s.norm()) - np.linalg.norm(a)) <= 1e-12
    assert abs(float(s.inner(t)) - np.sum(a * b)) <= 1e-11


def test_matrix_with_a_tolerance_is_an_operator():
    i = np.arange(64)
    a = 1.0 / (1.0 + abs(i[:, None] - i) / 4.0)
    t = tensors.tt_matrix(a, (4, 4, 4), (4, 4, 4), tol=1e-3)
    assert np.linalg.norm(t.to_dense() - a) <= 1e-3 * np.linalg.norm(a)
    assert abs(t.error - np.linalg.norm(t.to_dense() - a)) <= 1e-10
    assert t.parameters < a.size / 2
    s = lr.truncated_svd(t, 3, rng=0).s
    assert abs(s - np.linalg.svd(t.to_dense(), compute_uv=False)[:3]).max() <= 1e-8
    rounded = TTMatrix.of(tensors.tt_round(t.train, tol=0.1), t.rows, t.columns)
    assert np.linalg.norm(rounded.to_dense() - t.to_dense()) <= 0.1 * np.linalg.norm(a)


def test_matrix_of_tensorly_and_back():
    t = tensors.tt_matrix(gaussian(24, 30), ROWS, COLUMNS, 4)
    theirs = t.to_tensorly()
    assert near(theirs.to_matrix(), t.to_dense(), np.float64)
    assert near(TTMatrix.from_tensorly(theirs).to_dense(), t.to_dense(), np.float64)


# -- errors --


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda _: TT([np.ones((1, 2, 2)), np.ones((3, 2, 1))]), ValueError, "bonds of cores"),
        (lambda _: TT([]), ValueError, "bonds of cores"),
        (lambda _: TT([np.ones((1, 2, 3, 1))]), ValueError, "cores must have shape"),
        (lambda _: TTMatrix([np.ones((1, 2, 1))]), ValueError, "cores must have shape"),
        (lambda t: t.canonical(3), ValueError, r"center must be in 0\.\.2, got 3"),
        (lambda t: t + t[1:], ValueError, "shapes must be equal"),
        (lambda t: t.inner(t[1:]), ValueError, "shapes must be equal"),
        (lambda t: t[0, 1, 2], TypeError, "index with at most 3 slices"),
        (lambda t: tensors.tt_round(t, 2, tol=0.1), ValueError, "give rank or tol, not both"),
        (lambda t: tensors.tt_round(t, tol=2.0), ValueError, "tol must be in"),
        (lambda _: tensors.tt_round_randomized([], 2), ValueError, "trains of one shape, got none"),
        (lambda t: tensors.tt_round_randomized([t, t[1:]], 2), ValueError, "trains of one shape"),
        (lambda t: tensors.tt_round_randomized(t, 2, oversampling=-1), ValueError, "at least 0"),
        (lambda _: tensors.tt_svd(np.ones((3, 3)), 2, tol=0.1), ValueError, "rank or tol, not"),
        (lambda _: tensors.tt_svd(np.full((3, 3), np.nan), 2), ValueError, "must be finite"),
        (lambda _: tensors.tt_matrix(np.ones((4, 4)), (2, 3), (2, 2)), ValueError, "with products"),
        (
            lambda _: (
                tensors.tt_matrix(np.ones((4, 4)), (4,), (4,))
                + tensors.tt_matrix(np.ones((4, 4)), (2, 2), (2, 2))
            ),
            ValueError,
            "index sizes must be equal",
        ),
        (
            lambda _: tensors.tt_cross(lambda i: np.full(len(i), np.nan), (3, 3), rank=2),
            ValueError,
            "the function must be finite",
        ),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(random_train((4, 5, 6), 3))
