"""Laws of adapter forms: each is its formula, applied, merged, converted and differentiated."""

import dataclasses

import form_cases_layers
import form_cases_rank
import form_cases_svd
import jax
import numpy as np
import pytest
import torch
from form_cases import random_values, weight_of

from lowrank_sp._arrays import dtype_name, eps, namespace
from lowrank_sp.adapters import forms
from lowrank_sp.operators import LinearOperator

CASES = [*form_cases_svd.CASES, *form_cases_rank.CASES, *form_cases_layers.CASES]
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def dense(form, host):
    delta = form.delta()
    return host(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


def host_arrays(form, host):
    return {
        name: host(a).astype(np.float64) if a.dtype in (np.float32, np.float64) else host(a)
        for name, a in ((name, host(a)) for name, a in form.arrays().items())
    }


def naive(case, form, weight, host):
    return case.naive(host_arrays(form, host), weight.astype(np.float64))


def close(x, y, dtype, factor=100.0):
    scale = max(np.linalg.norm(y), 1e-300)
    assert np.linalg.norm(np.asarray(x, np.float64) - y) <= factor * eps(dtype) * scale


@cases
@dtypes
def test_the_update_is_its_formula(case, dtype, xp):
    weight = weight_of(case, dtype)
    form = random_values(case.create(xp.asarray(weight), 0), xp.asarray)
    update = dense(form, xp.host)
    assert update.dtype == dtype
    assert update.shape == case.shape == form.shape
    close(update, naive(case, form, weight, xp.host), np.dtype(dtype))
    assert all(
        type(a) is type(xp.asarray(weight)) and namespace(a) is namespace(xp.asarray(weight))
        for a in form.arrays().values()
    )


@cases
def test_it_starts_as_published(case, xp):
    weight = weight_of(case)
    form = case.create(xp.asarray(weight), 0)
    size = np.linalg.norm(dense(form, xp.host))
    tiny = 1e3 * eps(np.dtype(np.float64)) * np.linalg.norm(weight)
    assert size <= tiny if case.zero else size > 1e3 * tiny


@cases
def test_one_seed_gives_one_start(case, xp):
    weight = weight_of(case)
    first, again = (case.create(xp.asarray(weight), 5).arrays() for _ in range(2))
    numpy_ = case.create(weight, 5).arrays()
    assert first.keys() == again.keys() == numpy_.keys()
    for name, a in first.items():
        assert np.array_equal(xp.host(a), xp.host(again[name]))
        np.testing.assert_allclose(
            np.asarray(xp.host(a), float), np.asarray(numpy_[name], float), atol=1e-12
        )


@cases
@dtypes
def test_applying_it_is_multiplying_by_it(case, dtype, xp):
    weight = weight_of(case, dtype)
    form = random_values(case.create(xp.asarray(weight), 0), xp.asarray)
    update = naive(case, form, weight, xp.host)
    rng = np.random.default_rng(3)
    for lead in ((), (5,), (2, 3)):
        x = rng.standard_normal((*lead, case.shape[1])).astype(dtype)
        y = form.apply(xp.asarray(x))
        assert tuple(y.shape) == (*lead, case.shape[0])
        close(xp.host(y), x @ update.T, np.dtype(dtype))
        adapted = form.adapt(xp.asarray(x), xp.asarray(x @ weight.T))
        close(xp.host(adapted), x @ (weight + update).T, np.dtype(dtype))


@cases
@dtypes
def test_merging_and_back(case, dtype, xp):
    weight = weight_of(case, dtype)
    form = random_values(case.create(xp.asarray(weight), 0), xp.asarray)
    merged = form.merge(xp.asarray(weight))
    close(xp.host(merged), weight + naive(case, form, weight, xp.host), np.dtype(dtype))
    close(xp.host(form.unmerge(merged)), weight, np.dtype(dtype))
    with pytest.raises(ValueError, match="shape"):
        form.merge(xp.asarray(weight[1:]))


@cases
def test_trained_numbers_and_rank(case, host):
    weight = weight_of(case)
    form = case.create(weight, 0)
    assert form.num_trainable == case.num_trainable
    assert form.num_trainable == sum(np.size(a) for a in form.parameters().values())
    assert form.rank_bound == case.rank
    form = random_values(form, np.asarray)
    rank = np.linalg.matrix_rank(dense(form, host), rtol=1e-10)
    assert rank == (case.rank if case.attained is None else case.attained)


@cases
@dtypes
def test_conversion_to_plain_lora(case, dtype, xp):
    weight = weight_of(case, dtype)
    form = random_values(case.create(xp.asarray(weight), 0), xp.asarray)
    update = naive(case, form, weight, xp.host)
    if case.lora is None:
        with pytest.raises(ValueError, match="rank or tol"):
            form.to_lora()
    else:
        exact = form.to_lora()
        assert exact.error == 0.0
        assert exact.form.up.shape[1] == case.lora
        close(dense(exact.form, xp.host), update, np.dtype(dtype))
    best = form.to_lora(2)
    s = np.linalg.svd(update, compute_uv=False)
    error = np.linalg.norm(dense(best.form, xp.host) - update)
    slack = 1e3 * eps(np.dtype(dtype)) ** 0.5 * np.linalg.norm(s)
    assert abs(error - np.linalg.norm(s[2:])) <= slack
    assert abs(best.error - error) <= slack
    loose = form.to_lora(tol=0.6)
    assert np.linalg.norm(dense(loose.form, xp.host) - update) <= 0.6 * np.linalg.norm(s) + slack


def loss(form, x, target):
    error = form.apply(x) - target
    return (error * error).sum() / 2


@cases
def test_gradients_of_torch_and_jax_are_those_of_finite_differences(case):
    weight = weight_of(case)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, case.shape[1]))
    target = rng.standard_normal((6, case.shape[0]))
    form = random_values(case.create(weight, 0), np.asarray)

    expected = {}
    for name, a in form.parameters().items():
        direction = rng.standard_normal(a.shape)
        # Fourth-order differences: enough for any form, polynomial or not.
        steps = {c: form.replace({name: a + c * 1e-3 * direction}) for c in (-2, -1, 1, 2)}
        f = {c: loss(moved, x, target) for c, moved in steps.items()}
        expected[name] = direction, (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / 12e-3

    theirs = case.create(torch.asarray(weight), 0)
    theirs = theirs.replace(
        {k: torch.tensor(v).requires_grad_() for k, v in form.parameters().items()}
    )
    loss(theirs, torch.asarray(x), torch.asarray(target)).backward()
    torches = {name: p.grad for name, p in theirs.parameters().items()}

    start = case.create(jax.numpy.asarray(weight), 0)

    def jax_loss(parameters):
        return loss(start.replace(parameters), jax.numpy.asarray(x), jax.numpy.asarray(target))

    parameters = {k: jax.numpy.asarray(v) for k, v in form.parameters().items()}
    jaxes = jax.jit(jax.grad(jax_loss))(parameters)

    for name, (direction, slope) in expected.items():
        for gradients in (torches, jaxes):
            found = float(np.sum(np.asarray(gradients[name]) * direction))
            assert abs(found - slope) <= 1e-7 * (abs(slope) + np.linalg.norm(direction)), name


@cases
def test_arrays_are_named_and_replaced(case):
    weight = weight_of(case)
    form = case.create(weight, 0)
    arrays = form.arrays()
    roles = (forms.Trained, forms.Fixed, forms.Weight)
    assert {k for role in roles for k in form.arrays(role)} == arrays.keys()
    assert form.parameters() == form.arrays(forms.Trained)
    same = form.replace(arrays)
    assert type(same) is type(form)
    assert all(same.arrays()[k] is a for k, a in arrays.items())
    with pytest.raises(ValueError, match="has the arrays"):
        form.replace({"nonsense": weight})
    assert dtype_name(weight.dtype) in {dtype_name(a.dtype) for a in arrays.values()}
    assert repr(form).startswith(type(form).__name__)


@cases
def test_wrong_shapes_are_refused(case):
    form = case.create(weight_of(case), 0)
    values = {f.name: getattr(form, f.name) for f in dataclasses.fields(form) if f.init}
    name = next(k for k, a in values.items() if isinstance(a, np.ndarray) and a.ndim)
    values[name] = values[name][None]
    with pytest.raises(ValueError, match="must have shape"):
        type(form)(**values)
