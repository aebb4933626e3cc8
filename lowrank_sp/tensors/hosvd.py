"""Tucker decompositions that need no iteration: truncated and sequentially truncated HOSVD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, device, frobenius, namespace
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.modes import memory_order, mode_dot, session
from lowrank_sp.tensors.ranks import Rank, as_tensor, check_truncation, scaled, tucker_rank
from lowrank_sp.tensors.subspace import leading_subspace, lost
from lowrank_sp.tensors.tucker import Tucker, project


def st_hosvd(
    x: Array, rank: Rank | None = None, *, tol: float | None = None, rng: RNG = None
) -> Tucker:
    r"""Sequentially truncated higher-order SVD.

    .. math:: X \approx G \times_1 U_1 \cdots \times_N U_N, \qquad U_k^H U_k = I

    One mode after the other is replaced by its leading subspace, and the tensor that shrank is
    handed on. The error is at most ``sqrt(N)`` times that of the best approximation of this
    multilinear rank, and known exactly: the squares of what the modes lose add up.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        Any floating, complex, integer or boolean dtype.
    rank : int, sequence of int, or float, optional
        As :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    tol : float, optional
        Instead of ``rank``: the error is at most ``tol ||X||``. Every mode may use an equal share
        of what the modes before it left over. With neither, the ranks are full and nothing is lost.
    rng : int, Generator or None
        For modes so long that their subspace is found by a Krylov space.

    Returns
    -------
    Tucker
        ``error`` is ``||X - t||_F``.

    Raises
    ------
    ValueError
        If ``x`` is not finite, ``rank`` is out of range, or ``rank`` and ``tol`` are both given.

    Notes
    -----
    ``n_1 + 2 r_1`` flops an entry for the first mode, of which two reads are made, and accordingly
    less for the next ones; modes are ordered so that this is least. Modes of full rank are left as
    they are, with the identity for a factor. Memory is that of the truncated tensors, at most
    ``r_1 / n_1`` of ``x`` for the first :cite:p:`vannieuwenhoven2012new`.

    Examples
    --------
    >>> import numpy as np
    >>> i = np.arange(30.0)
    >>> x = 1 / (1 + i[:, None, None] + i[:, None] + i)
    >>> t = st_hosvd(x, tol=1e-3)
    >>> t
    Tucker(30 x 30 x 30, rank (5, 5, 5), float64)
    >>> bool(np.isclose(np.linalg.norm(x - t.to_dense()), t.error))
    True
    """
    like, x, norm, factor, ranks, back = _checked(x, rank, tol)
    budget = (tol or 0.0) * norm
    core, factors, error = x, {}, 0.0
    order = _cheapest_order(x.shape, ranks)
    with session(x):
        for step, mode in enumerate(order):
            if tol is None and ranks[mode] == x.shape[mode]:
                factors[mode] = identity(x, mode)
                continue
            left = math.sqrt(max(0.0, budget**2 - error**2) / (len(order) - step))
            u, loss = leading_subspace(
                core, mode, rank=None if tol else ranks[mode], allowed=left, rng=rng
            )
            error = math.hypot(error, loss)
            factors[mode] = u
            core = mode_dot(core, adjoint(u), mode)
    t = Tucker(core * factor, tuple(factors[k] for k in range(x.ndim)), error * factor)
    return moved(t.permuted(back), like)


def hosvd(
    x: Array, rank: Rank | None = None, *, tol: float | None = None, rng: RNG = None
) -> Tucker:
    """Truncated higher-order SVD: the leading subspaces of all modes of ``x`` itself.

    With full rank, or for modes of which nothing is truncated, the core is all-orthogonal.
    :func:`st_hosvd` is cheaper, with the same bound on its error and mostly a smaller one.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    rank : int, sequence of int, or float, optional
        As :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    tol : float, optional
        Instead of ``rank``: every mode may lose ``tol ||X|| / sqrt(N)``.
    rng : int, Generator or None

    Returns
    -------
    Tucker
        ``error`` is ``||X - t||_F``. ``N`` reads of ``x`` for the subspaces, one for the core, and
        up to ``N`` for the error :cite:p:`delathauwer2000multilinear`.

    Examples
    --------
    >>> import numpy as np
    >>> t = hosvd(np.arange(24.0).reshape(2, 3, 4))
    >>> core = t.core.reshape(2, 12)
    >>> bool(abs(core[0] @ core[1]) < 1e-12)
    True
    """
    like, x, norm, factor, ranks, back = _checked(x, rank, tol)
    allowed = (tol or 0.0) * norm / x.ndim**0.5
    with session(x):
        factors = [
            leading_subspace(x, mode, rank=None if tol else ranks[mode], allowed=allowed, rng=rng)[
                0
            ]
            for mode in range(x.ndim)
        ]
        core = project(x, factors)
        error = projection_error(x, core, factors, norm)
    t = Tucker(core * factor, tuple(factors), error * factor)
    return moved(t.permuted(back), like)


def projection_error(x: Array, core: Array, factors: Sequence[Array], norm: float) -> float:
    """Distance of a tensor from its projection onto orthonormal factors.

    From ``||X||^2 - ||core||^2`` while that has digits to lose, else from what every mode loses.
    """
    size = frobenius(core)
    squares = (norm - size) * (norm + size)
    if squares > 1e-6 * norm**2:
        return math.sqrt(squares)
    error = 0.0
    for mode, u in enumerate(factors):
        if u.shape[1] < u.shape[0]:
            error = math.hypot(error, lost(x, mode, u))
            x = mode_dot(x, adjoint(u), mode)
    return error


def inverse(axes: Sequence[int]) -> list[int]:
    """The permutation that undoes ``axes``."""
    return sorted(range(len(axes)), key=axes.__getitem__)


def identity(x: Array, mode: int) -> Array:
    """The factor of a mode that is left as it is."""
    return namespace(x).eye(x.shape[mode], dtype=x.dtype, device=device(x))


def _checked(
    x: Array, rank: Rank | None, tol: float | None
) -> tuple[Array, Array, float, float, tuple[int, ...], Sequence[int]]:
    """The tensor as given; scaled, with its modes as they lie in memory; its norm; the scale; the
    ranks of these modes; and how the modes go back.
    """  # noqa: D205
    like, norm = as_tensor(x)
    check_truncation(rank, tol)
    ranks = tucker_rank(rank, like.shape)
    x, factor = scaled(on_host(like), norm)
    axes = memory_order(x)
    x, ranks = namespace(x).permute_dims(x, axes), tuple(ranks[k] for k in axes)
    return like, x, norm / factor, factor, ranks, inverse(axes)


def _cheapest_order(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Modes in the order in which truncating them costs least.

    A mode costs ``n + 2 r`` an entry and leaves ``r / n`` of the entries. Exchanging neighbours
    shows that the quotient of its cost and of what it removes must rise.
    """

    def price(mode: int) -> float:
        n, r = shape[mode], ranks[mode]
        return (n + 2 * r) / (1 - r / n) if r < n else np.inf

    return sorted(range(len(shape)), key=lambda mode: (price(mode), shape[mode]))
