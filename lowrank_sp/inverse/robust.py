"""Robust principal component analysis: a matrix as the sum of a low-rank and a sparse one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    eps,
    frobenius,
    namespace,
)
from lowrank_sp.factors import SVD, Factored, LowRank, check_rank
from lowrank_sp.inverse._lowered import lowered_svd
from lowrank_sp.inverse.separation import LowRankPlusSparse as LowRankPlusSparse
from lowrank_sp.inverse.separation import Problem, Rest, clipped, inside
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.updates.first_order import scaled
from lowrank_sp.updates.rule import Pair
from lowrank_sp.updates.tangent import Tangent

Callback = Callable[[int, float, LowRankPlusSparse], Any]


def alternating_projections(
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback | None = None,
    threshold: float | None = None,
    decay: float = 0.8,
) -> Solution:
    r"""Accelerated alternating projections on low-rank and on sparse matrices.

    For :math:`D = L + S` with :math:`L` of known rank :math:`r` and :math:`S` sparse,

    .. math:: L_{t+1} = H_r\bigl(P_{T_t}(D - S_t)\bigr), \quad
              S_{t+1} = \text{the entries of } D - L_{t+1} \text{ beyond } \beta\,\tau_t, \quad
              \tau_t = \sigma_{r+1} + \gamma^{t+1} \sigma_1,

    where :math:`P_T` projects on the tangent space at :math:`L_t`. There the truncation :math:`H_r`
    is an SVD of a :math:`2r \times 2r` matrix, whose singular values :math:`\tau_t` is made of
    :cite:p:`cai2019accelerated`. Here :math:`H_r` also drops what lies below :math:`\tau_t / 2`:
    small components come in only when outliers of their size are gone, so that recovery does not
    depend on the condition number. Alternating projections proper do this by growing the rank
    :cite:p:`netrapalli2014nonconvex`. And no entry is an outlier whose size is within three
    standard deviations of the others, as their median tells: so :math:`D` may have dense noise.

    Parameters
    ----------
    data : array, shape (m, n)
        Real or complex. It may be memory-mapped or in half precision: it is read by blocks of rows.
    rank : int
        In ``1..min(m, n)``.
    init : LowRank or SVD, optional
        Low-rank part to start from; by default that of the data without their largest entries.
    rng : int, Generator or None
        Seed of the sketch that finds it.
    stop : Stop
        Monitored is the change of the low-rank part or that of the threshold, as a change of every
        entry, whichever is larger; both relative to the low-rank part.
    callback : callable, optional
    threshold : float, optional
        The :math:`\beta`, by default 0.7 times the largest entry of the start relative to its norm.
        Raise it where smaller components have relatively larger entries.
    decay : float
        The :math:`\gamma` in (0, 1). Closer to 1 it is slower, and stands more outliers.

    Returns
    -------
    Solution
        Of a :class:`LowRankPlusSparse`. ``converged`` is False also where nothing has been
        separated: both parts together have more unknowns than the data have entries, or the
        low-rank part is what truncation makes of noise as large as what is left over.

    Notes
    -----
    A step reads the data once, in ``6 m n r`` flops, and makes no array of their size. The sparse
    part is formed for the answer, and for ``callback`` where there is one.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 150))
    >>> outliers = np.where(rng.random((200, 150)) < 0.1, 10.0, 0.0)
    >>> found = alternating_projections(truth + outliers, rank=3, rng=0)
    >>> found.converged, bool(found.value.density == np.mean(outliers != 0))
    (True, True)
    """
    problem, start, share = _prepared(data, rank, init, rng, threshold, decay)
    r = start.rank

    def state_at(low_rank: SVD, level: float, k: int) -> _Projected:
        left, right = low_rank.factors()
        rest = problem.rest(left, right, level, inside, adjoint(low_rank.vh), low_rank.u)
        return _Projected(low_rank, level, k, rest)

    def step(state: _Projected) -> tuple[_Projected, float]:
        u, s, vh = state.low_rank
        xp = namespace(u)
        rest = Tangent.of(u, vh, state.rest.right, adjoint(state.rest.left))
        q_left, r_left = xp.linalg.qr(rest.left)
        q_right, r_right = xp.linalg.qr(adjoint(rest.right))
        diagonal = xp.eye(r, dtype=u.dtype, device=device(u)) * xp.astype(s, u.dtype)
        old = _bordered(diagonal, xp.zeros_like(r_left), xp.zeros_like(r_left))
        core = old + _bordered(rest.core, r_left, adjoint(r_right))
        a, sigma, bh = xp.linalg.svd(core, full_matrices=False)
        fall = max(decay ** (state.k + 1), 16 * eps(u.dtype))
        spectral = float(sigma[r]) + fall * float(sigma[0])
        a, kept, bh = a[:, :r], sigma[:r], bh[:r, :]
        kept = xp.where(kept > spectral / 2, kept, xp.zeros_like(kept))
        moved = frobenius((a * xp.astype(kept, u.dtype)) @ bh - old)
        low_rank = SVD.canonical(
            xp.concat([u, q_left], axis=1) @ a, kept, bh @ xp.concat([vh, adjoint(q_right)], axis=0)
        )
        level = max(share * spectral, problem.noise(low_rank))
        change = problem.relative(moved, level - state.level, frobenius(kept))
        return state_at(low_rank, level, state.k + 1), change

    return problem.solved(
        step,
        state_at(start, share * float(start.s[0]), 0),
        lambda state: problem.value(state.low_rank, state.level, inside),
        stop,
        callback,
    )


def scaled_gd(
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback | None = None,
    threshold: float | None = None,
    decay: float = 0.9,
    step_size: float = 0.5,
) -> Solution:
    r"""Scaled gradient descent on the factors of the low-rank part.

    With :math:`S_t` the soft-thresholded :math:`D - L_t R_t^H` and
    :math:`E_t = D - S_t - L_t R_t^H`,

    .. math:: L_{t+1} = L_t + \eta\, E_t R_t (R_t^H R_t)^{-1}, \quad
              R_{t+1} = R_t + \eta\, E_t^H L_t (L_t^H L_t)^{-1},

    the metric of :class:`~lowrank_sp.updates.ScaledGD`, at a rate that does not depend on the
    condition number :cite:p:`tong2021accelerating`, and with thresholds that fall by a factor a
    step :cite:p:`cai2021learned` down to the size of dense noise. How many outliers it stands does
    depend on the condition number.

    Parameters
    ----------
    data, rank, init, rng, stop, callback
        As in :func:`alternating_projections`.
    threshold : float, optional
        The first threshold as a multiple of the largest singular value; by default as in
        :func:`alternating_projections`.
    decay : float
        Factor of the threshold in a step, in (0, 1). It must fall more slowly than the error does,
        which is at a rate of about ``1 - step_size``.
    step_size : float
        The :math:`\eta`, in (0, 1].

    Returns
    -------
    Solution
        As of :func:`alternating_projections`, with outliers shrunk by the last threshold.

    Notes
    -----
    A step reads the data once, in ``6 m n r`` flops, and makes no array of their size.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 150))
    >>> outliers = np.where(rng.random((200, 150)) < 0.1, 10.0, 0.0)
    >>> scaled_gd(truth + outliers, rank=3, rng=0).value.low_rank
    SVD(200 x 150, rank 3, float64)
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must be in (0, 1], got {step_size}")
    problem, start, share = _prepared(data, rank, init, rng, threshold, decay)
    first = share * float(start.s[0])
    least = 16 * eps(start.dtype) * first

    def state_at(factors: LowRank, level: float) -> _Descending:
        left, right = factors.left, adjoint(factors.right)
        rest = problem.rest(left, factors.right, level, clipped, right, left)
        return _Descending(factors, level, rest)

    def step(state: _Descending) -> tuple[_Descending, float]:
        old = Pair(*state.factors.factors())
        move = scaled(old, Pair(state.rest.right, adjoint(state.rest.left)), 1.0)
        factors = LowRank(old.up + step_size * move.up, old.down + step_size * move.down)
        level = max(decay * state.level, least, problem.noise(factors))
        moved = (factors - state.factors).norm()
        change = problem.relative(moved, level - state.level, factors.norm())
        return state_at(factors, level), change

    return problem.solved(
        step,
        state_at(start.split(), first),
        lambda state: problem.value(state.factors.svd(), state.level, clipped),
        stop,
        callback,
    )


def principal_component_pursuit(
    data: Array,
    *,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback | None = None,
    weight: float | None = None,
    growth: float = 1.5,
) -> Solution:
    r"""The convex program of robust PCA, which needs no rank, by ADMM.

    .. math:: \min_{L + S = D} \|L\|_* + \lambda \|S\|_1

    recovers low-rank matrices without spikes from a constant share of outliers
    :cite:p:`candes2011robust`. One step of ADMM lowers the singular values of
    :math:`D - S + Y/\mu` by :math:`1/\mu`, shrinks the entries of :math:`D - L + Y/\mu` by
    :math:`\lambda/\mu`, and what is left of these is the next multiplier :math:`Y/\mu`; then
    :math:`\mu` grows :cite:p:`lin2010augmented`.

    Parameters
    ----------
    data : array, shape (m, n)
        Real or complex.
    init : LowRank or SVD, optional
        Low-rank part to start from; by default zero.
    rng : int, Generator or None
        Seed of the columns that the singular vectors of a step are sought with, beside those of the
        step before.
    stop : Stop
        Monitored is ``||D - L - S||_F`` or the change of ``L``, whichever is larger, relative to
        ``L``.
    callback : callable, optional
    weight : float, optional
        The :math:`\lambda`, by default ``1 / sqrt(max(m, n))``.
    growth : float
        Factor of :math:`\mu` in a step, at least 1. With 1 it is the ADMM that converges to the
        minimum from anywhere; growth ends sooner, near it.

    Returns
    -------
    Solution
        As of :func:`alternating_projections`.

    Notes
    -----
    A step costs some 4 products of the data with ``r + 5`` columns and makes two arrays of their
    size.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 150))
    >>> outliers = np.where(rng.random((200, 150)) < 0.1, 10.0, 0.0)
    >>> found = principal_component_pursuit(truth + outliers, rng=0)
    >>> found.converged, found.value.low_rank.rank
    (True, 3)
    """
    if not growth >= 1:
        raise ValueError(f"growth must be at least 1, got {growth}")
    if weight is not None and not 0 < weight < math.inf:
        raise ValueError(f"weight must be positive, got {weight}")
    problem = Problem.of(data)
    m, n = problem.shape
    weight = weight or 1 / math.sqrt(max(m, n))
    seed = int(np.random.default_rng(rng).integers(2**63))
    leading = problem.sketch(1, seed)
    unit = 1.25 / (float(leading.s[0]) or 1.0)

    def state_at(low_rank: SVD, dual: Array, mu: float, k: int) -> _Pursued:
        xp = namespace(dual)
        grown = min(mu * growth, 1e7 * unit)
        left, right = low_rank.factors()
        duals, parts, squares = [], [], 0.0
        for rows, block in problem.blocks():
            shifted = block - left[rows, :] @ right + dual[rows, :]
            inside = clipped(shifted, weight / mu)
            squares += frobenius(inside - dual[rows, :]) ** 2
            duals.append(inside * (mu / grown))
            parts.append(shifted - inside)
        arrays = xp.concat(duals, axis=0), xp.concat(parts, axis=0)
        return _Pursued(low_rank, *arrays, grown, k, math.sqrt(squares))

    def step(state: _Pursued) -> tuple[_Pursued, float]:
        xp = namespace(state.dual)
        target = xp.concat(
            [x - state.sparse[rows, :] + state.dual[rows, :] for rows, x in problem.blocks()],
            axis=0,
        )
        draws = np.random.default_rng([seed, state.k])
        low_rank = lowered_svd(target, 1 / state.mu, state.low_rank.vh, draws)
        following = state_at(low_rank, state.dual, state.mu, state.k + 1)
        moved = (low_rank - state.low_rank).norm()
        change = problem.relative(max(moved, following.missed), 0.0, low_rank.norm())
        return following, change

    start = replace(leading, s=0.0 * leading.s) if init is None else problem.given(init)
    return problem.solved(
        step,
        state_at(start, 0.0 * (start.u[:, :1] @ start.vh[:1, :]), unit, 0),
        lambda state: problem.parts(state.low_rank, state.sparse, state.missed),
        stop,
        callback,
    )


class _Projected(NamedTuple):
    low_rank: SVD
    level: float
    k: int
    rest: Rest


class _Descending(NamedTuple):
    factors: LowRank
    level: float
    rest: Rest


class _Pursued(NamedTuple):
    low_rank: SVD
    dual: Array  # Y / mu, in units of the data
    sparse: Array
    mu: float
    k: int
    missed: float  # ||D - L - S||_F


def _prepared(
    data: Array,
    rank: int,
    init: Factored | None,
    rng: RNG,
    threshold: float | None,
    decay: float,
) -> tuple[Problem, SVD, float]:
    """The problem, where to start, and the threshold as a share of the singular values."""
    problem = Problem.of(data)
    m, n = problem.shape
    rank = check_rank(rank, min(m, n), (m, n))
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}")
    if threshold is not None and not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive, got {threshold}")
    if init is None:
        draws = np.random.default_rng(rng)
        # Gross outliers would hide the size of the rest.
        clip = 10 * problem.median() or math.inf
        largest = float(problem.sketch(1, draws, clip, clipped).s[0])
        start = problem.sketch(rank, draws, 2 * largest / (m * n) ** 0.25)
    else:
        start = problem.given(init)
        if start.rank != rank:
            raise ValueError(f"init must have rank {rank}, got {start.rank}")
    share = threshold or 0.7 * problem.peak(start) / (float(start.s[0]) or 1.0) or 1.0
    return problem, start, share


def _bordered(a: Array, below: Array, beside: Array) -> Array:
    """``[[a, beside], [below, 0]]``."""
    xp = namespace(a)
    top = xp.concat([a, beside], axis=1)
    return xp.concat([top, xp.concat([below, xp.zeros_like(a)], axis=1)], axis=0)
