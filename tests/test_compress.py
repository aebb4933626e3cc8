"""Weights in two factors: the estimators, and ranks that are optimal for their budget."""

import itertools

import numpy as np
import pytest
from cases import gaussian, orthonormal
from scipy.optimize import linprog

import lowrank_sp as lr
from lowrank_sp.adapters.compress import asvd, output_spectrum, plan_ranks, svd_llm
from lowrank_sp.operators import as_operator
from lowrank_sp.testing import assert_same_product

M, N, RANK, SAMPLES = 20, 16, 4, 70
EPS = np.finfo(np.float64).eps


def weight(dtype=np.float64, seed=0):
    return gaussian(M, N, seed=seed).astype(dtype)


def samples(count=SAMPLES, condition=30.0):
    mixing = np.diag(np.geomspace(1, 1 / condition, N)) @ orthonormal(
        N, N, np.random.default_rng(3)
    )
    return gaussian(count, N, seed=1) @ mixing


def moment(x):
    return x.T @ x / len(x)


def naive(w, root, rank):
    u, s, vh = np.linalg.svd(w @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root), np.linalg.norm(s[rank:])


def data(route, x=None):
    x = samples() if x is None else x
    return {"inputs": x} if route == "inputs" else {"second_moment": moment(x)}


routes = pytest.mark.parametrize("route", ["inputs", "second_moment"])


@routes
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_svd_llm_on_every_library(route, dtype, xp):
    w, x = weight(dtype), samples()
    given = {key: xp.asarray(value) for key, value in data(route).items()}
    found, error = svd_llm(xp.asarray(w), RANK, rng=0, **given)
    expected, least = naive(w.astype(np.float64), np.linalg.cholesky(moment(x)), RANK)
    tol = 1000 * np.finfo(dtype).eps * np.linalg.cond(x)
    assert found.rank == RANK
    assert xp.host(found.left).dtype == dtype
    assert_same_product(expected, xp.host(found.to_dense()), tol=tol)
    assert abs(error - least) <= tol * np.linalg.norm(w)
    made = lr.output_norm(as_operator(w) - lr.LowRank(*map(xp.host, found.factors())), inputs=x)
    assert abs(error - made) <= tol * np.linalg.norm(w)


def test_samples_keep_digits_that_their_moment_loses():
    """Inputs of condition 1e9: the moment has 1e18, beyond double precision."""
    w, x = weight(), samples(condition=1e9)
    s = np.linalg.svd(w @ x.T / SAMPLES**0.5, compute_uv=False)
    for rank in (RANK, N - 2):
        _, by_inputs = svd_llm(w, rank, inputs=x)
        assert abs(by_inputs - np.linalg.norm(s[rank:])) <= 1e3 * EPS * s[0]
    _, by_moment = svd_llm(w, RANK, second_moment=moment(x))
    assert abs(by_moment - np.linalg.norm(s[RANK:])) <= 100 * EPS**0.5 * s[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_asvd(exponent, dtype, xp):
    w, magnitude = weight(dtype), abs(samples()).mean(0)
    found, error = asvd(
        xp.asarray(w), RANK, magnitude=xp.asarray(magnitude), exponent=exponent, rng=0
    )
    scale = np.diag(magnitude**exponent)
    expected, least = naive(w.astype(np.float64), scale, RANK)
    tol = 1000 * np.finfo(dtype).eps * np.linalg.cond(scale)
    assert_same_product(expected, xp.host(found.to_dense()), tol=tol)
    assert abs(error - least) <= tol * np.linalg.norm(w)


def test_svd_llm_is_better_than_asvd_and_plain_truncation():
    w, x = weight(), samples()
    _, least = svd_llm(w, RANK, inputs=x)
    others = asvd(w, RANK, magnitude=abs(x).mean(0)).approximation, lr.truncated_svd(w, RANK)
    for other in others:
        assert lr.output_norm(as_operator(w) - other, inputs=x) > 1.001 * least


@routes
def test_error_falls_with_the_rank_as_the_spectrum_says(route, xp):
    w = weight()
    given = {key: xp.asarray(value) for key, value in data(route).items()}
    s = xp.host(output_spectrum(xp.asarray(w), **given))
    assert s.shape == (N,)
    errors = [svd_llm(xp.asarray(w), r, rng=0, **given).error for r in range(1, N + 1)]
    expected = [np.linalg.norm(s[r:]) for r in range(1, N + 1)]
    np.testing.assert_allclose(errors, expected, atol=1e4 * EPS * s[0])
    assert np.all(np.diff(errors) < 0)


def test_spectrum_of_few_samples_has_zeros():
    x = samples(5)
    for route in ("inputs", "second_moment"):
        s = output_spectrum(weight(), **data(route, x))
        assert s.shape == (N,)
        assert np.all(s[5:] <= 100 * EPS**0.5 * s[0])
        assert s[4] > 1e-3 * s[0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: svd_llm(w, 2), "exactly one of inputs and second_moment"),
        (lambda w: svd_llm(w, 2, **data("inputs"), **data("second_moment")), "exactly one of"),
        (lambda w: svd_llm(w, 5, inputs=samples(4)), "too few samples: inputs must hold at least"),
        (
            lambda w: svd_llm(w, 5, second_moment=moment(samples(4))),
            "too few samples: second_moment has rank 4",
        ),
        (lambda w: svd_llm(w, 2, inputs=samples() * np.nan), "inputs must be finite"),
        (lambda w: svd_llm(w, 2, second_moment=np.eye(N) * np.nan), "second_moment must be finite"),
        (lambda w: svd_llm(w * np.nan, 2, inputs=samples()), "weight must be finite"),
        (lambda w: svd_llm(w, N + 1, inputs=samples()), r"rank must be in 1\.\.16"),
        (lambda w: asvd(w, 2, magnitude=np.ones(N), exponent=-1), "exponent must be at least 0"),
        (lambda w: asvd(w, 2, magnitude=-np.ones(N)), "magnitude must not be negative"),
        (lambda w: asvd(w * np.nan, 2, magnitude=np.ones(N)), "weight must be finite"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(weight())


# Ranks.

#: A triplet costs 22, 8 and 15 parameters.
SHAPES = {"wide": (4, 18), "square": (4, 4), "tall": (9, 6)}
LEAST = sum(m + n for m, n in SHAPES.values())
WHOLE = sum(m * n for m, n in SHAPES.values())


def spectra(seed=0, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {
        name: np.sort(rng.exponential(size=min(shape)) ** 2)[::-1] for name, shape in shapes.items()
    }


def choices(name, s, shapes, relative):
    """``(parameters, loss, rank or None)`` of a layer: every rank that saves, and the matrix."""
    m, n = shapes[name]
    unit = np.sum(s**2) if relative else 1.0
    ranks = [r for r in range(1, len(s) + 1) if r * (m + n) < m * n]
    return [(r * (m + n), np.sum(s[r:] ** 2) / unit, r) for r in ranks] + [(m * n, 0.0, None)]


def every_plan(given, shapes, relative):
    tables = [choices(name, s, shapes, relative) for name, s in given.items()]
    for plan in itertools.product(*tables):
        yield sum(c for c, _, _ in plan), sum(loss for _, loss, _ in plan)


def least_loss(given, shapes, budget, relative):
    plans = every_plan(given, shapes, relative)
    return min(loss for cost, loss in plans if cost <= budget)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_plans_are_near_the_best_of_all_and_know_how_near(seed, relative):
    given = spectra(seed)
    for budget in range(LEAST, WHOLE + 1):
        plan = plan_ranks(given, SHAPES, budget, relative=relative)
        best = least_loss(given, SHAPES, budget, relative) ** 0.5
        slack = 1e-12
        assert plan.bound <= best + slack
        assert best <= plan.error + slack
        assert plan.parameters <= budget
        # What it says of itself is so.
        tables = {
            n: {r: (c, x) for c, x, r in choices(n, s, SHAPES, relative)} for n, s in given.items()
        }
        picked = [tables[n][plan.ranks.get(n)] for n in given]
        assert plan.parameters == sum(c for c, _ in picked)
        assert abs(plan.error**2 - sum(x for _, x in picked)) <= slack
        assert set(plan.dense) == set(given) - set(plan.ranks)
        # Nothing that gains still fits.
        for name, table in tables.items():
            cost, loss = table[plan.ranks.get(name)]
            left = budget - plan.parameters
            assert not any(c <= cost + left and x < loss - slack for c, x in table.values())


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_the_relaxation_to_mixtures_of_choices(seed, relative):
    given = spectra(seed)
    tables = [choices(name, s, SHAPES, relative) for name, s in given.items()]
    flat = [choice for table in tables for choice in table]
    one_each = np.repeat(np.eye(len(tables)), [len(table) for table in tables], axis=1)
    for budget in range(LEAST, WHOLE + 1, 7):
        relaxed = linprog(
            [loss for _, loss, _ in flat],
            A_ub=[[cost for cost, _, _ in flat]],
            b_ub=[budget],
            A_eq=one_each,
            b_eq=np.ones(len(tables)),
        )
        plan = plan_ranks(given, SHAPES, budget, relative=relative)
        assert abs(plan.bound**2 - relaxed.fun) <= 1e-7


def test_layers_of_one_shape_get_the_optimum_at_every_rank():
    """Concave gains at equal costs: greedy is exact."""
    shapes = dict.fromkeys("abc", (40, 12))
    given = {name: s[:12] for name, s in spectra(1, dict.fromkeys("abc", (12, 12))).items()}
    for total in range(3, 16):
        plan = plan_ranks(given, shapes, 52 * total, relative=False)
        assert sum(plan.ranks.values()) == total
        assert not plan.dense
        pooled = np.concatenate([s[1:] ** 2 for s in given.values()])
        best = np.sum(np.sort(pooled)[: len(pooled) - (total - 3)])
        assert abs(plan.error**2 - best) <= 1e-12
        assert abs(plan.bound - plan.error) <= 1e-12


def test_steps_of_the_envelope_are_optimal():
    """Whenever a budget is one that the greedy order meets exactly, nothing is better."""
    given = spectra(7)
    met = 0
    for budget in range(LEAST, WHOLE):
        plan = plan_ranks(given, SHAPES, budget)
        if plan.parameters == budget and plan.error - plan.bound <= 1e-12:
            met += 1
            best = least_loss(given, SHAPES, budget, relative=True) ** 0.5
            assert abs(plan.error - best) <= 1e-12
    assert met >= 5


def test_error_falls_with_the_budget_to_zero():
    given = spectra(2)
    bounds = [plan_ranks(given, SHAPES, budget).bound for budget in range(LEAST, WHOLE + 1)]
    assert np.all(np.diff(bounds) <= 1e-12)
    whole = plan_ranks(given, SHAPES, WHOLE)
    assert whole.error == 0.0
    assert set(whole.dense) == set(SHAPES)
    assert whole.parameters == WHOLE


def test_nothing_is_spent_where_nothing_is_gained():
    given = {"a": np.array([3.0, 2.0, 0.0, 0.0, 0.0, 0.0]), "b": np.zeros(6)}
    plan = plan_ranks(given, {"a": (6, 6), "b": (6, 6)}, 72)
    assert plan.ranks == {"a": 2, "b": 1}
    assert plan.error == plan.bound == 0.0


def test_a_vector_stays_as_it_is():
    plan = plan_ranks({"head": np.ones(1), "w": np.ones(6)}, {"head": (1, 9), "w": (6, 6)}, 21)
    assert plan.dense == ("head",)
    assert plan.ranks == {"w": 1}


def test_spectra_of_every_library(xp):
    given = spectra()
    expected = plan_ranks(given, SHAPES, 90)
    found = plan_ranks({k: xp.asarray(s.copy()) for k, s in given.items()}, SHAPES, 90)
    assert found == expected


def test_relative_errors_do_not_see_the_size_of_a_layer():
    given = spectra(3)
    scaled = {name: s * 100**i for i, (name, s) in enumerate(given.items())}
    one, two = plan_ranks(given, SHAPES, 90), plan_ranks(scaled, SHAPES, 90)
    assert one.ranks == two.ranks
    absolute = plan_ranks(scaled, SHAPES, 90, relative=False)
    assert absolute.ranks != two.ranks


def test_the_predicted_error_is_the_one_that_is_made():
    x = samples()
    weights = {name: gaussian(m, N, seed=m) for name, m in (("q", 16), ("up", 48))}
    given = {name: output_spectrum(w, inputs=x) for name, w in weights.items()}
    shapes = {name: w.shape for name, w in weights.items()}
    plan = plan_ranks(given, shapes, 600, relative=False)
    made = [svd_llm(weights[name], rank, inputs=x).error for name, rank in plan.ranks.items()]
    assert abs(plan.error - np.linalg.norm(made)) <= 1e4 * EPS * plan.error


@pytest.mark.parametrize(
    ("given", "shapes", "budget", "text"),
    [
        (spectra(), SHAPES, 44, "a budget of 44 parameters cannot be met: rank 1 in every layer"),
        ({}, {}, 10, "at least one layer"),
        (spectra(), {"wide": (4, 18)}, 50, "only one has square"),
        ({"a": np.ones(3)}, {"a": (4, 5)}, 50, r"must have all 4 values of shape 4 x 5"),
        ({"a": np.array([1.0, 2.0])}, {"a": (2, 3)}, 50, "sorted from large to small"),
        ({"a": np.array([1.0, np.nan])}, {"a": (2, 3)}, 50, "must be finite"),
        ({"a": np.array([1.0, -1.0])}, {"a": (2, 3)}, 50, "not negative"),
    ],
)
def test_plans_refuse(given, shapes, budget, text):
    with pytest.raises(ValueError, match=text):
        plan_ranks(given, shapes, budget)
