"""What holds for every adapter form, for single weights and for the layers of shared forms."""

import jax
import numpy as np
import pytest
import torch

from lowrank_sp._arrays import eps
from lowrank_sp.operators import LinearOperator


def dense(form, host):
    """The update as a dense array of NumPy."""
    delta = form.delta()
    return host(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


def host_arrays(form, host):
    """Arrays by name, in float64 where they are data."""
    return {
        name: host(a).astype(np.float64) if a.dtype in (np.float32, np.float64) else host(a)
        for name, a in ((name, host(a)) for name, a in form.arrays().items())
    }


def close(x, y, dtype, factor=100.0):
    scale = max(np.linalg.norm(y), 1e-300)
    assert np.linalg.norm(np.asarray(x, np.float64) - y) <= factor * eps(dtype) * scale


def check_update(form, update, dtype, host):
    found = dense(form, host)
    assert found.dtype == dtype
    assert found.shape == update.shape == form.shape
    close(found, update, np.dtype(dtype))


def check_start(form, zero, weight, host):
    size = np.linalg.norm(dense(form, host))
    tiny = 1e3 * eps(np.dtype(np.float64)) * np.linalg.norm(weight)
    assert size <= tiny if zero else size > 1e3 * tiny


def check_seed(create, here, there, host):
    """``create(weights, rng)`` gives the same twice, and the same on every library."""
    first, again = (create(there, 5).arrays() for _ in range(2))
    numpy_ = create(here, 5).arrays()
    assert first.keys() == again.keys() == numpy_.keys()
    for name, a in first.items():
        assert np.array_equal(host(a), host(again[name]))
        np.testing.assert_allclose(
            np.asarray(host(a), float), np.asarray(numpy_[name], float), atol=1e-12
        )


def check_apply(form, update, weight, dtype, xp):
    rng = np.random.default_rng(3)
    for lead in ((), (5,), (2, 3), (40,)):
        x = rng.standard_normal((*lead, weight.shape[1])).astype(dtype)
        y = form.apply(xp.asarray(x))
        assert tuple(y.shape) == (*lead, weight.shape[0])
        close(xp.host(y), x @ update.T, np.dtype(dtype))
        adapted = form.adapt(xp.asarray(x), xp.asarray(x @ weight.T))
        close(xp.host(adapted), x @ (weight + update).T, np.dtype(dtype))


def check_merge(form, update, weight, dtype, xp):
    merged = form.merge(xp.asarray(weight))
    close(xp.host(merged), weight + update, np.dtype(dtype))
    close(xp.host(form.unmerge(merged)), weight, np.dtype(dtype))
    with pytest.raises(ValueError, match="shape"):
        form.merge(xp.asarray(weight[1:]))


def check_conversion(form, update, lora, dtype, xp):
    """To plain LoRA: exactly, of rank ``lora``, unless that is None; and the best of rank 2."""
    if lora is None:
        with pytest.raises(ValueError, match="rank or tol"):
            form.to_lora()
    else:
        exact = form.to_lora()
        assert exact.error == 0.0
        assert exact.form.up.shape[1] == lora
        close(dense(exact.form, xp.host), update, np.dtype(dtype))
    best = form.to_lora(2)
    s = np.linalg.svd(update, compute_uv=False)
    error = np.linalg.norm(dense(best.form, xp.host) - update)
    slack = 1e3 * eps(np.dtype(dtype)) ** 0.5 * np.linalg.norm(s)
    assert abs(error - np.linalg.norm(s[2:])) <= slack
    assert abs(best.error - error) <= slack
    loose = form.to_lora(tol=0.6)
    assert np.linalg.norm(dense(loose.form, xp.host) - update) <= 0.6 * np.linalg.norm(s) + slack


def check_rank(form, bound, host):
    assert np.linalg.matrix_rank(dense(form, host), rtol=1e-10) == bound


def squares(form, pairs):
    """Half the squared error of one form on ``(x, target)``, or of all layers on one pair each."""
    forms = [form.layer(k) for k in range(form.num_layers)] if hasattr(form, "layer") else [form]
    errors = [f.apply(x) - target for f, (x, target) in zip(forms, pairs, strict=True)]
    return sum((e * e).sum() for e in errors) / 2


def check_gradients(create, weights, form):
    """Of PyTorch and JAX against fourth-order differences.

    ``create(asarray)`` makes the form from weights of a library; ``form`` has random values.
    """
    rng = np.random.default_rng(4)
    pairs = [
        (rng.standard_normal((6, w.shape[1])), rng.standard_normal((6, len(w)))) for w in weights
    ]

    expected = {}
    for name, a in form.parameters().items():
        direction = rng.standard_normal(a.shape)
        steps = {c: form.replace({name: a + c * 1e-3 * direction}) for c in (-2, -1, 1, 2)}
        f = {c: squares(moved, pairs) for c, moved in steps.items()}
        expected[name] = direction, (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / 12e-3

    theirs = create(torch.asarray)
    leaves = {k: torch.tensor(v).requires_grad_() for k, v in form.parameters().items()}
    theirs = theirs.replace(leaves)
    squares(theirs, [tuple(map(torch.asarray, pair)) for pair in pairs]).backward()
    torches = {name: p.grad for name, p in leaves.items()}

    start, on_jax = create(jax.numpy.asarray), [tuple(map(jax.numpy.asarray, p)) for p in pairs]
    jaxes = jax.jit(jax.grad(lambda parameters: squares(start.replace(parameters), on_jax)))(
        {k: jax.numpy.asarray(v) for k, v in form.parameters().items()}
    )

    for name, (direction, slope) in expected.items():
        for gradients in (torches, jaxes):
            found = float(np.sum(np.asarray(gradients[name]) * direction))
            assert abs(found - slope) <= 1e-7 * (abs(slope) + np.linalg.norm(direction)), name
