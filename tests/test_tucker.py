"""Laws of the Tucker format and of the decompositions into it."""

import importlib
import warnings

import numpy as np
import pytest
import tensorly as tl
from cases import gaussian, orthonormal
from conftest import Backend
from tensorly.decomposition import partial_tucker
from tensorly.decomposition import tucker as tensorly_tucker

import lowrank_sp as lr
from lowrank_sp import Stop, tensors
from lowrank_sp.tensors import Tucker, subspace

DTYPES = [np.float32, np.float64, np.complex128]
SHAPE = (9, 8, 7)
EPS64 = np.finfo(np.float64).eps


def wide(a):
    return np.asarray(a).astype(np.result_type(a, np.float64))


def low_rank(shape, rank, *, noise=0.0, condition=1.0, dtype=np.float64, seed=0):
    """A Tucker tensor of norm about 1 with factors of the given condition, plus noise."""
    rng = np.random.default_rng(seed)
    complex_ = np.issubdtype(dtype, np.complexfloating)
    core = gaussian(*rank, dtype=dtype, seed=seed)
    sizes = [condition ** -np.linspace(0, 1, r) for r in rank]
    factors = [
        orthonormal(n, r, rng, complex_) * s for n, r, s in zip(shape, rank, sizes, strict=True)
    ]
    x = tl.tenalg.multi_mode_dot(core, factors)
    x = x / np.linalg.norm(x)
    if noise:
        e = gaussian(*shape, dtype=dtype, seed=seed + 1)
        x = x + noise * e / np.linalg.norm(e)
    return x.astype(dtype)


def dense(xp, t):
    """A Tucker tensor on the host, multiplied out in double precision."""
    return tl.tenalg.multi_mode_dot(wide(xp.host(t.core)), [wide(xp.host(u)) for u in t.factors])


def tails(x, ranks):
    """What the best truncation of each unfolding loses."""
    spectra = [np.linalg.svd(tl.unfold(wide(x), k), compute_uv=False) for k in range(x.ndim)]
    return np.array([np.linalg.norm(s[r:]) for s, r in zip(spectra, ranks, strict=True)])


def check(xp, x, t, ranks):
    """Shapes, orthonormal factors, and the error that is promised."""
    eps = np.finfo(x.dtype).eps
    assert t.shape == x.shape
    assert t.rank == tuple(ranks)
    for u in t.factors:
        u = wide(xp.host(u))
        assert abs(u.conj().T @ u - np.eye(u.shape[1])).max() <= 50 * eps
    error, size = np.linalg.norm(wide(x) - dense(xp, t)), np.linalg.norm(wide(x))
    assert abs(error - t.error) <= 50 * eps * size + 1e-6 * error
    return error


CASES = {
    "noisy": lambda dtype: low_rank((20, 16, 12), (3, 4, 2), noise=0.1, dtype=dtype),
    "order 4": lambda dtype: low_rank((8, 9, 7, 6), (2, 3, 2, 3), noise=0.1, dtype=dtype),
    "matrix": lambda dtype: low_rank((30, 20), (4, 4), noise=0.1, dtype=dtype),
    "vector": lambda dtype: gaussian(15, dtype=dtype),
    "mode of size 1": lambda dtype: low_rank((12, 1, 10), (2, 1, 2), noise=0.1, dtype=dtype),
    "gaussian": lambda dtype: gaussian(9, 8, 7, dtype=dtype),
    "tall": lambda dtype: gaussian(60, 4, 5, dtype=dtype),
}
METHODS = {"hosvd": tensors.hosvd, "st_hosvd": tensors.st_hosvd}


NUMPY = Backend("numpy", np.asarray)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_error_within_the_bounds_of_every_mode(method, case, dtype):
    check_bounds(NUMPY, METHODS[method], CASES[case](dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_error_within_the_bounds_in_every_library(method, dtype, xp):
    check_bounds(xp, METHODS[method], CASES["noisy"](dtype))


def check_bounds(xp, method, x):
    ranks = tuple(min(n, 3) for n in x.shape)
    t = method(xp.asarray(x), ranks)
    error = check(xp, x, t, ranks)
    lost, slack = tails(x, ranks), 50 * np.finfo(x.dtype).eps * np.linalg.norm(x)
    assert lost.max() - slack <= error <= np.linalg.norm(lost) * (1 + 1e-5) + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact(method, dtype, xp):
    x = gaussian(*SHAPE, dtype=dtype)
    t = METHODS[method](xp.asarray(x))
    assert check(xp, x, t, SHAPE) <= 50 * np.finfo(dtype).eps * np.linalg.norm(x)


@pytest.mark.parametrize("tol", [0.5, 0.05, 1e-5, 1e-10])
@pytest.mark.parametrize("condition", [1.0, 1e9])
@pytest.mark.parametrize("method", METHODS)
def test_tolerance_is_respected_and_used(method, condition, tol):
    check_tolerance(NUMPY, METHODS[method], condition, tol)


@pytest.mark.parametrize("tol", [0.05, 1e-10])
def test_tolerance_in_every_library(tol, xp):
    check_tolerance(xp, tensors.st_hosvd, 1e9, tol)


def check_tolerance(xp, method, condition, tol):
    x = low_rank((14, 13, 12), (6, 6, 6), condition=condition, noise=1e-13)
    t = method(xp.asarray(x), tol=tol)
    error = check(xp, x, t, t.rank)
    assert error <= tol * np.linalg.norm(x)
    # No mode can lose more and keep its share.
    for mode, r in enumerate(t.rank):
        fewer = [n if k != mode else max(1, r - 1) for k, n in enumerate(x.shape)]
        assert r == 1 or tails(x, fewer)[mode] > tol * np.linalg.norm(x) / 3**0.5 * 0.99


@pytest.mark.parametrize("mode", range(3))
def test_small_singular_values_are_not_squared_away(mode):
    spectrum = 10.0 ** -np.arange(0, 12, dtype=float)
    rng = np.random.default_rng(0)
    u, v = orthonormal(14, 12, rng), orthonormal(600, 12, rng)
    x = np.moveaxis(((u * spectrum) @ v.T).reshape(14, 30, 20), 0, mode)
    for k in range(1, 12):
        found, lost = subspace.leading_subspace(x, mode, rank=k)
        truth = np.linalg.norm(spectrum[k:])
        assert abs(lost - truth) <= 0.02 * truth + 50 * EPS64
        residual = tl.unfold(x, mode) - found @ (found.T @ tl.unfold(x, mode))
        assert np.linalg.norm(residual) <= 1.02 * truth + 50 * EPS64
        found, lost = subspace.leading_subspace(x, mode, rank=None, allowed=1.5 * truth)
        assert found.shape[1] == k
        assert lost <= 1.5 * truth


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(300, 25, 30), (25, 300, 30), (25, 30, 300), (400, 20, 2)])
def test_long_modes(shape, dtype):
    x = low_rank(shape, (2, 2, 2), noise=1e-3, dtype=dtype)
    mode = int(np.argmax(shape))
    for arguments in ({"rank": 2}, {"rank": None, "allowed": 2e-3}):
        u, lost = subspace.leading_subspace(x, mode, rng=0, **arguments)
        truth = tails(x, [2] * 3)[mode]
        assert u.shape == (shape[mode], 2)
        assert abs(lost - truth) <= 1e-6 * truth


LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 0)), 0, 1),
    "reversed": lambda x: x[::-1].copy()[::-1],
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = low_rank((14, 11, 12), (4, 4, 4), noise=0.2)
    given, ranks = LAYOUTS[layout](x), (3, 4, 2)
    for method in METHODS.values():
        t = method(given, ranks)
        assert abs(check(NUMPY, x, t, ranks) - method(x, ranks).error) <= 0.1 * t.error
    best = tensors.hooi(x, rank=ranks, stop=Stop(max_iter=300, tol=1e-14)).value
    found = tensors.hooi(given, rank=ranks, init=best, stop=Stop(max_iter=1)).value
    assert abs(check(NUMPY, x, found, ranks) - best.error) <= 1e-10


def test_blocks_of_fibres(monkeypatch):
    x = low_rank((12, 11, 10), (3, 3, 3), noise=1e-10)
    expected = tensors.st_hosvd(x, 3)
    monkeypatch.setattr("lowrank_sp.tensors.modes._BLOCK", 200)
    found = tensors.st_hosvd(x, 3)
    assert abs(found.error - expected.error) <= 1e-6 * expected.error
    assert tensors.st_hosvd(x, tol=1e-9).rank == (3, 3, 3)


@pytest.mark.parametrize("method", [tensors.st_hosvd, tensors.tt_svd], ids=lambda f: f.__name__)
def test_relative_error_takes_tensors_on_either_side(method):
    a = gaussian(4, 30).reshape(4, 5, 6)
    t = method(a, tol=0.5)
    error = np.linalg.norm(t.to_dense() - a)
    assert lr.relative_error(t, a) == pytest.approx(error / np.linalg.norm(a))
    assert lr.relative_error(a, t) == pytest.approx(error / t.norm())


def test_rank_above_what_the_other_modes_allow(xp):
    x = gaussian(10, 2, 2)
    t = tensors.st_hosvd(xp.asarray(x), (8, 2, 2))
    assert check(xp, x, t, (8, 2, 2)) <= 50 * EPS64 * np.linalg.norm(x)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.bool_, np.float16])
def test_other_dtypes(dtype):
    x = (abs(gaussian(6, 5, 4)) * 3).astype(dtype)
    t = tensors.st_hosvd(x, 2)
    expected = tensors.st_hosvd(x.astype(np.float64), 2)
    assert abs(t.error - expected.error) <= 1e-5 * expected.error


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e300), (np.float64, 1e-300), (np.float32, 1e30)]
)
def test_extreme_scales(dtype, scale):
    x = low_rank(SHAPE, (3, 3, 3), noise=0.1, dtype=dtype)
    expected, found = tensors.st_hosvd(x, 3), tensors.st_hosvd(x * dtype(scale), 3)
    assert abs(found.error / scale - expected.error) <= 1e-5
    best = tensors.hooi(x * dtype(scale), rank=3).value
    assert best.error <= found.error * (1 + 1e-6)


@pytest.mark.parametrize("call", ["st_hosvd", "hosvd"])
def test_zero_tensor(call, xp):
    zero = xp.asarray(np.zeros(SHAPE))
    for t in (METHODS[call](zero, 2), METHODS[call](zero, tol=0.1)):
        assert t.error == 0.0
        assert np.array_equal(dense(xp, t), np.zeros(SHAPE))
    best = tensors.hooi(zero, rank=2)
    assert best.converged
    assert best.value.error == 0.0


def test_matrices_agree_with_the_truncated_svd():
    x = low_rank((30, 20), (5, 5), noise=0.1)
    f = lr.truncated_svd(x, 4)
    for t in (tensors.st_hosvd(x, 4), tensors.hosvd(x, 4), tensors.hooi(x, rank=4).value):
        assert np.linalg.norm(t.to_dense() - f.to_dense()) <= 1e-7


# -- iteration --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_hooi_never_rises_and_is_stationary(case, dtype):
    check_hooi(NUMPY, CASES[case](dtype), 2000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hooi_in_every_library(dtype, xp):
    check_hooi(xp, CASES["noisy"](dtype), 20)


def check_hooi(xp, x, max_iter):
    dtype = x.dtype
    ranks = tuple(min(n, 3) for n in x.shape)
    errors = []
    solution = tensors.hooi(
        xp.asarray(x),
        rank=ranks,
        stop=Stop(max_iter=max_iter, tol=1e-6 if dtype == np.float32 else 1e-9),
        callback=lambda _, __, t: errors.append(t.error),
    )
    assert solution.converged
    error, eps = check(xp, x, solution.value, ranks), np.finfo(dtype).eps
    start = tensors.st_hosvd(xp.asarray(x), ranks)
    drop = np.diff([start.error, *errors])
    assert np.all(drop <= 50 * eps * np.linalg.norm(x))
    # The core is the projection onto the factors.
    t = solution.value
    factors = [wide(xp.host(u)).conj().T for u in t.factors]
    core = tl.tenalg.multi_mode_dot(wide(x), factors)
    assert np.linalg.norm(core - xp.host(t.core)) <= 50 * eps * np.linalg.norm(x)
    assert error <= np.linalg.norm(tails(x, ranks)) * (1 + 1e-5) + 50 * eps * np.linalg.norm(x)


def test_sweeps_end_at_a_fixed_point(monkeypatch):
    """From there on nothing is read, and nothing changes."""
    x = low_rank((12, 13, 14), (3, 3, 3), noise=0.01)
    products, seen = [], []
    module = importlib.import_module("lowrank_sp.tensors.hooi")
    original = module.mode_dot
    monkeypatch.setattr(module, "mode_dot", lambda *a: (products.append(1), original(*a))[1])

    def callback(*args):
        seen.append((len(products), args[-1]))

    tensors.hooi(x, rank=3, stop=Stop(max_iter=12, tol=None), callback=callback)
    reads, values = zip(*seen, strict=True)
    assert reads[0] < reads[1] < reads[-1] == reads[-4]
    for a, b in zip(values[-1].arrays(), values[-4].arrays(), strict=True):
        assert np.array_equal(a, b)
    naive = values[0]
    for _ in range(11):
        naive = naive_sweep(x, naive.factors)
    assert np.linalg.norm(naive.to_dense() - values[-1].to_dense()) <= 1e-12 * np.linalg.norm(x)


def naive_sweep(x, factors):
    factors = list(factors)
    for mode, factor in enumerate(factors):
        others = [None if k == mode else u.T for k, u in enumerate(factors)]
        part = tensors.unfold(tensors.multi_mode_dot(x, others), mode)
        factors[mode] = np.linalg.svd(part, full_matrices=False)[0][:, : factor.shape[1]]
    return Tucker(tensors.multi_mode_dot(x, [u.T for u in factors]), factors)


def test_hooi_agrees_with_tensorly():
    x = low_rank((15, 14, 13, 5), (3, 4, 2, 2), noise=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core, factors = tensorly_tucker(x, (3, 4, 2, 2), n_iter_max=200, tol=1e-14)
    theirs = np.linalg.norm(x - tl.tucker_to_tensor((core, factors)))
    t = tensors.hooi(x, rank=(3, 4, 2, 2), stop=Stop(max_iter=200, tol=1e-14)).value
    assert abs(t.error - theirs) <= 1e-9 * theirs
    assert np.linalg.norm(t.to_dense() - tl.tucker_to_tensor((core, factors))) <= 1e-5 * theirs


def test_errors_are_right_below_the_root_of_eps():
    x = low_rank((20, 21, 22), (4, 4, 4), noise=1e-11)
    t = tensors.hooi(x, rank=4).value
    truth = np.linalg.norm(x - t.to_dense())
    assert 1e-12 < truth < 1e-10
    assert abs(t.error - truth) <= 1e-3 * truth


def test_hooi_starts_where_it_is_told(xp):
    x = low_rank(SHAPE, (3, 3, 3), noise=0.5)
    best = tensors.hooi(xp.asarray(x), rank=2, stop=Stop(max_iter=300, tol=1e-14)).value
    again = tensors.hooi(xp.asarray(x), rank=2, init=2.0 * best, stop=Stop(max_iter=1))
    assert abs(again.value.error - best.error) <= 1e-10
    with pytest.raises(ValueError, match="init must have shape"):
        tensors.hooi(xp.asarray(x), rank=3, init=best)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tucker2_recovers_a_shared_basis(dtype, xp):
    u, v = gaussian(20, 3, dtype=dtype), gaussian(2, 15, dtype=dtype, seed=1)
    stack = u @ gaussian(6, 3, 2, dtype=dtype, seed=2) @ v
    t = tensors.tucker2(xp.asarray(stack), rank=(3, 2)).value
    error = check(xp, stack, t, (6, 3, 2))
    assert error <= 100 * np.finfo(dtype).eps * np.linalg.norm(stack)
    assert np.array_equal(xp.host(t.factors[0]), np.eye(6))


def test_tucker2_is_the_partial_tucker_of_tensorly():
    stack = gaussian(5, 12, 10) + 3 * gaussian(12, 1) @ gaussian(1, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = partial_tucker(stack, (3, 2), modes=[1, 2], n_iter_max=500, tol=1e-15)
    core, factors = theirs
    error = np.linalg.norm(stack - factors[0] @ core @ factors[1].T)
    t = tensors.tucker2(stack, rank=(3, 2), stop=Stop(max_iter=500, tol=1e-15)).value
    assert abs(t.error - error) <= 1e-8 * error


def test_tucker2_with_a_fraction():
    stack = gaussian(6, 20, 10)
    t = tensors.tucker2(stack, rank=0.3).value
    parameters = t.parameters - t.factors[0].size
    assert abs(parameters / stack.size - 0.3) < 0.05


# -- the format --


def random_tucker(shape=(5, 4, 6), rank=(2, 3, 2), dtype=np.float64, seed=0):
    factors = [gaussian(n, r, dtype=dtype, seed=seed + n) for n, r in zip(shape, rank, strict=True)]
    return Tucker(gaussian(*rank, dtype=dtype, seed=seed), factors)


def moved(xp, t):
    return Tucker(xp.asarray(t.core), [xp.asarray(u) for u in t.factors])


def assert_near(a, b, dtype, size=None):
    size = np.linalg.norm(b) if size is None else size
    assert np.linalg.norm(a - b) <= 100 * np.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_algebra_is_that_of_the_dense_tensors(dtype, xp):
    a, b = random_tucker(dtype=dtype), random_tucker(rank=(1, 2, 4), dtype=dtype, seed=5)
    x, y = (tl.tucker_to_tensor((wide(t.core), [wide(u) for u in t.factors])) for t in (a, b))
    s, t = moved(xp, a), moved(xp, b)
    assert_near(xp.host(s.to_dense()), x, dtype)
    for found, truth in (
        (s + t, x + y),
        (s - 2.5 * t, x - 2.5 * y),
        (-s, -x),
        (s.hadamard(t), x * y),
        (s[1:3, :, ::2], x[1:3, :, ::2]),
        (s[2:], x[2:]),
    ):
        assert_near(dense(xp, found), truth, dtype)
    assert abs(s.norm() - np.linalg.norm(x)) <= 100 * np.finfo(dtype).eps * np.linalg.norm(x)
    bound = 100 * np.finfo(dtype).eps * np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(complex(s.inner(t)) - np.vdot(x, y)) <= bound
    indices = np.argwhere(np.ones(x.shape))[::7]
    assert_near(xp.host(s.sample(indices)), x[tuple(indices.T)], dtype)


def test_norm_of_a_difference_keeps_its_digits(xp):
    a = random_tucker()
    step = 1e-12 * random_tucker(seed=3)
    difference = (moved(xp, a + step) - moved(xp, a)).norm()
    assert abs(difference - step.norm()) <= 100 * EPS64 * a.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [(2, 3, 2), (5, 4, 6), (1, 3, 1)])
def test_canonical_gauge(rank, dtype):
    check_canonical(NUMPY, rank, dtype)


def test_canonical_gauge_in_every_library(xp):
    check_canonical(xp, (2, 3, 2), np.complex128)


def check_canonical(xp, rank, dtype):
    a = random_tucker(rank=rank, dtype=dtype)
    t = moved(xp, a).canonical()
    x = tl.tucker_to_tensor((wide(a.core), [wide(u) for u in a.factors]))
    eps, size = np.finfo(dtype).eps, np.linalg.norm(x)
    assert_near(dense(xp, t), x, dtype)
    for mode, u in enumerate(t.factors):
        u = wide(xp.host(u))
        assert abs(u.conj().T @ u - np.eye(u.shape[1])).max() <= 50 * eps
        top = np.take_along_axis(u, abs(u).argmax(axis=0)[None], axis=0)[0]
        assert np.all(top.real > 0)
        gram = tl.unfold(wide(xp.host(t.core)), mode)
        gram = gram @ gram.conj().T
        assert abs(gram - np.diag(np.diag(gram))).max() <= 100 * eps * size**2
        assert np.all(np.diff(np.diag(gram).real) <= 100 * eps * size**2)


def test_canonical_gauge_is_one_for_all_factors_of_a_tensor():
    a = random_tucker()
    mixed = [gaussian(r, r, seed=r) for r in a.rank]
    core = tl.tenalg.multi_mode_dot(a.core, [np.linalg.inv(m) for m in mixed])
    b = Tucker(core, [u @ m for u, m in zip(a.factors, mixed, strict=True)])
    for u, v in zip(a.canonical().arrays(), b.canonical().arrays(), strict=True):
        assert abs(u - v).max() <= 1e-10


def test_tensorly_and_back():
    a = random_tucker()
    theirs = a.to_tensorly()
    assert_near(theirs.to_tensor(), a.to_dense(), np.float64)
    core, factors = Tucker.from_tensorly(theirs)
    assert core is a.core
    assert factors == a.factors
    assert (a.ndim, a.shape, a.parameters) == (3, (5, 4, 6), 12 + 10 + 12 + 12)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t: Tucker(t.core, t.factors[:2]), ValueError, "needs factors of as many columns"),
        (lambda t: t + random_tucker((5, 4, 7)), ValueError, "shapes must be equal"),
        (lambda t: t[0], TypeError, "index with at most 3 slices"),
        (lambda t: t + 1.0, TypeError, "unsupported operand"),
        (lambda t: t * "a", TypeError, "can't multiply|unsupported operand"),
        (lambda _: tensors.st_hosvd(np.ones(SHAPE), 2, tol=0.1), ValueError, "rank or tol, not"),
        (lambda _: tensors.st_hosvd(np.ones(SHAPE), 10), ValueError, r"rank must be in 1\.\.9"),
        (lambda _: tensors.hooi(np.ones(SHAPE), rank=(1, 2)), ValueError, "must have 3 entries"),
        (lambda _: tensors.st_hosvd([1.0]), TypeError, "a tensor must be an array"),
        (lambda _: tensors.tucker2(np.ones((3, 3)), rank=1), ValueError, "has shape"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(random_tucker())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("call", [*METHODS.values(), lambda x, r: tensors.hooi(x, rank=r)])
def test_not_finite(call, value, xp):
    x = gaussian(*SHAPE)
    x[3, 2, 1] = value
    with pytest.raises(ValueError, match="the tensor must be finite"):
        call(xp.asarray(x), 2)
