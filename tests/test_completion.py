"""Laws of every completion solver: recovery, noise, failure, libraries, bad input.

A new solver is one row of SOLVERS.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.inverse import Entries, completion, synthetic


@dataclass(frozen=True)
class Row:
    """A solver, and what is asked of it.

    ``oversampling`` is where it recovers a matrix of condition 3; ``error`` how far, in units of
    the tolerance. ``exact`` solvers fit noiseless data, others have a penalty. Equal steps agree to
    ``agreement`` in units of eps; less so where rounding can end an inner iteration one step
    earlier. Hyper-parameters for the laws are in ``options``.
    """

    solver: Any
    oversampling: float = 4.0
    error: float = 100.0
    exact: bool = True
    monotone: bool = False
    agreement: float = 1e6
    options: dict = field(default_factory=dict)


SOLVERS = {
    "als": Row(completion.als),
    "lmafit": Row(completion.lmafit, oversampling=5.0),
    "scaled_asd": Row(completion.scaled_asd, oversampling=5.0, monotone=True),
    "scaled_gd": Row(completion.scaled_gd, oversampling=6.0),
    "soft_impute": Row(
        completion.soft_impute, exact=False, monotone=True, options={"regularization": 1e-3}
    ),
    "svt": Row(completion.svt, oversampling=6.0, options={"threshold": 2.0}),
    "riemannian_cg": Row(completion.riemannian_cg, oversampling=5.0, monotone=True),
    "niht": Row(completion.niht, oversampling=6.0),
    "gnmr": Row(completion.gnmr, agreement=1e11),
    "matrix_irls": Row(completion.matrix_irls, options={"decay": 0.5}),
}
EXACT = [name for name, row in SOLVERS.items() if row.exact]
# Solvers with a penalty are defined where a line has a single entry.
HARD_RANK = [name for name in EXACT if name != "svt"]
# The dual method of svt fits all noise, and has no start.
NOISY = [name for name in SOLVERS if name != "svt"]
RANK = 2


@cache
def problem(oversampling, dtype=np.float64, condition=3.0, noise=0.0, shape=(50, 40), seed=0):
    return synthetic.completion(
        shape=shape,
        rank=RANK,
        oversampling=oversampling,
        condition=condition,
        noise=noise,
        like=np.zeros(1, dtype),
        rng=seed,
    )


def solve(name, entries, *, rank=RANK, max_iter=1000, tol="auto", rng=0, **options):
    row = SOLVERS[name]
    stop = lr.Stop(max_iter=max_iter, tol=tol)
    return row.solver(entries, rank=rank, rng=rng, stop=stop, **{**row.options, **options})


def moved(entries, xp):
    return Entries(entries.rows, entries.cols, xp.asarray(entries.values), entries.shape)


def on_host(f):
    return lr.SVD(*(to_host(part) for part in f))


# -- laws of all solvers --


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("name", SOLVERS)
def test_recovery(name, dtype):
    p = problem(SOLVERS[name].oversampling, dtype)
    solution = solve(name, p.entries, tol=1e-4 if name == "svt" else "auto")
    tol = 1e-4 if name == "svt" else 4 * eps(dtype) ** 0.5
    assert solution.converged
    assert solution.value.dtype == dtype
    error = lr.relative_error(solution.value, p.truth)
    # A penalty of a share rho of the largest singular value moves the others by about rho.
    bias = 0.0 if SOLVERS[name].exact else 30 * SOLVERS[name].options["regularization"]
    assert error <= SOLVERS[name].error * tol + bias


@pytest.mark.parametrize("name", SOLVERS)
def test_answer_is_a_canonical_svd(name):
    p = problem(SOLVERS[name].oversampling)
    f = solve(name, p.entries, max_iter=20).value
    assert isinstance(f, lr.SVD)
    assert f.shape == p.truth.shape
    assert f.rank <= RANK
    for gram in (f.u.T @ f.u, f.vh @ f.vh.T):
        assert np.abs(gram - np.eye(f.rank)).max() <= 100 * eps(f.dtype)
    assert np.all(f.s[:-1] >= f.s[1:])
    assert np.all(np.take_along_axis(f.u, abs(f.u).argmax(axis=0)[None], axis=0) > 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_library(name, xp):
    p = problem(SOLVERS[name].oversampling)
    entries = moved(p.entries, xp)
    ours, theirs = (solve(name, e, max_iter=8) for e in (p.entries, entries))
    for part in theirs.value:
        assert type(part) is type(entries.values)
        assert part.dtype == entries.dtype
        assert part.device == entries.values.device
    # The same steps, whose rounding may grow with each of them.
    agreement = SOLVERS[name].agreement * eps(np.float64)
    assert lr.relative_error(on_host(theirs.value), ours.value) <= agreement
    assert theirs.n_iter == ours.n_iter


@pytest.mark.parametrize("name", NOISY)
def test_noise_floor(name):
    row = SOLVERS[name]
    noise = 0.01
    options = {} if row.exact else {"regularization": 0.03}
    options = {"noise": noise} if name == "matrix_irls" else options
    p = problem(max(6.0, row.oversampling), noise=noise, shape=(80, 60))
    solution = solve(name, p.entries, tol=1e-5, **options)
    floor = noise / np.sqrt(p.oversampling)
    error = lr.relative_error(solution.value, p.truth)
    bias = 0.0 if row.exact else 0.1
    assert error <= 2 * floor + bias
    assert error >= floor / 2


@pytest.mark.parametrize("name", EXACT)
def test_converged_is_false_below_the_information_limit(name):
    p = problem(1.05, condition=10.0, shape=(60, 50))
    solution = solve(name, p.entries, max_iter=60)
    assert lr.relative_error(solution.value, p.truth) > 0.05
    assert solution.converged is False
    assert "residual" in solution.reason
    assert all(np.all(np.isfinite(part)) for part in solution.value)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [1e-150, 1e150, 2.0**20])
def test_scale(name, scale):
    p = problem(SOLVERS[name].oversampling)
    expected = solve(name, p.entries, max_iter=10)
    found = solve(name, p.entries.with_values(p.entries.values * scale), max_iter=10)
    assert found.n_iter == expected.n_iter
    rescaled = lr.SVD(found.value.u, found.value.s / scale, found.value.vh)
    assert lr.relative_error(rescaled, expected.value) <= SOLVERS[name].agreement * eps(np.float64)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_data(name):
    entries = problem(5.0).entries
    solution = solve(name, entries.with_values(entries.values * 0))
    assert solution.converged
    assert solution.value.norm() == 0.0
    assert not np.any(np.isnan(solution.value.to_dense()))


@pytest.mark.parametrize("name", SOLVERS)
def test_inputs_are_not_written_to(name):
    p = problem(SOLVERS[name].oversampling)
    values = p.entries.values.copy()
    solve(name, p.entries, max_iter=3)
    assert np.array_equal(p.entries.values, values)


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_iterates_and_ends_the_iteration(name):
    p = problem(SOLVERS[name].oversampling)
    seen = []

    def callback(k, change, value):
        seen.append((k, change, value.shape))
        return k == 3

    solution = solve(name, p.entries, tol=0.0, callback=callback)
    assert [k for k, _, _ in seen] == [1, 2, 3]
    assert seen[-1][2] == p.truth.shape
    assert solution.n_iter == 3
    assert [r.change for r in solution.history] == [c for _, c, _ in seen]


@pytest.mark.parametrize("name", SOLVERS)
def test_one_seed_gives_one_answer(name):
    p = problem(SOLVERS[name].oversampling)
    first, again = (solve(name, p.entries, max_iter=5, rng=1).value for _ in range(2))
    assert np.array_equal(first.u, again.u)


@pytest.mark.parametrize("name", HARD_RANK)
def test_start_at_the_truth_stays_there(name):
    p = problem(SOLVERS[name].oversampling)
    options = {"continuation": 0.0} if name == "als" else {}
    solution = solve(name, p.entries, init=p.truth, **options)
    assert solution.n_iter <= 3
    assert lr.relative_error(solution.value, p.truth) <= 1e4 * eps(np.float64)


@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if row.monotone])
def test_objective_never_increases(name):
    p = problem(3.0, condition=10.0, noise=0.05)
    penalty = 0.0
    if not SOLVERS[name].exact:
        penalty = 1e-3 * np.linalg.norm(p.entries.to_dense(), 2)
    objective = []

    def callback(_, __, value):
        residual = p.entries.values - p.entries.sample(value)
        objective.append(np.sum(residual**2) / 2 + penalty * np.sum(value.s))

    solve(name, p.entries, max_iter=40, tol=0.0, callback=callback)
    assert np.all(np.diff(objective) <= 1e-10 * objective[0])
    assert objective[-1] < objective[0]


# -- lines that are not identified --


@cache
def with_short_lines():
    """Entries of which row 3 has one, and column 5 none."""
    p = problem(6.0)
    e = p.entries
    chosen = (e.cols != 5) & ((e.rows != 3) | (np.cumsum(e.rows == 3) == 1))
    return p, e.select(chosen)


@pytest.mark.parametrize("name", SOLVERS)
def test_unidentified_lines_are_named(name):
    _, entries = with_short_lines()
    with pytest.raises(ValueError, match="column 5 with fewer than"):
        solve(name, entries)
    if name in HARD_RANK:
        with pytest.raises(ValueError, match="row 3 with fewer than 2 entries"):
            solve(name, entries)


@pytest.mark.parametrize("name", SOLVERS)
def test_unidentified_lines_are_nan(name):
    p, entries = with_short_lines()
    solution = solve(name, entries, allow_unidentified=True, tol=1e-4, max_iter=500)
    value, truth = solution.value.to_dense(), p.truth.to_dense()
    missing = np.zeros(p.truth.shape, bool)
    missing[:, 5] = True
    if name in HARD_RANK:
        missing[3] = True
    assert np.array_equal(np.isnan(value), missing)
    known = np.delete(np.delete(value - truth, 5, axis=1), 3, axis=0)
    assert np.linalg.norm(known) <= 0.05 * np.linalg.norm(truth)


def test_unidentified_lines_are_nan_on_every_library(xp):
    entries = moved(with_short_lines()[1], xp)
    solution = solve("scaled_asd", entries, allow_unidentified=True, max_iter=2)
    missing = np.isnan(to_host(solution.value.to_dense()))
    assert missing[3].all()
    assert missing[:, 5].all()
    assert missing.sum() == 50 + 40 - 1


def blocks(*shapes):
    """Full blocks along a diagonal."""
    m, n = np.sum(shapes, axis=0)
    mask, (i, j) = np.zeros((m, n), bool), (0, 0)
    for rows, cols in shapes:
        mask[i : i + rows, j : j + cols] = True
        i, j = i + rows, j + cols
    return mask


@pytest.mark.parametrize("name", HARD_RANK)
def test_parts_that_no_entry_connects(name):
    mask = blocks((6, 5), (9, 8))
    x = np.outer(np.arange(1, 16), np.arange(1, 14)).astype(float)
    entries = Entries.from_mask(x, mask)
    with pytest.raises(ValueError, match="2 parts that no entry connects"):
        solve(name, entries, rank=1)
    value = solve(name, entries, rank=1, allow_unidentified=True).value.to_dense()
    assert np.isnan(value[:6]).all()
    assert np.isnan(value[:, :5]).all()
    assert np.abs(value[6:, 5:] - x[6:, 5:]).max() <= 1e-5 * x.max()


@pytest.mark.parametrize("name", HARD_RANK)
def test_one_observed_value(name):
    entries = Entries([1], [2], np.array([3.0]), (3, 4))
    with pytest.raises(ValueError, match="fewer than 1 entries"):
        solve(name, entries, rank=1)
    value = solve(name, entries, rank=1, allow_unidentified=True).value.to_dense()
    assert abs(value[1, 2] - 3.0) <= 1e-6
    assert np.isnan(value).sum() == 11


@pytest.mark.parametrize("name", HARD_RANK)
def test_too_few_entries_for_the_rank(name):
    # Three a line in a circulant: each line has enough, all together have not.
    rows = np.repeat(np.arange(9), 3)
    cols = (rows + np.tile(np.arange(3), 9)) % 9
    entries = Entries(rows, cols, np.ones(27), (9, 9))
    with pytest.raises(ValueError, match=r"rank 2 has 32 degrees of freedom .* got 27 entries"):
        solve(name, entries)


@pytest.mark.parametrize("name", SOLVERS)
def test_matrices_are_no_entries(name):
    with pytest.raises(TypeError, match=r"must be Entries, got ndarray; Entries\.from_nan"):
        SOLVERS[name].solver(np.eye(5), rank=2, **SOLVERS[name].options)


def test_choices_are_made_of_entries():
    with pytest.raises(TypeError, match="must be Entries, got ndarray"):
        completion.select_rank(np.eye(5), [1, 2])
    with pytest.raises(TypeError, match="must be Entries, got ndarray"):
        completion.soft_impute_path(np.eye(5), rank=2, regularizations=[0.5])


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_rank_and_start(name):
    entries = problem(5.0).entries
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.40"):
        solve(name, entries, rank=41)
    if name in NOISY:
        with pytest.raises(ValueError, match=r"init must have shape \(50, 40\)"):
            solve(name, entries, init=lr.LowRank(np.ones((3, 1)), np.ones((1, 3))))


# -- alternating least squares --


def test_als_with_a_penalty_is_stationary():
    p = problem(5.0, noise=0.1)
    rho, e = 0.02, p.entries
    f = completion.als(
        e, rank=RANK, regularization=rho, weighted=False, rng=0, stop=lr.Stop(tol=1e-12)
    ).value
    residual = e.with_values(e.values - e.sample(f))
    # rho ||L||^2 + rho ||R||^2 is 2 rho ||Z||_*: the residual has that subgradient.
    rms = e.norm() / e.size**0.5
    weight = rho * rms * e.size / np.sqrt(50 * 40)
    assert np.abs(residual @ f.vh.T - weight * f.u).max() <= 1e-8 * e.norm()
    assert np.abs(residual.rmatmul(f.u) - weight * f.vh.T).max() <= 1e-8 * e.norm()


def test_als_with_weights_is_stationary():
    p = problem(5.0, noise=0.1)
    rho, e = 0.02, p.entries
    f = completion.als(e, rank=RANK, regularization=rho, rng=0, stop=lr.Stop(tol=1e-12)).value
    residual = e.with_values(e.values - e.sample(f))
    # The least penalty of Z is 2 rho times the nuclear norm of the matrix with weighted lines.
    rows, cols = (np.sqrt(c)[:, None] for c in (e.pattern.row_counts, e.pattern.column_counts))
    weighted = lr.LowRank(rows * f.u * f.s, f.vh * cols.T).svd()
    weight = rho * e.norm() / e.size**0.5
    image = residual @ (weighted.vh.T / cols) / rows
    assert np.abs(image - weight * weighted.u).max() <= 1e-8 * e.norm()


def test_als_with_biases():
    p = problem(5.0)
    rng = np.random.default_rng(1)
    x = p.truth.to_dense() + 5 + rng.standard_normal((50, 1)) + rng.standard_normal(40)
    e = p.entries.with_values(p.entries.sample(x))
    f = completion.als(e, rank=RANK, biases=True, rng=0).value
    assert f.rank == RANK + 2
    assert lr.relative_error(f.to_dense(), x) <= 1e-5
    assert lr.relative_error(completion.als(e, rank=RANK, rng=0).value.to_dense(), x) > 0.01


def test_als_residual_is_orthogonal_to_the_factors():
    p = problem(5.0, noise=0.1)
    f = completion.als(p.entries, rank=RANK, rng=0, stop=lr.Stop(tol=1e-12)).value
    residual = p.entries.with_values(p.entries.values - p.entries.sample(f))
    assert np.abs(residual @ f.vh.T).max() <= 1e-9 * p.entries.norm()
    assert np.abs(residual.rmatmul(f.u)).max() <= 1e-9 * p.entries.norm()


def test_als_starts_from_fewer_triplets():
    p = problem(5.0)
    f = completion.als(p.entries, rank=RANK, init=p.truth.truncate(1), rng=0).value
    assert lr.relative_error(f, p.truth) <= 1e-5


def test_over_relaxation_is_what_it_takes():
    p = problem(2.5, condition=1.0, shape=(120, 100))
    solution = completion.als(p.entries, rank=RANK, rng=0, continuation=0.0)
    assert lr.relative_error(solution.value, p.truth) <= 1e-5
    # Rates without are near 0.85 here, and need some 100 sweeps for eight digits.
    assert solution.n_iter <= 50


def test_continuation_recovers_near_the_information_limit():
    errors = {}
    for continuation in (0.0, 0.9):
        found = []
        for seed in range(3):
            p = problem(1.8, condition=10.0, shape=(100, 80), seed=seed)
            stop = lr.Stop(max_iter=300, tol=1e-9)
            f = completion.als(p.entries, rank=RANK, continuation=continuation, rng=0, stop=stop)
            found.append(lr.relative_error(f.value, p.truth))
        errors[continuation] = np.median(found)
    assert errors[0.9] <= 1e-6
    assert errors[0.0] >= 1e-3


# -- scaled gradient descent --


@pytest.mark.parametrize("condition", [1.0, 5.0, 20.0])
def test_scaled_gd_rate_does_not_depend_on_the_condition(condition):
    p = problem(8.0, condition=condition, shape=(100, 80))
    solution = completion.scaled_gd(p.entries, rank=RANK, rng=0, stop=lr.Stop(tol=1e-9))
    assert lr.relative_error(solution.value, p.truth) <= 1e-7
    assert solution.n_iter <= 150


def test_scaled_gd_with_damping_takes_too_large_a_rank():
    p = problem(10.0, shape=(100, 80))
    rng = np.random.default_rng(0)
    small = lr.LowRank(rng.standard_normal((100, 4)), rng.standard_normal((4, 80)))
    small = small * (1e-6 * float(p.truth.s[0]) / small.norm())
    damped = completion.scaled_gd(p.entries, rank=4, init=small, damping=1.0, rng=0)
    plain = completion.scaled_gd(p.entries, rank=4, rng=0)
    assert lr.relative_error(damped.value, p.truth) <= 1e-3
    assert lr.relative_error(plain.value, p.truth) >= 1e-2


def test_scaled_gd_comes_down_from_a_start_far_worse_than_zero():
    """Few entries overfit the leading triplets, which are then divided by the sampling rate."""
    p = synthetic.completion(shape=(400, 400), rank=5, oversampling=2.5, condition=10.0, rng=0)
    start = completion.scaled_gd(p.entries, rank=5, rng=0, stop=lr.Stop(max_iter=0))
    assert p.entries.relative_residual(start.value) >= 2.0
    stop = lr.Stop(max_iter=1500, tol=1e-9)
    solution = completion.scaled_gd(p.entries, rank=5, rng=0, stop=stop)
    assert lr.relative_error(solution.value, p.truth) <= 1e-5


def test_a_diverging_step_ends_with_the_last_good_iterate():
    solution = completion.svt(problem(6.0).entries, rank=RANK, step_size=50.0, rng=0)
    assert solution.converged is False
    assert "diverged in step" in solution.reason
    assert np.all(np.isfinite(solution.value.to_dense()))
    assert problem(6.0).entries.relative_residual(solution.value) <= 2.0


# -- the nuclear norm --


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_soft_impute_is_optimal(share, dtype):
    e = problem(6.0, dtype, noise=0.1).entries
    largest = np.linalg.norm(e.to_dense(), 2)
    solution = completion.soft_impute(
        e, rank=40, regularization=share, rng=0, stop=lr.Stop(max_iter=2000, tol=1e-10)
    )
    f, penalty = solution.value, share * largest
    residual = e.with_values(e.values - e.sample(f)).to_dense()
    assert f.rank < 40
    assert np.linalg.norm(residual, 2) <= penalty * (1 + 1e-4)
    assert np.abs(f.u.conj().T @ residual - penalty * f.vh).max() <= 1e-4 * penalty


def test_soft_impute_is_zero_from_one_on():
    e = problem(6.0).entries
    value = completion.soft_impute(e, rank=5, regularization=1.0, rng=0).value
    # The norm of the entries is known to 1e-3, and nothing pulls to zero at the threshold.
    assert value.norm() <= 1e-3 * e.norm()
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"regularization must be in \(0, 1\]"):
            completion.soft_impute(e, rank=5, regularization=bad)


def test_path_is_that_of_separate_problems():
    e = problem(6.0, noise=0.1).entries
    shares = [0.7, 0.3, 0.1]
    stop = lr.Stop(max_iter=3000, tol=1e-10)
    path = completion.soft_impute_path(e, rank=20, regularizations=shares, rng=0, stop=stop)
    for share, point in zip(shares, path, strict=True):
        alone = completion.soft_impute(e, rank=20, regularization=share, rng=0, stop=stop)
        assert point.regularization == share
        assert lr.relative_error(point.solution.value, alone.value) <= 1e-6
    norms = [float(np.sum(point.solution.value.s)) for point in path]
    assert norms == sorted(norms)
    with pytest.raises(ValueError, match="regularizations must fall"):
        completion.soft_impute_path(e, rank=5, regularizations=[0.1, 0.2])


# -- choice of rank and regularization --


def test_select_rank():
    p = problem(10.0, noise=0.1, shape=(80, 60))
    chosen = completion.select_rank(p.entries, range(1, 6), rng=0)
    assert chosen.rank == RANK
    assert [score.rank for score in chosen.curve] == [1, 2, 3, 4, 5]
    fits = [score.fit for score in chosen.curve]
    assert fits == sorted(fits, reverse=True)
    errors = [score.error for score in chosen.curve]
    assert min(errors) == errors[RANK - 1]
    # Withheld entries carry the noise themselves, relative to clean entries of mean square one.
    assert 0.1 <= chosen.error <= 0.15


def test_select_regularization():
    p = problem(3.0, noise=0.5, shape=(80, 60))
    values = (0.0, 0.03, 0.3, 3.0)
    chosen = completion.select_rank(p.entries, [RANK], regularizations=values, rng=0)
    assert chosen.regularization in (0.03, 0.3)
    assert [score.regularization for score in chosen.curve] == list(values)


def test_select_rank_by_another_solver():
    p = problem(10.0, shape=(60, 50))
    chosen = completion.select_rank(
        p.entries,
        [1, 2, 3],
        solver=lambda e, rank, _: completion.scaled_asd(e, rank=rank, rng=0),
        splits=2,
        rng=0,
    )
    assert chosen.rank == RANK
    assert chosen.error <= 1e-4


def test_ranks_that_are_not_identified_have_no_error():
    p = problem(2.5)
    chosen = completion.select_rank(p.entries, [1, 39], rng=0)
    assert chosen.curve[1].error == np.inf
    with pytest.raises(ValueError, match="do not determine a matrix of any rank in"):
        completion.select_rank(p.entries, [39], rng=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (partial(completion.als, rank=2, regularization=-1.0), "regularization must be at least 0"),
        (partial(completion.als, rank=2, continuation=1.0), r"continuation must be in \[0, 1\)"),
        (partial(completion.scaled_gd, rank=2, step_size=0.0), "step_size must be positive"),
        (partial(completion.scaled_gd, rank=2, damping=-1.0), "damping must be at least 0"),
        (partial(completion.select_rank, ranks=[]), "at least one value each"),
        (partial(completion.select_rank, ranks=[1], splits=0), "splits must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call(problem(5.0).entries)
