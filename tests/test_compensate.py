"""Corrections of quantized bases: each formula against a dense one, one answer for all roots."""

from functools import partial

import numpy as np
import pytest
from cases import gaussian, orthonormal

import lowrank_sp as lr
from lowrank_sp.adapters import (
    MeanMagnitude,
    MeanSquare,
    SecondMoment,
    fp8_e4m3,
    int_symmetric,
    loftq,
    nf4,
)
from lowrank_sp.adapters.compensate import (
    COMPENSATIONS,
    lorc,
    lq_lora,
    lqer,
    qera,
    qera_approx,
    srr,
    svdquant,
)
from lowrank_sp.adapters.compress import svd_llm
from lowrank_sp.adapters.statistics import pack, unpack
from lowrank_sp.operators import as_operator
from lowrank_sp.testing import assert_adjoint, assert_same_product

M, N, RANK, SAMPLES = 24, 18, 4, 90
EPS = np.finfo(np.float64).eps
COARSE = partial(int_symmetric, bits=3, block=6)


def weight(dtype=np.float64):
    """With a column far larger than the others, as trained weights have."""
    w = gaussian(M, N)
    w[:, 5] *= 6
    return w.astype(dtype)


def samples(count=SAMPLES):
    mixing = np.diag(np.geomspace(3, 0.1, N)) @ orthonormal(N, N, np.random.default_rng(3))
    return gaussian(count, N, seed=1) @ mixing


def moment(x):
    return x.T @ x / len(x)


def fisher(dtype=np.float64):
    return (gaussian(M, N, seed=4) ** 2 * np.geomspace(1, 30, N)).astype(dtype)


#: What a method needs beside the weight, under its keyword.
DATA = {
    "lorc": {},
    "lqer": {"magnitude": abs(samples()).mean(0)},
    "qera_approx": {"mean_square": (samples() ** 2).mean(0)},
    "qera": {"second_moment": moment(samples())},
    "lq_lora": {"fisher": fisher()},
    "srr": {"second_moment": moment(samples())},
    "svdquant": {"magnitude": abs(samples()).max(0)},
}
FUNCTIONS = {
    "lorc": lorc,
    "lqer": lqer,
    "qera_approx": qera_approx,
    "qera": qera,
    "lq_lora": lq_lora,
    "srr": srr,
    "svdquant": svdquant,
}
#: These quantize the weight itself, so that their base does not depend on the rank.
FIRST = ["lorc", "lqer", "qera_approx", "qera"]
every = pytest.mark.parametrize("name", FUNCTIONS)


def truncated(a, rank):
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def scale_of(name):
    """``S`` of the norm ``||. S||_F`` that a method minimizes, by the textbook."""
    if name == "lorc":
        return np.eye(N)
    if name == "lqer":
        return np.diag(abs(samples()).mean(0))
    if name == "qera_approx":
        return np.diag((samples() ** 2).mean(0) ** 0.5)
    values, vectors = np.linalg.eigh(moment(samples()))
    return (vectors * values**0.5) @ vectors.T


def fisher_scales():
    rows, columns = fisher().mean(1), fisher().mean(0)
    return rows[:, None] ** 0.5, (columns / fisher().mean()) ** 0.5


def smoothing(magnitude, migration=0.5):
    return magnitude**migration / abs(weight()).max(0) ** (1 - migration)


def on(xp, name):
    return {key: xp.asarray(value) for key, value in DATA[name].items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FIRST)
def test_formula_on_every_library(name, dtype, xp):
    """``((W - Q) S)_r inv(S)``, and the norm of what it leaves."""
    w, s = weight(dtype), scale_of(name)
    found = FUNCTIONS[name](xp.asarray(w), RANK, quantize=COARSE, rng=0, **on(xp, name))
    base = COARSE(w).to_dense().astype(np.float64)
    lost = w.astype(np.float64) - base
    expected = truncated(lost @ s, RANK) @ np.linalg.inv(s)
    tol = 1000 * np.finfo(dtype).eps * np.linalg.cond(s)
    assert found.correction.rank == RANK
    assert type(found.correction.left) is type(xp.asarray(w))
    assert xp.host(found.correction.right).dtype == dtype
    assert_same_product(expected, xp.host(found.correction.to_dense()), tol=tol)
    made = np.linalg.norm((lost - expected) @ s)
    assert abs(found.error - made) <= tol * np.linalg.norm(lost @ s)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lq_lora_takes_the_leading_part_first(dtype, xp):
    w = weight(dtype)
    rows, columns = fisher_scales()
    found = lq_lora(
        xp.asarray(w), RANK, fisher=xp.asarray(fisher(dtype)), quantize=COARSE, steps=1, rng=0
    )
    expected = truncated(rows * w * columns, RANK) / rows / columns
    tol = 1000 * np.finfo(dtype).eps
    assert_same_product(expected, xp.host(found.correction.to_dense()), tol=tol)
    left = w - xp.host(found.to_dense()).astype(np.float64)
    made = np.linalg.norm(rows * left * columns)
    assert abs(found.error - made) <= tol * np.linalg.norm(rows * w * columns)
    # The base is that of what the correction leaves: within half a step of it.
    target = w - expected
    step = abs(target).max() / (2**3 - 2)
    assert abs(target - xp.host(found.base.to_dense())).max() <= step * (1 + tol)


def test_lq_lora_keeps_the_best_of_its_steps():
    w, (rows, columns) = weight(), fisher_scales()
    lost, errors = w, []
    for _ in range(6):
        correction = truncated(rows * lost * columns, RANK) / rows / columns
        base = COARSE(w - correction).to_dense()
        lost = w - base
        errors.append(np.linalg.norm(rows * (lost - correction) * columns))
    rising = np.flatnonzero(np.diff(errors) >= 0)
    best = errors[rising[0]] if len(rising) else errors[-1]
    found = [lq_lora(w, RANK, fisher=fisher(), quantize=COARSE, steps=k).error for k in (1, 2, 6)]
    assert abs(found[0] - errors[0]) <= 1e4 * EPS * errors[0]
    assert found == sorted(found, reverse=True)
    assert abs(found[-1] - best) <= 1e4 * EPS * best


def test_a_fisher_of_rank_one_is_the_loss_itself():
    outer = np.geomspace(1, 9, M)[:, None] * np.geomspace(5, 1, N)
    found = lq_lora(weight(), RANK, fisher=outer, quantize=COARSE, rng=0)
    made = np.sum(outer * (weight() - found.to_dense()) ** 2) ** 0.5
    assert abs(found.error - made) <= 1e3 * EPS * made


@pytest.mark.parametrize("small", [0.0, 1e-200])
def test_rows_and_columns_that_hardly_count(small):
    """Their weights are not inverted: the limit is approached, and nothing blows up."""
    some = fisher()
    some[[3, 7]], some[:, 2] = small, small
    found = lq_lora(weight(), RANK, fisher=some, quantize=COARSE, steps=1)
    near = lq_lora(weight(), RANK, fisher=np.maximum(some, 1e-20), quantize=COARSE, steps=1)
    assert_same_product(near.correction.to_dense(), found.correction.to_dense(), tol=1e-8)
    assert found.correction.norm() <= 10 * np.linalg.norm(weight())


def test_a_weight_of_small_rank_is_kept_by_the_correction():
    w = gaussian(M, 2) @ gaussian(2, N, seed=1)
    found = lq_lora(w, RANK, fisher=fisher(), quantize=COARSE)
    assert_same_product(w, found.correction.to_dense(), tol=1e4 * EPS)
    assert found.error <= 1e4 * EPS * np.linalg.norm(w)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("smooth", [False, True])
def test_svdquant_keeps_the_leading_part(smooth, dtype, xp):
    w = weight(dtype)
    data = on(xp, "svdquant") if smooth else {}
    found = svdquant(xp.asarray(w), RANK, quantize=COARSE, rng=0, **data)
    d = smoothing(DATA["svdquant"]["magnitude"]) if smooth else np.ones(N)
    expected = truncated(w * d, RANK)
    tol = 1000 * np.finfo(dtype).eps
    assert_same_product(expected, xp.host(found.correction.to_dense()) * d, tol=tol)
    rest = w * d - expected
    step = abs(rest).max() / (2**3 - 2)
    assert abs(rest - xp.host(found.base.to_dense())).max() <= step * (1 + tol)
    made = np.linalg.norm((w - xp.host(found.to_dense())) * d)
    assert abs(found.error - made) <= tol * np.linalg.norm(w * d)
    if smooth:
        np.testing.assert_allclose(xp.host(found.smoothing), d, rtol=100 * np.finfo(dtype).eps)


def root_of(second_moment):
    values, vectors = np.linalg.eigh(second_moment)
    return (vectors * values**0.5) @ vectors.T


def tails(a):
    s = np.linalg.svd(a, compute_uv=False)
    return np.array([np.linalg.norm(s[k:]) for k in range(RANK + 1)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kept", range(RANK + 1))
def test_srr_keeps_the_leading_outputs(kept, dtype, xp):
    w, c = weight(dtype), DATA["srr"]["second_moment"]
    root = root_of(c)
    found = srr(xp.asarray(w), RANK, second_moment=xp.asarray(c), kept=kept, quantize=COARSE, rng=0)
    u = np.linalg.svd(w @ root)[0][:, :kept]
    leading = u @ (u.T @ w)
    rest = (w - leading).astype(dtype)
    base, lost = xp.host(found.base.to_dense()), rest - COARSE(rest).to_dense()
    # A weight that rounding puts on the other side of two levels is one of a few, a step off.
    if np.linalg.norm(base - COARSE(rest).to_dense()) <= 1e-3 * np.linalg.norm(base):
        expected = truncated((w - base) @ root, RANK) @ np.linalg.inv(root)
        tol = 1e4 * np.finfo(dtype).eps * np.linalg.cond(root)
        assert_same_product(expected, xp.host(found.correction.to_dense()), tol=tol)
        # The published correction: the leading part, and the best of the remaining rank.
        published = np.linalg.norm(lost @ root - truncated(lost @ root, RANK - kept))
        assert found.error <= published * (1 + tol)
    made = np.linalg.norm((w - xp.host(found.to_dense())) @ root)
    assert abs(found.error - made) <= 1e3 * np.finfo(dtype).eps * np.linalg.norm(w @ root)
    assert found.correction.rank == RANK


def test_srr_splits_the_rank_where_its_estimate_is_least():
    w, options = weight(), {**DATA["srr"], "quantize": COARSE, "rng": 0}
    root = root_of(options["second_moment"])
    estimate = tails(w @ root) * tails((w - COARSE(w).to_dense()) @ root)[::-1]
    best = int(np.argmin(estimate))
    by_default = srr(w, RANK, **options)
    assert by_default.error == srr(w, RANK, kept=best, **options).error
    assert best > 0
    # A spectrum with nothing in front: all of the rank is for the error, and it is QERA.
    flat = orthonormal(M, N, np.random.default_rng(0))
    options["second_moment"] = np.eye(N)
    assert srr(flat, RANK, **options).error == qera(flat, RANK, **options).error


def test_columns_and_inputs_of_zero_are_not_smoothed():
    w, magnitude = weight(), DATA["svdquant"]["magnitude"].copy()
    w[:, 2], magnitude[4] = 0.0, 0.0
    found = svdquant(w, RANK, magnitude=magnitude, quantize=COARSE)
    assert found.smoothing[2] == found.smoothing[4] == 1.0
    assert np.all(np.isfinite(found.to_dense()))


def by_inverse(root, lost, rank):
    return truncated(lost @ root, rank) @ np.linalg.inv(root)


def test_all_exact_estimators_are_one(xp):
    """SVD-LLM, QERA and EoRA, each by its published formula, and what stands here."""
    w, x = weight(), samples()
    c = moment(x)
    lost = w - COARSE(w).to_dense()
    values, vectors = np.linalg.eigh(c)
    published = [
        by_inverse(np.linalg.cholesky(c), lost, RANK),  # SVD-LLM
        by_inverse((vectors * values**0.5) @ vectors.T, lost, RANK),  # QERA
        by_inverse(vectors * values**0.5, lost, RANK),  # EoRA
    ]
    a, b = xp.asarray(w), xp.asarray(c)
    inner = xp.asarray(lost)
    ours = [
        qera(a, RANK, second_moment=b, quantize=COARSE, rng=0).correction,
        COMPENSATIONS["eora"].function(a, RANK, second_moment=b, quantize=COARSE, rng=1).correction,
        svd_llm(inner, RANK, second_moment=b, rng=2).approximation,
        svd_llm(inner, RANK, inputs=xp.asarray(x), rng=3).approximation,
    ]
    tol = 1e4 * EPS * np.linalg.cond(x)
    for other in published[1:]:
        assert_same_product(published[0], other, tol=tol)
    for found in ours:
        assert_same_product(published[0], xp.host(found.to_dense()), tol=tol)


@pytest.mark.parametrize("name", FIRST)
def test_each_is_best_in_its_own_norm(name):
    s = scale_of(name)
    errors = {
        other: np.linalg.norm(
            (weight() - FUNCTIONS[other](weight(), RANK, quantize=COARSE, **DATA[other]).to_dense())
            @ s
        )
        for other in FIRST
    }
    assert min(errors, key=errors.__getitem__) == name


@pytest.mark.parametrize("name", FIRST)
def test_error_falls_with_the_rank_to_zero(name):
    errors = [
        FUNCTIONS[name](weight(), r, quantize=COARSE, **DATA[name]).error for r in range(1, N + 1)
    ]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] <= 1e3 * EPS * errors[0]


def test_the_correction_never_makes_outputs_worse():
    w, c = weight(), moment(samples())
    alone = lr.output_norm(as_operator(w) - nf4(w), covariance=c)
    for name in FIRST[1:]:
        found = FUNCTIONS[name](w, RANK, **DATA[name])
        assert lr.output_norm(as_operator(w) - found, covariance=c) < alone


@every
def test_it_is_an_operator(name, xp):
    found = FUNCTIONS[name](xp.asarray(weight()), RANK, quantize=COARSE, rng=0, **on(xp, name))
    assert found.shape == (M, N)
    assert_adjoint(found)
    dense, x = xp.host(found.to_dense()), gaussian(N, 3, seed=9)
    product = xp.host(found @ xp.asarray(x))
    np.testing.assert_allclose(product, dense @ x, atol=1e3 * EPS * np.linalg.norm(dense))


@every
def test_half_precision_is_computed_in_single(name):
    half = weight(np.float16)
    found = FUNCTIONS[name](half, RANK, rng=0, **DATA[name])
    same = FUNCTIONS[name](half.astype(np.float32), RANK, rng=0, **DATA[name])
    assert found.correction.left.dtype == np.float32
    np.testing.assert_array_equal(found.to_dense(), same.to_dense())


def test_inputs_are_left_alone():
    w = weight()
    before = w.copy()
    for name, function in FUNCTIONS.items():
        function(w, RANK, **DATA[name])
    np.testing.assert_array_equal(w, before)


def test_lorc_is_a_step_of_loftq():
    start = loftq(weight(), RANK, steps=1, rng=0)
    found = lorc(weight(), RANK, rng=0)
    assert_same_product(start.delta(), found.correction)
    assert abs(start.error - found.error) <= 1e3 * EPS * found.error


def test_a_base_that_exists_already():
    """Magnitude pruning, by any means."""
    w = weight()
    pruned = np.where(abs(w) > 0.5, w, 0.0)
    found = qera(w, RANK, quantize=lambda _: as_operator(pruned), **DATA["qera"])
    expected = by_inverse(np.linalg.cholesky(moment(samples())), w - pruned, RANK)
    assert_same_product(expected, found.correction.to_dense(), tol=1e6 * EPS)


def test_a_singular_moment_of_enough_samples():
    x = samples(RANK + 2)
    found = qera(weight(), RANK, second_moment=moment(x), quantize=COARSE)
    made = np.linalg.norm((weight() - found.to_dense()) @ x.T) / len(x) ** 0.5
    lost = weight() - COARSE(weight()).to_dense()
    s = np.linalg.svd(lost @ x.T / len(x) ** 0.5, compute_uv=False)
    slack = 100 * EPS**0.5 * s[0]
    assert abs(made - np.linalg.norm(s[RANK:])) <= slack
    assert abs(found.error - made) <= slack


def test_every_quantizer():
    for quantize in (nf4, COARSE, fp8_e4m3):
        found = qera(weight(), RANK, quantize=quantize, **DATA["qera"])
        np.testing.assert_array_equal(found.base.to_dense(), quantize(weight()).to_dense())


def test_methods_by_name():
    statistics = {
        "second_moment": SecondMoment,
        "mean_square": MeanSquare,
        "magnitude": MeanMagnitude,
    }
    for name, (function, statistic) in COMPENSATIONS.items():
        data = {}
        if statistic in statistics:
            data = {statistic: statistics[statistic].of(samples()).mean}
        elif statistic:
            data = {statistic: fisher()}
        found = function(weight(), RANK, **data)
        assert found.shape == (M, N), name


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(MeanSquare, lambda x: (x**2).mean(0)), (MeanMagnitude, lambda x: abs(x).mean(0))],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_stream_merge_and_pack(kind, reference, dtype, xp):
    x = samples().astype(dtype)
    a, b = kind.of(xp.asarray(x[:30].reshape(5, 6, N))), kind.of(xp.asarray(x[30:50]))
    merged = a.update(xp.asarray(x[50:])) + b
    assert merged.count == SAMPLES
    expected = reference(x.astype(np.float64))
    np.testing.assert_allclose(xp.host(merged.mean), expected, rtol=100 * EPS)
    again = unpack(kind, pack({"layer": merged}))["layer"]
    assert again.count == SAMPLES
    with pytest.raises(ValueError, match="must be finite"):
        kind.of(xp.asarray(np.full((2, N), np.nan, dtype)))
    with pytest.raises(ValueError, match="at least one sample"):
        kind.of(xp.asarray(np.ones((0, N), dtype)))


NAN, BAD = np.full(N, np.nan), -np.ones(N)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: lorc(w * np.nan, 2), "weight must be finite"),
        (lambda w: lorc(w, N + 1), r"rank must be in 1\.\.18"),
        (lambda w: lorc(w[0], 1), "weight must be a matrix"),
        (lambda w: lorc(w, 2, quantize=lambda a: nf4(a.T)), r"base must have shape \(24, 18\)"),
        (lambda w: lqer(w, 2, magnitude=NAN), "magnitude must be finite"),
        (lambda w: lqer(w, 2, magnitude=BAD), "magnitude must not be negative, got -1"),
        (lambda w: lqer(w, 2, magnitude=np.ones(M)), r"magnitude must have shape \(18,\)"),
        (lambda w: qera_approx(w, 2, mean_square=NAN), "mean_square must be finite"),
        (lambda w: qera(w, 2, second_moment=np.eye(M)), r"second_moment must have shape \(18, 18"),
        (lambda w: qera(w, 2, second_moment=np.full((N, N), np.nan)), "second_moment must be fin"),
        (
            lambda w: qera(w, 5, second_moment=moment(samples(4))),
            "too few samples: second_moment has rank 4, less than the rank 5",
        ),
        (lambda w: srr(w, 2, **DATA["srr"], kept=3), r"kept must be in 0\.\.2, got 3"),
        (lambda w: srr(w, 5, second_moment=moment(samples(4))), "too few samples"),
        (lambda w: lq_lora(w, 2, fisher=fisher(), steps=0), "steps must be at least 1"),
        (lambda w: lq_lora(w, 2, fisher=fisher().T), r"fisher must have shape \(24, 18\)"),
        (lambda w: lq_lora(w, 2, fisher=-fisher()), "fisher must not be negative"),
        (lambda w: svdquant(w, 2, magnitude=np.ones(N), migration=1.5), "migration must be in 0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(weight())


def test_integer_weights_are_refused():
    with pytest.raises(TypeError, match="weight must be floating"):
        lorc(np.ones((M, N), int), 2)
