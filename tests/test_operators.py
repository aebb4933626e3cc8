"""Laws of linear operators: adjoint, shapes, norm, algebra, and what is refused."""

import array_api_strict
import dask
import dask.array
import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from cases import gaussian

import lowrank_sp as lr
from lowrank_sp._arrays import namespace, to_host
from lowrank_sp.operators import Adjoint, Dask, Dense, Product, Rows, Scaled, SciPy, Sparse, Sum
from lowrank_sp.testing import assert_adjoint, assert_same_product

SHAPE = (23, 17)
REAL, COMPLEX = np.float64, np.complex128


@pytest.fixture(autouse=True)
def _synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def mapped(a, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


def rows_of(a, rows=5):
    return Rows(a.shape, lambda start, stop: a[start:stop], like=a[:0, :0], rows=rows)


def identity(a):
    return np.eye(a.shape[1], dtype=a.dtype)


def spectral(a):
    return lr.SVD.canonical(*np.linalg.svd(a, full_matrices=False))


#: How to make an operator of a NumPy array, and the class it must be of.
OPERATORS = {
    "dense": (lambda a, _: lr.as_operator(a), Dense),
    "torch": (lambda a, _: lr.as_operator(torch.asarray(a)), Dense),
    "jax": (lambda a, _: lr.as_operator(jax.numpy.asarray(a)), Dense),
    "strict": (
        lambda a, _: lr.as_operator(
            array_api_strict.asarray(a, device=array_api_strict.Device("device1"))
        ),
        Dense,
    ),
    "rows": (lambda a, _: rows_of(a), Rows),
    "one row at a time": (lambda a, _: rows_of(a, 1), Rows),
    "memmap": (lambda a, path: lr.as_operator(mapped(a, path)), Rows),
    "csr": (lambda a, _: lr.as_operator(scipy.sparse.csr_array(a)), Sparse),
    "csc": (lambda a, _: lr.as_operator(scipy.sparse.csc_matrix(a)), Sparse),
    "coo": (lambda a, _: lr.as_operator(scipy.sparse.coo_array(a)), Sparse),
    "scipy": (lambda a, _: lr.as_operator(scipy.sparse.linalg.aslinearoperator(a)), SciPy),
    "dask rows": (lambda a, _: lr.as_operator(dask.array.from_array(a, chunks=(7, -1))), Dask),
    "dask blocks": (lambda a, _: lr.as_operator(dask.array.from_array(a, chunks=(7, 5))), Dask),
    "low rank": (lambda a, _: lr.LowRank(a, identity(a)), lr.LowRank),
    "svd": (lambda a, _: spectral(a), lr.SVD),
    "adjoint": (lambda a, _: rows_of(a.conj().T.copy()).mH, Adjoint),
    "dense adjoint": (lambda a, _: lr.as_operator(a.conj().T.copy()).mH, lr.LinearOperator),
    "transpose": (lambda a, _: lr.as_operator(a.T.copy()).mT, lr.LinearOperator),
    "scaled": (lambda a, _: 4.0 * lr.as_operator(a / 4), Scaled),
    "sum": (lambda a, _: lr.as_operator(a / 4) + lr.as_operator(3 * a / 4), Sum),
    "difference": (lambda a, _: lr.as_operator(2 * a) - lr.as_operator(a), Sum),
    "product": (lambda a, _: lr.as_operator(a) @ lr.as_operator(identity(a)), Product),
}

dtypes = pytest.mark.parametrize("dtype", [np.float32, REAL, COMPLEX])


def dense(dtype):
    return gaussian(*SHAPE, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in OPERATORS
        for dtype in (np.float32, REAL, COMPLEX)
        if kind != "jax" or dtype is COMPLEX  # every shape it sees is compiled
    ],
)
def test_laws(kind, dtype, tmp_path):
    make, cls = OPERATORS[kind]
    a = dense(dtype)
    operator = make(a, tmp_path)
    assert isinstance(operator, cls)
    check_operator(operator, a)


def check_operator(operator, a):
    """Every law of an operator that stands for the NumPy array ``a``."""
    m, n = a.shape
    eps = np.finfo(a.dtype).eps
    size = np.linalg.norm(a)
    xp = namespace(operator.like)
    bring = lambda x: xp.asarray(x, device=operator.device)  # noqa: E731
    assert tuple(operator.shape) == (m, n)
    assert_adjoint(operator)
    x, y = gaussian(n, 3, dtype=a.dtype), gaussian(m, 3, seed=1, dtype=a.dtype)
    both = operator.normal(bring(x))
    sides = operator.two_sided(bring(x), bring(y))
    for product, expected in (
        (operator.matmul(bring(x)), a @ x),
        (operator.rmatmul(bring(y)), a.conj().T @ y),
        (operator @ bring(x), a @ x),
        (operator @ bring(x[:, 0]), a @ x[:, 0]),
        (operator.__rmatmul__(bring(y.T)), y.T @ a),
        (operator.__rmatmul__(bring(y[:, 0])), y[:, 0] @ a),
        (operator.mT @ bring(y), a.T @ y),
        (operator.mH @ bring(y), a.conj().T @ y),
        (operator.to_dense(), a),
        (operator.mT.to_dense(), a.T),
        (operator.mH.to_dense(), a.conj().T),
        (both[0], a @ x),
        (sides[0], a @ x),
        (sides[1], a.conj().T @ y),
        (both[1], a.conj().T @ (a @ x)),
    ):
        assert product.dtype == operator.dtype
        found = to_host(product)
        assert found.shape == expected.shape
        scale = size ** (2 if product is both[1] else 1) * (
            1 + np.linalg.norm(x) + np.linalg.norm(y)
        )
        assert np.linalg.norm(found - expected) <= 20 * eps * scale
    assert abs(operator.norm() - size) <= 20 * eps * size
    assert operator.mH.mH.shape == operator.shape


HALF = {
    "float16": lambda a: a.astype(np.float16),
    "bfloat16": lambda a: a.astype(ml_dtypes.bfloat16),
    "torch float16": lambda a: torch.asarray(a).to(torch.float16),
    "torch bfloat16": lambda a: torch.asarray(a).to(torch.bfloat16),
    "int8": lambda a: (10 * a).astype(np.int8),
    "bool": lambda a: a > 0,
}


@pytest.mark.parametrize("half", HALF)
def test_low_precision_is_read_by_rows(half):
    data = HALF[half](dense(np.float32))
    operator = lr.as_operator(data)
    assert isinstance(operator, Rows)
    wide = data.to(torch.float32).numpy() if isinstance(data, torch.Tensor) else data
    check_operator(operator, wide.astype(to_host(operator.to_dense()).dtype))


@pytest.mark.parametrize(
    "product",
    [lambda a, x, y: a.normal(x), lambda a, x, y: a.two_sided(x, y)],  # noqa: ARG005
    ids=["normal", "two_sided"],
)
def test_rows_are_read_once(product):
    a, reads = dense(REAL), []

    def read(start, stop):
        reads.append((start, stop))
        return a[start:stop]

    operator = Rows(a.shape, read, like=a[:0, :0], rows=10)
    product(operator, np.ones((SHAPE[1], 2)), np.ones((SHAPE[0], 3)))
    assert reads == [(0, 10), (10, 20), (20, 23)]


@pytest.mark.parametrize("factor", [2, -0.5, np.float32(3.0), np.int64(2), 1.5 - 2j])
def test_scalars(factor):
    dtype = COMPLEX if isinstance(factor, complex) else REAL
    a = dense(dtype)
    for scaled in (factor * lr.as_operator(a), lr.as_operator(a) * factor):
        check_operator(scaled, a * factor)
    check_operator(-lr.as_operator(a), -a)
    check_operator(factor * spectral(a), a * factor)


def test_array_on_the_left():
    a, y = dense(REAL), gaussian(2, SHAPE[0])
    assert_same_product(y @ a, y @ lr.as_operator(a))


def test_complex_factor_of_a_real_operator():
    with pytest.raises(TypeError):
        1j * lr.as_operator(dense(REAL))


@dtypes
def test_algebra(dtype):
    a, b, c = (
        gaussian(*shape, seed=i, dtype=dtype) for i, shape in enumerate([SHAPE, SHAPE, (17, 9)])
    )
    x, y, z = map(lr.as_operator, (a, b, c))
    low = lr.LowRank(a[:, :3], a[:3, :])
    check_operator((x - 2.0 * y) @ z, (a - 2 * b) @ c)
    check_operator((x @ z).mH, (a @ c).conj().T)
    check_operator(low + x, a[:, :3] @ a[:3] + a)
    check_operator(x - low, a - a[:, :3] @ a[:3])
    check_operator(low @ z, a[:, :3] @ a[:3] @ c)
    check_operator(y.mH @ x, b.conj().T @ a)


def test_nothing_is_made_dense():
    n, rank = 10**6, 2
    left, right = gaussian(n, rank), gaussian(rank, n, seed=1)
    f = lr.LowRank(left, right)
    x = gaussian(n, 3, seed=2)
    assert_same_product(left @ (right @ x), (f @ x))
    assert_same_product(right.T @ (left.T @ x), f.mT @ x)
    difference = (f + lr.as_operator(scipy.sparse.eye_array(n))) - f
    assert_same_product(x, difference @ x, tol=100 * np.finfo(REAL).eps * n)


MASKED = np.ma.masked_array(np.eye(3), mask=np.eye(3) > 0)
EYE = dask.array.eye(6, chunks=3)
UNKNOWN = EYE[EYE[:, 0] < 1]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lr.as_operator([[1.0]]), TypeError, "got list; wrap lists with numpy.asarray"),
        (lambda: lr.as_operator(None), TypeError, "got NoneType"),
        (lambda: lr.as_operator(np.ones(3)), ValueError, r"an array of shape \(3,\)"),
        (lambda: lr.as_operator(np.ones((2, 3, 4))), ValueError, r"of shape \(2, 3, 4\)"),
        (lambda: Dask(dask.array.ones(3)), ValueError, r"of shape \(3,\)"),
        (
            lambda: lr.as_operator(np.ones((3, 2))) @ np.ones((3, 2)),
            ValueError,
            r"inner dimensions must agree, got shapes \(3, 2\) and \(3, 2\)",
        ),
        (
            lambda: lr.as_operator(np.ones((3, 2))) @ lr.as_operator(np.ones((3, 2))),
            ValueError,
            "inner dimensions must agree",
        ),
        (
            lambda: lr.LowRank(np.ones((3, 1)), np.ones((1, 2))) @ np.ones(3),
            ValueError,
            "inner dimensions must agree",
        ),
        (
            lambda: lr.as_operator(np.ones((3, 2))) + lr.as_operator(np.ones((2, 3))),
            ValueError,
            r"shapes must be equal, got \(3, 2\) and \(2, 3\)",
        ),
        (
            lambda: lr.as_operator(np.ones((3, 2))) + lr.as_operator(torch.ones(3, 2)),
            TypeError,
            "arrays must come from one array library, got numpy.ndarray, torch.Tensor",
        ),
        (lambda: lr.as_operator(np.ones((3, 2))) + 1.0, TypeError, "unsupported operand"),
        (lambda: lr.as_operator(np.ones((3, 2))) * np.ones(2), TypeError, "operand"),
        (lambda: lr.as_operator(np.array([["a"]])), TypeError, "dtype must be floating"),
        (lambda: lr.as_operator(UNKNOWN), ValueError, r"compute_chunk_sizes\(\) on it first"),
        (lambda: lr.as_operator(MASKED), TypeError, r"Entries.from_mask\(a.data, ~a.mask\)"),
        (lambda: lr.truncated_svd(MASKED, 1), TypeError, "what is under the mask would count"),
        (lambda: lr.truncated_svd(torch.eye(3).to_sparse(), 1), TypeError, r"use to_dense\(\)"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_mixed_devices():
    strict = array_api_strict
    here, there = (
        strict.ones((3, 3), device=strict.Device(name)) for name in ("CPU_DEVICE", "device1")
    )
    with pytest.raises(ValueError, match=r"arrays must lie on one device, got .* and .*device1"):
        lr.as_operator(here) + lr.as_operator(there)


def test_empty_rows_and_columns():
    for shape in ((0, 4), (4, 0)):
        for operator in (lr.as_operator(np.zeros(shape)), rows_of(np.zeros(shape))):
            check_operator(operator, np.zeros(shape))


def test_repr():
    assert repr(lr.as_operator(np.ones((3, 2)))) == "Dense(3 x 2, float64)"


def test_repeated_entries_of_a_sparse_matrix_are_summed():
    where = np.repeat(np.arange(5), 4)
    data = np.repeat(1.0 / np.arange(1, 6) / 4, 4)
    a = scipy.sparse.csr_array((data, where, np.arange(0, 21, 4)), shape=(5, 5))
    operator = lr.as_operator(a)
    assert operator.norm() == pytest.approx(np.linalg.norm(1.0 / np.arange(1, 6)))
    assert not a.has_canonical_format


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-310])
def test_norms_at_extreme_scales(scale):
    a = dense(REAL)
    expected = np.linalg.norm(a)
    rows = Rows(a.shape, lambda start, stop: a[start:stop] * scale, like=a[:0, :0], rows=7)
    total = lr.as_operator(a * scale) + lr.as_operator(0 * a)
    for operator in (rows, total, lr.as_operator(a * scale)):
        assert abs(operator.norm() / scale - expected) <= 1e-12 * expected or scale < 1e-300


def test_subnormal_norm():
    assert lr.as_operator(np.full((3, 3), 1e-40, np.float32)).norm() == pytest.approx(3e-40)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: 1j * lr.as_operator(a), "cannot be multiplied by the complex number"),
        (lambda a: 1j * lr.LowRank(a, a.T), "cannot be multiplied by the complex number"),
        (
            lambda a: lr.as_operator(a) + lr.as_operator(a.astype(complex)),
            "one dtype, got float64 and complex128",
        ),
        (
            lambda a: lr.as_operator(a) @ lr.as_operator(a.T.astype(np.float32)),
            "one dtype, got float64 and float32",
        ),
    ],
)
def test_operators_of_different_kinds(call, text):
    with pytest.raises(TypeError, match=text):
        call(dense(REAL))


def test_a_parameter_of_torch_is_read_without_its_history():
    weight = torch.nn.Parameter(torch.ones(200, 150, dtype=torch.bfloat16))
    f = lr.truncated_svd(weight, 2)
    assert not f.u.requires_grad
    assert float(f.s[0]) == pytest.approx((200 * 150) ** 0.5)


def test_negated_views_of_torch():
    z = torch.complex(torch.ones(120, 110), torch.arange(110.0) + torch.zeros(120, 1))
    view = z.conj().imag
    assert view.is_neg()
    f = lr.truncated_svd(view, 1)
    assert float(f.s[0]) == pytest.approx(float(torch.linalg.norm(view.resolve_neg())), rel=1e-5)
