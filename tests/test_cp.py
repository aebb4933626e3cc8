"""Laws of CP tensors and of every method that finds one."""

from functools import reduce

import numpy as np
import pytest
import tensorly as tl
from cases import gaussian, orthonormal
from scipy.optimize import linear_sum_assignment
from tensorly.decomposition import parafac

from lowrank_sp import Stop, truncated_svd
from lowrank_sp.tensors import CP, TensorEntries, cp_als, cp_arls, cp_completion, cp_hals
from lowrank_sp.tensors.alternating import started, sweep
from lowrank_sp.tensors.cp_als import least_squares_step
from lowrank_sp.tensors.cp_sampled import _Entries, _sampled_sweep
from lowrank_sp.tensors.cp_start import Core, algebraic_rows
from lowrank_sp.tensors.line_search import extrapolated
from lowrank_sp.tensors.source import Dense

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
SHAPE = (6, 5, 7)


def cp_of(shape=SHAPE, rank=3, dtype=np.float64, seed=0, weights=None):
    factors = [gaussian(n, rank, seed=seed + k, dtype=dtype) for k, n in enumerate(shape)]
    real = np.zeros(0, dtype).real.dtype
    return CP(np.ones(rank, real) if weights is None else np.asarray(weights, real), factors)


def dense(t):
    """The formula, in double precision."""
    letters = "abcdefg"[: len(t.factors)]
    subscripts = ",".join(["r", *(f"{k}r" for k in letters)])
    wide = [np.asarray(a, np.result_type(a, np.float64)) for a in (t.weights, *t.factors)]
    return np.einsum(f"{subscripts}->{letters}", *wide)


def collinear(shape, rank, collinearity, *, noise=0.0, seed=0):
    """Unit columns of equal cosines in every mode (Tomasi and Bro), and noise of a given size."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.cholesky((1 - collinearity) * np.eye(rank) + collinearity).T
    truth = CP(np.ones(rank), [orthonormal(n, rank, rng) @ mix for n in shape])
    x, e = truth.to_dense(), rng.standard_normal(shape)
    return truth, x + noise * np.linalg.norm(x) / np.linalg.norm(e) * e


def factor_match_score(a, b):
    """Mean over the best pairing of terms of the product of the cosines of their columns."""
    cosines = [
        abs(f.conj().T @ g) / np.outer(np.linalg.norm(f, axis=0), np.linalg.norm(g, axis=0))
        for f, g in zip(a.factors, b.factors, strict=True)
    ]
    scores = reduce(np.multiply, cosines)
    return scores[linear_sum_assignment(-scores)].mean()


def on_host(xp, t):
    return CP(xp.host(t.weights), [xp.host(f) for f in t.factors], t.error)


def start_of(shape, rank, seed=1, dtype=np.float64):
    return cp_of(shape, rank, dtype, seed)


def errors_of(solve, x, **options):
    """The true relative error after every sweep."""
    errors = []

    def record(_step, _change, cp):
        errors.append(np.linalg.norm(x - dense(cp)) / np.linalg.norm(x))

    solve(x, callback=record, **options)
    return np.array(errors)


# The container.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (4, 6), SHAPE, (3, 1, 4, 2)], ids=str)
def test_algebra(shape, dtype):
    a = cp_of(shape, 3, dtype, weights=[2.0, -1.0, 0.5])
    b = cp_of(shape, 4, dtype, seed=9)
    x, y, eps = dense(a), dense(b), np.finfo(dtype).eps
    tol = 100 * eps * np.linalg.norm(x) * np.linalg.norm(y)
    every_other = tuple(slice(None, None, 2) for _ in shape)
    assert a.shape == shape
    assert a.to_dense().dtype == dtype
    for got, expected in (
        (a, x),
        (a + b, x + y),
        (a - b, x - y),
        (-2.0 * a, -2 * x),
        (a * 3, 3 * x),
        (a.hadamard(b), x * y),
        (a.canonical(), x),
        (a[1:3], x[1:3]),
        (a[every_other], x[every_other]),
    ):
        assert got.dtype == dtype
        assert np.linalg.norm(got.to_dense() - expected) <= tol
    assert abs(a.norm() - np.linalg.norm(x)) <= 100 * eps * np.linalg.norm(x)
    assert abs(a.inner(b) - np.vdot(x, y)) <= tol
    positions = np.stack([np.random.default_rng(0).integers(n, size=20) for n in shape], axis=1)
    assert np.linalg.norm(a.sample(positions) - x[tuple(positions.T)]) <= tol


def test_norm_of_a_small_difference_keeps_its_digits():
    a = cp_of(rank=4)
    moved = [f.copy() for f in a.factors]
    moved[1][2, 3] += 1e-11
    difference = np.linalg.norm(moved[1][2, 3] - a.factors[1][2, 3]) * np.linalg.norm(
        np.outer(a.factors[0][:, 3], a.factors[2][:, 3])
    )
    assert abs((CP(a.weights, moved) - a).norm() - difference) <= 1e-3 * difference


def check_canonical(t):
    eps = np.finfo(t.dtype).eps
    assert np.all(t.weights[:-1] >= t.weights[1:])
    assert np.all(t.weights >= 0)
    for k, f in enumerate(t.factors):
        lengths = np.linalg.norm(f, axis=0)
        assert np.all((abs(lengths - 1) <= 100 * eps) | (t.weights == 0))
        if k < len(t.factors) - 1:
            size = abs(f)
            tied = size >= (1 - 4 * np.sqrt(eps)) * size.max(axis=0)
            top = np.take_along_axis(f, tied.argmax(axis=0)[None], axis=0)[0]
            assert np.all(abs(top - abs(top)) <= 100 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gauge(dtype):
    a = cp_of(SHAPE, 4, dtype, weights=[0.1, -3.0, 0.0, 2.0])
    t = a.canonical()
    check_canonical(t)
    # Every gauge of the same terms has one canonical form.
    rng = np.random.default_rng(0)
    order, scale = rng.permutation(4), rng.standard_normal((3, 4))
    if np.issubdtype(dtype, np.complexfloating):
        scale = scale * np.exp(1j * rng.standard_normal((3, 4)))
    factors = [(f * s).astype(dtype)[:, order] for f, s in zip(a.factors, scale, strict=True)]
    weights = (a.weights / np.prod(scale, axis=0))[order]
    other = CP(weights.astype(dtype), factors).canonical()
    tol = 1e3 * np.finfo(dtype).eps
    assert np.allclose(other.weights, t.weights, rtol=tol, atol=tol)
    for f, g in zip(other.factors, t.factors, strict=True):
        assert np.allclose(f[:, :3], g[:, :3], rtol=tol, atol=tol)
    assert np.linalg.norm(dense(t) - dense(a)) <= tol * np.linalg.norm(dense(a))


def test_container_of_every_library(xp):
    a, b = cp_of(rank=2), cp_of(rank=3, seed=5)
    s, t = (CP(xp.asarray(c.weights), [xp.asarray(f) for f in c.factors]) for c in (a, b))
    for got, expected in (
        (s + t, a + b),
        (s.hadamard(t), a.hadamard(b)),
        (t.canonical(), b),
        (2 * s, 2 * a),
        (s[:, 1:3], a[:, 1:3]),
    ):
        x = got.to_dense()
        assert type(x) is type(s.weights)
        assert x.device == s.device
        assert np.allclose(xp.host(x), dense(expected))
    assert abs(float(s.inner(t)) - float(a.inner(b))) <= 1e-12 * a.norm() * b.norm()
    assert abs(s.norm() - a.norm()) <= 1e-14 * a.norm()
    index = np.array([[0, 1, 2], [5, 4, 6]])
    assert np.allclose(xp.host(s.sample(index)), dense(a)[[0, 5], [1, 4], [2, 6]])


def test_tensorly_and_back():
    a = cp_of(weights=[1.0, 2.0, 3.0])
    weights, factors = a
    assert weights is a.weights
    assert factors is a.factors
    assert np.allclose(tl.cp_to_tensor(a.to_tensorly()), a.to_dense())
    assert np.allclose(CP.from_tensorly(a.to_tensorly()).to_dense(), a.to_dense())
    assert np.array_equal(CP.from_tensorly((None, list(factors))).weights, np.ones(3))


def test_matrices_of_a_stack():
    a = cp_of(weights=[1.0, -2.0, 3.0])
    for k in range(SHAPE[0]):
        assert np.allclose(a.matrix(k).to_dense(), dense(a)[k])
    with pytest.raises(ValueError, match="order 3, got order 2"):
        cp_of((2, 3)).matrix(0)


def test_container_is_checked():
    with pytest.raises(ValueError, match=r"must have shapes \(R,\) and \(n_k, R\)"):
        CP(np.ones(2), [np.ones((3, 2)), np.ones((3, 1))])
    with pytest.raises(ValueError, match="shapes must be equal"):
        cp_of((2, 3)) + cp_of((3, 2))
    with pytest.raises(TypeError, match="index with at most 3 slices"):
        cp_of()[0]
    assert repr(cp_of()) == "CP(6 x 5 x 7, rank 3, float64)"


# Alternating least squares.


@pytest.mark.parametrize("shape", [(9, 8), SHAPE, (5, 4, 3, 4)], ids=str)
def test_agreement_with_tensorly(shape):
    x, start, sweeps = gaussian(*shape), start_of(shape, 3), 6
    theirs = parafac(
        x, 3, n_iter_max=sweeps, tol=0, init=(np.ones(3), [f.copy() for f in start.factors])
    )
    stop = Stop(sweeps, tol=None)
    ours = cp_als(x, rank=3, init=start, stop=stop, line_search=False, compress=False)
    assert ours.converged is None
    assert ours.n_iter == sweeps
    assert np.linalg.norm(dense(ours.value) - tl.cp_to_tensor(theirs)) <= 1e-9 * np.linalg.norm(x)


@pytest.mark.parametrize("collinearity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("begin", ["default", "gaussian"])
def test_recovery(collinearity, noise, begin):
    truth, x = collinear((12, 14, 10), 4, collinearity, noise=noise)
    init = None if begin == "default" else start_of(x.shape, 4)
    solution = cp_als(x, rank=4, init=init, rng=0, stop=Stop(1000))
    assert solution.converged
    assert factor_match_score(solution.value, truth) > 0.99
    check_canonical(solution.value)


def test_exact_tensors_take_one_step():
    """Generalized eigenvectors leave nothing to iterate on."""
    for shape, rank in (((8, 7, 6), 5), ((4, 5, 3, 4), 4), ((2, 6, 6), 6), ((3, 3, 2, 2, 2), 3)):
        for dtype in (np.float64, np.complex128):
            x = dense(cp_of(shape, rank, dtype))
            solution = cp_als(x, rank=rank, rng=0)
            assert solution.n_iter <= 2
            assert solution.value.error <= 1e-10 * np.linalg.norm(x)


OPTIONS = {
    "plain": {"line_search": False, "compress": False},
    "line search": {"line_search": True, "compress": False},
    "compressed": {"line_search": True, "compress": True},
}


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 10), (5, 6, 4, 5)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_never_rises(option, shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    start = start_of(shape, 3, dtype=dtype)
    stop = Stop(40, tol=None)
    errors = errors_of(cp_als, x, rank=3, init=start, stop=stop, **OPTIONS[option])
    assert np.all(np.diff(errors) <= 1e-13)
    assert errors[-1] < errors[0]


def test_change_is_the_fall_of_the_objective():
    x = gaussian(9, 8, 7)
    errors, changes = [], []

    def record(_step, change, cp):
        errors.append(cp.error)
        changes.append(change)

    cp_als(x, rank=3, init=start_of(x.shape, 3), callback=record, stop=Stop(30, tol=0.0))
    falls = -np.diff(np.array(errors) ** 2) / np.linalg.norm(x) ** 2
    assert np.allclose(np.array(changes[1:]) ** 2, falls, atol=1e-13, rtol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 7), (4, 5, 3, 4)], ids=str)
def test_line_search_finds_the_lowest_point(shape, dtype, ridge):
    x = gaussian(*shape, dtype=dtype)
    source, step = Dense.of(x, np.linalg.norm(x)), least_squares_step(1.0, 0.0, False)
    state = started(source, [f.T.copy() for f in start_of(shape, 4, dtype=dtype).factors])
    for _ in range(3):
        state, _ = step(state)

    def stay(rows, _gradient, _gram):
        return 0 * rows

    def objective(rows):
        squares = sum(np.linalg.norm(r) ** 2 for r in rows)
        return np.linalg.norm(x - dense(CP.of_factors([r.T for r in rows]))) ** 2 + ridge * squares

    moved, first, fall = extrapolated(state, ridge)
    lowest = objective(moved.rows)
    assert fall > 0
    assert abs(objective(state.rows) - lowest - fall) <= 1e-11 * source.norm**2
    steps = [new - old for new, old in zip(moved.rows, state.rows, strict=True)]
    for t in (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0):
        around = [r + t * d for r, d in zip(moved.rows, steps, strict=True)]
        assert objective(around) >= lowest - 1e-11 * source.norm**2
    # The sweep that starts from the product at hand is the one that reads the tensor.
    read, given = (sweep(moved, stay, first=known) for known in (None, first))
    assert abs(read.product - given.product) <= 1e-11 * source.norm**2


def test_line_search_shortens_swamps():
    _, x = collinear((10, 11, 12), 4, 0.9)
    start = start_of(x.shape, 4)
    with_it, without = (
        cp_als(x, rank=4, init=start, line_search=flag, stop=Stop(300)).value.error
        for flag in (True, False)
    )
    assert with_it < 0.1 * without


@pytest.mark.parametrize("dtype", DTYPES)
def test_als_of_every_dtype(dtype):
    x = cp_of(SHAPE, 3, dtype).to_dense()
    value = cp_als(x, rank=3, rng=0).value
    assert all(f.dtype == dtype for f in value.factors)
    assert value.weights.dtype == np.zeros(0, dtype).real.dtype
    error = np.linalg.norm(x - dense(value))
    assert error <= 1e3 * np.finfo(dtype).eps * np.linalg.norm(x)
    assert abs(value.error - error) <= 100 * np.finfo(dtype).eps * np.linalg.norm(x)


@pytest.mark.parametrize("options", [{}, {"init": 1}], ids=["default", "gaussian"])
def test_als_of_every_library(options, xp):
    """One seed, one result: the same factors everywhere, of the library and device of the data."""
    truth, x = collinear(SHAPE, 3, 0.5, noise=0.05)
    data = xp.asarray(x)
    init = reference_init = None
    if options:
        reference_init = start_of(SHAPE, 3)
        init = CP(
            xp.asarray(reference_init.weights), [xp.asarray(f) for f in reference_init.factors]
        )
    reference = cp_als(x, rank=3, init=reference_init, rng=0).value
    solution = cp_als(data, rank=3, init=init, rng=0)
    assert solution.converged
    for a in solution.value.arrays():
        assert type(a) is type(data)
        assert a.device == data.device
        assert a.dtype == data.dtype
    value = on_host(xp, solution.value)
    assert factor_match_score(value, truth) > 0.99
    for f, g in zip(value.factors, reference.factors, strict=True):
        assert np.allclose(f, g, atol=1e-6)


@pytest.mark.parametrize("noise", [1e-6, 1e-7, 3e-8, 1e-10])
def test_error_is_true_below_the_root_of_eps(noise):
    _, x = collinear((8, 9, 10), 3, 0.0, noise=noise)
    value = cp_als(x, rank=3, rng=0).value
    error = np.linalg.norm(x - dense(value))
    assert error < 2 * noise * np.linalg.norm(x)
    assert abs(value.error - error) <= 1e-4 * error


def test_compression_is_exact_for_tensors_of_low_multilinear_rank():
    _, x = collinear((30, 30, 30), 4, 0.5)
    stop, start = Stop(15, tol=None), start_of(x.shape, 4)
    whole, core = (
        cp_als(x, rank=4, init=start, compress=flag, stop=stop, line_search=False).value
        for flag in (False, True)
    )
    assert np.linalg.norm(dense(whole) - dense(core)) <= 1e-9 * np.linalg.norm(x)


def test_large_tensors_are_compressed_and_polished():
    _, x = collinear((50, 45, 40), 4, 0.5, noise=0.3)
    start = start_of(x.shape, 4)
    default = cp_als(x, rank=4, init=start)
    whole = cp_als(x, rank=4, init=start, compress=False)
    assert default.converged
    assert abs(default.value.error - whole.value.error) <= 1e-9 * np.linalg.norm(x)


def test_few_sweeps_end_on_the_tensor_itself():
    """Sweeps over the core alone would lose what noise has pushed out of its subspaces."""
    _, x = collinear((50, 45, 40), 4, 0.0, noise=3.0)
    start = start_of(x.shape, 4)
    best = cp_als(x, rank=4, init=start, compress=False, stop=Stop(200)).value.error
    few = cp_als(x, rank=4, init=start, stop=Stop(30, tol=None)).value.error
    assert few - best <= 1e-6 * np.linalg.norm(x)


def test_pencils_of_real_tensors_with_complex_eigenvalues():
    x = gaussian(8, 8, 8)
    core = Core.of(Dense.of(x, np.linalg.norm(x)), 8)
    rows = algebraic_rows(core, 8, np.random.default_rng(0))
    assert rows is not None
    assert np.linalg.norm(x - dense(CP.of_factors([r.T for r in rows]))) < 3 * np.linalg.norm(x)


def test_columns_are_balanced():
    x = gaussian(9, 8, 7)
    source = Dense.of(x, np.linalg.norm(x))
    state = started(source, [f.T.copy() for f in start_of(x.shape, 4).factors])
    state, _ = least_squares_step(1.0, 0.0, False)(state)
    lengths = np.array([np.linalg.norm(r, axis=1) for r in state.rows])
    assert np.allclose(lengths, lengths[0], rtol=1e-12)
    for rows, gram in zip(state.rows, state.grams, strict=True):
        assert np.allclose(gram, rows @ rows.T)


def test_rank_above_the_sizes():
    x = gaussian(3, 3, 3)  # of rank 5 almost surely
    solution = cp_als(x, rank=6, rng=0, stop=Stop(3000, tol=1e-12))
    assert np.linalg.norm(x - dense(solution.value)) <= 1e-3 * np.linalg.norm(x)
    full = cp_als(gaussian(2, 3, 2), rank=12, rng=0)
    assert full.converged
    assert full.value.error <= 1e-12


def border_rank_two():
    """A tensor of rank 3 that tensors of rank 2 approximate as closely as one likes."""
    a, b = np.eye(2)
    return sum(np.einsum("i,j,k", *terms) for terms in ((a, a, b), (a, b, a), (b, a, a)))


def test_degeneracy_is_reported():
    x = border_rank_two()
    solution = cp_als(x, rank=2, init=start_of(x.shape, 2), stop=Stop(1000))
    assert solution.converged is False
    assert "degenerate" in solution.reason
    bounded = cp_als(x, rank=2, init=start_of(x.shape, 2), regularization=0.01)
    assert bounded.converged
    assert "degenerate" not in bounded.reason
    assert bounded.value.weights.max() < 10


def test_regularized_objective_never_rises():
    x, rho, objectives = gaussian(7, 6, 5), 0.05, []

    def record(_step, _change, cp):
        # Balanced columns: sum_k ||A_k||^2 = N sum_r weight_r^(2/N), for a tensor of unit norm.
        weights = cp.weights / np.linalg.norm(x)
        penalty = 3 * np.sum(weights ** (2 / 3))
        objectives.append((cp.error / np.linalg.norm(x)) ** 2 + rho * penalty)

    cp_als(x, rank=4, init=start_of(x.shape, 4), regularization=rho, callback=record)
    assert np.all(np.diff(objectives) <= 1e-13)


def test_orders_one_and_two_are_those_of_matrices():
    x = gaussian(9, 7)
    solution = cp_als(x, rank=3, rng=0)
    best = truncated_svd(x, 3)
    assert np.allclose(dense(solution.value), best.to_dense(), atol=1e-10)
    vector = cp_als(gaussian(8), rank=1, rng=0)
    assert np.allclose(dense(vector.value), gaussian(8))


@pytest.mark.parametrize("solve", [cp_als, cp_hals, cp_arls])
@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 5, 4), (4, 1, 1)], ids=str)
def test_zero_tensors_and_modes_of_size_one(solve, shape):
    zero = solve(np.zeros(shape), rank=2, rng=0)
    assert zero.value.norm() == 0.0
    assert zero.value.error == 0.0
    x = abs(dense(cp_of(shape, 1)))
    value = solve(x, rank=1, rng=0).value
    assert np.linalg.norm(x - dense(value)) <= 1e-6 * np.linalg.norm(x)


@pytest.mark.parametrize("solve", [cp_als, cp_hals])
@pytest.mark.parametrize("scale", [1e150, 1e-150])
def test_squares_may_leave_the_range(scale, solve):
    x = abs(dense(cp_of())) * scale
    unit = solve(x / scale, rank=3, rng=0, stop=Stop(20, tol=None))
    value = solve(x, rank=3, rng=0, stop=Stop(20, tol=None)).value
    assert np.allclose(value.weights / scale, unit.value.weights, rtol=1e-6)
    assert np.isclose(value.error / scale, unit.value.error, rtol=1e-6)


def test_layouts_and_integers():
    x = np.rint(10 * dense(cp_of())).astype(np.int64)
    reference = cp_als(x.astype(float), rank=3, init=start_of(SHAPE, 3)).value
    strided = np.zeros((12, 10, 7))
    strided[::2, ::2] = x
    for same in (x, np.asfortranarray(x.astype(float)), strided[::2, ::2]):
        value = cp_als(same, rank=3, init=start_of(SHAPE, 3)).value
        assert np.allclose(dense(value), dense(reference), rtol=1e-6, atol=1e-6)


def test_data_are_not_written_to_and_steps_are_counted():
    x, start = gaussian(*SHAPE), start_of(SHAPE, 3)
    for a in (x, start.weights, *start.factors):
        a.flags.writeable = False
    seen = []
    solution = cp_als(x, rank=3, init=start, callback=lambda k, _, cp: seen.append(cp) or k == 3)
    assert solution.reason == "stopped by the callback at step 3"
    assert [type(cp) for cp in seen] == [CP] * 3
    nothing = cp_als(x, rank=3, init=start, stop=Stop(0))
    assert np.allclose(dense(nothing.value), dense(start))
    assert np.isclose(nothing.value.error, np.linalg.norm(x - dense(start)))


def test_warm_start_and_fractions():
    _, x = collinear(SHAPE, 3, 0.3, noise=0.3)
    first = cp_als(x, rank=3, init=start_of(SHAPE, 3))
    assert first.converged
    assert cp_als(x, rank=3, init=first.value).n_iter <= 3
    assert cp_als(x, rank=0.3, rng=0).value.rank == round(0.3 * 210 / 18)


@pytest.mark.parametrize("solve", [cp_als, cp_hals, cp_arls])
def test_bad_input(solve):
    x = gaussian(*SHAPE)
    for bad in (np.nan, np.inf):
        spoiled = x.copy()
        spoiled[1, 2, 3] = bad
        with pytest.raises(ValueError, match="must be finite"):
            solve(spoiled, rank=2)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.210"):
        solve(x, rank=0)
    with pytest.raises(TypeError, match="rank must be an integer"):
        solve(x, rank="2")
    with pytest.raises(TypeError, match="must be an array"):
        solve(x.tolist(), rank=2)
    with pytest.raises(ValueError, match="init must have shape"):
        solve(x, rank=2, init=CP.of_factors([abs(f) for f in cp_of(SHAPE, 3).factors]))


def test_bad_options():
    x = gaussian(*SHAPE)
    with pytest.raises(ValueError, match="regularization must be at least 0"):
        cp_als(x, rank=2, regularization=-1.0)
    with pytest.raises(ValueError, match="non-negative weights and factors"):
        cp_hals(x, rank=3, init=cp_of())
    with pytest.raises(ValueError, match="passes must be at least 1"):
        cp_hals(x, rank=3, passes=0)
    with pytest.raises(TypeError, match="x must be real"):
        cp_hals(x + 0j, rank=3)
    with pytest.raises(ValueError, match="samples must be at least the rank"):
        cp_arls(x, rank=3, samples=2)


# Non-negative decompositions.


def nonnegative(shape=(10, 9, 8), rank=3, *, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = CP(np.ones(rank), [rng.random((n, rank)) ** 2 for n in shape])
    x, e = truth.to_dense(), rng.standard_normal(shape)
    return truth, x + noise * np.linalg.norm(x) / np.linalg.norm(e) * e


@pytest.mark.parametrize("noise", [0.0, 0.1, 2.0])
def test_hals_is_monotone_and_stationary(noise):
    _, x = nonnegative(noise=noise)
    errors = errors_of(cp_hals, x, rank=3, rng=0)
    assert np.all(np.diff(errors) <= 1e-13)
    solution = cp_hals(x, rank=3, rng=0, stop=Stop(5000, tol=1e-9))
    assert solution.converged
    value = solution.value
    check_canonical(value)
    residual = dense(value) - x
    for mode, f in enumerate(value.factors):
        assert f.min() >= 0
        others = [g for k, g in enumerate(value.factors) if k != mode]
        unfolded = np.moveaxis(residual, mode, 0).reshape(len(f), -1)
        gradient = unfolded @ np.einsum("ar,br->abr", *others).reshape(-1, 3) * value.weights
        scale = 1e-5 * np.linalg.norm(x) * value.weights.max()
        # Karush-Kuhn-Tucker: no descent direction stays non-negative.
        assert np.all(gradient >= -scale)
        assert np.all(abs(gradient)[f > 1e-6] <= scale)


def test_hals_recovers_and_starts_warm():
    truth, x = nonnegative(noise=0.01)
    solution = cp_hals(x, rank=3, rng=0, stop=Stop(3000))
    assert factor_match_score(solution.value, truth) > 0.99
    assert cp_hals(x, rank=3, init=solution.value).n_iter <= 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hals_of_every_library(dtype, xp):
    _, x = nonnegative(noise=0.1)
    data = xp.asarray(x.astype(dtype))
    value = cp_hals(data, rank=3, rng=0, stop=Stop(10, tol=None)).value
    reference = cp_hals(x, rank=3, rng=0, stop=Stop(10, tol=None)).value
    for a in value.arrays():
        assert type(a) is type(data)
        assert a.dtype == data.dtype
        assert a.device == data.device
    assert np.allclose(dense(on_host(xp, value)), dense(reference), atol=1e4 * np.finfo(dtype).eps)


# Sampled least squares.


def test_arls_is_near_the_best():
    truth, x = collinear((30, 25, 20), 4, 0.3, noise=0.1)
    best = cp_als(x, rank=4, rng=0).value.error
    solution = cp_arls(x, rank=4, rng=0)
    # Leverage scores: 1 + O(R / S) of the best in expectation, at S = 191.
    assert solution.value.error <= 1.2 * best
    assert factor_match_score(solution.value, truth) > 0.99
    more = cp_arls(x, rank=4, rng=0, samples=2000)
    assert more.value.error <= 1.02 * best
    assert np.isclose(more.value.error, np.linalg.norm(x - dense(more.value)))


def test_samples_are_weighted():
    """With many samples a sweep is that of least squares, also for a few dominant rows."""
    x, factors = gaussian(12, 10, 8), start_of((12, 10, 8), 3).factors
    for f in factors:
        f[:2] *= 10
    rows = [f.T.copy() for f in factors]
    source = Dense.of(x, np.linalg.norm(x))
    exact, _ = least_squares_step(1.0, 0.0, False)(started(source, rows))
    draws = np.random.default_rng(0)
    sampled = _sampled_sweep(_Entries(x, x.shape), rows, 100_000, draws)
    expected = dense(CP.of_factors([r.T for r in exact.rows]))
    difference = dense(CP.of_factors([r.T for r in sampled])) - expected
    assert np.linalg.norm(difference) <= 0.08 * np.linalg.norm(expected)


def test_arls_is_exact_for_exact_tensors():
    _, x = collinear((20, 15, 12, 10), 3, 0.3)
    assert cp_arls(x, rank=3, rng=1).value.error <= 1e-6 * np.linalg.norm(x)
    z = dense(cp_of((12, 11, 10), 3, np.complex128))
    assert cp_arls(z, rank=3, rng=0).value.error <= 1e-6 * np.linalg.norm(z)


def test_arls_of_every_library(xp):
    _, x = collinear((15, 12, 10), 3, 0.3, noise=0.05)
    data = xp.asarray(x)
    reference = cp_arls(x, rank=3, rng=0, stop=Stop(2, tol=None)).value
    value = cp_arls(data, rank=3, rng=0, stop=Stop(2, tol=None)).value
    assert type(value.weights) is type(data)
    assert value.device == data.device
    assert np.allclose(dense(on_host(xp, value)), dense(reference), atol=1e-8)


# Missing entries.


def observed(x, share, seed=0, xp=None):
    mask = np.random.default_rng(seed).random(x.shape) < share
    return TensorEntries.from_mask(x if xp is None else xp.asarray(x), mask)


@pytest.mark.parametrize("collinearity", [0.0, 0.5, 0.9])
def test_completion_recovers(collinearity):
    truth, x = collinear((15, 14, 13), 3, collinearity)
    solution = cp_completion(observed(x, 0.3), rank=3, rng=0, stop=Stop(1000))
    assert (solution.value - truth).norm() <= 1e-3 * truth.norm()
    assert factor_match_score(solution.value, truth) > 0.99
    check_canonical(solution.value)


def test_completion_reaches_the_noise_floor():
    truth, x = collinear((20, 18, 16), 3, 0.3, noise=0.1)
    entries = observed(x, 0.3)
    solution = cp_completion(entries, rank=3, rng=0)
    parameters = 3 * sum(x.shape)
    # Least squares spreads the noise over the parameters, of M observations.
    expected = 0.1 * (parameters / entries.size) ** 0.5
    assert solution.converged
    assert (solution.value - truth).norm() <= 1.5 * expected * truth.norm()


def test_completion_of_all_entries_is_a_decomposition():
    _, x = collinear((8, 7, 6), 3, 0.3, noise=0.2)
    start = start_of(x.shape, 3)
    stop = Stop(6, tol=None)
    entries = TensorEntries.from_mask(x, np.ones(x.shape, bool))
    completed = cp_completion(entries, rank=3, init=start, stop=stop, line_search=False)
    plain = cp_als(x, rank=3, init=start, stop=stop, line_search=False, compress=False)
    assert np.allclose(dense(completed.value), dense(plain.value), atol=1e-9)


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
@pytest.mark.parametrize("line_search", [False, True])
def test_residual_of_completion_never_rises(line_search, regularization):
    _, x = collinear((9, 8, 7), 3, 0.5, noise=0.3)
    entries, objectives = observed(1e4 * x, 0.4), []
    norm = entries.norm()

    def record(_step, _change, cp):
        penalty = 3 * np.sum((cp.weights / norm) ** (2 / 3))
        objectives.append(entries.relative_residual(cp) ** 2 + regularization * penalty)

    cp_completion(
        entries,
        rank=4,
        rng=0,
        line_search=line_search,
        regularization=regularization,
        callback=record,
        stop=Stop(50, tol=None),
    )
    assert np.all(np.diff(objectives) <= 1e-12)


def test_completion_line_search_shortens_swamps():
    _, x = collinear((12, 12, 12), 3, 0.9)
    residuals = [
        observed(x, 0.5).relative_residual(
            cp_completion(observed(x, 0.5), rank=3, rng=0, line_search=flag, stop=Stop(150)).value
        )
        for flag in (True, False)
    ]
    assert residuals[0] < 0.1 * residuals[1]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_completion_of_every_library(dtype, xp):
    truth = cp_of((9, 8, 7), 2, dtype)
    entries = observed(dense(truth), 0.5, xp=xp)
    solution = cp_completion(entries, rank=2, rng=0)
    for f in solution.value.factors:
        assert type(f) is type(entries.values)
        assert f.device == entries.values.device
    value = dense(on_host(xp, solution.value))
    assert np.linalg.norm(value - dense(truth)) <= 1e-4 * truth.norm()


def test_indices_without_entries_are_named():
    _, x = collinear((8, 7, 6), 2, 0.0)
    mask = np.random.default_rng(0).random(x.shape) < 0.6
    mask[3], mask[:, 2] = False, False
    solution = cp_completion(TensorEntries.from_mask(x, mask), rank=2, rng=0)
    assert solution.converged is False
    assert "no entry has index 3 of mode 0, index 2 of mode 1 (2 in all)" in solution.reason
    value = dense(solution.value)
    assert np.all(value[3] == 0)
    assert np.all(value[:, 2] == 0)
    rest = np.ix_([0, 1, 2, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6], range(6))
    assert np.linalg.norm(value[rest] - x[rest]) <= 1e-5 * np.linalg.norm(x)


def test_completion_scale_and_start():
    truth, x = collinear((8, 7, 6), 2, 0.3)
    for scale in (1e150, 1e-150):
        value = cp_completion(observed(x * scale, 0.6), rank=2, rng=0).value
        assert np.allclose(dense(value) / scale, x, atol=1e-5)
    warm = cp_completion(observed(x, 0.6), rank=2, init=truth)
    assert warm.n_iter == 1
    nothing = TensorEntries(np.zeros((0, 3), int), np.zeros(0), (2, 3, 4))
    with pytest.raises(ValueError, match="needs observed entries"):
        cp_completion(nothing, rank=1)
    with pytest.raises(ValueError, match="regularization must be at least 0"):
        cp_completion(observed(x, 0.6), rank=1, regularization=-1.0)
    zero = cp_completion(observed(0 * x, 0.6), rank=2, rng=0)
    assert zero.converged
    assert zero.value.norm() == 0.0
