"""Laws of the singular value decompositions, on every case, dtype, layout and backend."""

import dask
import dask.array
import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from cases import DOUBLE_ONLY, NAMES, M, N, exact, gaussian, matrix, with_spectrum

import lowrank_sp as lr
from lowrank_sp.linalg import krylov, svd
from lowrank_sp.operators import Rows
from lowrank_sp.testing import assert_same_product

RANK = 12  # takes the Krylov path at 160 x 120
GRAM_RANK = 60  # takes the Gram path
EPS64 = np.finfo(np.float64).eps


def wide(a):
    return np.asarray(a).astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def check(a, f, k, *, tol=None):
    """Assert what ``truncated_svd(a, k)`` promises, of arrays on the host."""
    eps = np.finfo(f.u.dtype).eps
    largest = float(abs(a).max(initial=0.0)) or 1.0
    a, u, vh = wide(a) / largest, wide(f.u), wide(f.vh)
    s, bounds = wide(f.s) / largest, wide(f.bounds) / largest
    truth, size = exact(a), np.linalg.norm(a)
    noise = max(20 * eps, 100 * EPS64) * size
    target = max((4 * np.sqrt(eps) if tol is None else tol) * s[-1], noise)
    assert (u.shape, s.shape, vh.shape) == ((a.shape[0], k), (k,), (k, a.shape[1]))
    for gram in (u.conj().T @ u, vh @ vh.conj().T):
        assert abs(gram - np.eye(k)).max() <= (40 + max(a.shape) / 4) * eps
    assert np.all(bounds >= 0)
    assert np.all(bounds <= 2 * target + max(a.shape) * eps * size)
    assert np.all(abs(s - truth[:k]) <= bounds + 10 * EPS64 * size)
    for residual in (a.conj().T @ u - vh.conj().T * s, a @ vh.conj().T - u * s):
        assert np.linalg.norm(residual, axis=0).max() <= target
    # ||A - U S V^H||^2 exceeds its least value by what the singular values lack, to rounding.
    lacking = np.sum(np.maximum(truth[:k] ** 2 - s**2, 0.0))
    error, least = np.linalg.norm(a - (u * s) @ vh), np.linalg.norm(truth[k:])
    assert error <= np.sqrt(least**2 + lacking) + k * noise
    check_canonical(f)


def check_canonical(f):
    """Sorted, non-negative, and the first of the largest entries of each ``u_i`` is positive."""
    u, s, eps = np.asarray(f.u), np.asarray(f.s), np.finfo(f.u.dtype).eps
    assert np.all(s[:-1] >= s[1:])
    assert np.all(s >= 0)
    size = abs(u)
    tied = size >= (1 - 4 * np.sqrt(eps)) * size.max(axis=0)
    top = np.take_along_axis(u, tied.argmax(axis=0)[None], axis=0)[0]
    assert np.all(top.real > 0)
    assert np.all(abs(top.imag) <= 4 * eps)


def in_range(name, dtype):
    return name not in DOUBLE_ONLY or np.finfo(dtype).eps == EPS64


CASES = [
    pytest.param(name, dtype, id=f"{name}-{np.dtype(dtype)}")
    for name in NAMES
    for dtype in (np.float32, np.float64, np.complex128)
    if in_range(name, dtype)
]


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [RANK, GRAM_RANK])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_triplets(name, dtype, rank, transposed):
    a = matrix(name, dtype)
    a = a.conj().T if transposed else a
    check(a, lr.truncated_svd(a, rank, rng=0), rank)


@pytest.mark.parametrize("name", NAMES)
def test_triplets_of_every_library(name, xp):
    a = matrix(name)
    data = xp.asarray(a)
    f = lr.truncated_svd(data, RANK, rng=0)
    for part in (f.u, f.s, f.vh, f.bounds):
        assert type(part) is type(data)
        assert part.dtype == data.dtype
        assert part.device == data.device
    check(a, on_host(xp, f), RANK)


def on_host(xp, f):
    return lr.SVD(*(xp.host(part) for part in (*f, f.bounds)), f.error)


@pytest.mark.parametrize("rank", [5, GRAM_RANK, None], ids=["krylov", "gram", "lapack"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_single_precision_of_every_library(dtype, rank, xp):
    a = matrix("1/j", dtype)
    f = lr.truncated_svd(xp.asarray(a), rank, rng=0)
    assert xp.host(f.u).dtype == dtype
    check(a, on_host(xp, f), rank or N)


@pytest.mark.parametrize("rank", [RANK, GRAM_RANK])
def test_one_seed_gives_one_result_on_every_library(rank, xp):
    a = matrix("low rank + noise")
    reference = lr.truncated_svd(a, rank, rng=3)
    f = on_host(xp, lr.truncated_svd(xp.asarray(a), rank, rng=3))
    eps = np.finfo(a.dtype).eps
    assert_same_product(reference, f, tol=100 * eps**0.75)
    assert np.linalg.norm(f.s - reference.s) <= 100 * eps * reference.s[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_another_seed_changes_no_more_than_the_tolerance(dtype):
    a = matrix("exp(-j/5)", dtype)
    first, second = (lr.truncated_svd(a, RANK, rng=seed) for seed in (0, 1))
    assert np.any(first.u != second.u)
    gap = np.exp(-RANK / 5) * (1 - np.exp(-1 / 5))
    angle = 4 * np.sqrt(np.finfo(dtype).eps) * first.s[-1] / gap
    assert_same_product(first, second, tol=4 * RANK * angle)


def reversed_rows(a):
    return a[::-1].copy()[::-1]


def mapped(a, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


LAYOUTS = {
    "fortran": lambda a, _: np.asfortranarray(a),
    "negative strides": lambda a, _: reversed_rows(a),
    "every second row": lambda a, _: np.repeat(a, 2, axis=0)[::2],
    "transposed view": lambda a, _: a.T.copy().T,
    "read-only": lambda a, _: np.lib.stride_tricks.as_strided(a, writeable=False),
    "memmap": mapped,
    "torch transposed": lambda a, _: torch.asarray(a.T.copy()).mT,
    "torch strided": lambda a, _: torch.asarray(np.repeat(a, 2, axis=1))[:, ::2],
    "torch requires grad": lambda a, _: torch.asarray(a.copy()).requires_grad_(True),
}


@pytest.mark.parametrize("rank", [RANK, GRAM_RANK, None], ids=["krylov", "gram", "lapack"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rank, tmp_path):
    a = matrix("low rank + noise")
    data = LAYOUTS[layout](a, tmp_path)
    f = lr.truncated_svd(data, rank, rng=0)
    check(a, lr.SVD(*(np.asarray(x) for x in (*f, f.bounds)), f.error), rank or N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_broadcast(dtype):
    row = gaussian(N, dtype=dtype)
    f = lr.truncated_svd(np.broadcast_to(row, (M, N)), 4, rng=0)
    check(np.tile(row, (M, 1)), f, 4)


HALVES = {
    "numpy float16": lambda a: a.astype(np.float16),
    "numpy bfloat16": lambda a: a.astype(ml_dtypes.bfloat16),
    "torch float16": lambda a: torch.asarray(a.copy()).to(torch.float16),
    "torch bfloat16": lambda a: torch.asarray(a.copy()).to(torch.bfloat16),
    "jax bfloat16": lambda a: jax.numpy.asarray(a, dtype="bfloat16"),
}


@pytest.mark.parametrize("rank", [RANK, GRAM_RANK, None], ids=["krylov", "gram", "lapack"])
@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_computed_in_float32(half, rank):
    data = HALVES[half](matrix("low rank + noise"))
    stored = data.to(torch.float32).numpy() if "torch" in half else np.asarray(data, np.float32)
    f = lr.truncated_svd(data, rank, rng=0)
    f = lr.SVD(*(np.asarray(x) for x in (*f, f.bounds)), f.error)
    assert f.u.dtype == np.float32
    check(stored, f, rank or N)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_])
def test_integers_become_the_default_float(dtype, xp):
    a = (abs(gaussian(M, N)) * 2).astype(dtype)
    f = lr.truncated_svd(xp.asarray(a), 3, rng=0)
    assert xp.host(f.u).dtype == (np.float32 if xp.name == "torch" else np.float64)
    check(a.astype(xp.host(f.u).dtype), on_host(xp, f), 3)


# -- which method runs --


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((M, N), 5, ["krylov"]),
        ((N, M), 5, ["krylov"]),
        ((M, N), GRAM_RANK, ["gram"]),
        ((M, N), None, ["lapack"]),
        ((300, 80), 5, ["lapack"]),
    ],
)
def test_routes(shape, rank, expected, monkeypatch):
    ran = []

    def spy(module, attribute, name):
        original = getattr(module, attribute)
        monkeypatch.setattr(
            module, attribute, lambda *a, **k: (ran.append(name), original(*a, **k))[1]
        )

    spy(svd.krylov, "block_krylov", "krylov")
    spy(svd, "gram_svd", "gram")
    spy(svd, "lapack_svd", "lapack")
    a = gaussian(*shape) / np.arange(1, shape[1] + 1)
    check(a, lr.truncated_svd(a, rank, rng=0), rank or min(shape))
    assert ran == expected


@pytest.mark.parametrize("width", [2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_krylov_by_itself(name, width):
    a = matrix(name)
    found = krylov.block_krylov(
        lr.as_operator(a), lambda _: RANK, tol=1e-6, rng=np.random.default_rng(0), width=width
    )
    # Where the last wanted value is rounding, there is nothing to converge to.
    truth = exact(a)
    assert found.converged or truth[RANK - 1] <= np.finfo(a.dtype).eps * truth[0]
    check(a, found.svd, RANK, tol=1e-6)


def test_krylov_restarts():
    a = with_spectrum(1.0 - np.arange(300) / 1000, 400, 300)
    rng = np.random.default_rng(0)
    found = krylov.block_krylov(
        lr.as_operator(a), lambda _: 6, tol=1e-6, rng=rng, width=4, max_columns=40
    )
    assert found.columns <= 44
    check(a, found.svd, 6, tol=1e-6)


def test_krylov_gives_up_with_true_bounds():
    a = matrix("slow")
    rng = np.random.default_rng(0)
    found = krylov.block_krylov(
        lr.as_operator(a), lambda _: 4, tol=1e-8, rng=rng, width=4, max_reads=5
    )
    assert not found.converged
    distance = abs(found.svd.s[:, None] - exact(a)).min(axis=1)
    assert np.all(distance <= found.svd.bounds)


# -- a tolerance instead of a rank --


@pytest.mark.parametrize("tol", [0.5, 0.05, 2e-3, 1e-5])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_tolerance_gives_the_smallest_rank(name, dtype, tol):
    a = matrix(name, dtype)
    f = lr.truncated_svd(a, tol=tol, rng=0)
    scale = abs(a).max() or 1.0
    a, truth = wide(a) / scale, exact(wide(a) / scale)
    tails = np.sqrt(np.cumsum(truth[::-1] ** 2)[::-1])
    size = np.linalg.norm(a)
    slack = size * 50 * np.finfo(dtype).eps / tol  # squared errors are known to 50 eps
    error = np.linalg.norm(a - wide(f.to_dense()) / scale)
    assert error <= tol * size + slack
    assert f.rank == 1 or tails[f.rank - 1] >= tol * size - slack
    assert abs(float(f.error) / scale - error) <= size * 10 * np.sqrt(np.finfo(dtype).eps)


def test_rank_with_tolerance_is_accuracy():
    a = matrix("slow")
    loose, tight = (lr.truncated_svd(a, 3, tol=tol, rng=0) for tol in (0.1, 1e-10))
    check(a, loose, 3, tol=0.1)
    check(a, tight, 3, tol=1e-10)
    assert tight.bounds.max() < 1e-9 < loose.bounds.max()


def test_full_rank_reproduces_the_matrix(xp):
    a = matrix("1/j^2")
    f = lr.truncated_svd(xp.asarray(a))
    assert f.rank == N
    assert f.error == 0.0
    assert_same_product(a, xp.host(f.to_dense()))


# -- batches, operators --


@pytest.mark.parametrize("rank", [5, GRAM_RANK, None])
@pytest.mark.parametrize("shape", [(M, N), (30, 20)])
def test_batches(shape, rank, xp):
    rank = None if rank is None else min(rank, *shape)
    stack = gaussian(2, 3, *shape)
    f = lr.truncated_svd(xp.asarray(stack), rank, rng=0)
    k = rank or min(shape)
    assert f.shape == stack.shape
    for i in np.ndindex(2, 3):
        one = lr.SVD(*(xp.host(part)[i] for part in (*f, f.bounds)))
        check(stack[i], one, k)


def row_operator(a):
    return Rows(a.shape, lambda start, stop: a[start:stop], like=np.empty((0, 0)), rows=37)


def dask_operator(a, chunks):
    return dask.array.from_array(a, chunks=chunks)


OPERATORS = {
    "csr": scipy.sparse.csr_array,
    "csc": scipy.sparse.csc_matrix,
    "coo": scipy.sparse.coo_array,
    "scipy operator": scipy.sparse.linalg.aslinearoperator,
    "rows": row_operator,
    "dask rows": lambda a: dask_operator(a, (50, -1)),
    "dask blocks": lambda a: dask_operator(a, (50, 31)),
    "low rank": lambda a: lr.LowRank(a, np.eye(a.shape[1])),
    "sum": lambda a: lr.as_operator(0.25 * a) + lr.as_operator(0.75 * a),
    "product": lambda a: lr.as_operator(a) @ lr.as_operator(np.eye(a.shape[1])),
    "scaled": lambda a: 4.0 * lr.as_operator(a / 4),
    "adjoint": lambda a: lr.as_operator(a.T.copy()).mH,
}


@pytest.mark.parametrize("name", ["1/j", "low rank + noise", "one-hot rows", "exact rank 5"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators(kind, name):
    a = matrix(name)
    with dask.config.set(scheduler="synchronous"):
        check(a, lr.truncated_svd(OPERATORS[kind](a), RANK, rng=0), RANK)


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_by_tolerance(kind):
    a = matrix("exp(-j/5)")
    with dask.config.set(scheduler="synchronous"):
        f = lr.truncated_svd(OPERATORS[kind](a), tol=0.1, rng=0)
    assert f.rank == lr.truncated_svd(a, tol=0.1, rng=0).rank
    check(a, f, f.rank)


def test_difference_of_low_rank_and_sparse_is_never_dense():
    m, n = 20_000, 30_000
    rng = np.random.default_rng(0)
    low = lr.LowRank(rng.standard_normal((m, 2)), rng.standard_normal((2, n)))
    sparse = scipy.sparse.random_array((m, n), density=1e-6, rng=rng)
    f = lr.truncated_svd(low + lr.as_operator(sparse), 2, rng=0)
    difference = abs(f.s - low.svd().s)
    assert np.all(difference <= f.bounds + scipy.sparse.linalg.norm(sparse))


def test_operator_needs_a_reachable_tolerance():
    operator = lr.as_operator(scipy.sparse.eye_array(2000))
    with pytest.raises(ValueError, match=r"not an array needs rank, or tol of at least 2\.1e-07"):
        lr.truncated_svd(operator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tol", [None, 1e-6, 1e-2, 0.05])
@pytest.mark.parametrize("rank", [17, 26])
def test_no_copy_of_a_repeated_value_is_missed(rank, tol, dtype):
    # More copies than the space has random columns, and a value next to them.
    s = np.r_[np.ones(17), 0.956 * np.linspace(1, 0.2, 217)]
    a = np.diag(s).astype(dtype)
    for seed in range(6):
        f = lr.truncated_svd(a, rank, tol=tol, rng=seed)
        assert np.all(abs(f.s - s[:rank]) <= f.bounds + 10 * np.finfo(dtype).eps)


LOW_ENERGY_TAILS = {
    "two large": np.r_[np.full(2, 10.0), 0.03414 * np.linspace(1.1, 1.0, 187)],
    "power law": 1.0 / np.arange(1.0, 201.0) ** 1.5,
    "geometric": 10.0 ** (-4.0 * np.arange(180.0) / 180),
}


@pytest.mark.parametrize("tol", [1.6e-3, 1.965e-3, 5.5e-3, 0.03])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LOW_ENERGY_TAILS)
def test_tolerance_is_respected_next_to_rounding(name, dtype, tol):
    s = LOW_ENERGY_TAILS[name]
    a = with_spectrum(s, len(s) + 40, len(s)).astype(dtype)
    f = lr.truncated_svd(a, tol=tol, rng=0)
    size = np.linalg.norm(wide(a))
    error = np.linalg.norm(wide(a) - (wide(f.u) * wide(f.s)) @ wide(f.vh))
    eps = np.finfo(dtype).eps
    assert error <= tol * size * (1 + 10 * np.sqrt(eps))
    assert abs(error - f.error) <= 0.05 * error + 10 * eps * size


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_small_errors_at_extreme_scales(scale):
    a = with_spectrum(1.0 / np.arange(1.0, 3.0), 163, 163) * scale
    f = lr.truncated_svd(a, tol=0.01, rng=0)
    assert f.rank == 2
    assert f.error <= 100 * EPS64 * scale


def test_error_has_digits_below_the_root_of_rounding():
    a = with_spectrum(1.0 / np.arange(1.0, 3.0), 363, 363).astype(np.float32)
    f = lr.truncated_svd(a, tol=0.01, rng=0)
    assert f.rank == 2
    assert f.error <= 10 * np.finfo(np.float32).eps


@pytest.mark.parametrize("shape", [(600, 900), (300, 4000)])
def test_noise_by_tolerance_needs_almost_all(shape):
    a = gaussian(*shape, dtype=np.float32)
    f = lr.truncated_svd(row_operator(a), tol=0.05, rng=0)
    assert np.linalg.norm(a - f.to_dense()) <= 0.051 * np.linalg.norm(a)


# -- a fixed number of reads --


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("reads", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["1/j", "10^(-16j/n)", "slow", "low rank + noise", "zero"])
def test_randomized_bounds(name, reads, dtype, transposed):
    a = matrix(name, dtype)
    a = a.conj().T if transposed else a
    f = lr.randomized_svd(a, RANK, reads=reads, rng=0)
    truth, eps = exact(a), np.finfo(dtype).eps
    noise = 10 * eps * np.linalg.norm(a)
    assert np.all(f.s <= truth[:RANK] + noise)
    assert np.all(abs(f.s[:, None] - truth).min(axis=1) <= f.bounds + noise)
    assert f.error >= np.linalg.norm(truth[RANK:]) * (1 - 0.3) - noise
    check_canonical(f)


@pytest.mark.parametrize("reads", [2, 3, 5])
@pytest.mark.parametrize("name", ["1/j", "slow", "S-shape", "low rank + noise", "identity"])
def test_randomized_error_estimate(name, reads):
    a = matrix(name)
    found = [lr.randomized_svd(a, RANK, reads=reads, rng=seed) for seed in range(20)]
    true = [np.linalg.norm(a - f.to_dense()) for f in found]
    # One estimate scatters by about ten percent, so their mean by less than three.
    assert abs(np.mean([f.error for f in found]) / np.mean(true) - 1) <= 0.1


def test_more_reads_are_better():
    a = matrix("slow")
    errors = [
        np.linalg.norm(a - lr.randomized_svd(a, RANK, reads=r, rng=0).to_dense()) for r in (2, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_randomized_on_every_library(xp):
    a = matrix("low rank + noise")
    reference = lr.randomized_svd(a, 6, rng=0)
    f = lr.randomized_svd(xp.asarray(a), 6, rng=0)
    eps = np.finfo(a.dtype).eps
    assert_same_product(reference, on_host(xp, f), tol=100 * eps**0.75)
    assert abs(f.error - reference.error) <= np.sqrt(eps) * reference.error


# -- the other end of the spectrum --


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DOUBLE_ONLY])
def test_minor_triplets(name, dtype, transposed):
    k = 7
    a = matrix(name, dtype)
    a = a.conj().T if transposed else a
    f = lr.minor_svd(a, k)
    eps = np.finfo(dtype).eps
    scale = abs(a).max() or 1.0
    a, s = wide(a) / scale, wide(f.s) / scale
    truth, noise = exact(a)[-k:], 20 * eps * np.linalg.norm(a)
    assert np.all(abs(s - truth) <= wide(f.bounds) / scale + 10 * EPS64 * np.linalg.norm(a))
    u, vh = wide(f.u), wide(f.vh)
    for residual in (a.conj().T @ u - vh.conj().T * s, a @ vh.conj().T - u * s):
        assert np.linalg.norm(residual, axis=0).max() <= noise
    for gram in (u.conj().T @ u, vh @ vh.conj().T):
        assert abs(gram - np.eye(k)).max() <= 40 * eps
    check_canonical(f)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minor_subspace(dtype, xp):
    k, low = 10, 1e-3
    spectrum = np.where(np.arange(N) < N - k, 1.0, low)
    a = with_spectrum(spectrum).astype(dtype)
    f = lr.minor_svd(xp.asarray(a), k)
    truth = np.linalg.svd(wide(a), full_matrices=False)
    eps = np.finfo(dtype).eps
    for found, basis in ((f.u, truth[0][:, -k:]), (f.vh.mT, truth[2][-k:].T)):
        angle = lr.principal_angles(wide(xp.host(found)), basis).max()
        assert angle <= 100 * eps / (1 - low) + 100 * EPS64


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_singular_values(name, dtype):
    a = matrix(name, dtype)
    s = lr.singular_values(a)
    scale = float(abs(a).max()) or 1.0
    truth = exact(wide(a) / scale) * scale
    assert s.dtype == np.finfo(dtype).dtype
    assert abs(wide(s) - truth).max() <= 20 * np.finfo(dtype).eps * truth[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_singular_values_of_every_library(dtype, xp):
    a = matrix("1/j", dtype)
    s = xp.host(lr.singular_values(xp.asarray(a.T)))
    assert abs(s - exact(a)).max() <= 20 * np.finfo(dtype).eps


# -- edges --


@pytest.mark.parametrize("function", [lr.truncated_svd, lr.minor_svd, lr.randomized_svd])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_vectors(shape, function):
    a = gaussian(*shape)
    f = function(a, 1)
    eps = np.finfo(a.dtype).eps
    assert abs(f.s[0] - np.linalg.norm(a)) <= 10 * eps * f.s[0]
    assert np.linalg.norm(a - f.to_dense()) <= 20 * eps * f.s[0]


@pytest.mark.parametrize("tol", [None, 0.1])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape, tol, xp):
    f = lr.truncated_svd(xp.asarray(np.zeros(shape)), tol=tol)
    assert f.shape == shape
    assert f.rank == 0
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.0"):
        lr.truncated_svd(xp.asarray(np.zeros(shape)), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_zero_matrix_by_tolerance(dtype):
    f = lr.truncated_svd(np.zeros((M, N), dtype), tol=0.1)
    assert f.rank == 1
    assert f.s[0] == 0.0
    assert abs(np.linalg.norm(f.u) - 1) <= 10 * np.finfo(dtype).eps


def test_empty_batch(xp):
    f = lr.truncated_svd(xp.asarray(np.zeros((0, M, N))), 3)
    assert tuple(f.u.shape) == (0, M, 3)


ANY = np.ones((4, 3))
BAD_RANKS = [
    (0, ValueError, r"rank must be in 1\.\.3 for shape 4 x 3, got 0"),
    (-1, ValueError, r"rank must be in 1\.\.3 for shape 4 x 3, got -1"),
    (4, ValueError, r"rank must be in 1\.\.3 for shape 4 x 3, got 4"),
    (True, TypeError, "rank must be an integer, got True"),
    (2.0, TypeError, "rank must be an integer, got 2.0"),
    ("2", TypeError, "rank must be an integer, got '2'"),
]


@pytest.mark.parametrize("function", [lr.truncated_svd, lr.minor_svd, lr.randomized_svd])
@pytest.mark.parametrize(("rank", "error", "text"), BAD_RANKS)
def test_bad_ranks(function, rank, error, text):
    with pytest.raises(error, match=text):
        function(ANY, rank)


@pytest.mark.parametrize("tol", [0, 1, -0.1, 2.0, float("nan")])
def test_bad_tolerances(tol):
    with pytest.raises(ValueError, match=r"tol must be in \(0, 1\), got"):
        lr.truncated_svd(ANY, tol=tol)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lr.truncated_svd([[1.0]], 1), TypeError, "got list; wrap lists with numpy"),
        (lambda: lr.truncated_svd(np.ones(3), 1), ValueError, "needs a matrix, got an array of"),
        (lambda: lr.truncated_svd(np.ones((2, 4, 3)), tol=0.1), ValueError, "needs one rank"),
        (lambda: lr.truncated_svd(np.array([["a"]]), 1), TypeError, "dtype must be floating"),
        (lambda: lr.randomized_svd(ANY, 1, reads=1), ValueError, "reads must be at least 2, got 1"),
        (lambda: lr.randomized_svd(ANY, 1, oversampling=-1), ValueError, "at least 0, got -1"),
        (lambda: lr.minor_svd(np.ones((2, 4, 3)), 1), ValueError, "needs a matrix"),
        (lambda: lr.singular_values([1.0]), TypeError, "got list"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


CALLS = {
    "krylov": lambda a: lr.truncated_svd(a, 4),
    "gram": lambda a: lr.truncated_svd(a, GRAM_RANK),
    "lapack": lambda a: lr.truncated_svd(a),
    "tolerance": lambda a: lr.truncated_svd(a, tol=0.1),
    "randomized": lambda a: lr.randomized_svd(a, 4),
    "minor": lambda a: lr.minor_svd(a, 4),
    "values": lr.singular_values,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("call", CALLS)
def test_not_finite(call, value, dtype, xp):
    a = gaussian(M, N, dtype=dtype)
    a[17, 5] = value
    with pytest.raises(ValueError, match="the matrix must be finite, got NaN or inf"):
        CALLS[call](xp.asarray(a))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e300), (np.float64, 1e-300), (np.float32, 1e30)]
)
def test_extreme_scales(call, dtype, scale):
    a = matrix("1/j", dtype)
    expected, found = CALLS[call](a), CALLS[call](a * dtype(scale))
    s, reference = (getattr(f, "s", f) for f in (found, expected))
    eps = np.finfo(dtype).eps
    assert s.shape == reference.shape or call in ("tolerance",)
    size = min(len(s), len(reference))
    assert abs(s[:size] / dtype(scale) - reference[:size]).max() <= 100 * np.sqrt(eps)
