"""Quantizers: the nearest level, to half a step, and products without the decoded matrix."""

import math
from functools import partial
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import gaussian

import lowrank_sp as lr
from lowrank_sp._arrays import to_host
from lowrank_sp.adapters import double, fp8_e4m3, fp8_e5m2, int_affine, int_symmetric, nf4
from lowrank_sp.adapters.quantize import Quantized, _blocks, nf4_levels
from lowrank_sp.testing import assert_adjoint

M, N = 12, 150  # blocks of 64 leave a short one

#: As bitsandbytes prints them, in single precision.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]

#: Quantizer, bits of a code, entries of a block.
FORMATS = {
    "nf4": (nf4, 4, 64),
    "nf4, blocks of 32": (partial(nf4, block=32), 4, 32),
    "int8": (partial(int_symmetric, bits=8), 8, 64),
    "int4": (int_symmetric, 4, 64),
    "int3": (partial(int_symmetric, bits=3), 3, 64),
    "int2": (partial(int_symmetric, bits=2), 2, 64),
    "affine 8": (partial(int_affine, bits=8), 8, 64),
    "affine 4": (int_affine, 4, 64),
    "affine 1": (partial(int_affine, bits=1, block=50), 1, 50),
    "e4m3": (fp8_e4m3, 8, N),
    "e4m3, blocks": (partial(fp8_e4m3, block=64), 8, 64),
    "e5m2": (fp8_e5m2, 8, N),
    "nf4, double": (lambda a: double(nf4(a)), 4, 64),
}
every = pytest.mark.parametrize("name", FORMATS)


def matrix(dtype=np.float64, shape=(M, N)):
    a = gaussian(*shape) * np.exp(gaussian(shape[0], 1, seed=1))
    a[0] = 0.0
    return a.astype(dtype)


def unpacked(q):
    """One code an entry, by a loop over bytes."""
    per, rows = 8 // q.bits, []
    for row in to_host(q.codes):
        codes = [(int(byte) >> (q.bits * k)) & (2**q.bits - 1) for byte in row for k in range(per)]
        rows.append(codes[: q.shape[1]])
    return np.array(rows)


def blocks_of(a, block):
    for i, row in enumerate(a):
        for b, start in enumerate(range(0, len(row), block)):
            yield i, b, slice(start, min(start + block, len(row)))


def test_levels_of_nf4():
    # The published ones were computed in single precision.
    np.testing.assert_allclose(nf4_levels(), NF4, rtol=0, atol=2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("block", [16, 50, 64, 1000])
def test_nf4_is_what_a_loop_says(block):
    a = matrix()
    q = nf4(a, block=block)
    codes, decoded = unpacked(q), q.to_dense()
    for i, b, part in blocks_of(a, block):
        scale = max(abs(x) for x in a[i, part])
        assert q.scales[i, b] == scale
        for j in range(part.start, part.stop):
            distances = [abs(a[i, j] - scale * level) for level in nf4_levels()]
            if scale:
                assert distances[codes[i, j]] <= min(distances) + 1e-15 * scale
            assert decoded[i, j] == scale * nf4_levels()[codes[i, j]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integers_are_what_a_loop_says(bits):
    a, eps = matrix(), np.finfo(float).eps
    symmetric, affine = int_symmetric(a, bits), int_affine(a, bits)
    decoded, shifted = symmetric.to_dense(), affine.to_dense()
    for i, _, part in blocks_of(a, 64):
        row, largest = a[i, part], abs(a[i, part]).max()
        step = largest / (2 ** (bits - 1) - 1) or 1.0
        near = abs(row / step - np.round(row / step))
        clear = abs(near - 0.5) > 1e-9  # ties may go either way
        expected = (np.round(row / step) * step)[clear]
        np.testing.assert_allclose(
            decoded[i, part][clear], expected, rtol=0, atol=8 * eps * largest
        )
        low, high = row.min(), row.max()
        step = (high - low) / (2**bits - 1) or 1.0
        clear = abs((row - low) / step % 1 - 0.5) > 1e-9
        expected = (low + np.round((row - low) / step) * step)[clear]
        np.testing.assert_allclose(
            shifted[i, part][clear], expected, rtol=0, atol=8 * eps * max(largest, 1e-300)
        )


def test_a_short_block_has_a_range_of_its_own():
    a = 5.0 + gaussian(3, 7)
    q = int_affine(a, 8, block=5)
    for i, b, part in blocks_of(a, 5):
        assert q.offsets[i, b] == a[i, part].min()
        assert q.scales[i, b] == a[i, part].max() - a[i, part].min()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@every
def test_error_is_within_half_a_step(name, dtype):
    quantize, _, block = FORMATS[name]
    a = matrix(dtype)
    q = quantize(a)
    compute = np.result_type(dtype, np.float32)
    assert (q.shape, q.dtype) == ((M, N), compute)
    decoded, levels = q.to_dense(), to_host(q.levels).astype(float)
    assert decoded.dtype == compute
    scales = q.scales.to_dense().reshape(M, -1) if name == "nf4, double" else q.scales
    half = np.diff(levels).max() / 2
    for i, b, part in blocks_of(a, block):
        largest = abs(a[i, part]).max()
        slack = 8 * np.finfo(compute).eps * largest
        if name == "nf4, double":
            slack += (nf4(a).scales.max() - nf4(a).scales.min()) / 255 / 2 * (1 + half)
        assert abs(a[i, part] - decoded[i, part]).max() <= half * scales[i, b] + slack


@every
def test_same_codes_on_every_library(name, xp):
    quantize, bits, _ = FORMATS[name]
    a = matrix()
    data = xp.asarray(a)
    q, reference = quantize(data), quantize(a)
    for part in (q.codes, q.levels, q.to_dense()):
        assert type(part) is type(data)
        assert part.device == data.device
    assert q.bits == bits
    assert xp.host(q.codes).dtype == np.uint8
    assert np.array_equal(xp.host(q.codes), reference.codes)
    np.testing.assert_allclose(xp.host(q.to_dense()), reference.to_dense(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_torch(dtype):
    a = torch.asarray(matrix(np.float32)).to(dtype)
    q = nf4(a)
    assert q.dtype == torch.float32
    assert torch.equal(q.codes, nf4(a.to(torch.float32)).codes)


@pytest.mark.parametrize("name", ["nf4", "nf4, double", "int3", "affine 4"])
def test_products(name, xp, monkeypatch):
    monkeypatch.setattr(_blocks, "_CHUNK", 5 * N)  # 5 rows at a time, and 2 that remain
    q = FORMATS[name][0](xp.asarray(matrix()))
    dense = xp.host(q.to_dense())
    assert_adjoint(q)
    x, y = gaussian(N, 3), gaussian(M, 3)
    tol = 100 * np.finfo(float).eps * np.linalg.norm(dense) * math.sqrt(N * 3)
    assert np.abs(xp.host(q @ xp.asarray(x)) - dense @ x).max() <= tol
    assert np.abs(xp.host(q.mT @ xp.asarray(y)) - dense.T @ y).max() <= tol
    both = q.normal(xp.asarray(x))
    assert np.abs(xp.host(both[1]) - dense.T @ (dense @ x)).max() <= tol * np.linalg.norm(dense)
    assert q.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    whole = FORMATS[name][0](matrix())
    assert np.array_equal(xp.host(q.codes), whole.codes)


def test_products_decode_a_block_of_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(_blocks, "_CHUNK", 3 * N)
    q = nf4(matrix())
    sizes = [block.shape for _, block in q.row_blocks()]
    assert sizes == [(3, N)] * 4
    monkeypatch.setattr(Quantized, "to_dense", None)
    assert (q @ np.ones((N, 2))).shape == (M, 2)
    assert (q.mT @ np.ones((M, 2))).shape == (N, 2)
    assert q.norm() > 0


@pytest.mark.parametrize(
    ("quantize", "published"),
    [(fp8_e4m3, ml_dtypes.float8_e4m3fn), (fp8_e5m2, ml_dtypes.float8_e5m2)],
    ids=["e4m3", "e5m2"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fp8_is_the_cast(quantize, published, dtype):
    limit = float(ml_dtypes.finfo(published).max)
    values = np.arange(256, dtype=np.uint8).view(published).astype(dtype)
    values = np.unique(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2  # exact in single precision
    near = np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)
    random = gaussian(2000).astype(dtype) * 2.0 ** np.linspace(-20, np.log2(limit) - 3, 2000)
    x = np.concatenate([values, ties, *near, random.astype(dtype)])
    decoded = quantize(x[None, :].astype(dtype)).to_dense()[0]
    if dtype == np.float64:
        # ml_dtypes casts float64 by way of single precision, which rounds entries near ties twice.
        once = np.ones(len(x), bool)
        once[len(values) + len(ties) : -2000] = False
        x, decoded = x[once], decoded[once]
    assert np.array_equal(decoded, x.astype(published).astype(dtype))
    beyond = quantize(np.array([[2 * limit, -3 * limit, 1e-30]], dtype)).to_dense()[0]
    assert np.array_equal(beyond, [limit, -limit, 0.0])


def test_fp8_rounds_float64_once():
    tie = 1.0 + 2.0**-4  # between 1 and 1.125, to even: 1
    above, below = np.nextafter(tie, 2.0), np.nextafter(tie + 2.0**-3, 0.0)
    decoded = fp8_e4m3(np.array([[tie, above, below, tie + 2.0**-3]])).to_dense()
    assert np.array_equal(decoded, [[1.0, 1.125, 1.125, 1.25]])


def test_bits_in_storage():
    a = matrix(np.float32, (128, 256))
    assert nf4(a).codes.shape == (128, 128)
    assert nf4(a).bits_per_entry == 4 + 32 / 64
    assert int_affine(a).bits_per_entry == 4 + 64 / 64
    assert int_symmetric(a, 2).bits_per_entry == 2 + 32 / 64
    assert fp8_e4m3(a).bits_per_entry == 8 + 32 / 256
    assert double(nf4(a)).bits_per_entry == 4 + 8 / 64 + 64 / 256 / 64
    assert double(int_affine(a)).bits_per_entry == 4 + 8 / 64 + 64 / 256 / 64 + 32 / 64


def test_more_bits_are_closer():
    a = matrix()
    errors = [lr.relative_error(int_symmetric(a, bits).to_dense(), a) for bits in range(2, 9)]
    assert all(b < 0.6 * a for a, b in pairwise(errors))


def test_nf4_suits_gaussian_entries():
    a = gaussian(100, 256)
    errors = [lr.relative_error(q.to_dense(), a) for q in (nf4(a), int_symmetric(a))]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nf4(gaussian(3, 4, dtype=np.complex128)), TypeError, "got complex128"),
        (lambda: nf4(np.ones((2, 2), int)), TypeError, "got int64"),
        (lambda: nf4(np.ones(3)), ValueError, r"got shape \(3,\)"),
        (lambda: nf4(np.ones((0, 3))), ValueError, r"got shape \(0, 3\)"),
        (lambda: fp8_e4m3(np.array([[np.nan, 1.0]])), ValueError, "must be finite"),
        (lambda: nf4(np.array([[np.inf, 1.0]])), ValueError, "must be finite"),
        (lambda: int_affine(np.array([[-3e38, 3e38]], np.float32)), ValueError, "overflow"),
        (lambda: nf4(np.ones((2, 2)), block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: fp8_e4m3(np.ones((2, 2)), block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: int_symmetric(np.ones((2, 2)), 1), ValueError, r"bits must be in 2\.\.8, got 1"),
        (lambda: int_affine(np.ones((2, 2)), 9), ValueError, r"bits must be in 1\.\.8, got 9"),
        (lambda: double(double(nf4(np.ones((2, 2))))), ValueError, "quantized already"),
    ],
)
def test_refusals(call, error, text):
    with np.errstate(over="ignore"), pytest.raises(error, match=text):
        call()
