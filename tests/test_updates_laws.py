"""Laws that every update rule obeys, on every library."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from update_cases import (
    PROJECTED_START,
    RANK,
    RESTLESS,
    RULES,
    SCALE,
    SCALE_FREE,
    SHAPE,
    distance,
    gauge,
    gradients,
    problem,
    run,
)

from lowrank_sp.updates import Gauge, ScaledGD, SkipNonFinite, conformance

EPS = np.finfo(np.float64).eps
EPS32 = np.finfo(np.float32).eps

rules = pytest.mark.parametrize("name", RULES)
invariant = pytest.mark.parametrize(
    "name", [name for name, rule in RULES.items() if rule.invariance is Gauge.GENERAL]
)


@rules
def test_invariance_is_what_is_promised(name):
    found = conformance(RULES[name])
    assert found.holds(), found


def test_a_false_promise_is_found():
    class Boast(ScaledGD):
        invariance = Gauge.GENERAL

    class Understatement(ScaledGD):
        invariance = Gauge.UNITARY

    assert conformance(ScaledGD()).holds()
    assert not conformance(Boast(ridge=0.1)).holds()
    assert not conformance(Understatement()).holds()


def compiled(rule):
    """The step of a rule as JAX compiles it, with the learning rate and the scale traced."""

    @jax.jit
    def step(up, down, grad_up, grad_down, state, scale, lr):
        return rule.step(up, down, grad_up, grad_down, state, scale=scale, lr=lr)

    return step


@rules
def test_one_path_on_every_library(name, xp):
    """A batch of two pairs, compiled on JAX, follows the path of each pair in NumPy."""
    rule = RULES[name]
    target, up, down = problem(0, 2)
    scale, lr = np.array([0.5, 1.2]), rule.lr * np.array([1.0, 0.3])
    expected = []
    for i in range(2):
        one = {"scale": scale[i], "lr": lr[i]}
        pair, state = (up[i], down[i]), rule.init(up[i], down[i])
        for _ in range(4):
            *pair, state = rule.step(*pair, *gradients(target[i], *pair, scale[i]), state, **one)
        expected.append(pair[0] @ pair[1])
        shapes = {key: (2, *x.shape) for key, x in state.items()}
    target, *pair, scale, lr = (xp.asarray(x) for x in (target, up, down, scale, lr))
    eager = lambda *args: rule.step(*args[:5], scale=args[5], lr=args[6])  # noqa: E731
    step = compiled(rule) if xp.name == "jax" else eager
    state = rule.init(*pair)
    for _ in range(4):
        grads = gradients(target, *pair, scale[:, None, None])
        *pair, state = step(*pair, *grads, state, scale, lr)
    assert {key: tuple(x.shape) for key, x in state.items()} == shapes
    for x in (*pair, *state.values()):
        assert type(x) is type(target)
        assert x.device == target.device
    assert distance(expected, xp.host(pair[0] @ pair[1])) <= 1e4 * EPS


@rules
def test_a_saved_state_resumes_the_path(name, tmp_path):
    rule = RULES[name]
    target, up, down = problem()
    path, _ = run(rule, target, up, down, steps=6)
    _, (up, down, state) = run(rule, target, up, down, steps=3)
    np.savez(
        tmp_path / "state.npz", up=up, down=down, **{f"state_{k}": x for k, x in state.items()}
    )
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        up, down = saved["up"], saved["down"]
        state = {k.removeprefix("state_"): saved[k] for k in saved if k.startswith("state_")}
    for expected in path[3:]:
        up, down, state = rule.step(up, down, *gradients(target, up, down), state, scale=SCALE)
        assert np.array_equal(up @ down, expected)


@rules
def test_learning_rate_of_a_step(name):
    rule = RULES[name]
    target, up, down = problem()
    grads = gradients(target, up, down)
    if dataclasses.fields(rule)[0].name != "lr":
        return  # a wrapper has that of its rule
    slower = dataclasses.replace(rule, lr=rule.lr / 3)
    expected = slower.step(up, down, *grads, slower.init(up, down), scale=SCALE)
    found = rule.step(up, down, *grads, rule.init(up, down), scale=SCALE, lr=rule.lr / 3)
    for x, y in zip(expected[:2], found[:2], strict=True):
        assert np.array_equal(x, y)


@rules
def test_frozen_factors_stay(name):
    rule = RULES[name]
    _, up, down = problem()
    grad = problem(1)[1]
    if rule.joint:
        with pytest.raises(ValueError, match=r"grad_down = None"):
            rule.step(up, down, grad, None, rule.init(up, down))
        return
    state, moved = rule.init(up, down), up
    for _ in range(2):
        moved, same, state = rule.step(moved, down, grad, None, state, scale=SCALE)
    assert same is down
    assert np.all(np.isfinite(moved))
    assert np.any(moved != up)


@rules
@pytest.mark.parametrize("start", ["up = 0", "down = 0", "half rank", "zero column", "zero"])
def test_cold_starts(name, start):
    rule = RULES[name]
    target, up, down = problem()
    if start in ("up = 0", "zero"):
        up = 0 * up
    if start in ("down = 0", "zero"):
        down = 0 * down
    if start == "half rank":
        up[:, 2], down[2] = up[:, 1] - up[:, 0], 2 * down[0]
    if start == "zero column":
        up[:, 0] = 0
    path, (*factors, state) = run(rule, target, up, down, steps=12)
    for x in (*path, *factors, *state.values()):
        assert np.all(np.isfinite(x))
    # Zero is a saddle for all, and on either side for landing; LoRA-FA never moves down.
    stuck = start == "zero" or (start, name[:5]) in {
        ("up = 0", "PoLAR"),
        ("down = 0", "PoLAR"),
        ("down = 0", "LoRA-"),
    }
    loss = [np.linalg.norm(SCALE * p - target) for p in (up @ down, *path)]
    assert stuck or min(loss) < 0.999 * loss[0]


@pytest.mark.parametrize("name", PROJECTED_START)
def test_first_step_of_a_cold_start(name):
    """The pseudo-inverse leaves ``down``; ``up`` moves by ``-G P_A`` up to a factor."""
    target, _, down = problem()
    up = np.zeros((SHAPE[0], RANK))
    path, (_, new, _) = run(RULES[name], target, up, down, steps=1)
    rows = np.linalg.pinv(down) @ down
    direction = target @ rows
    along = np.sum(path[0] * direction) / np.sum(direction**2)
    assert along > 0
    assert np.linalg.norm(path[0] - along * direction) <= 100 * EPS * np.linalg.norm(path[0])
    assert np.linalg.norm(new @ rows - new) <= 100 * EPS * np.linalg.norm(new)
    if name != "Riemannian":
        assert np.array_equal(new, down)


def test_rank_comes_back():
    """From half the rank, and from a zero gradient, all ``r`` directions are reached."""
    target, up, down = problem()
    for name in ("ScaledGD", "Riemannian", "LoRA-Pro, plain", "AltLoRA", "LoRA-Muon"):
        rule = RULES[name]
        state = rule.init(0 * up, down)
        zeros = np.zeros_like(up), np.zeros_like(down)
        start = rule.step(0 * up, down, *zeros, state, scale=SCALE)
        path, _ = run(rule, target, *start[:2], steps=40)
        sizes = np.linalg.svd(path[-1], compute_uv=False)
        assert sizes[RANK - 1] > 1e-2 * sizes[0], name


@rules
def test_zero_gradients_change_nothing(name):
    rule = RULES[name]
    _, up, down = problem()
    zeros = np.zeros_like(up), np.zeros_like(down)
    *new, state = rule.step(up, down, *zeros, rule.init(up, down), scale=SCALE)
    for x in (*new, *state.values()):
        assert np.all(np.isfinite(x))
    if name not in RESTLESS:
        product = up @ down
        assert np.linalg.norm(new[0] @ new[1] - product) <= 100 * EPS * np.linalg.norm(product)


@rules
def test_loss_falls(name):
    target, up, down = problem()
    rule = RULES[name]
    _, (*factors, state) = run(rule, target, up, down, steps=60)
    up2, down2 = rule.settle(*factors, state)
    before, after = (np.linalg.norm(SCALE * p - target) for p in (up @ down, up2 @ down2))
    least = np.linalg.norm(np.linalg.svd(target, compute_uv=False)[RANK:])
    assert after - least < 0.9 * (before - least)


@invariant
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_single_precision(name, condition):
    """Rounding is magnified by the condition number of the gauge, not by its square."""
    target, up, down = problem()
    x, inverse = gauge(condition)
    up, down = up @ x, inverse @ down
    wide, _ = run(RULES[name], target, up, down, steps=2)
    narrow = [a.astype(np.float32) for a in (target, up, down)]
    path, (*factors, state) = run(RULES[name], *narrow, steps=2)
    for a in (*factors, *state.values()):
        assert a.dtype in (np.float32, np.int32)
    assert distance(wide, path) <= 100 * condition * EPS32


@rules
def test_half_precision_is_computed_in_single(name):
    rule = RULES[name]
    arrays = [torch.asarray(x).to(torch.bfloat16) for x in (*problem()[1:], *problem(1)[1:])]
    wide = [x.to(torch.float32) for x in arrays]
    *new, state = rule.step(*arrays, rule.init(*arrays[:2]), scale=SCALE)
    *expected, _ = rule.step(*wide, rule.init(*wide[:2]), scale=SCALE)
    for x, y in zip(new, expected, strict=True):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, y.to(torch.bfloat16))
    for x in state.values():
        assert x.dtype in (torch.float32, torch.int32)


@pytest.mark.parametrize("name", sorted(SCALE_FREE))
def test_only_the_adapter_counts(name):
    """``(scale, up, down)`` and ``(1, scale up, down)`` are one adapter, and have one path."""
    target, up, down = problem()
    path, _ = run(RULES[name], target, up, down, scale=0.2)
    other, _ = run(RULES[name], target, 0.2 * up, down, scale=1.0)
    assert distance([0.2 * p for p in path], other) <= 1e4 * EPS


@invariant
def test_complex_factors_in_a_complex_gauge(name):
    target, up, down = problem(complex_=True)
    x, inverse = gauge(3.0)
    twist = np.exp(1j * np.arange(RANK))
    path, _ = run(RULES[name], target, up, down, steps=4)
    other, _ = run(RULES[name], target, (up @ x) * twist, (inverse.T / twist).T @ down, steps=4)
    assert distance(path, other) <= 1e4 * EPS
    start = np.linalg.norm(SCALE * up @ down - target)
    assert np.linalg.norm(SCALE * path[-1] - target) < start


def check_skipping(rule, asarray, host):
    """Of two pairs, the one with a bad gradient stays; the other moves as without the wrapper."""
    _, up, down = problem(0, 2)
    grad_up, grad_down = problem(1, 2)[1:]
    bad_up, bad_down = grad_up.copy(), grad_down.copy()
    bad_up[1, 0, 0], bad_down[1, 0, 0] = np.nan, np.inf
    pair = [asarray(x) for x in (up, down)]
    skipping = SkipNonFinite(rule)
    state = skipping.init(*pair)
    *new, after = skipping.step(*pair, asarray(bad_up), asarray(bad_down), state, scale=SCALE)
    assert list(host(after["skipped"])) == [0, 1]
    for old, x in zip((up, down), new, strict=True):
        assert np.array_equal(host(x)[1], old[1])
    for key in state.keys() - {"skipped"}:
        assert np.array_equal(host(after[key])[1], host(state[key])[1]), key
    clean = rule.step(*pair, asarray(grad_up), asarray(grad_down), rule.init(*pair), scale=SCALE)
    expected = host(clean[0] @ clean[1])[0]
    assert distance([expected], [host(new[0] @ new[1])[0]]) <= 1e4 * EPS


@pytest.mark.parametrize("name", [name for name in RULES if name != "SkipNonFinite"])
def test_gradients_that_are_not_finite_are_skipped(name):
    check_skipping(RULES[name], np.asarray, np.asarray)


def test_skipping_on_every_library(xp):
    check_skipping(RULES["ScaledGD"], xp.asarray, xp.host)
