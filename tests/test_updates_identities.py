"""What each update rule is: exact identities of single steps, against naive dense algebra."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from update_cases import PLAIN, RANK, SCALE, SHAPE, distance, gauge, gradients, problem, run

from lowrank_sp.gauge import balance
from lowrank_sp.updates import (
    NBAR,
    OBAR,
    SAM,
    Adam,
    AdamW,
    AdaPreLoRA,
    AltLoRA,
    BaLoRA,
    Clip,
    EFlat,
    FrozenDown,
    GradientDescent,
    ImbalanceRegularized,
    LoFT,
    LoRAMuon,
    LoRAPlus,
    LoRAPro,
    LoRARite,
    Momentum,
    PoLAR,
    RefLoRA,
    RefLoRAScalar,
    RiemannianGD,
    ScaledGD,
    Spectron,
    StelLA,
    flat_noise,
)
from lowrank_sp.updates.flatness import perturbation
from lowrank_sp.updates.rule import Pair

EPS = np.finfo(np.float64).eps
TARGET, UP, DOWN = problem(3)
GRADS = gradients(TARGET, UP, DOWN)
G = SCALE * UP @ DOWN - TARGET
P_UP, P_DOWN = UP @ np.linalg.pinv(UP), np.linalg.pinv(DOWN) @ DOWN


def step(rule, up=UP, down=DOWN, grads=GRADS, scale=SCALE, state=None):
    state = rule.init(up, down) if state is None else state
    return rule.step(up, down, *grads, state, scale=scale)


def moved(rule, **options):
    """Change of the factors by one step."""
    up, down, _ = step(rule, **options)
    return up - UP, down - DOWN


def first_order(rule, **options):
    """Change of the adapter by one step, without the term of second order."""
    d_up, d_down = moved(rule, **options)
    return SCALE * (UP @ d_down + d_up @ DOWN)


def same(x, y, tol=1e4):
    assert np.linalg.norm(x - y) <= tol * EPS * max(np.linalg.norm(y), 1e-3)


# -- first order --


def test_adamw_is_that_of_torch():
    ours, theirs = (UP, DOWN), [torch.nn.Parameter(torch.asarray(x.copy())) for x in (UP, DOWN)]
    optimizer = torch.optim.AdamW(theirs, lr=0.03)
    rule = AdamW(lr=0.03)
    state = rule.init(*ours)
    for _ in range(5):
        grads = gradients(TARGET, *ours)
        *ours, state = rule.step(*ours, *grads, state)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = torch.asarray(grad)
        optimizer.step()
        for x, y in zip(ours, theirs, strict=True):
            same(x, y.detach().numpy())


def test_momentum_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.asarray(UP.copy()))
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.8)
    rule, up = GradientDescent(lr=0.01, moments=Momentum(0.8)), UP
    state = rule.init(UP, DOWN)
    for seed in range(3):
        grad = problem(seed)[1]
        up, _, state = rule.step(up, DOWN, grad, GRADS[1], state)
        parameter.grad = torch.asarray(grad)
        optimizer.step()
    same(up, parameter.detach().numpy())


def test_loraplus_is_a_scalar_gauge_of_gradient_descent():
    ratio, lr = 16.0, 1e-3
    path, _ = run(LoRAPlus(lr=lr, ratio=ratio, moments=PLAIN), TARGET, UP, DOWN)
    c = ratio**-0.25
    other, _ = run(GradientDescent(lr=lr * ratio**0.5), TARGET, c * UP, DOWN / c)
    assert distance(path, other) <= 1e4 * EPS
    path, _ = run(LoRAPlus(lr=lr, ratio=ratio), TARGET, UP, DOWN)
    other, _ = run(AdamW(lr=lr * ratio**0.5, weight_decay=0.0), TARGET, c * UP, DOWN / c)
    assert distance(path, other) > 1e-4


def test_scaled_gd_projects_the_gradient_on_both_sides():
    rule = ScaledGD(lr=0.3, damping=0.0)
    same(first_order(rule), -0.3 * (P_UP @ G + G @ P_DOWN))
    d_up, d_down = moved(rule)
    same(d_up, -0.3 * GRADS[0] @ np.linalg.inv(DOWN @ DOWN.T) / SCALE**2)
    same(d_down, -0.3 * np.linalg.inv(UP.T @ UP) @ GRADS[1] / SCALE**2)


def test_scaled_gd_with_a_ridge():
    d_up, d_down = moved(ScaledGD(lr=0.3, ridge=0.5))
    unit = np.eye(RANK)
    same(d_up, -0.3 * GRADS[0] @ np.linalg.inv(DOWN @ DOWN.T + 0.5 * unit) / SCALE**2)
    same(d_down, -0.3 * np.linalg.inv(UP.T @ UP + 0.5 * unit) @ GRADS[1] / SCALE**2)


def test_damping_is_a_ridge_in_the_balanced_gauge():
    x, inverse = gauge(100.0)
    up, down = UP @ x, inverse @ DOWN
    new = step(ScaledGD(lr=0.3, damping=0.2), up, down, gradients(TARGET, up, down))
    left, right = balance(up, down)
    sizes = np.sum(left**2, axis=0)
    ridge = 0.2 * sizes.mean()
    plain = step(ScaledGD(lr=0.3, ridge=ridge), left, right, gradients(TARGET, left, right))
    same(new[0] @ new[1], plain[0] @ plain[1], tol=1e6)


def test_weight_decay_of_factors_is_squared_in_the_product():
    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    up, down, _ = step(ScaledGD(lr=0.3, weight_decay=0.1), grads=zeros)
    same(up @ down, (1 - 0.03) ** 2 * UP @ DOWN)


def test_one_step_from_a_sketch_recovers_a_matrix_of_that_rank():
    """Nystrom: with ``up = M omega`` and ``down = 0``, one step of size one gives ``M``."""
    m = problem(5)[1] @ problem(6)[2]
    up = m @ np.random.default_rng(0).standard_normal((SHAPE[1], RANK))
    grads = gradients(m, up, 0 * DOWN, 1.0)
    new = step(ScaledGD(lr=1.0, damping=0.0), up, 0 * DOWN, grads, scale=1.0)
    same(new[0] @ new[1], m)


# -- projected --


def tangent(g):
    return P_UP @ g + g @ P_DOWN - P_UP @ g @ P_DOWN


def truncated(w, rank=RANK):
    u, s, vh = np.linalg.svd(w)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_riemannian_step_is_the_truncated_svd():
    up, down, _ = step(RiemannianGD(lr=0.4, weight_decay=0.1))
    w = SCALE * UP @ DOWN
    same(SCALE * up @ down, truncated((1 - 0.04) * w - 0.4 * tangent(G)))
    same(down @ down.T, np.eye(RANK))


def test_riemannian_momentum_is_projected():
    rule = RiemannianGD(lr=0.1, momentum=0.7)
    up, down, state = step(rule)
    same(state["left"] @ state["right"], tangent(G))
    grads = gradients(TARGET, up, down)
    new_up, new_down, new_state = step(rule, up, down, grads, state=state)
    p_up, p_down = up @ np.linalg.pinv(up), np.linalg.pinv(down) @ down
    g = SCALE * up @ down - TARGET

    def project(x):
        return p_up @ x + x @ p_down - p_up @ x @ p_down

    expected = 0.7 * project(tangent(G)) + project(g)
    same(new_state["left"] @ new_state["right"], expected)
    same(SCALE * new_up @ new_down, truncated(SCALE * up @ down - 0.1 * expected))


@pytest.mark.parametrize("sylvester", [False, True])
def test_lorapro_solves_the_least_squares_problem(sylvester):
    rule = LoRAPro(lr=1.0, moments=PLAIN, sylvester=sylvester)
    reached = -first_order(rule)
    same(reached, tangent(G))
    rest = reached - G
    size = 1e3 * EPS * np.linalg.norm(G)
    assert np.linalg.norm(UP.T @ rest) <= size
    assert np.linalg.norm(rest @ DOWN.T) <= size
    least = np.linalg.norm((np.eye(SHAPE[0]) - P_UP) @ G @ (np.eye(SHAPE[1]) - P_DOWN))
    assert abs(np.linalg.norm(rest) - least) <= 100 * EPS * least


def test_sylvester_choice_is_nearest_to_the_gradients():
    d_up, d_down = moved(LoRAPro(lr=1.0, moments=PLAIN, sylvester=True))
    # Of all (h_B - B X, h_A + X A) the one whose distance to the gradients is stationary.
    normal = UP.T @ (-d_up - GRADS[0]) - (-d_down - GRADS[1]) @ DOWN.T
    assert np.linalg.norm(normal) <= 1e4 * EPS * np.linalg.norm(GRADS[0])
    d_up, d_down = moved(LoRAPro(lr=1.0, moments=PLAIN))
    normal = UP.T @ (-d_up - GRADS[0]) - (-d_down - GRADS[1]) @ DOWN.T
    assert np.linalg.norm(normal) > 1e-3 * np.linalg.norm(GRADS[0])


def test_symmetric_choice_shares_the_common_part():
    d_up, d_down = moved(LoRAPro(lr=1.0, moments=PLAIN))
    half = P_UP @ G @ P_DOWN / 2
    same(-SCALE * d_up @ DOWN, G @ P_DOWN - half)
    same(-SCALE * UP @ d_down, P_UP @ G - half)


def test_lorapro_has_adam_of_the_full_weight():
    first = -first_order(LoRAPro(lr=1.0))
    direction, _ = Adam().turn(tangent(G), Adam().init(G), np.array(1))
    same(first, tangent(direction))


def test_adaprelora():
    rule = AdaPreLoRA(lr=1.0, eps=0.0)
    xi = tangent(G)
    rows, columns = np.mean(xi**2, axis=1), np.mean(xi**2, axis=0)
    _, _, state = step(rule)
    same(state["rows"], (1 - rule.beta) * rows)
    same(state["columns"], (1 - rule.beta) * columns)
    left, right = np.sqrt(rows), np.sqrt(columns / rows.mean())
    reached = -first_order(rule)
    rest = np.diag(left) @ (reached - np.diag(1 / left) @ G @ np.diag(1 / right)) @ np.diag(right)
    # The residual is orthogonal to both sides in the metric.
    assert np.linalg.norm(UP.T @ rest) <= 1e4 * EPS * np.linalg.norm(G)
    assert np.linalg.norm(rest @ DOWN.T) <= 1e4 * EPS * np.linalg.norm(G)


# -- alternating, transported --


def test_altlora_moves_one_factor_by_its_projection():
    rule = AltLoRA(lr=0.4, beta=0.0)
    up, down, state = step(rule)
    assert np.array_equal(down, DOWN)
    same(SCALE * (up - UP) @ DOWN, -0.4 * G @ P_DOWN)
    grads = gradients(TARGET, up, down)
    new, newer, _ = rule.step(up, down, None, grads[1], state, scale=SCALE)
    assert new is up
    p_up = up @ np.linalg.pinv(up)
    same(SCALE * up @ (newer - down), -0.4 * p_up @ (SCALE * up @ down - TARGET))


def test_altlora_momentum_follows_the_other_factor():
    rule = AltLoRA(lr=0.2, beta=0.5)
    state = rule.init(UP, DOWN) | {"up_mean": UP[::-1]}
    down = DOWN + 0.3 * problem(8)[2]
    grads = gradients(TARGET, UP, down)
    _, _, after = rule.step(UP, down, *grads, state, scale=SCALE)
    h = grads[0] @ np.linalg.inv(down @ down.T) / SCALE**2
    same(
        after["up_mean"] @ down,
        0.5 * UP[::-1] @ DOWN @ np.linalg.pinv(down) @ down + 0.5 * h @ down,
    )
    # Where the other factor has not moved, nothing changes.
    _, _, after = step(rule, state=state, grads=(0 * UP, 0 * DOWN))
    same(after["up_mean"], 0.5 * UP[::-1])


def test_lora_fa_is_the_least_squares_step():
    rule = FrozenDown(lr=1.0, moments=PLAIN)
    same(first_order(rule), -G @ P_DOWN)
    assert set(FrozenDown().init(UP, DOWN)) == {"step", "mean", "square"}


def test_lora_rite_without_history_is_muon():
    rite = first_order(LoRARite(lr=1.0, betas=(0.0, 0.0), eps=0.0))
    q_up, q_down = np.linalg.qr(UP)[0], np.linalg.qr(DOWN.T)[0]
    m, n = SHAPE
    expected = m**0.5 * polar(G @ q_down) @ q_down.T + n**0.5 * q_up @ polar(q_up.T @ G)
    same(rite, -expected)


@pytest.mark.parametrize("rule", [LoRARite(lr=0.1), LoFT(lr=0.1)], ids=["LoRA-RITE", "LoFT"])
def test_moments_turn_with_the_frame(rule):
    """A change of gauge in the middle of the run changes the factors, but not the path."""
    up, down, state = step(rule)
    x, inverse = gauge(10.0)
    for _ in range(3):
        plain = step(rule, up, down, gradients(TARGET, up, down), state=state)
        turned = up @ x, inverse @ down
        other = step(rule, *turned, gradients(TARGET, *turned), state=state)
        assert distance([plain[0] @ plain[1]], [other[0] @ other[1]]) <= 1e4 * EPS
        up, down, state = other


def test_a_direction_that_comes_back_does_not_jump():
    """Of a second moment that a turn has lost, the escaped mass keeps the size."""
    rule = LoRARite(lr=1.0, betas=(0.0, 0.999))
    *_, state = step(rule)
    lost = UP * np.array([1.0, 1.0, 0.0])
    *_, state = step(rule, up=lost, grads=gradients(TARGET, lost, DOWN), state=state)
    assert state["down_escaped"] > 0
    _, down, _ = step(rule, state=state)
    usual = np.linalg.norm(moved(rule)[1])
    assert np.linalg.norm(down - DOWN) <= 3 * usual


def test_loft_in_full_rank_is_adam():
    """With square orthogonal ``down``, ``up`` sees the whole gradient: one step is Adam's."""
    n = 5
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((7, n)), np.linalg.qr(rng.standard_normal((n, n)))[0]
    g = rng.standard_normal((7, n))
    rule = LoFT(lr=0.1, eps=1e-4)
    new, _, _ = rule.step(up, down, g @ down.T, up.T @ g, rule.init(up, down))
    direction, _ = Adam(eps=1e-4).turn(g, Adam().init(g), np.array(1))
    # The frame of down gives h = g, whose square is exact entry by entry in one step.
    same((new - up) @ down, -0.1 * direction)


# -- balancing --


def geometric_mean():
    root = np.real(sqrtm(DOWN @ DOWN.T))
    inverse = np.linalg.inv(root)
    return inverse @ np.real(sqrtm(root @ UP.T @ UP @ root)) @ inverse


def test_reflora_preconditions_by_the_geometric_mean():
    s = geometric_mean()
    same(s @ (DOWN @ DOWN.T) @ s, UP.T @ UP)
    d_up, d_down = moved(RefLoRA(lr=0.1, moments=PLAIN))
    same(d_up, -0.1 * GRADS[0] @ s)
    same(d_down, -0.1 * np.linalg.inv(s) @ GRADS[1])
    d = UP @ DOWN
    expected = np.real(sqrtm(d @ d.T)) @ G + G @ np.real(sqrtm(d.T @ d))
    assert np.linalg.norm(
        first_order(RefLoRA(lr=0.1, moments=PLAIN)) + 0.1 * SCALE**2 * expected
    ) <= 1e-6 * np.linalg.norm(expected)


def test_reflora_is_descent_from_the_balanced_factors():
    up, down, _ = step(RefLoRA(lr=0.1, moments=PLAIN))
    left, right = balance(UP, DOWN)
    a, b, _ = step(GradientDescent(lr=0.1), left, right, gradients(TARGET, left, right))
    same(up @ down, a @ b)
    c, d, _ = step(BaLoRA(lr=0.1, moments=PLAIN))
    same(c @ d, a @ b)
    nuclear = np.linalg.svd(UP @ DOWN, compute_uv=False)[:RANK].sum()
    same(np.linalg.norm(left) ** 2 + np.linalg.norm(right) ** 2, 2 * nuclear)


def test_balora_starts_from_balanced_factors():
    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    up, down, _ = step(BaLoRA(), grads=zeros)
    same(up @ down, UP @ DOWN)
    same(up.T @ up, down @ down.T)


def test_reflora_s_undoes_scalar_gauges():
    for moments in (PLAIN, Adam()):
        rule = RefLoRAScalar(lr=1e-3, moments=moments)
        path, (up, down, _) = run(rule, TARGET, UP, DOWN)
        other, _ = run(rule, TARGET, 50 * UP, DOWN / 50)
        assert distance(path, other) <= 1e4 * EPS
    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    up, down, _ = step(rule, 9 * UP, DOWN, zeros)
    same(np.linalg.norm(up), np.linalg.norm(down))


def test_imbalance_is_a_gradient():
    mu, h = 0.3, 1e-6

    def penalty(up, down):
        return mu / 4 * np.sum((up.T @ up - down @ down.T) ** 2)

    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    d_up, d_down = moved(ImbalanceRegularized(lr=1.0, penalty=mu), grads=zeros)
    _, a, b = problem(9)
    slope = (penalty(UP + h * a, DOWN + h * b) - penalty(UP - h * a, DOWN - h * b)) / (2 * h)
    assert abs(slope + np.sum(d_up * a) + np.sum(d_down * b)) <= 1e-6 * abs(slope)


@pytest.mark.parametrize("larger", ["up", "down"])
def test_signs_of_bar(larger):
    c = 10.0 if larger == "up" else 0.1
    grads = c * np.ones_like(UP), np.ones_like(DOWN)
    still = np.zeros_like(UP), np.zeros_like(DOWN)
    sign = 1 if larger == "up" else -1
    up, down = moved(NBAR(lr=0.1, strength=0.5, moments=PLAIN), grads=grads)
    same(up + 0.1 * grads[0], sign * 0.05 * UP)
    same(down + 0.1 * grads[1], -sign * 0.05 * DOWN)
    balanced = UP / np.linalg.norm(UP), DOWN / np.linalg.norm(DOWN)
    rule = OBAR(lr=0.1, strength=0.5, moments=PLAIN)
    new = step(rule, c * balanced[0], balanced[1], still)
    same(new[0], (1 - sign * 0.05) * c * balanced[0])
    same(new[1], (1 + sign * 0.05) * balanced[1])
    same(new[0] @ new[1], (1 - 0.05**2) * c * balanced[0] @ balanced[1])


def test_obar_balances():
    rule, up, down = OBAR(lr=0.1, strength=0.2, moments=PLAIN), 5 * UP, DOWN
    state, gaps = rule.init(up, down), []
    for _ in range(60):
        gaps.append(abs(np.sum(up**2) - np.sum(down**2)))
        up, down, state = rule.step(up, down, 0 * UP, 0 * DOWN, state)
    assert np.all(np.diff(gaps[:30]) < 0)
    assert gaps[-1] < 0.1 * gaps[0]


def test_bar_turns_the_way_of_sharpness_aware_minimization():
    """Along the flow of SAM, ``d/dt (|up|^2 - |down|^2) / 2`` has the sign that nBAR applies."""
    rho = 1e-4
    sam = SAM(GradientDescent(lr=1.0), rho=rho)
    there = step(sam)
    perturbed = gradients(TARGET, *there[:2])
    squares = [np.sum(g**2) for g in GRADS]
    flow = -(np.sum(UP * perturbed[0]) - np.sum(DOWN * perturbed[1]))
    predicted = rho * (squares[0] - squares[1]) / np.sqrt(sum(squares))
    assert abs(flow - predicted) <= 1e-3 * abs(predicted)


# -- spectral --


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def test_lora_muon_moves_by_the_polar_factors():
    lr = 0.3
    d_up, d_down = moved(LoRAMuon(lr=lr))
    q_up, q_down = np.linalg.qr(UP)[0], np.linalg.qr(DOWN.T)[0]
    same(SCALE * d_up @ DOWN, -lr / 2 * polar(G @ q_down) @ q_down.T)
    same(SCALE * UP @ d_down, -lr / 2 * q_up @ polar(q_up.T @ G))
    for part in (d_up @ DOWN, UP @ d_down):
        assert abs(SCALE * np.linalg.norm(part, 2) - lr / 2) <= 100 * EPS


def test_lora_muon_splits_the_decay():
    lr, decay = 0.3, 0.5
    plain, decayed = LoRAMuon(lr=lr), LoRAMuon(lr=lr, weight_decay=decay)
    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    up, down, _ = step(decayed, grads=zeros)
    same(up @ down, (1 - lr * decay) * UP @ DOWN)
    keep = (1 - lr * decay) ** 0.5
    up, down, _ = step(decayed)
    linear = (up - keep * UP) @ (keep * DOWN) + (keep * UP) @ (down - keep * DOWN)
    same(SCALE * linear, first_order(plain))


@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_spectron_bounds_the_whole_step(size):
    rule = Spectron(lr=0.5, weight_decay=0.0)
    up, down = size * UP, DOWN / size
    new = step(rule, up, down, gradients(TARGET, up, down))
    assert np.linalg.norm(new[0] @ new[1] - up @ down, 2) <= 0.5 * (1 + 100 * EPS)
    length = 0.5 / (np.linalg.norm(up, 2) + np.linalg.norm(down, 2) + 1)
    assert abs(np.linalg.norm(new[0] - up, 2) - length) <= 100 * EPS * np.linalg.norm(up, 2)


# -- constrained --


def on_stiefel(seed=0):
    return np.linalg.qr(problem(seed)[1])[0], np.linalg.qr(problem(seed)[2].T)[0].T


def test_stella_stays_on_the_stiefel_manifold_with_a_core_between():
    """``W = U S V^H``: the pair by StelLA, the core by Adam, to a target of the same form."""
    (up, down), core = on_stiefel(), np.eye(RANK)
    goal_up, goal_down = on_stiefel(4)
    target = goal_up @ np.diag([3.0, 2.0, 1.0]) @ goal_down
    rule, adam = StelLA(lr=0.02), Adam()
    state, kept = rule.init(up, down), adam.init(core)
    losses = []
    for k in range(400):
        g = up @ core @ down - target
        losses.append(np.sum(g**2))
        grad_up, grad_down = g @ (core @ down).T, (up @ core).T @ g
        direction, kept = adam.turn(up.T @ g @ down.T, kept, np.array(k + 1))
        up, down, state = rule.step(up, down, grad_up, grad_down, state)
        core = core - 0.02 * direction
        assert np.linalg.norm(up.T @ up - np.eye(RANK)) <= 100 * EPS
        assert np.linalg.norm(down @ down.T - np.eye(RANK)) <= 100 * EPS
    assert losses[-1] < 1e-3 * losses[0]


def test_stella_steps_are_tangent():
    up, down = on_stiefel()
    grads = gradients(TARGET, up, down)
    lr = 1e-5
    new, _, _ = step(StelLA(lr=lr, moments=PLAIN), up, down, grads)
    d = (new - up) / lr
    assert np.linalg.norm(up.T @ d + d.T @ up) <= 1e-4 * np.linalg.norm(d)
    expected = grads[0] - up @ grads[0].T @ up
    assert np.linalg.norm(d + expected) <= 1e-3 * np.linalg.norm(expected)
    wide, _, _ = step(StelLA(lr=lr, moments=PLAIN, width=4 * SHAPE[0]), up, down, grads)
    assert np.linalg.norm((wide - up) / lr + 2 * expected) <= 1e-3 * np.linalg.norm(expected)


def test_landing_parts_are_orthogonal_and_land():
    strength = 0.7
    zeros = np.zeros_like(UP), np.zeros_like(DOWN)
    skew, _ = moved(PoLAR(lr=1.0, moments=PLAIN, strength=0.0))
    pull, _ = moved(PoLAR(lr=1.0, moments=PLAIN, strength=strength), grads=zeros)
    same(skew, -(GRADS[0] @ UP.T - UP @ GRADS[0].T) @ UP)
    same(pull, -strength * UP @ (UP.T @ UP - np.eye(RANK)))
    inner = np.sum(skew * pull)
    assert abs(inner) <= 100 * EPS * np.linalg.norm(skew) * np.linalg.norm(pull)
    up, down = (1.3 * x for x in on_stiefel())
    rule = PoLAR(lr=0.1, moments=PLAIN, strength=1.0)
    state = rule.init(up, down)
    for _ in range(200):
        up, down, state = rule.step(up, down, *zeros, state)
    same(up.T @ up, np.eye(RANK))
    same(down @ down.T, np.eye(RANK))


# -- flatness --


def test_sam_takes_its_gradient_uphill_and_comes_back():
    rule = SAM(GradientDescent(lr=0.01), rho=0.1)
    up, down, state = step(rule)
    size = np.sqrt(sum(np.sum(g**2) for g in GRADS))
    same(up, UP + 0.1 * GRADS[0] / size)
    same(down, DOWN + 0.1 * GRADS[1] / size)
    for x, y in zip(rule.settle(up, down, state), (UP, DOWN), strict=True):
        assert np.array_equal(x, y)
    there = gradients(TARGET, up, down)
    up, down, state = step(rule, up, down, there, state=state)
    same(up, UP - 0.01 * there[0])
    same(down, DOWN - 0.01 * there[1])


def test_eflat_perturbs_the_full_weight_through_up():
    e_up = perturbation(Pair(UP, DOWN), Pair(*GRADS), scale=SCALE, rho=0.05)
    g_hat = (G @ P_DOWN + P_UP @ G) / 2
    pinv_up, pinv_down = np.linalg.pinv(UP), np.linalg.pinv(DOWN)
    same(g_hat, (GRADS[0] @ pinv_down.T + pinv_up.T @ GRADS[1]) / (2 * SCALE))
    e = 0.05 * g_hat / np.linalg.norm(g_hat)
    same(SCALE * e_up @ DOWN, e @ P_DOWN)
    rule = EFlat(GradientDescent(lr=0.01), rho=0.05, beta=0.9)
    up, down, state = step(rule)
    settled = rule.settle(up, down, state)
    same(settled[0], UP - 0.01 * GRADS[0])
    same(up - settled[0], 0.9 * e_up)
    assert settled[1] is down


def test_flat_noise():
    w = np.random.default_rng(0).standard_normal((40, 2000)) * np.arange(1, 41)[:, None]
    noise = flat_noise(w, sigma=0.3, rng=1)
    assert np.array_equal(noise, flat_noise(w, sigma=0.3, rng=1))
    ratio = np.linalg.norm(noise, axis=1) / np.linalg.norm(w, axis=1)
    assert np.all(abs(ratio - 0.3) <= 0.3 * 5 / np.sqrt(2 * 2000))
    # Outputs for white inputs get 1 + sigma^2 times the variance.
    x = np.random.default_rng(2).standard_normal((2000, 400))
    gain = np.mean(((w + noise) @ x) ** 2) / np.mean((w @ x) ** 2)
    assert abs(gain - 1.09) <= 0.02


# -- wrappers --


def test_clipping_depends_on_the_product_alone():
    norm = np.linalg.norm(tangent(G))
    rule = ScaledGD(lr=0.1)
    same(first_order(Clip(rule, max_norm=norm / 2)), first_order(rule) / 2)
    same(first_order(Clip(rule, max_norm=2 * norm)), first_order(rule))
