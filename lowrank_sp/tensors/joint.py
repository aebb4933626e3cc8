"""Joint factorizations of many matrices of one shape, dense or already factored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    frobenius,
    host_view,
    is_array,
    namespace,
)
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.alternating import Problem, moved
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.cp_als import cp_als, decompose, least_squares_step
from lowrank_sp.tensors.cp_start import given_factors
from lowrank_sp.tensors.hooi import tucker2
from lowrank_sp.tensors.mttkrp import conjugate
from lowrank_sp.tensors.ranks import NOT_FINITE, Rank, cp_rank, tucker_rank
from lowrank_sp.tensors.source import FactoredStack
from lowrank_sp.tensors.tucker import Tucker

# An array (L, m, n), a LowRank of that shape, or a sequence of L factored matrices (m, n).
Stack = Any


class _State(NamedTuple):
    core: Array
    left: Array
    right: Array


def joint_svd(
    stack: Stack,
    *,
    rank: Rank,
    init: Tucker | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Tucker], Any] | None = None,
) -> Solution:
    r"""One pair of orthonormal factors for many matrices, and a small core for each.

    .. math:: \min_{U^H U = I,\; V^H V = I,\; C_l} \; \sum_{l=1}^L \lVert W_l - U C_l V^T \rVert_F^2

    For one matrix this is its truncated SVD. Stacks of adapters are compressed in this form, and
    cross-layer adapters are made of it.

    Parameters
    ----------
    stack : array of shape (L, m, n), LowRank of that shape, or sequence of LowRank or SVD
        The matrices ``W_l``. Factored ones, whose ranks may differ, are not formed.
    rank : int, (int, int), or float
        Columns of ``U`` and of ``V``, as in :func:`~lowrank_sp.tensors.hooi.tucker2`.
    init : Tucker, optional
        Where to start; by default a sequentially truncated HOSVD.
    rng : int, Generator or None
    stop : Stop
        The change is that of the norm of the core relative to the stack's.
    callback : callable, optional

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.tensors.tucker.Tucker` with ``core[l] = C_l`` and factors
        ``(I, U, V)``.

    Notes
    -----
    An array goes to :func:`~lowrank_sp.tensors.hooi.tucker2`. Factored matrices of rank ``r`` cost
    ``O(L (m + n) r k)`` flops a sweep and ``O(L (m + n) r)`` memory
    :cite:p:`gabrielsson2025compress`. The subspaces of a sweep are exact where the Gram matrix of
    the shorter side of ``m x L r`` or ``n x L r`` is cheap; for longer ones the last subspace is
    improved by a Krylov step, which never loses either.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> stack = [LowRank(rng.standard_normal((20, 2)), rng.standard_normal((2, 15))) for _ in "abc"]
    >>> solution = joint_svd(stack, rank=6)
    >>> solution.value.rank, solution.value.error < 1e-12
    ((3, 6, 6), True)
    """
    stack = stacked(stack)
    if is_array(stack):
        return tucker2(stack, rank=rank, init=init, rng=rng, stop=stop, callback=callback)
    count, *shape = stack.shape
    ranks = (count, *tucker_rank(rank, shape, copies=count))
    source = _source(stack)
    w, norm = source.stack, source.norm

    def projected(left: Array, right: Array) -> _State:
        core = (adjoint(left) @ w.left) @ (w.right @ conjugate(right))
        return _State(core, left, right)

    if init is None:
        generator = np.random.default_rng(rng)
        left = source.subspace(None, ranks[1], rng=generator)
        right = source.mT.subspace(conjugate(left), ranks[2], rng=generator)
        start = projected(left, right)
    elif init.shape == tuple(stack.shape) and init.rank == ranks:
        xp = namespace(w.left)
        start = projected(*(xp.linalg.qr(moved(f, w.left))[0] for f in init.factors[1:]))
    else:
        raise ValueError(
            f"init must have shape {tuple(stack.shape)} and rank {ranks}, got {init.shape} and "
            f"{init.rank}"
        )

    def step(state: _State) -> tuple[_State, float]:
        left = source.subspace(conjugate(state.right), ranks[1], state.left)
        right = source.mT.subspace(conjugate(left), ranks[2], state.right)
        following = projected(left, right)
        change = abs(frobenius(following.core) - frobenius(state.core))
        return following, change / norm if norm else 0.0

    def value(state: _State) -> Tucker:
        error = frobenius(source.distances(state.left, state.core, state.right.mT))
        core, left, right = (moved(part, stack.left) for part in state)
        unit = namespace(core).eye(count, dtype=core.dtype, device=device(core))
        return Tucker(core, (unit, left, right), error)

    return iterate(step, start, stop=stop, dtype=stack.dtype, callback=callback, value=value)


def joint_diagonal(
    stack: Stack,
    *,
    rank: int | float,
    init: CP | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, CP], Any] | None = None,
    regularization: float = 0.0,
    line_search: bool = True,
) -> Solution:
    r"""One pair of factors for many matrices, and a diagonal core for each.

    .. math:: \min \; \sum_{l=1}^L \lVert W_l - U \, \mathrm{diag}(c_l)\, V^T \rVert_F^2

    This is the CP decomposition of the stack. Unlike those of :func:`joint_svd` its factors are
    unique under mild conditions, but not orthogonal.

    Parameters
    ----------
    stack : array of shape (L, m, n), LowRank of that shape, or sequence of LowRank or SVD
        The matrices ``W_l``. Factored ones, whose ranks may differ, are not formed.
    rank : int or float
        Columns of ``U`` and of ``V``, as in :func:`~lowrank_sp.tensors.cp_als.cp_als`.
    init, rng, stop, callback, regularization, line_search
        As in :func:`~lowrank_sp.tensors.cp_als.cp_als`.

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.tensors.cp.CP` of shape ``(L, m, n)``, of which
        :meth:`~lowrank_sp.tensors.cp.CP.matrix` gives one matrix as a ``LowRank``.

    Notes
    -----
    An array goes to :func:`~lowrank_sp.tensors.cp_als.cp_als`. Factored matrices of rank ``r`` cost
    ``O(L (m + n) r R)`` flops a sweep :cite:p:`gabrielsson2025compress`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u, v = rng.standard_normal((20, 4)), rng.standard_normal((15, 4))
    >>> stack = [LowRank(u * rng.standard_normal(4), v.T) for _ in range(6)]
    >>> solution = joint_diagonal(stack, rank=4, rng=0)
    >>> (solution.value.matrix(2) - stack[2]).norm() < 1e-10
    True
    """
    stack = stacked(stack)
    if is_array(stack):
        return cp_als(
            stack,
            rank=rank,
            init=init,
            rng=rng,
            stop=stop,
            callback=callback,
            regularization=regularization,
            line_search=line_search,
        )
    source, shape = _source(stack), tuple(stack.shape)
    rank = cp_rank(rank, shape)
    return decompose(
        Problem(source, 1.0, stack.left),
        rank,
        None if init is None else given_factors(init, shape, rank),
        rng=rng,
        stop=stop,
        callback=callback,
        step=least_squares_step(source.norm, regularization, line_search),
        compress=None,
    )


def stacked(stack: Stack) -> Any:
    """A stack as one array, or as one LowRank padded to the largest rank."""
    if is_array(stack) or isinstance(stack, Factored):
        if len(stack.shape) != 3:
            raise ValueError(f"a stack of matrices has shape (L, m, n), got {tuple(stack.shape)}")
        return stack if is_array(stack) else LowRank(*stack.factors())
    matrices = list(stack)
    if not matrices or not all(isinstance(w, Factored) for w in matrices):
        raise TypeError("a stack must be an array, a LowRank, or a sequence of LowRank or SVD")
    if len({tuple(w.shape) for w in matrices}) > 1:
        shapes = ", ".join(str(tuple(w.shape)) for w in matrices[:3])
        raise ValueError(f"matrices of a stack must have one shape, got {shapes}, ...")
    pairs = [w.factors() for w in matrices]
    xp = namespace(*[part for pair in pairs for part in pair])
    widest = max(w.rank for w in matrices)

    def padded(part: Array, axis: int) -> Array:
        shape = list(part.shape)
        shape[axis] = widest - shape[axis]
        zeros = xp.zeros(tuple(shape), dtype=part.dtype, device=device(part))
        return xp.concat([part, zeros], axis=axis)

    return LowRank(
        xp.stack([padded(left, 1) for left, _ in pairs]),
        xp.stack([padded(right, 0) for _, right in pairs]),
    )


def _source(stack: LowRank) -> FactoredStack:
    """The products of a stack; where NumPy can read its factors in place, it computes."""
    left, right = (as_compute(part) for part in stack.factors())
    hosts = host_view(left), host_view(right)
    if hosts[0] is not None and hosts[1] is not None:
        left, right = hosts
    source = FactoredStack.of(LowRank(left, right))
    if not math.isfinite(source.norm):
        raise ValueError(NOT_FINITE)
    return source
