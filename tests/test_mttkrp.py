"""MTTKRP and the dimension tree against the formula, on every library, dtype and layout."""

import itertools

import numpy as np
import pytest
from cases import gaussian

from lowrank_sp import LowRank
from lowrank_sp.tensors import mttkrp
from lowrank_sp.tensors.mttkrp import khatri_rao_rows
from lowrank_sp.tensors.source import Dense, FactoredStack, halfway

SHAPES = [(5,), (4, 6), (3, 4, 5), (1, 4, 5), (6, 1, 1), (3, 4, 2, 5), (2, 3, 2, 3, 2)]
RANK = 7  # above every size
DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def factors_of(shape, dtype=np.float64, rank=RANK):
    return [gaussian(n, rank, seed=k, dtype=dtype) for k, n in enumerate(shape)]


def naive(x, factors, mode):
    """``sum over all other indices of x * conj(the product of the other factors)``."""
    letters = "abcde"[: x.ndim]
    others = [k for k in range(x.ndim) if k != mode]
    operands = [x, *(factors[k].conj() for k in others)]
    subscripts = ",".join([letters, *(f"{letters[k]}r" for k in others)])
    if not others:
        return np.repeat(x[:, None], factors[0].shape[1], axis=1)
    return np.einsum(f"{subscripts}->{letters[mode]}r", *operands)


def bound(x, factors, mode):
    """Rounding of a sum of products, by their magnitudes."""
    sizes = naive(abs(x), [abs(f) for f in factors], mode)
    return 10 * x.size**0.5 * np.finfo(x.dtype).eps * sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, dtype):
    x, factors = gaussian(*shape, dtype=dtype), factors_of(shape, dtype)
    for mode in range(len(shape)):
        m = mttkrp(x, factors, mode)
        assert m.dtype == dtype
        assert np.all(abs(m - naive(x, factors, mode)) <= bound(x, factors, mode))
        assert np.array_equal(m, mttkrp(x, factors, mode - len(shape)))


def test_every_library(xp):
    x, factors = gaussian(3, 4, 5), factors_of((3, 4, 5))
    data = xp.asarray(x)
    for mode in range(3):
        m = mttkrp(data, [xp.asarray(f) for f in factors], mode)
        assert type(m) is type(data)
        assert m.device == data.device
        assert np.all(abs(xp.host(m) - naive(x, factors, mode)) <= bound(x, factors, mode))


def test_mode_is_checked():
    with pytest.raises(ValueError, match=r"mode must be in 0\.\.1 for a tensor of order 2, got 2"):
        mttkrp(np.ones((2, 3)), [np.ones((2, 1)), np.ones((3, 1))], 2)


def sequential(x, factors, order):
    """MTTKRPs one mode at a time, each factor replaced by a function of its MTTKRP."""
    factors, products = list(factors), {}
    for mode in order:
        products[mode] = naive(x, factors, mode)
        factors[mode] = np.tanh(products[mode].real) + factors[mode]
    return products


def swept(source, factors):
    products = {}

    def update(axis, product, rows):
        products[source.modes[axis]] = product.T
        return np.tanh(product.real) + rows

    rows = [np.ascontiguousarray(factors[mode].T) for mode in source.modes]
    source.sweep(rows, update)
    return list(products), products


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tree_is_sequential(shape, order, dtype):
    """Every mode sees the newest factors, in the order 1, ..., N for both layouts."""
    x = np.array(gaussian(*shape, dtype=dtype), order=order)
    factors = factors_of(shape, dtype)
    visited, products = swept(Dense.of(x, 1.0), factors)
    # The stride of a mode of size one says nothing about its place.
    assert visited == list(range(len(shape))) or 1 in shape
    expected = sequential(x, factors, visited)
    for mode, product in products.items():
        # A rounding of tanh's argument enters the products of all later modes.
        scale = np.max(abs(expected[mode]))
        assert np.max(abs(product - expected[mode])) <= 1e4 * np.finfo(dtype).eps * scale


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
def test_permuted_layouts_are_not_copied(axes):
    base = gaussian(3, 4, 5)
    x = base.transpose(axes)
    source = Dense.of(x, 1.0)
    assert np.shares_memory(source.matrix, base)
    visited, products = swept(source, factors_of(x.shape))
    expected = sequential(x, factors_of(x.shape), visited)
    for mode, product in products.items():
        np.testing.assert_allclose(product, expected[mode], rtol=1e-10)


def test_tensors_with_gaps_are_copied():
    x = gaussian(6, 8, 10)[::2, ::-1, 1::3]
    source = Dense.of(x, 1.0)
    assert source.matrix.flags.c_contiguous
    assert np.array_equal(source.tensor, x.transpose(source.modes))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_stack_of_factored_matrices(dtype):
    left, right = gaussian(4, 6, 2, dtype=dtype), gaussian(4, 2, 5, seed=1, dtype=dtype)
    source, x = FactoredStack.of(LowRank(left, right)), left @ right
    factors = factors_of(x.shape, dtype)
    visited, products = swept(source, factors)
    expected = sequential(x, factors, visited)
    for mode in range(3):
        scale = np.max(abs(expected[mode]))
        assert np.max(abs(products[mode] - expected[mode])) <= 1e4 * np.finfo(dtype).eps * scale
    model = np.einsum("ar,br,cr->abc", *factors)
    distance = np.linalg.norm(x - model)
    assert abs(source.distance([f.T for f in factors]) - distance) <= 1e-13 * distance
    for sizes in ((4, 6, 5), (3, 4, 5)):
        core, bases = source.core(sizes)
        full = np.einsum("abc,ia,jb,kc->ijk", core, *bases)
        size = np.linalg.norm(x)
        if sizes == x.shape:
            assert np.linalg.norm(full - x) <= 100 * np.finfo(dtype).eps * size
        # A projection: what is lost is orthogonal to what is kept.
        assert (
            abs(np.linalg.norm(core) ** 2 + np.linalg.norm(full - x) ** 2 - size**2)
            <= 1e-12 * size**2
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distance(shape):
    x, factors = gaussian(*shape), factors_of(shape)
    source = Dense.of(x, 1.0)
    rows = [f.T for f in factors]
    model = khatri_rao_rows(rows, like=rows[0]).sum(axis=0).reshape(shape)
    distance = np.linalg.norm(x - model)
    assert abs(source.distance(rows) - distance) <= 1e-13 * distance


@pytest.mark.parametrize(
    ("shape", "split"), [((9,), 1), ((200, 200, 200), 2), ((1000, 10, 10), 1), ((60,) * 4, 2)]
)
def test_halves_are_of_least_size(shape, split):
    assert halfway(shape) == split
