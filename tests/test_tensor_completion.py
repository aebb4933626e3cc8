"""Laws of observed entries, of completion by alternating least squares, and of streamed Tucker."""

import numpy as np
import pytest
import tensorly as tl
from cases import gaussian
from conftest import Backend

from lowrank_sp import Stop, tensors
from lowrank_sp.tensors import TT, StreamingTucker, TensorEntries, Tucker, entries

DTYPES = [np.float32, np.float64, np.complex128]
NUMPY = Backend("numpy", np.asarray)
SHAPE = (14, 12, 13)
EPS64 = np.finfo(np.float64).eps


def wide(a):
    return np.asarray(a).astype(np.result_type(a, np.float64))


def random_mask(shape, share, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def tucker_truth(shape=SHAPE, rank=2, dtype=np.float64, seed=0):
    factors = [gaussian(n, rank, dtype=dtype, seed=seed + k) for k, n in enumerate(shape)]
    core = gaussian(*[rank] * len(shape), dtype=dtype, seed=seed + 9)
    return (tl.tucker_to_tensor((core, factors)) / rank**1.5).astype(dtype)


def train_truth(shape=SHAPE, rank=2, dtype=np.float64, seed=0):
    bonds = [1, *[rank] * (len(shape) - 1), 1]
    cores = [
        gaussian(bonds[k], n, bonds[k + 1], dtype=dtype, seed=seed + k) for k, n in enumerate(shape)
    ]
    return TT(cores).to_dense().astype(dtype)


def observed(xp, x, share, seed=0):
    return TensorEntries.from_mask(xp.asarray(x), xp.asarray(random_mask(x.shape, share, seed)))


# -- entries --


def test_entries_of_a_mask_and_of_nan(xp):
    x, mask = gaussian(*SHAPE), random_mask(SHAPE, 0.3)
    for e in (
        TensorEntries.from_mask(xp.asarray(x), xp.asarray(mask)),
        TensorEntries.from_nan(xp.asarray(np.where(mask, x, np.nan))),
    ):
        assert e.size == mask.sum()
        assert np.array_equal(x[tuple(e.indices.T)], xp.host(e.values))
        assert abs(e.norm() - np.linalg.norm(x[mask])) <= 1e-12
    kept, withheld = e.split(0.25, rng=0)
    assert withheld.size == round(0.25 * e.size)
    assert {*map(tuple, kept.indices)} | {*map(tuple, withheld.indices)} == {
        *map(tuple, np.argwhere(mask))
    }


def test_unobserved_slices_are_named():
    x, mask = gaussian(4, 5), np.ones((4, 5), bool)
    mask[2] = False
    (mode, lines), *others = TensorEntries.from_mask(x, mask).unobserved()
    assert (mode, list(lines), others) == (0, [2], [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", range(3))
def test_least_squares_is_that_of_every_slice(mode, dtype, monkeypatch):
    check_least_squares(NUMPY, mode, dtype, monkeypatch)


def test_least_squares_in_every_library(xp, monkeypatch):
    check_least_squares(xp, 1, np.complex128, monkeypatch)


def check_least_squares(xp, mode, dtype, monkeypatch):
    monkeypatch.setattr(entries, "_BUCKET", 200)
    x, r = gaussian(*SHAPE, dtype=dtype), 3
    # Very uneven slices, one of them empty.
    share = np.linspace(0, 1, SHAPE[mode]).reshape([-1 if k == mode else 1 for k in range(3)])
    e = TensorEntries.from_mask(xp.asarray(x), random_mask(SHAPE, np.broadcast_to(share, SHAPE)))
    design = gaussian(e.size, r, dtype=dtype, seed=1)
    current = gaussian(SHAPE[mode], r, dtype=dtype, seed=2)
    found, squares = e.least_squares(
        mode, lambda chosen: xp.asarray(design[chosen]), xp.asarray(current)
    )
    found, values, misfit = wide(xp.host(found)), wide(xp.host(e.values)), 0.0
    for i, row in enumerate(wide(current)):
        here = e.indices[:, mode] == i
        d = wide(design[here])
        residual = values[here] - d @ row
        misfit += np.linalg.norm(residual) ** 2
        # The least change of the row that fits best.
        truth = row + np.linalg.lstsq(d, residual, rcond=1e-5)[0]
        condition = np.linalg.cond(d) ** 2 if len(d) >= r else 1e4
        assert np.linalg.norm(found[i] - truth) <= 100 * np.finfo(dtype).eps * condition * 10
    assert abs(squares - misfit) <= 100 * np.finfo(dtype).eps * misfit


def test_a_ridge_shrinks():
    e = observed(NUMPY, gaussian(*SHAPE), 0.5)
    design, current = gaussian(e.size, 3, seed=1), np.zeros((SHAPE[0], 3))
    found, _ = e.least_squares(0, lambda chosen: design[chosen], current, 2.0)
    here = e.indices[:, 0] == 4
    d = design[here]
    truth = np.linalg.solve(d.T @ d + 2 * np.eye(3), d.T @ e.values[here])
    assert np.linalg.norm(found[4] - truth) <= 1e-12


def test_transform_multiplies_by_the_matrix_of_the_slice(xp):
    mode = 1
    e = observed(xp, gaussian(*SHAPE), 0.3)
    rows, matrices = gaussian(e.size, 3), gaussian(SHAPE[mode], 3, 4, seed=1)
    found = xp.host(e.transform(mode, xp.asarray(rows), xp.asarray(matrices)))
    truth = np.einsum("mr,mrs->ms", rows, matrices[e.indices[:, mode]])
    assert abs(found - truth).max() <= 1e-13


# -- completion --

METHODS = {
    "tucker": (tensors.tucker_completion, tucker_truth),
    "tt": (tensors.tt_completion, train_truth),
}
CASES = {
    "order 3": (SHAPE, 2, 0.3),
    "order 4": ((8, 9, 7, 8), 2, 0.3),
    "matrix": ((30, 25), 2, 0.4),
    "mode of size 1": ((14, 1, 15), 1, 0.5),
}


def check_recovery(xp, method, shape, rank, share, dtype):
    solve, truth = METHODS[method]
    x = truth(shape, rank, dtype)
    e = observed(xp, x, share)
    tol = np.sqrt(np.finfo(dtype).eps)
    solution = solve(e, rank=rank, rng=0, stop=Stop(max_iter=200, tol=tol / 10))
    found = wide(xp.host(solution.value.to_dense()))
    assert solution.converged
    assert type(solution.value.arrays()[0]) is type(e.values)
    assert np.linalg.norm(found - x) <= 100 * tol * np.linalg.norm(x)
    return solution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_recovery_of_a_known_truth(method, case, dtype):
    check_recovery(NUMPY, method, *CASES[case], dtype)


@pytest.mark.parametrize("method", METHODS)
def test_recovery_in_every_library(method, xp):
    solution = check_recovery(xp, method, (9, 8, 7), 2, 0.5, np.float64)
    expected = check_recovery(NUMPY, method, (9, 8, 7), 2, 0.5, np.float64)
    difference = xp.host(solution.value.to_dense()) - expected.value.to_dense()
    assert np.linalg.norm(difference) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_misfit_never_rises_and_noise_sets_the_floor(method):
    solve, truth = METHODS[method]
    x = truth()
    noise = 0.01 * np.linalg.norm(x) / np.sqrt(x.size) * gaussian(*SHAPE, seed=5)
    e = observed(NUMPY, x + noise, 0.4)
    misfits = []
    solution = solve(
        e,
        rank=2,
        rng=0,
        callback=lambda _, __, t: misfits.append(e.relative_residual(t)),
    )
    assert np.all(np.diff(misfits) <= 1e-12)
    # A fit of fewer parameters than entries averages noise away.
    error = np.linalg.norm(solution.value.to_dense() - x)
    assert error <= np.linalg.norm(noise)


@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 1e-100), (np.float64, 1e100), (np.float32, 1e18)]
)
@pytest.mark.parametrize(
    "solver", [tensors.tucker_completion, tensors.tt_completion, tensors.cp_completion]
)
def test_the_size_of_the_data_does_not_matter(solver, dtype, size):
    e = observed(NUMPY, tucker_truth(dtype=dtype), 0.4)
    power = 2.0 ** round(np.log2(size))
    huge = TensorEntries(e.indices, e.values * np.asarray(power, dtype), e.shape)
    stop = Stop(max_iter=5, tol=None)
    found, plain = (solver(data, rank=2, rng=0, stop=stop).value for data in (huge, e))
    assert np.array_equal(found.to_dense() / np.asarray(power, dtype), plain.to_dense())


@pytest.mark.parametrize(
    ("solver", "dof"),
    # Of rank 3: core and factors, cores without gauges, weights and unit columns.
    [
        (tensors.tucker_completion, lambda a, b, c: 27 + 3 * (a + b + c - 9)),
        (tensors.tt_completion, lambda a, b, c: 3 * a + 9 * b + 3 * c - 18),
        (tensors.cp_completion, lambda a, b, c: 3 * (a + b + c - 2)),
    ],
)
def test_fewer_entries_than_degrees_of_freedom_are_refused(solver, dof):
    e = observed(NUMPY, tucker_truth(), 0.9)
    least = dof(*e.shape)
    few = TensorEntries(e.indices[: least - 1], e.values[: least - 1], e.shape)
    with pytest.raises(ValueError, match=f"{least} degrees of freedom, got {least - 1} entries"):
        solver(few, rank=3)


@pytest.mark.parametrize("method", METHODS)
def test_withheld_entries_tell_the_error(method):
    solve, truth = METHODS[method]
    x = truth() + 0.05 * gaussian(*SHAPE, seed=4)
    kept, withheld = observed(NUMPY, x, 0.6).split(0.2, rng=0)
    t = solve(kept, rank=2, rng=0).value
    error = np.linalg.norm(t.to_dense() - x) / np.linalg.norm(x)
    assert 0.7 * error <= withheld.relative_residual(t) <= 1.4 * error


@pytest.mark.parametrize("method", METHODS)
def test_warm_start(method):
    solve, truth = METHODS[method]
    x = truth()
    e = observed(NUMPY, x, 0.3)
    best = solve(e, rank=2, rng=0).value
    again = solve(e, rank=2, init=best)
    assert again.n_iter <= 2
    with pytest.raises(ValueError, match="init must have shape"):
        solve(e, rank=3, init=best)


def test_ridge_bounds_what_too_few_entries_leave_open():
    e = observed(NUMPY, train_truth(), 0.03)
    free, bound = (
        tensors.tt_completion(e, rank=3, rng=0, ridge=rho, stop=Stop(max_iter=20)).value
        for rho in (1e-8, 1e-2)
    )
    assert bound.norm() < free.norm()


@pytest.mark.parametrize("method", METHODS)
def test_slices_without_entries_stay_finite(method):
    solve, truth = METHODS[method]
    mask = random_mask(SHAPE, 0.4)
    mask[3] = False
    e = TensorEntries.from_mask(truth(), mask)
    t = solve(e, rank=2, rng=0).value
    assert np.all(np.isfinite(t.to_dense()))
    assert e.relative_residual(t) <= 1e-5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: TensorEntries(np.ones((2, 3)), np.ones(2), SHAPE), r"integers of shape \(M, 3\)"),
        (lambda: TensorEntries(np.zeros((2, 3), int), np.ones(2), SHAPE), "must not repeat"),
        (lambda: TensorEntries(np.full((1, 3), 20), np.ones(1), SHAPE), "within shape"),
        (lambda: TensorEntries(np.zeros((1, 3), int), np.ones(2), SHAPE), r"of shape \(1,\)"),
        (lambda: TensorEntries(np.zeros((1, 2), int), np.full(1, np.nan), (2, 2)), "be finite"),
        (lambda: TensorEntries.from_mask(np.ones((2, 2)), np.ones((2, 2))), "mask must be boolean"),
        (lambda: observed(NUMPY, np.ones((3, 3)), 0.9).split(1.0), r"share must be in \(0, 1\)"),
        (
            lambda: tensors.tt_completion(observed(NUMPY, np.ones((3, 3)), 0.9), rank=4),
            r"rank must be in 1\.\.3",
        ),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# -- streaming --


def streamed(xp, x, rank, order, rng=0):
    stream = StreamingTucker(x.shape, rank, rng=rng)
    for start, stop in order:
        stream.update(start, xp.asarray(x[start:stop]))
    return stream


PARTS = [(0, 5), (9, 14), (5, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_streaming_is_exact_for_an_exact_rank(dtype):
    check_streaming(NUMPY, dtype)


def test_streaming_in_every_library(xp):
    check_streaming(xp, np.complex128)


def check_streaming(xp, dtype):
    x = tucker_truth(dtype=dtype)
    t = streamed(xp, x, 2, PARTS).tucker()
    assert (t.shape, t.rank) == (SHAPE, (2, 2, 2))
    error = np.linalg.norm(wide(xp.host(t.to_dense())) - x)
    assert error <= 2000 * np.finfo(dtype).eps * np.linalg.norm(x)


def test_streaming_with_noise_and_its_estimate(xp):
    x = tucker_truth((20, 22, 21), 2) + 0.1 * gaussian(20, 22, 21, seed=3)
    t = streamed(xp, x, 2, [(0, 8), (8, 20)]).tucker()
    error, best = np.linalg.norm(xp.host(t.to_dense()) - x), tensors.st_hosvd(x, 2).error
    assert error <= 3 * best
    assert 0.5 * error <= t.error <= 2 * error


def test_streams_merge():
    x = tucker_truth() + 0.1 * gaussian(*SHAPE, seed=3)
    whole = streamed(NUMPY, x, 2, PARTS)
    first, second = streamed(NUMPY, x, 2, PARTS[:1]), streamed(NUMPY, x, 2, PARTS[1:])
    empty = streamed(NUMPY, x, 2, [])
    empty.merge(first)
    empty.merge(second)
    empty.merge(streamed(NUMPY, x, 2, []))
    difference = empty.tucker().to_dense() - whole.tucker().to_dense()
    assert np.linalg.norm(difference) <= 1e-10
    assert isinstance(empty.tucker(), Tucker)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.update(0, np.ones((2, 12, 1))), r"block must have shape \(slices, 12, 13\)"),
        (lambda s: s.update(13, np.ones((2, 12, 13))), r"slices must lie in 0\.\.14, got 13\.\.15"),
        (lambda s: s.update(0, np.full((1, 12, 13), np.inf)), "a block must be finite"),
        (lambda s: s.tucker(), "nothing was seen yet"),
        (lambda s: s.merge(StreamingTucker(SHAPE, 2, rng=1)), "same shape, rank and integer rng"),
    ],
)
def test_bad_streams(call, text):
    with pytest.raises(ValueError, match=text):
        call(StreamingTucker(SHAPE, 2, rng=0))


@pytest.mark.parametrize(
    "solver", [tensors.tucker_completion, tensors.tt_completion, tensors.cp_completion]
)
def test_tensors_are_no_entries(solver):
    with pytest.raises(TypeError, match="must be TensorEntries, got ndarray"):
        solver(np.ones((3, 3, 3)), rank=1)


@pytest.mark.parametrize(
    "solver", [tensors.tucker_completion, tensors.tt_completion, tensors.cp_completion]
)
def test_an_index_without_entries_is_named(solver):
    x = tucker_truth()
    mask = random_mask(SHAPE, 0.5)
    mask[:, 4] = False
    solution = solver(TensorEntries.from_mask(x, mask), rank=2, rng=0)
    assert solution.converged is False
    assert "no entry has index 4 of mode 1 (1 in all): zero there" in solution.reason
    assert not np.any(solution.value.to_dense()[:, 4])
