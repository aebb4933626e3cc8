"""Laws of the mode algebra, and what every decomposition checks at its edge."""

import numpy as np
import pytest
import tensorly as tl
from cases import gaussian
from tensorly.cp_tensor import validate_cp_rank
from tensorly.tt_tensor import validate_tt_rank
from tensorly.tucker_tensor import validate_tucker_rank

from lowrank_sp import tensors
from lowrank_sp.tensors import modes, ranks

SHAPES = [(7,), (5, 4), (3, 4, 5), (1, 4, 1, 3), (2, 3, 4, 2, 3)]
DTYPES = [np.float32, np.float64, np.complex128]
PAIRS = [(shape, mode) for shape in SHAPES for mode in range(len(shape))]


def wide(a):
    return a.astype(np.result_type(a, np.float64))


def close(a, b, dtype, size=None):
    size = np.linalg.norm(b) if size is None else size
    return np.linalg.norm(a - b) <= 50 * np.finfo(dtype).eps * size


@pytest.mark.parametrize(("shape", "mode"), PAIRS)
def test_unfold_is_that_of_tensorly_and_fold_undoes_it(shape, mode, xp):
    x = gaussian(*shape)
    matrix = tensors.unfold(xp.asarray(x), mode)
    assert np.array_equal(xp.host(matrix), tl.unfold(x, mode))
    assert np.array_equal(xp.host(tensors.fold(matrix, mode, shape)), x)


def test_the_first_unfolding_is_a_view():
    x = gaussian(3, 4, 5)
    assert np.shares_memory(tensors.unfold(x, 0), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "mode"), PAIRS)
def test_mode_dot(shape, mode, dtype, xp):
    x, matrix = gaussian(*shape, dtype=dtype), gaussian(6, shape[mode], dtype=dtype, seed=1)
    y = tensors.mode_dot(xp.asarray(x), xp.asarray(matrix), mode)
    truth = np.moveaxis(np.tensordot(wide(matrix), wide(x), (1, mode)), 0, mode)
    assert close(xp.host(y), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_multi_mode_dot(shape, dtype, xp):
    x = gaussian(*shape, dtype=dtype)
    matrices = [gaussian(2, n, dtype=dtype, seed=k) for k, n in enumerate(shape)]
    matrices[-1] = None
    y = tensors.multi_mode_dot(
        xp.asarray(x), [None if m is None else xp.asarray(m) for m in matrices]
    )
    kept = [k for k, m in enumerate(matrices) if m is not None]
    truth = tl.tenalg.multi_mode_dot(wide(x), [wide(matrices[k]) for k in kept], modes=kept)
    assert close(xp.host(y), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "mode"), PAIRS)
def test_mode_gram(shape, mode, dtype, xp):
    x = gaussian(*shape, dtype=dtype)
    gram = xp.host(modes.mode_gram(xp.asarray(x), mode))
    matrix = tl.unfold(wide(x), mode)
    assert gram.dtype == wide(x).dtype
    assert close(gram, matrix @ matrix.conj().T, np.float64)


@pytest.mark.parametrize("mode", range(3))
def test_fibres_in_blocks(mode, monkeypatch):
    monkeypatch.setattr(modes, "_BLOCK", 24)
    x = gaussian(5, 4, 6)
    blocks = list(modes.fibre_blocks(x, mode))
    assert len(blocks) > 1
    rows, matrix = np.concatenate(blocks), tl.unfold(x, mode)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, matrix.T))
    assert close(modes.mode_gram(x, mode), matrix @ matrix.T, np.float64)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mode):
    x = LAYOUTS[layout](gaussian(3, 4, 5))
    matrix = gaussian(2, x.shape[mode])
    assert np.array_equal(tensors.unfold(x, mode), tl.unfold(np.ascontiguousarray(x), mode))
    assert close(tensors.mode_dot(x, matrix, mode), tl.tenalg.mode_dot(x, matrix, mode), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_khatri_rao_and_kronecker(dtype, xp):
    a = [gaussian(n, 3, dtype=dtype, seed=n) for n in (2, 4, 5)]
    given = [xp.asarray(m) for m in a]
    truth = tl.tenalg.khatri_rao([wide(m) for m in a])
    assert close(xp.host(tensors.khatri_rao(given)), truth, dtype)
    truth = np.kron(np.kron(wide(a[0]), wide(a[1])), wide(a[2]))
    assert close(xp.host(tensors.kronecker(given)), truth, dtype)
    assert np.array_equal(xp.host(tensors.kronecker(given[:1])), a[0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: tensors.unfold(x, 3), r"mode must be in 0\.\.2 for a tensor of order 3, got 3"),
        (lambda x: tensors.mode_dot(x, np.ones((2, 2)), 1), r"must have shape \(m, 4\)"),
        (lambda x: tensors.multi_mode_dot(x, [None]), "needs 3 matrices, got 1"),
        (lambda x: tensors.khatri_rao([x[0], x[0, :, :2]]), "equally many columns"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call(np.ones((3, 4, 5)))


# -- ranks --


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(10, 10, 10), (145, 145, 200), (5, 6, 7, 8)])
def test_fractions_are_those_of_tensorly(shape, fraction):
    assert ranks.tucker_rank(fraction, shape) == tuple(validate_tucker_rank(shape, fraction))
    assert ranks.cp_rank(fraction, shape) == max(1, validate_cp_rank(shape, fraction))
    theirs = validate_tt_rank(shape, fraction)
    most = ranks.tt_rank(None, shape)
    assert ranks.tt_rank(fraction, shape) == tuple(map(min, theirs, most))


@pytest.mark.parametrize(
    ("function", "rank", "expected"),
    [
        (ranks.tucker_rank, None, (4, 3, 2)),
        (ranks.tucker_rank, 3, (3, 3, 2)),
        (ranks.tucker_rank, np.int64(4), (4, 3, 2)),
        (ranks.tucker_rank, [1, 3, 2], (1, 3, 2)),
        (ranks.tt_rank, None, (1, 4, 2, 1)),
        (ranks.tt_rank, 3, (1, 3, 2, 1)),
        (ranks.tt_rank, (1, 2, 2, 1), (1, 2, 2, 1)),
        (ranks.cp_rank, 20, 20),
    ],
)
def test_ranks(function, rank, expected):
    assert function(rank, (4, 3, 2)) == expected


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 1)])
def test_ranks_of_vectors_and_matrices(shape):
    assert ranks.tt_rank(0.5, shape) == (1,) * (len(shape) + 1)
    assert ranks.tt_rank(None, shape) == (1,) * (len(shape) + 1)


@pytest.mark.parametrize(
    ("function", "rank", "error", "text"),
    [
        (ranks.tucker_rank, 5, ValueError, r"rank must be in 1\.\.4 for shape 4 x 3 x 2, got 5"),
        (ranks.tucker_rank, (1, 4, 1), ValueError, r"rank\[1\] must be in 1\.\.3 for shape"),
        (ranks.tucker_rank, (1, 1), ValueError, "rank must have 3 entries for shape 4 x 3 x 2"),
        (ranks.tucker_rank, (1, 1.0, 1), TypeError, r"rank\[1\] must be an integer, got 1.0"),
        (ranks.tucker_rank, 2.0, ValueError, r"as a fraction must be in \(0, 1\], got 2.0"),
        (ranks.tt_rank, 0, ValueError, r"rank must be in 1\.\.4"),
        (ranks.tt_rank, (2, 2, 2, 1), ValueError, r"rank\[0\] must be in 1\.\.1"),
        (ranks.tt_rank, -0.5, ValueError, "as a fraction"),
        (ranks.cp_rank, 25, ValueError, r"rank must be in 1\.\.24"),
        (ranks.cp_rank, True, TypeError, "rank must be an integer, got True"),
    ],
)
def test_bad_ranks(function, rank, error, text):
    with pytest.raises(error, match=text):
        function(rank, (4, 3, 2))


def test_rank_and_tolerance_exclude_each_other():
    with pytest.raises(ValueError, match=r"give rank or tol, not both, got rank=2 and tol=0\.1"):
        ranks.check_truncation(2, 0.1)
    with pytest.raises(ValueError, match=r"tol must be in \(0, 1\), got 1.5"):
        ranks.check_truncation(None, 1.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_must_be_finite(value, xp):
    x = gaussian(3, 4, 5)
    x[1, 2, 3] = value
    with pytest.raises(ValueError, match="the tensor must be finite"):
        ranks.as_tensor(xp.asarray(x))


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "a tensor must be an array, got list"),
        (np.float64(1.0) * np.ones(()), ValueError, r"needs a mode and an entry, got shape \(\)"),
        (np.ones((2, 0)), ValueError, "needs a mode and an entry"),
        (np.array(["a"]), TypeError, "dtype must be floating"),
    ],
)
def test_tensors(x, error, text):
    with pytest.raises(error, match=text):
        ranks.as_tensor(x)


@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 1e300), (np.float64, 1e-300), (np.float32, 1e30)]
)
def test_scaling_is_exact(dtype, size, xp):
    x = (gaussian(3, 4) * size).astype(dtype)
    given, norm = ranks.as_tensor(xp.asarray(x))
    y, factor = ranks.scaled(given, norm)
    assert 0.1 < np.linalg.norm(xp.host(y)) < 10
    assert np.array_equal(xp.host(y) * dtype(factor), x)
