"""Laws of the second-order and Riemannian completion solvers, and of the algebra they stand on."""

import numpy as np
import pytest
from cases import gaussian, orthonormal

import lowrank_sp as lr
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.inverse import Entries, synthetic
from lowrank_sp.inverse.completion import gnmr, matrix_irls
from lowrank_sp.inverse.completion.certificate import determined
from lowrank_sp.inverse.least_squares import least_squares
from lowrank_sp.inverse.tangent import Space, added, inner
from lowrank_sp.updates.tangent import Tangent

M, N, R = 12, 9, 2

#: Solvers whose answers are certified to be unique.
CERTIFIED = [matrix_irls, gnmr]


def problem(oversampling, condition, *, shape=(24, 20), **more):
    return synthetic.completion(
        shape=shape, rank=2, oversampling=oversampling, condition=condition, **more
    )


def error(solution, p):
    return float((solution.value - p.truth).norm()) / float(p.truth.norm())


@pytest.mark.parametrize("solver", CERTIFIED)
def test_no_convergence_below_the_information_limit(solver):
    for seed in range(4):
        p = problem(1.05, 10.0, shape=(30, 30), rng=seed)
        solution = solver(p.entries, rank=2, rng=0, stop=lr.Stop(max_iter=60))
        assert not solution.converged or error(solution, p) < 1e-6


@pytest.mark.parametrize("solver", CERTIFIED)
def test_entries_that_other_matrices_have_too_are_no_answer(solver):
    p, entries = undetermined()
    solution = solver(entries, rank=2, rng=0, stop=lr.Stop(max_iter=300))
    assert entries.relative_residual(solution.value) < 1e-6
    assert error(solution, p) > 1e-6
    assert solution.converged is False
    assert "other matrices" in solution.reason


def undetermined():
    """A row and a column with two entries each, one of them in common."""
    p = problem(4.0, 1.0, rng=0)
    mask = np.zeros((24, 20), bool)
    mask[p.entries.rows, p.entries.cols] = True
    for line in (mask[0], mask[:, 0]):
        line[:] = False
        line[7] = True
    mask[0, 0] = True
    return p, Entries.from_mask(p.truth.to_dense(), mask)


def test_determined_against_the_singular_values_of_sampling():
    for seed in range(6):
        p = problem(1.1 + 0.1 * seed, 1.0, rng=seed)
        assert determined(p.entries, p.truth) == (smallest(p.entries, p.truth) > 1e-8)
    p, entries = undetermined()
    assert smallest(entries, p.truth) < 1e-10
    assert not determined(entries, p.truth)


def smallest(entries, f):
    """Smallest singular value of sampling on the tangent space, by a dense basis of it."""
    m, n = f.shape
    rows, cols = entries.rows, entries.cols
    u = np.linalg.qr(np.hstack([f.u, gaussian(m, m)]))[0]
    v = np.linalg.qr(np.hstack([f.vh.T, gaussian(n, n)]))[0]
    basis = [
        u[rows, i] * v[cols, j] for i in range(m) for j in range(n) if i < f.rank or j < f.rank
    ]
    return np.linalg.svd(np.array(basis), compute_uv=False)[-1]


def test_irls_recovers_what_first_order_methods_do_not():
    hits = 0
    for seed in range(6):
        p = problem(2.0, 1e5, shape=(60, 60), rng=seed)
        solution = matrix_irls(p.entries, rank=2, rng=0, decay=0.5, stop=lr.Stop(tol=1e-11))
        hits += error(solution, p) < 1e-9
        assert bool(solution.converged) == (error(solution, p) < 1e-9)
    assert hits >= 4


def test_irls_reaches_the_noise_floor():
    noise = 1e-2
    for seed in range(3):
        p = problem(4.0, 3.0, shape=(60, 50), noise=noise, rng=seed)
        solution = matrix_irls(p.entries, rank=2, rng=0, noise=noise, decay=0.5)
        assert solution.converged
        # sigma sqrt(dof / M) for estimates at the limit of Cramer and Rao.
        assert error(solution, p) <= 1.5 * noise / p.oversampling**0.5
        assert matrix_irls(p.entries, rank=2, rng=0, decay=0.5).converged is False


def test_gnmr_takes_the_truncation_of_its_tangent():
    # The product of the factors alternates between two gauges where the tangent is exact.
    p = problem(1.6, 10.0, rng=3)
    solution = gnmr(p.entries, rank=2, rng=0, stop=lr.Stop(max_iter=100, tol=1e-12))
    assert solution.converged
    assert error(solution, p) < 1e-10


@pytest.mark.parametrize("complex_", [False, True])
def test_tangent_algebra_against_dense(complex_, xp):
    rng = np.random.default_rng(0)
    dtype = np.complex128 if complex_ else np.float64
    u, v = orthonormal(M, R, rng, complex_), orthonormal(N, R, rng, complex_)
    z = gaussian(M, N, dtype=dtype)
    space = Space(xp.asarray(u), xp.asarray(v.conj().T))
    x = space.project(lr.as_operator(xp.asarray(z)))
    pu, pv = u @ u.conj().T, v @ v.conj().T
    dense = pu @ z + z @ pv - pu @ z @ pv
    tol = 100 * eps(np.float64) * np.linalg.norm(z)
    assert np.linalg.norm(to_host(space.matrix(x).to_dense()) - dense) < tol
    assert abs(inner(x, x) - np.linalg.norm(dense) ** 2) < tol * np.linalg.norm(z)
    again = space.project(space.matrix(x))
    assert inner(*[added(-1.0, again, x)] * 2) ** 0.5 < tol
    s = np.array([3.0, 1.0])
    f = space.retract(xp.asarray(s), added(0.1, x))
    point = (u * s) @ v.conj().T + 0.1 * dense
    uu, ss, vv = np.linalg.svd(point)
    best = (uu[:, :R] * ss[:R]) @ vv[:R]
    assert np.linalg.norm(to_host(f.to_dense()) - best) < tol


def test_retraction_agrees_to_second_order():
    rng = np.random.default_rng(0)
    u, v = orthonormal(M, R, rng), orthonormal(N, R, rng)
    space, s = Space(u, v.T), np.array([2.0, 1.0])
    x = space.project(lr.as_operator(gaussian(M, N)))
    misses = []
    for step in (1e-2, 1e-3):
        moved = space.retract(s, added(step, x)).to_dense()
        line = (u * s) @ v.T + step * space.matrix(x).to_dense()
        misses.append(np.linalg.norm(moved - line))
    assert 80 < misses[0] / misses[1] < 125


@pytest.mark.parametrize("complex_", [False, True])
def test_least_squares_against_dense(complex_, xp):
    dtype = np.complex128 if complex_ else np.float64
    a, y = gaussian(20, 6, dtype=dtype), gaussian(20, 1, seed=1, dtype=dtype)[:, 0]
    w = np.array([0.0, 0.1, 1.0, 10.0, 0.5, 0.0])
    exact = np.linalg.solve(a.conj().T @ a + np.diag(w), a.conj().T @ y)
    at, yt = xp.asarray(a), xp.asarray(y)
    ah = xp.asarray(a.conj().T)

    def forward(x):
        return (at[:, :2] @ x[0][:, None] + at[:, 2:4] @ x[1][:, None] + at[:, 4:] @ x[2][:, None])[
            :, 0
        ]

    def backward(values):
        g = (ah @ values[:, None])[:, 0]
        return Tangent(g[:2], g[2:4], g[4:])

    weights = Tangent(*(xp.asarray(part) for part in np.split(w, 3)))
    zero = Tangent(*(xp.asarray(np.zeros(2, dtype)) for _ in range(3)))
    fit = least_squares(forward, backward, yt, zero, weights, rate=20.0, tol=1e-13, max_iter=50)
    found = np.concatenate([to_host(part) for part in fit.x])
    assert np.linalg.norm(found - exact) < 1e-11 * np.linalg.norm(exact)
    assert np.linalg.norm(to_host(fit.residual) - (y - a @ found)) < 1e-12 * np.linalg.norm(y)
    assert fit.n_iter <= 10


def test_an_interrupted_system_is_not_taken_for_solved():
    calls = []

    def forward(x):
        calls.append(x)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return x.core

    def backward(values):
        return Tangent(values, 0 * values, 0 * values)

    start = backward(np.zeros((2, 2)))
    with pytest.raises(KeyboardInterrupt):
        least_squares(forward, backward, np.ones((2, 2)), start, tol=1e-9, max_iter=9)
