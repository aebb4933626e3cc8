"""Laws of updates in chosen subspaces: projectors, continual learning, safety, unlearning."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import torch
from cases import gaussian, orthonormal, with_spectrum
from form_laws import (
    check_apply,
    check_conversion,
    check_gradients,
    check_merge,
    check_rank,
    check_seed,
    check_start,
    check_update,
    host_arrays,
)

from lowrank_sp import LowRank
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.adapters import initializers, subspaces
from lowrank_sp.adapters._products import product_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.statistics import SecondMoment
from lowrank_sp.adapters.subspaces import (
    BlindProduct,
    Projector,
    SafeProduct,
    TrailingPart,
    input_span,
    restricted,
    span,
)
from lowrank_sp.linalg.spectrum import stable_rank

M, N, RANK = 14, 12, 3
DTYPES = [np.float32, np.float64, np.complex128]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def wide(a):
    a = to_host(a)
    return a.astype(np.result_type(a, np.float64))


def dense(delta):
    if isinstance(delta, Product):
        return delta.scale * wide(delta.up) @ wide(delta.down)
    return wide(delta.to_dense())


def adapter(dtype=np.float64, scale=2.0, seed=0):
    return Product(
        gaussian(M, RANK, seed=seed, dtype=dtype),
        gaussian(RANK, N, seed=seed + 1, dtype=dtype),
        scale,
    )


def on(xp, pair):
    return Product(xp.asarray(pair.up), xp.asarray(pair.down), pair.scale)


def regauged(pair, seed=5):
    g = gaussian(RANK, RANK, seed=seed) + 3 * np.eye(RANK)
    return Product(pair.up @ g, np.linalg.solve(g, pair.down), pair.scale)


def best(a, rank):
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def leading(a, energy):
    """The dense projector onto as few leading left singular vectors as hold a share of energy."""
    u, s, _ = np.linalg.svd(a)
    k = int(np.sum(np.cumsum(s**2) < energy * np.sum(s**2) * (1 - 1e-12))) + 1
    return u[:, :k] @ u[:, :k].conj().T


# ----------------------------------------------------------------------------------- projectors


@dtypes
@pytest.mark.parametrize("outside", [False, True])
def test_a_projector_is_idempotent_and_hermitian(dtype, outside, xp):
    v = orthonormal(N, 4, np.random.default_rng(0), np.issubdtype(dtype, np.complexfloating))
    p = Projector(xp.asarray(v.astype(dtype)), outside)
    tol = 50 * eps(np.dtype(dtype))
    matrix = wide(p.to_dense())
    expected = np.eye(N) - v @ v.conj().T if outside else v @ v.conj().T
    assert np.linalg.norm(matrix - expected) <= tol
    assert np.linalg.norm(matrix @ matrix - matrix) <= tol
    assert np.linalg.norm(matrix - matrix.conj().T) <= tol
    assert p.rank == (N - 4 if outside else 4)
    assert p.mH is p
    assert np.linalg.norm(wide(p.complement.to_dense()) + matrix - np.eye(N)) <= tol
    assert p.error <= tol
    x = gaussian(N, 2, dtype=dtype)
    assert np.linalg.norm(wide(p @ xp.asarray(x)) - expected @ x) <= tol * np.linalg.norm(x)
    # Arrays of the strict library do not hand products over to their right factor.
    rows = p.__rmatmul__(xp.asarray(x.T)) if xp.name == "strict" else xp.asarray(x.T) @ p
    assert np.linalg.norm(wide(rows) - x.T @ expected) <= tol * np.linalg.norm(x)
    product = p @ LowRank(xp.asarray(x), xp.asarray(x.T))
    assert isinstance(product, LowRank)
    basis = wide(p.range_basis())
    assert np.linalg.norm(basis @ basis.conj().T - expected) <= tol


@dtypes
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_span_holds_the_energy_that_was_asked_for(dtype, energy, xp):
    a = (gaussian(N, 7, dtype=dtype) * 2.0 ** -np.arange(7)).astype(dtype)
    p = span(xp.asarray(a), energy=energy)
    expected = leading(a.astype(np.result_type(a, np.float64)), energy)
    assert p.rank == round(np.trace(expected).real)
    assert np.linalg.norm(wide(p.to_dense()) - expected) <= 1e3 * eps(np.dtype(dtype))
    held = np.linalg.norm(wide(p.to_dense()) @ a) ** 2 / np.linalg.norm(a) ** 2
    assert held >= energy * (1 - 100 * eps(np.dtype(dtype)))


@dtypes
def test_a_growing_projector_is_the_dense_one(dtype, xp):
    """Energies are met task by task, the error stays at rounding, the complement takes over."""
    p, naive, switched = None, np.zeros((N, N)), False
    for task in range(6):
        a = gaussian(N, 3, seed=task, dtype=dtype) @ np.diag([4.0, 2.0, 1.0])
        a = a.astype(dtype)
        x = xp.asarray(a)
        p = span(x, energy=0.9) if p is None else p.grown(x, energy=0.9)
        # The same by dense matrices in double precision, one direction after the other.
        exact = a.astype(np.result_type(a, np.float64))
        u = np.linalg.svd(exact - naive @ exact)[0]
        for direction in u.T:
            held = np.linalg.norm(naive @ exact) ** 2
            if held >= 0.9 * np.linalg.norm(exact) ** 2:
                break
            naive = naive + np.outer(direction, direction.conj())
        assert np.linalg.norm(wide(p.to_dense()) - naive) <= 1e4 * eps(np.dtype(dtype))
        assert p.error <= 50 * eps(np.dtype(dtype))
        assert p.outside == (2 * p.rank >= N)
        assert p.basis.shape[1] <= N // 2
        switched = switched or p.outside
        assert p.basis.dtype == x.dtype
    assert switched


def test_storing_the_complement_changes_nothing():
    v = orthonormal(N, 4, np.random.default_rng(0))
    inside = Projector(v)
    outside = Projector(np.linalg.qr(v, mode="complete")[0][:, 4:], outside=True)
    a = gaussian(N, 4, seed=3)
    for arguments in ({}, {"rank": 2}, {"energy": 0.8}):
        one, two = inside.grown(a, **arguments), outside.grown(a, **arguments)
        assert one.rank == two.rank > 4
        assert np.linalg.norm(one.to_dense() - two.to_dense()) <= 1e-13
    moment = SecondMoment.of(gaussian(30, N)).mean
    forms = [
        subspaces.inflora((M, N), RANK, second_moment=moment, occupied=p) for p in (inside, outside)
    ]
    assert np.linalg.norm(np.abs(forms[0].down @ forms[1].down.T) - np.eye(3) / 3) <= 1e-12


def test_growing_until_nothing_is_left(xp):
    p = span(xp.asarray(gaussian(N, 3)))
    full = p.grown(xp.asarray(np.eye(N)))
    assert (full.rank, full.outside, full.basis.shape[1]) == (N, True, 0)
    assert np.linalg.norm(to_host(full.complement @ xp.asarray(np.eye(N)))) == 0.0
    assert full.grown(xp.asarray(np.eye(N))) is full
    assert p.grown(p.basis @ xp.asarray(gaussian(3, 5))) is p
    assert span(xp.asarray(np.zeros((N, 2)))).rank == 0
    # One direction of the two is new; no more than there are can be added.
    assert p.grown(xp.asarray(np.concatenate([to_host(p.basis), np.eye(N)[:, :1]], 1))).rank == 4
    assert p.grown(xp.asarray(gaussian(N, 2, seed=9)), rank=5).rank == 5


def test_a_span_of_operators_and_of_large_matrices():
    a = LowRank(gaussian(300, 4), gaussian(4, 200, seed=1))
    p = span(a)
    assert p.rank == 4
    assert np.linalg.norm(p @ a.left - a.left) <= 1e-12 * np.linalg.norm(a.left)
    grown = p.grown(LowRank(gaussian(300, 2, seed=2), gaussian(2, 200, seed=3)))
    assert grown.rank == 6
    decaying = with_spectrum(1.0 / np.arange(1, 101) ** 2, 300, 200)
    assert span(decaying, energy=0.999, rng=0).rank == round(np.trace(leading(decaying, 0.999)))


@dtypes
def test_the_span_of_inputs_is_that_of_their_second_moment(dtype, xp):
    x = (gaussian(40, N, dtype=dtype) * 2.0 ** -np.arange(N)).astype(dtype)
    moment = (x.T @ x.conj() / len(x)).astype(dtype)
    tol = 1e4 * eps(np.dtype(dtype))
    exact = x.astype(np.result_type(x, np.float64))
    for energy in (0.7, 0.97):
        expected = leading(exact.T, energy)
        for p in (
            input_span(inputs=xp.asarray(x), energy=energy),
            input_span(covariance=xp.asarray(moment), energy=energy),
        ):
            assert np.linalg.norm(wide(p.to_dense()) - expected) <= tol


@dtypes
def test_a_restricted_adapter_is_the_projected_update(dtype, xp):
    pair = adapter(dtype)
    v = span(xp.asarray(gaussian(N, 4, seed=2, dtype=dtype)))
    u = span(xp.asarray(gaussian(M, 5, seed=3, dtype=dtype)))
    found = restricted(on(xp, pair), inputs=v.complement, outputs=u)
    assert found.up.dtype == xp.asarray(pair.up).dtype
    expected = wide(u.to_dense()) @ dense(pair) @ wide(v.complement.to_dense())
    tol = 50 * eps(np.dtype(dtype))
    assert np.linalg.norm(dense(found) - expected) <= tol * np.linalg.norm(dense(pair))
    assert np.linalg.norm(wide(found.down) @ wide(v.basis)) <= tol * np.linalg.norm(pair.down)
    assert restricted(pair, outputs=span(gaussian(M, 2, dtype=dtype))).down is pair.down


def test_what_is_left_is_orthogonal_to_its_own_rounding(xp):
    """Rows that lie in the subspace up to 1e-8: once is not enough."""
    v = np.linalg.qr(gaussian(N, 4))[0]
    down = gaussian(RANK, 4, seed=1) @ v.T + 1e-8 * gaussian(RANK, N, seed=2)
    p = Projector(xp.asarray(v))
    found = to_host(restricted(on(xp, Product(gaussian(M, RANK), down)), inputs=p.complement).down)
    size = np.linalg.norm(found)
    assert 1e-9 < size < 1e-6
    assert np.linalg.norm(found @ v) <= 10 * eps(np.float64) * size
    assert np.linalg.norm((down - down @ v @ v.T) @ v) > 10 * eps(np.float64) * size


@pytest.mark.parametrize("sides", [("inputs",), ("outputs",), ("inputs", "outputs")])
def test_restriction_depends_on_the_product_only(sides):
    pair = adapter()
    spans = {"inputs": span(gaussian(N, 4, seed=2)), "outputs": span(gaussian(M, 4, seed=3))}
    chosen = {side: spans[side].complement for side in sides}
    one, two = (dense(restricted(p, **chosen)) for p in (pair, regauged(pair)))
    assert np.linalg.norm(one - two) <= 1e-12 * np.linalg.norm(one)


def test_projectors_may_be_wider_than_adapters():
    pair = adapter(np.float32)
    p = span(gaussian(N, 4))
    found = restricted(pair, inputs=p.complement)
    assert found.down.dtype == np.float32
    assert np.linalg.norm(found.down @ p.basis) <= 10 * eps(np.float32) * np.linalg.norm(pair.down)
    assert p.grown(gaussian(N, 1, seed=4).astype(np.float32)).dtype == np.float64


@pytest.mark.parametrize("outside", [False, True])
def test_projectors_in_single_precision_work_in_double(outside, xp):
    v = xp.asarray(np.linalg.qr(gaussian(N, 5))[0].astype(np.float32))
    p = Projector(v, outside)
    double = p.astype(xp.asarray(np.ones(1)).dtype)
    assert double.error <= 10 * eps(np.float64) < p.error
    assert np.linalg.norm(wide(double.to_dense()) - wide(p.to_dense())) <= 10 * eps(np.float32)
    removed = restricted(on(xp, adapter()), inputs=p.complement)
    assert np.linalg.norm(dense(removed) @ wide(double.to_dense())) <= 1e-13
    moment = xp.asarray(SecondMoment.of(gaussian(30, N)).mean)
    form = subspaces.inflora((M, N), 2, second_moment=moment, occupied=p)
    assert np.linalg.norm(wide(form.down) @ wide(double.to_dense())) <= 1e-15
    assert p.grown(xp.asarray(gaussian(N, 2, seed=3))).error <= 10 * eps(np.float64)


def test_other_forms_are_restricted_by_their_update():
    """Their ``up`` and ``down`` alone are not the update."""
    form = safe()
    assert np.allclose(product_of(form, "it").up, form.delta().left)
    p = span(gaussian(N, 4))
    found = dense(restricted(form, inputs=p))
    assert np.allclose(found, dense(form.delta()) @ p.to_dense())


# ----------------------------------------------------------------------------- continual learning


@dtypes
@pytest.mark.parametrize("power", [1, 2])
def test_the_penalty_is_its_sum(dtype, power, xp):
    down = gaussian(RANK, N, dtype=dtype)
    earlier = [gaussian(r, N, seed=r, dtype=dtype) for r in (2, 4)]
    expected = sum(
        abs(np.vdot(row, other)) ** power for a in earlier for row in a for other in down
    )
    for given in ([xp.asarray(a) for a in earlier], xp.asarray(np.concatenate(earlier))):
        found = subspaces.overlap_penalty(xp.asarray(down), given, power=power)
        assert abs(float(found) - expected) <= 100 * eps(np.dtype(dtype)) * expected
    assert float(subspaces.overlap_penalty(xp.asarray(down), [], power=power)) == 0.0


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_of_the_penalty(power):
    down, earlier = gaussian(RANK, N), gaussian(5, N, seed=1)
    overlap = earlier @ down.T
    expected = (2 * overlap if power == 2 else np.sign(overlap)).T @ earlier
    leaf = torch.tensor(down, requires_grad=True)
    subspaces.overlap_penalty(leaf, torch.tensor(earlier), power=power).backward()
    penalty = functools.partial(subspaces.overlap_penalty, earlier=earlier, power=power)
    traced = jax.jit(jax.grad(lambda d: penalty(d, earlier=jax.numpy.asarray(earlier))))(down)
    assert np.allclose(leaf.grad, expected, rtol=1e-12)
    assert np.allclose(traced, expected, rtol=1e-12)


def test_the_penalty_depends_on_the_gauge_and_its_zeros_do_not():
    pair, earlier = adapter(), gaussian(2, N, seed=1)
    other = regauged(pair)
    one, two = (float(subspaces.overlap_penalty(p.down, earlier)) for p in (pair, other))
    assert abs(one - two) > 1e-3 * one
    p = span(earlier.T).complement
    for q in (pair, other):
        free = restricted(q, inputs=p).down
        assert float(subspaces.overlap_penalty(free, earlier)) <= 1e-25


def test_the_projection_can_be_differentiated():
    p = span(gaussian(N, 4))
    down = torch.tensor(gaussian(RANK, N), requires_grad=True)
    up = torch.tensor(gaussian(M, RANK))
    on_torch = Projector(torch.tensor(p.basis)).complement
    weights = gaussian(RANK, N, seed=8)
    found = restricted(Product(up, down), inputs=on_torch).down
    (found * torch.tensor(weights)).sum().backward()
    assert np.allclose(down.grad, weights @ p.complement.to_dense(), rtol=1e-12)


@dtypes
@pytest.mark.parametrize("k", [0, 3, 7])
def test_inflora_is_its_formula_and_keeps_old_outputs(dtype, k, xp):
    """``k = 3`` removes a stored subspace, ``k = 7`` retains its stored complement."""
    old = gaussian(k, N, seed=1, dtype=dtype)
    new = gaussian(40, N, seed=2, dtype=dtype)
    moment = (new.T @ new.conj() / len(new)).astype(dtype)
    occupied = span(xp.asarray(old.T)) if k else None
    assert occupied is None or occupied.outside == (k == 7)
    weight = xp.asarray(gaussian(M, N, dtype=dtype))
    form = subspaces.inflora(weight, RANK, second_moment=xp.asarray(moment), occupied=occupied)
    assert form.down.dtype == weight.dtype
    assert not to_host(form.up).any()
    down = wide(form.down)
    q = np.linalg.qr(old.astype(moment.dtype).T)[0] if k else np.zeros((N, 0))
    free = wide(moment) - q @ (q.conj().T @ wide(moment))
    expected = best_projector(free, RANK) / 3
    tol = 1e4 * eps(np.dtype(dtype))
    assert np.linalg.norm(down.conj().T @ down - expected) <= tol
    assert list(form.parameters()) == ["up"]
    # Whatever is trained, outputs on the kept subspace are what they were.
    trained = form.replace({"up": xp.asarray(gaussian(M, RANK, dtype=dtype))})
    if k:
        y = wide(trained.apply(xp.asarray(old)))
        assert np.linalg.norm(y) <= tol * np.linalg.norm(old)
    assert np.linalg.norm(wide(trained.apply(xp.asarray(new)))) > 0.1


def best_projector(a, rank):
    u = np.linalg.svd(a)[0][:, :rank]
    return u @ u.conj().T


def test_inflora_where_little_of_the_inputs_is_free():
    """What is free has a millionth of the energy, and outputs are kept to rounding nonetheless."""
    old = gaussian(4, N)
    new = gaussian(40, 4, seed=1) @ old + 1e-6 * gaussian(40, N, seed=2)
    p = span(old.T)
    form = subspaces.inflora((M, N), 2, second_moment=new.T @ new / 40, occupied=p)
    assert np.linalg.norm(form.down @ p.basis) <= 1e-15
    assert np.linalg.norm(form.down @ form.down.T - np.eye(2) / 3) <= 1e-3
    # One direction has 1e-10 of the other one's part in the moment: its vector is found to 1e-6.
    graded = gaussian(40, 2, seed=3) @ np.diag([1.0, 1e-5]) @ gaussian(2, N, seed=4)
    form = subspaces.inflora((M, N), 2, second_moment=graded.T @ graded / 40, occupied=p)
    assert np.linalg.norm(form.down @ p.basis) <= 1e-15
    with pytest.raises(ValueError, match="only 0 directions of the inputs are free"):
        subspaces.inflora((M, N), 1, second_moment=old.T @ old, occupied=p)


def test_the_schedule_of_energies():
    energies = [subspaces.scheduled_energy(t, 4, first=0.9, last=0.98) for t in range(5)]
    assert np.allclose(energies, [0.9, 0.92, 0.94, 0.96, 0.98])
    with pytest.raises(ValueError, match=r"task must be in 0\.\.4, got 5"):
        subspaces.scheduled_energy(5, 4, first=0.9, last=1.0)
    with pytest.raises(ValueError, match="first and last"):
        subspaces.scheduled_energy(0, 4, first=0.0, last=1.0)


def test_an_update_in_the_null_space_of_inputs_changes_no_output(xp):
    x = xp.asarray(gaussian(5, N, seed=4))
    p = input_span(inputs=x).complement
    form = restricted(on(xp, adapter()), inputs=p)
    assert np.linalg.norm(to_host(form.apply(x))) <= 1e-13
    assert np.linalg.norm(dense(form)) > 1.0


# ----------------------------------------------------------------------------------------- safety


@dtypes
def test_alignment_is_a_projector_and_what_was_published_is_none(dtype, xp):
    unaligned = gaussian(M, N, dtype=dtype)
    moved = gaussian(M, 3, seed=1, dtype=dtype) @ gaussian(3, N, seed=2, dtype=dtype)
    aligned = (unaligned + moved).astype(dtype)
    v = aligned.astype(np.result_type(dtype, np.float64)) - unaligned
    tol = 1e3 * eps(np.dtype(dtype))

    c = wide(subspaces.alignment(xp.asarray(aligned), xp.asarray(unaligned), rank=3).to_dense())
    # V^H V has no inverse here; its pseudoinverse stands in the formula of the paper.
    paper = v @ np.linalg.pinv(v.conj().T @ v, rcond=1e-4, hermitian=True) @ v.conj().T
    assert np.linalg.norm(c - paper) <= 10 * tol
    assert np.linalg.norm(c @ c - c) <= tol

    operator = subspaces.published_alignment(xp.asarray(aligned), xp.asarray(unaligned))
    published = wide(operator.to_dense())
    expected = v @ v.conj().T / np.linalg.norm(v)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(published - expected) <= tol * size
    assert np.linalg.norm(published - published.conj().T) <= tol * size
    assert np.linalg.norm(published @ published - published) > 0.1 * size


def test_published_alignment_is_in_units_of_the_difference():
    v, zero = gaussian(M, N), np.zeros((M, N))
    one, two = (subspaces.published_alignment(a, zero).to_dense() for a in (v, 8 * v))
    assert np.allclose(two, 8 * one)
    assert np.allclose(
        *(subspaces.alignment(a, zero, rank=3).to_dense() for a in (v, 8 * v)), atol=1e-12
    )


@dtypes
@pytest.mark.parametrize("published", [False, True])
def test_the_gate_of_safe_lora(dtype, published, xp):
    aligned, unaligned = (gaussian(M, N, seed=s, dtype=dtype) for s in (3, 4))
    arrays = xp.asarray(aligned), xp.asarray(unaligned)
    if published:
        c = subspaces.published_alignment(*arrays)
    else:
        c = subspaces.alignment(*arrays, energy=0.6)
    pair = adapter(dtype)
    naive = wide(c.to_dense()) @ dense(pair)
    cosine = np.vdot(naive, dense(pair)).real
    cosine /= np.linalg.norm(naive) * np.linalg.norm(dense(pair))
    for threshold, projected in ((cosine - 0.01, False), (cosine + 0.01, True)):
        gated = subspaces.safe_lora(on(xp, pair), c, threshold=threshold)
        assert gated.projected is projected
        tol = 100 * eps(np.dtype(dtype))
        assert abs(gated.cosine - cosine) <= tol
        expected = naive if projected else dense(pair)
        assert np.linalg.norm(dense(gated.adapter) - expected) <= tol * np.linalg.norm(expected)
        assert gated.adapter.scale == pair.scale


def test_the_gate_depends_on_the_product_only():
    c = subspaces.alignment(gaussian(M, N), np.zeros((M, N)), rank=4)
    one, two = (subspaces.safe_lora(p, c, threshold=1.0) for p in (adapter(), regauged(adapter())))
    assert abs(one.cosine - two.cosine) <= 1e-12
    assert np.allclose(dense(one.adapter), dense(two.adapter))


def test_the_gate_of_extreme_updates():
    c = Projector(np.eye(M)[:, :2])
    zero = Product(np.zeros((M, 1)), np.ones((1, N)))
    assert subspaces.safe_lora(zero, c)[1:] == (1.0, False)
    away = Product(np.eye(M)[:, 5:6], np.ones((1, N)))
    gated = subspaces.safe_lora(away, c)
    assert gated[1:] == (0.0, True)
    assert not gated.adapter.up.any()
    inside = Product(np.eye(M)[:, :1], np.ones((1, N)))
    assert subspaces.safe_lora(inside, c).cosine == pytest.approx(1.0)
    half = Product(np.full((M, 1), 300.0, np.float16), np.full((1, N), 300.0, np.float16))
    cosine = subspaces.safe_lora(half, Projector(np.eye(M, 2, dtype=np.float32))).cosine
    assert cosine == pytest.approx((2 / M) ** 0.5, rel=1e-3)


@dtypes
def test_harmful_outputs_are_the_leading_ones(dtype, xp):
    weight, x = gaussian(M, N, dtype=dtype), gaussian(30, N, seed=1, dtype=dtype)
    moment = (x.T @ x.conj() / len(x)).astype(dtype)
    y = weight.astype(np.result_type(dtype, np.float64)) @ x.T
    expected = best_projector(y, 4)
    for given in ({"inputs": xp.asarray(x)}, {"covariance": xp.asarray(moment)}):
        p = subspaces.harmful_outputs(xp.asarray(weight), rank=4, **given)
        assert np.linalg.norm(wide(p.to_dense()) - expected) <= 1e4 * eps(np.dtype(dtype))


PROTECTED = np.linalg.qr(gaussian(M, 4, seed=6))[0]


def safe(asarray=np.asarray, dtype=np.float64, rng=0):
    weight = asarray(gaussian(M, N, seed=7).astype(dtype))
    p = Projector(asarray(PROTECTED.astype(dtype)))
    form = SafeProduct.create(weight, RANK, protected=p, alpha=6, rng=rng)
    up = asarray(gaussian(M, RANK, seed=8).astype(dtype))
    return form.replace({"up": up})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_laws_of_forms_hold_for_the_safe_product(dtype, xp):
    weight = gaussian(M, N, seed=7).astype(dtype)
    form = safe(xp.asarray, dtype)
    a = host_arrays(form, xp.host)
    u = a["protected"]
    update = 2.0 * (np.eye(M) - u @ u.T) @ a["up"] @ a["down"]
    check_update(form, update, dtype, xp.host)
    check_apply(form, update, weight, dtype, xp)
    check_merge(form, update, weight, dtype, xp)
    check_conversion(form, update, RANK, dtype, xp)
    if dtype == np.float64:
        check_rank(form, form.rank_bound, xp.host)
    assert form.rank_bound == RANK
    assert form.num_trainable == (M + N) * RANK
    tol = 100 * eps(np.dtype(dtype)) * np.linalg.norm(update)
    assert np.linalg.norm(u.T @ wide(form.delta().to_dense())) <= tol


def test_starts_and_gradients_of_the_safe_product(xp):
    weight = gaussian(M, N, seed=7)

    def create(w, rng):
        p = Projector(namespace_like(w, PROTECTED))
        return SafeProduct.create(w, RANK, protected=p, rng=rng)

    check_start(create(xp.asarray(weight), 0), True, weight, xp.host)
    check_seed(create, weight, xp.asarray(weight), xp.host)
    if xp.name == "numpy":
        check_gradients(safe, [weight], safe())


def namespace_like(like, a):
    if isinstance(like, np.ndarray):
        return a
    if isinstance(like, torch.Tensor):
        return torch.asarray(a)
    if isinstance(like, jax.Array):
        return jax.numpy.asarray(a)
    return like.__array_namespace__().asarray(a, device=like.device)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_task_aware_start_keeps_the_layer(dtype, xp):
    weight, x = gaussian(M, N, dtype=dtype), gaussian(40, N, seed=1)
    moment = SecondMoment.of(xp.asarray(x)).mean
    p = Projector(xp.asarray(PROTECTED.astype(dtype)))
    form, base = SafeProduct.for_task(
        xp.asarray(weight), RANK, protected=p, second_moment=moment, alpha=6
    )
    tol = 100 * eps(np.dtype(dtype)) * np.linalg.norm(weight)
    assert np.linalg.norm(wide(base) + dense(form.delta()) - weight) <= tol
    # Protected outputs come from the base alone.
    assert np.linalg.norm(PROTECTED.T @ (wide(base) - weight)) <= tol
    u = np.linalg.svd(weight @ x.T)[0][:, :RANK]
    expected = (np.eye(M) - PROTECTED @ PROTECTED.T) @ u @ u.T @ weight
    assert np.linalg.norm(dense(form.delta()) - expected) <= 100 * tol


# ---------------------------------------------------------- the trailing part of a weight, trained

KEPT = 4


def trailing(asarray=np.asarray, dtype=np.float64):
    """With random trained arrays, which the leading directions are part of."""
    form, _ = TrailingPart.of_weight(asarray(gaussian(M, N, seed=7).astype(dtype)), KEPT)
    r = N - KEPT
    sizes = {"up": (M, r), "values": (r, 1), "down": (r, N)}
    drawn = {name: gaussian(*size, seed=8).astype(dtype) for name, size in sizes.items()}
    drawn["values"] = drawn["values"][:, 0]
    return form.replace({name: asarray(a) for name, a in drawn.items()})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_laws_of_forms_hold_for_the_trailing_part(dtype, xp):
    weight = gaussian(M, N, seed=7).astype(dtype)
    form = trailing(xp.asarray, dtype)
    a = host_arrays(form, xp.host)
    u, vh = a["kept_up"], a["kept_down"]
    middle = a["up"] @ np.diag(a["values"]) @ a["down"]
    update = (np.eye(M) - u @ u.T) @ middle @ (np.eye(N) - vh.T @ vh)
    check_update(form, update, dtype, xp.host)
    check_apply(form, update, weight, dtype, xp)
    check_merge(form, update, weight, dtype, xp)
    check_conversion(form, update, N - KEPT, dtype, xp)
    if dtype == np.float64:
        check_rank(form, form.rank_bound, xp.host)
    assert form.rank_bound == N - KEPT
    assert form.num_trainable == (M + N + 1) * (N - KEPT)
    # Whatever is trained, leading directions read and write what they did.
    found = wide(form.delta().to_dense())
    tol = 100 * eps(np.dtype(dtype)) * np.linalg.norm(middle)
    assert np.linalg.norm(u.T @ found) <= tol
    assert np.linalg.norm(found @ vh.T) <= tol
    if xp.name == "numpy" and dtype == np.float64:
        check_gradients(trailing, [weight], trailing())


@dtypes
@pytest.mark.parametrize("shape", [(M, N), (N, M), (N, N)])
def test_the_trailing_part_starts_where_the_weight_is(shape, dtype, xp):
    weight = gaussian(*shape, seed=7, dtype=dtype)
    form, base = TrailingPart.of_weight(xp.asarray(weight), KEPT)
    tol = 1e3 * eps(np.dtype(dtype)) * np.linalg.norm(weight)
    assert base.dtype == xp.asarray(weight).dtype
    assert np.linalg.norm(wide(base) + dense(form.delta()) - weight) <= tol
    assert np.linalg.norm(wide(base) - best(weight, KEPT)) <= tol
    x = gaussian(3, shape[1], seed=1, dtype=dtype)
    y = to_host(form.apply(xp.asarray(x)))
    assert np.linalg.norm(y - x @ (weight - best(weight, KEPT)).T) <= 10 * tol
    assert TrailingPart.of_weight(weight).form.kept_up.shape[1] == N // 2


def osf_of(weight):
    """A linear layer that PEFT trains by OSF."""
    layer = torch.nn.Linear(weight.shape[1], len(weight), bias=False).double()
    layer.weight.data = torch.as_tensor(weight)
    config = peft.OSFConfig(target_modules=["0"], effective_rank=KEPT)
    return peft.get_peft_model(torch.nn.Sequential(layer), config)


@pytest.mark.parametrize("shape", [(M, N), (N, M), (N, N)])
def test_osf_of_peft_takes_the_same_path_by_gradient_descent_and_leaves_it_by_adam(shape):
    weight = gaussian(*shape, seed=7)
    rng = np.random.default_rng(0)
    x, y = (torch.as_tensor(rng.standard_normal((30, size))) for size in shape[::-1])
    kept = np.linalg.svd(weight)[0][:, :KEPT]

    def trained(parameters, loss, kind, lr):
        optimizer = kind(parameters, lr=lr)
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    for kind, lr in ((torch.optim.SGD, 0.05), (torch.optim.Adam, 0.02)):
        theirs = osf_of(weight)
        their = [p for p in theirs.parameters() if p.requires_grad]
        trained(their, lambda net=theirs: ((net(x) - y) ** 2).mean(), kind, lr)
        # PEFT computes the SVD in single precision.
        layer = theirs.base_model.model[0]
        change = layer.get_delta_weight("default").detach().numpy()
        form, base = TrailingPart.of_weight(torch.as_tensor(weight), KEPT)
        leaves = {k: p.clone().requires_grad_() for k, p in form.parameters().items()}
        ours = form.replace(leaves)
        trained(
            leaves.values(),
            lambda f=ours, b=base: ((f.adapt(x, x @ b.mT) - y) ** 2).mean(),
            kind,
            lr,
        )
        found = (base + ours.delta().to_dense()).detach().numpy() - weight
        off = np.linalg.norm(kept.T @ change) / np.linalg.norm(change)
        assert np.linalg.norm(kept.T @ found) <= 1e-12 * np.linalg.norm(weight)
        if kind is torch.optim.SGD:
            assert np.linalg.norm(found - change) <= 1e-5 * np.linalg.norm(change)
            assert off <= 1e-5
        else:
            assert off > 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_guarded_product_starts_at_the_weight_and_never_sees_what_is_hidden(dtype, xp):
    weight, harmful = gaussian(M, N).astype(dtype), gaussian(5, N, seed=1).astype(dtype)
    moment = harmful.T @ harmful / 5
    hidden = input_span(inputs=xp.asarray(harmful))
    form, base = BlindProduct.for_inputs(
        xp.asarray(weight), RANK, hidden=hidden, second_moment=xp.asarray(moment), alpha=6
    )
    tol = 1e3 * eps(np.dtype(dtype)) * np.linalg.norm(weight)
    assert np.linalg.norm(wide(base) + dense(form.delta()) - weight) <= tol
    assert np.linalg.norm((wide(base) - weight) @ harmful.T) <= 10 * tol
    v = np.linalg.qr(harmful.T.astype(np.float64))[0]
    start = initializers.corda_kpm(weight, RANK, second_moment=moment, alpha=6)
    first = dense(start.delta()) @ (np.eye(N) - v @ v.T)
    assert np.linalg.norm(dense(form.delta()) - first) <= 100 * tol
    # GuardSpace's W + (B A - B_0 A_0) P, for any B and A.
    drawn = {"up": gaussian(M, RANK, seed=2), "down": gaussian(RANK, N, seed=3)}
    trained = form.replace({name: xp.asarray(a.astype(dtype)) for name, a in drawn.items()})
    a = host_arrays(trained, xp.host)
    update = 2.0 * a["up"] @ a["down"] @ (np.eye(N) - a["hidden"] @ a["hidden"].T)
    check_update(trained, update, dtype, xp.host)
    check_apply(trained, update, weight, dtype, xp)
    check_merge(trained, update, weight, dtype, xp)
    check_conversion(trained, update, RANK, dtype, xp)
    assert (trained.rank_bound, trained.num_trainable) == (RANK, (M + N) * RANK)
    if dtype == np.float64:
        check_rank(trained, RANK, xp.host)
    merged = to_host(trained.merge(base)).astype(np.float64)
    assert np.linalg.norm((merged - weight) @ harmful.T) <= 100 * tol
    assert np.linalg.norm(wide(merged) - weight - (update - first)) <= 100 * tol


def test_gradients_of_the_guarded_product():
    def create(asarray=np.asarray):
        v = np.linalg.qr(gaussian(N, 4, seed=6))[0]
        factors = gaussian(M, RANK, seed=8), gaussian(RANK, N, seed=9)
        return BlindProduct(*map(asarray, (*factors, v)), 2.0)

    check_gradients(create, [gaussian(M, N)], create())


# ----------------------------------------------------------------------------- unlearning, spectra


def test_negation_is_a_sign(xp):
    pair = on(xp, adapter())
    found = subspaces.negated(pair, 0.7)
    assert found.up is pair.up
    assert found.scale == -0.7 * pair.scale
    assert np.linalg.norm(dense(found) + 0.7 * dense(pair)) <= 1e-14 * np.linalg.norm(dense(pair))
    weight = xp.asarray(gaussian(M, N, seed=5))
    back = subspaces.negated(pair).merge(pair.merge(weight))
    assert np.linalg.norm(to_host(back) - to_host(weight)) <= 1e-13
    one, two = (dense(subspaces.negated(p, 0.3)) for p in (adapter(), regauged(adapter())))
    assert np.allclose(one, two)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_importance_of_rows(dtype, xp):
    forget, retain = (gaussian(M, N, seed=s).astype(dtype) ** 2 for s in (0, 1))
    retain[0, 0] = 0.0
    found = subspaces.row_importance(xp.asarray(forget), xp.asarray(retain), damping=0.1)
    below = retain.astype(np.float64) + 0.1 * np.mean(retain, dtype=np.float64)
    expected = np.sqrt(np.sum(forget / below, axis=1))
    assert np.allclose(to_host(found), expected, rtol=100 * eps(np.dtype(dtype)))
    with pytest.raises(ValueError, match="retain must be positive"):
        subspaces.row_importance(xp.asarray(forget), xp.asarray(retain))


@dtypes
def test_fila_is_the_weighted_factorization(dtype, xp):
    weight = gaussian(M, N, dtype=dtype)
    d = (0.1 + np.arange(M) / 4).astype(np.zeros(1, dtype).real.dtype)
    exact = weight.astype(np.result_type(dtype, np.float64))
    tol = 1e3 * eps(np.dtype(dtype)) * np.linalg.norm(weight)
    start = subspaces.fila(xp.asarray(weight), RANK, importance=xp.asarray(d), alpha=6)
    expected = best(d[:, None] * exact, RANK) / d[:, None]
    assert np.linalg.norm(dense(start.delta()) - expected) <= tol
    assert np.linalg.norm(wide(start.residual) + dense(start.delta()) - exact) <= tol
    least = np.linalg.norm(d[:, None] * (exact - expected))
    assert abs(start.error - least) <= tol
    up, down = wide(start.up), wide(start.down)
    assert np.linalg.norm(up.conj().T @ up - down @ down.conj().T) <= tol
    scaled = subspaces.fila(xp.asarray(weight), RANK, importance=xp.asarray(4 * d), alpha=6)
    assert np.linalg.norm(dense(scaled.delta()) - expected) <= tol


def test_fila_with_rows_of_no_importance():
    weight, d = gaussian(M, N), np.where(np.arange(M) < 6, 1.0, 0.0)
    start = subspaces.fila(weight, RANK, importance=d)
    rows = weight[:6]
    assert abs(start.error - np.linalg.norm(rows - best(rows, RANK))) <= 1e-12
    assert np.linalg.norm(start.delta().to_dense()[:6] - best(rows, RANK)) <= 1e-12


FUNCTIONS = {
    "clipped": (lambda s: subspaces.clipped(s, 4.0), lambda s: np.minimum(s, 4.0)),
    "powered": (
        lambda s: subspaces.powered(s, 0.5),
        lambda s: s**0.5 * np.linalg.norm(s) / np.linalg.norm(s**0.5),
    ),
    "reversed": (lambda s: s[0] - s, lambda s: s[0] - s),
}


@dtypes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reweighting_is_a_function_of_dense_singular_values(name, dtype, xp):
    function, naive = FUNCTIONS[name]
    pair = adapter(dtype)
    u, s, vh = np.linalg.svd(dense(pair), full_matrices=False)
    s = s[:RANK]
    expected = (u[:, :RANK] * naive(s)) @ vh[:RANK]
    found = subspaces.reweighted(on(xp, pair), function)
    tol = 100 * eps(np.dtype(dtype)) * s[0]
    assert np.linalg.norm(dense(found) - expected) <= tol
    assert np.all(np.diff(to_host(found.s)) <= 0)
    assert abs(found.error - np.linalg.norm(expected - dense(pair))) <= tol
    if name != "reversed":
        assert np.linalg.norm(dense(found.split()) - expected) <= tol


def test_reweighting_depends_on_the_product_only():
    for function, _ in FUNCTIONS.values():
        one, two = (subspaces.reweighted(p, function) for p in (adapter(), regauged(adapter())))
        assert np.linalg.norm(dense(one) - dense(two)) <= 1e-11 * one.s[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_reach_a_stable_rank(dtype, xp):
    s = xp.asarray(np.array([5.0, 3.0, 2.0, 0.5, 0.0], dtype))
    tol = 100 * eps(np.dtype(dtype))
    for target in (1.1, 1.5, stable_rank(s), 3.0, 4.0):
        found = subspaces.at_stable_rank(s, target)
        assert abs(stable_rank(found) - target) <= 10 * tol
        assert np.linalg.norm(to_host(found)) == pytest.approx(38.25**0.5, rel=tol)
        assert to_host(found)[-1] == 0.0
    assert np.allclose(to_host(subspaces.at_stable_rank(s, stable_rank(s))), to_host(s), rtol=tol)
    for target in (0.9, 4.5):
        with pytest.raises(ValueError, match="target must be in 1"):
            subspaces.at_stable_rank(s, target)
    zero = xp.asarray(np.zeros(2, dtype))
    assert not to_host(subspaces.powered(zero, 0.5)).any()
    with pytest.raises(ValueError, match="target must be in 0"):
        subspaces.at_stable_rank(zero, 1.0)


# -------------------------------------------------------------------------------- what is refused

P = Projector(np.eye(N)[:, :2])
REFUSED = {
    "basis": (lambda: Projector(np.ones((4, 2))), "basis must be orthonormal"),
    "nan basis": (lambda: Projector(np.full((4, 2), np.nan)), "basis must be orthonormal"),
    "wide basis": (lambda: Projector(np.ones((2, 4))), "k <= n, got"),
    "integers": (lambda: Projector(np.eye(3, dtype=int)), "basis must be floating"),
    "both": (lambda: span(np.eye(3), rank=1, energy=0.5), "rank or energy, not both"),
    "energy": (lambda: span(np.eye(3), energy=1.5), "energy must be in"),
    "rank": (lambda: P.grown(np.eye(N), rank=11), r"rank must be in 1\.\.10"),
    "columns": (lambda: P.grown(np.eye(3)), "columns must have 12 entries, got 3"),
    "nan": (lambda: P.grown(np.full((N, 1), np.nan)), "columns must be finite"),
    "inputs": (lambda: input_span(), "exactly one of inputs"),
    "nowhere": (lambda: restricted(adapter()), "give inputs, outputs, or both"),
    "side": (lambda: restricted(adapter(), outputs=P), r"outputs must have shape \(14, 14\)"),
    "complex": (lambda: restricted(adapter(), inputs=P.astype(np.complex128)), "must be complex"),
    "no adapter": (lambda: restricted(SimpleNamespace(up=1), inputs=P), "must have up, down"),
    "power": (lambda: subspaces.overlap_penalty(np.eye(2), [], power=3), "power must be 1 or 2"),
    "rows": (lambda: subspaces.overlap_penalty(np.eye(2), np.eye(3)), "2 entries .* got 3"),
    "moment": (
        lambda: subspaces.inflora((M, N), 1, second_moment=np.eye(3)),
        r"second_moment must have shape \(12, 12\)",
    ),
    "occupied": (
        lambda: subspaces.inflora((M, 3), 1, second_moment=np.eye(3), occupied=P),
        r"occupied must have shape \(3, 3\)",
    ),
    "equal": (lambda: subspaces.alignment(np.eye(3), np.eye(3)), "no direction of alignment"),
    "equal, published": (
        lambda: subspaces.published_alignment(np.eye(3), np.eye(3)),
        "no direction of alignment",
    ),
    "shapes": (lambda: subspaces.alignment(np.eye(3), np.eye(4)), "must have one shape"),
    "protected": (
        lambda: SafeProduct.create((M, N), 1, protected=P),
        r"protected must have shape \(14, 14\)",
    ),
    "hidden": (
        lambda: BlindProduct.for_inputs(np.ones((M, 3)), 1, hidden=P, second_moment=np.eye(3)),
        r"hidden must have shape \(3, 3\)",
    ),
    "kept": (
        lambda: TrailingPart.of_weight(np.ones((3, 4)), 3),
        r"kept must be in 1\.\.2 for shape 3 x 4, got 3",
    ),
    "no weight": (lambda: TrailingPart.of_weight(np.full((3, 4), np.nan), 1), "must be finite"),
    "real weight": (
        lambda: subspaces.harmful_outputs(np.eye(3), inputs=1j * np.eye(3)),
        "weight must be complex",
    ),
    "strength": (lambda: subspaces.negated(adapter(), np.nan), "strength must be finite"),
    "fisher": (lambda: subspaces.row_importance(np.eye(3), np.eye(4)), "must have one shape"),
    "sign": (lambda: subspaces.row_importance(-np.eye(3), np.eye(3)), "forget must not be neg"),
    "importance": (
        lambda: subspaces.fila(np.eye(3), 1, importance=np.ones(2)),
        r"importance must have shape \(3,\)",
    ),
    "negative": (lambda: subspaces.reweighted(adapter(), lambda s: -s), "not negative"),
    "length": (lambda: subspaces.reweighted(adapter(), lambda s: s[:1]), "must return shape"),
    "clip": (lambda: subspaces.clipped(np.ones(2), -1.0), "largest must be finite"),
    "exponent": (lambda: subspaces.powered(np.ones(2), -1.0), "exponent must be finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
