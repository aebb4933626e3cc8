"""Tensor trains of arrays: successive truncated SVDs."""

from __future__ import annotations

import math

from lowrank_sp._arrays import RNG, Array, adjoint, namespace
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.hosvd import identity
from lowrank_sp.tensors.modes import memory_order, mode_dot, session
from lowrank_sp.tensors.ranks import Rank, as_tensor, check_truncation, scaled, tt_rank
from lowrank_sp.tensors.subspace import leading_subspace
from lowrank_sp.tensors.tt import TT, mirrored


def tt_svd(x: Array, rank: Rank | None = None, *, tol: float | None = None, rng: RNG = None) -> TT:
    r"""Tensor train of a tensor by successive truncated SVDs.

    .. math:: X_{i_1 \dots i_N} \approx G_1[i_1]\, G_2[i_2] \cdots G_N[i_N]

    The error is at most ``sqrt(N - 1)`` times that of the best train of these ranks, and known
    exactly: the squares of what is lost at the bonds add up.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
        Any floating, complex, integer or boolean dtype.
    rank : int, sequence of int, or float, optional
        As :func:`~lowrank_sp.tensors.ranks.tt_rank` reads it.
    tol : float, optional
        Instead of ``rank``: the error is at most ``tol ||X||``. Every bond may use an equal share
        of what the bonds before it left over. With neither, the ranks are full and nothing is lost.
    rng : int, Generator or None
        For bonds whose subspace is found by a Krylov space.

    Returns
    -------
    TT
        ``error`` is ``||X - t||_F``. All cores but the last one to be found are orthogonal: from
        the left, or from the right where the last mode is shorter than the first.

    Raises
    ------
    ValueError
        If ``x`` is not finite, ``rank`` is out of range, or ``rank`` and ``tol`` are both given.

    Notes
    -----
    ``n + 2 r`` flops an entry for the first bond, of which two reads are made; each bond leaves
    ``r / n`` of the entries to the next ones. That is also the memory beyond ``x``
    :cite:p:`oseledets2011tensor`.

    Examples
    --------
    >>> import numpy as np
    >>> i = np.arange(20.0)
    >>> x = np.sin(i[:, None, None] + i[:, None] + i)
    >>> t = tt_svd(x, tol=1e-10)
    >>> t, t.error < 1e-10
    (TT(20 x 20 x 20, rank (1, 2, 2, 1), float64), True)
    """
    like, norm = as_tensor(x)
    check_truncation(rank, tol)
    ranks = tt_rank(rank, like.shape)
    x, factor = scaled(on_host(like), norm)
    xp = namespace(x)
    # A tensor in Fortran order is the mirror image of one in C order.
    reverse = memory_order(x) == tuple(range(x.ndim))[::-1]
    if reverse:
        x, ranks = xp.permute_dims(x, memory_order(x)), ranks[::-1]
    budget = (tol or 0.0) * norm / factor
    flipped = x.shape[-1] < x.shape[0]
    axis, step = (1, -1) if flipped else (0, 1)
    ranks = ranks[::step]
    # What is left of the tensor, a matrix between the modes of one bond and all those to come.
    rest, cores, bond, error = x, [], 1, 0.0
    with session(x):
        for k, n in enumerate(x.shape[::step][:-1]):
            rest = xp.reshape(rest, (-1, n * bond) if flipped else (bond * n, -1))
            if tol is None and ranks[k + 1] == bond * n:
                u = identity(rest, axis)
            else:
                left = math.sqrt(max(0.0, budget**2 - error**2) / (x.ndim - 1 - k))
                wanted = None if tol else ranks[k + 1]
                u, loss = leading_subspace(rest, axis, rank=wanted, allowed=left, rng=rng)
                error = math.hypot(error, loss)
                rest = mode_dot(rest, adjoint(u), axis)
            shape = (-1, n, bond) if flipped else (bond, n, -1)
            cores.append(xp.reshape(u.mT if flipped else u, shape))
            bond = u.shape[1]
    cores.append(xp.reshape(rest * factor, (1, -1, bond) if flipped else (bond, -1, 1)))
    cores = cores[::step]
    return moved(TT(mirrored(cores) if reverse else cores, error * factor), like)
