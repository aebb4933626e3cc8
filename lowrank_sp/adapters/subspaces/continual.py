r"""Continual learning: adapters that leave alone what earlier tasks have learned.

Two notions of "alone". O-LoRA keeps the *row spaces* of the adapters apart, :math:`A_i A_t^H = 0`;
it needs no data. InfLoRA keeps the rows of the new adapter orthogonal to the *inputs* of the old
tasks, so that outputs on them do not change at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank_sp._arrays import RNG, Array, adjoint, as_compute, device, eps, frobenius, namespace
from lowrank_sp.adapters.forms import FixedDown
from lowrank_sp.adapters.forms._draws import factor_scale, zeros
from lowrank_sp.adapters.subspaces.projectors import Projector, through
from lowrank_sp.linalg.svd import truncated_svd


def overlap_penalty(down: Array, earlier: Any, *, power: int = 2) -> Array:
    r"""How far the rows of an adapter are from orthogonal to those of earlier ones: O-LoRA.

    .. math:: \sum_{i < t} \sum_{j k} \lvert (A_i A_t^H)_{jk} \rvert^p

    To be added to a loss, times a number. The paper :cite:p:`wang2023olora` has the square; its
    code takes the first power, which pulls with a force that does not fade near zero. The exact
    constraint, without a penalty, is :func:`restricted` with a :class:`Projector`.

    Parameters
    ----------
    down : array, shape (r, n)
        ``A_t``, trained.
    earlier : array of shape (R, n), or list or tuple of such
        ``A_i``; one array of all rows costs one product.
    power : {1, 2}

    Returns
    -------
    array, shape ()
        Zero where there is nothing earlier. It depends on the gauge: ``B A`` stays the same while
        ``A`` grows. Only whether it is zero does not.

    Examples
    --------
    >>> import numpy as np
    >>> down, earlier = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    >>> float(overlap_penalty(down, earlier)), float(overlap_penalty(down, earlier, power=1))
    (5.0, 3.0)
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    blocks: Sequence[Array] = earlier if isinstance(earlier, list | tuple) else [earlier]
    xp = namespace(down, *blocks)
    for block in blocks:
        if block.shape[-1] != down.shape[-1]:
            raise ValueError(
                f"rows must have {down.shape[-1]} entries as those of down, got {block.shape[-1]}"
            )
    sums = [xp.sum(abs(block @ adjoint(down)) ** power) for block in blocks]
    return sum(sums[1:], sums[0]) if sums else 0.0 * xp.sum(abs(down))


def scheduled_energy(task: int, tasks: int, *, first: float, last: float) -> float:
    r"""How much of the inputs of a task to keep: InfLoRA's thresholds, linear over the tasks.

    .. math:: \epsilon_t = \epsilon_0 + (\epsilon_1 - \epsilon_0)\, t / T

    For the ``energy`` of :meth:`Projector.grown` after task ``t``, counted from 0.

    Examples
    --------
    >>> scheduled_energy(5, 10, first=0.90, last=1.0)
    0.95
    """
    if not 0 < first <= 1 or not 0 < last <= 1:
        raise ValueError(f"first and last must be in (0, 1], got {first} and {last}")
    if not 0 <= task <= tasks or tasks < 1:
        raise ValueError(f"task must be in 0..{tasks}, got {task}")
    return first + (last - first) * task / tasks


def inflora(
    weight: Any,
    rank: int,
    *,
    second_moment: Array,
    occupied: Projector | None = None,
    gain: float = 3**-0.5,
    alpha: float | None = None,
    rng: RNG = None,
) -> FixedDown:
    r"""An adapter for a new task, whose fixed ``down`` does not see the inputs of old ones.

    .. math:: (I - P)\, \mathbb{E}[x x^H] = U \Sigma V^H, \qquad A = \text{gain} \cdot U_r^H,
              \qquad B = 0

    ``A P = 0``, so whatever ``B`` becomes, outputs on the range of ``P`` stay as they are
    :cite:p:`liang2024inflora`. ``P`` grows by :meth:`Projector.grown` after every task; that it may
    store the complement (``remove`` and ``retain`` in the code of the authors) changes nothing
    here.

    Parameters
    ----------
    weight : array of shape (m, n), or its shape
    rank : int
    second_moment : array, shape (n, n)
        ``E[x x^H]`` over the new task.
    occupied : Projector, optional
        Onto the inputs of the old tasks; None for the first task.
    gain : float
        Length of the rows of ``A``; the default has the variance of Kaiming's draw.
    alpha : float, optional
        ``scale = alpha / rank``; by default 1.
    rng : int, Generator or None

    Returns
    -------
    FixedDown
        Factors in the compute dtype of ``weight``, or of the moment where only a shape is given.

    Raises
    ------
    ValueError
        If fewer than ``rank`` directions of the inputs are free.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.adapters.subspaces import span
    >>> old = span(np.eye(4)[:, :1])
    >>> form = inflora((3, 4), 1, second_moment=np.diag([9.0, 4.0, 1.0, 0.0]), occupied=old, gain=1)
    >>> form.down
    array([[0., 1., 0., 0.]])
    """
    (m, n), like, scale = factor_scale(weight, rank, alpha)
    if tuple(second_moment.shape) != (n, n):
        raise ValueError(
            f"second_moment must have shape ({n}, {n}), got {tuple(second_moment.shape)}"
        )
    moment = as_compute(second_moment)
    like = moment[:0, :0] if isinstance(weight, tuple) else like
    xp = namespace(moment)
    if occupied is None:
        empty = xp.zeros((n, 0), dtype=moment.dtype, device=device(moment))
        occupied = Projector(empty)
    if occupied.shape != (n, n):
        raise ValueError(f"occupied must have shape ({n}, {n}), got {occupied.shape}")
    free = through(occupied.complement, moment)
    f = truncated_svd(free, rank, rng=rng)
    found = int(xp.sum(xp.astype(f.s > n * eps(moment.dtype) * frobenius(moment), xp.int32)))
    if found < rank:
        raise ValueError(
            f"only {found} directions of the inputs are free, less than the rank {rank}; "
            "ask for a smaller rank, or keep less energy of the old tasks"
        )
    # The vectors of small singular values are off by rounding of the large ones.
    down = gain * adjoint(through(occupied.complement, f.u))
    return FixedDown(zeros((m, rank), like), xp.astype(down, like.dtype), scale)
