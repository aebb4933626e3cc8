"""Initializers: ``W == residual + scale up down``, and the optimality identity of each."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import exact, gaussian, matrix

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters import INITIALIZERS, lora, milora, olora, orthogonal, pissa
from lowrank_sp.adapters import gaussian as gaussian_init
from lowrank_sp.testing import assert_same_product

M, N, RANK = 30, 20, 4
SVD_BASED = {"pissa": pissa, "milora": milora}
#: They leave the weight as it is.
ZERO = {"lora": lora, "gaussian": gaussian_init}

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

every = pytest.mark.parametrize("name", INITIALIZERS)


def weight(dtype=np.float64, shape=(M, N)):
    wide = dtype if np.issubdtype(np.dtype(dtype), np.complexfloating) else np.float64
    return gaussian(*shape, dtype=wide).astype(dtype)


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
    start = INITIALIZERS[name](w, RANK, alpha=alpha, rng=0)
    assert start.scale == (1.0 if alpha is None else alpha / RANK)
    assert (start.up.shape, start.down.shape) == ((M, RANK), (RANK, N))
    assert start.residual.dtype == w.dtype
    assert start.up.dtype == start.down.dtype == np.result_type(w.dtype, np.float32)
    check_identity(w, start, UNIT[dtype])


@every
def test_identity_on_every_library(name, xp):
    w = weight()
    data = xp.asarray(w)
    start = INITIALIZERS[name](data, RANK, rng=0)
    for part in (start.up, start.down, start.residual):
        assert type(part) is type(data)
        assert part.device == data.device
        assert part.dtype == data.dtype
    check_identity(w, start, UNIT["float64"])
    reference = INITIALIZERS[name](w, RANK, rng=0)
    assert_same_product(
        wide(reference.residual), wide(start.residual), tol=1000 * np.finfo(float).eps
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_identity_of_torch_weights(name, dtype):
    w = torch.asarray(weight()).to(dtype)
    start = INITIALIZERS[name](w, RANK, alpha=8, rng=0)
    assert start.residual.dtype == dtype
    assert start.up.dtype == start.down.dtype == torch.float32
    check_identity(w, start, UNIT[str(dtype).removeprefix("torch.")])


@every
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_factors_may_be_stored_in_another_dtype(name, stored):
    w = weight(np.float32)
    start = INITIALIZERS[name](w, RANK, dtype=DTYPES[stored], rng=0)
    assert start.up.dtype == start.down.dtype == DTYPES[stored]
    assert start.residual.dtype == np.float32
    check_identity(w, start, UNIT["float32"])


@every
@pytest.mark.parametrize("shape", [(N, M), (1500, 8), (8, 8)])
def test_shapes(name, shape):
    w = weight(shape=shape)
    start = INITIALIZERS[name](w, RANK, rng=0)
    assert (start.up.shape, start.down.shape) == ((shape[0], RANK), (RANK, shape[1]))
    check_identity(w, start, UNIT["float64"])


@every
def test_weight_is_not_written_to(name):
    w = weight()
    w.flags.writeable = False
    before = w.copy()
    INITIALIZERS[name](w, RANK, rng=0)
    assert np.array_equal(w, before)


@every
def test_delta_is_the_update(name):
    start = INITIALIZERS[name](weight(), RANK, alpha=7.0, rng=0)
    assert_same_product(start.scale * start.up @ start.down, start.delta())


@pytest.mark.parametrize("name", ["lora", "gaussian", "orthogonal"])
def test_seeds(name):
    first, same, other = (INITIALIZERS[name](weight(), RANK, rng=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.down, same.down)
    assert not np.array_equal(first.down, other.down)
    generators = [np.random.default_rng(0) for _ in range(2)]
    drawn = [INITIALIZERS[name](weight(), RANK, rng=g).down for g in generators]
    assert np.array_equal(*drawn)
    assert np.array_equal(drawn[0], first.down)
    again = INITIALIZERS[name](weight(), RANK, rng=generators[0]).down
    assert not np.array_equal(again, first.down)


# -- the law of each --


@pytest.mark.parametrize("name", ZERO)
def test_plain_starts_leave_the_weight_alone(name, xp):
    w = xp.asarray(weight())
    start = ZERO[name](w, RANK, rng=0)
    assert start.residual is w
    assert np.all(xp.host(start.up) == 0)
    assert np.any(xp.host(start.down) != 0)


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
    start = INITIALIZERS[name](w, RANK, rng=0)
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
        INITIALIZERS[name](w, rank, **options)


@every
def test_weights_that_are_not_finite(name, xp):
    w = weight()
    w[3, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        INITIALIZERS[name](xp.asarray(w), RANK)
