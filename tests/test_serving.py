"""Laws of serving: banks against one pass an adapter, shared bases against dense decompositions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import gaussian

from lowrank_sp import LowRank, Stop
from lowrank_sp.adapters.forms import Product, RowMagnitude
from lowrank_sp.adapters.quantize import double, int_symmetric, nf4
from lowrank_sp.adapters.serving import (
    AdapterBank,
    bank,
    factor_work,
    jd_clustered,
    jd_diag,
    jd_full,
    merging_pays_from,
    switch_work,
)
from lowrank_sp.adapters.serving.clustered import _without_empty
from lowrank_sp.tensors import CP, cp_als, hooi

M, N = 24, 20
RANKS = (3, 1, 5, 3, 2, 3, 3)


def adapters(ranks=RANKS, dtype=np.float64, shape=(M, N)):
    return [
        Product(
            gaussian(shape[0], r, seed=2 * k, dtype=dtype),
            gaussian(r, shape[1], seed=2 * k + 1, dtype=dtype),
            (1.0, 0.5, -2.0)[k % 3],
        )
        for k, r in enumerate(ranks)
    ]


def on(xp, pairs):
    return [Product(xp.asarray(p.up), xp.asarray(p.down), p.scale) for p in pairs]


def one_pass_each(pairs, x, ids):
    """All rows through every adapter, of which the rows that use it are kept."""
    y = np.zeros((*x.shape[:-1], pairs[0].up.shape[0]), x.dtype)
    for k, pair in enumerate(pairs):
        y[ids == k] = (pair.scale * (x @ pair.down.T) @ pair.up.T)[ids == k]
    return y


#: Ids of a batch: any order, repeats, none, adapters without a row, and one that takes nearly all.
BATCHES = {
    "random": np.random.default_rng(0).integers(-1, len(RANKS), 40),
    "sorted": np.sort(np.random.default_rng(1).integers(0, len(RANKS), 40)),
    "falling": np.arange(len(RANKS) - 1, -2, -1),
    "few": np.array([5, 5, 0, 5, -1, 5]),
    "one": np.array([2]),
    "skewed": np.array([3] * 50 + [0, 5, 6] + [3] * 20),
    "no adapter": np.array([-1, -1, -1]),
    "empty": np.zeros(0, int),
}


@pytest.fixture(params=["one by one", "tiled", "as measured"])
def strategy(request, monkeypatch):
    """Products by segments, by tiles, and whichever the bank takes."""
    if request.param != "as measured":
        monkeypatch.setattr(bank, "_tiles_pay", lambda *_: request.param == "tiled")


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("name", BATCHES)
def test_a_bank_is_one_pass_each(name, dtype, xp):
    ids, pairs = BATCHES[name], adapters(dtype=dtype)
    x = gaussian(len(ids), N, dtype=dtype)
    found = AdapterBank.of(on(xp, pairs)).apply(xp.asarray(x), ids)
    expected = one_pass_each(pairs, x, ids)
    assert found.dtype == xp.asarray(x).dtype
    assert found.shape == (len(ids), M)
    error = np.linalg.norm(xp.host(found) - expected)
    assert error <= 20 * np.finfo(dtype).eps * np.linalg.norm(expected)


@pytest.mark.usefixtures("strategy")
def test_rows_may_be_sequences_of_tokens(xp):
    ids, pairs = BATCHES["random"], adapters()
    x = gaussian(len(ids), 2, 3, N)
    found = AdapterBank.of(on(xp, pairs)).apply(xp.asarray(x), xp.asarray(ids))
    expected = one_pass_each(pairs, x.reshape(-1, N), np.repeat(ids, 6)).reshape(-1, 2, 3, M)
    assert np.linalg.norm(xp.host(found) - expected) <= 1e-13 * np.linalg.norm(expected)


@pytest.mark.usefixtures("strategy")
def test_every_order_of_rows_gives_the_same_rows():
    ids = BATCHES["random"]
    x = gaussian(len(ids), N)
    served = AdapterBank.of(adapters())
    y = served.apply(x, ids)
    for seed in range(3):
        p = np.random.default_rng(seed).permutation(len(ids))
        assert np.linalg.norm(served.apply(x[p], ids[p]) - y[p]) <= 1e-14 * np.linalg.norm(y)


@pytest.mark.usefixtures("strategy")
def test_gradients_of_a_batch():
    ids = BATCHES["random"]
    pairs = adapters((3, 3, 2))
    ids = np.minimum(ids, 2)
    x = torch.tensor(gaussian(len(ids), N), requires_grad=True)
    factors = [torch.tensor(f, requires_grad=True) for p in pairs for f in (p.up, p.down)]
    batch = [Product(*factors[2 * k : 2 * k + 2], p.scale) for k, p in enumerate(pairs)]
    weight = torch.tensor(gaussian(len(ids), M, seed=9))

    def grads(y):
        return torch.autograd.grad(torch.sum(weight * y**2), [x, *factors])

    found = grads(AdapterBank.of(batch).apply(x, ids))
    chosen = [torch.as_tensor(ids == k)[:, None] for k in range(3)]
    y = sum(c * (p.scale * x @ p.down.T @ p.up.T) for c, p in zip(chosen, batch, strict=True))
    for a, b in zip(found, grads(y), strict=True):
        assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


@pytest.mark.usefixtures("strategy")
def test_half_precision_is_computed_in_single():
    pairs = [
        Product(p.up.astype(np.float16), p.down.astype(np.float16), p.scale) for p in adapters()
    ]
    ids = BATCHES["random"]
    x = gaussian(len(ids), N).astype(np.float16)
    served = AdapterBank.of(pairs)
    assert served.down.dtype == np.float16
    found = served.apply(x, ids)
    wide = [Product(p.up.astype(float), p.down.astype(float), p.scale) for p in pairs]
    expected = one_pass_each(wide, x.astype(float), ids)
    assert found.dtype == np.float16
    assert np.all(abs(found - expected) <= 2**-10 * abs(expected) + 1e-5)
    single = served.apply(x.astype(np.float32), ids)
    assert np.linalg.norm(single - expected) <= 1e-6 * np.linalg.norm(expected)
    brain = AdapterBank.of(
        [Product(*(torch.tensor(f).bfloat16() for f in (p.up, p.down)), p.scale) for p in pairs]
    )
    y = brain.apply(torch.tensor(x).bfloat16(), ids).float().numpy()
    assert np.linalg.norm(y - expected) <= 2**-6 * np.linalg.norm(expected)


QUANTIZERS = {
    "nf4": nf4,
    "nf4, scales in 8 bits": lambda a: double(nf4(a)),
    "8 bits": lambda a: int_symmetric(a, bits=8),
}


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_banks_are_banks_of_what_is_decoded(name):
    pairs = adapters(dtype=np.float32, shape=(96, 80))
    served = AdapterBank.of(pairs).map(QUANTIZERS[name])
    ids = BATCHES["random"]
    x = gaussian(len(ids), 80, dtype=np.float32)
    found = served.apply(x, ids)
    expected = one_pass_each([p for _, p in served.items()], x, ids)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    # Quantized rows of Gaussian entries: about 10 % in 4 bits, below 1 % in 8.
    error = np.linalg.norm(one_pass_each(pairs, x, ids) - found) / np.linalg.norm(expected)
    assert 1e-4 < error < (0.2 if "nf4" in name else 0.02)


def test_quantized_banks_of_every_library(xp):
    pairs = adapters(dtype=np.float32)
    ids, x = BATCHES["random"], gaussian(40, N, dtype=np.float32)
    found = AdapterBank.of(on(xp, pairs)).map(nf4).apply(xp.asarray(x), ids)
    expected = AdapterBank.of(pairs).map(nf4).apply(x, ids)
    assert np.linalg.norm(xp.host(found) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_bank_gives_its_adapters_back():
    pairs = adapters()
    names = list("abcdefg")
    served = AdapterBank.of(dict(zip(names, pairs, strict=True)))
    assert len(served) == 7
    assert served.ids(["c", None, "a"]).tolist() == [2, -1, 0]
    for (name, found), given in zip(served.items(), pairs, strict=True):
        assert found.scale == given.scale
        assert np.array_equal(found.up, given.up)
        assert np.array_equal(found.down, given.down)
        assert np.array_equal(served[name].up, found.up)
    assert np.array_equal(served[-1].up, pairs[-1].up)
    single = served.map(lambda a: a.astype(np.float32))
    assert single["b"].up.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": Product(np.ones((M, 2)), np.ones((2, N + 1)))}, "one shape, got .* of adapter b, "),
        (
            {"b": SimpleNamespace(up=np.ones((M, 2)), down=np.ones((3, N)), scale=1.0)},
            "factors of adapter b must have shapes",
        ),
        ({"b": Product(*(np.ones(s, np.float32) for s in ((M, 1), (1, N))))}, "adapter b, float32"),
        ({"b": 3.0}, "adapter b must have up, down and scale"),
        (
            {"b": RowMagnitude.create(np.ones((M, N)), 2)},
            r"adapter b must have .*, got RowMagnitude; convert it by \.to_lora\(rank\)\.form",
        ),
        ({"b": Product(torch.ones((M, 2)), torch.ones((2, N)))}, "one array library"),
    ],
)
def test_adapters_that_do_not_fit_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AdapterBank.of({"a": adapters()[0], **change})


def test_what_apply_refuses():
    served = AdapterBank.of(adapters())
    x = np.ones((3, N))
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.6, or -1 for no adapter, got 7"):
        served.apply(x, [0, 7, 1])
    with pytest.raises(ValueError, match="got -2"):
        served.apply(x, [0, -2, 1])
    with pytest.raises(ValueError, match=r"ids must have shape \(3,\)"):
        served.apply(x, [0, 1])
    with pytest.raises(TypeError, match="ids must be integers, got float64"):
        served.apply(x, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"x must have shape \(T, \.\.\., 20\), got \(3, 21\)"):
        served.apply(np.ones((3, N + 1)), [0, 1, 2])
    with pytest.raises(KeyError, match="no adapter 'z' in the bank"):
        served.ids(["z"])
    with pytest.raises(KeyError, match=r"no adapter 0 in the bank; names are strings, .* '0', '1'"):
        served.ids([0])
    with pytest.raises(TypeError, match="got '10'; pass a list of names"):
        served.ids("10")
    with pytest.raises(ValueError, match="at least one adapter"):
        AdapterBank.of([])


# --- shared bases ---


def related(count=12, ranks=(3, 2), common=4, noise=0.3, dtype=np.float64, seed=0, shape=(M, N)):
    """Adapters in a common space of dimension ``common``, of very different norms."""
    (m, n), found = shape, []
    left = gaussian(m, common, seed=seed, dtype=dtype)
    right = gaussian(common, n, seed=seed + 1, dtype=dtype)
    for k in range(count):
        r = ranks[k % len(ranks)]
        up = left @ gaussian(common, r, seed=seed + 10 + k, dtype=dtype)
        down = gaussian(r, common, seed=seed + 50 + k, dtype=dtype) @ right
        up = up + noise * gaussian(m, r, seed=seed + 90 + k, dtype=dtype)
        down = down + noise * gaussian(r, n, seed=seed + 130 + k, dtype=dtype)
        found.append(Product(up.astype(dtype), down.astype(dtype), 2.0 ** (k % 5)))
    return found


def stacked(pairs):
    return np.stack([p.scale * p.up @ p.down for p in pairs])


def unit(pairs):
    x = stacked(pairs)
    return x / np.linalg.norm(x, axis=(1, 2), keepdims=True)


SOLVERS = {
    "full": jd_full,
    "diagonal": jd_diag,
    "clustered": lambda *a, **k: jd_clustered(*a, clusters=3, **k),
}


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("name", SOLVERS)
def test_errors_are_those_of_the_adapters_that_come_back(name, dtype, xp):
    pairs = related(dtype=dtype)
    solution = SOLVERS[name](on(xp, pairs), rank=3, rng=0, stop=Stop(5))
    shared = solution.value
    x = stacked(pairs)
    back = np.stack([xp.host(shared.adapter(i).to_dense()) for i in range(len(pairs))])
    norms = np.linalg.norm(x, axis=(1, 2))
    tol = 50 * np.finfo(dtype).eps
    assert np.all(abs(np.linalg.norm(x - back, axis=(1, 2)) - shared.errors) <= tol * norms)
    assert np.all(abs(norms - shared.norms) <= tol * norms)
    assert np.isclose(shared.error, np.sqrt(np.mean((np.array(shared.errors) / norms) ** 2)))
    like = xp.asarray(pairs[0].up)
    for part in (shared.left, shared.right, shared.cores):
        assert type(part) is type(like)
        assert part.dtype == like.dtype
    rows = xp.asarray(gaussian(30, N, dtype=dtype))
    ids = np.random.default_rng(0).integers(-1, len(pairs), 30)
    y = xp.host(shared.apply(rows, ids))
    want = np.stack(
        [
            back[i] @ row if i >= 0 else 0 * back[0] @ row
            for i, row in zip(ids, xp.host(rows), strict=True)
        ]
    )
    assert np.linalg.norm(y - want) <= tol * np.linalg.norm(want)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_no_step_raises_the_error(name, normalize):
    pairs, errors = related(), []

    def seen(_step, _change, shared):
        e = np.array(shared.errors)
        errors.append(np.linalg.norm(e / np.array(shared.norms) if normalize else e))

    SOLVERS[name](pairs, rank=2, rng=1, stop=Stop(30), callback=seen, normalize=normalize)
    assert len(errors) > 1
    assert np.all(np.diff(errors) <= 1e-12 * errors[0])


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_jd_full_is_hooi_of_the_dense_stack(dtype):
    pairs, stop = related(dtype=dtype), Stop(2000, tol=1e-15)
    shared = jd_full(pairs, rank=3, stop=stop).value
    t = hooi(unit(pairs), rank=(len(pairs), 3, 3), stop=stop).value
    assert abs(np.linalg.norm(shared.relative_errors) - t.error) <= 1e-9
    back = np.stack([shared.adapter(i).to_dense() for i in range(len(pairs))])
    back /= np.array(shared.norms)[:, None, None]
    assert np.linalg.norm(back - t.to_dense()) <= 1e-5
    for basis in (shared.left[0], shared.right[0].conj().T):
        assert np.linalg.norm(basis.conj().T @ basis - np.eye(3)) <= 1e-13


def test_jd_diag_is_cp_of_the_dense_stack():
    pairs, stop = related(), Stop(3000, tol=1e-12)
    start = jd_diag(pairs, rank=3, rng=0, stop=Stop(0)).value
    shared = jd_diag(pairs, rank=3, init=start, stop=stop).value
    cores = start.cores / np.array(start.norms)[:, None]
    from_dense = cp_als(
        unit(pairs),
        rank=3,
        stop=stop,
        init=CP(np.ones(3), (cores, start.left[0], start.right[0].T)),
    ).value
    assert abs(np.linalg.norm(shared.relative_errors) - from_dense.error) <= 1e-7


def test_shared_spaces_are_found():
    """Without private parts, bases of the common dimension lose nothing."""
    pairs = related(noise=0.0)
    assert jd_full(pairs, rank=4).value.error <= 1e-13
    assert jd_full(pairs, rank=3).value.error > 1e-3
    diagonal = [
        Product(p.up[:, :2] * (k + 1.0), p.down[:2] * np.array([[1.0], [k - 4.5]]), 1.0)
        for k, p in enumerate([related()[0]] * 8)
    ]
    assert jd_diag(diagonal, rank=2, rng=0).value.error <= 1e-10


def test_shared_adapters_take_other_dtypes():
    shared = jd_full(related(), rank=3).value
    x, ids = gaussian(5, N), [0, 3, -1, 3, 1]
    half = shared.apply(x.astype(np.float32), ids)
    assert half.dtype == np.float32
    assert np.allclose(half, shared.apply(x, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"x must have shape \(T, 20\), got \(5, 21\)"):
        shared.apply(np.ones((5, N + 1)), ids)


def test_integers_are_not_rounded_to_integers():
    x, ids = np.arange(2 * N).reshape(2, N), [0, 1]
    for served in (AdapterBank.of(adapters()), jd_full(related(), rank=3).value):
        found = served.apply(x, ids)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, served.apply(x.astype(float), ids))


def test_clusters_are_found():
    groups = [related(6, common=3, noise=0.0, seed=s) for s in (0, 300, 600)]
    pairs = [p for trio in zip(*groups, strict=True) for p in trio]
    shared = jd_clustered(pairs, rank=3, clusters=3, rng=0).value
    assert shared.error <= 1e-13
    assert len(set(shared.clusters)) == 3
    assert all(c == shared.clusters[k % 3] for k, c in enumerate(shared.clusters))
    assert jd_full(pairs, rank=3).value.error > 0.1
    given = [k % 3 for k in range(len(pairs))]
    again = jd_clustered(pairs, rank=3, clusters=3, init=given, stop=Stop(1)).value
    assert again.error <= 1e-13


def test_a_cluster_each_is_a_truncated_svd_of_each():
    pairs = related(5)
    shared = jd_clustered(pairs, rank=2, clusters=5, rng=0).value
    assert sorted(shared.clusters) == list(range(5))
    for e, w in zip(shared.errors, stacked(pairs), strict=True):
        assert np.isclose(e, np.linalg.norm(np.linalg.svd(w)[1][2:]), atol=1e-10 * e + 1e-12)


def test_one_cluster_is_jd_full():
    pairs, stop = related(), Stop(500, tol=1e-14)
    one = jd_clustered(pairs, rank=3, clusters=1, rng=0, stop=stop).value
    full = jd_full(pairs, rank=3, rng=0, stop=stop).value
    assert np.allclose(one.errors, full.errors, rtol=1e-5)
    assert abs(one.error - full.error) <= 1e-9


def test_empty_clusters_are_filled():
    pairs = [related()[0]] * 4 + [related()[1]] * 4
    shared = jd_clustered(pairs, rank=3, clusters=4, init=[0, 1, 2, 3, 0, 1, 2, 3]).value
    assert set(shared.clusters) == {0, 1, 2, 3}
    assert shared.error <= 1e-13


def test_what_fits_worst_fills_an_empty_cluster():
    labels, empty = _without_empty(np.array([0, 2, 0, 0]), np.array([0.1, 0.9, 0.5, 0.2]), 3)
    # The second one is alone in its cluster and stays.
    assert labels.tolist() == [0, 2, 1, 0]
    assert empty == {1}


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_solvers_go_on_from_an_answer(name):
    pairs = related()
    whole = SOLVERS[name](pairs, rank=2, rng=0, stop=Stop(500, tol=1e-10))
    again = SOLVERS[name](pairs, rank=2, init=whole.value, stop=Stop(3, tol=1e-6))
    assert again.converged
    assert abs(again.value.error - whole.value.error) <= 1e-6


def test_norms_count_only_when_they_should():
    """One adapter far larger than the others decides the bases, unless all are normalized."""
    pairs = related(10)
    pairs[0] = Product(1e3 * gaussian(M, 2, seed=77), gaussian(2, N, seed=78), 1.0)
    alike = jd_full(pairs, rank=2).value.relative_errors
    by_norm = jd_full(pairs, rank=2, normalize=False).value.relative_errors
    assert by_norm[0] < 1e-2 < alike[0]
    assert np.mean(by_norm[1:]) > np.mean(alike[1:])
    zero = [*related(4), Product(np.zeros((M, 1)), np.zeros((1, N)))]
    assert jd_full(zero, rank=2).value.relative_errors[-1] == 0.0


def test_what_compression_refuses():
    pairs = related()
    with pytest.raises(ValueError, match=r"one shape, got .* of adapter 12, "):
        jd_full([*pairs, Product(np.ones((M, 1)), np.ones((1, N + 2)))], rank=2)
    with pytest.raises(ValueError, match="finite, got NaN or infinite entries in adapter 1"):
        jd_diag([pairs[0], Product(np.full((M, 1), np.nan), np.ones((1, N)))], rank=2)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.20 for shape 24 x 20, got 21"):
        jd_full(pairs, rank=N + 1)
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.12 for 12 adapters, got 13"):
        jd_clustered(pairs, rank=2, clusters=13)
    with pytest.raises(ValueError, match=r"init must give one of the clusters 0\.\.1 to each"):
        jd_clustered(pairs, rank=2, clusters=2, init=[0] * 12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [1e-26, 1e-18, 1e17, 1e26])
def test_adapters_of_any_size_are_compressed_alike(name, normalize, size):
    # Squares of norms like these are not numbers of single precision.
    pairs = related(dtype=np.float32, count=6)
    power = 2.0 ** round(np.log2(size) / 2)
    power = np.float32(power)
    scaled = [Product(p.up * power, p.down * power, p.scale) for p in pairs]
    options = {"rank": 3, "rng": 0, "normalize": normalize}
    one, other = (SOLVERS[name](some, **options).value for some in (pairs, scaled))
    np.testing.assert_allclose(
        np.array(other.norms), np.array(one.norms) * float(power) ** 2, rtol=1e-6
    )
    np.testing.assert_allclose(other.relative_errors, one.relative_errors, rtol=1e-3)
    for k, pair in enumerate(scaled):
        wide = pair.scale * LowRank(pair.up.astype(float), pair.down.astype(float))
        found = other.adapter(k)
        rest = wide - LowRank(found.left.astype(float), found.right.astype(float))
        assert abs(other.errors[k] - rest.norm()) <= 1e-5 * wide.norm()


def test_low_rank_updates_are_adapters_too():
    pairs = related()
    plain = [LowRank(p.scale * p.up, p.down) for p in pairs]
    assert np.allclose(jd_full(plain, rank=3).value.errors, jd_full(pairs, rank=3).value.errors)


# --- when to merge ---


def test_arithmetic_alone_decides_by_the_shape():
    for (m, n), rank in (((4096, 4096), 4), ((4096, 4096), 64), ((1024, 4096), 16)):
        tokens = merging_pays_from((m, n), rank, batch=64, flops=1e9, bandwidth=1e30)
        assert np.isclose(tokens, 2 * m * n / (m + n))


def test_work_is_what_is_counted():
    m, n, r, tokens = 7, 5, 2, 3
    switch, beside = switch_work((m, n), r, itemsize=4), factor_work((m, n), r, batch=tokens)
    # One product of m x 2r and 2r x n, added to W.
    assert switch.flops == 2 * m * n * 2 * r
    assert switch.bytes == 4 * (2 * m * n + 2 * (m * r + r * n))
    assert beside.flops == tokens * (2 * n * r + 2 * r * m)
    assert beside.bytes == 2 * ((m + n) * r + tokens * (n + 2 * r + 2 * m))
    assert switch.seconds(flops=1.0, bandwidth=1e9) == switch.flops
    assert switch.seconds(flops=1e9, bandwidth=1.0) == switch.bytes


def test_merging_pays_later_where_batches_are_large():
    at = {"flops": 3e14, "bandwidth": 3e12}
    tokens = [merging_pays_from((4096, 4096), 16, batch=b, **at) for b in (1, 8, 64, 512, 4096)]
    assert np.all(np.diff(tokens) > 0)
    with pytest.raises(ValueError, match="must be positive"):
        merging_pays_from((4096, 4096), 16, flops=0.0, bandwidth=1.0)
