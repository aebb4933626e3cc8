"""Laws of forms that layers share, layer by layer; their fits and their sweeps; single trains."""

import math

import numpy as np
import pytest
from cases import gaussian
from form_cases import random_values
from form_cases_layers import ATTENTION, LAYERED, MLP, OUT_HEADS, PAIRS, SLOTS, weights_of
from form_laws import (
    check_apply,
    check_conversion,
    check_gradients,
    check_merge,
    check_rank,
    check_seed,
    check_start,
    check_update,
    close,
    dense,
    host_arrays,
)

from lowrank_sp import LowRank, Stop
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import LayerGrid

cases = pytest.mark.parametrize("case", LAYERED, ids=[case.name for case in LAYERED])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def drawn(case, dtype, xp):
    """A form with random values, the weights, and the updates by their formula."""
    weights = weights_of(case, dtype)
    form = random_values(case.create([xp.asarray(w) for w in weights], 0), xp.asarray)
    arrays = host_arrays(form, xp.host)
    return form, weights, [case.naive(arrays, k) for k in range(len(weights))]


@cases
@dtypes
def test_every_layer_is_its_formula(case, dtype, xp):
    form, weights, updates = drawn(case, dtype, xp)
    assert form.num_layers == len(weights)
    for k, update in enumerate(updates):
        check_update(form.layer(k), update, dtype, xp.host)


@cases
def test_layers_start_as_published(case, xp):
    weights = weights_of(case)
    form = case.create([xp.asarray(w) for w in weights], 0)
    for k, weight in enumerate(weights):
        check_start(form.layer(k), case.zero, weight, xp.host)


@cases
def test_one_seed_gives_one_start(case, xp):
    weights = weights_of(case)
    check_seed(case.create, weights, [xp.asarray(w) for w in weights], xp.host)


@cases
@dtypes
def test_applying_a_layer_is_multiplying_by_it(case, dtype, xp):
    form, weights, updates = drawn(case, dtype, xp)
    for k, update in list(enumerate(updates))[:3]:
        check_apply(form.layer(k), update, weights[k], dtype, xp)


@cases
def test_merging_layers_and_back(case, xp):
    form, weights, updates = drawn(case, np.float64, xp)
    check_merge(form.layer(0), updates[0], weights[0], np.float64, xp)
    merged = form.merge([xp.asarray(w) for w in weights])
    for a, weight, update in zip(merged, weights, updates, strict=True):
        np.testing.assert_allclose(xp.host(a), weight + update, atol=1e-12)
    for a, weight in zip(form.unmerge(merged), weights, strict=True):
        np.testing.assert_allclose(xp.host(a), weight, atol=1e-12)
    with pytest.raises(ValueError, match="weights are needed"):
        form.unmerge(merged[1:])


@cases
def test_shared_numbers_are_counted_once_and_ranks_attained(case, host):
    form = case.create(list(case.shapes), 0)
    assert form.num_trainable == case.num_trainable
    form = random_values(form, np.asarray)
    bounds = [form.layer(k).rank_bound for k in range(form.num_layers)]
    assert form.rank_bound == max(case.lora)
    for k, rank in enumerate(case.lora):
        assert bounds[k] >= rank
        check_rank(form.layer(k), rank, host)


@cases
def test_every_layer_is_plain_lora(case, xp):
    form, _, updates = drawn(case, np.float64, xp)
    for exact, update, rank in zip(form.to_lora(), updates, case.lora, strict=True):
        assert exact.error == 0.0
        assert exact.form.up.shape[1] == rank
        close(dense(exact.form, xp.host), update, np.dtype(np.float64))
    if xp.name == "numpy":
        check_conversion(form.layer(0), updates[0], case.lora[0], np.float64, xp)


@cases
def test_gradients_of_torch_and_jax_are_those_of_finite_differences(case):
    weights = weights_of(case)
    form = random_values(case.create(weights, 0), np.asarray)
    check_gradients(lambda asarray: case.create([asarray(w) for w in weights], 0), weights, form)


def distance(form, deltas, host):
    return math.sqrt(
        sum(
            np.linalg.norm(dense(form.layer(k), host) - d.to_dense()) ** 2
            for k, d in enumerate(deltas)
        )
    )


def truth_of(form):
    """The updates of a form with random values, as trained adapters would hold them."""
    form = random_values(form, np.asarray)
    return [c.form.delta() for c in form.to_lora()]


EXACT = {
    "one axis": (forms.SharedTT.create_zero_up(MLP, 3, grid=SLOTS), forms.fit_shared_tt, 3, SLOTS),
    "two axes": (
        forms.SharedTT.create_zero_up(PAIRS.shapes, (2, 3, 2), grid=PAIRS),
        forms.fit_shared_tt,
        (2, 3, 2),
        PAIRS,
    ),
    "CP": (forms.SharedCP.create(MLP, 3, grid=SLOTS, rng=0), forms.fit_shared_cp, 3, SLOTS),
    "Tucker": (
        forms.SharedTucker.create(MLP, (2, 3, 3), grid=SLOTS, rng=0),
        forms.fit_shared_tucker,
        (2, 3, 3),
        SLOTS,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_fit_finds_the_layers_of_its_own_form(name, xp):
    form, fit, rank, grid = EXACT[name]
    deltas = truth_of(form)
    theirs = [LowRank(*map(xp.asarray, d.factors())) for d in deltas]
    solution = fit(theirs, rank, grid=grid, rng=0, stop=Stop(max_iter=200))
    found, error = solution.value
    size = math.sqrt(sum(float(d.norm()) ** 2 for d in deltas))
    assert type(found) is type(form)
    assert found.num_trainable == form.num_trainable
    assert type(found.up) is type(theirs[0].left)
    assert solution.converged
    assert error <= 1e-7 * size
    assert distance(found, deltas, xp.host) <= 1e-7 * size


@pytest.mark.parametrize("fit", [forms.fit_shared_tt, forms.fit_shared_cp, forms.fit_shared_tucker])
@pytest.mark.parametrize("grid", [LayerGrid.numbered([(12, 9)] * 6), None, PAIRS, OUT_HEADS])
def test_the_error_of_a_fit_is_the_distance_of_its_layers(fit, grid, host):
    rng = np.random.default_rng(0)
    shapes = [(12, 9)] * 6 if grid is None else grid.shapes
    deltas = [LowRank(rng.standard_normal((m, 2)), rng.standard_normal((2, n))) for m, n in shapes]
    found, error = fit(deltas, 2, grid=grid, rng=0).value
    size = math.sqrt(sum(float(d.norm()) ** 2 for d in deltas))
    assert 0.1 * size < error < size
    assert abs(distance(found, deltas, host) - error) <= 1e-12 * size


def test_free_cores_are_fitted_as_well_as_by_the_optimum_of_one_layer():
    rng = np.random.default_rng(0)
    delta = LowRank(rng.standard_normal((20, 6)), rng.standard_normal((6, 15)))
    _, error = forms.fit_shared_tt([delta], 3).value
    assert math.isclose(error, np.linalg.norm(delta.svd().s[3:]), rel_tol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, (2, 1, 2)])
def test_a_sweep_of_ranks_reports_its_error_and_is_nearly_the_best(rank, xp):
    start = random_values(forms.SharedTT.create_zero_up(PAIRS.shapes, 3, grid=PAIRS), np.asarray)
    deltas = truth_of(start)
    theirs = start.replace({name: xp.asarray(a) for name, a in start.arrays().items()})
    smaller, error = forms.truncate_shared_tt(theirs, rank)
    bonds = (rank,) * 3 if isinstance(rank, int) else rank
    assert (smaller.up.shape[1], *(c.shape[2] for c in smaller.cores)) == bonds
    assert abs(distance(smaller, deltas, xp.host) - error) <= 1e-12 * (1 + error)
    # All positions of the grid are layers: what an unfolding loses at least, and bonds times that.
    tensor = np.stack([d.to_dense() for d in deltas]).reshape(2, 2, 6, 5).transpose(2, 0, 1, 3)
    losses = [
        np.linalg.norm(np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False)[r:])
        for rows, r in zip((6, 12, 24), bonds, strict=True)
    ]
    assert max(losses) - 1e-12 <= error <= np.linalg.norm(losses) + 1e-12


def test_a_sweep_by_tolerance_keeps_it():
    start = random_values(forms.SharedTT.create_zero_up(PAIRS.shapes, 3, grid=PAIRS), np.asarray)
    size = math.sqrt(sum(float(d.norm()) ** 2 for d in truth_of(start)))
    smaller, error = forms.truncate_shared_tt(start, tol=0.5)
    assert smaller.num_trainable < start.num_trainable
    assert 0.0 < error <= 0.5 * size
    same, error = forms.truncate_shared_tt(start)
    assert error <= 1e-12 * size
    assert same.num_trainable <= start.num_trainable


def test_a_smaller_tucker_core_reports_its_error(xp):
    start = random_values(forms.SharedTucker.create(MLP, 3, grid=SLOTS), np.asarray)
    deltas = truth_of(start)
    size = math.sqrt(sum(float(d.norm()) ** 2 for d in deltas))
    theirs = start.replace({name: xp.asarray(a) for name, a in start.arrays().items()})
    smaller, error = forms.truncate_shared_tucker(theirs, (2, 2, 3))
    assert smaller.core.shape == (2, 2, 3)
    assert 0.0 < error < size
    assert abs(distance(smaller, deltas, xp.host) - error) <= 1e-12 * size
    _, error = forms.truncate_shared_tucker(theirs, tol=0.5)
    assert error <= 0.5 * size


def test_a_train_is_cut_out_of_a_factored_or_dense_update(xp):
    rng = np.random.default_rng(0)
    delta = LowRank(rng.standard_normal((12, 3)), rng.standard_normal((3, 8)))
    theirs = LowRank(*map(xp.asarray, delta.factors()))
    for given in (theirs, xp.asarray(delta.to_dense())):
        form, error = forms.fit_tensor_train(given, order=2)
        assert np.linalg.norm(dense(form, xp.host) - delta.to_dense()) <= 1e-12 * delta.norm()
        assert error <= 1e-12 * delta.norm()
        form, error = forms.fit_tensor_train(given, 2, inputs=(4, 2), outputs=(3, 4))
        found = np.linalg.norm(dense(form, xp.host) - delta.to_dense())
        assert abs(found - error) <= 1e-12 * delta.norm()
        assert form.rank_bound == 2


def test_a_shifted_weight_starts_where_it_was():
    weight = np.random.default_rng(0).standard_normal((12, 12))
    form, shifted = forms.PairGates.shifted(weight, order=3, rng=0)
    np.testing.assert_allclose(form.merge(shifted), weight, atol=1e-13)
    assert np.linalg.norm(shifted - weight) > 0.1
    beside = forms.PairGates.create(weight, order=3, rng=0)
    assert form.num_trainable == beside.num_trainable
    # Training in place must not move the fixed copy.
    assert not any(map(np.shares_memory, beside.gates, beside.start))


def test_few_and_many_inputs_take_both_ways_to_one_result():
    """Contracting the cores, and multiplying them out first."""
    rng = np.random.default_rng(0)
    made = [
        forms.TensorTrain.create((64, 64), 6, rng=0),
        forms.TrainMatrix.create((64, 64), 16, rng=0),
        forms.TrainFactors.create((64, 64), 8, bond=6, rng=0),
        forms.PairGates.create((64, 64), order=3, rng=0),
        forms.PairGates.create((64, 64), axes=(8, 8), rng=0),
    ]
    for form in made:
        form = random_values(form, np.asarray)
        update = np.asarray(dense(form, np.asarray))
        for count in (1, 3, 2000):
            x = rng.standard_normal((count, 64))
            found, wanted = form.apply(x), x @ update.T
            assert np.linalg.norm(found - wanted) <= 1e-12 * np.linalg.norm(wanted)


def test_sizes_are_split_into_factors():
    for size in (1, 7, 12, 768, 4096, 11008):
        for order in (1, 2, 3, 4):
            factors = forms.factorized(size, order)
            assert len(factors) == order
            assert math.prod(factors) == size
    assert forms.factorized(4096, 3) == (16, 16, 16)


def test_identity_cores_make_one_product_of_all_layers():
    """MetaTT begins as a single pair of factors for all layers, of which one is zero."""
    form = forms.SharedTT.create_identity(PAIRS.shapes, 3, grid=PAIRS)
    down = np.random.default_rng(0).standard_normal((3, 5))
    form = form.replace({"down": down})
    for k in range(4):
        np.testing.assert_array_equal(form.layer(k).delta().to_dense(), np.eye(6, 3) @ down)


@pytest.mark.parametrize(
    ("form", "trained"),
    [
        (forms.Tied, {"up", "down", "outputs", "terms"}),
        (forms.TiedFactors, {"up", "down"}),
        (forms.TiedGains, {"outputs", "terms"}),
        (forms.TiedUp, {"up", "outputs", "terms"}),
        (forms.TiedDown, {"down", "outputs", "terms"}),
    ],
)
def test_what_of_tied_factors_is_trained_is_their_type(form, trained, host):
    made = form.create(list(ATTENTION), 3, rng=0)
    assert made.parameters().keys() == trained
    assert not any(np.any(dense(made.layer(k), host)) for k in range(4))
    # Some trained array moves the update away from zero.
    moved = [made.replace({name: a + 1.0}) for name, a in made.parameters().items()]
    assert any(np.any(dense(f.layer(1), host)) for f in moved)


ERRORS = {
    "no weights": (lambda: LayerGrid.numbered([]), "at least one weight"),
    "too few indices": (lambda: LayerGrid.indexed([(2, 2)] * 2, [(0,)]), "as many indices"),
    "equal indices": (lambda: LayerGrid.indexed([(2, 2)] * 2, [(0,), (0,)]), "different tuples"),
    "blocks without index": (lambda: LayerGrid((2, 2), ((4, 2),), (((0,),),)), "2 x 1 blocks"),
    "one weight": (lambda: LayerGrid.numbered(np.eye(3)), "a sequence of arrays .* one array"),
    "lists": (lambda: forms.Tied.create([[[1.0]]], 1), "a sequence of arrays .* list in it"),
    "names": (lambda: LayerGrid.from_names({"head": (2, 2)}), "'head' is the number of a layer"),
    "other shapes": (lambda: forms.SharedTT.create(MLP, 2, grid=OUT_HEADS), "the grid is for"),
    "rank": (lambda: forms.SharedCP.create(MLP, 17), r"rank must be in 1\.\.16"),
    "number of bonds": (lambda: forms.SharedTT.create(MLP, (2, 2, 2)), "one number or 2"),
    "columns differ": (lambda: forms.SharedDown.create([(4, 4), (4, 5)], 2), "equally many"),
    "rows differ": (lambda: forms.SharedUp.create([(4, 4), (5, 4)], 2), "equally many"),
    "arrays to fit": (lambda: forms.fit_shared_tt([np.eye(4)], 2), "LowRank or SVD"),
    "modes": (lambda: forms.TensorTrain.create((12, 8), 2, inputs=(3, 3)), "factors of 8"),
    "modes of a matrix": (
        lambda: forms.TrainMatrix.create((12, 8), 2, inputs=(8,), outputs=(3, 4)),
        "equally many",
    ),
    "axes": (lambda: forms.PairGates.create((12, 8), axes=(3, 3)), "at least 12"),
    "bonds": (lambda: forms.TrainFactors.create((12, 8), 2, bond=0), "at least 1"),
    "one axis": (lambda: forms.PairGates.create((12, 8), axes=(12,)), "two axes"),
    "order": (lambda: forms.factorized(12, 0), "at least 1"),
}


def test_names_say_where_weights_stand():
    shapes = {
        "model.layers.10.attn.q": (8, 8),
        "model.layers.2.attn.q": (8, 8),
        "model.layers.2.mlp": (16, 8),
        "model.layers.10.mlp": (16, 8),
    }
    named = LayerGrid.from_names(shapes, block=(8, 8))
    places = [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert named == LayerGrid.indexed(list(shapes.values()), places, block=(8, 8))
    # The first number is that of the layer, others belong to the type.
    shards = dict.fromkeys(["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1"], (4, 4))
    assert LayerGrid.from_names(shards).sizes == (2, 2)


SIZED = {
    "tt": forms.fit_shared_tt,
    "cp": forms.fit_shared_cp,
    "tucker": forms.fit_shared_tucker,
}


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("grid", [None, PAIRS])
@pytest.mark.parametrize("name", SIZED)
def test_updates_of_any_size_are_fitted_alike(name, grid, size):
    # Squares of norms like these are not numbers of single precision.
    power = 2.0 ** round(np.log2(size) / 2)
    shapes = [(9, 6)] * 4 if grid is None else grid.shapes
    factors = [
        (gaussian(m, 2, seed=k, dtype=np.float32), gaussian(2, n, seed=k + 9, dtype=np.float32))
        for k, (m, n) in enumerate(shapes)
    ]
    errors = []
    for factor in (1.0, power):
        deltas = [LowRank(*(part * np.float32(factor) for part in pair)) for pair in factors]
        form, error = SIZED[name](deltas, 3, grid=grid, rng=0).value
        layers = [form.layer(k).delta().to_dense().astype(float) for k in range(len(deltas))]
        given = [left.astype(float) @ right * factor**2 for left, right in factors]
        rest = math.hypot(*(np.linalg.norm(x - y) for x, y in zip(layers, given, strict=True)))
        assert error == pytest.approx(rest, rel=1e-3)
        errors.append(error / factor**2)
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    make, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@cases
def test_wrong_shapes_of_layers_are_refused(case):
    form = case.create(list(case.shapes), 0)
    for name, array in form.arrays().items():
        wrong = form.replace({name: array[None]})
        with pytest.raises(ValueError, match="must have shape"):
            type(form)(**vars(wrong))
    assert len(case.shapes) == form.num_layers
    assert case.shapes[0] in (*ATTENTION, *MLP, *PAIRS.shapes)


def test_generated_factors_of_a_negative_scale():
    plus, minus = (forms.GeneratedFactors.create((6, 4), 2, scale=s, rng=0) for s in (2.0, -2.0))
    assert minus.delta().dtype == np.float64
    np.testing.assert_array_equal(minus.delta().to_dense(), -plus.delta().to_dense())
