"""Modes of a tensor: unfoldings, products along a mode, Khatri-Rao and Kronecker products.

In C order a tensor is, for every mode ``n``, a stack of matrices of shape ``(n, trailing)`` over
the leading modes. :func:`around` plans that shape, and the functions here execute on it, so that no
mode is ever moved to the front by a copy of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, adjoint, has_numba, inner, namespace, slices
from lowrank_sp._threads import blas_on_one_thread, matmul

# Entries of a tensor that are copied at a time.
_BLOCK = 2**20
# Entries of a tensor, and bytes of its rows, from which on compiled products along a mode pay.
_COMPILED_SIZE, _LONG = 2**20, 800


def around(shape: Sequence[int], mode: int) -> tuple[int, int, int]:
    """Sizes ``(leading, n, trailing)``: of the modes before ``mode``, of it, and of those after.

    Examples
    --------
    >>> around((2, 3, 4, 5), 2)
    (6, 4, 5)
    """
    return math.prod(shape[:mode]), shape[mode], math.prod(shape[mode + 1 :])


def memory_order(x: Array) -> tuple[int, ...]:
    """Modes from the slowest to the fastest one in memory, where that can be told.

    With its modes in this order a tensor in Fortran order, or any transposition of one in C order,
    is one in C order, of which :func:`around` needs no copy.

    Examples
    --------
    >>> import numpy as np
    >>> memory_order(np.ones((2, 3, 4), order="F"))
    (2, 1, 0)
    """
    steps = [-abs(step) for step in x.strides] if isinstance(x, np.ndarray) else [0] * x.ndim
    return tuple(sorted(range(x.ndim), key=steps.__getitem__))


def session(x: Array) -> AbstractContextManager[Any]:
    """Context for all that is done to a large tensor: its threads are not those of BLAS."""
    large = isinstance(x, np.ndarray) and x.size >= _COMPILED_SIZE
    return blas_on_one_thread if large else nullcontext()


def check_mode(mode: int, order: int) -> int:
    """``mode`` in ``0..order - 1``; negative modes count from the end."""
    if not -order <= mode < order:
        raise ValueError(
            f"mode must be in 0..{order - 1} for a tensor of order {order}, got {mode}"
        )
    return mode % order


def unfold(x: Array, mode: int) -> Array:
    """Unfolding ``X_(mode)``: the fibres of a mode as columns, those of the last mode fastest.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    mode : int

    Returns
    -------
    array, shape (n_mode, product of the other sizes)
        A view for the first mode of a contiguous tensor, and a copy otherwise.

    Examples
    --------
    >>> import numpy as np
    >>> unfold(np.arange(8).reshape(2, 2, 2), 1)
    array([[0, 1, 4, 5],
           [2, 3, 6, 7]])
    """
    xp = namespace(x)
    mode = check_mode(mode, x.ndim)
    return xp.reshape(xp.moveaxis(x, mode, 0), (x.shape[mode], -1))


def fold(matrix: Array, mode: int, shape: Sequence[int]) -> Array:
    """Tensor of the given shape of which ``matrix`` is the unfolding along ``mode``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(24).reshape(2, 3, 4)
    >>> np.array_equal(fold(unfold(x, 1), 1, x.shape), x)
    True
    """
    xp = namespace(matrix)
    mode = check_mode(mode, len(shape))
    rest = [n for k, n in enumerate(shape) if k != mode]
    return xp.moveaxis(xp.reshape(matrix, (shape[mode], *rest)), 0, mode)


def mode_dot(x: Array, matrix: Array, mode: int) -> Array:
    r"""Product along one mode: ``Y_(mode) = matrix @ X_(mode)``.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    matrix : array, shape (m, n_mode)
    mode : int

    Returns
    -------
    array, shape (n_1, ..., m, ..., n_N)
        ``2 m`` flops an entry and one read of ``x``, which is not copied.

    Examples
    --------
    >>> import numpy as np
    >>> mode_dot(np.ones((2, 3, 4)), np.ones((5, 3)), 1).shape
    (2, 5, 4)
    """
    xp = namespace(x, matrix)
    mode = check_mode(mode, x.ndim)
    leading, n, trailing = around(x.shape, mode)
    if matrix.ndim != 2 or matrix.shape[1] != n:
        raise ValueError(
            f"a matrix for mode {mode} must have shape (m, {n}), got {tuple(matrix.shape)}"
        )
    shape = (*x.shape[:mode], matrix.shape[0], *x.shape[mode + 1 :])
    if leading == 1:
        y = matmul(matrix, xp.reshape(x, (n, trailing)))
    elif trailing == 1:
        rows, columns = xp.reshape(x, (leading, n)), matrix.mT
        products = _compiled(rows, matrix)
        y = (products.matmul if products else matmul)(rows, columns)
    else:
        stack = xp.reshape(x, (leading, n, trailing))
        products = _compiled(stack, matrix)
        y = (products.stacked_product if products else matmul)(matrix, stack)
    return xp.reshape(y, shape)


def _compiled(stack: Array, matrix: Array) -> Any:
    """The compiled products, where BLAS is slower: of large stacks with few rows or columns."""
    if (
        isinstance(stack, np.ndarray)
        and stack.size >= _COMPILED_SIZE
        and stack.dtype == matrix.dtype
        and stack.dtype in (np.float32, np.float64)
        and stack.strides[-1] == stack.itemsize
        and stack.shape[-2] >= 3
        and stack.shape[-1] * stack.itemsize >= _LONG
        and 1 <= matrix.shape[0] <= 16
        and has_numba()
    ):
        from lowrank_sp._compiled import products

        return products
    return None


def multi_mode_dot(x: Array, matrices: Sequence[Array | None]) -> Array:
    """Products along all modes, those first that shrink the tensor most.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    matrices : sequence of N arrays of shape (m_k, n_k)
        A mode whose matrix is None is left as it is.

    Examples
    --------
    >>> import numpy as np
    >>> multi_mode_dot(np.ones((2, 3, 4)), [np.ones((1, 2)), None, np.ones((5, 4))]).shape
    (1, 3, 5)
    """
    if len(matrices) != x.ndim:
        raise ValueError(f"a tensor of order {x.ndim} needs {x.ndim} matrices, got {len(matrices)}")
    growth = {k: m.shape[0] / m.shape[1] for k, m in enumerate(matrices) if m is not None}
    for mode in sorted(growth, key=growth.__getitem__):
        x = mode_dot(x, matrices[mode], mode)
    return x


def fibre_blocks(x: Array, mode: int) -> Iterator[Array]:
    """The fibres of a mode as rows, in blocks of about ``2^20`` entries: ``X_(mode)^T`` by rows."""
    xp = namespace(x)
    leading, n, trailing = around(x.shape, mode)
    if trailing == 1:
        rows = xp.reshape(x, (leading, n))
        for part in slices(leading, max(n, _BLOCK // n)):
            yield rows[part, :]
        return
    stack = xp.reshape(x, (leading, n, trailing))
    for part in slices(leading, max(1, _BLOCK // (n * trailing))):
        for columns in slices(trailing, max(n, _BLOCK // n)):
            block = stack[part, :, columns]
            yield xp.reshape(block.mT, (-1, n))


def mode_gram(x: Array, mode: int) -> Array:
    """Gram matrix ``X_(mode) X_(mode)^H``, accumulated in float64.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    mode : int

    Returns
    -------
    array, shape (n_mode, n_mode)
        ``n_mode`` flops an entry and one read of ``x``, of which only blocks are copied.
    """
    xp = namespace(x)
    mode = check_mode(mode, x.ndim)
    leading, n, trailing = around(x.shape, mode)
    if leading == 1:
        rows = adjoint(xp.reshape(x, (n, trailing)))
        return inner(rows, rows)
    blocks = [xp.reshape(x, (leading, n))] if trailing == 1 else fibre_blocks(x, mode)
    # The rows are not conjugated, which conjugates their Gram matrix.
    return reduce(add, (inner(rows, rows) for rows in blocks)).mT


def khatri_rao(matrices: Sequence[Array]) -> Array:
    """Khatri-Rao product: Kronecker products of corresponding columns, the last factor fastest.

    Parameters
    ----------
    matrices : sequence of arrays of shape (n_k, r)

    Returns
    -------
    array, shape (product of all n_k, r)

    Examples
    --------
    >>> import numpy as np
    >>> khatri_rao([np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]])]).T
    array([[ 3.,  5.,  6., 10.]])
    """
    xp = namespace(*matrices)
    if len({m.shape[-1] for m in matrices}) > 1:
        shapes = " and ".join(str(tuple(m.shape)) for m in matrices)
        raise ValueError(f"matrices must have equally many columns, got shapes {shapes}")
    return reduce(
        lambda a, b: xp.reshape(a[:, None, :] * b[None, :, :], (-1, a.shape[-1])), matrices
    )


def kronecker(matrices: Sequence[Array]) -> Array:
    """Kronecker product, the last factor fastest.

    Parameters
    ----------
    matrices : sequence of arrays of shape (m_k, n_k)

    Returns
    -------
    array, shape (product of all m_k, product of all n_k)

    Examples
    --------
    >>> import numpy as np
    >>> kronecker([np.array([[1.0, 2.0]]), np.array([[3.0], [5.0]])])
    array([[ 3.,  6.],
           [ 5., 10.]])
    """
    xp = namespace(*matrices)
    return reduce(
        lambda a, b: xp.reshape(
            a[:, None, :, None] * b[None, :, None, :],
            (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]),
        ),
        matrices,
    )
