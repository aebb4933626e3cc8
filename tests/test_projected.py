"""Rules on full weights and on factorized ones, against dense computations in double precision."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from update_cases import gradients

from lowrank_sp.adapters import int_symmetric
from lowrank_sp.linalg.krylov import block_krylov
from lowrank_sp.operators import as_operator
from lowrank_sp.updates import (
    APOLLO,
    LORO,
    Adam,
    AdamW,
    APOLLOMini,
    Displacement,
    Every,
    Fira,
    GaLore,
    Gauge,
    GradientDescent,
    Growing,
    Integers,
    Lazy,
    LoQT,
    Momentum,
    Plain,
    QGaLore,
    conformance,
    jagged_cosine,
    leading_subspace,
    low_rank_plus_sparse,
    low_rank_plus_sparse_gradients,
    merge_and_restart,
    random_support,
    split_quantized,
)
from lowrank_sp.updates.integers import uniform_at
from lowrank_sp.updates.projector import overlap, sketch

EPS = np.finfo(np.float64).eps
PLAIN = Plain()


def grid(w):
    """A coarse quantizer, for arrays of any library."""
    return (w * 4 + 0.5) // 1 / 4


RULES = {
    "GaLore": GaLore(rank=3, lr=0.05, scale=1.0, when=Every(3)),
    "GaLore, as published": GaLore(rank=3, lr=0.05, transport=False, when=Every(3)),
    "GaLore, momentum": GaLore(rank=3, lr=0.01, moments=Momentum(0.8), when=Every(3)),
    "GaLore, plain": GaLore(rank=3, lr=0.1, moments=PLAIN, weight_decay=0.1, when=Every(3)),
    "Lazy": GaLore(rank=3, lr=0.05, when=Lazy(2, similarity=0.1, patience=1)),
    "Q-GaLore": QGaLore(rank=3, lr=0.05, when=Lazy(2, similarity=0.1, patience=1)),
    "Lotus": GaLore(rank=3, lr=0.05, when=Displacement(2, least=0.9)),
    "Fira": Fira(rank=3, lr=0.05, when=Every(3)),
    "APOLLO": APOLLO(rank=3, lr=0.05, when=Every(3)),
    "APOLLO-Mini": APOLLOMini(lr=0.05, scale=1.0, when=Every(3)),
    "LoQT": LoQT(rank=3, lr=0.05, when=Growing(2, 1.5)),
    "LoQT, quantized": LoQT(rank=3, lr=0.05, when=Growing(2, 1.5), quantize=grid),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
shapes = pytest.mark.parametrize("shape", [(7, 10), (10, 7), (8, 8)], ids=str)


def draw(*shape, seed=0, complex_=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if complex_ else x


def spectrum(s, shape=(120, 200), seed=0, dtype=np.float64):
    """A matrix with given singular values, and its left singular vectors."""
    m, n = shape
    complex_ = np.issubdtype(dtype, np.complexfloating)
    u, _ = np.linalg.qr(draw(m, m, seed=seed, complex_=complex_))
    v, _ = np.linalg.qr(draw(n, m, seed=seed + 1, complex_=complex_))
    return ((u * s) @ v.conj().T).astype(dtype), u


def sine(basis, truth):
    """Sine of the largest angle between two subspaces of one dimension."""
    basis, _ = np.linalg.qr(basis.astype(np.result_type(basis, np.float64)))
    return np.linalg.norm(basis - truth @ (truth.conj().T @ basis), 2)


J = np.arange(1, 121)
SPECTRA = {
    "1/j": 1.0 / J,
    "step": np.where(J <= 6, 1.0, 0.3),
    "small gap": np.where(J <= 6, J**-0.5, 0.9 * J**-0.5),
    "steep": np.where(J <= 6, 10.0 ** -((J - 1.0) / 2), 10.0**-3.5 / J),
    "rank 6": np.where(J <= 6, 1.0, 0.0),
    "far apart": np.where(J <= 3, 1e6 / J, 1 / J),
}


# The subspace


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128], ids=lambda t: t.__name__)
def test_leading_subspace_is_within_its_bound(name, dtype):
    a, u = spectrum(SPECTRA[name], dtype=dtype)
    found = leading_subspace(a, 6, rng=0)
    eye = found.basis.conj().T @ found.basis
    assert found.basis.dtype == dtype
    assert np.linalg.norm(eye - np.eye(6)) <= 100 * np.finfo(dtype).eps
    if name == "far apart" and dtype == np.float32:
        # The sixth value is rounding of the first, and the bound says so.
        assert found.angle == 1.0
        return
    assert sine(found.basis, u[:, :6]) <= found.angle <= 1e-2
    # The matrix of the next step: the subspace has turned a little.
    turned, _ = np.linalg.qr(u + 1e-2 * draw(120, 120, seed=5))
    b = (turned @ u.conj().T @ a).astype(dtype)
    warm = leading_subspace(b, 6, init=found.basis, rng=0)
    assert sine(warm.basis, turned[:, :6]) <= warm.angle <= 1e-2
    assert warm.reads <= found.reads


def test_a_right_start_costs_fewer_reads():
    a, u = spectrum(SPECTRA["small gap"], (120, 200))
    cold, warm = (leading_subspace(a, 6, init=x, rng=0) for x in (None, u[:, :6]))
    assert warm.reads <= cold.reads / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("shape", "rank"), [((57, 5), 1), ((41, 29), 4), ((46, 16), 16)])
def test_a_start_outside_of_the_range_is_left(shape, rank, dtype):
    left, right = (np.linalg.qr(draw(k, shape[1], seed=k))[0] for k in shape)
    a = ((left * 2.0 ** -np.arange(shape[1])) @ right.T).astype(dtype)
    start = np.linalg.qr(draw(shape[0], rank, seed=3))[0].astype(dtype)
    found = leading_subspace(a, rank, init=start, rng=0)
    slack = 10 * np.finfo(dtype).eps * 2.0**rank
    assert sine(found.basis, left[:, :rank]) <= found.angle + slack
    assert found.angle <= 1e-2 or rank == 16
    again = leading_subspace(a, rank, init=found.basis, rng=0)
    assert again.reads <= found.reads


def test_without_a_gap_no_angle_is_claimed():
    a, _ = spectrum(np.ones(120))
    found = leading_subspace(a, 6, rng=0)
    assert found.angle == 1.0
    # Any subspace is leading: its energy is what counts.
    assert abs(np.linalg.norm(found.basis.T @ a) ** 2 - 6) <= 1e-6


def test_subspace_on_every_library(xp):
    a, u = spectrum(SPECTRA["1/j"])
    found = leading_subspace(xp.asarray(a), 4, init=xp.asarray(np.array(u[:, :4])), rng=0)
    assert type(found.basis) is type(xp.asarray(a))
    assert sine(xp.host(found.basis), u[:, :4]) <= found.angle <= 1e-2


def test_subspace_of_a_rank_deficient_matrix_keeps_old_directions():
    a, u = spectrum(np.where(J <= 2, 1.0, 0.0))
    old = np.linalg.qr(draw(120, 4, seed=9))[0]
    found = leading_subspace(a, 4, init=old, rng=0)
    assert np.linalg.norm(found.basis.T @ found.basis - np.eye(4)) <= 100 * EPS
    assert np.linalg.norm(found.basis[:, :2] - u[:, :2] @ (u[:, :2].T @ found.basis[:, :2])) < 1e-6


def test_subspace_of_zero_and_of_bad_matrices():
    old = np.linalg.qr(draw(12, 3))[0]
    found = leading_subspace(np.zeros((12, 20)), 3, init=old, rng=0)
    assert found.zero
    assert found.basis is old
    found = leading_subspace(np.zeros((12, 20)), 3, rng=0)
    assert found.zero
    assert np.array_equal(found.basis, np.zeros((12, 3)))
    with pytest.raises(ValueError, match=r"must be finite"):
        leading_subspace(np.full((12, 20), np.nan), 3, rng=0)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.12 for shape 12 x 20, got 13"):
        leading_subspace(np.ones((12, 20)), 13)


def test_block_krylov_from_a_start():
    a = spectrum(SPECTRA["small gap"])[0].T
    operator, v = as_operator(a), np.linalg.svd(a)[2][:6].T
    options = {"tol": 1e-6, "width": 10}
    cold = block_krylov(operator, lambda _: 6, rng=np.random.default_rng(0), **options)
    warm = block_krylov(operator, lambda _: 6, rng=np.random.default_rng(0), init=v, **options)
    assert warm.reads < cold.reads
    for found in (cold, warm):
        assert found.converged
        assert np.all(abs(found.svd.s - SPECTRA["small gap"][:6]) <= found.svd.bounds)
    # What a start does not see is found beside it.
    beside = np.linalg.svd(a)[2][50:56].T
    found = block_krylov(
        operator, lambda _: 6, rng=np.random.default_rng(0), init=beside, **options
    )
    assert found.converged
    assert np.all(abs(found.svd.s - SPECTRA["small gap"][:6]) <= found.svd.bounds)
    with pytest.raises(ValueError, match="shorter side"):
        block_krylov(as_operator(a.T), lambda _: 6, rng=np.random.default_rng(0), init=v, **options)


# Moments that turn


def test_transport_is_the_identity_where_the_basis_stays(xp):
    state = Adam().init(xp.asarray(draw(3, 5)))
    _, state = Adam().turn(xp.asarray(draw(3, 5)), state, xp.asarray(np.asarray(1)))
    same = Adam().transport(state, xp.asarray(np.eye(3)))
    for name, x in state.items():
        assert np.array_equal(xp.host(same[name]), xp.host(x))
    assert Plain().transport({}, xp.asarray(np.eye(3))) == {}


@pytest.mark.parametrize("complex_", [False, True])
def test_transport_by_a_rotation_keeps_norms(complex_):
    turn, _ = np.linalg.qr(draw(3, 3, complex_=complex_))
    state = {"mean": draw(3, 5, seed=1, complex_=complex_), "square": draw(3, 5, seed=2) ** 2}
    new = Adam().transport(state, turn)
    for column in range(5):
        before, after = state["mean"][:, column], new["mean"][:, column]
        assert abs(np.linalg.norm(after) / np.linalg.norm(before) - 1) <= 10 * EPS
    sums = new["square"].sum(axis=0) / state["square"].sum(axis=0)
    assert np.all(abs(sums - 1) <= 10 * EPS)
    assert np.array_equal(Momentum().transport({"mean": state["mean"]}, turn)["mean"], new["mean"])
    # In the space of the weight nothing has moved.
    basis, _ = np.linalg.qr(draw(8, 3, seed=3, complex_=complex_))
    turned = basis @ turn.conj().T
    assert np.linalg.norm(turned @ new["mean"] - basis @ state["mean"]) <= 100 * EPS
    assert abs(overlap(turned.conj().T @ basis) - 1) <= 10 * EPS


# The formulas, dense


def basis_of(state):
    """What a state keeps of the basis."""
    return {name: x for name, x in state.items() if name.startswith("basis")}


def on_grid(rule, w):
    """A weight as the rule keeps it."""
    return rule.weights.round(w.T).T if isinstance(rule, QGaLore) and len(w) < len(w.T) else w


def target_of(shape, seed=0, complex_=False):
    return draw(*shape, seed=seed, complex_=complex_)


def run(rule, target, steps=8, lr=None, index=0, count=1, weight=None):
    """Weights after each step on ``||W - target||^2 / 2`` from zero, and the last state."""
    weight = 0 * target if weight is None else weight
    state, path = rule.init(weight, index=index, count=count), []
    for _ in range(steps):
        weight, state = rule.step(weight, weight - target, state, lr=lr)
        path.append(weight)
    return path, state


class NaiveAdam:
    def __init__(self, shape):
        self.mean, self.square, self.step = np.zeros(shape), np.zeros(shape), 0

    def __call__(self, r):
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * r
        self.square = 0.999 * self.square + 0.001 * abs(r) ** 2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        return mean / (np.sqrt(square) + 1e-8)


def naive(rule, target, steps, basis_of):
    """The rules by their formulas with dense arrays; ``basis_of(g, k)`` is their subspace."""
    left = target.shape[0] < target.shape[1]
    target = target if left else target.conj().T
    w, basis, last, path = 0 * target, None, 0.0, []
    adam = NaiveAdam((rule.rank, target.shape[1]))
    for k in range(steps):
        g = w - target
        if k % 3 == 0:
            old, basis = basis, basis_of(g, k // 3)
            if old is not None and getattr(rule, "transport", False):
                turn = basis.conj().T @ old
                adam.mean, adam.square = turn @ adam.mean, abs(turn) ** 2 @ adam.square
        r = basis.conj().T @ g
        psi = adam(r)
        axis = (0, 1) if type(rule) is APOLLOMini else 0
        norms = [np.sqrt(np.sum(abs(x) ** 2, axis=axis, keepdims=True)) for x in (psi, r)]
        phi = norms[0] / (norms[1] + 1e-8)
        step = basis @ psi
        if not isinstance(rule, GaLore) or isinstance(rule, Fira):
            extra = (g - basis @ r if isinstance(rule, Fira) else g) * phi
            norm = np.linalg.norm(extra)
            if last and norm > 1.01 * last:
                extra, norm = extra * 1.01 * last / norm, 1.01 * last
            last = norm
            step = extra + step if isinstance(rule, Fira) else extra
        w = (1 - rule.lr * rule.weight_decay) * w - rule.lr * rule.scale * step
        path.append(w if left else w.conj().T)
    return path


def close(path, other, tol):
    return all(
        np.linalg.norm(x - y) <= tol * np.linalg.norm(y) for x, y in zip(path, other, strict=True)
    )


def signed(u):
    """Columns with their largest entry positive, as the library has them."""
    entry = np.take_along_axis(u, abs(u).argmax(axis=0)[None], axis=0)
    return u * (abs(entry) / entry)


@shapes
@pytest.mark.parametrize("name", ["GaLore", "GaLore, as published", "Fira"])
@pytest.mark.parametrize("complex_", [False, True])
def test_leading_subspace_rules_are_their_formulas(name, shape, complex_):
    # So small that the subspace is exact.
    rule = dataclasses.replace(RULES[name], tol=1e-9, weight_decay=0.1)
    target = target_of(shape, complex_=complex_)
    expected = naive(rule, target, 8, lambda g, _: signed(np.linalg.svd(g)[0][:, :3]))
    path, state = run(rule, target)
    assert close(path, expected, 1e-6)
    assert int(state["renewals"]) == 3
    assert state["angle"] <= 1e-9


@shapes
@pytest.mark.parametrize("name", ["APOLLO", "APOLLO-Mini"])
def test_sketched_rules_are_their_formulas(name, shape):
    rule = RULES[name]

    def basis(g, k):
        gaussian = np.random.default_rng([0, 5, k]).standard_normal((g.shape[0], rule.rank))
        return gaussian / np.sqrt(rule.rank)

    path, _ = run(rule, target_of(shape), index=5, count=6)
    # Its renewals come earlier by five sixths of the interval.
    early = run(dataclasses.replace(rule, when=Every(3)), target_of(shape), index=5, count=5000)
    assert close(early[0], naive(rule, target_of(shape), 8, basis), 1e3 * EPS)
    assert not np.array_equal(path[-1], early[0][-1])


def test_a_sketch_follows_from_its_seed(xp):
    w = draw(7, 10)
    rule = APOLLO(rank=3, seed=4)
    _, state = rule.step(xp.asarray(w), xp.asarray(w), rule.init(xp.asarray(w), index=2, count=9))
    expected = sketch(w, 3, rng=np.random.default_rng([4, 2, 0]))
    assert np.linalg.norm(xp.host(state["basis"]) - expected) <= EPS * np.linalg.norm(expected)
    _, other = rule.step(w, w, rule.init(w, index=3, count=9))
    assert not np.array_equal(other["basis"], expected)
    # Lengths are kept on average.
    many = np.array([np.linalg.norm(sketch(w, 3, rng=k).T @ w) ** 2 for k in range(400)])
    assert abs(many.mean() / np.linalg.norm(w) ** 2 - 1) <= 5 * many.std() / many.mean() / 20


@shapes
def test_full_rank_galore_is_adam_in_a_rotated_basis(shape):
    target = target_of(shape)
    rule = GaLore(rank=min(shape), lr=0.05, scale=1.0, when=Every(100))
    path, state = run(rule, target)
    basis = state["basis"]
    side = min(shape)
    assert np.linalg.norm(basis @ basis.T - np.eye(side)) <= 100 * EPS
    left = shape[0] < shape[1]
    w, adam, expected = 0 * target, NaiveAdam((side, max(shape))), []
    for _ in range(8):
        g = (w - target) if left else (w - target).T
        step = basis @ adam(basis.T @ g)
        w = w - 0.05 * (step if left else step.T)
        expected.append(w)
    assert close(path, expected, 1e4 * EPS)


@shapes
def test_full_rank_and_linear_moments_see_no_basis(shape):
    """Heavy ball in subspaces that turn is heavy ball, for moments turn with them."""
    target, weights = target_of(shape), 1 + draw(*shape, seed=1) ** 2
    rule = GaLore(rank=min(shape), lr=0.05, scale=1.0, moments=Momentum(0.5), when=Every(2))
    published = dataclasses.replace(rule, transport=False)
    paths = []
    for r in (rule, published):
        w, state, path = 0 * target, r.init(target), []
        for _ in range(8):
            w, state = r.step(w, weights * (w - target), state)
            path.append(w)
        paths.append(path)
    w, mean, expected = 0 * target, 0 * target, []
    for _ in range(8):
        mean = 0.5 * mean + weights * (w - target)
        w = w - 0.05 * mean
        expected.append(w)
    assert close(paths[0], expected, 1e4 * EPS)
    # Old means point elsewhere when the singular vectors have changed.
    assert not close(paths[1], expected, 1e-6)


@shapes
@pytest.mark.parametrize("kind", [Fira, APOLLO, APOLLOMini])
def test_without_moments_what_is_left_out_is_put_back(kind, shape):
    """Then every gain is one, and the rule is gradient descent, up to the limit on growth."""
    target = target_of(shape)
    options = {} if kind is APOLLOMini else {"rank": 3}
    rule = kind(lr=0.1, scale=1.0, moments=PLAIN, growth=1e9, **options)
    expected = [(1 - 0.9 ** (k + 1)) * target for k in range(8)]
    # The gain is ||x|| / (||x|| + 1e-8).
    assert close(run(rule, target)[0], expected, 1e-6)


def test_growth_of_the_residual_is_limited():
    rule = Fira(rank=2, lr=1.0, scale=1.0, moments=PLAIN, when=Every(100))
    w = np.zeros((6, 9))
    state = rule.init(w)
    sizes = []
    for k in range(5):
        g = (10.0**k) * draw(6, 9, seed=k)
        new, state = rule.step(w, g, state)
        basis = state["basis"]
        sizes.append(np.linalg.norm(new - basis @ (basis.T @ new)))
        assert abs(sizes[-1] / state["norm"] - 1) <= 1e-12
    assert np.all(abs(np.diff(np.log(sizes)) - np.log(1.01)) <= 1e-10)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7)], ids=str)
def test_quantized_cycle(shape):
    """What a renewal changes is the rounding out of the subspace, and nothing without rounding."""
    w, g = draw(*shape), draw(*shape, seed=1)
    exact, rounded = RULES["LoQT"], RULES["LoQT, quantized"]
    state = exact.init(w)
    same, _ = exact.renew(w, exact.choose(g, state), state)
    assert same is w
    identity = dataclasses.replace(exact, quantize=lambda x: x)
    state = identity.init(w)
    same, state = identity.renew(w, identity.choose(g, state), state)
    assert np.array_equal(same, w)
    assert state["error"] == 0
    state = rounded.init(w)
    new, state = rounded.renew(w, rounded.choose(g, state), state)
    basis, left = state["basis"], shape[0] < shape[1]
    gone = w - grid(w)
    gone = gone - (basis @ (basis.T @ gone) if left else gone @ basis @ basis.T)
    assert np.linalg.norm(new - (w - gone)) <= 100 * EPS
    assert abs(state["error"] - np.linalg.norm(gone) / np.linalg.norm(w)) <= 100 * EPS
    base, factor = split_quantized(new, basis, grid)
    assert np.array_equal(base, grid(new))
    assert factor.shape == (3, 10)
    # At full rank the factor makes up for all of it.
    full = dataclasses.replace(rounded, rank=7)
    state = full.init(w)
    new, state = full.renew(w, full.choose(g, state), state)
    assert np.linalg.norm(new - w) <= 100 * EPS


# Integers of a few bits


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_integers_are_those_of_the_quantizer(bits, block, xp):
    x = draw(6, 15)
    x[1, :] = 0.0
    kept = Integers(bits, block).encode(xp.asarray(x))
    quantized = int_symmetric(x, bits, block=block)
    found = xp.host(Integers(bits, block).decode(kept, 15))
    # XLA multiplies by the reciprocal of a constant.
    np.testing.assert_allclose(found, quantized.to_dense(), rtol=2 * EPS)
    assert np.array_equal(xp.host(kept["scales"]), quantized.scales)
    if 15 % block == 0:
        assert np.array_equal(xp.host(kept["codes"]), quantized.codes)
    # What is on the grid stays there.
    again = Integers(bits, block).encode(xp.asarray(found))
    assert np.array_equal(xp.host(again["codes"]), xp.host(kept["codes"]))
    np.testing.assert_allclose(xp.host(again["scales"]), quantized.scales, rtol=2 * EPS)


def test_integers_of_a_stack_are_those_of_each(xp):
    x = draw(2, 3, 5, 10)
    kept = Integers(4, 4).encode(xp.asarray(x))
    for i in np.ndindex(2, 3):
        one = Integers(4, 4).encode(x[i])
        assert all(np.array_equal(xp.host(kept[name])[i], one[name]) for name in one)


def test_rounding_by_noise_is_right_on_average():
    x, kind = draw(8, 30), Integers(3, 10)
    step = np.repeat(np.max(abs(x.reshape(8, 3, 10)), axis=-1) / 3, 10, axis=-1)
    draws = [kind.round(x, noise=uniform_at(x.shape, k, like=x)) for k in range(4000)]
    assert all(np.max(abs(y - x) / step) < 1 for y in draws)
    # Five standard deviations of a mean of roundings, which are at most half a step.
    assert np.max(abs(np.mean(draws, axis=0) - x) / step) < 5 * 0.5 / 4000**0.5
    assert np.max(abs(kind.round(x) - x) / step) > 0.4
    with pytest.raises(TypeError, match="real entries"):
        kind.encode(x + 0j)


def test_noise_is_uniform_and_follows_from_its_keys(xp):
    like = xp.asarray(np.zeros((1, 1)))
    keys = xp.asarray(np.arange(6, dtype=np.int32))
    found = xp.host(uniform_at((120, 90), 7, keys, like=like))
    assert found.shape == (6, 120, 90)
    for k in range(6):
        one = uniform_at((120, 90), 7, np.int32(k), like=np.zeros(1))
        assert np.array_equal(one, found[k])
    # Moments of the uniform distribution, and no correlation with neighbours in any direction.
    u, count = found - 0.5, found.size
    assert abs(np.mean(u)) < 5 / (12 * count) ** 0.5
    assert abs(np.mean(u**2) - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    for axis in range(3):
        assert abs(np.mean(u * np.roll(u, 1, axis=axis))) < 5 / 12 / count**0.5
    counts = np.histogram(found, 64, (0, 1))[0]
    assert np.sum((counts - count / 64) ** 2) / (count / 64) < 64 + 5 * (2 * 64) ** 0.5
    assert not np.array_equal(uniform_at((4, 4), 7, like=u), uniform_at((4, 4), 8, like=u))


@pytest.mark.parametrize("shape", [(7, 10), (10, 7)], ids=str)
def test_quantized_galore_is_its_formula(shape):
    """GaLore on the rounded basis, dense, and every weight one of the two neighbours on a grid."""
    rule = QGaLore(rank=3, lr=0.05, scale=1.0, when=Every(3))
    target, left = draw(*shape), shape[0] < shape[1]
    w, state = np.zeros(shape), rule.init(np.zeros(shape))
    adam, last = NaiveAdam((3, 10)), None
    for k in range(8):
        g = w - target if left else (w - target).T
        new, state = rule.step(w, w - target, state)
        basis = int_decoded(state["basis_codes"], state["basis_scales"], 7, 3)
        exact = np.linalg.svd(g)[0][:, :3] if k % 3 == 0 else None
        if exact is not None:
            aligned = signed(exact) * np.sign(np.sum(signed(exact) * basis, axis=0))
            step = np.max(abs(aligned), axis=1, keepdims=True) / 7
            assert np.all(abs(basis - aligned) <= 0.5 * step + 1e-9)
            if last is not None:
                turn = basis.T @ last
                adam.mean, adam.square = turn @ adam.mean, turn**2 @ adam.square
            last = basis
        moved = (w if left else w.T) - 0.05 * basis @ adam(basis.T @ g)
        rows, kept = moved.T, (new if left else new.T).T
        scale = np.max(abs(rows), axis=1, keepdims=True)
        off = abs(kept - rows) / (scale / 127)
        assert np.max(off) < 1 + 1e-9
        levels = kept / scale * 127
        assert np.max(abs(levels - np.round(levels))) < 1e-9
        packed = rule.packed(new)
        assert packed["codes"].dtype == np.uint8
        assert np.array_equal(rule.weights.decode(packed, 7), kept)
        w = new
    assert state["basis_codes"].shape == (7, 2)


def int_decoded(codes, scales, rows, columns):
    """Two integers a byte, the first in the low half; one scale a row."""
    both = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1)[:, :columns]
    return (both.astype(float) - 7) / 7 * scales


def test_small_steps_add_up_where_rounding_to_nearest_stops():
    """Half a step of the grid away: steps of a hundredth of one get there on average only."""
    w = on_grid(QGaLore(), np.tile(np.linspace(-1, 1, 8)[:, None], (1, 400)))
    pull = np.zeros((8, 400))
    pull[3, :] = -1.0
    rule = QGaLore(rank=1, lr=1e-4, scale=1.0, moments=PLAIN)
    state, moved = rule.init(w), w
    for _ in range(100):
        moved, state = rule.step(moved, pull, state)
    # 100 steps of 1e-4 times |P_3|^2, which four bits round to 1; noise of 400 sums of 100.
    shift = np.mean((moved - w)[3, :])
    assert abs(shift - 1e-2) < 5 * (100 * 1e-4 / 127 / 400) ** 0.5
    assert np.max(abs((moved - w)[[0, 7], :])) == 0.0
    nearest, state = w, rule.init(w)
    for _ in range(100):
        free = dataclasses.replace(rule, weights=None)
        nearest, state = free.step(nearest, pull, state)
        nearest = on_grid(rule, nearest)
    assert np.array_equal(nearest, w)


def test_without_rounding_it_is_galore():
    target = draw(7, 10)
    plain = GaLore(rank=3, lr=0.05, when=Lazy(2))
    same = QGaLore(rank=3, lr=0.05, when=Lazy(2), weights=None, bases=None)
    one, other = run(plain, target), run(same, target)
    assert all(np.array_equal(x, y) for x, y in zip(one[0], other[0], strict=True))


# When to renew


def renewed_at(rule, steps=24, index=0, count=1, gradient=lambda k: draw(5, 8, seed=k)):
    w = np.zeros((5, 8))
    state, at = rule.init(w, index=index, count=count), []
    for k in range(steps):
        before = int(state["renewals"])
        _, state = rule.step(w, gradient(k), state)
        at += [k] * (int(state["renewals"]) - before)
    return at


def test_renewals_are_spread_over_the_weights():
    rule = GaLore(rank=2, when=Every(6))
    assert renewed_at(rule) == [0, 6, 12, 18]
    assert [renewed_at(rule, 12, k, 3) for k in range(3)] == [[0, 6], [0, 4, 10], [0, 2, 8]]


def test_intervals_grow():
    assert renewed_at(LoQT(rank=2, when=Growing(2, 2.0)), 40) == [0, 2, 6, 14, 30]


def test_intervals_double_where_the_subspace_stays():
    rule = GaLore(rank=2, when=Lazy(2, similarity=0.9, patience=2))
    assert renewed_at(rule, 32, gradient=lambda _: draw(5, 8)) == [0, 2, 4, 8, 12, 20, 28]
    # A random subspace of dimension 2 in 5 overlaps by 0.4 with the last one.
    assert renewed_at(rule) == list(range(0, 24, 2))


def test_a_subspace_is_renewed_once_gradients_lead_nowhere():
    rule = GaLore(rank=2, when=Displacement(4, least=0.5))
    low_rank = draw(5, 2) @ draw(2, 8, seed=1)
    assert renewed_at(rule, gradient=lambda _: low_rank) == [0]
    assert renewed_at(rule, gradient=lambda k: (-1) ** k * low_rank) == list(range(0, 24, 4))
    gone = renewed_at(rule, gradient=lambda k: low_rank if k < 6 else draw(5, 8, seed=k))
    assert gone[1] > 6
    # The displacement is the mean of the unit gradients as the subspace sees them.
    state = rule.init(low_rank)
    for k in range(3):
        _, state = rule.step(low_rank, draw(5, 8, seed=k), state)
    units = [draw(5, 8, seed=k) / np.linalg.norm(draw(5, 8, seed=k)) for k in range(3)]
    expected = np.linalg.norm(state["basis"].T @ sum(units)) / 3
    assert abs(state["displacement"] - expected) <= 10 * EPS


@rules
def test_a_zero_gradient_keeps_the_subspace_and_says_so(rule):
    if isinstance(rule, APOLLO):
        return  # it asks no gradient
    target = target_of((7, 10))
    path, state = run(dataclasses.replace(rule, weight_decay=0.0), target, steps=1)
    state = {**state, "age": state["interval"], "displacement": np.asarray(0.0)}
    if not isinstance(rule.when, Displacement):
        del state["displacement"]
    w, after = rule.step(path[-1], np.zeros((7, 10)), state)
    assert basis_of(after).keys() == basis_of(state).keys() != set()
    assert all(np.array_equal(x, state[name]) for name, x in basis_of(after).items())
    assert int(after["kept"]) == 1
    assert int(after["renewals"]) == 1
    assert np.all(np.isfinite(w))
    # The next gradient is asked again.
    _, after = rule.step(w, w - target, after)
    assert int(after["renewals"]) == 2
    # From the start: no subspace, no step.
    target = on_grid(rule, target)
    start = rule.init(target)
    still, after = rule.step(target, 0 * target, start, lr=0.0)
    assert np.array_equal(still, target)
    assert int(after["renewals"]) == 0
    assert int(after["kept"]) == 1


# What all rules promise


@rules
def test_one_path_on_every_library(rule, xp):
    """A batch of two weights follows the path of each in NumPy, with renewals of their own."""
    targets, lrs = draw(2, 7, 10), np.array([0.05, 0.02])
    expected = [run(rule, targets[i], 7, lrs[i], index=i, count=2) for i in range(2)]
    target, lr = xp.asarray(targets), xp.asarray(lrs)
    path, state = run(rule, target, 7, lr, index=xp.asarray(np.arange(2)), count=2)
    tol = 1e-9 if rule.moments.linear is False else 1e4 * EPS
    for i in range(2):
        assert close([xp.host(w)[i] for w in path], expected[i][0], tol)
        for name, x in expected[i][1].items():
            assert tuple(state[name].shape) == (2, *x.shape)
    for x in (path[-1], *state.values()):
        assert type(x) is type(target)
        assert x.device == target.device


@rules
def test_a_saved_state_resumes_the_path(rule, tmp_path):
    target = target_of((7, 10))
    path, _ = run(rule, target, 8)
    first, state = run(rule, target, 4)
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        state = {name: saved[name] for name in saved}
    weight = first[-1]
    for expected in path[4:]:
        weight, state = rule.step(weight, weight - target, state)
        assert np.array_equal(weight, expected)


@rules
def test_the_step_between_renewals_can_be_compiled(rule):
    target = jax.numpy.asarray(target_of((7, 10)))
    state = rule.init(target)
    weight, state = rule.step(0 * target, -target, state)
    expected = rule.move(weight, weight - target, state, lr=0.01)
    move = jax.jit(lambda w, g, s, lr: rule.move(w, g, s, lr=lr))
    found = move(weight, weight - target, state, 0.01)
    assert np.allclose(found[0], expected[0], rtol=1e-12, atol=0)
    assert found[1].keys() == expected[1].keys()


@rules
def test_learning_rate_and_decay_of_a_step(rule):
    target, weight = target_of((7, 10)), draw(7, 10, seed=1)
    slower = dataclasses.replace(rule, lr=rule.lr / 3)
    one, other = run(rule, target, 3, lr=rule.lr / 3), run(slower, target, 3)
    assert all(np.array_equal(x, y) for x, y in zip(one[0], other[0], strict=True))
    free = dataclasses.replace(rule, weight_decay=0.0)
    decayed = dataclasses.replace(rule, weight_decay=0.5)
    moved, shrunk = (run(r, target, 1, weight=weight)[0][0] for r in (free, decayed))
    if not getattr(rule, "quantize", None) and not isinstance(rule, QGaLore):
        assert np.linalg.norm(moved - shrunk - 0.5 * rule.lr * weight) <= 100 * EPS


@rules
def test_precision(rule):
    """Half precision is computed in single, and rounded once."""
    weight = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    new, state = rule.step(weight, grad, rule.init(weight))
    single, _ = rule.step(weight.float(), grad.float(), rule.init(weight.float()))
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, single.bfloat16())
    codes = {torch.uint8} if isinstance(rule, QGaLore) else set()
    assert {x.dtype for x in state.values()} == {torch.float32, torch.int32} | codes


def test_numbers_in_the_state():
    """``s r`` of the basis and ``2 l r`` of Adam, on either side."""
    for shape in ((7, 10), (10, 7)):
        for rule in (GaLore(rank=3), APOLLO(rank=3), APOLLOMini()):
            state = rule.init(np.zeros(shape))
            size = sum(np.asarray(x).size for x in state.values() if np.ndim(x))
            assert size == (7 + 2 * 10) * rule.rank


def test_a_scale_of_zero_leaves_the_decay():
    w = draw(7, 10)
    rule = GaLore(rank=3, lr=0.1, scale=0.0, weight_decay=0.5)
    new, _ = rule.step(w, draw(7, 10, seed=1), rule.init(w))
    assert np.array_equal(new, 0.95 * w)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(0), r"gap must be at least 1, got 0"),
        (lambda: Growing(2, 0.5), r"factor must be finite and at least 1, got 0\.5"),
        (lambda: Growing(2, math.nan), r"factor must be finite and at least 1, got nan"),
        (lambda: Lazy(similarity=2.0), r"similarity must be in \[0, 1\], got 2\.0"),
        (lambda: Lazy(patience=0), r"patience must be at least 1, got 0"),
        (lambda: Displacement(least=-1.0), r"least must be in \[0, 1\], got -1\.0"),
        (lambda: Integers(bits=1), r"bits must be in 2\.\.8, got 1"),
        (lambda: Integers(block=0), r"block must be at least 1, got 0"),
        (lambda: Fira(growth=0.9), r"growth must be at least 1, got 0\.9"),
        (lambda: APOLLO(growth=math.nan), r"growth must be at least 1, got nan"),
        (lambda: GaLore(tol=0.0), r"tol must be in \(0, 1\], got 0\.0"),
        (lambda: LORO(period=0), r"period must be at least 1, got 0"),
        (lambda: leading_subspace(np.eye(4), 2, tol=0), r"tol must be in \(0, 1\], got 0"),
        (
            lambda: jagged_cosine(0, total=0, period=1, warmup=0, restart_warmup=0),
            r"total and period must be at least 1, got 0 and 1",
        ),
        (
            lambda: low_rank_plus_sparse(draw(5, 2), draw(3, 7), draw(1), np.array([0])),
            r"up and down must have shapes \(m, r\) and \(r, n\), got \(5, 2\) and \(3, 7\)",
        ),
        (
            lambda: low_rank_plus_sparse(draw(5, 2), draw(2, 7), draw(2), np.array([0])),
            r"values and support must have one length, got 2 and 1",
        ),
        (lambda: QGaLore(weights=None).packed(draw(7, 10)), r"keeps weights as they are"),
        (lambda: split_quantized(draw(7, 10), draw(5, 2), grid), r"basis must have 7 rows"),
    ],
)
def test_numbers_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.7"):
        GaLore(rank=8).init(np.zeros((10, 7)))


def test_descent():
    """Every rule gets the loss down, with renewals on the way."""
    target = draw(7, 3) @ draw(3, 10, seed=1)
    for name, rule in RULES.items():
        if "quantized" not in name:
            path, _ = run(rule, target, 60, lr=0.2 / rule.scale)
            assert np.linalg.norm(path[-1] - target) < 0.7 * np.linalg.norm(target), name


# Factorized weights


def dense_exact_step(up, down, g, lr, rank):
    """The tangent step and the best approximation of its rank, from dense arrays."""
    pb, pa = up @ np.linalg.pinv(up), np.linalg.pinv(down) @ down
    tangent = pb @ g + g @ pa - pb @ g @ pa
    u, s, vh = np.linalg.svd(up @ down - lr * tangent)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("complex_", [False, True])
def test_exact_step_is_the_dense_one(complex_):
    up, down = draw(9, 3, complex_=complex_), draw(3, 7, seed=1, complex_=complex_)
    target = draw(9, 7, seed=2, complex_=complex_)
    rule = LORO(lr=0.3, period=1, moments=PLAIN)
    g = up @ down - target
    grads = g @ down.conj().T, up.conj().T @ g
    new_up, new_down, _ = rule.step(up, down, *grads, rule.init(up, down))
    expected = dense_exact_step(up, down, g, 0.3, 3)
    assert np.linalg.norm(new_up @ new_down - expected) <= 1e3 * EPS * np.linalg.norm(expected)
    # Balanced: both Gram matrices are the singular values.
    s = np.linalg.svd(expected, compute_uv=False)[:3]
    for gram in (new_up.conj().T @ new_up, new_down @ new_down.conj().T):
        assert np.linalg.norm(gram - np.diag(s)) <= 1e3 * EPS * s[0]


def test_exact_step_is_that_of_the_published_core():
    """The matrix of order ``2 r`` of LORO, with QR factorizations, for directions of Adam."""
    up, down = draw(9, 3), draw(3, 7, seed=1)
    g = up @ down - draw(9, 7, seed=2)
    rule = LORO(lr=0.1, period=1)
    grads = g @ down.T, up.T @ g
    new = rule.step(up, down, *grads, rule.init(up, down))
    d_up, d_down = (np.sign(x) / (1 + 1e-8 / abs(x)) for x in grads)
    (u, rm), (v, rn) = np.linalg.qr(up), np.linalg.qr(down.T)
    gv, ug = d_up @ np.linalg.inv(rn), np.linalg.inv(rm).T @ d_down
    # Adam's directions of two factors are of no common gradient; published is the core of down.
    core = (u.T @ gv + ug @ v) / 2
    q1, k1 = np.linalg.qr((ug - ug @ v @ v.T).T)
    q2, k2 = np.linalg.qr(gv - u @ u.T @ gv)
    sigma = np.block([[rm @ rn.T - 0.1 * core, -0.1 * k1.T], [-0.1 * k2, np.zeros((3, 3))]])
    us, s, vs = np.linalg.svd(sigma)
    expected = np.hstack([u, q2]) @ (us[:, :3] * s[:3]) @ vs[:3] @ np.hstack([v, q1]).T
    assert np.linalg.norm(new[0] @ new[1] - expected) <= 1e4 * EPS * np.linalg.norm(expected)


def test_lazy_steps_are_adam_and_moments_begin_anew():
    up, down, target = draw(9, 3), draw(3, 6, seed=1), draw(9, 6, seed=2)
    rule, adam = LORO(lr=0.1, period=3), AdamW(lr=0.1 * (3 / 9 + 3 / 6) / 2, weight_decay=0.0)
    state, other = rule.init(up, down), adam.init(up, down)
    pair = up, down
    for _ in range(2):
        up, down, state = rule.step(up, down, *gradients(target, up, down, 1.0), state)
        *pair, other = adam.step(*pair, *gradients(target, *pair, 1.0), other)
        for x, y in zip((up, down), pair, strict=True):
            assert np.linalg.norm(x - y) <= 100 * EPS * np.linalg.norm(y)
    assert int(state["since"]) == int(state["step"]) == 2
    up, down, state = rule.step(up, down, *gradients(target, up, down, 1.0), state)
    assert int(state["since"]) == int(state["step"]) == 0
    assert not np.any(state["up_mean"])
    assert np.linalg.norm(up.T @ up - down @ down.T) <= 1e3 * EPS * np.linalg.norm(up.T @ up)


def test_invariance_of_loro():
    assert LORO(period=1, moments=PLAIN).invariance is Gauge.GENERAL
    assert LORO(period=2, moments=PLAIN).invariance is Gauge.UNITARY
    assert LORO().invariance is Gauge.NONE
    for rule in (LORO(lr=0.3, period=1, moments=PLAIN), LORO(lr=0.02, period=2, moments=PLAIN)):
        assert conformance(rule).holds(), rule


@pytest.mark.parametrize("keep", [0.0, 0.2, 1.0])
def test_restart_merges_and_prunes(keep, xp):
    weight, up, down = draw(2, 5, 6), draw(2, 5, 2, seed=1), draw(2, 2, 6, seed=2)
    rule = AdamW(lr=0.1)
    state = rule.init(up, down)
    up, down, state = rule.step(up, down, up, down, state)
    arrays = {name: xp.asarray(np.asarray(x)) for name, x in state.items()}
    merged, new_up, new_down, pruned = merge_and_restart(
        *(xp.asarray(x) for x in (weight, up, down)), arrays, scale=0.7, keep=keep, rng=3
    )
    product = xp.host(merged) + 0.7 * xp.host(new_up) @ xp.host(new_down)
    assert np.linalg.norm(product - (weight + 0.7 * up @ down)) <= 100 * EPS
    assert not np.any(xp.host(new_up))
    bound = 6**-0.5
    assert 0.8 * bound <= np.max(abs(xp.host(new_down))) <= bound
    assert np.array_equal(xp.host(pruned["step"]), state["step"])
    for name in ("up_mean", "up_square", "down_mean", "down_square"):
        for old, new in zip(state[name], xp.host(pruned[name]), strict=True):
            count = math.ceil(keep * old.size)
            assert np.count_nonzero(new) == count
            assert np.array_equal(new[new != 0], old[new != 0])
            if count:
                assert np.min(abs(new[new != 0])) >= np.max(abs(old[new == 0]), initial=0)


def test_restart_is_checked_and_repeats():
    up, down = draw(5, 2), draw(2, 6)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 2"):
        merge_and_restart(draw(5, 6), up, down, {}, keep=2)
    first, second = (merge_and_restart(draw(5, 6), up, down, {}, rng=1)[2] for _ in range(2))
    assert np.array_equal(first, second)


def test_restarts_reach_a_rank_that_one_adapter_cannot():
    target = draw(6, 6)
    rule = GradientDescent(lr=0.05)
    weight, up, down = np.zeros((6, 6)), np.zeros((6, 2)), draw(2, 6)
    state = rule.init(up, down)
    for k in range(1, 601):
        g = weight + up @ down - target
        up, down, state = rule.step(up, down, g @ down.T, up.T @ g, state)
        if k % 100 == 0:
            weight, up, down, state = merge_and_restart(weight, up, down, state, rng=k)
            down = 3 * down
    best = np.linalg.norm(np.linalg.svd(target, compute_uv=False)[2:])
    assert np.linalg.norm(weight - target) < 0.7 * best


def test_jagged_cosine():
    options = {"total": 100, "period": 20, "warmup": 4, "restart_warmup": 2}
    path = np.array([jagged_cosine(k, **options) for k in range(100)])
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    ramp = np.ones(100)
    ramp[:4] = [0.25, 0.5, 0.75, 1.0]
    ramp[20::20] = 0.5
    assert np.all(abs(path - cosine * ramp) <= 10 * EPS)


def test_low_rank_plus_sparse(xp):
    up, down, values = draw(5, 2), draw(2, 7, seed=1), draw(9, seed=2)
    support = random_support((5, 7), 9 / 35, like=xp.asarray(up), rng=0)
    host = xp.host(support)
    assert host.shape == (9,)
    assert np.all(np.diff(host) > 0)
    arrays = [xp.asarray(x) for x in (up, down, values)]
    dense = 0.5 * up @ down
    dense.reshape(-1)[host] += values
    found = low_rank_plus_sparse(*arrays, support, scale=0.5)
    assert np.linalg.norm(xp.host(found) - dense) <= 100 * EPS
    alone = low_rank_plus_sparse(*arrays[:2], arrays[2][:0], support[:0])
    assert np.linalg.norm(xp.host(alone) - up @ down) <= 100 * EPS
    g = draw(5, 7, seed=3)
    grads = low_rank_plus_sparse_gradients(xp.asarray(g), *arrays[:2], support, scale=0.5)
    expected = 0.5 * g @ down.T, 0.5 * up.T @ g, g.reshape(-1)[host]
    for x, y in zip(grads, expected, strict=True):
        assert np.linalg.norm(xp.host(x) - y) <= 100 * EPS


def test_gradients_of_low_rank_plus_sparse_are_those_of_autograd():
    parts = [torch.tensor(x, requires_grad=True) for x in (draw(5, 2), draw(2, 7), draw(9))]
    support = random_support((5, 7), 9 / 35, like=parts[0].detach(), rng=0)
    weight = low_rank_plus_sparse(*parts, support, scale=0.5)
    weight.retain_grad()
    (weight**3).sum().backward()
    up, down, _ = (x.detach() for x in parts)
    found = low_rank_plus_sparse_gradients(weight.grad, up, down, support, scale=0.5)
    for x, y in zip(parts, found, strict=True):
        torch.testing.assert_close(x.grad, y)


def test_density_is_checked():
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        random_support((5, 7), 0, like=np.zeros(1))
