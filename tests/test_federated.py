"""Laws of federated aggregation: every formula against dense means, exactness, errors, refusals."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from cases import gaussian

from lowrank_sp import LowRank
from lowrank_sp._arrays import to_host
from lowrank_sp.adapters import federated
from lowrank_sp.adapters.federated import Aggregate
from lowrank_sp.adapters.forms import Product

M, N, RANK, CLIENTS, SCALE = 24, 18, 3, 4, 2.0
WEIGHTS = [0.1, 0.2, 0.3, 0.4]
DTYPES = [np.float32, np.float64, np.complex128]


def clients(dtype=np.float64, *, frozen=None, ranks=(RANK,) * CLIENTS, spread=0.3, shape=(M, N)):
    """Adapters around a common one; ``frozen`` is the factor that all of them share."""
    found = []
    for k, r in enumerate(ranks):
        pair = []
        for part, size in (("up", (shape[0], r)), ("down", (r, shape[1]))):
            common = gaussian(*size, seed=len(part), dtype=dtype)
            own = gaussian(*size, seed=100 + 7 * k + len(part), dtype=dtype)
            pair.append(common if part == frozen else (common + spread * own).astype(dtype))
        found.append(Product(*pair, SCALE))
    return found


def on(xp, pairs):
    return [Product(xp.asarray(p.up), xp.asarray(p.down), p.scale) for p in pairs]


def dense(thing):
    if isinstance(thing, Aggregate):
        return dense(thing.update())
    if isinstance(thing, Product):
        wide = np.result_type(to_host(thing.up), np.float64)
        return thing.scale * to_host(thing.up).astype(wide) @ to_host(thing.down).astype(wide)
    wide = np.result_type(to_host(thing.left), np.float64)
    return to_host(thing.left).astype(wide) @ to_host(thing.right).astype(wide)


def ideal(pairs, weights=WEIGHTS):
    return sum(p * dense(pair) for p, pair in zip(weights, pairs, strict=True))


def mean(pairs, part, weights=WEIGHTS):
    return sum(p * getattr(pair, part) for p, pair in zip(weights, pairs, strict=True))


def best(d, rank):
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def fair(pairs, rho):
    """The normal equations of LoRA-FAIR in the form of the docstring."""
    up, down = mean(pairs, "up"), SCALE * mean(pairs, "down")
    bias = ideal(pairs) - up @ down
    gram = down @ down.conj().T
    ridge = rho * np.linalg.norm(gram, 2) * np.eye(RANK)
    return (up + bias @ down.conj().T @ np.linalg.inv(gram + ridge)) @ down


#: Method, what the clients share, and the update that the clients get, in dense algebra.
METHODS = {
    "fedit": (federated.fedit, None, lambda c: SCALE * mean(c, "up") @ mean(c, "down")),
    "flora": (federated.flora, None, ideal),
    "fedex": (federated.fedex, None, ideal),
    "fedex of rank 2": (
        lambda c, p: federated.fedex(c, p, rank=2, rng=0),
        None,
        lambda c: (
            (average := SCALE * mean(c, "up") @ mean(c, "down")) + best(ideal(c) - average, 2)
        ),
    ),
    "ffa": (federated.ffa, "down", ideal),
    "rolora, odd": (lambda c, p: federated.rolora(c, p, frozen="down"), "down", ideal),
    "rolora, even": (lambda c, p: federated.rolora(c, p, frozen="up"), "up", ideal),
    "flexlora": (
        lambda c, p: federated.flexlora(c, p, rng=0)[1],
        None,
        lambda c: best(ideal(c), RANK),
    ),
    "lora_fair": (federated.lora_fair, None, lambda c: fair(c, 0.01)),
    "lora_fair, rho 0": (
        lambda c, p: federated.lora_fair(c, p, regularization=0.0),
        None,
        lambda c: fair(c, 0.0),
    ),
    "flora_na": (
        lambda c, p: federated.flora_na(c, p, rng=0),
        None,
        lambda c: best(ideal(c), RANK),
    ),
}
EXACT = ["flora", "fedex", "ffa", "rolora, odd", "rolora, even"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_the_formula_and_its_error_are_those_of_dense_matrices(name, dtype, xp):
    method, frozen, formula = METHODS[name]
    pairs = clients(dtype, frozen=frozen)
    aggregate = method(on(xp, pairs), WEIGHTS)
    exact = clients(np.complex128 if np.iscomplexobj(pairs[0].up) else np.float64, frozen=frozen)
    exact = [
        Product(p.up.astype(e.up.dtype), p.down.astype(e.up.dtype), SCALE)
        for p, e in zip(pairs, exact, strict=True)
    ]
    size = np.linalg.norm(ideal(exact))
    tol = 100 * np.finfo(dtype).eps * size
    got = dense(aggregate)
    assert np.linalg.norm(got - formula(exact)) <= tol
    assert abs(aggregate.error - np.linalg.norm(got - ideal(exact))) <= tol
    assert isinstance(aggregate.error, float)
    parts = [aggregate.correction and aggregate.correction.left]
    parts += [aggregate.adapter and aggregate.adapter.up]
    for part in parts:
        if part is not None:
            like = xp.asarray(pairs[0].up)
            assert type(part) is type(like)
            assert part.dtype == like.dtype


@pytest.mark.parametrize("name", METHODS)
def test_which_methods_are_exact(name):
    method, frozen, _ = METHODS[name]
    aggregate = method(clients(frozen=frozen), WEIGHTS)
    size = np.linalg.norm(ideal(clients(frozen=frozen)))
    if name in EXACT:
        assert aggregate.error == 0.0
    else:
        assert aggregate.error > 1e-2 * size


def test_errors_are_ordered():
    """Of adapters of one rank: least of all, least for the mean of ``down``, the mean of both."""
    pairs = clients()
    errors = [
        federated.flora_na(pairs, WEIGHTS).error,
        federated.lora_fair(pairs, WEIGHTS, regularization=0.0).error,
        federated.lora_fair(pairs, WEIGHTS).error,
        federated.lora_fair(pairs, WEIGHTS, regularization=100.0).error,
        federated.fedit(pairs, WEIGHTS).error,
    ]
    assert np.all(np.diff(errors) > 0)
    # The error is first stationary in rho at 0, where the least is.
    assert errors[2] - errors[1] < 1e-2 * errors[1]


@pytest.mark.parametrize("name", METHODS)
def test_equal_clients_agree_with_one(name):
    method, _, _ = METHODS[name]
    one = clients()[:1] * CLIENTS
    aggregate = method(one, WEIGHTS)
    tol = 100 * np.finfo(float).eps * np.linalg.norm(dense(one[0]))
    assert aggregate.error <= tol
    # What LoRA-FAIR fits is the bias, of which there is none here.
    assert np.linalg.norm(dense(aggregate) - dense(one[0])) <= tol


def test_equal_weights_are_the_default():
    pairs = clients()
    assert np.allclose(
        dense(federated.flora(pairs)), ideal(pairs, [1 / CLIENTS] * CLIENTS), rtol=1e-13
    )


def test_ranks_and_scales_of_clients_may_differ():
    ranks = (1, 2, 4, 5)
    pairs = [
        Product(p.up, p.down, scale)
        for p, scale in zip(clients(ranks=ranks), (1.0, 2.0, -0.5, 4.0), strict=True)
    ]
    want = ideal(pairs)
    size = np.linalg.norm(want)
    assert np.linalg.norm(dense(federated.flora(pairs, WEIGHTS)) - want) <= 1e-13 * size
    for pair, found in zip(pairs, federated.flexlora(pairs, WEIGHTS), strict=True):
        assert (found.adapter.rank, found.adapter.scale) == (pair.rank, pair.scale)
        assert np.linalg.norm(dense(found) - best(want, pair.rank)) <= 1e-12 * size
        grams = found.adapter.up.T @ found.adapter.up, found.adapter.down @ found.adapter.down.T
        assert np.allclose(*grams, atol=1e-12 * size)
    wide = federated.flora_na(pairs, WEIGHTS)
    assert wide.adapter.rank == 5
    given = federated.flexlora(pairs, WEIGHTS, ranks=[2, 2, 12, 1])
    assert [a.adapter.rank for a in given] == [2, 2, 12, 1]
    assert given[2].error <= 1e-12 * size
    assert federated.flora_na(pairs, WEIGHTS, rank=12).error <= 1e-12 * size


@pytest.mark.parametrize("count", [20, 60])
def test_many_clients_are_compressed_by_a_krylov_space(count):
    """Fewer terms than columns, and more, so that triangular factors would be as large as D*."""
    pairs = clients(ranks=(2,) * count, shape=(90, 80))
    p = [1 / count] * count
    want = ideal(pairs, p)
    aggregate = federated.flora_na(pairs, rank=3, rng=0)
    least = np.linalg.norm(want - best(want, 3))
    assert abs(aggregate.error - np.linalg.norm(want - dense(aggregate))) <= 1e-12 * least
    # The residual of the triplets is 4 sqrt(eps); its square is what it costs.
    assert aggregate.error <= (1 + 1e-12) * least
    again = federated.flora_na(pairs, rank=3, rng=0)
    assert np.array_equal(aggregate.adapter.up, again.adapter.up)
    bias = want - SCALE * mean(pairs, "up", p) @ mean(pairs, "down", p)
    assert np.isclose(federated.fedit(pairs).error, np.linalg.norm(bias), rtol=1e-12)


def test_errors_of_few_clients_of_a_large_layer():
    """Few terms beside the sizes: by triangular factors, which keep the digits of small errors."""
    for spread in (0.3, 1e-7):
        pairs = clients(spread=spread, shape=(200, 180))
        aggregate = federated.fedit(pairs, WEIGHTS)
        up, down = mean(pairs, "up"), mean(pairs, "down")
        parts = zip(pairs, WEIGHTS, strict=True)
        bias = sum(w * SCALE * (p.up - up) @ (p.down - down) for p, w in parts)
        assert np.isclose(aggregate.error, np.linalg.norm(bias), rtol=1e-6)


def test_half_precision_is_computed_in_single():
    pairs = [Product(p.up.astype(np.float16), p.down.astype(np.float16), SCALE) for p in clients()]
    aggregate = federated.fedit(pairs, WEIGHTS)
    assert aggregate.adapter.up.dtype == np.float32
    assert np.isclose(aggregate.error, np.linalg.norm(dense(aggregate) - ideal(pairs)), rtol=1e-5)


def test_lora_fair_of_a_factor_without_full_rank():
    pairs = clients()
    pairs = [Product(p.up, p.down * np.array([[1.0], [1.0], [0.0]]), SCALE) for p in pairs]
    aggregate = federated.lora_fair(pairs, WEIGHTS, regularization=0.0)
    down = mean(pairs, "down")
    fitted = ideal(pairs) @ np.linalg.pinv(down) @ down
    assert np.linalg.norm(dense(aggregate) - fitted) <= 1e-12 * np.linalg.norm(fitted)


def test_weights_are_divided_by_their_sum():
    pairs, rough = clients(), [0.1, 0.2, 0.3, 0.4 + 9e-7]
    exact = ideal(pairs, [p / sum(rough) for p in rough])
    for aggregate in (federated.fedit(pairs, rough), federated.fedex(pairs, rough)):
        error = np.linalg.norm(exact - dense(aggregate))
        assert abs(aggregate.error - error) <= 1e-12 * np.linalg.norm(exact)


def test_lora_fair_of_tiny_factors():
    pairs = clients(np.float32)
    tiny = [Product(p.up, np.float32(1e-25) * p.down, p.scale) for p in pairs]
    known, found = (federated.lora_fair(x, WEIGHTS) for x in (pairs, tiny))
    np.testing.assert_allclose(found.adapter.up, known.adapter.up, rtol=1e-4, atol=1e-5)


def test_frozen_factors_are_handed_back_as_they_are():
    pairs = clients(frozen="down")
    assert federated.ffa(pairs, WEIGHTS).adapter.down is pairs[0].down


def test_anything_with_two_factors_is_an_adapter():
    pairs = clients()
    plain = [LowRank(SCALE * p.up, p.down) for p in pairs]
    assert np.allclose(dense(federated.flora(plain)), dense(federated.flora(pairs)), rtol=1e-13)
    with pytest.raises(TypeError, match="client 0 must have up, down and scale"):
        federated.fedit([np.ones((2, 2))])


def test_a_hundred_clients_need_no_array_of_the_size_of_the_weight():
    m = n = 1500
    rng = np.random.default_rng(0)
    pairs = [
        Product(*(rng.standard_normal(s, dtype=np.float32) for s in ((m, 1), (1, n))))
        for _ in range(100)
    ]
    tracemalloc.start()
    for method in (federated.fedit, federated.flora, federated.fedex, federated.flora_na):
        method(pairs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factors = 100 * (m + n) * 4
    assert peak < 5 * factors < m * n * 4


def changed(k, **parts):
    pairs = clients()
    old = pairs[k]
    # Not a product, which would refuse factors that do not fit itself.
    pairs[k] = SimpleNamespace(
        **{name: parts.get(name, getattr(old, name)) for name in ("up", "down", "scale")}
    )
    return pairs


REFUSED = {
    "shape": (changed(2, up=np.ones((M + 1, RANK))), WEIGHTS, "one shape, .* of client 2, "),
    "rank": (clients(ranks=(3, 3, 2, 3)), WEIGHTS, "one rank, got 3 and, of client 2, 2"),
    "scale": (changed(1, scale=1.0), WEIGHTS, "one scale, got 2.0 and, of client 1, 1.0"),
    "scale 0": (changed(1, scale=0.0), WEIGHTS, "one scale"),
    "dtype": (
        changed(3, up=np.ones((M, RANK), np.float32)),
        WEIGHTS,
        "of client 3 must have one dtype",
    ),
    "factors": (changed(1, up=np.ones((M, 2))), WEIGHTS, "factors of client 1 must have shapes"),
    "nan": (changed(1, up=np.full((M, RANK), np.nan)), WEIGHTS, "client 1 must be finite"),
    "sum": (clients(), [1.0, 1, 1, 1], "sum to 1, got 4; divide them by their sum"),
    "sign": (clients(), [1.2, -0.2, 0, 0], "not negative, got -0.2"),
    "count": (clients(), [0.5, 0.5], "one per client, got 2 for 4"),
    "none": ([], None, "at least one client"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    pairs, weights, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        federated.fedit(pairs, weights)


def test_more_that_is_refused():
    pairs = clients()
    with pytest.raises(ValueError, match="down must be frozen, but that of client 1 differs"):
        federated.ffa(pairs, WEIGHTS)
    with pytest.raises(ValueError, match="frozen must be 'up' or 'down', got 'both'"):
        federated.rolora(pairs, WEIGHTS, frozen="both")
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.12"):
        federated.fedex(pairs, WEIGHTS, rank=13)
    with pytest.raises(ValueError, match="one per client, got 1 for 4"):
        federated.flexlora(pairs, WEIGHTS, ranks=[3])
    with pytest.raises(ValueError, match="regularization must be finite"):
        federated.lora_fair(pairs, WEIGHTS, regularization=-1.0)
    with pytest.raises(ValueError, match="scales must be finite and not 0"):
        federated.flora([Product(p.up, p.down, 0.0) for p in pairs])
