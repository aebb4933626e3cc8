"""Truncated singular value decompositions with certified errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    device,
    eps,
    host_view,
    inner,
    is_array,
    is_inexact,
    namespace,
    real_dtype,
)
from lowrank_sp.factors import SVD, check_rank
from lowrank_sp.linalg import krylov
from lowrank_sp.linalg.basis import check_oversampling
from lowrank_sp.linalg.dense import Wanted, finite, fits, gram_svd, lapack_svd, with_error
from lowrank_sp.operators import LinearOperator, as_operator

# Below this shorter side LAPACK answers before a sketch pays.
_SMALL = 96
# Seconds per unit of work, measured on two cores (docs/which-svd.md); only ratios matter.
_EIGH = 1e-10  # s^3
_GRAM = 2e-11  # s^2 l
_KRYLOV = 7e-11  # l s per column


def truncated_svd(
    a: Any, rank: int | None = None, *, tol: float | None = None, rng: RNG = None
) -> SVD:
    r"""Leading singular triplets of a matrix, to a certified accuracy.

    .. math:: A \approx U \,\mathrm{diag}(\sigma)\, V^H, \qquad \sigma_1 \ge \dots \ge \sigma_k

    Parameters
    ----------
    a : array of shape (..., m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
        Any floating, complex, integer or boolean dtype. Half precision is computed in float32.
    rank : int, optional
        Number of triplets, in ``1..min(m, n)``.
    tol : float, optional
        How far the answer may stray from what was asked, relative. With ``rank`` that is the exact
        triplets: every ``||A^H u_i - sigma_i v_i||`` is at most ``tol sigma_k`` (or rounding); by
        default ``4 sqrt(eps)``. Without ``rank`` it is ``A`` itself: the smallest rank with
        ``||A - U diag(sigma) V^H||_F <= tol ||A||_F`` is returned. With neither, all triplets are.
    rng : int, Generator or None
        Seed of the random starting block.

    Returns
    -------
    SVD
        Arrays of the library, device and compute dtype of ``a``. ``bounds`` certifies each singular
        value; ``error`` is ``||A - U diag(sigma) V^H||_F`` where it came for free.

    Raises
    ------
    ValueError
        If the matrix is not finite, ``rank`` is out of range, or ``tol`` is not in (0, 1).

    Notes
    -----
    The cheapest of three methods by measured cost is tried first, and the next one where its bounds
    miss the tolerance: a block Krylov space (:func:`~lowrank_sp.linalg.krylov.block_krylov`,
    ``4 m n`` flops a column, one read of ``a`` a block), the Gram matrix of the shorter side in
    float64, LAPACK. Matrices that are not arrays are never made dense.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.diag(1.0 / np.arange(1, 201))
    >>> f = truncated_svd(a, rank=3, rng=0)
    >>> f
    SVD(200 x 200, rank 3, float64)
    >>> bool(np.all(abs(f.s - [1, 1 / 2, 1 / 3]) <= f.bounds))
    True
    >>> truncated_svd(a, tol=0.2).rank
    14
    """
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol}; it is relative")
    if is_array(a) and a.ndim > 2:
        return _batched(a, rank, tol, rng)
    if (host := _on_host(a)) is not None:
        return _moved(truncated_svd(host, rank, tol=tol, rng=rng), a)
    operator = as_operator(a)
    m, n = operator.shape
    if rank is not None:
        rank = check_rank(rank, min(m, n), (m, n))
    return _truncated(operator, rank, tol, rng)


def randomized_svd(
    a: Any, rank: int, *, reads: int = 4, oversampling: int = 8, rng: RNG = None
) -> SVD:
    """Leading singular triplets from a fixed number of reads of the matrix.

    A sketch ``A^H omega`` and then ``reads - 1`` block Krylov steps. Where accuracy is what counts,
    and not the number of reads, call :func:`truncated_svd`.

    Parameters
    ----------
    a : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
    rank : int
        In ``1..min(m, n)``.
    reads : int
        At least 2. Every read multiplies ``rank + oversampling`` columns by ``A`` and ``A^H``.
    oversampling : int
        Columns beyond ``rank``.
    rng : int, Generator or None

    Returns
    -------
    SVD
        ``bounds`` certifies each singular value. ``error`` is the leave-one-out estimate of
        ``||A - U diag(sigma) V^H||_F``, good to about ten percent.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.diag(1.0 / np.arange(1, 201))
    >>> f = randomized_svd(a, rank=5, reads=3, rng=0)
    >>> truth = np.sqrt(np.sum(1.0 / np.arange(6, 201) ** 2))
    >>> bool(abs(f.error / truth - 1) < 0.1)
    True
    """
    if (host := _on_host(a)) is not None:
        f = randomized_svd(host, rank, reads=reads, oversampling=oversampling, rng=rng)
        return _moved(f, a)
    operator = as_operator(a)
    m, n = operator.shape
    rank = check_rank(rank, min(m, n), (m, n))
    if reads < 2:
        raise ValueError(f"reads must be at least 2, got {reads}; one read gives only a sketch")
    check_oversampling(oversampling)
    oriented, flipped = _oriented(operator)
    width = min(m, n, rank + oversampling)
    with oriented.session():
        f = krylov.fixed_reads(oriented, rank, width=width, reads=reads, rng=rng)
    return f.mH if flipped else f


def minor_svd(a: Any, rank: int) -> SVD:
    """Trailing singular triplets: the ``rank`` smallest, sorted from large to small.

    No sketch can find them. In single precision they come from the Gram matrix in float64, which
    resolves every singular value down to ``eps sigma_1``; in double precision from LAPACK.
    ``O(s^2 l)`` flops for sides ``s <= l``.

    Parameters
    ----------
    a : array, shape (m, n)
    rank : int
        In ``1..min(m, n)``.

    Examples
    --------
    >>> import numpy as np
    >>> minor_svd(np.diag([3.0, 1.0, 2.0]), rank=2).s
    array([2., 1.])
    """
    if (host := _on_host(a)) is not None:
        return _moved(minor_svd(host, rank), a)
    operator = as_operator(a)
    m, n = operator.shape
    rank = check_rank(rank, min(m, n), (m, n))
    if n > m:
        return minor_svd(operator.mH, rank).mH
    if eps(operator.dtype) > eps(np.float64) and n > _SMALL:
        f = gram_svd(operator, _exactly(rank), slice(0, rank), 0.0)
        if f is not None:
            return f
    f = lapack_svd(operator.to_dense())
    last = slice(n - rank, n)
    return SVD(f.u[:, last], f.s[last], f.vh[last, :], f.bounds[last])


def singular_values(a: Any) -> Array:
    """All singular values of a matrix, from large to small, accurate to ``eps sigma_1``.

    Parameters
    ----------
    a : array, shape (m, n), or an operator small enough to be made dense

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(np.diag([1.0, 3.0, 2.0]))
    array([3., 2., 1.])
    """
    operator = as_operator(a)
    if operator.shape[1] > operator.shape[0]:
        operator = operator.mH
    dense = finite(operator.to_dense())
    xp = namespace(dense)
    if eps(dense.dtype) > eps(np.float64):
        gram = inner(dense, dense)
        if eps(gram.dtype) == eps(np.float64):
            values = xp.flip(xp.linalg.eigvalsh(gram))
            values = xp.where(values > 0, values, xp.zeros_like(values))
            return xp.astype(values**0.5, real_dtype(xp, dense.dtype))
    return xp.linalg.svdvals(dense)


def _batched(a: Array, rank: int | None, tol: float | None, rng: RNG) -> SVD:
    """One SVD for every matrix of a stack."""
    xp = namespace(a)
    if rank is None and tol is not None:
        raise ValueError("a batch needs one rank, got only tol; loop over the matrices instead")
    if min(a.shape[-2:]) <= _SMALL or rank is None or 0 in a.shape:
        f = lapack_svd(as_compute(a))
        return f if rank is None else f.truncate(rank)
    flat = xp.reshape(a, (-1, *a.shape[-2:]))
    children = np.random.default_rng(rng).spawn(flat.shape[0])
    parts = [truncated_svd(flat[i, ...], rank, tol=tol, rng=g) for i, g in enumerate(children)]

    def stack(name: str) -> Array:
        arrays = xp.stack([getattr(f, name) for f in parts], axis=0)
        return xp.reshape(arrays, (*a.shape[:-2], *arrays.shape[1:]))

    return SVD(stack("u"), stack("s"), stack("vh"), stack("bounds"))


def _on_host(a: Any) -> np.ndarray | None:
    """An array of another library that NumPy can read in place; its BLAS is then as good."""
    if not is_array(a) or isinstance(a, np.ndarray):
        return None
    # Integers become the default float of their own library.
    return host_view(a if is_inexact(a.dtype) else as_compute(a))


def _moved(f: SVD, like: Array) -> SVD:
    xp = namespace(like)
    u, s, vh, bounds = (xp.asarray(x, device=device(like), copy=True) for x in (*f, f.bounds))
    return SVD(u, s, vh, bounds, f.error)


def _oriented(a: LinearOperator) -> tuple[LinearOperator, bool]:
    """``a`` or its adjoint, whichever is read once, else the one with fewer columns."""
    flipped = not a.one_read and (a.mH.one_read or a.shape[1] > a.shape[0])
    return (a.mH, True) if flipped else (a, False)


def _truncated(a: LinearOperator, rank: int | None, tol: float | None, rng: RNG) -> SVD:
    """:func:`truncated_svd` of an operator, its arguments checked."""
    m, n = a.shape
    short, long = sorted((m, n))
    accuracy = 4 * eps(a.dtype) ** 0.5
    dense = fits(a)
    truncation = None if rank is not None else tol
    if dense and (short <= _SMALL or (rank is None and (tol is None or tol < accuracy))):
        return lapack_svd(a.to_dense()).truncate(rank, tol=truncation)
    # Below this, what the values found lack of the norm is rounding in compute precision.
    resolved = rank is not None or (tol is not None and tol >= 3.5 * accuracy)
    if not (dense or resolved):
        raise ValueError(
            f"an operator that is not an array needs rank, or tol of at least {3.5 * accuracy:.1e}"
        )
    norm = math.nan if rank is not None else a.norm()
    wanted = _exactly(rank) if rank is not None else _energy(tol or 0.0, norm)
    accuracy = tol or accuracy if rank is not None else accuracy
    budget = (_EIGH * short**3 + _GRAM * short**2 * long) / (_KRYLOV * m * n) if dense else math.inf
    if rank is None:
        budget /= 4  # a space of unknown size may grow in vain
    if resolved and 4 * (rank or 1) + 48 <= budget:
        oriented, flipped = _oriented(a)
        width = min(max(oriented.block_columns, min((rank or 1) // 4, 16)), short)
        with oriented.session():
            found = krylov.block_krylov(
                oriented,
                wanted,
                tol=accuracy,
                rng=np.random.default_rng(rng),
                width=width,
                max_columns=max(512, 8 * (rank or 1)),
                max_reads=budget / width + 2,
            )
        if found.converged or not dense:
            return with_error(found.svd.mH if flipped else found.svd, norm, a)
    tall = a.mH if n > m else a
    index = None if rank is None else slice(short - rank, short)
    f = gram_svd(tall, wanted, index, accuracy)
    if f is None:
        return lapack_svd(a.to_dense()).truncate(rank, tol=truncation)
    return f.mH if n > m else f


def _exactly(rank: int) -> Wanted:
    return lambda _: rank


def _energy(tol: float, norm: float) -> Wanted:
    """Smallest rank whose error is within ``tol * norm``, once the values found tell it."""

    def wanted(theta: np.ndarray) -> int | None:
        if norm == 0.0:
            return 1
        tails = 1.0 - np.cumsum((theta / norm) ** 2)
        enough = np.flatnonzero(tails <= tol**2)
        return int(enough[0]) + 1 if len(enough) else None

    return wanted
