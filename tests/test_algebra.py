"""Algebra of updates: every result against the dense float64 computation, and its error too."""

import math
import tracemalloc
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import gaussian, orthonormal
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import merge_utils
from torch import nn

import lowrank_sp as lr
from lowrank_sp import SVD, LowRank, as_operator
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.adapters import pissa
from lowrank_sp.adapters.algebra import (
    adapter_overlap,
    add,
    average,
    base_energy,
    extract,
    intruders,
    merge,
    reduce_intruders,
    resize,
    subtract,
    sv_cumulative,
    sv_fro,
    sv_ratio,
)
from lowrank_sp.adapters.algebra.blocks import kth_largest

M, N, RANKS = 30, 22, (3, 3, 3)
WEIGHTS = [0.7, -0.4, 1.1]
DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
REAL = [np.float32, np.float64]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def pairs(dtype=np.float64, ranks=RANKS, shape=(M, N), seed=0):
    """Factor pairs of a few adapters."""
    m, n = shape
    return [
        (
            gaussian(m, r, seed=seed + 2 * i, dtype=dtype),
            gaussian(r, n, seed=seed + 2 * i + 1, dtype=dtype) / n**0.5,
        )
        for i, r in enumerate(ranks)
    ]


def updates(factors, asarray=np.asarray):
    return [LowRank(asarray(b), asarray(a)) for b, a in factors]


def wide(x):
    x = to_host(x.to_dense() if hasattr(x, "to_dense") else x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def dense(factors):
    return [wide(b) @ wide(a) for b, a in factors]


def best(a, rank):
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def norm(a):
    return float(np.linalg.norm(a))


def close(actual, expected, dtype, factor=300.0, scale=None):
    """Equal to a multiple of eps, relative to ``scale``."""
    scale = norm(expected) if scale is None else scale
    assert norm(wide(actual) - expected) <= factor * np.finfo(dtype).eps * scale


# -- the naive merges --


def naive_trim(a, density):
    k = max(1, int(density * a.size))
    return np.where(abs(a) >= np.sort(abs(a), axis=None)[-k], a, 0)


def naive_elect(terms):
    stack = np.stack(terms)
    sign = np.where(stack.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(stack) == sign
    return (stack * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def naive_ties(matrices, weights, density):
    return naive_elect([w * naive_trim(a, density) for w, a in zip(weights, matrices, strict=True)])


def naive_magnitude(matrices, weights, density):
    return sum(w * naive_trim(a, density) for w, a in zip(weights, matrices, strict=True))


def naive_sum(matrices, weights):
    return sum(w * a for w, a in zip(weights, matrices, strict=True))


def naive_knots(matrices, weights, rule, density):
    u, s, vh = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    keep = s > 1e-5 * s[0]
    u, coordinates = u[:, keep], s[keep, None] * vh[keep]
    return u @ rule(np.split(coordinates, len(matrices), axis=1), weights, density)


def naive_tsv(matrices, weights, each):
    found = [np.linalg.svd(a, full_matrices=False) for a in matrices]
    u = np.concatenate([f[0][:, :each] for f in found], axis=1)
    v = np.concatenate([f[2][:each].conj().T for f in found], axis=1)
    s = np.concatenate([w * f[1][:each] for f, w in zip(found, weights, strict=True)])
    polars = [left @ right for left, _, right in (np.linalg.svd(x, False) for x in (u, v))]
    return (polars[0] * s) @ polars[1].conj().T


def naive_linear(factors, weights):
    left = sum(abs(w) ** 0.5 * wide(b) for (b, _), w in zip(factors, weights, strict=True))
    right = sum(
        math.copysign(abs(w) ** 0.5, w) * wide(a)
        for (_, a), w in zip(factors, weights, strict=True)
    )
    return left @ right


@dataclass(frozen=True)
class Case:
    """A way of merging: ours, and the same on dense matrices in double precision."""

    ours: object
    naive: object  # of factors and weights: what the method is before its rank is cut
    rank: int | None = None
    share: float = 1.0
    complex_: bool = True
    gauge_free: bool = True


def of_dense(function, *options):
    return lambda factors, weights: function(dense(factors), weights, *options)


RULES = {
    "ties": (merge.ties(0.3), naive_ties, 1 / 3, False),
    "magnitude_prune": (merge.magnitude_prune(0.3), naive_magnitude, 1.0, True),
}
CASES = {
    "cat": Case(merge.cat, of_dense(naive_sum)),
    "svd": Case(lambda d, w: merge.svd(d, w, rank=4), of_dense(naive_sum), 4),
    "svd, exact": Case(lambda d, w: merge.svd(d, w), of_dense(naive_sum)),
    "linear": Case(merge.linear, naive_linear, gauge_free=False),
    "tsv": Case(merge.tsv, of_dense(naive_tsv, 3)),
    "tsv, two each": Case(lambda d, w: merge.tsv(d, w, rank=6), of_dense(naive_tsv, 2)),
}
for name, (rule, naive, share, complex_) in RULES.items():
    CASES[f"entrywise {name}"] = Case(
        lambda d, w, rule=rule: merge.entrywise(d, w, rule=rule, rank=5),
        of_dense(naive, 0.3),
        5,
        share,
        complex_,
    )
    CASES[f"knots {name}"] = Case(
        lambda d, w, rule=rule: merge.knots(d, w, rule=rule, rank=5),
        of_dense(naive_knots, naive, 0.3),
        5,
        share,
        complex_,
    )

merges = pytest.mark.parametrize("name", CASES)


def check_merge(case, factors, merged, dtype):
    full = case.naive(factors, WEIGHTS)
    value = full if case.rank is None else best(full, case.rank)
    exact = case.share * naive_sum(dense(factors), WEIGHTS)
    # Singular subspaces rotate by the rounding over the gap; every gap here is above 1 percent.
    close(merged.value, value, dtype, 3e4 if case.rank else 300, norm(full))
    close(merged.exact, exact, dtype)
    slack = 3e3 * np.finfo(dtype).eps * norm(full)
    assert abs(merged.error - norm(wide(merged.value) - exact)) <= slack
    assert abs(merged.truncation - norm(wide(merged.value) - full)) <= slack
    assert abs(merged.relative_error - merged.error / norm(exact)) <= slack


@merges
@dtypes
def test_merges_are_the_dense_ones(name, dtype):
    case = CASES[name]
    if not case.complex_ and np.issubdtype(dtype, np.complexfloating):
        with pytest.raises(TypeError, match="complex updates have no sign to elect"):
            case.ours(updates(pairs(dtype)), WEIGHTS)
        return
    factors = pairs(dtype)
    merged = case.ours(updates(factors), WEIGHTS)
    assert merged.value.dtype == dtype
    check_merge(case, factors, merged, dtype)


@merges
def test_merges_on_every_library(name, xp):
    factors = pairs()
    data = updates(factors, xp.asarray)
    merged = CASES[name].ours(data, WEIGHTS)
    for array in (*merged.value.factors(), *merged.exact.factors()):
        assert type(array) is type(data[0].left)
        assert array.device == data[0].left.device
        assert array.dtype == data[0].left.dtype
    check_merge(CASES[name], factors, merged, np.float64)


def regauged(factors, seed=5):
    rng = np.random.default_rng(seed)
    for b, a in factors:
        r = b.shape[1]
        g = orthonormal(r, r, rng) * np.linspace(0.5, 3.0, r) @ orthonormal(r, r, rng)
        yield b @ g, np.linalg.solve(g, a)


@merges
def test_gauge(name):
    """``B g, inv(g) A`` is the same update: every merge but that of the factors says so."""
    case, factors = CASES[name], pairs()
    one, two = (case.ours(updates(f), WEIGHTS) for f in (factors, list(regauged(factors))))
    change = norm(wide(one.value) - wide(two.value))
    if case.gauge_free:
        assert change <= 1e5 * np.finfo(float).eps * norm(wide(one.value))
        assert abs(one.error - two.error) <= 1e5 * np.finfo(float).eps * one.exact.norm()
    else:
        assert change > 0.1 * norm(wide(one.value))
        assert abs(one.error - two.error) > 0.05 * one.error


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
def test_merging_the_factors_depends_on_the_gauge(name):
    factors = pairs()
    one, two = (
        merge.factorwise(updates(f), WEIGHTS, rule=RULES[name][0])
        for f in (factors, list(regauged(factors)))
    )
    assert norm(wide(one.value) - wide(two.value)) > 0.1 * norm(wide(one.value))


@merges
def test_inputs_are_not_written_to(name):
    factors = [tuple(map(np.array, pair)) for pair in pairs()]
    CASES[name].ours(updates(factors), WEIGHTS)
    for pair, same in zip(factors, pairs(), strict=True):
        for x, y in zip(pair, same, strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "ours",
    [
        merge.cat,
        merge.svd,
        merge.linear,
        merge.tsv,
        lambda d, w: merge.knots(d, w, rule=merge.ties(1.0)),
        lambda d, w: merge.knots(d, w, rule=merge.dare(1.0)),
        lambda d, w: merge.entrywise(d, w, rule=merge.dare_ties(1.0), rank=3),
        lambda d, w: merge.entrywise(d, w, rule=merge.magnitude_prune(1.0), tol=1e-6),
    ],
)
@pytest.mark.parametrize("weight", [2.0, -0.5])
def test_one_update_is_its_own_merge(ours, weight):
    factors = pairs(ranks=(3,))
    merged = ours(updates(factors), [weight])
    close(merged.value, weight * dense(factors)[0], np.float64)
    assert merged.value.rank == 3
    assert merged.error <= 300 * np.finfo(float).eps * norm(dense(factors)[0])


@merges
def test_zero_updates_merge_to_zero(name):
    zero = [(np.zeros((M, 3)), gaussian(3, N))] * 3
    merged = CASES[name].ours(updates(zero), WEIGHTS)
    assert np.array_equal(wide(merged.value), np.zeros((M, N)))
    assert merged.error == merged.truncation == merged.relative_error == 0.0


@merges
def test_scale_of_the_updates(name):
    """Multiplying all updates by a power of two multiplies the merge by it, without over- or
    underflow.
    """
    factors = pairs(np.float32)
    for power in (2.0**-50, 2.0**50):
        scaled = [(np.float32(power) * b, np.float32(power) * a) for b, a in factors]
        one, two = (CASES[name].ours(updates(f), WEIGHTS) for f in (factors, scaled))
        close(wide(two.value) / power**2, wide(one.value), np.float32, 1e5)
        assert two.error == pytest.approx(power**2 * one.error, rel=1e-2, abs=0)


def test_ranks_may_differ():
    factors = pairs(ranks=(1, 4, 2))
    exact = naive_sum(dense(factors), WEIGHTS)
    for merged in (merge.cat(updates(factors), WEIGHTS), merge.svd(updates(factors), WEIGHTS)):
        assert merged.value.rank == 7
        close(merged.value, exact, np.float64)
    merged = merge.tsv(updates(factors), WEIGHTS, rank=6)
    assert merged.value.rank == 5
    assert merged.error == pytest.approx(norm(wide(merged.value) - exact), rel=1e-12)
    merged = merge.knots(updates(factors), WEIGHTS, rule=merge.magnitude_prune(1.0))
    close(merged.value, exact, np.float64)


def test_svd_merge_to_a_tolerance():
    factors = pairs()
    exact = naive_sum(dense(factors), WEIGHTS)
    s = np.linalg.svd(exact, compute_uv=False)
    merged = merge.svd(updates(factors), WEIGHTS, tol=0.3)
    rank = merged.value.rank
    assert norm(s[rank:]) <= 0.3 * norm(s) < norm(s[rank - 1 :])
    assert merged.relative_error == pytest.approx(norm(s[rank:]) / norm(s), rel=1e-12)


def test_equal_updates_agree():
    """What every merge but that of the factors is exact for: updates that do not interfere."""
    one = updates(pairs(ranks=(3,)))[0]
    truth = wide(one)
    close(merge.tsv([one] * 3, [0.2, 0.3, 0.5], rank=9).value, truth / 3, np.float64)
    for rule in (merge.ties(1.0), merge.dare_ties(1.0)):
        merged = merge.entrywise([one] * 3, rule=rule, rank=3)
        close(merged.value, truth, np.float64)
        close(merged.exact, truth, np.float64)
        assert merged.relative_error <= 300 * np.finfo(float).eps
        close(merge.knots([one] * 3, rule=rule).value, truth, np.float64)
    # (sum_i B)(sum_i A) counts every update three times too often.
    close(merge.linear([one] * 3).value, 9 * truth, np.float64)
    assert merge.linear([one] * 3).relative_error == pytest.approx(2.0)


def test_orthogonal_updates_keep_their_triplets():
    u, v = orthonormal(M, 6, np.random.default_rng(0)), orthonormal(N, 6, np.random.default_rng(1))
    s = np.array([5.0, 3.0, 4.0, 2.0, 6.0, 1.0])
    deltas = [LowRank(u[:, i : i + 2] * s[i : i + 2], v[:, i : i + 2].T) for i in (0, 2, 4)]
    merged = merge.tsv(deltas, WEIGHTS)
    close(merged.value, naive_sum([wide(d) for d in deltas], WEIGHTS), np.float64)
    assert merged.error <= 100 * np.finfo(float).eps * norm(s)


def test_a_zero_update_does_not_disturb_the_others():
    factors = pairs(ranks=(3, 3))
    deltas = updates(factors)
    zero = LowRank(np.zeros((M, 3)), gaussian(3, N))
    for ours in (merge.tsv, lambda d: merge.knots(d, rule=merge.magnitude_prune(0.5))):
        close(ours([*deltas, zero]).value, wide(ours(deltas).value), np.float64, 3e3)


# -- rules by entries --


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["gaussian", "graded", "ties", "zero"])
def test_kth_largest(dtype, kind, xp, monkeypatch):
    monkeypatch.setattr("lowrank_sp.adapters.algebra.blocks._ENTRIES", 100)
    a = gaussian(23, 17, dtype=dtype)
    if kind == "graded":
        a = (a * 10.0 ** np.linspace(-30, 30, 17)).astype(dtype)
    elif kind == "ties":
        a = np.round(a.real).astype(dtype)
    elif kind == "zero":
        a = a * dtype(0)
    data = xp.asarray(a)
    ordered = np.sort(abs(a), axis=None)[::-1]
    for k in (1, 2, 100, 390, 391):
        assert kth_largest(lambda i, j: data[i:j, :], a.shape, k) == ordered[k - 1]


@pytest.mark.parametrize("rule", [merge.ties(0.3), merge.magnitude_prune(0.7)])
def test_blocks_do_not_matter(rule, monkeypatch):
    factors = pairs()
    whole = merge.entrywise(updates(factors), WEIGHTS, rule=rule, rank=4)
    monkeypatch.setattr("lowrank_sp.adapters.algebra.blocks._ENTRIES", 5 * N)
    parts = merge.entrywise(updates(factors), WEIGHTS, rule=rule, rank=4)
    close(parts.value, wide(whole.value), np.float64, 1e5)


def all_entries(deltas, weights, rule, rng=0):
    """The merged matrix before its rank is cut."""
    return wide(merge.entrywise(deltas, weights, rule=rule, rank=min(M, N), rng=rng).value)


def test_ties_by_hand():
    rows = [[4.0, -3.0, 1.0, 0.5], [2.0, 5.0, -1.5, 0.2], [-1.0, 2.0, 3.0, 0.1]]
    one = np.ones((1, 1))
    deltas = [LowRank(one, np.array([row])) for row in rows]
    merged = merge.entrywise(deltas, rule=merge.ties(0.5), rank=1).value
    # Kept: (4, -3), (2, 5), (2, 3); elected: +, +, +.
    assert np.allclose(wide(merged), [[3.0, 3.5, 3.0, 0.0]], rtol=1e-14)
    # A sum of zero elects the positive ones, as in PEFT.
    pair = [LowRank(one, np.array([[2.0, 1.0]])), LowRank(one, np.array([[-2.0, 3.0]]))]
    merged = merge.entrywise(pair, rule=merge.ties(1.0), rank=1).value
    assert np.allclose(wide(merged), [[2.0, 2.0]], rtol=1e-14)
    # A negative weight votes for the sign that it brings: now -4 against 2.
    merged = merge.entrywise(deltas, [-1.0, 1.0, 1.0], rule=merge.ties(0.5), rank=1).value
    assert np.allclose(wide(merged), [[-4.0, 10 / 3, 3.0, 0.0]], rtol=1e-14)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_entries_are_unbiased(density):
    m, n = 200, 150
    ones = [LowRank(np.full((m, 1), value), np.ones((1, n))) for value in (1.0, 10.0)]
    full = merge.entrywise(ones, rule=merge.dare(density), rank=n, rng=0)
    a = np.round(wide(full.value) * density, 6)
    assert set(np.unique(a)) == {0.0, 1.0, 10.0, 11.0}
    first, second = a % 10 == 1, a >= 10
    # Five standard deviations of a mean of m n draws.
    for kept in (first, second, first == second):
        share = (
            density**2 + (1 - density) ** 2 if kept is not first and kept is not second else density
        )
        assert abs(kept.mean() - share) <= 5 * math.sqrt(share * (1 - share) / (m * n))
    # ||M - E||_F^2 has the expected value m n (1 + 100) (1 / density - 1).
    expected = m * n * 101 * (1 / density - 1)
    assert full.error**2 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rule", [merge.dare(0.4), merge.dare_ties(0.4)])
def test_random_entries_depend_on_the_seed_alone(rule, xp):
    factors = pairs()
    reference = all_entries(updates(factors), WEIGHTS, rule)
    close(all_entries(updates(factors, xp.asarray), WEIGHTS, rule), reference, np.float64)
    single = [tuple(x.astype(np.float32) for x in pair) for pair in factors]
    close(all_entries(updates(single), WEIGHTS, rule), reference, np.float32)
    assert norm(all_entries(updates(factors), WEIGHTS, rule, rng=1) - reference) > 0.1


def test_random_entries_differ_between_updates_and_blocks(monkeypatch):
    monkeypatch.setattr("lowrank_sp.adapters.algebra.blocks._ENTRIES", N)
    ones = LowRank(np.ones((M, 1)), np.ones((1, N)))
    a = all_entries([ones], None, merge.dare(0.5))
    assert len(np.unique(a, axis=0)) == M
    both = all_entries([ones, ones], [1.0, -1.0], merge.dare(0.5))
    assert norm(both) > 1.0


# -- sums and sizes --


@dtypes
def test_resize(dtype, xp):
    b, a = pairs(dtype)[0]
    f = resize(LowRank(xp.asarray(b), xp.asarray(a)), rank=2)
    truth = dense([(b, a)])[0]
    close(f, best(truth, 2), dtype, 1e3, norm(truth))
    assert f.error == pytest.approx(norm(wide(f) - truth), rel=1e3 * float(np.finfo(dtype).eps))
    assert isinstance(f, SVD)
    assert f.s.dtype == xp.asarray(np.zeros(1, np.zeros(1, dtype).real.dtype)).dtype


def test_resize_of_a_batch():
    b, a = gaussian(4, M, 3), gaussian(4, 3, N, seed=1)
    f = resize(LowRank(b, a), rank=2)
    for i in range(4):
        assert f.error[i] == pytest.approx(norm(b[i] @ a[i] - best(b[i] @ a[i], 2)), rel=1e-12)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, torch.bfloat16])
def test_half_precision_is_computed_in_single(stored):
    b, a = pairs()[0]
    if stored is torch.bfloat16:
        b, a = (torch.asarray(x).to(stored) for x in (b, a))
        truth = (b.double() @ a.double()).numpy()
    else:
        b, a = b.astype(stored), a.astype(stored)
        truth = b.astype(float) @ a.astype(float)
    f = resize(LowRank(b, a), rank=3)
    assert to_host(f.s).dtype == np.float32
    close(f, truth, np.float32)
    close(merge.cat([LowRank(b, a)] * 2, [2.0, -1.0]).value, truth, np.float32)


def test_resize_keeps_an_svd():
    f = LowRank(*pairs()[0]).svd()
    assert np.array_equal(resize(f).u, f.u)
    assert resize(f, tol=0.5).rank < 3


def test_rules_for_the_rank():
    s = np.array([10.0, 6.0, 3.0, 1.0])
    assert [sv_ratio(s, t) for t in (1.5, 2.0, 4.0, 10.0, 11.0)] == [1, 2, 3, 3, 4]
    assert [sv_cumulative(s, t) for t in (0.4, 0.6, 0.9, 0.96, 1.0)] == [1, 2, 3, 4, 4]
    assert [sv_fro(s, t) for t in (0.8, 0.83, 0.95, 0.99, 1.0)] == [1, 2, 2, 3, 4]
    for rule in (sv_ratio, sv_cumulative, sv_fro):
        assert rule(np.zeros(4), 1.5 if rule is sv_ratio else 0.5) == 1


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.99])
def test_rules_keep_no_more_than_they_ask(share, xp):
    """The defining inequality holds for ``k`` and fails for ``k - 1``."""
    host = np.sort(abs(gaussian(40)))[::-1].copy()
    s = xp.asarray(host)
    held = np.cumsum(host) / np.sum(host)
    k = sv_cumulative(s, share)
    assert held[k - 1] >= share > (held[k - 2] if k > 1 else 0.0)
    held = np.sqrt(np.cumsum(host**2) / np.sum(host**2))
    k = sv_fro(s, share)
    assert held[k - 1] >= share > (held[k - 2] if k > 1 else 0.0)
    k = sv_ratio(s, 1 / share)
    assert host[k - 1] > share * host[0] >= host[k]


def test_add_and_average(xp):
    factors = pairs(ranks=(1, 2, 3))
    deltas, matrices = updates(factors, xp.asarray), dense(factors)
    close(add(deltas), sum(matrices), np.float64)
    close(add(deltas, WEIGHTS), naive_sum(matrices, WEIGHTS), np.float64)
    close(average(deltas), sum(matrices) / 3, np.float64)
    close(average(deltas, WEIGHTS), naive_sum(matrices, WEIGHTS) / sum(WEIGHTS), np.float64)
    assert add(deltas).rank == average(deltas).rank == 6


@pytest.mark.parametrize("alpha", [4, 7])
def test_pissa_to_plain_lora(alpha, xp):
    weight = xp.asarray(gaussian(M, N))
    start = pissa(weight, 4, alpha=alpha, rng=0)
    up = start.up + xp.asarray(0.1 * gaussian(M, 4, seed=1))
    down = start.down + xp.asarray(0.1 * gaussian(4, N, seed=2))
    tuned = wide(start.residual) + start.scale * wide(up) @ wide(down)
    plain = start.scale * subtract(LowRank(up, down), LowRank(start.up, start.down))
    assert plain.rank == 8
    close(plain, tuned - wide(weight), np.float64, 1e3, norm(wide(weight)))
    cut = subtract(LowRank(up, down), LowRank(start.up, start.down), rank=4)
    change = (tuned - wide(weight)) / start.scale
    assert cut.error == pytest.approx(norm(change - best(change, 4)), rel=1e-9)
    assert cut.error == pytest.approx(norm(change - wide(cut)), rel=1e-9)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_changes_keep_their_digits(size):
    rng = np.random.default_rng(0)
    b0, a0 = gaussian(M, 4, dtype=np.float32), gaussian(4, N, seed=1, dtype=np.float32)
    b, a = ((x * (1 + size * rng.standard_normal(x.shape))).astype(np.float32) for x in (b0, a0))
    truth = wide(b) @ wide(a) - wide(b0) @ wide(a0)
    f = subtract(LowRank(b, a), LowRank(b0, a0))
    close(f, truth, np.float32, 100)
    assert np.all(abs(f.s - np.linalg.svd(truth, compute_uv=False)[:8]) <= f.bounds)
    assert f.bounds[0] <= 1e3 * np.finfo(np.float32).eps * norm(truth)


def test_subtract_of_other_ranks_and_gauges():
    (b, a), (b0, a0), _ = pairs(ranks=(4, 2, 1))
    close(subtract(LowRank(b, a), LowRank(b0, a0)), b @ a - b0 @ a0, np.float64)
    moved, start = pairs(ranks=(3, 3))
    turned = next(iter(regauged([moved])))
    truth = moved[0] @ moved[1] - start[0] @ start[1]
    close(subtract(LowRank(*turned), LowRank(*start)), truth, np.float64, 1e3)


# -- extraction --


def weights(dtype=np.float64, size=0.01, rank=3):
    base = gaussian(M, N)
    change = size * gaussian(M, rank, seed=1) @ gaussian(rank, N, seed=2)
    return (base + change).astype(dtype), base.astype(dtype)


@dtypes
def test_extract(dtype, xp):
    tuned, base = (x + 0j * x if np.issubdtype(dtype, np.complexfloating) else x for x in weights())
    tuned, base = tuned.astype(dtype), base.astype(dtype)
    change = wide(tuned) - wide(base)
    f = extract(xp.asarray(tuned), xp.asarray(base), rank=2, rng=0)
    assert f.error == pytest.approx(norm(change - wide(f)), rel=1e-3)
    assert norm(change - wide(f)) <= norm(change - best(change, 2)) * (1 + 1e-4)
    assert type(f.u) is type(xp.asarray(base))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_error_of_an_extraction(stored):
    """Where the SVD looks at part of the matrix, the error is still computed."""
    m, n = 300, 200
    base = torch.asarray(gaussian(m, n)).to(stored)
    tuned = base + torch.asarray(0.1 * gaussian(m, 3, seed=1) @ gaussian(3, n, seed=2)).to(stored)
    change = (tuned.double() - base.double()).numpy()
    f = extract(tuned, base, rank=2, rng=0)
    assert f.u.dtype == torch.float32
    assert f.error == pytest.approx(norm(change - wide(f)), rel=1e-5)
    assert f.error <= norm(change - best(change, 2)) * (1 + 1e-4)


def test_extract_to_a_tolerance():
    tuned, base = weights()
    assert extract(tuned, base, tol=1e-6).rank == 3
    assert extract(tuned, base, tol=0.9).rank == 1


def test_extract_from_files_in_half_precision(tmp_path):
    tuned, base = weights(np.float16, size=0.1)
    names = []
    for name, x in (("tuned", tuned), ("base", base)):
        names.append(tmp_path / f"{name}.npy")
        np.save(names[-1], x)
    maps = [np.load(name, mmap_mode="r") for name in names]
    f = extract(*maps, rank=3, rng=0)
    change = wide(tuned) - wide(base)
    assert f.u.dtype == np.float32
    assert norm(change - wide(f)) <= norm(change - best(change, 3)) * (1 + 1e-4)
    assert f.error == pytest.approx(norm(change - wide(f)), rel=1e-5)


def test_extract_loses_no_digit_where_weights_are_close():
    """Single-precision weights whose difference is 2^-16 of them, in few bits."""
    rng = np.random.default_rng(0)
    base = (rng.integers(-128, 128, (M, N)) / 64).astype(np.float32)
    up, down = rng.choice([-1.0, 1.0], (M, 1)), rng.choice([-1.0, 1.0], (1, N))
    tuned = base + (2.0**-16 * up @ down).astype(np.float32)
    f = extract(tuned, base, rank=1)
    assert f.s[0] == pytest.approx(2.0**-16 * math.sqrt(M * N), rel=1e-6)
    assert f.error <= 1e-6 * f.s[0]


def test_extract_from_operators():
    tuned, base = weights()
    f = extract(as_operator(tuned), as_operator(base), rank=3)
    close(f, tuned - base, np.float64, 1e5)
    f = extract(tuned, as_operator(base), rank=3)
    close(f, tuned - base, np.float64, 1e5)


def test_extract_of_mixed_precision():
    tuned, base = weights()
    f = extract(tuned, base.astype(np.float16), rank=N)
    close(f, tuned - wide(base.astype(np.float16)), np.float64)


def test_extract_of_nothing():
    base = gaussian(M, N)
    f = extract(base, base, rank=2)
    assert np.array_equal(f.s, np.zeros(2))
    assert f.error == 0.0


# -- diagnostics --


def intruded(seed=0):
    """A weight with gaps, and an update whose first direction is new."""
    rng = np.random.default_rng(seed)
    u, v = orthonormal(M, N, rng), orthonormal(N, N, rng)
    weight = (u * np.linspace(20, 1, N)) @ v.T
    new = (orthonormal(M, 1, rng), orthonormal(N, 1, rng))
    left = np.concatenate([25 * new[0], 3 * u[:, :1]], axis=1)
    return weight, (left, np.concatenate([new[1].T, v[:, :1].T]))


def naive_similarity(weight, delta):
    u0, u = (np.linalg.svd(x, full_matrices=False)[0] for x in (weight, weight + delta))
    return abs(u.T @ u0).max(axis=1)


def test_intruders(xp):
    weight, (b, a) = intruded()
    truth = naive_similarity(weight, b @ a)[:10]
    data = xp.asarray(weight)
    delta = LowRank(xp.asarray(b), xp.asarray(a))
    found = intruders(data, delta, lr.truncated_svd(data), tol=1e-10, rng=0)
    assert np.allclose(to_host(found.similarity), truth, rtol=0, atol=1e-7)
    assert np.array_equal(to_host(found.similarity), to_host(found.bound))
    expected = [j for j in range(10) if truth[j] < 0.5]
    assert found.certain == found.possible == expected
    assert expected


@pytest.mark.parametrize("rank", [1, 5, 10, 21, 22])
def test_intruders_from_part_of_the_base(rank):
    weight, factors = intruded()
    delta = LowRank(*factors)
    truth = naive_similarity(weight, wide(delta))[:10]
    found = intruders(weight, delta, lr.truncated_svd(weight).truncate(rank), rng=0)
    assert np.all(found.similarity <= truth + 1e-7)
    assert np.all(truth <= found.bound + 1e-7)
    assert set(found.certain) <= {j for j in range(10) if truth[j] < 0.5} <= set(found.possible)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_intruders_of_weights_in_lower_precision(dtype):
    weight, factors = intruded()
    data, delta = weight.astype(dtype), LowRank(*(x.astype(dtype) for x in factors))
    truth = naive_similarity(wide(data), wide(delta.left) @ wide(delta.right))[:10]
    found = intruders(data, delta, lr.truncated_svd(data), rng=0)
    # The base is decomposed to 4 sqrt(eps), and its vectors turn by that over their gaps.
    assert np.allclose(found.similarity, truth, rtol=0, atol=16 * eps(np.dtype(np.float32)) ** 0.5)


def test_reduced_intruders(xp):
    weight, (b, a) = intruded()
    data, delta = xp.asarray(weight), LowRank(xp.asarray(b), xp.asarray(a))
    found = intruders(data, delta, lr.truncated_svd(data), tol=1e-10, rng=0)
    u, s, vh = np.linalg.svd(weight + b @ a, full_matrices=False)
    chosen = [j for j, c in enumerate(naive_similarity(weight, b @ a)[:10]) if c < 0.5]
    target = b @ a - 0.4 * (u[:, chosen] * s[chosen]) @ vh[chosen]
    reduced = reduce_intruders(delta, found, keep=0.6, tol=1e-7)
    close(reduced, target, np.float64, 1e8)
    cut = reduce_intruders(delta, found, keep=0.6)
    assert cut.rank == 2
    assert cut.error == pytest.approx(norm(target - best(target, 2)), rel=1e-6)
    close(reduce_intruders(delta, found, keep=1.0), b @ a, np.float64)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_intruders_of_updates_of_more_terms_than_sides(shape):
    weight, delta = gaussian(*shape), other(ranks=(5,), shape=shape)
    found = intruders(weight, delta, lr.truncated_svd(weight), rank=2, threshold=0.99)
    reduced = reduce_intruders(delta, found, keep=0.5)
    triplets = found.certain
    u, s, vh = (part for part in found.merged)
    expected = wide(delta) - 0.5 * (u[:, triplets] * s[triplets]) @ vh[triplets]
    close(wide(reduced), expected, np.float64)


def test_directions(xp):
    factors = pairs()
    one, two = updates(factors, xp.asarray)[:2]
    bases = [np.linalg.svd(a, full_matrices=False) for a in dense(factors)[:2]]
    (u, _, v), (u2, _, v2) = ((f[0][:, :3], f[1], f[2][:3]) for f in bases)
    left, right = adapter_overlap(one, two)
    assert left == pytest.approx(norm(u.T @ u2) ** 2 / 3, rel=1e-12)
    assert right == pytest.approx(norm(v @ v2.T) ** 2 / 3, rel=1e-12)
    assert adapter_overlap(one, one) == pytest.approx((1.0, 1.0))
    left, _ = adapter_overlap(one, two, rank=1)
    assert left == pytest.approx(norm(u[:, :1].T @ u2[:, :1]) ** 2, rel=1e-10)
    # Directions that a factor pair has only in name do not count.
    padded = LowRank(
        *(
            xp.asarray(np.concatenate([x, x], axis))
            for x, axis in zip(factors[0], (1, 0), strict=True)
        )
    )
    assert adapter_overlap(padded, two).left == pytest.approx(norm(u.T @ u2) ** 2 / 3, rel=1e-9)


def test_energy_in_the_base(xp):
    weight, factors = intruded()
    delta = wide(factors[0]) @ wide(factors[1])
    u, _, vh = np.linalg.svd(weight, full_matrices=False)
    base = lr.truncated_svd(xp.asarray(weight))
    data = LowRank(*map(xp.asarray, factors))
    for rank in (1, 4, None):
        left, right = base_energy(data, base, rank=rank)
        assert left == pytest.approx((norm(u[:, :rank].T @ delta) / norm(delta)) ** 2, rel=1e-9)
        assert right == pytest.approx((norm(delta @ vh[:rank].T) / norm(delta)) ** 2, rel=1e-9)


# -- PEFT --

SCALES = {"one": (4, 8), "two": (4, 2), "three": (4, 4)}


def peft_model(factors, ranks=(4, 4, 4), weight=None):
    """One layer with three adapters of these factors."""
    model = nn.Sequential(nn.Linear(N, M, bias=False))
    if weight is not None:
        model[0].weight.data = torch.asarray(weight, dtype=torch.float32)
    adapted = None
    for (name, (_, alpha)), rank in zip(SCALES.items(), ranks, strict=False):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    layer = adapted.base_model.model[0]
    for name, (b, a) in zip(SCALES, factors, strict=False):
        layer.lora_B[name].weight.data = torch.asarray(b, dtype=torch.float32)
        layer.lora_A[name].weight.data = torch.asarray(a, dtype=torch.float32)
    return adapted, layer


def merged_by_peft(factors, kind, **options):
    adapted, layer = peft_model(factors, [b.shape[1] for b, _ in factors])
    adapted.add_weighted_adapter(list(SCALES), WEIGHTS, "new", combination_type=kind, **options)
    return layer, wide(layer.get_delta_weight("new"))


def scales(factors):
    return [alpha / b.shape[1] for (b, _), (_, alpha) in zip(factors, SCALES.values(), strict=True)]


def test_peft_cat():
    factors = pairs(np.float32, ranks=(4, 2, 3))
    deltas = [s * d for s, d in zip(scales(factors), updates(factors), strict=True)]
    _, expected = merged_by_peft(factors, "cat")
    close(merge.cat(deltas, WEIGHTS).value, expected, np.float32)


@pytest.mark.parametrize("rank", [3, 12])
def test_peft_svd(rank):
    factors = pairs(np.float32, ranks=(4, 4, 4))
    deltas = [s * d for s, d in zip(scales(factors), updates(factors), strict=True)]
    _, expected = merged_by_peft(factors, "svd", svd_rank=rank)
    merged = merge.svd(deltas, WEIGHTS, rank=rank)
    close(merged.value, expected, np.float32, 3e3)


@pytest.mark.parametrize("kind", ["linear", "magnitude_prune"])
def test_peft_merges_of_factors(kind):
    factors = pairs(np.float32, ranks=(4, 4, 4))
    total = [w * s for w, s in zip(WEIGHTS, scales(factors), strict=True)]
    if kind == "linear":
        layer, _ = merged_by_peft(factors, kind)
        ours = merge.linear(updates(factors), total).value
    else:
        layer, _ = merged_by_peft(factors, kind, density=0.4)
        ours = merge.factorwise(updates(factors), total, rule=merge.magnitude_prune(0.4)).value
    close(ours.left, wide(layer.lora_B["new"].weight), np.float32)
    close(ours.right, wide(layer.lora_A["new"].weight), np.float32)


def test_peft_rules():
    factors = pairs()
    tensors = [torch.asarray(a) for a in dense(factors)]
    ones = torch.ones(3, dtype=torch.float64)
    expected = merge_utils.ties(tensors, ones, 0.3)
    close(all_entries(updates(factors), None, merge.ties(0.3)), wide(expected), np.float64)
    expected = merge_utils.magnitude_prune(tensors, torch.asarray(WEIGHTS), 0.3)
    close(
        all_entries(updates(factors), WEIGHTS, merge.magnitude_prune(0.3)),
        wide(expected),
        np.float32,  # the weights, in PEFT
    )


@pytest.mark.parametrize("keep", [0.75, 0.3])
def test_peft_intruders(keep):
    weight, (b, a) = intruded()
    weight, b, a = (x.astype(np.float32) for x in (weight, b / 4, a))
    adapted, layer = peft_model([(b, a)], [2], weight)
    layer.scaling["one"] = 4.0
    reduce_intruder_dimension(adapted, "one", "less", mitigation_lambda=keep, logging_sink=None)
    expected = 4.0 * wide(layer.lora_B["less"].weight) @ wide(layer.lora_A["less"].weight)
    delta = 4.0 * LowRank(b, a)
    found = intruders(weight, delta, lr.truncated_svd(weight), tol=1e-6, rng=0)
    assert found.certain
    close(reduce_intruders(delta, found, keep=keep), expected, np.float32, 1e3)


@pytest.mark.parametrize("shape", [(N, M), (400, 6), (6, 400), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("ranks", [(2, 2), (5, 5)])
def test_shapes(shape, ranks):
    """Tall, wide, tiny; ranks that exceed the sides together or alone."""
    factors = pairs(ranks=ranks, shape=shape)
    deltas, weights = updates(factors), [0.7, -0.4]
    exact = naive_sum(dense(factors), weights)
    for ours in (merge.cat, merge.svd):
        close(ours(deltas, weights).value, exact, np.float64, 3e3)
    one = resize(deltas[0], rank=1)
    close(one, best(dense(factors)[0], 1), np.float64, 1e4)
    rule = merge.magnitude_prune(1.0)
    close(merge.knots(deltas, weights, rule=rule).value, exact, np.float64, 3e3)
    full = merge.entrywise(deltas, weights, rule=rule, rank=min(shape)).value
    close(full, exact, np.float64, 3e3)
    close(subtract(*deltas), dense(factors)[0] - dense(factors)[1], np.float64, 3e3)
    if min(shape) > 1:
        each = min(min(shape) // 2, *ranks)
        merged = merge.tsv(deltas, weights, rank=2 * each)
        close(merged.value, naive_tsv(dense(factors), weights, each), np.float64, 3e4)


def test_blocks_are_all_that_is_stored(monkeypatch):
    """A merge by entries in a fraction of the memory of the dense matrix."""
    monkeypatch.setattr("lowrank_sp.adapters.algebra.blocks._ENTRIES", 2**14)
    m, n = 2000, 1500
    deltas = updates(pairs(ranks=(2, 2), shape=(m, n)))
    merge.entrywise(updates(pairs()), rule=merge.ties(0.5), rank=2)  # loads what loads late
    tracemalloc.start()
    merged = merge.entrywise(deltas, rule=merge.ties(0.5), rank=2, rng=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert merged.value.rank == 2
    assert peak < m * n * 8 / 2


def test_parameters_of_a_model():
    b, a = (nn.Parameter(torch.asarray(x)) for x in pairs()[0])
    f = resize(LowRank(b, a), rank=2)
    assert not f.u.requires_grad
    for ours in (merge.linear, merge.tsv, lambda d: merge.knots(d, rule=merge.dare(0.5), rng=0)):
        assert not ours([LowRank(b, a)] * 2).value.factors()[0].requires_grad


# -- what has an update --


@dataclass(frozen=True)
class HasUpdate:
    """An adapter of some form."""

    update: object

    def delta(self):
        return self.update


def test_whatever_has_an_update_has_an_algebra():
    start = pissa(gaussian(M, N), 3, alpha=6)
    close(merge.cat([start, HasUpdate(start.delta())]).value, 2 * wide(start.delta()), np.float64)
    assert resize(start, rank=1).rank == 1
    assert adapter_overlap(start, start.svd) == pytest.approx((1.0, 1.0))
    with pytest.raises(TypeError, match="got HasUpdate with a delta that is a ndarray: updates"):
        merge.svd([start, HasUpdate(gaussian(M, N))], rank=3)


# -- refusals --


def good():
    return updates(pairs())


def other(**changes):
    return LowRank(*pairs(**changes)[0])


MERGES = {
    "cat": merge.cat,
    "svd": merge.svd,
    "linear": merge.linear,
    "tsv": merge.tsv,
    "knots": lambda d, w=None: merge.knots(d, w, rule=merge.ties(0.5)),
    "entrywise": lambda d, w=None: merge.entrywise(d, w, rule=merge.ties(0.5), rank=2),
    "factorwise": lambda d, w=None: merge.factorwise(d, w, rule=merge.ties(0.5)),
    "add": add,
    "average": average,
}


@pytest.mark.parametrize("ours", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize(
    ("deltas", "options", "error", "text"),
    [
        (lambda: [], None, ValueError, "needs at least one update, got none"),
        (
            lambda: [*good(), other(shape=(N, M))],
            None,
            ValueError,
            r"one shape, got \(30, 22\) and \(22, 30\) of update 3; those of different layers",
        ),
        (
            lambda: [good()[0], wide(good()[1])],
            None,
            TypeError,
            "must be a LowRank, or have a delta that is one, got a ndarray: updates of this",
        ),
        (
            lambda: [good()[0], other(dtype=np.float32)],
            None,
            TypeError,
            "one dtype, got float64 and float32 of update 1",
        ),
        (
            lambda: [good()[0], LowRank(*map(torch.asarray, pairs()[0]))],
            None,
            TypeError,
            "one array library",
        ),
        (
            lambda: [LowRank(np.ones((2, 5, 3)), np.ones((2, 3, 5)))],
            None,
            ValueError,
            r"must be one matrix, got shape \(2, 5, 5\); loop over the layers",
        ),
        (
            lambda: [LowRank(np.full((4, 1), np.nan), np.ones((1, 4)))],
            None,
            ValueError,
            "factors of an update must be finite",
        ),
        (good, [1.0, 2.0], ValueError, "one weight for each update, got 2 for 3"),
        (good, [1.0, 2.0, math.nan], ValueError, r"weights must be finite, got \[1.0, 2.0, nan\]"),
    ],
)
def test_what_does_not_add(ours, deltas, options, error, text):
    with pytest.raises(error, match=text):
        ours(deltas(), options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: resize(other(), rank=4), r"rank must be in 1\.\.3 for shape 30 x 22, got 4"),
        (lambda: resize(other(), tol=2.0), r"tol must be in \(0, 1\), got 2.0"),
        (lambda: average(good(), [1.0, -2.0, 1.0]), "must not sum to zero; use add"),
        (lambda: sv_ratio(np.ones(3), 0.5), "ratio must be finite and above 1, got 0.5"),
        (lambda: sv_fro(np.ones(3), 1.5), "share must be in"),
        (lambda: merge.ties(0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: merge.dare(1.5), r"density must be in \(0, 1\], got 1.5"),
        (
            lambda: merge.entrywise(good(), rule=merge.ties(0.5)),
            "have full rank: pass rank or tol",
        ),
        (
            lambda: merge.linear([other(), other(ranks=(2,))]),
            r"factors of one rank are needed to merge them, got ranks \[3, 2\]; use svd or cat",
        ),
        (
            lambda: merge.tsv(good(), rank=2),
            "rank must be at least the number of updates, 3, got 2",
        ),
        (
            lambda: merge.tsv(updates(pairs(ranks=(9, 9, 9)))),
            "at most 22 singular vectors can be orthogonal in shape 30 x 22, got 27; pass a rank",
        ),
        (lambda: extract(np.ones((3, 2)), np.ones((2, 3)), rank=1), "matrices must have one shape"),
        (lambda: extract(np.ones(3), np.ones(3), rank=1), "needs matrices"),
        (
            lambda: extract(np.full((3, 3), np.nan), np.ones((3, 3)), rank=1),
            "finite",
        ),
        (
            lambda: intruders(np.ones((3, 4)), other(), lr.truncated_svd(np.ones((3, 4)))),
            "weight, update and base must have one shape",
        ),
        (
            lambda: intruders(wide(other()), other(), other().svd(), threshold=1.0),
            "threshold must be in",
        ),
        (
            lambda: reduce_intruders(
                other(), intruders(wide(other()), other(), other().svd(), rank=1), keep=1.5
            ),
            "keep must be in",
        ),
        (
            lambda: adapter_overlap(LowRank(np.zeros((M, 2)), np.ones((2, N))), other()),
            "an update that is zero has no directions",
        ),
        (
            lambda: base_energy(other(), lr.truncated_svd(np.ones((3, 4)))),
            "update and base must have one shape",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
