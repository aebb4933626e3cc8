"""The small parts that update rules are made of."""

import numpy as np
import pytest
import torch
from cases import gaussian, orthonormal
from scipy.linalg import solve_sylvester

from lowrank_sp.gauge import balance, geometric_mean
from lowrank_sp.updates import LoRAMuon, inverse_root, newton_schulz, newton_schulz_root, polar
from lowrank_sp.updates.frames import balance_of, frame, frames, gram, solve_left, solve_right
from lowrank_sp.updates.moments import Adam
from lowrank_sp.updates.projected import sylvester
from lowrank_sp.updates.rule import Pair
from lowrank_sp.updates.tangent import Tangent, point, project, project_gradient, retract


@pytest.fixture(params=["compiled", "portable"], autouse=True)
def route(request, monkeypatch):
    """Frames of float32 and Adam have a compiled route."""
    if request.param == "portable":
        monkeypatch.setattr("lowrank_sp.updates.frames.has_numba", lambda: False)


DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def adjoint(x):
    return np.conj(np.swapaxes(x, -1, -2))


def stretched(m, r, condition, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    complex_ = np.issubdtype(dtype, np.complexfloating)
    q = orthonormal(r, r, rng, complex_)
    return (gaussian(m, r, seed=seed, dtype=dtype) * np.geomspace(1, condition, r) @ q).astype(
        dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("shape", [(30, 4), (4, 4), (2, 3, 20, 5), (9, 1), (600, 7)])
def test_frame(shape, condition, dtype):
    x = gaussian(*shape, dtype=dtype)
    x = (x * np.geomspace(1, condition, shape[-1])).astype(dtype)
    found = frame(x)
    eps = np.finfo(dtype).eps
    q = x @ found.inverse
    assert np.linalg.norm(adjoint(q) @ q - np.eye(shape[-1])) <= 1e3 * eps * condition**0.5
    assert np.linalg.norm(q @ found.root - x) <= 1e3 * eps * np.linalg.norm(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_adam_is_that_of_its_authors(shape, dtype):
    grads = gaussian(3, *shape, dtype=dtype)
    adam = Adam(betas=(0.9, 0.999), eps=1e-3)
    # Laid out across memory, as the down factor of some rules is.
    state = {k: np.asfortranarray(x) for k, x in adam.init(grads[0]).items()}
    mean, square = 0.0, 0.0
    for t, g in enumerate(grads, 1):
        found, state = adam.turn(g, state, np.full(shape[:-2], t, np.int32))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * abs(g) ** 2
        expected = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-3)
        tol = 30 * np.finfo(dtype).eps
        assert found.dtype == state["mean"].dtype == dtype
        for a, b in ((found, expected), (state["mean"], mean), (state["square"], square)):
            assert np.linalg.norm(a - b) <= tol * np.linalg.norm(b)


LAYOUTS = {
    "across": lambda x: np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2),
    "every second row": lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :],
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "one block repeated": lambda x: np.broadcast_to(x[0], x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_block_does_not_matter(layout):
    x = LAYOUTS[layout](gaussian(3, 300, 6, dtype=np.float32))
    found, plain = frame(x), frame(x.copy(order="C"))
    assert np.array_equal(x @ found.inverse, x @ plain.inverse)
    assert np.array_equal(found.root, plain.root)


def test_derivatives_pass_through_frames():
    x = torch.from_numpy(gaussian(30, 3, dtype=np.float32)).requires_grad_()
    q = x @ frame(x).inverse.float()
    (slope,) = torch.autograd.grad(torch.trace(q.mT @ q), x)
    # The trace is 3 whatever x is.
    assert slope.abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_of_ill_conditioned_blocks_are_as_good_as_qr(dtype):
    """Squaring loses nothing: single precision is summed in double, double gets a second pass."""
    condition = 1e4
    x = stretched(40, 4, condition, dtype)
    q = x.astype(np.complex128) @ frame(x).inverse
    eps = np.finfo(dtype).eps
    assert np.linalg.norm(adjoint(q) @ q - np.eye(4)) <= 10 * condition * eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_of_any_length_do_no_harm(dtype):
    x = gaussian(20, 3, dtype=dtype) * np.array([1e-12, 1.0, 1e12], dtype)
    q = x @ frame(x).inverse
    assert np.linalg.norm(q.T @ q - np.eye(3)) <= 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("case", ["zero", "zero column", "repeated column", "wide"])
def test_null_directions_have_no_frame(case, xp):
    x = gaussian(10, 4)
    if case == "zero":
        x = 0 * x
    if case == "zero column":
        x[:, 1] = 0
    if case == "repeated column":
        x[:, 2] = 3 * x[:, 0] - x[:, 1]
    if case == "wide":
        x = x[:3]
    found = frame(xp.asarray(x))
    inverse, root = xp.host(found.inverse), xp.host(found.root)
    q = x @ inverse
    rank = np.linalg.matrix_rank(x)
    sizes = np.linalg.svd(q, compute_uv=False)
    assert np.allclose(sizes[:rank], 1, atol=1e-6)
    assert np.allclose(sizes[rank:], 0, atol=1e-6)
    assert np.linalg.norm(q @ root - x) <= 1e-6
    # x (x^H x)^+ is one-sided inverse on the range.
    back = xp.host(solve_right(xp.asarray(x), found)) @ x.T
    assert np.linalg.norm(back - x @ np.linalg.pinv(x)) <= 1e-6


def test_solves_take_weights():
    x, y = gaussian(8, 3), gaussian(3, 6, seed=1)
    of = frame(x)
    weights = np.array([[1.0, 2.0, 0.0]])
    inner = of.inverse @ np.diag(weights[0]) @ of.inverse.T
    assert np.allclose(solve_right(y.T, of, weights), y.T @ inner)
    assert np.allclose(solve_left(of, y, weights), inner @ y)
    assert np.allclose(solve_left(of, y), np.linalg.solve(x.T @ x, y))


def test_gram_is_summed_in_double_precision():
    x = np.ones((1000, 1), np.float32) * np.float32(1 + 2**-12)
    assert gram(x).dtype == np.float64
    assert abs(float(gram(x)[0, 0]) - 1000 * float(x[0, 0]) ** 2) <= 1e-9
    assert gram(gaussian(5, 2, dtype=np.complex64)).dtype == np.complex128


def test_ridge_of_a_frame():
    x = gaussian(9, 3)
    of = frame(x, ridge=0.4)
    expected = np.linalg.inv(x.T @ x + 0.4 * np.eye(3))
    assert np.allclose(of.inverse @ of.inverse.T, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_balance_from_frames(dtype):
    up, down = gaussian(12, 3, dtype=dtype), gaussian(3, 9, dtype=dtype, seed=1)
    pair = Pair(up, down)
    left, sigma, right, null = balance_of(pair, *frames(pair))
    assert not null.any()
    u, v = up @ left.inverse, adjoint(down) @ right.inverse
    assert np.allclose((u * sigma) @ adjoint(v), up @ down)
    for q in (u, v):
        assert np.allclose(adjoint(q) @ q, np.eye(3))
    other, _ = balance(up, down)
    assert np.allclose(sigma, np.sum(abs(other) ** 2, axis=0))


def test_geometric_mean_of_grams_is_that_of_the_frames():
    up, down = gaussian(12, 3), gaussian(3, 9, seed=1)
    pair = Pair(up, down)
    left, sigma, right, _ = balance_of(pair, *frames(pair))
    s = (right.inverse * sigma) @ right.inverse.T
    assert np.allclose(s, geometric_mean(np.linalg.inv(down @ down.T), up.T @ up))
    assert np.allclose(np.linalg.inv(s), (left.inverse * sigma) @ left.inverse.T)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_projection_on_the_tangent_space(dtype):
    up, down = gaussian(12, 3, dtype=dtype), gaussian(3, 9, dtype=dtype, seed=1)
    at = point(Pair(up, down))

    def dense(x):
        return (at.q_up @ x.core + x.left) @ adjoint(at.q_down) + at.q_up @ x.right

    def apply(g):
        return dense(project(at, g @ at.q_down, adjoint(at.q_up) @ g))

    g, h = gaussian(12, 9, dtype=dtype, seed=2), gaussian(12, 9, dtype=dtype, seed=3)
    assert np.allclose(apply(apply(g)), apply(g))
    assert np.isclose(np.vdot(apply(g), h), np.vdot(g, apply(h)))
    for inside in (up @ gaussian(3, 9, dtype=dtype), gaussian(12, 3, dtype=dtype) @ down):
        assert np.allclose(apply(inside), inside)
    grads = Pair(2 * g @ adjoint(down), 2 * adjoint(up) @ g)
    x = project_gradient(at, grads, 2.0)
    assert np.allclose(dense(x), apply(g))
    assert np.isclose(x.norm(), np.linalg.norm(apply(g)))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(12, 9, 3), (5, 4, 3), (6, 6, 6)])
def test_retraction_is_the_truncated_svd(shape, dtype):
    m, n, r = shape
    up, down = gaussian(m, r, dtype=dtype), gaussian(r, n, dtype=dtype, seed=1)
    at = point(Pair(up, down))
    g = gaussian(m, n, dtype=dtype, seed=2)
    x = project(at, g @ at.q_down, adjoint(at.q_up) @ g)
    new = retract(at, x, 0.9)
    step = (at.q_up @ x.core + x.left) @ adjoint(at.q_down) + at.q_up @ x.right
    u, s, vh = np.linalg.svd(0.9 * up @ down - step)
    assert np.allclose(new.up @ new.down, (u[:, :r] * s[:r]) @ vh[:r])
    assert np.allclose(new.down @ adjoint(new.down), np.eye(r))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_retraction_keeps_rows_that_it_does_not_need(rank, seed):
    down = gaussian(3, 9, seed=seed)
    at = point(Pair(np.zeros((12, 3)), down))
    left = gaussian(12, rank, seed=seed) @ gaussian(rank, 3, seed=seed + 9)
    new = retract(at, Tangent(np.zeros((3, 3)), left, np.zeros((3, 9))))
    assert np.allclose(new.up @ new.down, -left @ at.q_down.T)
    assert np.allclose(new.down @ np.linalg.pinv(down) @ down, new.down)
    assert np.allclose(new.down @ new.down.T, np.eye(3))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_sylvester(dtype):
    p, q = (gram(gaussian(9, 4, dtype=dtype, seed=s)) for s in (0, 1))
    c = gaussian(4, 4, dtype=dtype, seed=2)
    x = sylvester(p, q, c)
    assert np.linalg.norm(p @ x + x @ q - c) <= 1e-12 * np.linalg.norm(c) * np.linalg.cond(p)
    assert np.allclose(x, solve_sylvester(p, q, c))
    assert not np.any(sylvester(0 * p, 0 * q, 0 * c))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 5), (2, 7, 3)])
def test_polar(shape, dtype, xp):
    x = gaussian(*shape, dtype=dtype)
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    found = xp.host(polar(xp.asarray(x)))
    assert np.allclose(found, u @ vh)
    rough = np.linalg.svd(xp.host(newton_schulz(xp.asarray(x))), compute_uv=False)
    assert np.all((rough > 0.6) & (rough < 1.25))
    assert np.all(s > 0)


def test_polar_of_a_deficient_block_is_a_partial_isometry():
    x = gaussian(9, 2) @ gaussian(2, 4, seed=1)
    sizes = np.linalg.svd(polar(x), compute_uv=False)
    assert np.allclose(sizes, [1, 1, 0, 0], atol=1e-6)
    assert not np.any(polar(0 * x))
    assert not np.any(newton_schulz(0 * x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 30.0])
@pytest.mark.parametrize("root", [inverse_root, newton_schulz_root])
def test_inverse_roots(root, condition, dtype):
    x = stretched(40, 5, condition, dtype)
    q = x @ root(x)
    assert np.linalg.norm(adjoint(q) @ q - np.eye(5)) <= 100 * condition**2 * np.finfo(dtype).eps


def test_inverse_root_of_zeros_is_finite():
    assert np.all(np.isfinite(newton_schulz_root(np.zeros((4, 2), np.float32))))
    assert not np.any(inverse_root(np.zeros((4, 2), np.float32)))


def test_muon_by_matrix_products_alone_takes_nearly_the_same_step():
    up, down = stretched(20, 3, 10.0), stretched(15, 3, 10.0, seed=1).T
    g = gaussian(20, 15, seed=2)

    def step(**parts):
        rule = LoRAMuon(lr=0.1, **parts)
        new = rule.step(up, down, g @ down.T, up.T @ g, rule.init(up, down))
        return new[0] @ new[1] - up @ down

    exact = step()
    assert np.linalg.norm(step(root=newton_schulz_root) - exact) <= 1e-10 * np.linalg.norm(exact)
    rough = step(root=newton_schulz_root, polar=newton_schulz)
    assert np.linalg.norm(rough - exact) <= 0.35 * np.linalg.norm(exact)
