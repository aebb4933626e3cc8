"""Initializers: ``W == residual + scale up down``, and the optimality identity of each."""

import math
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import exact, gaussian, matrix

import lowrank_sp as lr
from lowrank_sp._arrays import to_host
from lowrank_sp.adapters import (
    CALIBRATED,
    INITIALIZERS,
    Allocation,
    allocate_by_energy,
    allocate_by_sensitivity,
    allocate_by_variance,
    corda_ipm,
    corda_kpm,
    double,
    eva,
    fp8_e4m3,
    int_affine,
    int_symmetric,
    kasa,
    loftq,
    lora,
    lora_ga,
    lora_one,
    lora_sb,
    mica,
    milora,
    nf4,
    nora,
    olora,
    orthogonal,
    pissa,
    qpissa,
    weighted,
)
from lowrank_sp.adapters import gaussian as gaussian_init
from lowrank_sp.adapters.statistics import InputPCA
from lowrank_sp.testing import assert_same_product

M, N, RANK = 30, 20, 4
SVD_BASED = {"pissa": pissa, "milora": milora}
#: They leave the weight as it is.
ZERO = {"lora": lora, "gaussian": gaussian_init, "mica": mica, "nora": nora, "eva": eva}

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
UNIT |= {"complex64": 2.0**-23, "complex128": 2.0**-52}

#: All but those that move the layer on purpose.
EXACT = [*INITIALIZERS, *(name for name in CALIBRATED if name != "lora_one")]
every = pytest.mark.parametrize("name", EXACT)


def weight(dtype=np.float64, shape=(M, N)):
    wide = dtype if np.issubdtype(np.dtype(dtype), np.complexfloating) else np.float64
    return gaussian(*shape, dtype=wide).astype(dtype)


def spread(n, samples, dtype=np.float64, seed=7):
    """Inputs whose variances decay, one sample a row."""
    x = gaussian(samples, n, seed=seed, dtype=dtype)
    return x * np.linspace(3.0, 0.3, n) @ np.linalg.qr(gaussian(n, n, seed=8))[0]


def data_for(statistic, w):
    """What an initializer needs beside the weight, in double precision."""
    complex_ = "complex" in str(w.dtype)
    dtype = np.complex128 if complex_ else np.float64
    n = w.shape[-1]
    m = w.shape[-2] if w.ndim > 1 else 1
    if statistic == "gradient":
        return gaussian(m, n, seed=9, dtype=dtype)
    x = spread(n, 3 * n, dtype)
    if statistic == "second_moment":
        return x.T @ x.conj() / len(x)
    return np.linalg.svd(x, full_matrices=False)[2]


def start_of(name, w, rank, *, asarray=np.asarray, **options):
    """The start ``name``, from data of the library of ``w``."""
    if name in INITIALIZERS:
        return INITIALIZERS[name](w, rank, **options)
    function, statistic = CALIBRATED[name]
    return function(w, rank, **{statistic: asarray(data_for(statistic, w))}, **options)


def wide(a):
    a = a.to(torch.float64) if isinstance(a, torch.Tensor) and not a.is_complex() else a
    a = to_host(a)
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def check_identity(w, start, unit):
    """``W == residual + scale up down`` to one rounding of what is stored."""
    w, up, down, residual = (wide(x) for x in (w, start.up, start.down, start.residual))
    product = start.scale * up @ down
    # The product is formed in the compute dtype, at least single precision.
    inner = min(unit, UNIT["float32"]) * up.shape[1] * abs(start.scale) * (abs(up) @ abs(down))
    assert np.all(abs(w - residual - product) <= unit * (abs(w) + abs(product)) + 4 * inner)


@every
@pytest.mark.parametrize("alpha", [None, 1, 16.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity(name, dtype, alpha):
    w = weight(DTYPES[dtype])
    start = start_of(name, w, RANK, alpha=alpha, rng=0)
    assert start.scale == (1.0 if alpha is None else alpha / RANK)
    assert (start.up.shape, start.down.shape) == ((M, RANK), (RANK, N))
    assert start.residual.dtype == w.dtype
    assert start.up.dtype == start.down.dtype == np.result_type(w.dtype, np.float32)
    check_identity(w, start, UNIT[dtype])


@every
def test_identity_on_every_library(name, xp):
    w = weight()
    data = xp.asarray(w)
    start = start_of(name, data, RANK, asarray=xp.asarray, rng=0)
    for part in (start.up, start.down, start.residual):
        assert type(part) is type(data)
        assert part.device == data.device
        assert part.dtype == data.dtype
    check_identity(w, start, UNIT["float64"])
    reference = start_of(name, w, RANK, rng=0)
    assert_same_product(
        wide(reference.residual), wide(start.residual), tol=1000 * np.finfo(float).eps
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_identity_of_torch_weights(name, dtype):
    w = torch.asarray(weight()).to(dtype)
    start = start_of(name, w, RANK, asarray=torch.asarray, alpha=8, rng=0)
    assert start.residual.dtype == dtype
    assert start.up.dtype == start.down.dtype == torch.float32
    check_identity(w, start, UNIT[str(dtype).removeprefix("torch.")])


@every
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_factors_may_be_stored_in_another_dtype(name, stored):
    w = weight(np.float32)
    start = start_of(name, w, RANK, dtype=DTYPES[stored], rng=0)
    assert start.up.dtype == start.down.dtype == DTYPES[stored]
    assert start.residual.dtype == np.float32
    check_identity(w, start, UNIT["float32"])


@every
def test_factors_of_torch_in_bfloat16(name):
    w = torch.asarray(weight(np.float32))
    start = start_of(name, w, RANK, asarray=torch.asarray, dtype=torch.bfloat16, rng=0)
    assert start.up.dtype == start.down.dtype == torch.bfloat16
    check_identity(w, start, UNIT["float32"])


@every
def test_a_parameter_of_torch_is_taken_as_a_constant(name):
    w = torch.nn.Parameter(torch.asarray(weight(np.float32)))
    start = start_of(name, w, RANK, asarray=torch.asarray, rng=0)
    assert not start.up.requires_grad
    assert not start.down.requires_grad
    assert start.residual is w or not start.residual.requires_grad


@every
@pytest.mark.parametrize("shape", [(N, M), (1500, 8), (8, 8)])
def test_shapes(name, shape):
    w = weight(shape=shape)
    start = start_of(name, w, RANK, rng=0)
    assert (start.up.shape, start.down.shape) == ((shape[0], RANK), (RANK, shape[1]))
    check_identity(w, start, UNIT["float64"])


@every
def test_weight_is_not_written_to(name):
    w = weight()
    w.flags.writeable = False
    before = w.copy()
    start_of(name, w, RANK, rng=0)
    assert np.array_equal(w, before)


@every
def test_delta_is_the_update(name):
    start = start_of(name, weight(), RANK, alpha=7.0, rng=0)
    assert_same_product(start.scale * start.up @ start.down, start.delta())


@pytest.mark.parametrize("name", ["lora", "gaussian", "orthogonal", "nora"])
def test_seeds(name):
    first, same, other = (start_of(name, weight(), RANK, rng=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.down, same.down)
    assert not np.array_equal(first.down, other.down)
    generators = [np.random.default_rng(0) for _ in range(2)]
    drawn = [start_of(name, weight(), RANK, rng=g).down for g in generators]
    assert np.array_equal(*drawn)
    assert np.array_equal(drawn[0], first.down)
    again = start_of(name, weight(), RANK, rng=generators[0]).down
    assert not np.array_equal(again, first.down)


# -- the law of each --


@pytest.mark.parametrize("name", ZERO)
def test_plain_starts_leave_the_weight_alone(name, xp):
    w = xp.asarray(weight())
    start = start_of(name, w, RANK, asarray=xp.asarray, rng=0)
    assert start.residual is w
    still, other = (start.down, start.up) if name == "mica" else (start.up, start.down)
    assert np.all(xp.host(still) == 0)
    assert np.any(xp.host(other) != 0)


def test_distribution_of_lora():
    n, rank = 400, 64
    down = lora(np.zeros((rank, n)), rank, rng=0).down
    limit = 1 / math.sqrt(n)
    assert abs(down).max() <= limit
    count = down.size
    # The sample standard deviation of a uniform variable scatters by sqrt(0.2 / count) of it.
    assert abs(down.std() * math.sqrt(3) / limit - 1) <= 5 * math.sqrt(0.2 / count)
    assert abs(down.mean()) <= 5 * limit / math.sqrt(3 * count)


def test_distribution_of_gaussian():
    n, rank = 400, 64
    down = gaussian_init(np.zeros((rank, n)), rank, rng=0).down
    count = down.size
    assert abs(down.std() * rank - 1) <= 5 * math.sqrt(0.5 / count)
    assert abs(down.mean()) <= 5 / rank / math.sqrt(count)
    assert abs((down * rank) ** 4).mean() == pytest.approx(3.0, abs=5 * math.sqrt(96 / count))


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_orthogonal_has_no_product(rank):
    start = orthogonal(weight(), rank, rng=0)
    size = np.linalg.norm(start.up) * np.linalg.norm(start.down)
    assert np.linalg.norm(start.up @ start.down) <= 20 * np.finfo(float).eps * size
    for factor in (start.up, start.down):
        s = np.linalg.svd(factor, compute_uv=False)
        assert np.sum(s > 1e3 * np.finfo(float).eps * s[0]) == rank // 2


def test_scale_of_orthogonal():
    start = orthogonal(np.zeros((300, 200)), 100, rng=0)
    for factor in (start.up, start.down):
        # Entries are N(0, 1/100 q q^T) with |q|^2 = 1/2 on average: variance 1/200.
        assert abs(np.mean(factor**2) * 200 - 1) <= 0.1


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(
        ValueError, match="rank must be even for the orthogonal initialization, got 3"
    ):
        orthogonal(weight(), 3)


BIG = {"krylov": 6, "gram": 60}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("rank", BIG.values(), ids=BIG)
def test_pissa(rank, dtype, alpha):
    w = matrix("exp(-j/5)" if rank == 6 else "slow", dtype)
    start = pissa(w, rank, alpha=alpha, rng=0)
    s, up, down = exact(w), wide(start.up), wide(start.down)
    accuracy = 4 * math.sqrt(np.finfo(dtype).eps) * s[0]
    for gram in (up.conj().T @ up, down @ down.conj().T):
        assert np.linalg.norm(gram - np.diag(s[:rank]) / start.scale, 2) <= accuracy
    left = exact(start.residual)
    assert abs(left[0] - s[rank]) <= accuracy
    assert abs(np.linalg.norm(left) - np.linalg.norm(s[rank:])) <= accuracy
    assert np.all(abs(wide(start.svd.s) - s[:rank]) <= wide(start.svd.bounds) + 1e-14)


def test_pissa_to_a_given_accuracy():
    w = matrix("slow")
    start = pissa(w, 3, tol=1e-10, rng=0)
    s = exact(w)
    assert abs(exact(start.residual)[0] - s[3]) <= 1e-10 * s[0]
    assert start.svd.bounds.max() <= 2e-10


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(M, N), (N, M), (160, 120)])
def test_milora(shape, dtype, alpha):
    w = weight(dtype, shape)
    start = milora(w, RANK, alpha=alpha)
    s, eps = exact(wide(w)), np.finfo(dtype).eps
    up, down, residual = (wide(x) for x in (start.up, start.down, start.residual))
    product, slack = start.scale * up @ down, 100 * eps * s[0]
    smallest = s[-RANK:]
    for gram in (up.T @ up, down @ down.T):
        assert np.linalg.norm(gram - np.diag(smallest) / start.scale, 2) <= slack
    assert abs(np.linalg.norm(product) ** 2 - np.sum(smallest**2)) <= slack * s[0]
    for cross in (product.T @ residual, product @ residual.T):
        assert np.linalg.norm(cross) <= slack * s[0]
    assert abs(exact(residual)[:-RANK] - s[:-RANK]).max() <= slack
    assert abs(exact(residual)[-RANK:]).max() <= slack


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(M, N), (N, M), (160, 120)])
def test_olora(shape, dtype):
    w = weight(dtype, shape)
    start = olora(w, RANK)
    up, down, residual = (wide(x) for x in (start.up, start.down, start.residual))
    eps = np.finfo(dtype).eps
    size = np.linalg.norm(w)
    assert abs(up.conj().T @ up - np.eye(RANK)).max() <= 40 * eps
    assert abs(np.tril(down, -1)).max() <= 40 * eps * size
    assert np.all(np.diagonal(down).real > 0)
    assert abs(np.diagonal(down).imag).max() <= 40 * eps * size
    assert abs(residual[:, :RANK]).max() <= 40 * eps * size
    q, r = np.linalg.qr(wide(w))
    phase = np.diagonal(r) / abs(np.diagonal(r))
    assert_same_product((q * phase)[:, :RANK], up, tol=1e3 * eps)
    assert_same_product((r / phase[:, None])[:RANK], down, tol=1e3 * eps)


def test_olora_is_not_divided_by_the_scale():
    one, half = (olora(weight(), RANK, alpha=alpha) for alpha in (RANK, RANK / 2))
    assert np.array_equal(one.up, half.up)
    assert np.array_equal(one.down, half.down)
    assert half.scale == 0.5


@every
@pytest.mark.parametrize("kind", ["zero", "rank one", "zero first columns"])
def test_degenerate_weights(name, kind):
    w = np.zeros((M, N))
    if kind == "rank one":
        w += 1.0
    elif kind == "zero first columns":
        w[:, RANK:] = gaussian(M, N - RANK)
    start = start_of(name, w, RANK, rng=0)
    for part in (start.up, start.down, start.residual):
        assert np.all(np.isfinite(part))
    check_identity(w, start, UNIT["float64"])


@every
@pytest.mark.parametrize(
    ("w", "rank", "options", "error", "text"),
    [
        (weight(), 0, {}, ValueError, r"rank must be in 1\.\.20 for shape 30 x 20, got 0"),
        (weight(), 22, {}, ValueError, r"rank must be in 1\.\.20 for shape 30 x 20, got 22"),
        (weight(), True, {}, TypeError, "rank must be an integer, got True"),
        (weight(), 2.0, {}, TypeError, "rank must be an integer, got 2.0"),
        (weight(), 2, {"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        (weight(), 2, {"alpha": -1.0}, ValueError, "alpha must be positive and finite, got -1.0"),
        (
            weight(),
            2,
            {"alpha": math.nan},
            ValueError,
            "alpha must be positive and finite, got nan",
        ),
        (
            weight(),
            2,
            {"alpha": math.inf},
            ValueError,
            "alpha must be positive and finite, got inf",
        ),
        (weight().astype(np.int8), 2, {}, TypeError, "got int8; dequantize it first"),
        (weight() > 0, 2, {}, TypeError, "weight must be floating, got bool"),
        (weight()[0], 1, {}, ValueError, r"weight must be a matrix, got shape \(20,\)"),
        (weight()[None], 1, {}, ValueError, r"weight must be a matrix, got shape \(1, 30, 20\)"),
    ],
)
def test_refusals(name, w, rank, options, error, text):
    with pytest.raises(error, match=text):
        start_of(name, w, rank, **options)


@every
def test_weights_that_are_not_finite(name, xp):
    w = weight()
    w[3, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        start_of(name, xp.asarray(w), RANK, asarray=xp.asarray)


# -- minor subspaces --


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_mica(shape, dtype):
    w = weight(dtype, shape)
    start = mica(w, RANK)
    up, eps = wide(start.up), np.finfo(dtype).eps
    assert abs(up.conj().T @ up - np.eye(RANK)).max() <= 40 * eps
    # Left vectors of the smallest singular values: they shorten the weight to those.
    s = exact(wide(w))
    assert abs(exact(up.conj().T @ wide(w)) - s[-RANK:]).max() <= 100 * eps * s[0]


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_kasa(shape, xp):
    w = weight(shape=shape)
    start = kasa(xp.asarray(w), RANK, rng=0)
    plain = lora(xp.asarray(w), RANK, rng=0)
    assert np.array_equal(xp.host(start.down), xp.host(plain.down))
    assert np.all(xp.host(start.up) == 0)
    s, left = exact(w), exact(xp.host(start.residual))
    slack = 100 * UNIT["float64"] * s[0]
    assert abs(left[:-RANK] - s[:-RANK]).max() <= slack
    assert left[-RANK:].max() <= slack
    lost = np.linalg.norm(w - xp.host(start.residual))
    assert lost == pytest.approx(np.linalg.norm(s[-RANK:]), rel=1e-12)
    assert start.svd.norm() == pytest.approx(lost, rel=1e-12)


def test_nora_lies_in_the_row_space():
    w = gaussian(M, 5) @ gaussian(5, N, seed=1)
    start = nora(w, RANK, alpha=3.0, sigma=0.1, rng=0)
    rows = np.linalg.svd(w)[2][:5]
    outside = start.down - start.down @ rows.T @ rows
    assert np.linalg.norm(outside) <= 100 * UNIT["float64"] * np.linalg.norm(start.down)
    omega = np.random.default_rng(0).standard_normal((M, RANK))
    np.testing.assert_allclose(start.down, 0.1 * omega.T @ w / start.scale, rtol=1e-12)


def test_nora_is_one_scaled_step_from_a_matrix_of_its_rank():
    target = gaussian(M, RANK) @ gaussian(RANK, N, seed=1)
    down = nora(target, RANK, rng=0).down
    # A step of size 1 of the scaled gradient in ``up``, of ||up down - target||^2 / 2 from zero.
    up = target @ down.T @ np.linalg.inv(down @ down.T)
    assert_same_product(target, up @ down, tol=1e-10)


# -- gradients --

HALVES = {
    "ArB2r": (slice(RANK, 2 * RANK), slice(0, RANK)),
    "A2rBr": (slice(0, RANK), slice(RANK, 2 * RANK)),
    "ArBr": (slice(0, 2 * RANK, 2), slice(1, 2 * RANK, 2)),
}


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("scaling", ["stable", "unit", "gd", "weight"])
@pytest.mark.parametrize("directions", [*HALVES, "random"])
def test_lora_ga_starts_along_the_best_rank_2r_gradient(directions, scaling, dtype):
    w, g = weight(dtype), data_for("gradient", weight(dtype))
    start = lora_ga(
        w, RANK, gradient=g, directions=directions, scaling=scaling, gamma=9.0, alpha=6.0, rng=0
    )
    size = {
        "stable": M**0.25 / 3.0,
        "unit": 1.0,
        "gd": RANK / 6.0,
        "weight": np.mean(np.sqrt(exact(w)[:RANK] * RANK / 6.0)),
    }[scaling]
    u, s, vh = np.linalg.svd(g)
    best = (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vh[: 2 * RANK]
    up, down = start.up, start.down
    change = up @ up.conj().T @ g + g @ down.conj().T @ down
    # Singular vectors are good to 4 sqrt(eps) relative to the gap that follows them.
    assert_same_product(size**2 * best, change, tol=100 * math.sqrt(UNIT["float64"]))
    for gram in (up.conj().T @ up, down @ down.conj().T):
        assert abs(gram - size**2 * np.eye(RANK)).max() <= 100 * UNIT["float64"] * size**2
    if directions in HALVES:
        left, right = HALVES[directions]
        assert abs(abs(np.diagonal(u[:, left].conj().T @ up)) / size - 1).max() <= 1e-6
        assert abs(abs(np.diagonal(down @ vh[right].conj().T)) / size - 1).max() <= 1e-6


def test_lora_ga_draws_halves_by_seed():
    def left(seed):
        return lora_ga(
            weight(), RANK, gradient=data_for("gradient", weight()), directions="random", rng=seed
        ).up

    assert np.array_equal(left(0), left(0))
    assert not np.allclose(left(0), left(1))


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_one_is_one_step_along_the_gradient(alpha, xp):
    w, g = weight(), data_for("gradient", weight())
    data = xp.asarray(w)
    start = lora_one(data, RANK, gradient=xp.asarray(g), gamma=32.0, alpha=alpha, rng=0)
    assert start.residual is data
    u, s, vh = np.linalg.svd(g)
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    product = start.scale * xp.host(start.up) @ xp.host(start.down)
    tol = 100 * math.sqrt(UNIT["float64"])
    assert_same_product(-start.scale / 32.0 / s[0] * best, product, tol=tol)
    assert exact(product)[0] == pytest.approx(start.scale / 32.0, rel=1e-10)
    up, down = xp.host(start.up), xp.host(start.down)
    assert abs(up.T @ up - down @ down.T).max() <= 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lora_sb_approximates_the_first_step(dtype, xp):
    g = data_for("gradient", weight()).astype(dtype)
    w = xp.asarray(weight(dtype))
    start = lora_sb(w, RANK, gradient=xp.asarray(g), step=0.1, rng=0)
    step = -0.1 * np.sign(g)
    s, eps = exact(step), np.finfo(dtype).eps
    up, core, down = (xp.host(a) for a in (start.up, start.core, start.down))
    assert (up.shape, core.shape, down.shape) == ((M, RANK), (RANK, RANK), (RANK, N))
    for gram in (up.T @ up, down @ down.T):
        assert abs(gram - np.eye(RANK)).max() <= 100 * eps
    assert np.array_equal(core, np.diag(np.diagonal(core)))
    left = np.linalg.norm(step - up @ core @ down)
    assert left == pytest.approx(np.linalg.norm(s[RANK:]), rel=100 * math.sqrt(eps))
    assert_same_product(xp.asarray(up @ core @ down), start.delta(), tol=100 * eps)


@pytest.mark.parametrize("initializer", [lora_ga, lora_one])
def test_gradients_may_be_factored(initializer):
    left, right = gaussian(M, 10), gaussian(10, N, seed=3)
    factored = initializer(weight(), RANK, gradient=lr.LowRank(left, right), rng=0)
    dense = initializer(weight(), RANK, gradient=left @ right, rng=0)
    assert_same_product(dense.delta(), factored.delta(), tol=100 * math.sqrt(UNIT["float64"]))


# -- activations --


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_eva(alpha, xp):
    w, directions = weight(), data_for("components", weight())
    values = np.linspace(4.0, 1.0, N)
    start = eva(xp.asarray(w), RANK, components=xp.asarray(directions), alpha=alpha)
    assert np.array_equal(xp.host(start.down), directions[:RANK])
    white = eva(
        xp.asarray(w),
        RANK,
        components=xp.asarray(directions),
        component_values=xp.asarray(values),
        alpha=alpha,
    )
    expected = directions[:RANK] / np.sqrt(values[:RANK])[:, None]
    np.testing.assert_allclose(xp.host(white.down), expected, rtol=1e-14)


def test_eva_keeps_most_of_the_variance():
    x = spread(N, 200)
    statistic = InputPCA.of(x, 2 * RANK, rng=0)
    start = eva(weight(), RANK, components=statistic.components)
    centred = x - x.mean(axis=0)
    kept = np.linalg.norm(centred @ start.down.T) ** 2
    s = exact(centred)
    assert kept == pytest.approx(np.sum(s[:RANK] ** 2), rel=1e-10)


def rms(residual, c):
    """``sqrt(E ||residual x||^2)`` for inputs of second moment ``c``."""
    return math.sqrt(np.trace(residual @ c @ residual.conj().T).real)


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_weighted_minimizes_the_error_of_the_outputs(dtype, alpha):
    w = weight(dtype)
    c = data_for("second_moment", w)
    start = weighted(w, RANK, second_moment=c, alpha=alpha, rng=0)
    eps = float(np.finfo(dtype).eps)
    root = np.linalg.cholesky(c)
    s = exact(wide(w) @ root)
    least = np.linalg.norm(s[RANK:])
    tol = 1e3 * eps  # the error is of second order in that of the vectors
    assert rms(wide(start.residual), c) == pytest.approx(least, rel=tol)
    assert start.error == pytest.approx(least, rel=tol)
    up, down = wide(start.up), wide(start.down)
    assert abs(up.conj().T @ up - down @ down.conj().T).max() <= 100 * eps * s[0]
    for other in (pissa, corda_ipm):
        data = {} if other is pissa else {"second_moment": c}
        assert rms(wide(other(w, RANK, rng=0, **data).residual), c) > (1 + 1e-3) * least


def test_weighted_by_white_inputs_is_pissa():
    plain = pissa(weight(), RANK, rng=0)
    white = weighted(weight(), RANK, second_moment=np.eye(N), rng=0)
    assert_same_product(plain.delta(), white.delta(), tol=100 * math.sqrt(UNIT["float64"]))


def damped(c, damping):
    return c + damping * np.mean(np.diagonal(c).real) * np.eye(len(c))


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_corda(dtype, alpha):
    w = weight(dtype)
    c = data_for("second_moment", w)
    cd = damped(c, 0.05)
    u, s, vh = np.linalg.svd(w @ cd, full_matrices=False)
    tol = 100 * math.sqrt(UNIT["float64"])
    for function, part in ((corda_ipm, slice(0, RANK)), (corda_kpm, slice(N - RANK, N))):
        start = function(w, RANK, second_moment=c, damping=0.05, alpha=alpha)
        # The published factors invert the damped moment.
        left = u[:, part] * np.sqrt(s[part] / start.scale)
        right = np.sqrt(s[part] / start.scale)[:, None] * (vh[part] @ np.linalg.inv(cd))
        assert_same_product(start.scale * left @ right, start.delta(), tol=tol)
        phase = np.diagonal(left.conj().T @ start.up) / (s[part] / start.scale)
        assert abs(abs(phase) - 1).max() <= tol
        np.testing.assert_allclose(start.up, left * phase, atol=tol * abs(left).max())
        np.testing.assert_allclose(start.down, right / phase[:, None], atol=tol * abs(right).max())
        kept = np.delete(s, np.arange(N)[part])
        rest = np.linalg.norm(start.residual @ cd)
        assert rest == pytest.approx(np.linalg.norm(kept), rel=1e-10)
        held = np.linalg.norm(start.delta().to_dense() @ cd)
        assert held == pytest.approx(np.linalg.norm(s[part]), rel=1e-10)


def test_size_of_the_second_moment_is_a_gauge():
    w = weight()
    c = data_for("second_moment", w)
    for function in (corda_ipm, corda_kpm, weighted):
        one, other = (function(w, RANK, second_moment=k * c, rng=0) for k in (1.0, 64.0))
        assert_same_product(one.delta(), other.delta(), tol=1e-10)


@pytest.mark.parametrize("function", [corda_ipm, corda_kpm, weighted])
@pytest.mark.parametrize(("size", "moment"), [(1e-18, 1e-20), (1e-30, 1e-36), (1e18, 1e20)])
def test_sizes_of_weights_and_second_moments_do_not_matter(function, size, moment):
    # Their product is not a number of single precision.
    w = weight(np.float32)
    c = data_for("second_moment", w).astype(np.float32)
    one = function(w, RANK, second_moment=c, rng=0)
    power, factor = (np.float32(2.0 ** round(math.log2(x))) for x in (size, moment))
    with np.errstate(over="ignore"):  # in the singular values, which are beyond the range
        other = function(power * w, RANK, second_moment=factor * c, rng=0)
    tol = 1e4 * UNIT["float32"]
    np.testing.assert_allclose(
        wide(other.residual) / float(power), wide(one.residual), atol=tol * abs(w).max()
    )
    if function is weighted:
        expected = one.error * float(power) * float(factor) ** 0.5
        assert other.error == pytest.approx(expected, rel=tol)


def test_corda_survives_a_singular_second_moment(xp):
    w = weight()
    x = spread(N, N)[:8]
    c = x.T @ x / 8
    for function in (corda_ipm, corda_kpm):
        start = function(xp.asarray(w), RANK, second_moment=xp.asarray(c))
        assert np.all(np.isfinite(xp.host(start.down)))
        check_identity(w, start, UNIT["float64"])
    start = weighted(xp.asarray(w), RANK, second_moment=xp.asarray(c))
    s = exact(w @ x.T / 8**0.5)
    assert start.error == pytest.approx(np.linalg.norm(s[RANK:]), rel=1e-9)


@pytest.mark.parametrize("name", ["weighted", "corda_ipm", "corda_kpm"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c[:3], r"second_moment must have shape \(20, 20\), got \(3, 20\)"),
        (lambda c: c + np.triu(np.ones_like(c), 1), "second_moment must be Hermitian"),
        (lambda c: -c, "positive semidefinite"),
        (lambda c: 0 * c, "too few samples: second_moment has rank 0"),
        (lambda c: np.outer(c[0], c[0]), "too few samples: second_moment has rank 1"),
        (lambda c: c * np.nan, "second_moment must be finite"),
    ],
)
def test_bad_second_moments(name, change, text):
    c = data_for("second_moment", weight())
    with pytest.raises(ValueError, match=text):
        CALIBRATED[name].initializer(weight(), RANK, second_moment=change(c))


G = gaussian(M, N, seed=9)
NAN = np.where(np.arange(N) == 3, np.nan, G)
V = np.linalg.qr(gaussian(N, N))[0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: lora_ga(w, 2, gradient=NAN), "gradient must be finite.*leave out the batches"),
        (lambda w: lora_one(w, 2, gradient=NAN), "gradient must be finite"),
        (lambda w: lora_sb(w, 2, gradient=NAN, step=1.0), "gradient must be finite"),
        (lambda w: lora_ga(w, 2, gradient=0 * G), "gradient must not be zero"),
        (lambda w: lora_one(w, 2, gradient=0 * G), "gradient must not be zero"),
        (lambda w: lora_one(w, 2, gradient=G.T), r"shape of the weight, \(30, 20\), got \(20, 30"),
        (lambda w: lora_ga(w, 11, gradient=G), r"rank must be in 1\.\.10 for shape 30 x 20"),
        (lambda w: lora_ga(w, 2, gradient=G, directions="up"), "directions must be one of ArB2r"),
        (lambda w: lora_ga(w, 2, gradient=G, scaling="big"), "scaling must be one of stable"),
        (lambda w: eva(w, 2, components=V[:1]), "too few samples: there are 1 components"),
        (lambda w: eva(w, 2, components=V[:, :5]), r"components must have shape \(k, 20\)"),
        (lambda w: eva(w, 2, components=V * np.inf), "components must be finite"),
        (lambda w: eva(w, 2, components=V, component_values=np.zeros(N)), "must be positive"),
        (lambda w: eva(w, 2, components=V, component_values=np.ones(1)), r"shape \(20,\)"),
        (lambda w: lora_ga(w, 2, gradient=G, gamma=0.0), "gamma must be positive and finite, got"),
        (lambda w: lora_one(w, 2, gradient=G, gamma=-1.0), "gamma must be positive and finite"),
        (lambda w: lora_sb(w, 2, gradient=G, step=0.0), "step must be positive and finite, got 0"),
        (lambda w: corda_ipm(w, 2, second_moment=np.eye(N), damping=0.0), "damping must be pos"),
        (lambda w: loftq(w, 2, steps=0), "steps must be at least 1, got 0"),
        (lambda w: qpissa(w, 2, steps=0), "steps must be at least 1, got 0"),
    ],
)
def test_bad_data(call, text):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=text):
        call(weight())


# -- quantized bases --

QUANTIZERS = {
    "nf4": nf4,
    "double nf4": lambda a: double(nf4(a)),
    "int2": partial(int_symmetric, bits=2, block=10),
    "affine": partial(int_affine, bits=3),
    "e4m3": fp8_e4m3,
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_loftq_takes_up_what_the_quantizer_lost(quantize, alpha, steps):
    w = weight()
    start = loftq(w, RANK, quantize=quantize, alpha=alpha, steps=steps, rng=0)
    base = start.base.to_dense()
    s = exact(w - base)
    error = np.linalg.norm(w - base - start.scale * start.up @ start.down)
    assert error == pytest.approx(np.linalg.norm(s[RANK:]), rel=1e-10)
    assert start.error == pytest.approx(error, rel=1e-12)
    assert error < np.linalg.norm(w - base)
    if steps == 1:
        assert np.array_equal(base, quantize(w).to_dense())
    assert_same_product(start.scale * start.up @ start.down, start.delta())


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_qpissa_quantizes_the_residual_of_pissa(quantize):
    w = weight()
    start, plain = qpissa(w, RANK, quantize=quantize, alpha=8.0, rng=0), pissa(w, RANK, alpha=8.0)
    assert_same_product(plain.delta(), start.delta(), tol=1e-10)
    # Not bit for bit, for the factors differ by rounding, but as close.
    lost = np.linalg.norm(plain.residual - quantize(plain.residual).to_dense())
    assert start.error == pytest.approx(lost, rel=0.05)
    base = start.base.to_dense()
    assert start.error == pytest.approx(
        np.linalg.norm(w - base - start.delta().to_dense()), rel=1e-12
    )


def test_loftq_and_qpissa_step_by_step():
    w = weight()
    r, scale = w, 2.0
    for _ in range(3):
        q = nf4(r).to_dense()
        u, s, vh = np.linalg.svd(w - q)
        r = w - (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    start = loftq(w, RANK, steps=3, alpha=scale * RANK, rng=0)
    np.testing.assert_allclose(start.base.to_dense(), q, atol=1e-9)
    r = w
    for _ in range(3):
        u, s, vh = np.linalg.svd(r)
        product = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        q = nf4(w - product).to_dense()
        r = w - q
    start = qpissa(w, RANK, steps=3, alpha=scale * RANK, rng=0)
    np.testing.assert_allclose(start.base.to_dense(), q, atol=1e-9)
    assert_same_product(product, start.delta(), tol=1e-9)


@pytest.mark.parametrize("initializer", [loftq, qpissa])
def test_quantized_starts_on_every_library(initializer, xp):
    data = xp.asarray(weight())
    start = initializer(data, RANK, steps=2, rng=0)
    reference = initializer(weight(), RANK, steps=2, rng=0)
    for part in (start.up, start.down, start.base.to_dense()):
        assert type(part) is type(data)
        assert part.device == data.device
    assert start.error == pytest.approx(reference.error, rel=1e-6)


@pytest.mark.parametrize("initializer", [loftq, qpissa])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_quantized_starts_report_the_error_of_what_is_stored(initializer, stored):
    w = weight(np.float16)
    start = initializer(w, RANK, dtype=DTYPES[stored], rng=0)
    assert start.up.dtype == start.down.dtype == DTYPES[stored]
    error = np.linalg.norm(wide(w) - start.base.to_dense() - wide(start.up) @ wide(start.down))
    assert start.error == pytest.approx(error, rel=1e-5)


# -- ranks --


def test_variance_allocates_the_largest_shares_of_all_layers():
    shares = {
        "a": np.array([0.5, 0.2, 0.1, 0.05]),
        "b": np.array([0.4, 0.3, 0.02, 0.01]),
        "c": np.array([0.01, 0.001, 0.001, 0.001]),
    }
    chosen = allocate_by_variance(shares, 2, alpha=6)
    assert chosen.rank_pattern == {"a": 4, "b": 2}
    assert chosen.dropped == ("c",)
    assert chosen.alpha_pattern == {"a": 12.0, "b": 6.0}
    capped = allocate_by_variance(shares, 2, alpha=6, largest=1.5)
    assert capped.rank_pattern == {"a": 3, "b": 3}
    assert set(capped.scales().values()) == set(chosen.scales().values()) == {3.0}


def test_energy_allocates_best():
    rng = np.random.default_rng(0)
    spectra = {name: np.sort(rng.exponential(size=6))[::-1] for name in "abc"}

    def kept(ranks, relative):
        total = {k: np.sum(s**2) if relative else 1.0 for k, s in spectra.items()}
        return sum(np.sum(spectra[k][:r] ** 2) / total[k] for k, r in ranks.items())

    for relative in (True, False):
        chosen = allocate_by_energy(spectra, 2, relative=relative, largest=3.0)
        assert sum(chosen.rank_pattern.values()) == 6
        best = max(
            kept(dict(zip("abc", (i, j, 6 - i - j), strict=True)), relative)
            for i in range(7)
            for j in range(7 - i)
        )
        assert kept(chosen.rank_pattern, relative) == pytest.approx(best, rel=1e-12)


def test_sensitivity_allocates_by_the_gradient(xp):
    strong, weak = 10 * gaussian(8, 6), gaussian(8, 6, seed=1)
    few = gaussian(8, 1, seed=2) @ gaussian(1, 6, seed=3)
    given = {k: xp.asarray(g) for k, g in {"weak": weak, "strong": strong, "few": few}.items()}
    chosen = allocate_by_sensitivity(given, 3, largest=2.0, rng=0)
    assert sum(chosen.rank_pattern.values()) == 9
    assert chosen.rank_pattern["strong"] == 6
    scores = np.concatenate([exact(weak) ** 2, exact(few)[:1] ** 2])
    best = np.sum(np.sort(scores)[::-1][:3])
    kept = np.sum(exact(weak)[: chosen.rank_pattern["weak"]] ** 2)
    kept += np.sum(exact(few)[: chosen.rank_pattern.get("few", 0)] ** 2)
    assert kept == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Allocation({"a": 4}, {}), "must name the same layers.*only one of them names a"),
        (lambda: Allocation({}, {"b": 4.0}), "only one of them names b"),
        (lambda: allocate_by_variance({}, 2), "at least one layer"),
        (lambda: allocate_by_variance({"a": np.ones(2)}, 0), "rank must be at least 1, got 0"),
        (lambda: allocate_by_variance({"a": np.ones(2)}, 1, largest=0.5), "largest must be at l"),
        (lambda: allocate_by_energy({"a": np.array([1.0, 2.0])}, 1), "sorted from large to small"),
        (lambda: allocate_by_variance({"a": np.array([np.nan])}, 1), "a must be finite"),
        (lambda: allocate_by_sensitivity({"a": NAN}, 1), "gradient of a: .*finite"),
        (lambda: allocate_by_sensitivity({"a": G}, 0), "rank must be at least 1, got 0"),
    ],
)
def test_bad_allocations(call, text):
    with pytest.raises(ValueError, match=text):
        call()
