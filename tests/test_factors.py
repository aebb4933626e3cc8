"""``LowRank`` and ``SVD``: exact algebra on factors against the same algebra on dense arrays."""

import numpy as np
import pytest
from cases import gaussian, with_spectrum

import lowrank_sp as lr
from lowrank_sp._arrays import to_host
from lowrank_sp.testing import assert_same_product

DTYPES = [np.float32, np.float64, np.complex128]
BATCHES = [(), (2,), (2, 3)]
EPS = np.finfo(np.float64).eps


def low_rank(m, n, r, *, batch=(), dtype=np.float64, seed=0):
    left = gaussian(*batch, m, r, dtype=dtype, seed=seed)
    return lr.LowRank(left, gaussian(*batch, r, n, dtype=dtype, seed=seed + 1))


def close(a, b, size=None):
    """Assert that two numbers or stacks of numbers agree to rounding."""
    a, b = (np.asarray(x) for x in (a, b))
    eps = np.finfo(b.dtype).eps
    scale = abs(b).max() if size is None else size
    assert a.shape == b.shape
    assert abs(a - b).max() <= 200 * eps * scale


@pytest.fixture(params=DTYPES, ids=lambda d: np.dtype(d).name)
def dtype(request):
    return request.param


@pytest.fixture(params=BATCHES, ids=str)
def batch(request):
    return request.param


@pytest.fixture
def pair(batch, dtype):
    """Two factored matrices of one shape and their dense counterparts."""
    a, b = (low_rank(9, 7, r, batch=batch, dtype=dtype, seed=10 * r) for r in (3, 2))
    return a, b, a.left @ a.right, b.left @ b.right


def test_algebra(pair):
    f, g, a, b = pair
    for found, expected in (
        (f + g, a + b),
        (f - g, a - b),
        (2.5 * f, 2.5 * a),
        (f * -1, -a),
        (-f, -a),
        (f / 4 if hasattr(f, "__truediv__") else f * 0.25, a / 4),
        (f.mT, a.mT),
        (f.mH, a.mT.conj()),
        (f @ g.mT, a @ b.mT),
        (f.mH @ g, a.mT.conj() @ b),
        (f.hadamard(g), a * b),
        (f[2:5], a[..., 2:5, :]),
        (f[:, 1:6:2], a[..., 1:6:2]),
        (f[::-1, :3], a[..., ::-1, :3]),
    ):
        assert isinstance(found, lr.LowRank)
        assert found.shape == expected.shape
        assert found.dtype == a.dtype
        assert_same_product(expected, found)


def test_ranks_add_and_multiply(pair):
    f, g, *_ = pair
    assert (f + g).rank == 5
    assert f.hadamard(g).rank == 6
    assert (f @ g.mT).rank == 2
    assert (g @ f.mT).rank == 2


def test_numbers(pair):
    f, g, a, b = pair
    axes = (-2, -1)
    close(f.norm(), np.linalg.norm(a, axis=axes))
    close(f.svd().norm(), np.linalg.norm(a, axis=axes))
    close(
        f.inner(g),
        np.sum(a.conj() * b, axis=axes),
        size=(np.linalg.norm(a) * np.linalg.norm(b)),
    )
    x = gaussian(*a.shape[:-2], 7, 4, dtype=a.dtype)
    assert_same_product(a @ x, f @ x)
    assert_same_product(a @ x, f.svd() @ x)


def test_svd_is_that_of_the_dense_matrix(pair):
    f, _, a, _ = pair
    found = f.svd()
    truth = np.linalg.svd(a, compute_uv=False)[..., :3]
    assert np.all(abs(found.s - truth) <= found.bounds)
    assert_same_product(a, found)
    eps = np.finfo(a.dtype).eps
    for gram in (found.u.mT.conj() @ found.u, found.vh @ found.vh.mT.conj()):
        assert abs(gram - np.eye(3)).max() <= 40 * eps
    for turned, dense in ((found.mT, a.mT), (found.mH, a.mT.conj())):
        assert isinstance(turned, lr.SVD)
        assert_same_product(dense, turned)
    u, s, vh = found
    assert_same_product(a, u * s[..., None, :] @ vh)


@pytest.mark.parametrize("where", ["balanced", "left", "right"])
def test_split(pair, where):
    _, _, a, _ = pair
    f = pair[0].svd()
    left, right = f.split(where).factors()
    assert_same_product(a, left @ right)
    diagonal = f.s[..., None] * np.eye(3)
    grams = left.mT.conj() @ left, right @ right.mT.conj()
    expected = {"balanced": (1, 1), "left": (2, 0), "right": (0, 2)}[where]
    for gram, power in zip(grams, expected, strict=True):
        assert_same_product(diagonal**power * np.eye(3), gram)


def test_rank_larger_than_the_sides():
    f = low_rank(4, 5, 12)
    assert f.svd().rank == 4
    assert_same_product(f.left @ f.right, f.svd())


@pytest.mark.parametrize("gap", [1e-3, 1e-8, 1e-12])
def test_difference_of_nearly_equal_matrices_keeps_its_digits(gap):
    f = low_rank(80, 60, 4)
    change = low_rank(80, 60, 1, seed=5)
    close(((f + gap * change) - f).norm() / gap, change.norm(), size=change.norm() / gap)
    g = lr.LowRank(f.left * (1 + gap), f.right)
    stored = g.left - f.left
    true = lr.LowRank(stored, f.right).norm()
    assert abs((g - f).norm() - true) <= 100 * EPS * f.norm()


def test_difference_is_exactly_zero_relative_to_its_parts():
    f = low_rank(80, 60, 4)
    assert (f - f).norm() <= 10 * EPS * f.norm()


@pytest.mark.parametrize("scale", [1e-200, 1e-150, 1e150, 1e200])
def test_norms_do_not_overflow(scale):
    f = low_rank(8, 6, 2)
    close((scale * f).norm() / scale, np.asarray(f.norm()))
    found = (scale * f).svd()
    close(found.norm() / scale, np.asarray(f.norm()))
    close(found.bounds / scale, f.svd().bounds)


def test_on_every_library(xp):
    f, g = low_rank(9, 7, 3), low_rank(9, 7, 2, seed=4)
    h, k = (lr.LowRank(xp.asarray(x.left), xp.asarray(x.right)) for x in (f, g))
    for found, expected in (
        (h + k, f + g),
        (h - 2 * k, f - 2 * g),
        (h @ k.mT, f @ g.mT),
        (h.hadamard(k), f.hadamard(g)),
        (h.svd(rank=2), f.svd(rank=2)),
        (h.svd().split(), f),
        (h[1:4, 2:], f[1:4, 2:]),
    ):
        assert type(found.to_dense()) is type(h.left)
        assert_same_product(expected, to_host(found.to_dense()))
    close(h.norm(), np.asarray(f.norm()))
    close(float(h.inner(k)), np.asarray(f.inner(g)), size=f.norm() * g.norm())
    assert lr.relative_error(h, h + 0.0 * k) <= 100 * EPS


# -- truncation --

SPECTRUM = 2.0 ** -np.arange(8)


def graded():
    return lr.truncated_svd(with_spectrum(SPECTRUM, 12, 8))


@pytest.mark.parametrize("rank", range(1, 9))
def test_truncate_by_rank(rank):
    f = graded()
    g = f.truncate(rank)
    assert g.rank == rank
    assert len(g.bounds) == rank
    assert np.array_equal(g.s, f.s[:rank])
    close(g.error, np.linalg.norm(SPECTRUM[rank:]), size=1.0)
    close(g.truncate(1).error, np.linalg.norm(SPECTRUM[1:]))
    close((f - g).norm(), np.linalg.norm(SPECTRUM[rank:]), size=1.0)


@pytest.mark.parametrize("tol", [0.9, 0.5, 0.1, 0.01, 1e-6])
def test_truncate_by_tolerance(tol):
    f = graded()
    g = f.truncate(tol=tol)
    size = np.linalg.norm(SPECTRUM)
    assert np.linalg.norm(SPECTRUM[g.rank :]) <= tol * size
    assert g.rank == 1 or np.linalg.norm(SPECTRUM[g.rank - 1 :]) > tol * size
    assert f.truncate(2, tol=tol).rank == min(2, g.rank)
    assert f.to_dense().shape == g.to_dense().shape


def test_truncate_counts_the_error_made_before():
    f = graded()
    once = f.truncate(3)
    # What is gone already exceeds this tolerance, so nothing more may go.
    assert once.truncate(tol=0.05).rank == 3
    assert once.truncate(tol=0.5).rank == f.truncate(tol=0.5).rank
    unknown = lr.SVD(once.u, once.s, once.vh)
    assert unknown.truncate(tol=0.3).error is None
    assert unknown.truncate(1).bounds is None


def test_tiny_tails_keep_their_digits():
    spectrum = np.array([1.0, 1e-9, 1e-10, 1e-11])
    f = lr.SVD(np.eye(5, 4), spectrum, np.eye(4))
    for k, tol in ((1, 2e-9), (2, 2e-10), (3, 2e-11), (4, 1e-12)):
        assert f.truncate(tol=tol).rank == k


def test_zero_matrix_keeps_one_triplet():
    f = lr.LowRank(np.zeros((4, 2)), np.zeros((2, 3))).svd(tol=0.1)
    assert (f.rank, f.norm()) == (1, 0.0)


def test_batched_truncation():
    f = low_rank(9, 7, 3, batch=(2,)).svd()
    assert f.truncate(2).shape == (2, 9, 7)
    with pytest.raises(ValueError, match="tol needs one matrix, not a batch"):
        f.truncate(tol=0.1)


ONE = np.ones((4, 2)), np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: lr.LowRank(np.ones((4, 2)), np.ones((3, 5))),
            ValueError,
            r"factors must have shapes \(..., m, r\) and \(..., r, n\), got \(4, 2\) and \(3, 5\)",
        ),
        (lambda: lr.LowRank(np.ones(4), np.ones((1, 5))), ValueError, "factors must have shapes"),
        (
            lambda: lr.LowRank(np.ones((4, 2), np.float32), np.ones((2, 5))),
            TypeError,
            "factors must have one dtype, got float32 and float64; cast one of them first",
        ),
        (lambda: lr.LowRank(*ONE) + lr.LowRank(ONE[0], np.ones((2, 4))), ValueError, "be equal"),
        (lambda: lr.LowRank(*ONE)[1], TypeError, "index with slices, got 1; entries need"),
        (lambda: lr.LowRank(*ONE)[[0, 1]], TypeError, "index with slices"),
        (lambda: lr.LowRank(*ONE).svd(0), ValueError, r"rank must be in 1..2 for shape 4 x 3"),
        (lambda: lr.LowRank(*ONE).svd(3), ValueError, r"rank must be in 1..2 for shape 4 x 3"),
        (lambda: lr.LowRank(*ONE).svd(True), TypeError, "rank must be an integer, got True"),
        (lambda: lr.LowRank(*ONE).svd(1.0), TypeError, "rank must be an integer, got 1.0"),
        (lambda: lr.LowRank(*ONE).svd(tol=0.0), ValueError, r"tol must be in \(0, 1\), got 0.0"),
        (lambda: lr.LowRank(*ONE).svd(tol=1.5), ValueError, r"tol must be in \(0, 1\), got 1.5"),
        (lambda: lr.LowRank(*ONE).svd().split("up"), ValueError, "where must be .* got 'up'"),
        (lambda: lr.LowRank(*ONE) @ lr.LowRank(*ONE), ValueError, "inner dimensions must agree"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_repr():
    f = low_rank(9, 7, 3, dtype=np.float32)
    assert repr(f) == "LowRank(9 x 7, rank 3, float32)"
    assert repr(f.svd()) == "SVD(9 x 7, rank 3, float32)"


def test_half_precision_is_computed_in_single():
    left, right = gaussian(30, 3).astype(np.float16), gaussian(3, 20, seed=1).astype(np.float16)
    f = lr.LowRank(left, right)
    exact = np.linalg.norm(left.astype(float) @ right.astype(float))
    assert f.norm() == pytest.approx(exact, rel=1e-5)
    assert f.svd().u.dtype == np.float32
