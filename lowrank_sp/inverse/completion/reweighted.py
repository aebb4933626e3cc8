"""Iteratively reweighted least squares: the log-determinant of the matrix, smoothed ever less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    eps,
    from_host,
    to_host,
)
from lowrank_sp.factors import SVD, Factored
from lowrank_sp.inverse._lowered import leading
from lowrank_sp.inverse.completion.certificate import certified
from lowrank_sp.inverse.completion.problem import Callback, Problem
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.least_squares import least_squares
from lowrank_sp.inverse.tangent import Space
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.operators import LinearOperator
from lowrank_sp.updates.tangent import Tangent

# Accuracy of the singular values, relative to the smallest one in use: the smoothing follows it,
# and one that is too small too early is never made good.
_SVD_TOL = 1e-2
# Accuracy of a linear system, relative to the smoothing.
_INNER_TOL = 1e-3
# Where the smoothing has left the spectrum this far behind, it may fall freely.
_FAR = 1e-3


class _State(NamedTuple):
    """A low-rank matrix plus a sparse one, its leading triplets, and the smoothing."""

    x: LinearOperator
    f: SVD
    smoothing: float


def matrix_irls(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    noise: float = 0.0,
    decay: float = 0.9,
    inner_iter: int = 500,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by iteratively reweighted least squares, near the information limit.

    .. math:: \min_X \sum_i \log \max(\sigma_i(X), \epsilon) +
              \frac{\min(\sigma_i(X), \epsilon)^2}{2 \epsilon^2}
              \quad\text{subject to}\quad P_\Omega(X) = y

    for a smoothing ``epsilon`` that follows ``sigma_(rank+1)`` down to rounding
    :cite:p:`kummerle2021scalable`. Recovers ill-conditioned matrices from fewer entries than any
    first-order method, and converges quadratically at the end.

    Parameters
    ----------
    init : SVD or LowRank, optional
        Where to start; by default the entries, with zeros elsewhere.
    rng : int, Generator or None
        Seed of the starting blocks of the singular value decompositions.
    stop : Stop
        The change monitored is that of the leading ``rank`` triplets, relative to their norm, or
        that of the smoothing, while it is within reach of the spectrum.
    noise : float
        Standard deviation of the noise, in units of the root mean square of the entries. The
        constraint becomes a penalty ``||P_Omega(X) - y||^2 / (2 lambda)`` with
        ``lambda = max(m, n) noise^2`` in those units.
    decay : float
        Least ratio of consecutive smoothings, while they are within reach of the spectrum; 0.5 is
        several times faster where entries are plenty, and recovers less where they are few.
    inner_iter : int
        Most conjugate gradient steps a linear system may take.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Returns
    -------
    Solution
        ``converged`` is as for :func:`~lowrank_sp.inverse.completion.gauss_newton.gnmr`, but the
        answer may miss the entries by twice the noise.

    Notes
    -----
    Every step solves a weighted least-squares problem, of which all but a sparse residual lies in
    the tangent space of rank ``r`` at the last iterate: ``8 M r + 8 (m + n) r^2`` flops a conjugate
    gradient step, of which there are some hundreds near the information limit. The leading triplets
    of the iterate, a low-rank matrix plus a sparse one, come from a block Krylov space. Memory is
    the entries' and some factors of ``2 r`` columns.

    If the smoothing fell with ``sigma_(rank+1)`` at once, as published, the last directions of
    ill-conditioned matrices would often be decided before they are seen.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=2, condition=1e4, rng=0)
    >>> solution = matrix_irls(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-6 * p.truth.norm())
    (True, True)
    """
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    y, rank = problem.entries, problem.rank
    generator = np.random.default_rng(rng)
    smooth = partial(_smoothing, rank, decay, y.dtype)
    penalty = max(y.shape) * (noise * y.norm()) ** 2 / y.size

    def step(state: _State) -> tuple[_State, float]:
        x = _reweighted(y, state, penalty, inner_iter)
        new = _state(x, rank, partial(smooth, state.smoothing), generator)
        f, old = new.f.truncate(rank), state.f.truncate(rank)
        change = float((f - old).norm()) / float(old.norm())
        # What is small beside the smoothing stands still until it falls.
        falling = new.smoothing > _FAR * float(f.s[-1])
        return new, max(change, 1.0 - new.smoothing / state.smoothing if falling else 0.0)

    x = y if init is None else _interpolant(y, problem.start(init))
    solution = problem.solve(
        step,
        _state(x, rank, partial(smooth, np.inf), generator),
        value=lambda state: state.f.truncate(rank),
        stop=stop,
        callback=callback,
    )
    return certified(problem, solution, stop, noise)


def _interpolant(y: Entries, f: SVD) -> LinearOperator:
    """``f`` where nothing was observed, and the data elsewhere."""
    return f + y.with_values(y.values - y.sample(f))


def _state(
    x: LinearOperator,
    rank: int,
    smooth: Callable[[np.ndarray], float],
    rng: np.random.Generator,
) -> _State:
    """The triplets of ``x`` beyond the smoothing that it gets, and one more."""
    least = min(rank + 1, *x.shape)

    def wanted(s: np.ndarray) -> int:
        if len(s) < least:
            return least
        return min(max(rank, int(np.sum(s > smooth(s)))) + 1, *x.shape)

    f = leading(x, wanted, tol=_SVD_TOL, rng=rng, max_columns=max(96, 8 * rank))
    return _State(x, f, smooth(to_host(f.s).astype(np.float64)))


def _smoothing(rank: int, decay: float, dtype: object, last: float, s: np.ndarray) -> float:
    """The next smoothing: ``sigma_(rank+1)``, but no more than the last, and not much less."""
    following = float(s[rank]) if len(s) > rank else 0.0
    if _FAR * s[rank - 1] < last < np.inf:
        following = max(following, decay * last)
    return max(min(following, last), eps(dtype) * float(s[0]))


def _reweighted(y: Entries, state: _State, penalty: float, inner_iter: int) -> LinearOperator:
    """The minimizer of the quadratic model at ``state``: a tangent plus a sparse residual."""
    s = to_host(state.f.s).astype(np.float64)
    s = s[: max(1, int(np.sum(s > state.smoothing)))]
    k, smoothing = len(s), min(state.smoothing, (1 - 1e-9) * float(s[-1]))
    space = Space(state.f.u[:, :k], state.f.vh[:k, :])
    # D = h / (1 - h) with h = smoothing^2 / (s_i s_j), and one s is the smoothing beside the core.
    square, loose = smoothing**2, 1.0 + penalty / smoothing**2
    core = square / (np.outer(s, s) - square)
    side = smoothing / (s - smoothing)
    tight = Tangent(*(from_host(w, y.values) for w in (core, side[None, :], side[:, None])))
    weights = Tangent(*(w * loose for w in tight))
    projected = space.project(state.x)
    start = Tangent(*(a / (1.0 + w) for a, w in zip(projected, tight, strict=True)))
    accuracy = _INNER_TOL * smoothing / float(s[0])

    def forward(x: Tangent) -> Array:
        return y.sampled(*space.matrix(x).factors())

    found = least_squares(
        forward,
        lambda values: space.project(y.with_values(values)),
        y.values,
        start,
        weights,
        rate=y.size / (y.shape[0] * y.shape[1]),
        tol=min(max(accuracy, 10 * eps(y.dtype)), _SVD_TOL),
        max_iter=inner_iter,
    )
    # With a penalty, part of the residual is taken for noise.
    return space.matrix(found.x) + y.with_values(found.residual * (1.0 / loose))
