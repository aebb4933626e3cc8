"""Forms with something between two factors: their starts, their peers in PEFT, known traps."""

import jax
import numpy as np
import peft
import pytest
import torch
from form_cases import random_values
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora.variants import _kasa_layer_regularization_loss

import lowrank_sp as lr
from lowrank_sp import updates
from lowrank_sp._arrays import eps
from lowrank_sp.adapters import forms, initializers

M, N, R = 24, 16, 4
SINGLE = np.dtype(np.float32)


def weight_of(shape=(M, N), dtype=np.float64, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def dense(form):
    delta = form.delta()
    return np.asarray(delta.to_dense() if isinstance(delta, lr.LinearOperator) else delta)


def near(x, y, factor=100.0):
    x, y = np.asarray(x), np.asarray(y)
    rounding = factor * max(eps(x.dtype), eps(y.dtype))
    assert np.linalg.norm(x - y) <= rounding * max(np.linalg.norm(y), 1e-30)


def best(weight, rank):
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


class Net(torch.nn.Module):
    """Two layers, the second one larger in one direction and smaller in the other."""

    def __init__(self, shapes=((M, N), (6, M))):
        super().__init__()
        torch.manual_seed(0)
        for i, (m, n) in enumerate(shapes):
            setattr(self, f"layer{i}", torch.nn.Linear(n, m, bias=False))

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def adapted(config, **values):
    """PEFT's layers with random values in the parameters that it trains."""
    model = peft.get_peft_model(Net(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(values.get(name.split(".")[-1], 0.3) * torch.randn_like(p))
    return model, [model.base_model.model.layer0, model.base_model.model.layer1]


def base_of(layer):
    return layer.base_layer.weight.detach()


def inputs(layer):
    return torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))


def same_as_peft(form, layer):
    """Update and outputs, which PEFT computes by different code."""
    x = inputs(layer)
    near(dense(form), layer.get_delta_weight("default").detach())
    y = x @ base_of(layer).mT
    near(form.adapt(x, y).detach(), layer(x).detach())


# Peers: the same arrays, the same update and outputs.


def test_adalora_is_that_of_peft():
    config = peft.AdaLoraConfig(
        init_r=R, target_r=2, lora_alpha=8, total_step=10, target_modules=["layer0", "layer1"]
    )
    model, layers = adapted(config)
    ours = [
        forms.DiagonalCore(
            layer.lora_B["default"],
            layer.lora_E["default"][:, 0],
            layer.lora_A["default"],
            8 / (R + 1e-5),
        )
        for layer in layers
    ]
    for form, layer in zip(ours, layers, strict=True):
        with torch.no_grad():
            same_as_peft(form, layer)

    class Output:
        loss = torch.zeros(())

    model.base_model.model.forward = lambda: Output
    penalty = model.base_model().loss / config.orth_reg_weight
    near(forms.orthogonality(*ours).detach(), penalty.detach())


def test_the_rank_budget_is_that_of_peft():
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=2,
        total_step=40,
        tinit=3,
        tfinal=10,
        deltaT=1,
        target_modules=["layer0", "layer1"],
    )
    model, layers = adapted(config)
    allocator = RankAllocator(model.base_model.model, config, "default")

    def taken(layer, of=lambda p: p.detach().clone()):
        return {
            "up": of(layer.lora_B["default"]),
            "core": of(layer.lora_E["default"])[:, 0],
            "down": of(layer.lora_A["default"]),
        }

    importance = [
        forms.Importance.of(forms.DiagonalCore(**taken(layer), scale=1.0)) for layer in layers
    ]
    cut = 0
    for step in range(40):
        # Masked values are set anew, so that none of the scores coincide.
        torch.manual_seed(step)
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn_like(p)
                p.grad = torch.randn_like(p)
        ours = [forms.DiagonalCore(**taken(layer), scale=1.0) for layer in layers]
        gradients = [taken(layer, lambda p: p.grad) for layer in layers]
        budget, _ = allocator.budget_schedule(step)
        assert budget == forms.cubic_budget(step, 2 * R, 4, total=40, warmup=3, cooldown=10)
        if step < 30:
            importance = [
                i.updated(f, g) for i, f, g in zip(importance, ours, gradients, strict=True)
            ]
        if budget == 2 * R:
            allocator.update_ipt(model.base_model.model)
            for i, name in zip(importance, ("layer0", "layer1"), strict=True):
                near(i.smoothed["up"], allocator.exp_avg_ipt[f"{name}.lora_B.default"])
                near(i.spread["down"], allocator.exp_avg_unc[f"{name}.lora_A.default"])
            continue
        _, masks = allocator.update_and_allocate(model.base_model.model, step, force_mask=True)
        keep = forms.keep_largest([i.scores() for i in importance], budget)
        for mask, ours_, form, layer in zip(masks.values(), keep, ours, layers, strict=True):
            assert mask == ours_.tolist()
            assert torch.equal(form.masked(ours_).core, layer.lora_E["default"][:, 0])
            cut += len(mask) - sum(mask)
    assert cut > 0


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_dora_is_that_of_peft(scale):
    config = peft.LoraConfig(r=R, lora_alpha=8, use_dora=True, target_modules=["layer0", "layer1"])
    _, layers = adapted(config, weight=scale)
    for layer in layers:
        names = {
            "up": layer.lora_B["default"].weight,
            "down": layer.lora_A["default"].weight,
            "magnitude": layer.lora_magnitude_vector["default"].weight,
        }
        form = forms.RowMagnitude(base_of(layer), **names, scale=8 / R)
        x = inputs(layer)
        theirs = layer(x)
        ours = form.adapt(x, x @ base_of(layer).mT)
        near(ours.detach(), theirs.detach())
        # The published gradient takes lengths as constants, here as there.
        target = torch.randn_like(theirs)
        for found, wanted in zip(
            torch.autograd.grad((ours * target).sum(), names.values()),
            torch.autograd.grad((theirs * target).sum(), names.values()),
            strict=True,
        ):
            near(found, wanted)
        merged = form.merge(base_of(layer)).detach()
        layer.merge()
        near(merged, base_of(layer))


def test_vera_is_that_of_peft_and_draws_what_peft_draws():
    config = peft.VeraConfig(r=R, target_modules=["layer0", "layer1"], projection_prng_key=3)
    model, layers = adapted(config)
    basis = forms.peft_basis(R, M, M, torch.empty(0), seed=3)
    shapes = [tuple(base_of(layer).shape) for layer in layers]
    shared = forms.SharedBasis.create(
        [torch.empty(shape) for shape in shapes], R, basis=basis, rng=0
    )
    for found, wanted in (
        (shared.up, model.base_model.vera_B["default"]),
        (shared.down, model.base_model.vera_A["default"]),
    ):
        assert found.shape == wanted.shape
        # Whether a product and a sum are rounded once or twice is up to the machine.
        assert float(abs(found - wanted).max()) <= 2 * eps(SINGLE)
    values = {}
    for i, layer in enumerate(layers):
        values[f"outer.{i}"] = layer.vera_lambda_b["default"].detach()
        values[f"inner.{i}"] = layer.vera_lambda_d["default"].detach()
    shared = shared.replace(values)
    assert shared.num_trainable == sum(m + R for m, _ in shapes)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            same_as_peft(shared.layer(i), layer)


def test_kasa_is_that_of_peft():
    original = [p.detach().clone() for p in Net().parameters()]
    config = peft.LoraConfig(
        r=R, lora_alpha=8, kasa_config=peft.KasaConfig(), target_modules=["layer0", "layer1"]
    )
    _, layers = adapted(config)
    for weight, layer in zip(original, layers, strict=True):
        start = forms.DiagonalCore.beside_truncated(weight, R, alpha=8, rng=0)
        near(start.weight, base_of(layer))
        theirs = {
            "up": layer.lora_B["default"].weight.detach(),
            "core": layer.lora_diag["default"].detach(),
            "down": layer.lora_A["default"].weight.detach(),
        }
        form = start.form.replace(theirs)
        near(
            form.merge(start.weight),
            base_of(layer) + 2 * (theirs["up"] * theirs["core"]) @ theirs["down"],
        )
        x = inputs(layer)
        near(form.adapt(x, x @ start.weight.mT), layer(x).detach())
        # Eq. 9 to 11: the sum of both norms is twice their mean.
        penalty = 0.1 * (form.core**2).sum() + 0.2 * 2 * forms.orthogonality(form)
        near(penalty, _kasa_layer_regularization_loss(layer, "default", 0.1, 0.2).detach())


def test_tinylora_is_that_of_peft():
    config = peft.TinyLoraConfig(r=2, u=5, weight_tying=1.0, target_modules=["layer0", "layer1"])
    _, layers = adapted(config)
    with torch.no_grad():
        tied = forms.TiedCores(
            next(iter(layers[0].tinylora_v["default"].values())),
            tuple(layer.tinylora_B["default"] for layer in layers),
            tuple(layer.tinylora_P["default"] for layer in layers),
            tuple(layer.tinylora_A["default"] for layer in layers),
        )
        assert tied.num_trainable == 5
        created = forms.TiedCores.create([base_of(layer) for layer in layers], 2, size=5, rng=0)
        for i, layer in enumerate(layers):
            same_as_peft(tied.layer(i), layer)
            near(created.ups[i] @ created.downs[i], tied.ups[i] @ tied.downs[i], 1e3)
    # The paper leaves the law of P open; PEFT draws it Gaussian, of variance 1/r.
    basis = forms.CombinedCore.create(weight_of(), R, size=2000, rng=0).basis
    assert abs(np.var(basis) * R - 1) < 0.05


def test_psoft_is_that_of_peft():
    config = peft.PsoftConfig(r=R, psoft_alpha=8, target_modules=["layer0", "layer1"])
    _, layers = adapted(config)
    for layer in layers:
        inner = layer.psoft_R["default"]
        form = forms.RotatedCore.create(base_of(layer), R, alpha=8).replace(
            {"skew": inner.weight, "left": inner.vector_b, "right": inner.vector_a}
        )
        a, b = layer._get_psoft_ab_cache_buffers("default")
        near(form.up @ form.down, b @ a, 1e3)
        with torch.no_grad():
            # Signs of singular vectors are free, and the core is not: theirs are taken.
            same_as_peft(form.replace({"up": b, "down": a}), layer)


def test_mica_is_that_of_peft():
    config = peft.LoraConfig(
        r=R, lora_alpha=8, init_lora_weights="mica", target_modules=["layer0", "layer1"]
    )
    model, layers = adapted(config)
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A"}
    for layer in layers:
        form = forms.FixedUp.create(base_of(layer), R, alpha=8)
        up, down = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        projector = up @ up.mT
        near(form.up @ form.up.mT, projector.detach(), 1e4)
        assert list(form.parameters()) == ["down"]
        with torch.no_grad():
            same_as_peft(form.replace({"up": up, "down": down}), layer)


# Starts.


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_sorsa_starts_at_the_principal_part_and_leaves_the_rest(shape):
    weight = weight_of(shape)
    form, residual = forms.DiagonalCore.principal(weight, R)
    near(form.merge(residual), weight)
    s = np.linalg.svd(weight, compute_uv=False)
    near(form.core, s[:R])
    near(np.linalg.norm(residual, 2), s[R])
    assert float(forms.orthogonality(form)) <= 100 * eps(weight.dtype)
    # Against the weight it was made of, the update after training is of rank 2 R.
    moved = random_values(form, np.asarray)
    change = moved.merge(residual) - weight
    assert np.linalg.matrix_rank(change, rtol=1e-10) == 2 * R


def test_svds_of_half_precision_weights_are_computed_in_single():
    weight = torch.asarray(weight_of((100, 120), np.float32)).to(torch.bfloat16)
    form, residual = forms.DiagonalCore.principal(weight, R, rng=0)
    assert form.core.dtype == torch.float32
    assert residual.dtype == torch.bfloat16
    s = np.linalg.svd(weight.to(torch.float64).numpy(), compute_uv=False)
    assert np.abs(form.core.numpy() / s[:R] - 1).max() <= 1e3 * eps(SINGLE)
    assert float(forms.orthogonality(form)) <= 1e3 * eps(SINGLE)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_kasa_cuts_the_smallest_triplets(shape):
    weight = weight_of(shape)
    start = forms.DiagonalCore.beside_truncated(weight, R, rng=0)
    near(start.weight, best(weight, N - R))
    assert np.linalg.matrix_rank(start.weight, rtol=1e-10) == N - R
    assert not dense(start.form).any()
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.15"):
        forms.DiagonalCore.beside_truncated(weight, N, rng=0)


@pytest.mark.parametrize("kind", [forms.DiagonalCore, forms.FullCore])
def test_stella_starts_at_an_isometry_and_leaves_the_weight(kind):
    weight = weight_of()
    for sides, wanted in (
        (None, None),
        (lr.truncated_svd(weight, R), np.linalg.svd(weight)[0][:, :R]),
        (lr.linalg.minor_svd(weight, R), np.linalg.svd(weight, full_matrices=False)[0][:, -R:]),
    ):
        form = kind.at_identity(weight, R, sides=sides, alpha=2 * R, rng=0)
        s = np.linalg.svd(dense(form), compute_uv=False)
        near(s[:R], np.full(R, 2.0))
        if wanted is not None:
            near(form.up @ form.up.T, wanted @ wanted.T)
    with pytest.raises(ValueError, match="sides must be an SVD of shape"):
        kind.at_identity(weight.T, R, sides=lr.truncated_svd(weight, R))


def test_polar_starts_between_orthonormal_sides():
    form = forms.FullCore.create(weight_of(), R, rng=0)
    assert float(forms.orthogonality(form)) <= 100 * eps(np.dtype(float))
    assert not form.core.any()
    assert forms.FullCore.create((M, N), R, std=0.1, rng=0).core.any()


def test_lora_xs_starts_in_the_principal_subspaces():
    weight = weight_of()
    form = forms.FixedSides.create(weight, R, alpha=3 * R, std=0.0, rng=0)
    near(form.up.T @ form.up, np.eye(R))
    near(form.down @ form.down.T, np.diag(np.linalg.svd(weight, compute_uv=False)[:R] ** 2))
    # Signs of singular vectors cancel in the one core that they leave alone.
    near(form.up @ form.down, best(weight, R))
    assert not dense(form).any()
    # PSOFT without its constraints reaches the same updates.
    rotated = forms.RotatedCore.create(weight, R, alpha=3 * R)
    core = rotated.core_matrix() + np.eye(R)
    near(core, np.eye(R))
    near(rotated.scale * rotated.up @ core @ rotated.down, best(weight, R))
    with pytest.raises(TypeError, match="made from the weight itself"):
        forms.FixedSides.create((M, N), R)


@pytest.mark.parametrize(
    "create",
    [
        forms.RowMagnitude.create,
        forms.BothMagnitudes.create,
        forms.HadamardWeight.create,
        forms.SpectralShift.create,
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(create, bad):
    weight = weight_of()
    weight[-1, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        create(weight, 2)


@pytest.mark.parametrize("create", [forms.Product.create, forms.RowMagnitude.create])
def test_lists_are_no_weights(create):
    with pytest.raises(TypeError, match="weight must be an array, got list"):
        create([[1.0, 2.0], [3.0, 4.0]], 1)
    with pytest.raises(TypeError, match="up of Product must be an array, got list"):
        forms.Product([[1.0]], np.ones((1, 1)))


def test_kasa_needs_a_triplet_to_keep():
    with pytest.raises(ValueError, match="a weight of shape 1 x 5 has one singular triplet"):
        forms.DiagonalCore.beside_truncated(np.ones((1, 5)), 1)


def test_lora_sb_moves_by_the_projected_gradient():
    weight, gradient = weight_of(), weight_of(seed=8)
    form = forms.FixedSides.along_gradient(weight, R, gradient=gradient, step=0.1, rng=0)
    near(dense(form), best(-0.1 * np.sign(gradient), R))
    g = weight_of(seed=9)
    moved = form.replace({"core": form.core - 0.5 * form.up.T @ g @ form.down.T})
    left, right = form.up @ form.up.T, form.down.T @ form.down
    near(dense(moved) - dense(form), -0.5 * left @ g @ right)


def test_dude_starts_at_the_weight():
    weight = weight_of()
    form, residual = forms.RowMagnitude.from_start(initializers.pissa(weight, R))
    near(form.magnitude, np.linalg.norm(weight, axis=1))
    near(residual + dense(form), weight)
    near(form.merge(residual), weight)


def test_bidimensional_columns_have_their_lengths():
    weight = weight_of()
    form = random_values(forms.BothMagnitudes.create(weight, R, rng=0), np.asarray)
    near(np.linalg.norm(weight + dense(form), axis=0), abs(form.columns))


# Traps.


@pytest.mark.parametrize("kind", [forms.RowMagnitude, forms.BothMagnitudes])
def test_rows_without_direction_stay_and_give_no_nan(kind):
    weight = weight_of()
    weight[3] = 0.0
    form = kind.create(torch.asarray(weight), R, through_norm=True, rng=0)
    near(dense(form)[3], np.zeros(N))
    form = form.replace({k: p.requires_grad_() for k, p in form.parameters().items()})
    form.apply(torch.asarray(weight)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in form.parameters().values())


@pytest.mark.parametrize("kind", [forms.RowMagnitude, forms.BothMagnitudes])
def test_lengths_are_constants_for_jax_as_for_torch(kind):
    start = random_values(kind.create(weight_of(), R, rng=0), np.asarray)
    x = weight_of((5, N), seed=3)

    def gradients(form):
        of_torch = form.replace(
            {
                k: torch.tensor(a).requires_grad_(k in form.parameters())
                for k, a in form.arrays().items()
            }
        )
        (of_torch.apply(torch.tensor(x)) ** 2).sum().backward()
        of_jax = form.replace({k: jax.numpy.asarray(a) for k, a in form.arrays().items()})
        found = jax.grad(lambda p: (of_jax.replace(p).apply(jax.numpy.asarray(x)) ** 2).sum())(
            of_jax.parameters()
        )
        return {k: (p.grad.numpy(), np.asarray(found[k])) for k, p in of_torch.parameters().items()}

    constant = gradients(start)
    through = gradients(kind(**{**start.__dict__, "through_norm": True}))
    for name, (a, b) in constant.items():
        near(a, b)
        near(*through[name])
    # Moving all of a factor along itself changes lengths, which only one of them sees.
    assert np.linalg.norm(constant["up"][0] - through["up"][0]) > 0.01


def test_both_lengths_are_constants_in_the_published_gradient():
    weight, x = weight_of(), torch.tensor(weight_of((5, N), seed=3))
    form = random_values(forms.BothMagnitudes.create(torch.asarray(weight), R, rng=0), torch.tensor)
    form = form.replace({k: p.requires_grad_() for k, p in form.parameters().items()})
    moved = form.weight + form.up @ form.down
    c = moved.detach().norm(dim=1, keepdim=True)
    ruled = form.rows[:, None] * moved / c
    naive = ruled / ruled.detach().norm(dim=0) * form.columns - form.weight
    for found, wanted in zip(
        torch.autograd.grad((form.apply(x) ** 2).sum(), form.parameters().values()),
        torch.autograd.grad(((x @ naive.mT) ** 2).sum(), form.parameters().values()),
        strict=True,
    ):
        near(found, wanted)


def test_a_rank_given_up_leaves_the_scale():
    form = random_values(forms.DiagonalCore.create((M, N), R, alpha=8, rng=0), np.asarray)
    keep = np.array([True, False, True, True])
    masked = form.masked(keep)
    cut = masked.kept(keep)
    assert cut.up.shape == (M, 3)
    assert cut.scale == form.scale == 8 / R
    near(dense(cut), dense(masked))
    # A mask leaves the vectors, so that gradients may bring the triplet back.
    assert masked.up is form.up


def test_a_budget_of_everything_masks_nothing():
    scores = [np.zeros(3), np.zeros(2)]
    assert all(keep.all() for keep in forms.keep_largest(scores, 5))
    assert [int(keep.sum()) for keep in forms.keep_largest(scores, 4)] == [3, 1]
    with pytest.raises(ValueError, match="finite"):
        forms.keep_largest([np.array([np.nan])], 1)
    assert forms.cubic_budget(7, 8, 8, total=10, warmup=0, cooldown=0) == 8
    with pytest.raises(ValueError, match="warmup must end"):
        forms.cubic_budget(7, 8, 4, total=10, warmup=6, cooldown=4)
    form = forms.DiagonalCore.create((M, N), R, rng=0)
    with pytest.raises(ValueError, match="beta1"):
        forms.Importance.of(form).updated(form, form.parameters(), beta1=1.0)


def test_orthonormal_factors_have_a_penalty_with_a_gradient(xp):
    form = forms.Product(xp.asarray(np.eye(M, R)), xp.asarray(np.eye(R, N)))
    assert float(forms.orthogonality(form)) == 0.0
    loud = forms.Product(2.0 * form.up, form.down)
    gap = np.linalg.norm(3 * np.eye(R))
    near(float(forms.orthogonality(loud)) * np.ones(1), gap * np.ones(1) / 2)
    near(float(forms.orthogonality(loud, power=2)) * np.ones(1), gap**2 * np.ones(1) / 2)
    near(float(forms.orthogonality(loud, form)) * np.ones(1), gap * np.ones(1) / 4)
    if xp.name == "jax":
        slope = jax.grad(lambda up: forms.orthogonality(form.replace({"up": up})))(form.up)
        assert not np.asarray(slope).any()
    with pytest.raises(ValueError, match="power"):
        forms.orthogonality(form, power=3)


def test_small_shifts_of_large_values_are_not_lost():
    weight = (1e4 * np.eye(8)).astype(np.float32)
    form = forms.SpectralShift.create(weight)
    small = form.replace({"shift": np.full(8, 1e-6, np.float32)})
    near(dense(small) @ form.vh.T @ form.u.T, 1e-6 * np.eye(8, dtype=np.float32))
    gone = form.replace({"shift": np.full(8, -2e4, np.float32)})
    assert not gone.merge(weight).any()


def test_a_spectral_shift_needs_its_own_basis():
    """Computed again, the basis of equal singular values is another one."""
    q = np.linalg.qr(weight_of((8, 8)))[0]
    shift = np.arange(8.0)
    here, there = (forms.SpectralShift.create(w).replace({"shift": shift}) for w in (q, q + 1e-14))
    assert np.linalg.norm(dense(here) - dense(there)) > 0.1 * np.linalg.norm(dense(here))
    near(np.linalg.svd(q + dense(here), compute_uv=False), 1 + shift[::-1])


def test_a_sparse_core_of_few_triplets_takes_nothing_from_the_weight():
    weight = weight_of()
    places = forms.banded_places(R, 1, like=weight)
    form = forms.SparseCore.create(weight, R, places=places, rng=0)
    near(form.replace({"values": 0 * form.values}).merge(weight), weight)
    u, _, vh = lr.truncated_svd(weight, R)
    near(u.T @ dense(form) @ vh.T, form.core_matrix() / 2)


def test_a_sparse_core_refuses_places_that_are_not_distinct_and_inside():
    weight = weight_of()
    for places in ([0, 0], [3, 1], [-1], [N * N], []):
        with pytest.raises(ValueError, match="places must be sorted, distinct"):
            forms.SparseCore.create(weight, places=np.array(places, int), rng=0)
    assert len(forms.banded_places(N, 2, like=weight)) == N * 5 - 2 * 3
    with pytest.raises(ValueError, match="width"):
        forms.banded_places(N, N, like=weight)


def test_a_larger_layer_leaves_the_basis_of_the_others():
    few = forms.SharedBasis.create([(12, 8)], R, rng=0)
    more = forms.SharedBasis.create([(12, 8), (20, 30)], R, rng=0)
    near(more.up[:12], few.up)
    near(more.down[:, :8] * np.sqrt(30 / 8), few.down)
    assert abs(more.down).max() <= np.sqrt(6 / 30)
    with pytest.raises(ValueError, match="basis must reach 40 rows"):
        forms.SharedBasis.create([(40, 8)], R, basis=(few.up, few.down))
    with pytest.raises(ValueError, match="at least one weight"):
        forms.SharedBasis.create([], R)


def test_layers_of_shared_forms_are_merged_and_converted():
    shapes = [(12, 8), (6, 9)]
    weights = [weight_of(shape, seed=i) for i, shape in enumerate(shapes)]
    for shared in (
        forms.SharedBasis.create(weights, 3, rng=0),
        forms.TiedCores.create(weights, 3, size=4, rng=0),
    ):
        form = random_values(shared, np.asarray)
        assert form.num_layers == 2
        assert form.rank_bound == 3
        merged = form.merge(weights)
        for i, (weight, again) in enumerate(zip(weights, form.unmerge(merged), strict=True)):
            near(again, weight)
            near(merged[i], weight + dense(form.layer(i)))
            near(dense(form.to_lora()[i].form), dense(form.layer(i)))
    with pytest.raises(ValueError, match="at least one weight"):
        forms.TiedCores.create([], 2)
    with pytest.raises(ValueError, match="size"):
        forms.CombinedCore.create(weights[0], 2, size=0)


def test_a_rotation_is_one_and_knows_its_size():
    form = random_values(forms.RotatedCore.create(weight_of(), R), np.asarray)
    ones = np.ones(R)
    rotation = form.replace({"left": ones, "right": ones}).core_matrix() + np.eye(R)
    near(rotation.T @ rotation, np.eye(R))
    near(np.linalg.det(rotation) * ones, ones)
    single = forms.RotatedCore.create(weight_of(), 1)
    assert single.num_trainable == 2
    with pytest.raises(ValueError, match="skew of RotatedCore must have 6"):
        forms.RotatedCore(form.up, form.skew[:5], ones, ones, form.down)


# Rules.


@pytest.mark.parametrize("rule", [updates.StelLA(lr=0.05), updates.PoLAR(lr=0.02, strength=1.0)])
@pytest.mark.parametrize("start", ["full", "diagonal"])
def test_rules_keep_the_sides_orthonormal_and_find_a_core(rule, start):
    truth = best(weight_of(seed=3), 2)
    kind = forms.FullCore if start == "full" else forms.DiagonalCore
    form = kind.at_identity((M, N), R, rng=0)
    adam = updates.Adam()
    pair, core = rule.init(form.up, form.down), adam.init(form.core)
    first = np.linalg.norm(dense(form) - truth)
    for step in range(1, 301):
        g = dense(form) - truth
        inner = form.up.T @ g @ form.down.T
        between = form.core if form.core.ndim == 2 else np.diag(form.core)
        up, down, pair = rule.step(
            form.up, form.down, g @ (between @ form.down).T, (form.up @ between).T @ g, pair
        )
        slope = inner if form.core.ndim == 2 else np.diagonal(inner)
        direction, core = adam.turn(slope, core, np.asarray(step))
        form = form.replace({"up": up, "down": down, "core": form.core - 0.05 * direction})
    tight = isinstance(rule, updates.StelLA)
    assert float(forms.orthogonality(form)) <= (1e-12 if tight else 0.1)
    assert np.linalg.norm(dense(form) - truth) < 0.1 * first


# Cost.


def test_products_are_applied_without_the_matrix():
    """Of this size the update would need 320 GB."""
    m = n = 200_000
    side, wide = np.ones((m, 2)) / m**0.5, np.ones((2, n)) / n**0.5
    vector, one, core = np.ones(2), np.ones(m), np.eye(2)
    places, gate = np.array([0, 3]), np.zeros(1)
    x = np.ones((1, n))
    for form in (
        forms.DiagonalCore(side, vector, wide),
        forms.FullCore(side, core, wide),
        forms.FixedSides(side, core, wide),
        forms.CombinedCore(side, vector, np.stack([core, core]), wide),
        forms.RotatedCore(side, np.ones(1), vector, vector, wide),
        forms.SpectralShift(side, vector, wide, vector),
        forms.SparseCore(side, wide, places, vector, gate),
        forms.Gains(side, wide, one, vector),
    ):
        y = form.apply(x)
        assert y.shape == (1, m)
        near(y, (form.delta() @ x.T).T, m)


@pytest.mark.parametrize("form", [forms.RowMagnitude, forms.BothMagnitudes])
def test_magnitudes_are_those_of_real_weights(form):
    with pytest.raises(TypeError, match=r"weight must be real.*got complex128; take a form"):
        form.create(np.ones((3, 4), np.complex128), 1)
