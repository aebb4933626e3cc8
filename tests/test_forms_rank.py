"""Forms of augmented rank against PEFT, their identities, their cost, and what they refuse."""

import tracemalloc

import numpy as np
import peft
import pytest
import torch
from form_cases import random_values
from form_cases_rank import CASES

from lowrank_sp import LowRank
from lowrank_sp._arrays import eps, placed
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import _entries, hadamard, sparse
from lowrank_sp.inverse import robust
from lowrank_sp.updates import random_support

ROUNDING = 1e3 * eps(np.dtype(np.float32))
SHAPES = [(12, 8), (8, 12), (12, 12)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} x {s[1]}")


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def peer(config, shape):
    """A linear layer of PEFT with random adapter values, and those by their names in files."""
    m, n = shape
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    layer = model.base_model.model[0]
    state = peft.get_peft_model_state_dict(model)
    return layer, {key.removeprefix("base_model.model.0."): a for key, a in state.items()}


def same(form, expected, x):
    update = form.delta() if torch.is_tensor(form.delta()) else form.delta().to_dense()
    bound = ROUNDING * float(torch.linalg.norm(expected))
    assert float(torch.linalg.norm(update - expected)) <= bound
    error = torch.linalg.norm(form.apply(x) - x @ expected.T)
    assert float(error) <= bound * float(torch.linalg.norm(x))


@shapes
def test_loha_of_peft(shape):
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["0"], init_weights=False)
    layer, a = peer(config, shape)
    form = forms.HadamardProduct(
        a["hada_w1_a"], a["hada_w1_b"], a["hada_w2_a"], a["hada_w2_b"], 2.0
    )
    same(form, layer.get_delta_weight("default").detach(), torch.randn(5, shape[1]))


@shapes
@pytest.mark.parametrize("start", [True, "lycoris"])
@pytest.mark.parametrize(("rank", "factor", "both"), [(1, -1, False), (1, 4, True), (8, 2, False)])
def test_lokr_of_peft(shape, start, rank, factor, both):
    config = peft.LoKrConfig(
        r=rank,
        alpha=2 * rank,
        target_modules=["0"],
        init_weights=start,
        decompose_factor=factor,
        decompose_both=both,
    )
    layer, a = peer(config, shape)
    left, right = (a.get(k, a.get(f"{k}_a")) for k in ("lokr_w1", "lokr_w2"))
    form = forms.KroneckerProduct(left, right, a.get("lokr_w1_b"), a.get("lokr_w2_b"), 2.0)
    same(form, layer.get_delta_weight("default").detach(), torch.randn(5, shape[1]))

    # Our start has the same parts, of which the same one is zero.
    method = (
        forms.KroneckerProduct.create if start is True else forms.KroneckerProduct.create_right_zero
    )
    ours = method(shape, rank, factor=factor, both=both, alpha=2 * rank, rng=0)
    assert ours.scale == form.scale
    sizes = {k: tuple(p.shape) for k, p in form.arrays().items()}
    assert {k: p.shape for k, p in ours.arrays().items()} == sizes
    (
        layer.reset_adapter_parameters
        if start is True
        else layer.reset_adapter_parameters_lycoris_way
    )("default")
    theirs = {key for key in a if not torch.any(getattr(layer, key)["default"])}
    names = {
        "left": "lokr_w1",
        "right": "lokr_w2",
        "left_down": "lokr_w1_b",
        "right_down": "lokr_w2_b",
    }
    zero = {names[k] for k, p in ours.arrays().items() if not np.any(p)}
    assert {key.removesuffix("_a") for key in theirs} == zero


@shapes
def test_hira_of_peft(shape):
    layer, a = peer(peft.HiraConfig(r=3, target_modules=["0"]), shape)
    weight = layer.get_base_layer().weight.detach().clone()
    form = forms.HadamardWeight(a["hira_B"], a["hira_A"], weight)
    # What PEFT calls the delta weight is the factor of the weight.
    expected = weight * layer.get_delta_weight("default").detach()
    x = torch.randn(5, shape[1])
    same(form, expected, x)
    assert torch.allclose(form.adapt(x, x @ weight.T), layer(x), atol=1e-5)
    layer.merge()
    assert torch.allclose(form.merge(weight), layer.get_base_layer().weight, atol=1e-5)


@shapes
@pytest.mark.parametrize("rank", [3, 4])
def test_randlora_of_peft(shape, rank):
    config = peft.RandLoraConfig(r=rank, randlora_alpha=2 * rank, target_modules=["0"])
    layer, a = peer(config, shape)
    small, large = layer.randlora_A["default"].float()[:, 0, :], layer.randlora_B["default"].float()
    gains, columns = a["randlora_lambda"], a["randlora_gamma"]
    form = forms.PositionalRandomSum(small, large, gains, columns, shape[0] < shape[1], 2.0)
    expected = layer.get_delta_weight("default").detach()
    same(form, expected, torch.randn(5, shape[1]))
    same(form, expected, torch.randn(2, shape[1]))
    as_published = forms.RandomSum(small, large, gains, columns, shape[0] < shape[1], 2.0).delta()
    assert float(torch.linalg.norm(as_published - expected)) > 0.5 * float(
        torch.linalg.norm(expected)
    )
    start = forms.PositionalRandomSum.create(shape, rank, rng=0)
    assert start.scale == 20.0
    assert start.gains.shape == tuple(gains.shape)
    assert float(start.columns[0, 0]) == 1 / max(start.columns.shape)


@shapes
@pytest.mark.parametrize("common", [0, 2])
def test_gralora_of_peft(shape, common):
    config = peft.GraloraConfig(r=4, alpha=12, gralora_k=2, hybrid_r=common, target_modules=["0"])
    layer, a = peer(config, shape)
    form = forms.BlockGrid(
        a["gralora_B"].mT,
        a["gralora_A"].mT,
        a.get("gralora_B_general.weight"),
        a.get("gralora_A_general.weight"),
        12 / (4 + common),
    )
    same(form, layer.get_delta_weight("default").detach(), torch.randn(5, shape[1]))
    ours = forms.BlockGrid.create(shape, 4, blocks=2, common=common, alpha=12, rng=0)
    assert ours.scale == form.scale
    assert {k: p.shape for k, p in ours.arrays().items()} == {
        k: tuple(p.shape) for k, p in form.arrays().items()
    }


def test_factorization_is_that_of_lokr():
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 130), 4096, 11008]:
        for factor in (-1, 1, 2, 3, 4, 6, 8, 16, 64):
            assert forms.factorization(size, factor) == factorization(size, factor)


def test_lycoris_sorts_pairs_and_drops_alpha_without_factors():
    unsorted = forms.KroneckerProduct.create((128, 128), 100, factor=64, alpha=200, rng=0)
    assert (unsorted.left.shape, unsorted.right.shape, unsorted.scale) == ((64, 64), (2, 2), 2.0)
    form = forms.KroneckerProduct.create_sorted((128, 128), 100, factor=64, alpha=200, rng=0)
    assert (form.left.shape, form.right.shape, form.scale) == ((2, 2), (64, 64), 1.0)
    form = forms.KroneckerProduct.create_sorted((128, 128), 8, factor=64, alpha=16, rng=0)
    assert (form.right_down.shape, form.scale) == ((8, 64), 2.0)


def test_hadamard_products_are_khatri_rao_products():
    b1, a1, b2, a2 = normal((5, 2)), normal((2, 4), 1), normal((5, 3), 2), normal((3, 4), 3)
    left, right = forms.HadamardProduct(b1, a1, b2, a2).delta().factors()
    rows = np.stack([np.kron(x, y) for x, y in zip(b1, b2, strict=True)])
    columns = np.stack([np.kron(x, y) for x, y in zip(a1.T, a2.T, strict=True)], axis=1)
    assert np.allclose(left, rows)
    assert np.allclose(right, columns)


def test_abba_is_loha_at_another_alpha():
    weight = normal((12, 8))
    form = random_values(forms.HadamardProduct.from_weight(weight, 3, scale=4.0, rng=0), np.asarray)
    layer, _ = peer(peft.LoHaConfig(r=3, alpha=3 * 4.0, target_modules=["0"]), (12, 8))
    theirs = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    with torch.no_grad():
        for name, a in zip(theirs, form.parameters().values(), strict=True):
            getattr(layer, name)["default"].copy_(torch.asarray(a))
    assert np.allclose(
        form.delta().to_dense(), layer.get_delta_weight("default").detach(), atol=1e-4
    )


def test_abba_starts_at_the_best_approximation_of_the_weight():
    weight = normal((12, 8))
    form = forms.HadamardProduct.from_weight(weight, 3, rng=0)
    s = np.linalg.svd(weight, compute_uv=False)
    error = np.linalg.norm(weight - form.up1 @ form.down1)
    assert abs(error - np.linalg.norm(s[3:])) <= 1e-10
    assert np.allclose(np.linalg.norm(form.up1, axis=0), s[:3] ** 0.5)
    assert abs(form.down2).max() <= (6 / 8) ** 0.5
    assert not np.any(form.up2)


def test_rank_of_a_kronecker_product_is_the_product_of_ranks():
    left = normal((4, 2)) @ normal((2, 3), 1)
    right, right_down = normal((3, 1), 2), normal((1, 5), 3)
    form = forms.KroneckerProduct(left, right, None, right_down)
    assert form.rank_bound == 3 * 1
    assert np.linalg.matrix_rank(form.delta().to_dense()) == 2 * 1


def test_nearest_kronecker_product_as_a_start():
    weight = normal((12, 15))
    start = forms.KroneckerProduct.from_weight(weight, (3, 5), rng=0)
    assert np.allclose(start.form.merge(start.weight), weight)
    # Blocks as rows: its best rank-one approximation is what a Kronecker product can be.
    blocks = weight.reshape(3, 4, 5, 3).transpose(0, 2, 1, 3).reshape(15, 12)
    rest = np.linalg.svd(blocks, compute_uv=False)[1:]
    assert abs(np.linalg.norm(start.weight) - np.linalg.norm(rest)) <= 1e-10


def test_a_chain_is_what_merging_every_link_gives():
    weight = normal((12, 8))
    merged, form = weight, forms.Chain.create((12, 8), 2, alpha=4, rng=0)
    for seed, rank in enumerate((3, 2, 1)):
        trained = random_values(form, np.asarray, seed)
        merged = merged + trained.scale * trained.up @ trained.down
        form = forms.merge_and_restart(trained, rank=rank, scale=2.0, rng=seed)
        assert np.allclose(form.delta().to_dense(), trained.delta().to_dense())
        assert not np.any(form.up)
        assert form.down.shape == (rank, 8)
    assert np.allclose(form.merge(weight), merged)
    assert form.earlier_up.shape[1] == 2 + 3 + 2
    assert np.linalg.matrix_rank(form.delta().to_dense()) == 7
    assert form.to_lora().form.up.shape[1] == 7 + 1


def test_delta_lora_telescopes():
    """Gradient descent with increments of the weight, as published, and in closed form."""
    rng = np.random.default_rng(0)
    x, target, weight = normal((20, 8)), normal((20, 12), 1), normal((12, 8), 2)
    product = forms.Product(0.3 * normal((12, 2), 3), 0.3 * normal((2, 8), 4), 2.0)
    gain, rate = 0.5, 1e-3
    form = forms.delta_updates(product, gain)
    up, down, moving = product.up, product.down, weight
    for _ in range(20):
        batch = rng.integers(0, 20, 8)

        def slopes(w, batch=batch):
            return (x[batch] @ w.T - target[batch]).T @ x[batch]

        g = slopes(moving + 2.0 * up @ down)
        new_up, new_down = up - rate * 2.0 * g @ down.T, down - rate * 2.0 * up.T @ g
        moving = moving + gain * 2.0 * (new_up @ new_down - up @ down)
        up, down = new_up, new_down

        g = slopes(form.merge(weight)) * form.scale * rate / (1 + gain)
        form = form.replace({"up": form.up - g @ form.down.T, "down": form.down - form.up.T @ g})
    assert np.allclose(form.up, up)
    assert np.allclose(form.merge(weight), moving + 2.0 * up @ down)
    assert np.linalg.matrix_rank(form.delta().to_dense(), rtol=1e-9) == 4
    assert (
        np.linalg.matrix_rank(
            forms.delta_updates(product.replace({"up": np.zeros((12, 2))}), gain)
            .replace({"up": normal((12, 2))})
            .delta()
            .to_dense()
        )
        == 2
    )


def test_randlora_as_computed_is_the_published_sum_with_columns_permuted():
    form = random_values(forms.PositionalRandomSum.create((12, 8), 3, rng=0), np.asarray)
    r, count = form.gains.shape
    flat = form.large.reshape(12, -1)
    # Product (i, j) of the small side meets column i N + j of the large one, not j r + i.
    permuted = np.stack([flat[:, [i * count + j for i in range(r)]] for j in range(count)], axis=1)
    published = forms.RandomSum(form.small, permuted, form.gains, form.columns, False, form.scale)
    assert np.allclose(published.delta(), form.delta())
    assert not np.allclose(
        forms.RandomSum(**form.arrays(), wide=False, scale=form.scale).delta(), form.delta()
    )


def test_one_basis_serves_layers_of_all_shapes():
    small, large = forms.random_basis((16, 24), 4, rng=0)
    assert small.shape == (4, 16)
    assert large.shape == (24, 4, 4)
    assert abs(np.std(small) - 1) < 1e-12
    layers = [
        forms.RandomSum.create(shape, 4, basis=(small, large)) for shape in ((16, 24), (10, 7))
    ]
    assert all(np.shares_memory(form.large, large) for form in layers)
    assert layers[1].small.shape == (4, 7)
    with pytest.raises(ValueError, match="k >= 20"):
        forms.RandomSum.create((20, 24), 4, basis=(small, large))


def test_one_block_at_a_time(monkeypatch):
    """Many blocks of rows and of columns, of which the last ones are short."""
    monkeypatch.setattr(_entries, "_BLOCK", 45)
    monkeypatch.setattr(sparse, "_BLOCK", 45)
    monkeypatch.setattr(hadamard, "_COLUMNS", 3)
    for case in CASES:
        weight = normal(case.shape, 7)
        form = random_values(case.create(weight, 0), np.asarray)
        arrays = {k: np.asarray(a) for k, a in form.arrays().items()}
        x = normal((12, case.shape[1]), 8)
        assert np.allclose(form.apply(x), x @ case.naive(arrays, weight).T), case.name


#: Trained numbers of one square layer of width 4096, from ``architectures`` in the guide.
COUNTS = {
    "LoHa r=16": (lambda s: forms.HadamardProduct.create(s, 16, rng=0), 262_144, 256),
    "ABBA r=8": (lambda s: forms.HadamardProduct.create(s, 8, rng=0), 131_072, 64),
    "LoKr r=16": (lambda s: forms.KroneckerProduct.create(s, 16, rng=0), 6_144, 1024),
    "MoRA r=16, type 1": (lambda s: forms.SharedSquare.create(s, 16), 131_044, 362),
    "MoRA r=16, type 6": (lambda s: forms.RotatedSquare.create(s, 16), 131_044, 4096),
    "RandLoRA r=32": (
        lambda s: forms.RandomSum.create(
            s,
            32,
            basis=(np.broadcast_to(1.0, (32, 4096)), np.broadcast_to(1.0, (4096, 128, 32))),
        ),
        528_384,
        4096,
    ),
    "KRAdapter": (lambda s: forms.KhatriRao.create(s, rng=0), 524_288, 4096),
    "BoRA b=8, r=16": (lambda s: forms.DiagonalGrid.create(s, 16, blocks=8, rng=0), 132_096, 128),
    "MELoRA, 8 of r=2": (lambda s: forms.BlockDiagonal.create(s, 2, blocks=8, rng=0), 16_384, 16),
    "GraLoRA r=16": (lambda s: forms.BlockGrid.create(s, 16, blocks=4, rng=0), 131_072, 64),
    "ReLoRA r=16": (lambda s: forms.Chain.create(s, 16, rng=0), 131_072, 16),
    "Sine r=16": (lambda s: forms.Sine.create(s, 16, rng=0), 131_072, 4096),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_a_layer_that_is_never_allocated(name):
    create, count, rank = COUNTS[name]
    tracemalloc.start()
    form = create((4096, 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert form.shape == (4096, 4096)
    assert form.num_trainable == count
    assert form.rank_bound == rank
    assert peak <= 6 * 8 * (count + 4096)


@pytest.mark.parametrize("count", [1, 7, 200])
@pytest.mark.parametrize(
    "create",
    [
        lambda w: forms.HadamardProduct.create(w, 8, rng=0),
        lambda w: forms.HadamardProduct.from_weight(w, 4, rng=0),
        lambda w: forms.HadamardWeight.create(w, 4, rng=0),
        lambda w: forms.KroneckerProduct.create(w, 4, rng=0),
        lambda w: forms.Sine.create(w, 4, rng=0),
        lambda w: forms.ProductPlusSparse.create(
            w, 4, places=random_support(w.shape, 0.01, like=w, rng=0), rng=0
        ),
    ],
    ids=["LoHa", "ABBA", "HiRA", "LoKr", "Sine", "RoSA"],
)
def test_applying_takes_the_memory_of_factors_and_blocks(create, count, monkeypatch):
    monkeypatch.setattr(_entries, "_BLOCK", 2**14)
    monkeypatch.setattr(sparse, "_BLOCK", 2**14)
    n = 768
    form = create(normal((n, n)).astype(np.float32))
    x = normal((count, n)).astype(np.float32)
    form.apply(x)
    tracemalloc.start()
    form.apply(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Factors, some columns of their Khatri-Rao products, inputs and outputs.
    assert peak <= 4 * n * (4 * 128 + 4 * count) < 4 * n * n * (1 + count / 100)


def test_values_are_placed(xp):
    for dtype in (np.float32, np.float64):
        values, places = xp.asarray(np.array([3, -1, 4], dtype)), xp.asarray(np.array([0, 2, 6]))
        found = placed(values, places, 8)
        assert type(found) is type(values)
        assert xp.host(found).tolist() == [3, 0, -1, 0, 0, 0, 4, 0]
        assert not np.any(xp.host(placed(values[:0], places[:0], 2)))


def test_places_of_the_largest_entries(xp):
    scores = np.round(normal((40, 30)), 1)
    best = np.sort(np.argsort(-abs(scores).ravel(), kind="stable")[:60])
    for dtype in (np.float32, np.float64):
        found = forms.largest_places(xp.asarray(scores.astype(dtype)), 0.05)
        assert np.array_equal(xp.host(found), best)


def test_places_of_the_largest_entries_in_half_precision():
    scores = normal((40, 30)).astype(np.float16)
    best = np.sort(np.argsort(-abs(scores).ravel(), kind="stable")[:60])
    assert np.array_equal(forms.largest_places(scores, 0.05), best)
    assert np.array_equal(forms.largest_places(torch.asarray(scores), 0.05), best)


def test_a_trained_update_taken_apart():
    rng = np.random.default_rng(0)
    low = LowRank(normal((90, 2)), normal((2, 70), 1))
    spikes = np.where(rng.random((90, 70)) < 0.03, 8.0 * rng.standard_normal((90, 70)), 0.0)
    delta = low.to_dense() + spikes
    for solution in (
        robust.alternating_projections(delta, rank=2, rng=0),
        robust.principal_component_pursuit(delta),
    ):
        assert solution.converged
        form = forms.ProductPlusSparse.from_parts(solution.value)
        error = np.linalg.norm(form.delta() - delta) / np.linalg.norm(delta)
        assert abs(error - solution.value.error / np.linalg.norm(delta)) <= 1e-8
        assert error <= 1e-4
        parts = LowRank(form.up, form.down)
        assert (parts - low).norm() <= 0.05 * low.norm()


def test_a_sine_has_full_rank_where_its_product_has_not():
    form = random_values(forms.Sine.create((40, 30), 2, frequency=5.0, rng=0), np.asarray)
    assert np.linalg.matrix_rank(form.delta()) == 30


REFUSED = {
    "weight needed": (lambda: forms.HadamardWeight.create((4, 4), 2), TypeError, "weight itself"),
    "integers": (
        lambda: forms.HadamardWeight.create(np.ones((4, 4), np.int8), 2),
        TypeError,
        "dequantize",
    ),
    "rank": (lambda: forms.HadamardProduct.create((4, 6), 5), ValueError, "1..4"),
    "restart": (
        lambda: forms.merge_and_restart(forms.Product.create((4, 6), 2), rank=0),
        ValueError,
        "1..4",
    ),
    "gain": (lambda: forms.delta_updates(forms.Product.create((4, 6), 2), 0), ValueError, "gain"),
    "square": (lambda: forms.SharedSquare.create((6, 6), 4), ValueError, "at most rank 3"),
    "blocks": (lambda: forms.BlockDiagonal.create((6, 4), 1, blocks=3), ValueError, "6 x 4"),
    "groups": (lambda: forms.BlockGrid.create((6, 4), 3, blocks=2), ValueError, "divide the rank"),
    "half a product": (
        lambda: forms.BlockGrid(np.ones((1, 2, 1)), np.ones((1, 1, 2)), np.ones((2, 1))),
        ValueError,
        "or neither",
    ),
    "another product": (
        lambda: forms.BlockGrid(
            np.ones((1, 2, 1)), np.ones((1, 1, 2)), np.ones((3, 1)), np.ones((1, 2))
        ),
        ValueError,
        "common product",
    ),
    "groups of factors": (
        lambda: forms.BlockGrid(np.ones((2, 2, 3)), np.ones((2, 3, 2))),
        ValueError,
        "multiple",
    ),
    "factor": (lambda: forms.factorization(8, 0), ValueError, "-1"),
    "unsorted": (
        lambda: forms.ProductPlusSparse.create((2, 2), 1, places=np.array([3, 1])),
        ValueError,
        "sorted",
    ),
    "outside": (
        lambda: forms.ProductPlusSparse.create((2, 2), 1, places=np.array([1, 4])),
        ValueError,
        r"0\.\.3",
    ),
    "density": (lambda: forms.largest_places(np.ones((2, 2)), 0.0), ValueError, "density"),
    "NaN": (
        lambda: forms.largest_places(np.array([[np.nan, 1.0], [2.0, 3.0]]), 0.75),
        ValueError,
        "must not be NaN",
    ),
    "alpha": (lambda: forms.BlockGrid.create((4, 4), 2, blocks=2, alpha=0), ValueError, "alpha"),
    "no matrix": (
        lambda: forms.KroneckerProduct.create(np.ones((2, 4, 4)), 1),
        ValueError,
        r"must be a matrix, got shape \(2, 4, 4\)",
    ),
    "no square": (lambda: forms.RotatedSquare.create((1, 1), 1), ValueError, r"must be in 1\.\.1"),
    "narrow": (
        lambda: forms.KhatriRao(np.ones((4, 2)), np.ones((4, 2)), (4, 6)),
        ValueError,
        "larger",
    ),
    "frequency": (lambda: forms.Sine.create((4, 4), 1, frequency=0.0), ValueError, "frequency"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chain_of_links_in_half_precision_is_in_single(dtype):
    form = forms.Product(torch.ones(4, 1, dtype=dtype), torch.ones(1, 3, dtype=dtype), 0.3)
    chain = forms.merge_and_restart(form, rng=0)
    assert {a.dtype for a in chain.arrays().values()} == {torch.float32}
    np.testing.assert_allclose(chain.delta().to_dense().numpy(), 0.3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_a_random_basis_of_a_single_number(shape):
    form = forms.RandomSum.create(shape, 1, rng=0)
    assert all(np.isfinite(a).all() for a in form.arrays().values())
    assert abs(form.small).max() > 0


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
