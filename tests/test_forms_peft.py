"""Forms of fixed structure: identities, what few numbers reach, cost, and what they refuse."""

import tracemalloc

import numpy as np
import pytest
import torch
from form_cases import random_values

from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import _sparse
from lowrank_sp.operators import LinearOperator


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def dense(form):
    delta = form.delta()
    return np.asarray(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("order", [1, 2, 3, 7, 10])
def test_wavelets_are_orthonormal_and_kill_polynomials(order):
    low = forms.daubechies(order)
    high = low[::-1] * (-1.0) ** np.arange(2 * order)
    for shift in range(order):
        overlap = low[2 * shift :] @ low[: 2 * order - 2 * shift]
        assert abs(overlap - (shift == 0)) <= 1e-12
    for power in range(order):
        t = np.arange(2 * order) / (2 * order)
        assert abs(high @ t**power) <= 1e-12


@pytest.mark.parametrize("order", [1, 4])
def test_coefficients_inside_keep_their_norm(order):
    """Wavelets that do not reach over an edge are orthonormal, whichever coefficients they have."""
    form = forms.WaveletCoefficients.create((40, 32), 1, order=order, scale=1.0, rng=0)
    rows, columns = form.coefficients().shape
    some = [
        i * columns + j for i in (order + 3, rows // 2 + order + 2) for j in (order + 1, order + 4)
    ]
    values = normal(4)
    form = forms.WaveletCoefficients(values, np.array(some), form.filter, (40, 32))
    assert abs(np.linalg.norm(dense(form)) - np.linalg.norm(values)) <= 1e-12
    assert form.rank_bound == 4


def test_frequencies_and_their_negatives_are_the_same():
    places = np.array([1 * 8 + 3, 11 * 8 + 5])
    one, other = (
        dense(forms.FourierCoefficients(np.ones(1), places[i : i + 1], (12, 8))) for i in (0, 1)
    )
    assert np.allclose(one, other)
    assert np.linalg.matrix_rank(one) == 2


def test_circulant_blocks_are_diagonal_in_the_fourier_basis():
    kernel = normal((1, 1, 9))
    update = dense(forms.BlockCirculant(kernel))
    f = np.fft.fft(np.eye(9)) / 3
    diagonal = f @ update @ f.conj().T
    assert np.allclose(diagonal, np.diag(np.diagonal(diagonal)))
    assert np.allclose(np.sort(spectrum(update)), np.sort(abs(np.fft.fft(kernel[0, 0]))))


ROTATED = {
    "reflections": lambda w: forms.Reflections.create(w, 4, rng=0),
    "orthogonal reflections": lambda w: forms.Reflections(normal((12, 3)), w, orthogonal=True),
    "blocks": lambda w: forms.BlockRotations.create(w, block=4),
    "butterfly": lambda w: forms.ButterflyRotations.create(w, block=6, stages=2),
}


@pytest.mark.parametrize("kind", ROTATED)
def test_rotations_keep_angles_between_outputs(kind):
    weight = normal((7, 12))
    form = ROTATED[kind](weight)
    parameters = {name: normal(a.shape, 1) for name, a in form.parameters().items()}
    form = form.replace({k: a for k, a in parameters.items() if k != "gains"})
    turned = form.merge(weight)
    assert np.linalg.norm(turned - weight) > 0.5 * np.linalg.norm(weight)
    assert np.allclose(turned @ turned.T, weight @ weight.T)


def test_a_series_is_a_rotation_to_its_order():
    weight = normal((7, 12))
    exact = random_values(forms.BlockRotations.create(weight, block=4), np.asarray, scale=0.01)
    errors = [
        np.linalg.norm(dense(forms.BlockRotations(exact.skew, weight, order)) - dense(exact))
        for order in (2, 3, 4)
    ]
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.1 * errors[1]


def test_all_butterfly_stages_mix_all_inputs():
    for stages, reach in ((1, 2), (2, 4), (3, 8)):
        form = forms.ButterflyRotations.create(np.eye(8), block=2, stages=stages)
        form = form.replace({"blocks": normal(form.blocks.shape)})
        assert np.all(np.count_nonzero(form.merge(np.eye(8)).round(12), axis=1) == reach)


def test_steps_of_one_vector_are_steps_of_all_factors():
    """Uni-LoRA: the map from the vector to all entries has orthonormal columns."""
    form = forms.DrawnEntries.create([(8, 4), (4, 16)], 3, length=10, rng=0)
    columns = []
    for unit in np.eye(10):
        moved = form.replace({"entries": unit})
        factors = [a for k in range(2) for a in moved.layer(k).delta().factors()]
        columns.append(np.concatenate([a.ravel() for a in factors]))
    gram = np.array(columns) @ np.array(columns).T
    assert np.allclose(gram, np.eye(10))


def test_a_bank_of_all_its_vectors_is_one_that_peft_saves_by_the_largest():
    """What logits are below the largest does not matter."""
    form = forms.BankFactors.create((8, 12), 2, vectors=6, length=4, rng=0)
    least = np.sort(form.up_logits, axis=-1)[..., -2:-1]
    cut = np.where(form.up_logits >= least, form.up_logits, -np.inf)
    assert np.array_equal(dense(form.replace({"up_logits": cut})), dense(form))


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_the_length_of_a_factor_does_not_matter(library):
    weight = normal((6, 5))
    form = random_values(forms.NormalizedProduct.create(weight, 3, rng=0), np.asarray)
    longer = form.replace({"up": 7.0 * form.up, "down": form.down / 3})
    assert np.allclose(dense(form), dense(longer))
    if library == "torch":
        start = forms.NormalizedProduct.create(torch.asarray(weight), 3, rng=0)
        up = start.up.requires_grad_()
        start.replace({"up": up}).apply(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
        assert torch.isfinite(up.grad).all()
        assert up.grad.norm() > 0


def test_strength_bounds_the_update_of_a_weight_of_unit_columns():
    weight = np.linalg.qr(normal((6, 6)))[0]
    form = random_values(forms.NormalizedProduct.create(weight, 3, rng=0), np.asarray)
    assert np.linalg.norm(dense(form)) <= abs(form.strength[0]) * (1 + 1e-12)


@pytest.mark.parametrize("count", [1, 5, 40, 50])
def test_places_of_large_matrices_by_parts_are_those_of_one_loop(count, monkeypatch):
    """The method of PyTorch for matrices too large for a test, on a small one."""
    monkeypatch.setattr(_sparse, "_STEPS", 7)
    found = _sparse._inside_out(50, count, np.random.RandomState(3))
    bits, array = np.random.RandomState(3), []
    for i in range(50):
        high, low = map(int, bits.randint(0, 2**32, 2, dtype=np.uint32))
        j = ((high << 32) + low) % (i + 1)
        array.append(i)
        array[i], array[j] = array[j], i
    assert np.array_equal(found, array[:count])


#: Trained numbers and rank of one square layer of width 4096.
COUNTS = {
    "FourierFT": (lambda s: forms.FourierCoefficients.create(s, 1000, rng=0), 1000, 2000),
    "FourierFT of PEFT": (lambda s: forms.FourierCoefficients.create(s, 1000, seed=1), 1000, 2000),
    "WaveFT": (lambda s: forms.WaveletCoefficients.create(s, 1000, order=2, rng=0), 1000, 1000),
    "SHiRA": (lambda s: forms.Sparse.create_random(s, 4, rng=0), 32_768, 4096),
    "C3A": (lambda s: forms.BlockCirculant.create(s, block=256, rng=0), 65_536, 4096),
    "MiSS": (lambda s: forms.SharedShard.create(s, 16), 65_536, 16),
    "Uni-LoRA": (lambda s: forms.DrawnFactors.create(s, 4, rng=0), 256, 4),
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
    fixed = sum(a.size for a in form.arrays(forms.Fixed).values())
    # A hundred bytes for every place drawn, of which Python keeps a dictionary.
    assert peak <= 100 * (count + fixed + 4096)


@pytest.mark.parametrize(
    "create",
    [
        lambda s: forms.FourierCoefficients.create(s, 500, rng=0),
        lambda s: forms.WaveletCoefficients.create(s, 500, order=2, rng=0),
        lambda s: forms.BlockCirculant.create(s, block=256, rng=0),
        lambda s: forms.SharedShard.create(s, 8),
    ],
    ids=["FourierFT", "WaveFT", "C3A", "MiSS"],
)
def test_applying_takes_the_memory_of_inputs(create):
    n, count = 1024, 16
    form = create((n, n))
    x = normal((count, n))
    form.apply(x)
    tracemalloc.start()
    form.apply(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 16 * 8 * count * n < 8 * n * n


REFUSED = {
    "count": (lambda: forms.FourierCoefficients.create((4, 6), 25), r"1\.\.24"),
    "count of PEFT": (lambda: forms.FourierCoefficients.create((4, 6), 0, seed=1), r"1\.\.24"),
    "places": (
        lambda: forms.FourierCoefficients(np.ones(2), np.array([3, 1]), (4, 6)),
        r"sorted, distinct and in 0\.\.23",
    ),
    "places of wavelets": (
        lambda: forms.WaveletCoefficients(np.ones(1), np.array([48]), forms.daubechies(2), (4, 6)),
        r"0\.\.47",
    ),
    "filter": (
        lambda: forms.WaveletCoefficients(np.ones(1), np.array([0]), np.ones(3), (4, 6)),
        "even length, got 3",
    ),
    "order": (lambda: forms.daubechies(11), r"1\.\.10, got 11"),
    "entries": (lambda: forms.Sparse.create_random((4, 6), 3, rng=0), r"1\.\.24"),
    "entries outside": (lambda: forms.Sparse.create((4, 6), places=np.array([24])), r"0\.\.23"),
    "block of a circulant": (
        lambda: forms.BlockCirculant.create((8, 12), block=3),
        "so 4, got 3",
    ),
    "rows of a shard": (
        lambda: forms.SharedShard.create((8, 12), 2, rows=3),
        "rows that divide 8",
    ),
    "columns of a shard": (lambda: forms.SharedShard.create((8, 12), 13), r"1\.\.12"),
    "sizes of shards": (
        lambda: forms.WeightShards.create(np.ones((8, 12)), 3),
        "divides both sides",
    ),
    "odd reflections": (
        lambda: forms.Reflections.create(np.ones((4, 6)), 3),
        "rank must be even, for reflections start in pairs, got 3",
    ),
    "pieces": (lambda: forms.BlockRotations.create(np.ones((4, 6)), block=4), "4 x 6, got 4"),
    "numbers of pieces": (
        lambda: forms.BlockRotations(np.ones((2, 2)), np.ones((4, 6))),
        r"p b = 6, or p = 1 where b divides 6, got \(2, 2\)",
    ),
    "stages": (
        lambda: forms.ButterflyRotations.create(np.ones((4, 12)), block=4, stages=3),
        r"b 2\^2 divides the 12 inputs, got b = 4",
    ),
    "blocks of a butterfly": (
        lambda: forms.ButterflyRotations(np.ones((1, 3, 2, 2)), np.ones((4, 1)), np.ones((4, 12))),
        "p b = 12",
    ),
    "length of vectors": (
        lambda: forms.VectorBank.create([(8, 12)], 2, length=5),
        "divide the sides of 8 x 12, got 5",
    ),
    "top": (
        lambda: forms.VectorBank.create([(8, 12)], 2, vectors=3, length=4, top=4),
        r"1\.\.3, the vectors of the bank, got 4",
    ),
    "no layers": (lambda: forms.VectorBank.create([], 2), "at least one weight"),
    "length": (lambda: forms.DrawnEntries.create([(8, 12)], 2, length=0), "at least 1, got 0"),
    "rank": (lambda: forms.DrawnEntries.create([(8, 12)], 9), r"1\.\.8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
