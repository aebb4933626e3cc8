"""Laws of adapter forms: each is its formula, applied, merged, converted and differentiated."""

import dataclasses

import numpy as np
import pytest
import torch
from form_cases import random_values, weight_of
from form_cases_all import CASES
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

from lowrank_sp._arrays import dtype_name, namespace
from lowrank_sp.adapters import forms

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def drawn(case, dtype, xp):
    """A form with random values, the weight, and the update by its formula."""
    weight = weight_of(case, dtype)
    form = random_values(case.create(xp.asarray(weight), 0), xp.asarray)
    update = case.naive(host_arrays(form, xp.host), weight.astype(np.float64))
    return form, weight, update


@cases
@dtypes
def test_the_update_is_its_formula(case, dtype, xp):
    form, weight, update = drawn(case, dtype, xp)
    assert form.shape == case.shape
    check_update(form, update, dtype, xp.host)
    assert all(
        type(a) is type(xp.asarray(weight)) and namespace(a) is namespace(xp.asarray(weight))
        for a in form.arrays().values()
    )


@cases
def test_it_starts_as_published(case, xp):
    weight = weight_of(case)
    check_start(case.create(xp.asarray(weight), 0), case.zero, weight, xp.host)


@cases
def test_it_is_made_of_a_parameter_of_torch(case):
    weight = torch.nn.Parameter(torch.asarray(weight_of(case)))
    form = case.create(weight, 0)
    assert not any(a.requires_grad for a in form.parameters().values())


@cases
def test_one_seed_gives_one_start(case, xp):
    weight = weight_of(case)
    check_seed(case.create, weight, xp.asarray(weight), xp.host)


@cases
@dtypes
def test_applying_it_is_multiplying_by_it(case, dtype, xp):
    form, weight, update = drawn(case, dtype, xp)
    check_apply(form, update, weight, dtype, xp)


@cases
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_of_no_inputs_there_are_no_outputs(case, lead, xp):
    weight = weight_of(case)
    m, n = weight.shape
    form = case.create(xp.asarray(weight), 0)
    x, y = (xp.asarray(np.zeros((*lead, size))) for size in (n, m))
    assert tuple(form.apply(x).shape) == tuple(form.adapt(x, y).shape) == (*lead, m)


@cases
def test_parameters_in_half_precision_lose_nothing_more_when_they_are_merged(case):
    weight = weight_of(case, np.float32)
    form = random_values(case.create(torch.asarray(weight), 0), torch.asarray)
    half = {k: a.bfloat16() for k, a in form.parameters().items()}
    form = form.replace(half)
    host = {k: (a.double() if k in half else a).numpy() for k, a in form.arrays().items()}
    update = case.naive(host, weight.astype(np.float64))
    merged = form.merge(torch.asarray(weight)).numpy()
    assert np.linalg.norm(merged - weight - update) <= 1e-5 * np.linalg.norm(weight + update)
    delta = form.to_lora(2 if case.lora is None else None).form.delta()
    assert delta.dtype == torch.float32
    if case.lora is not None:
        error = np.linalg.norm(delta.to_dense().numpy() - update)
        assert error <= 1e-5 * np.linalg.norm(update)


@cases
@dtypes
def test_merging_and_back(case, dtype, xp):
    form, weight, update = drawn(case, dtype, xp)
    check_merge(form, update, weight, dtype, xp)


@cases
def test_trained_numbers_and_rank(case, host):
    weight = weight_of(case)
    form = case.create(weight, 0)
    assert form.num_trainable == case.num_trainable
    assert form.num_trainable == sum(np.size(a) for a in form.parameters().values())
    assert form.rank_bound == case.rank
    form = random_values(form, np.asarray)
    check_rank(form, case.rank if case.attained is None else case.attained, host)


@cases
@dtypes
def test_conversion_to_plain_lora(case, dtype, xp):
    form, _, update = drawn(case, dtype, xp)
    check_conversion(form, update, case.lora, dtype, xp)


@cases
def test_gradients_of_torch_and_jax_are_those_of_finite_differences(case):
    weight = weight_of(case)
    form = random_values(case.create(weight, 0), np.asarray)
    check_gradients(lambda asarray: case.create(asarray(weight), 0), [weight], form)


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
    first = next(name for name, a in form.arrays().items() if np.ndim(a))
    name = first.partition(".")[0]
    old = values[name]
    values[name] = (old[0][None], *old[1:]) if isinstance(old, tuple) else old[None]
    with pytest.raises(ValueError, match="must have shape"):
        type(form)(**values)
