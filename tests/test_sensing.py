"""Laws of matrix sensing and of descent by update rules: recovery, rates, honest failures."""

import numpy as np
import pytest
from cases import gaussian
from update_cases import RULES, gauge

import lowrank_sp as lr
from lowrank_sp.inverse import (
    DenseSensing,
    EntrySampling,
    HankelLift,
    PartialFourier,
    RankOneSensing,
    sensing,
    synthetic,
)
from lowrank_sp.inverse.descent import descend
from lowrank_sp.updates import Gauge, GradientDescent, ScaledGD

EPS = np.finfo(np.float64).eps
SHAPE, RANK = (20, 15), 2


def nuclear(measurement, data, *, rank=None, rng=None, **options):
    """The convex program, which is told neither rank nor seed."""
    del rank, rng
    return sensing.nuclear_norm(measurement, data, **{"regularization": 1e-3, **options})


#: Solver, and the error it leaves in units of the tolerance; that of the last is its bias.
SOLVERS = {
    "factored_gd": (sensing.factored_gd, 20),
    "scaled_gd": (sensing.scaled_gd, 20),
    "alternating_minimization": (sensing.alternating_minimization, 5),
    "alt_gd_min": (sensing.alt_gd_min, 20),
    "niht": (sensing.niht, 20),
    "nuclear_norm": (nuclear, None),
}
solvers = pytest.mark.parametrize("name", SOLVERS)
FIXED_RANK = [name for name in SOLVERS if name != "nuclear_norm"]


def problem(like=None, **options):
    """A problem whose sensing matrices are stored."""
    options = {"shape": SHAPE, "rank": RANK, "oversampling": 4.0, "rng": 0, **options}
    p = synthetic.sensing(**options, like=np.zeros(0) if like is None else like)
    return p, p.measurement.stored() if hasattr(p.measurement, "stored") else p.measurement


def accuracy(name, dtype):
    factor = SOLVERS[name][1]
    return 5e-3 if factor is None else factor * 4 * float(np.finfo(dtype).eps) ** 0.5


def error(solution, p):
    return float(lr.relative_error(solution.value, p.truth))


@solvers
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_recovery(name, dtype):
    p, measurement = problem(np.zeros(0, dtype))
    found = SOLVERS[name][0](measurement, p.data, rank=RANK, rng=0)
    assert found.converged is True, found.reason
    assert found.value.u.dtype == dtype
    assert found.value.rank == RANK
    assert error(found, p) <= accuracy(name, dtype)


@solvers
def test_on_every_library(name, xp):
    p, measurement = problem(shape=(9, 8), rank=1, oversampling=5.0)
    matrices = xp.asarray(measurement._flat.reshape(-1, 9, 8))
    data = xp.asarray(p.data)
    # Ranks vary on the way down, and JAX compiles for each: a few steps will do.
    options = {"regularization": 0.3} if name == "nuclear_norm" else {}
    found = SOLVERS[name][0](DenseSensing(matrices), data, rank=1, rng=0, **options)
    assert found.converged is True, found.reason
    for part in (found.value.u, found.value.s, found.value.vh):
        assert type(part) is type(data)
        assert part.device == data.device
    value = lr.SVD(*(xp.host(part) for part in found.value))
    expected = SOLVERS[name][0](measurement, p.data, rank=1, rng=0, **options)
    assert lr.relative_error(value, expected.value) <= 1e-6


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", ["scaled_gd", "alternating_minimization", "niht"])
def test_rates_that_do_not_depend_on_the_condition(name, condition):
    solver = SOLVERS[name][0]
    p, measurement = problem(condition=condition)
    found = solver(measurement, p.data, rank=RANK, rng=0)
    assert error(found, p) <= accuracy(name, np.float64)
    q, measurement = problem(condition=1.0)
    reference = solver(measurement, q.data, rank=RANK, rng=0)
    assert found.n_iter <= 1.5 * reference.n_iter


@pytest.mark.parametrize("name", ["factored_gd", "alt_gd_min"])
def test_rates_that_do(name):
    steps = []
    for condition in (1.0, 3.0):
        p, measurement = problem(condition=condition, oversampling=6.0)
        found = SOLVERS[name][0](measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=3000))
        assert found.converged, found.reason
        steps.append(found.n_iter)
    assert steps[1] > 1.5 * steps[0]


@pytest.mark.parametrize(
    ("name", "oversampling"),
    [("alternating_minimization", 1.6), ("niht", 1.8), ("scaled_gd", 2.2), ("factored_gd", 2.2)],
)
def test_few_measurements_suffice(name, oversampling):
    for seed in range(3):
        p, measurement = problem(oversampling=oversampling, rng=seed)
        found = SOLVERS[name][0](measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=2000))
        assert error(found, p) <= 1e-4


@pytest.mark.parametrize("name", FIXED_RANK)
def test_too_few_measurements(name):
    """Near the information limit no solver says that it has converged; below it all refuse."""
    solver, _ = SOLVERS[name]
    p, measurement = problem(oversampling=1.0)
    found = solver(measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=100))
    assert found.converged is False
    assert np.all(np.isfinite(found.value.to_dense()))
    assert error(found, p) > 0.01
    with pytest.raises(ValueError, match="degrees of freedom"):
        solver(measurement, p.data, rank=RANK + 1)


@solvers
def test_noise_is_not_amplified(name):
    p, measurement = problem(noise=0.01, oversampling=5.0)
    options = {"regularization": 0.02} if name == "nuclear_norm" else {"rng": 0}
    found = SOLVERS[name][0](measurement, p.data, rank=RANK, **options)
    # Least squares over the tangent space leave sqrt(dof / M) of the noise, to be seen twice here.
    least = 0.01 * p.oversampling**-0.5
    bias = 0.05 if name == "nuclear_norm" else 0.0
    assert error(found, p) <= 2 * least + bias


def entries():
    rows, cols = synthetic.positions(SHAPE, 200, least=4, rng=0)
    return EntrySampling(lr.inverse.Entries(rows, cols, np.zeros(200), SHAPE))


def fourier():
    rows, cols = synthetic.positions(SHAPE, 200, rng=0)
    return PartialFourier(rows, cols, SHAPE, like=np.zeros(0))


MEASUREMENTS = {
    "rank one": lambda: RankOneSensing(gaussian(300, 20), gaussian(300, 15, seed=1)),
    "entries": entries,
    "Fourier": fourier,
}


@pytest.mark.parametrize("kind", MEASUREMENTS)
@pytest.mark.parametrize("name", ["scaled_gd", "alternating_minimization", "niht"])
def test_measurements_of_any_kind_and_scale(name, kind):
    measurement = MEASUREMENTS[kind]()
    p = synthetic.sensing(measurement=measurement, rank=RANK, rng=1)
    stop = lr.Stop(max_iter=3000)
    found = SOLVERS[name][0](measurement, p.data, rank=RANK, rng=0, stop=stop)
    assert error(found, p) <= 1e-4


@pytest.mark.parametrize("seed", [7, 9])
def test_thresholding_does_not_run_in_circles(seed):
    left, right = gaussian(300, 20, seed=2 * seed), gaussian(300, 15, seed=2 * seed + 1)
    measurement = RankOneSensing(left, right)
    p = synthetic.sensing(measurement=measurement, rank=RANK, rng=seed + 100)
    found = sensing.niht(measurement, p.data, rank=RANK)
    assert found.converged
    assert error(found, p) <= accuracy("niht", np.float64)


@solvers
@pytest.mark.parametrize("scale", [1e-150, 1e150, -3.0])
def test_scale(name, scale):
    p, measurement = problem()
    solver = SOLVERS[name][0]
    one = solver(measurement, p.data, rank=RANK, rng=0)
    other = solver(measurement, scale * p.data, rank=RANK, rng=0)
    assert other.converged is True
    assert lr.relative_error(other.value * (1 / scale), one.value) <= 1e-5


@solvers
def test_zero_data(name):
    _, measurement = problem()
    found = SOLVERS[name][0](measurement, np.zeros(measurement.size), rank=RANK, rng=0)
    assert found.converged is True
    assert not np.any(found.value.to_dense())


@solvers
def test_bad_input(name):
    p, measurement = problem()
    solver = SOLVERS[name][0]
    with pytest.raises(ValueError, match=r"data must have shape"):
        solver(measurement, p.data[1:], rank=RANK)
    data = p.data.copy()
    data[3] = np.nan
    with pytest.raises(ValueError, match=r"finite"):
        solver(measurement, data, rank=RANK)
    if name == "nuclear_norm":
        with pytest.raises(ValueError, match=r"regularization must be in \(0, 1\]"):
            solver(measurement, p.data, regularization=2.0)
        return
    with pytest.raises(ValueError, match=r"rank must be in 1..15"):
        solver(measurement, p.data, rank=16)
    with pytest.raises(ValueError, match=r"init must have shape"):
        solver(measurement, p.data, rank=RANK, init=lr.LowRank(np.ones((3, 2)), np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"init must have rank 2, got 1"):
        solver(measurement, p.data, rank=2, init=lr.LowRank(np.ones((20, 1)), np.ones((1, 15))))


@pytest.mark.parametrize("name", ["factored_gd", "scaled_gd"])
def test_divergence_is_said(name):
    p, measurement = problem()
    found = SOLVERS[name][0](measurement, p.data, rank=RANK, rng=0, lr=30.0)
    assert found.converged is False
    assert "diverged" in found.reason
    assert np.linalg.norm(p.data - measurement.forward(found.value)) <= 2 * np.linalg.norm(p.data)


@pytest.mark.parametrize("name", FIXED_RANK)
def test_start_and_callback(name):
    p, measurement = problem()
    seen = []
    found = SOLVERS[name][0](
        measurement,
        p.data,
        rank=RANK,
        init=p.truth * 1.01,
        callback=lambda k, change, value: seen.append((k, change, value)) or k == 2,
    )
    assert "callback" in found.reason
    assert [k for k, _, _ in seen] == [1, 2]
    assert lr.relative_error(seen[0][2], p.truth) < 0.02


# -- identities --


@pytest.mark.parametrize("oversampling", [1.2, 3.0])
def test_alternating_minimization_never_raises_the_residual(oversampling):
    p, measurement = problem(oversampling=oversampling, condition=30.0, noise=0.1)
    path = []
    sensing.alternating_minimization(
        measurement,
        p.data,
        rank=RANK,
        rng=0,
        stop=lr.Stop(max_iter=30),
        callback=lambda *seen: path.append(np.linalg.norm(p.data - measurement.forward(seen[2]))),
    )
    assert np.all(np.diff(path) <= 1e-9 * path[0])
    assert path[-1] < path[0]


def test_least_squares_leave_an_orthogonal_residual():
    p, measurement = problem(noise=0.1)
    found = sensing.alternating_minimization(
        measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=3)
    )
    rest = measurement.adjoint(p.data - measurement.forward(found.value)).to_dense()
    size = np.linalg.norm(measurement.adjoint(p.data).to_dense())
    # The left factor came last: the residual is orthogonal to all that it can reach.
    assert np.linalg.norm(rest @ found.value.vh.T) <= 1e-9 * size
    assert np.linalg.norm(found.value.u.T @ rest) > 1e-9 * size


def test_alternating_minimization_of_all_entries_is_subspace_iteration():
    a = gaussian(12, 9)
    identity = DenseSensing(np.eye(108).reshape(108, 12, 9))
    start = lr.LowRank(gaussian(12, 2, seed=1), gaussian(2, 9, seed=2))
    found = sensing.alternating_minimization(
        identity, a.ravel(), rank=2, init=start, stop=lr.Stop(max_iter=1)
    )
    u = np.linalg.qr(start.left)[0]
    v = np.linalg.qr(a.T @ u)[0]
    assert np.linalg.norm(found.value.to_dense() - a @ v @ v.T) <= 1e-9 * np.linalg.norm(a)


def test_one_step_of_niht():
    p, measurement = problem()
    start = synthetic.low_rank(SHAPE, RANK, like=np.zeros(0), rng=5)
    found = sensing.niht(measurement, p.data, rank=RANK, init=start, stop=lr.Stop(max_iter=1))
    x = start.to_dense()
    g = measurement.adjoint(p.data - measurement.forward(x)).to_dense()
    along = start.u @ start.u.T @ g
    length = np.sum(along**2) / np.sum(measurement.forward(along) ** 2)
    u, s, vh = np.linalg.svd(x + length * g)
    expected = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    assert np.linalg.norm(found.value.to_dense() - expected) <= 1e-9 * np.linalg.norm(expected)


def test_alt_gd_min_turns_to_the_right_subspace():
    p, measurement = problem(oversampling=6.0)
    angles = []
    sensing.alt_gd_min(
        measurement,
        p.data,
        rank=RANK,
        rng=0,
        stop=lr.Stop(max_iter=30),
        callback=lambda _k, _change, x: angles.append(lr.principal_angles(x.u, p.truth.u).max()),
    )
    angles = np.array(angles)
    assert np.all(angles[5::5] < 0.5 * angles[:-5:5])


@pytest.mark.parametrize("regularization", [0.5, 0.05])
def test_nuclear_norm_solution_is_optimal(regularization):
    """``A^*(y - A X) = lambda (U V^H + Z)``, ``Z`` orthogonal to both and of norm at most one."""
    p, measurement = problem(noise=0.05)
    found = sensing.nuclear_norm(measurement, p.data, regularization=regularization)
    assert found.converged
    top = np.linalg.norm(measurement.adjoint(p.data).to_dense(), 2)
    x = found.value
    dual = measurement.adjoint(p.data - measurement.forward(x)).to_dense() / (regularization * top)
    slack = 1e-5 / regularization
    assert np.linalg.norm(dual, 2) <= 1 + slack
    assert np.linalg.norm(dual @ x.vh.T - x.u) <= slack
    assert np.linalg.norm(x.u.T @ dual - x.vh) <= slack


def test_nuclear_norm_of_a_large_penalty_is_zero():
    p, measurement = problem()
    found = sensing.nuclear_norm(measurement, p.data, regularization=1.0)
    assert np.linalg.norm(found.value.to_dense()) <= 1e-6 * p.truth.norm()


def test_hankel_lift_of_exponentials():
    t = np.arange(31)
    signal = 0.95**t + 0.7 * np.cos(0.9 * t) * 0.9**t
    lift = HankelLift(31, 16, like=np.zeros(0))
    found = sensing.nuclear_norm(lift, lift.forward(lift.lift(signal).to_dense()))
    assert np.linalg.norm(lift.average(found.value) - signal) <= 0.05 * np.linalg.norm(signal)


# -- descent --

TARGET = lr.LowRank(gaussian(12, 3), gaussian(3, 9, seed=1))
START = lr.LowRank(gaussian(12, 3, seed=2), gaussian(3, 9, seed=3))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_descends(name):
    rule = RULES[name]
    target = TARGET.to_dense()
    found = descend(lambda x: x.to_dense() - target, START, rule, stop=lr.Stop(max_iter=60))
    before = np.linalg.norm(START.to_dense() - target)
    assert np.linalg.norm(found.value.to_dense() - target) < 0.95 * before
    assert len(found.history) == found.n_iter > 0


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.invariance is Gauge.GENERAL])
def test_descent_is_the_same_in_every_gauge(name):
    x, inverse = gauge(10.0)
    target, stop = TARGET.to_dense(), lr.Stop(max_iter=5)
    changed = lr.LowRank(START.left @ x, inverse @ START.right)
    one, other = (
        descend(lambda x: x.to_dense() - target, start, RULES[name], stop=stop)
        for start in (START, changed)
    )
    assert lr.relative_error(other.value, one.value) <= 1e4 * EPS


def test_gradients_may_be_operators():
    solutions = [
        descend(g, START, ScaledGD(lr=0.5, damping=0.0))
        for g in (lambda x: x - TARGET, lambda x: (x - TARGET).to_dense())
    ]
    for found in solutions:
        assert found.converged
        assert lr.relative_error(found.value, TARGET) <= 1e-6
    assert lr.relative_error(solutions[0].value, solutions[1].value) <= 1e-12


def test_a_diverging_descent_ends_with_a_finite_iterate(xp):
    target = xp.asarray(TARGET.to_dense())
    start = lr.LowRank(xp.asarray(START.left), xp.asarray(START.right))
    found = descend(lambda x: x.to_dense() - target, start, GradientDescent(lr=10.0))
    assert found.converged is False
    assert "diverged" in found.reason
    for factor in found.value.factors():
        assert np.all(np.isfinite(xp.host(factor)))


def test_sensing_and_descent_are_one_piece_of_code():
    p, measurement = problem()
    found = sensing.scaled_gd(measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=4))
    start = sensing.scaled_gd(measurement, p.data, rank=RANK, rng=0, stop=lr.Stop(max_iter=0)).value
    gain = np.sum(measurement.forward(start) ** 2) / start.norm() ** 2
    rule = ScaledGD(lr=0.5, damping=0.0)
    up, down = start.split().factors()
    state = rule.init(up, down)
    for _ in range(4):
        g = measurement.adjoint(measurement.forward(up @ down) - p.data).to_dense() / gain
        up, down, state = rule.step(up, down, g @ down.T, up.T @ g, state)
    assert lr.relative_error(found.value, lr.LowRank(up, down)) <= 1e3 * EPS
