"""Forms and factorizations are pytrees that survive all that JAX does to trees."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from form_cases import random_values, weight_of
from form_cases_all import CASES, LAYERED
from form_cases_layers import weights_of

from lowrank_sp import SVD, LowRank
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import Fixed, Form, Trained
from lowrank_sp.adapters.quantize import double, int_affine, nf4
from lowrank_sp.adapters.serving import AdapterBank
from lowrank_sp.jax import trained, with_trained
from lowrank_sp.linalg import truncated_svd

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
layered_cases = pytest.mark.parametrize("case", LAYERED, ids=[case.name for case in LAYERED])


def close(x, y, factor=1e3):
    x, y = np.asarray(x), np.asarray(y)
    assert np.linalg.norm(x - y) <= factor * np.finfo(np.float64).eps * np.linalg.norm(y)


def numpy_form(case, seed=1):
    return random_values(case.create(weight_of(case), 0), np.asarray, seed)


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def inputs(case, seed=3):
    return np.random.default_rng(seed).standard_normal((5, case.shape[1]))


@cases
def test_forms_are_trees_of_their_arrays(case):
    form = numpy_form(case)
    leaves, tree = jax.tree.flatten(form)
    assert len(leaves) == len(form.arrays())
    assert {id(a) for a in leaves} == {id(a) for a in form.arrays().values()}
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is type(form)
    assert vars(again).keys() == vars(form).keys()
    assert jax.tree.structure(again) == tree
    assert hash(tree) == hash(jax.tree.structure(again))
    paths = [
        ".".join(str(getattr(k, "name", getattr(k, "idx", k))) for k in path)
        for path, _ in jax.tree.leaves_with_path(form)
    ]
    assert sorted(paths) == sorted(form.arrays())
    assert type(jax.tree.map(lambda _: None, form)) is type(form)


@cases
def test_forms_go_through_functions_and_their_gradients(case):
    form, x = numpy_form(case), inputs(case)
    target = np.random.default_rng(5).standard_normal((5, case.shape[0]))

    def loss(parameters, form):
        y = with_trained(form, parameters).apply(jnp.asarray(x))
        return ((y - target) ** 2).sum() / 2, y

    @jax.jit
    def step(form):
        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(trained(form), form)
        return y, gradient, jax.tree.map(lambda a: a + a, form)

    y, gradient, doubled = step(to_jax(form))
    expected = form.apply(x)
    close(y, expected)
    assert type(doubled) is type(form)
    for name, a in doubled.arrays().items():
        assert np.array_equal(a, 2 * form.arrays()[name])
    assert {k: g.shape for k, g in gradient.items()} == {
        k: a.shape for k, a in form.parameters().items()
    }
    # Along the gradient the loss falls by the step times the square of the gradient.
    square = sum(np.sum(np.asarray(g) ** 2) for g in gradient.values())
    h = 1e-4 / square**0.5
    values = []
    for sign in (-1, 1):
        moved = {k: a + sign * h * np.asarray(gradient[k]) for k, a in form.parameters().items()}
        values.append(((form.replace(moved).apply(x) - target) ** 2).sum() / 2)
    assert abs((values[1] - values[0]) / (2 * h * square) - 1) < 1e-4


@cases
def test_batches_of_forms(case):
    several = [numpy_form(case, seed) for seed in range(2)]
    xs = np.stack([inputs(case, seed) for seed in range(2)])
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *several)
    batch = jax.jit(jax.vmap(lambda form, x: form.apply(x)))(stacked, xs)
    for y, form, x in zip(batch, several, xs, strict=True):
        close(y, form.apply(x))


@layered_cases
def test_forms_of_many_layers(case):
    form = random_values(case.create(weights_of(case), 0), np.asarray)
    leaves, tree = jax.tree.flatten(form)
    assert len(leaves) == len(form.arrays())
    assert hash(tree) == hash(jax.tree.structure(to_jax(form)))
    xs = [np.ones((2, n)) for _, n in case.shapes]

    def outputs(form):
        return [form.layer(k).apply(jnp.asarray(x)) for k, x in enumerate(xs)]

    def loss(parameters, form):
        ys = outputs(with_trained(form, parameters))
        return sum((y**2).sum() for y in ys), ys

    both = jax.jit(lambda form: jax.grad(loss, has_aux=True)(trained(form), form))
    gradient, ys = both(to_jax(form))
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        close(y, form.layer(k).apply(x))
    assert {k: a.shape for k, a in gradient.items()} == {
        k: a.shape for k, a in form.parameters().items()
    }


@pytest.mark.parametrize("through_norm", [False, True])
def test_gradients_at_rows_and_columns_that_are_zero(through_norm):
    """Lengths have no derivative there; PyTorch takes zero for it, and so do the forms."""
    weight = np.random.default_rng(0).standard_normal((5, 4))
    weight[1] = weight[:, 2] = 0.0
    for kind in (forms.RowMagnitude, forms.BothMagnitudes):
        form = random_values(kind.create(weight, 2, through_norm=through_norm, rng=0), np.asarray)
        x = np.random.default_rng(1).standard_normal((3, 4))
        ours = to_jax(form)
        loss = jax.grad(lambda p, f, x: (with_trained(f, p).apply(x) ** 2).sum())
        gradient = loss(trained(ours), ours, x)
        theirs = form.replace({k: torch.tensor(a) for k, a in form.arrays().items()})
        leaves = {k: a.requires_grad_() for k, a in theirs.parameters().items()}
        (theirs.replace(leaves).apply(torch.tensor(x)) ** 2).sum().backward()
        for name, a in gradient.items():
            close(a, leaves[name].grad)


# Banks


def bank_of(xp, dtype=np.float64):
    rng = np.random.default_rng(0)
    pairs = [
        forms.Product(
            xp.asarray(rng.standard_normal((6, r)).astype(dtype)),
            xp.asarray(rng.standard_normal((r, 5)).astype(dtype)),
            0.5 * (k + 1),
        )
        for k, r in enumerate((2, 3, 2, 2))
    ]
    return AdapterBank.of(pairs)


#: Some adapters twice, one never, and a row without any.
IDS = np.array([0, 2, -1, 1, 0, 2, 0])


def test_banks_go_through_functions_and_their_gradients():
    rng = np.random.default_rng(1)
    x, target = rng.standard_normal((7, 3, 5)), rng.standard_normal((7, 3, 6))
    plain, bank = bank_of(np), bank_of(jnp)
    leaves, tree = jax.tree.flatten(bank)
    assert len(leaves) == 2
    assert tree == jax.tree.structure(bank_of(jnp))

    @jax.jit
    def both(bank, x):
        def loss(bank, x):
            y = bank.apply(x, IDS)
            return ((y - target) ** 2).sum() / 2, y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(bank, x)

    (_, y), (of_bank, of_x) = both(bank, jnp.asarray(x))
    close(y, plain.apply(x, IDS))
    assert isinstance(of_bank, AdapterBank)
    rest = y - target
    for k, name in enumerate(plain.names):
        product, rows = plain[name], k == IDS
        hidden = np.asarray(rest)[rows] @ product.up * product.scale
        down = np.einsum("tbr,tbn->rn", hidden, x[rows])
        up = np.einsum("tbm,tbr->mr", np.asarray(rest)[rows], x[rows] @ product.down.T)
        close(of_bank[name].down, down)
        close(of_bank[name].up, product.scale * up)
        close(np.asarray(of_x)[rows], hidden @ product.down)
    assert not np.any(np.asarray(of_x)[IDS < 0])
    assert not np.any(np.asarray(of_bank[3].down))


def test_banks_that_are_quantized_are_compiled():
    bank, x = bank_of(jnp).map(nf4), jnp.ones((7, 5))
    assert len(jax.tree.leaves(bank)) == 6
    close(jax.jit(lambda b, x: b.apply(x, IDS))(bank, x), bank.apply(x, IDS))
    half = bank_of(jnp).map(lambda a: a.astype(jnp.bfloat16))
    y = jax.jit(lambda b, x: b.apply(x, IDS))(half, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_matrices_that_are_quantized_are_trees():
    a = np.random.default_rng(0).standard_normal((6, 10))
    for q in (
        nf4(jnp.asarray(a), block=4),
        int_affine(jnp.asarray(a), block=4),
        double(nf4(jnp.asarray(a))),
    ):
        again = jax.tree.map(lambda x: x, q)
        assert type(again) is type(q)
        close(jax.jit(lambda q: q.to_dense())(q), q.to_dense())
        close(jax.jit(lambda q, x: q @ x)(q, jnp.ones((10, 2))), q @ jnp.ones((10, 2)))


def test_trees_of_forms_and_other_things():
    tree = {
        "q": [forms.FixedDown.create(jnp.ones((4, 3)), 2, rng=0), jnp.ones(3)],
        "head": jnp.zeros((2, 2)),
    }
    parameters = trained(tree)
    assert parameters["q"][1] is None
    assert parameters["head"] is None
    assert list(parameters["q"][0]) == ["up"]
    moved = with_trained(tree, jax.tree.map(lambda a: a + 1, parameters))
    assert jnp.array_equal(moved["q"][0].up, jnp.ones((4, 2)))
    assert moved["q"][0].down is tree["q"][0].down
    assert moved["q"][1] is tree["q"][1]
    assert moved["head"] is tree["head"]


def test_static_numbers_are_part_of_the_structure():
    forms_ = [forms.Product.create(jnp.ones((4, 3)), 2, alpha=alpha, rng=0) for alpha in (2, 2, 4)]
    first, same, other_ = map(jax.tree.structure, forms_)
    assert first == same != other_
    traced = []

    @jax.jit
    def apply(form, x):
        traced.append(form.scale)
        return form.apply(x)

    for form in forms_:
        apply(form, jnp.ones((1, 3)))
    assert traced == [1.0, 2.0]


def test_forms_defined_later_are_known():
    @dataclass(frozen=True, repr=False)
    class Late(Form):
        row: Trained[jax.Array, "..."]
        column: Fixed[jax.Array, "..."]
        offset: Fixed[jax.Array, "..."] = None

        @property
        def rank_bound(self):
            return 1

        def delta(self):
            return self.column[:, None] * self.row

        def apply(self, x):
            return (x @ self.row)[..., None] * self.column

    form = Late(jnp.arange(3.0), jnp.ones(2))
    assert len(jax.tree.leaves(form)) == 2
    gradient = jax.jit(jax.grad(lambda f: f.apply(jnp.ones(3)).sum()))(form)
    assert isinstance(gradient, Late)
    assert jnp.array_equal(gradient.row, 2 * jnp.ones(3))


def test_matrices_are_trees():
    a = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)))
    f = truncated_svd(a, 3, rng=0)
    product = f.split()
    for matrix in (f, product):
        again = jax.tree.map(lambda x: x, matrix)
        assert type(again) is type(matrix)
        close(jax.jit(lambda m: m.to_dense())(matrix), matrix.to_dense())
    assert isinstance(jax.jit(lambda m: m + m)(product), LowRank)
    assert isinstance(jax.jit(lambda m: m)(f), SVD)
    gradient = jax.grad(lambda m: m.inner(m).real)(product)
    close(gradient.left, 2 * (product.left @ product.right) @ product.right.mT)
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), product)
    dense = jax.vmap(partial(LowRank.to_dense))(batch)
    close(dense[1], 4 * product.to_dense())
