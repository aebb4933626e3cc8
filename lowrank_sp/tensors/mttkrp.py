"""Products of a tensor with Khatri-Rao products.

Inside, factors are held as *rows*, of shape ``(R, n_k)``. Partial products then have the rank as
their leading axis, so that what follows the one product that reads the tensor is a stack of
matrix-vector products on contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from lowrank_sp._arrays import Array, device, is_complex, namespace
from lowrank_sp.tensors.modes import around, check_mode

Rows = Sequence[Array]


def mttkrp(x: Array, factors: Sequence[Array], mode: int) -> Array:
    r"""Matricized tensor times Khatri-Rao product.

    .. math:: M = X_{(n)} \, \overline{A_1 \odot \dots \odot A_{n-1} \odot A_{n+1} \dots \odot A_N}

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    factors : sequence of N arrays of shape (n_k, R)
        The one at ``mode`` gives ``R`` only.
    mode : int

    Returns
    -------
    array, shape (n_mode, R)
        One product of ``2 R`` flops an entry on a view of ``x``, which contracts the larger of the
        groups of modes before and after ``mode``, and matrix-vector products for the other one.

    Examples
    --------
    >>> import numpy as np
    >>> mttkrp(np.ones((2, 3, 4)), [np.ones((n, 1)) for n in (2, 3, 4)], 1).T
    array([[8., 8., 8.]])
    """
    xp = namespace(x, *factors)
    mode = check_mode(mode, x.ndim)
    rows = [f.mT for f in factors]
    leading, n, trailing = around(x.shape, mode)
    before = khatri_rao_rows(rows[:mode], like=rows[mode])
    after = khatri_rao_rows(rows[mode + 1 :], like=rows[mode])
    if trailing >= leading:
        partial = conjugate(after) @ xp.reshape(x, (leading * n, trailing)).mT
        return contracted(partial, leading, before, last=False).mT
    partial = conjugate(before) @ xp.reshape(x, (leading, n * trailing))
    return contracted(partial, n, after, last=True).mT


def khatri_rao_rows(rows: Rows, *, like: Array) -> Array:
    """Khatri-Rao product of rows, ``(R, n_1), (R, n_2), ... -> (R, n_1 n_2 ...)``; ones if none."""
    xp = namespace(like)
    if not rows:
        return xp.ones((like.shape[0], 1), dtype=like.dtype, device=device(like))
    return reduce(lambda a, b: xp.reshape(a[:, :, None] * b[:, None, :], (a.shape[0], -1)), rows)


def conjugate(a: Array) -> Array:
    """Complex conjugate; real arrays as they are."""
    return namespace(a).conj(a) if is_complex(a.dtype) else a


def contracted(partial: Array, first: int, rows: Array, *, last: bool) -> Array:
    """Term by term, ``(R, first, rest)`` without its last group of modes, or its first one."""
    xp = namespace(partial, rows)
    cube = xp.reshape(partial, (partial.shape[0], first, -1))
    rows = conjugate(rows)
    return (cube @ rows[:, :, None])[:, :, 0] if last else (rows[:, None, :] @ cube)[:, 0, :]
