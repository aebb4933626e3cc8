"""Nearest Kronecker products, and joint factorizations of dense and factored stacks."""

import numpy as np
import pytest
from cases import gaussian, orthonormal

import lowrank_sp as lr
from lowrank_sp import LowRank, Stop
from lowrank_sp.tensors import CP, Kronecker, joint_diagonal, joint_svd, nearest_kronecker, tucker2
from lowrank_sp.tensors.rearrange import _Rearranged
from lowrank_sp.tensors.source import FactoredStack
from lowrank_sp.tensors.subspace import gram_is_cheap, improved
from lowrank_sp.testing import assert_adjoint

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def kron_sum(left, right):
    return sum(np.kron(a, b) for a, b in zip(left, right, strict=True))


def rearranged(w, outer, inner):
    """Every block of ``w`` as a row, one block after the other."""
    rows = [
        w[i * inner[0] : (i + 1) * inner[0], j * inner[1] : (j + 1) * inner[1]].ravel()
        for i in range(outer[0])
        for j in range(outer[1])
    ]
    return np.array(rows)


# Kronecker products.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outer", "inner"), [((3, 4), (5, 2)), ((1, 4), (5, 3)), ((6, 1), (1, 7)), ((2, 2), (1, 1))]
)
def test_operator_is_the_sum_of_kronecker_products(outer, inner, dtype):
    left, right = gaussian(3, *outer, dtype=dtype), gaussian(3, *inner, seed=1, dtype=dtype)
    k, w = Kronecker(left, right), kron_sum(left, right)
    tol = 100 * np.finfo(dtype).eps * np.linalg.norm(w)
    assert k.shape == w.shape
    assert k.terms == 3
    assert k.parameters == left.size + right.size
    assert np.linalg.norm(k.to_dense() - w) <= tol
    assert abs(k.norm() - np.linalg.norm(w)) <= tol
    x = gaussian(w.shape[1], 2, seed=2, dtype=dtype)
    assert np.linalg.norm(k @ x - w @ x) <= tol * np.linalg.norm(x)
    assert_adjoint(k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 2, 4])
def test_sums_of_kronecker_products_are_recovered(terms, dtype):
    left = gaussian(terms, 3, 4, dtype=dtype)
    w = kron_sum(left, gaussian(terms, 5, 2, seed=1, dtype=dtype))
    k = nearest_kronecker(w, (3, 4), terms=terms)
    tol = 100 * np.finfo(dtype).eps * np.linalg.norm(w)
    assert k.left.dtype == dtype
    assert np.linalg.norm(k.to_dense() - w) <= tol
    assert k.error <= tol


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("terms", [1, 3, 8])
def test_error_is_the_tail_of_the_rearranged_spectrum(terms, dtype):
    w = gaussian(12, 10, dtype=dtype)
    s = np.linalg.svd(rearranged(w, (3, 5), (4, 2)), compute_uv=False)
    k = nearest_kronecker(w, (3, 5), terms=terms)
    tail = np.linalg.norm(s[terms:])
    assert abs(np.linalg.norm(w - k.to_dense()) - tail) <= 1e-12 * np.linalg.norm(w)
    assert abs(k.error - tail) <= 1e-12 * np.linalg.norm(w)
    # Balanced, and orthogonal among the terms.
    for parts in (k.left, k.right):
        flat = parts.reshape(terms, -1)
        assert np.allclose(flat.conj() @ flat.T, np.diag(s[:terms]), atol=1e-12 * s[0])


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_factored_matrices_are_not_formed(dtype):
    w = LowRank(gaussian(12, 3, dtype=dtype), gaussian(3, 10, seed=1, dtype=dtype))
    operator = _Rearranged(w, (3, 5), (4, 2))
    assert np.allclose(operator.to_dense(), rearranged(w.to_dense(), (3, 5), (4, 2)))
    assert_adjoint(operator)
    k, dense = (nearest_kronecker(a, (3, 5), terms=2) for a in (w, w.to_dense()))
    assert np.allclose(k.to_dense(), dense.to_dense(), atol=1e-10)
    assert np.isclose(k.error, dense.error)
    exact = nearest_kronecker(w, (3, 5), terms=8)
    assert np.allclose(exact.to_dense(), w.to_dense())
    assert exact.error is None  # below what the difference of two norms can tell


def test_kronecker_of_every_library(xp):
    left, right = gaussian(2, 3, 4), gaussian(2, 5, 2, seed=1)
    w = kron_sum(left, right) + 0.1 * gaussian(15, 8, seed=2)
    reference, k = nearest_kronecker(w, (3, 4)), nearest_kronecker(xp.asarray(w), (3, 4))
    assert type(k.left) is type(xp.asarray(w))
    assert k.device == xp.asarray(w).device
    assert np.allclose(xp.host(k.to_dense()), reference.to_dense())
    assert np.allclose(xp.host(k.left), reference.left)
    x = gaussian(8, 2, seed=3)
    assert np.allclose(xp.host(k @ xp.asarray(x)), reference @ x)


def test_kronecker_is_checked():
    with pytest.raises(ValueError, match="shape must divide that of the matrix, 12 x 10, got 5 x"):
        nearest_kronecker(np.ones((12, 10)), (5, 2))
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.8"):
        nearest_kronecker(np.ones((12, 10)), (3, 5), terms=9)
    with pytest.raises(ValueError, match="w must be one matrix"):
        nearest_kronecker(np.ones((2, 12, 10)), (3, 5))
    with pytest.raises(ValueError, match="factors must have shapes"):
        Kronecker(np.ones((2, 3, 4)), np.ones((3, 3, 4)))
    assert repr(Kronecker(np.ones((2, 3, 4)), np.ones((2, 3, 4)))) == (
        "Kronecker(9 x 16, 2 terms, float64)"
    )


# Joint factorizations.


def shared(count=6, m=20, n=15, rank=3, *, noise=0.0, dtype=np.float64, diagonal=False):
    """A stack with shared factors, each matrix a LowRank of a rank of its own."""
    rng = np.random.default_rng(0)
    complex_ = np.issubdtype(dtype, np.complexfloating)
    u, v = orthonormal(m, rank, rng, complex_), orthonormal(n, rank, rng, complex_)
    matrices = []
    for k in range(count):
        core = gaussian(rank, rank, seed=k, dtype=dtype)
        left = (u @ (np.diag(np.diag(core)) if diagonal else core)).astype(dtype)
        w = LowRank(left, v.T.astype(dtype))
        if noise:
            extra = k % 3 + 1
            e = LowRank(
                gaussian(m, extra, seed=k + 100, dtype=dtype),
                gaussian(extra, n, seed=k + 200, dtype=dtype),
            )
            w = w + (noise * float(w.norm() / e.norm())) * e
        matrices.append(w)
    return matrices


def stacked(matrices):
    return np.stack([w.to_dense() for w in matrices])


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_svd_is_exact_for_shared_factors(dtype):
    matrices = shared(dtype=dtype)
    x = stacked(matrices)
    batch = LowRank(np.stack([w.left for w in matrices]), np.stack([w.right for w in matrices]))
    for stack in (x, matrices, batch):
        solution = joint_svd(stack, rank=3)
        t = solution.value
        assert solution.converged
        assert t.rank == (6, 3, 3)
        assert t.core.dtype == dtype
        tol = 100 * np.finfo(dtype).eps
        assert np.linalg.norm(t.to_dense() - x) <= tol * np.linalg.norm(x)
        for u in t.factors:
            assert np.linalg.norm(u.conj().T @ u - np.eye(u.shape[1])) <= tol


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("rank", [2, (3, 4), (3, 15)], ids=str)
def test_joint_svd_of_factored_slices_is_that_of_dense_ones(rank, dtype):
    matrices = shared(noise=0.2, dtype=dtype)
    x = stacked(matrices)
    stop = Stop(500, tol=1e-14)
    factored, dense = (joint_svd(stack, rank=rank, stop=stop).value for stack in (matrices, x))
    size = np.linalg.norm(x)
    assert abs(factored.error - dense.error) <= 1e-9 * size
    assert np.linalg.norm(factored.to_dense() - dense.to_dense()) <= 1e-5 * size
    assert abs(factored.error - np.linalg.norm(x - factored.to_dense())) <= 1e-12 * size
    assert dense.error == tucker2(x, rank=rank, stop=stop).value.error


def test_joint_svd_of_one_matrix_is_its_svd():
    w = LowRank(gaussian(20, 8), gaussian(8, 15, seed=1))
    t = joint_svd([w], rank=3).value
    assert np.isclose(t.error, (w - lr.truncated_svd(w, 3)).norm())


def test_joint_svd_never_loses():
    matrices, norms = shared(noise=0.5), []
    start = joint_svd(matrices, rank=2, stop=Stop(0)).value
    solution = joint_svd(
        matrices, rank=2, init=start, callback=lambda _k, _change, t: norms.append(t.error)
    )
    assert solution.converged
    assert np.all(np.diff([start.error, *norms]) <= 1e-12)
    with pytest.raises(ValueError, match="init must have shape"):
        joint_svd(matrices, rank=3, init=start)


def test_joint_svd_is_no_worse_than_any_rotation():
    """Stationary: no small rotation of U lowers the error."""
    matrices = shared(noise=0.5)
    x = stacked(matrices)
    t = joint_svd(matrices, rank=2, stop=Stop(500, tol=1e-13)).value
    _, left, right = t.factors
    captured = np.linalg.norm(left.T @ x @ right)
    for seed in range(10):
        q = np.linalg.qr(left + 1e-3 * gaussian(*left.shape, seed=seed))[0]
        assert np.linalg.norm(q.T @ x @ right) <= captured
        q = np.linalg.qr(right + 1e-3 * gaussian(*right.shape, seed=seed))[0]
        assert np.linalg.norm(left.T @ x @ q) <= captured


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_joint_diagonal_recovers(dtype):
    matrices = shared(dtype=dtype, diagonal=True)
    x = stacked(matrices)
    for stack in (matrices, x):
        solution = joint_diagonal(stack, rank=3, rng=0)
        assert solution.converged
        assert isinstance(solution.value, CP)
        assert solution.value.shape == x.shape
        assert solution.value.error <= 1e-10 * np.linalg.norm(x)
        for k, w in enumerate(matrices):
            assert (solution.value.matrix(k) - w).norm() <= 1e-9 * w.norm()


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_joint_diagonal_of_factored_slices_is_that_of_dense_ones(dtype):
    matrices = shared(noise=0.2, dtype=dtype)
    x = stacked(matrices)
    init = CP.of_factors([gaussian(n, 4, seed=k, dtype=dtype) for k, n in enumerate(x.shape)])
    stop = Stop(10, tol=None)
    factored, dense = (
        joint_diagonal(stack, rank=4, init=init, stop=stop).value for stack in (matrices, x)
    )
    size = np.linalg.norm(x)
    assert np.linalg.norm(factored.to_dense() - dense.to_dense()) <= 1e-9 * size
    assert np.isclose(factored.error, np.linalg.norm(x - factored.to_dense()))


def test_many_factored_matrices_are_compressed_first():
    """Sweeps over the core and over the stack end at the same place."""
    matrices = shared(12, 120, 100, 3, noise=0.05, diagonal=True)
    x = stacked(matrices)
    factored, dense = (joint_diagonal(stack, rank=3, rng=0) for stack in (matrices, x))
    assert factored.converged
    assert np.isclose(factored.value.error, dense.value.error, rtol=1e-9)


@pytest.mark.parametrize("solve", [joint_svd, joint_diagonal])
def test_joint_factorizations_of_every_library(solve, xp):
    matrices = shared(4, 8, 7, 2, noise=0.1)
    moved = [LowRank(xp.asarray(w.left), xp.asarray(w.right)) for w in matrices]
    value = solve(moved, rank=2, rng=0, stop=Stop(4, tol=None)).value
    reference = solve(matrices, rank=2, rng=0, stop=Stop(4, tol=None)).value
    x = value.to_dense()
    assert type(x) is type(moved[0].left)
    assert x.device == moved[0].left.device
    assert np.allclose(xp.host(x), reference.to_dense(), atol=1e-8)


@pytest.mark.parametrize("solve", [joint_svd, joint_diagonal])
def test_stacks_are_checked(solve):
    w = LowRank(np.ones((3, 1)), np.ones((1, 4)))
    for bad, error, message in (
        ([], TypeError, "a stack must be"),
        ([np.ones((3, 4))], TypeError, "a stack must be"),
        ([w, w.mT], ValueError, "matrices of a stack must have one shape"),
        (w, ValueError, r"a stack of matrices has shape \(L, m, n\)"),
        (np.ones((3, 4)), ValueError, r"a stack of matrices has shape \(L, m, n\)"),
        ([w, np.nan * w], ValueError, "must be finite"),
    ):
        with pytest.raises(error, match=message):
            solve(bad, rank=1)
    zero = solve([0.0 * w, 0.0 * w], rank=1, rng=0)
    assert zero.converged
    assert zero.value.error == 0.0


def wide_stack(dtype=np.float64, count=70, m=300, n=280, rank=5):
    """Factored matrices so large that a sweep improves its subspaces rather than finds them."""
    shared_left, shared_right = gaussian(m, 5, dtype=dtype), gaussian(5, n, seed=1, dtype=dtype)
    matrices = []
    for k in range(count):
        left = shared_left @ gaussian(5, rank, seed=2 * k, dtype=dtype)
        right = gaussian(rank, 5, seed=2 * k + 1, dtype=dtype) @ shared_right
        noise = (gaussian(*f.shape, seed=k + 50, dtype=dtype) / 2 for f in (left, right))
        matrices.append(LowRank(*(f + e for f, e in zip((left, right), noise, strict=True))))
    return matrices


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_joint_svd_of_large_stacks_is_that_of_dense_ones(dtype):
    matrices, errors = wide_stack(dtype), []
    x = stacked(matrices)
    factored = joint_svd(
        matrices,
        rank=4,
        rng=0,
        stop=Stop(500, tol=1e-14),
        callback=lambda _k, _change, t: errors.append(t.error),
    ).value
    dense = joint_svd(x, rank=4, stop=Stop(500, tol=1e-14)).value
    size = np.linalg.norm(x)
    # Else the subspaces are found by other means.
    assert not gram_is_cheap(np.empty((300, 4 * len(matrices))), 0, 4)
    assert np.all(np.diff(errors) <= 1e-12 * size)
    assert abs(factored.error - dense.error) <= 1e-10 * size
    assert np.linalg.norm(factored.to_dense() - dense.to_dense()) <= 1e-5 * size
    assert abs(factored.error - np.linalg.norm(x - factored.to_dense())) <= 1e-12 * size


def test_joint_svd_of_large_stacks_on_every_library(xp):
    matrices = [LowRank(xp.asarray(w.left), xp.asarray(w.right)) for w in wide_stack(np.float32)]
    solution = joint_svd(matrices, rank=4, rng=0)
    expected = joint_svd(stacked(wide_stack(np.float32)), rank=4).value
    assert solution.converged
    assert solution.value.error <= (1 + 1e-3) * expected.error


def test_distances_of_near_matrices_keep_their_digits():
    matrices = wide_stack(count=30)
    w = LowRank(np.stack([w.left for w in matrices]), np.stack([w.right for w in matrices]))
    source = FactoredStack.of(w)
    scale = 1e-9
    left, right = gaussian(300, 6), gaussian(7, 280, seed=3)
    cores = scale * gaussian(30, 6, 7, seed=4)
    model = left @ cores @ right
    found = source.distances(left, cores, right)
    assert np.allclose(found, np.linalg.norm(w.to_dense() - model, axis=(1, 2)), rtol=1e-12)
    near = LowRank(w.left[:1], w.right[:1])
    exact = FactoredStack.of(near).distances(w.left[0], np.eye(5)[None] * (1 + scale), w.right[0])
    assert np.isclose(exact[0], scale * np.linalg.norm(near.to_dense()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_an_improved_subspace_holds_the_old_one_and_its_image(dtype):
    x = gaussian(6, 40, 5, dtype=dtype)
    u = orthonormal(40, 3, np.random.default_rng(0), np.iscomplexobj(x))
    gram = np.sum(x @ x.conj().mT, axis=0)
    q, _ = np.linalg.qr(np.concatenate([u, gram @ u], axis=1))
    best = np.sum(np.linalg.eigvalsh(q.conj().T @ gram @ q)[-3:])
    v = improved(x, u)
    assert np.linalg.norm(v.conj().T @ v - np.eye(3)) <= 1e-13
    assert np.isclose(np.trace(v.conj().T @ gram @ v).real, best, rtol=1e-12)
