"""Laws of linear measurements: exact adjoints, isometries, definitions."""

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp._arrays import eps, to_host
from lowrank_sp.inverse import (
    DenseSensing,
    Entries,
    EntrySampling,
    GaussianSensing,
    Hankel,
    HankelLift,
    PartialFourier,
    RankOneSensing,
)
from lowrank_sp.testing import assert_adjoint, assert_exact_adjoint

M, N, SIZE = 14, 11, 40
MASK = np.random.default_rng(0).random((M, N)) < 0.4
ROWS, COLS = np.nonzero(MASK)


def gaussian(*shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


#: From an empty array and a function that draws Gaussian ones.
MEASUREMENTS = {
    "entries": lambda _, g: EntrySampling(Entries(ROWS, COLS, g(len(ROWS)), (M, N))),
    "dense": lambda _, g: DenseSensing(g(SIZE, M, N)),
    "gaussian": lambda like, _: GaussianSensing((M, N), SIZE, like=like, seed=7),
    "rank one": lambda _, g: RankOneSensing(g(SIZE, M), g(SIZE, N)),
    "fourier": lambda like, _: PartialFourier(ROWS, COLS, (M, N), like=like),
    "hankel": lambda like, _: HankelLift(M + N - 1, M, like=like),
}
DTYPES = [np.float32, np.complex128]


def made(name, dtype, xp):
    return MEASUREMENTS[name](
        xp.asarray(np.zeros(1, dtype)), lambda *shape: xp.asarray(gaussian(*shape, dtype=dtype))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_exact_adjoint(name, dtype, xp):
    measurement = made(name, dtype, xp)
    assert_exact_adjoint(measurement)
    y = gaussian(measurement.size, dtype=to_host(measurement.like).dtype, seed=3)
    back = measurement.adjoint(xp.asarray(y))
    assert_adjoint(back)
    image = measurement.forward(back.to_dense())
    assert type(image) is type(measurement.like)
    assert image.dtype == measurement.like.dtype


def test_the_check_can_fail():
    class Wrong(DenseSensing):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(AssertionError, match="differ by"):
        assert_exact_adjoint(Wrong(gaussian(SIZE, M, N)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_definitions(dtype):
    x, tol = gaussian(M, N, dtype=dtype), 100 * eps(dtype)
    a = gaussian(SIZE, M, N, dtype=dtype, seed=1)
    expected = np.einsum("lij,ij->l", a.conj(), x)
    assert np.allclose(DenseSensing(a).forward(x), expected, rtol=tol, atol=tol * SIZE)
    u, v = gaussian(SIZE, M, dtype=dtype, seed=2), gaussian(SIZE, N, dtype=dtype, seed=3)
    expected = np.einsum("li,ij,lj->l", u.conj(), x, v)
    assert np.allclose(RankOneSensing(u, v).forward(x), expected, rtol=tol, atol=tol * SIZE)
    spectrum = np.fft.fft2(x, norm="ortho")[ROWS, COLS]
    fourier = PartialFourier(ROWS, COLS, (M, N), like=x)
    assert np.allclose(fourier.forward(x), spectrum, rtol=tol, atol=tol * SIZE)
    assert np.array_equal(fourier.frequencies, (ROWS, COLS))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_gaussian_matrices_follow_from_the_seed(dtype, monkeypatch):
    # Blocks of three matrices, so that several are drawn.
    monkeypatch.setattr("lowrank_sp.inverse.measurements._BLOCK", 3 * M * N)
    like = np.zeros(0, dtype)
    first, again = (GaussianSensing((M, N), SIZE, like=like, seed=5) for _ in range(2))
    x = gaussian(M, N, dtype=dtype)
    assert np.array_equal(first.forward(x), again.forward(x))
    assert np.allclose(first.stored().forward(x), first.forward(x), rtol=1e-12)
    other = GaussianSensing((M, N), SIZE, like=like, seed=6)
    assert not np.allclose(other.forward(x), first.forward(x))
    matrices = first.stored()._flat
    assert len(np.unique(matrices)) == matrices.size
    # The variance of M m n normal draws is known to sqrt(2 / (M m n)).
    deviation = 4 * np.sqrt(2 / matrices.size)
    assert abs(SIZE * np.mean(abs(matrices) ** 2) - 1) <= deviation


def test_gaussian_sensing_preserves_norms_in_the_mean():
    x = gaussian(M, N)
    measured = GaussianSensing((M, N), 4000, like=x).forward(x)
    assert abs(np.linalg.norm(measured) / np.linalg.norm(x) - 1) <= 4 / np.sqrt(2 * 4000)


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hankel(rows, dtype, xp):
    h, tol = gaussian(12, dtype=dtype), 100 * eps(dtype)
    columns = 13 - rows
    dense = np.array([[h[i + j] for j in range(columns)] for i in range(rows)])
    matrix = Hankel(xp.asarray(h), rows)
    assert matrix.shape == (rows, columns)
    assert np.allclose(to_host(matrix.to_dense()), dense, atol=tol)
    lift = HankelLift(12, rows, like=xp.asarray(h))
    assert np.allclose(to_host(lift.average(lift.lift(xp.asarray(h)).to_dense())), h, atol=tol)
    identity = lift.forward(lift.adjoint(xp.asarray(h)).to_dense())
    assert np.allclose(to_host(identity), h, atol=tol)
    if min(rows, columns) > 1:
        factors = lr.LowRank(
            xp.asarray(dense[:, :2]), xp.asarray(gaussian(2, columns, dtype=dtype))
        )
        from_factors, from_dense = lift.average(factors), lift.average(factors.to_dense())
        assert np.allclose(to_host(from_factors), to_host(from_dense), atol=10 * tol)


def test_averaging_is_the_projection_onto_hankel_matrices():
    x, lift = gaussian(M, N), HankelLift(M + N - 1, M, like=np.zeros(0))
    nearest = lift.lift(lift.average(x)).to_dense()
    other = lift.lift(gaussian(M + N - 1, seed=2)).to_dense()
    # The residual is orthogonal to every Hankel matrix.
    product = np.sum((x - nearest) * other)
    assert abs(product) <= 1000 * eps(x.dtype) * np.linalg.norm(x) * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DenseSensing(np.ones((2, 2))), r"must have shape \(M, m, n\), got \(2, 2\)"),
        (lambda: GaussianSensing((2, 2), 0, like=np.ones(1)), "size must be at least 1, got 0"),
        (lambda: RankOneSensing(np.ones((2, 2)), np.ones((3, 2))), r"got \(2, 2\) and \(3, 2\)"),
        (lambda: PartialFourier([0, 0], [0, 0], (2, 2), like=np.ones(1)), "distinct"),
        (lambda: Hankel(np.ones(3), 4), r"rows in 1\.\.N, got shape \(3,\) and 4"),
        (lambda: HankelLift(3, 0, like=np.ones(1)), r"rows must be in 1\.\.3"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
