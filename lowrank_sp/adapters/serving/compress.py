r"""Many adapters in one pair of bases (joint diagonalization), from their factors alone.

.. math:: \min \; \sum_i \frac{\lVert s_i B_i A_i - U \Sigma_i V \rVert_F^2}
                              {\lVert s_i B_i A_i \rVert_F^2}

With a dense core for each adapter this is a Tucker decomposition of the stack along two modes, with
a diagonal one a CP decomposition :cite:p:`gabrielsson2025compress`. Updates are never multiplied
out, let alone stacked: memory is proportional to the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowrank_sp._arrays import RNG
from lowrank_sp.adapters.serving.shared import SharedAdapters, Stack, identity
from lowrank_sp.factors import check_rank
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.joint import joint_diagonal, joint_svd
from lowrank_sp.tensors.tucker import Tucker

Callback = Callable[[int, float, SharedAdapters], Any]


def jd_full(
    adapters: Sequence[Any],
    *,
    rank: int,
    init: SharedAdapters | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback | None = None,
    normalize: bool = True,
) -> Solution:
    """One pair of orthonormal bases, and a dense core for each adapter (JD-Full).

    Parameters
    ----------
    adapters : sequence
        :class:`~lowrank_sp.adapters.forms.Product`, anything else with ``up``, ``down`` and
        ``scale``, or ``LowRank``; of one shape, dtype and array library, of any ranks.
    rank : int
        Columns ``k`` of the bases, in ``1..min(m, n)``.
    init : SharedAdapters, optional
        Where to start; by default at leading subspaces of the factors.
    rng : int, Generator or None
        For a start from a sketch.
    stop : Stop
        The change is that of the norm of the cores relative to that of the adapters.
    callback : callable, optional
        Called as ``callback(step, change, value)``.
    normalize : bool
        Whether all adapters count alike, whatever their norms. Otherwise the sum of their squared
        errors is minimized.

    Returns
    -------
    Solution
        ``value`` is :class:`SharedAdapters`. No step raises the error.

    Raises
    ------
    TypeError, ValueError
        If the adapters do not fit each other, which names the one, or are not finite.

    Notes
    -----
    :func:`~lowrank_sp.tensors.joint.joint_svd` of the normalized stack: ``O(N (m + n) r k)`` flops
    a sweep, ``O(N ((m + n) r + k^2))`` memory.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp import LowRank
    >>> rng = np.random.default_rng(0)
    >>> u, v = rng.standard_normal((20, 4)), rng.standard_normal((4, 15))
    >>> adapters = [LowRank(u @ rng.standard_normal((4, 2)), rng.standard_normal((2, 4)) @ v)
    ...             for _ in range(10)]
    >>> shared = jd_full(adapters, rank=4).value
    >>> shared, shared.error < 1e-12
    (SharedAdapters(10 adapters of 20 x 15, dense cores of 4, 1 clusters, float64), True)
    """
    stack = Stack.of(adapters, normalize)
    w, start = stack.matrices, None
    check_rank(rank, min(w.shape[1:]), w.shape[1:])
    if init is not None:
        cores, (left, right) = stack.unscaled(init.cores), (init.left, init.right)
        unit = identity(len(init), cores)
        start = Tucker(cores, (unit, left[0, ...], right[0, ...].mT))
    solution = joint_svd(
        w, rank=rank, init=start, rng=rng, stop=stop, callback=_seen(callback, stack.tucker)
    )
    return replace(solution, value=stack.tucker(solution.value))


def jd_diag(
    adapters: Sequence[Any],
    *,
    rank: int,
    init: SharedAdapters | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback | None = None,
    normalize: bool = True,
) -> Solution:
    """One pair of bases, and a diagonal core for each adapter (JD-Diag).

    Parameters are those of :func:`jd_full`, and so are the results, but that bases are not
    orthonormal; ``rank`` may exceed the sizes. This is
    :func:`~lowrank_sp.tensors.joint.joint_diagonal` of the normalized stack.
    """
    stack, start = Stack.of(adapters, normalize), None
    if init is not None:
        cores = stack.unscaled(init.cores)
        start = CP.of_factors((cores, init.left[0, ...], init.right[0, ...].mT))
    solution = joint_diagonal(
        stack.matrices,
        rank=rank,
        init=start,
        rng=rng,
        stop=stop,
        callback=_seen(callback, stack.cp),
    )
    return replace(solution, value=stack.cp(solution.value))


def _seen(callback: Callback | None, answer: Callable[[Any], SharedAdapters]) -> Any:
    if callback is None:
        return None
    return lambda step, change, value: callback(step, change, answer(value))
