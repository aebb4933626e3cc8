"""Statistics of a layer's data: parts of the data add up, in any order and any library."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import gaussian
from safetensors.numpy import load_file, save_file

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters import InputPCA, MeanGradient, SecondMoment
from lowrank_sp.adapters.statistics import MeanSquare, pack, peak_scaled, unpack

N, SAMPLES = 12, 90
EPS = np.finfo(float).eps


def samples(dtype=np.float64, seed=0):
    """Inputs of distinct variances, off centre."""
    x = gaussian(SAMPLES, N, seed=seed, dtype=dtype if np.iscomplexobj(dtype(0)) else np.float64)
    return (x * 1.4 ** -np.arange(N) + np.linspace(-1, 1, N)).astype(dtype)


def batches(x):
    return [x[:7, :], x[7:8, :], x[8:50, :], x[50:, :]]


def stream(kind, parts, *args):
    statistic = kind.of(parts[0], *args)
    for part in parts[1:]:
        statistic = statistic.update(part)
    return statistic


def pca(x):
    """Singular values and directions of the centred data, in double precision."""
    x = x.astype(np.result_type(x, np.float64))
    _, s, vh = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return s, vh


def check_pca(statistic, x, tol):
    s, vh = pca(x)
    k = statistic.components.shape[0]
    assert statistic.count == len(x)
    np.testing.assert_allclose(to_host(statistic.values), s[:k], rtol=0, atol=tol * s[0])
    cosines = abs(np.sum(to_host(statistic.components) * vh[:k].conj(), axis=1))
    np.testing.assert_allclose(cosines, 1.0, atol=tol)
    np.testing.assert_allclose(to_host(statistic.mean), x.mean(axis=0), atol=tol * abs(x).max())
    assert statistic.energy == pytest.approx(np.sum(s**2), rel=float(max(tol, 100 * EPS)))


# -- second moments --


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128]
)
def test_second_moment(dtype):
    x = samples(np.complex128 if dtype == np.complex128 else np.float64).astype(dtype)
    statistic = stream(SecondMoment, batches(x))
    wide = x.astype(np.complex128 if dtype == np.complex128 else np.float64)
    expected = np.mean([np.outer(row, row.conj()) for row in wide], axis=0)
    assert statistic.mean.dtype == wide.dtype
    assert statistic.count == SAMPLES
    np.testing.assert_allclose(
        statistic.mean, expected, rtol=0, atol=50 * EPS * abs(wide).max() ** 2
    )


def test_second_moment_on_every_library(xp):
    data = xp.asarray(samples())
    statistic = stream(SecondMoment, batches(data))
    assert type(statistic.mean) is type(data)
    assert statistic.mean.device == data.device
    np.testing.assert_allclose(
        xp.host(statistic.mean), SecondMoment.of(samples()).mean, rtol=0, atol=50 * EPS
    )


def test_leading_axes_hold_samples():
    x = samples()
    stacked = SecondMoment.of(x.reshape(3, 30, N))
    np.testing.assert_allclose(stacked.mean, SecondMoment.of(x).mean, rtol=1e-13)
    assert stacked.count == SAMPLES
    assert InputPCA.of(x.reshape(3, 30, N), 2).count == SAMPLES


# -- gradients --


def test_mean_gradient(xp):
    gradients = [gaussian(5, 4, seed=seed) for seed in range(6)]
    statistic = stream(MeanGradient, [xp.asarray(g) for g in gradients])
    np.testing.assert_allclose(xp.host(statistic.mean), np.mean(gradients, axis=0), atol=20 * EPS)
    assert statistic.count == 6
    weighted = MeanGradient.of(xp.asarray(gradients[0]), 3).update(xp.asarray(gradients[1]), 1)
    expected = (3 * gradients[0] + gradients[1]) / 4
    np.testing.assert_allclose(xp.host(weighted.mean), expected, atol=20 * EPS)


def test_half_precision_gradients_are_summed_in_single():
    g = np.full((2, 2), 1.0, np.float16)
    statistic = MeanGradient.of(g)
    for _ in range(4):
        statistic = statistic.update(g * np.float16(1 / 1024))
    assert statistic.mean.dtype == np.float32
    np.testing.assert_allclose(statistic.mean, (1 + 4 / 1024) / 5, rtol=1e-6)


# -- laws of both means --


@pytest.mark.parametrize("kind", [SecondMoment, MeanGradient])
def test_parts_add_up_in_any_order(kind):
    parts = batches(samples()) if kind is SecondMoment else list(gaussian(4, 5, N))
    whole = stream(kind, parts)
    for order in ([1, 0, 3, 2], [3, 2, 1, 0]):
        first = stream(kind, [parts[i] for i in order[:2]])
        merged = first + stream(kind, [parts[i] for i in order[2:]])
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=50 * EPS)


def test_statistics_are_values():
    before = SecondMoment.of(samples())
    kept = before.mean.copy()
    before.mean.flags.writeable = False
    before.update(samples(seed=1))
    assert np.array_equal(before.mean, kept)


def test_tensors_of_a_training_loop_may_be_overwritten():
    x = torch.asarray(samples()).requires_grad_()
    gradient = torch.asarray(gaussian(3, N))
    expected = gradient.clone()
    statistics = SecondMoment.of(x), InputPCA.of(x, 3, rng=0), MeanGradient.of(gradient)
    assert not any(a.requires_grad for s in statistics for a in s.arrays().values())
    gradient.zero_()
    assert torch.equal(statistics[2].mean, expected)
    later = statistics[2].update(torch.full_like(expected, 2.0))
    assert torch.allclose(later.mean, (expected + 2.0) / 2)
    assert not torch.equal(later.mean, expected)


# -- principal directions --


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_one_batch_is_pca(dtype):
    x = samples(dtype)
    statistic = InputPCA.of(x, 5, rng=0)
    assert statistic.components.dtype == dtype
    check_pca(statistic, x, 30 * np.finfo(dtype).eps)
    gram = statistic.components @ statistic.components.conj().T
    assert abs(gram - np.eye(5)).max() <= 30 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_a_stream_that_keeps_every_direction_is_pca(dtype):
    x = samples(dtype)
    check_pca(stream(InputPCA, batches(x), N), x, 200 * np.finfo(dtype).eps)


def test_pca_on_every_library(xp):
    x = samples()
    data = xp.asarray(x)
    statistic = stream(InputPCA, batches(data), N)
    for part in (statistic.mean, statistic.components, statistic.values, statistic.explained):
        assert type(part) is type(data)
        assert part.device == data.device
    check_pca(statistic, x, 200 * EPS)


def test_merged_directions_are_those_of_all_samples():
    x = samples()
    halves = stream(InputPCA, batches(x)[:2], N), stream(InputPCA, batches(x)[2:], N)
    check_pca(halves[0] + halves[1], x, 200 * EPS)
    check_pca(halves[1] + halves[0], np.concatenate([x[8:], x[:8]]), 200 * EPS)


def test_a_truncated_stream_of_low_rank_inputs_is_exact():
    x = gaussian(SAMPLES, 3) * [3.0, 2.0, 1.0] @ gaussian(3, N, seed=1) + 1.0
    statistic = stream(InputPCA, batches(x), 4)
    s, vh = pca(x)
    np.testing.assert_allclose(statistic.values[:3], s[:3], rtol=1e-12)
    assert float(sum(statistic.explained)) == pytest.approx(1.0, abs=100 * EPS)
    cosines = abs(np.sum(statistic.components[:3] * vh[:3], axis=1))
    np.testing.assert_allclose(cosines, 1.0, atol=100 * EPS)


def test_a_truncated_stream_knows_what_it_lost():
    x = samples()
    statistic = stream(InputPCA, batches(x), 3)
    s, _ = pca(x)
    assert statistic.components.shape == (3, N)
    assert statistic.energy == pytest.approx(np.sum(s**2), rel=1e-13)
    # Dropping directions can only lower the singular values.
    assert np.all(statistic.values <= s[:3] * (1 + 1e-12))
    assert np.all(statistic.explained <= s[:3] ** 2 / np.sum(s**2) * (1 + 1e-12))
    assert statistic.explained[0] > 0.9 * s[0] ** 2 / np.sum(s**2)


def test_directions_settle():
    x = np.concatenate([samples(seed=seed) for seed in range(20)])
    early = InputPCA.of(x[:20], 4, rng=0)
    late = stream(InputPCA, list(x[:1500].reshape(-1, 100, N)), 4)
    later = late.update(x[1500:])
    assert not late.settled(early, 4)
    assert later.settled(late, 4)
    assert not later.settled(late, 4, cosine=1.0 + EPS)
    np.testing.assert_allclose(later.cosines(later), 1.0, atol=10 * EPS)
    turned = InputPCA(late.mean, -late.components, late.values, late.energy, late.count, late.rank)
    assert later.settled(turned, 4)  # signs do not count
    assert not later.settled(InputPCA.of(x[:3], 4, rng=0), 4)  # not yet that many directions


def test_one_sample_has_no_direction():
    statistic = InputPCA.of(np.ones((1, N)), 2, rng=0)
    assert statistic.energy == 0.0
    assert np.all(statistic.explained == 0.0)
    x = np.concatenate([np.ones((1, N)), samples()])
    check_pca(stream(InputPCA, [x[:1], x[1:]], N), x, 200 * EPS)


# -- files --


def test_calibration_file(tmp_path):
    x = samples()
    moments = {"a.q": SecondMoment.of(x), "a.q.b": SecondMoment.of(2 * x)}
    gradients = {"a.q": MeanGradient.of(gaussian(3, N), 5)}
    directions = {"a.q": InputPCA.of(x, 4, rng=0)}
    packed = pack(moments) | pack(gradients) | pack(directions)
    assert {"a.q.second_moment", "a.q.gradient", "a.q.components"} <= packed.keys()
    save_file(packed, tmp_path / "calibration.safetensors")
    read = load_file(tmp_path / "calibration.safetensors")
    for kind, given in (
        (SecondMoment, moments),
        (MeanGradient, gradients),
        (InputPCA, directions),
    ):
        back = unpack(kind, read)
        assert back.keys() == given.keys()
        for layer, statistic in given.items():
            for name, part in statistic.arrays().items():
                assert np.array_equal(back[layer].arrays()[name], part), name
    assert unpack(InputPCA, read)["a.q"].update(x).count == 2 * SAMPLES


def test_pack_on_every_library(xp):
    packed = pack({"layer": InputPCA.of(xp.asarray(samples()), 3, rng=0)})
    back = unpack(InputPCA, packed)["layer"]
    assert (back.count, back.rank) == (SAMPLES, 3)
    assert np.array_equal(xp.host(back.components), xp.host(packed["layer.components"]))


def test_a_missing_part_is_named():
    packed = pack({"layer": SecondMoment.of(samples())})
    del packed["layer.second_moment_count"]
    with pytest.raises(KeyError, match=r"layer\.second_moment_count"):
        unpack(SecondMoment, packed)


def test_peak_scaled():
    x = np.array([[1.0, -8.0], [2.0, 4.0]])
    np.testing.assert_array_equal(peak_scaled(x), x / 8)
    np.testing.assert_array_equal(peak_scaled(0 * x), 0 * x)


def test_statistics_of_two_libraries_do_not_add():
    with pytest.raises(TypeError, match="one array library"):
        SecondMoment.of(np.ones((2, 3))).update(torch.ones(2, 3))


def test_shares_of_tiny_inputs():
    x = np.array([[1.0, 0.0], [3.0, 0.1], [5.0, 0.0]], np.float32)
    known, tiny = (InputPCA.of(np.float32(size) * x, 2, rng=0) for size in (1.0, 1e-25))
    np.testing.assert_allclose(tiny.explained, known.explained, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_shares_survive_storage(size):
    x = np.array([[1.0, 0.0], [3.0, 0.1], [5.0, 0.0]], np.float32)
    statistic = InputPCA.of(np.float32(size) * x, 2, rng=0)
    stored = InputPCA.from_arrays(statistic.arrays())
    np.testing.assert_array_equal(stored.explained, statistic.explained)


def test_many_samples_are_counted():
    statistic = MeanSquare(np.ones(3), 3 * 10**9)
    assert MeanSquare.from_arrays(statistic.arrays()).count == 3 * 10**9


PCA = InputPCA.of(np.eye(3), 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SecondMoment.of(np.array([[1.0, math.nan]])), "finite.*skip it"),
        (lambda: InputPCA.of(np.array([[1.0, math.inf]]), 1), "finite.*skip it"),
        (lambda: MeanGradient.of(np.array([[math.nan]])), "gradient must be finite"),
        (lambda: MeanGradient.of(np.ones(3)), r"must be a matrix, got shape \(3,\)"),
        (lambda: SecondMoment.of(np.ones((0, 3))), "at least one sample"),
        (lambda: SecondMoment.of(np.ones((2, 3))).update(np.ones((2, 4))), "of one layer"),
        (lambda: InputPCA.of(np.ones((2, 3)), 1).update(np.ones((2, 4))), "3 entries, got 4"),
        (lambda: InputPCA.of(np.ones((2, 3)), 0), "rank must be at least 1, got 0"),
        (lambda: MeanGradient.of(np.ones((2, 3)), 0), "count must be at least 1, got 0"),
        (lambda: PCA.settled(PCA, 0), "rank must be at least 1, got 0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
