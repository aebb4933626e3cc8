"""Sensing by thresholds of singular values: soft ones (nuclear norm) and hard ones (fixed rank)."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_sp._arrays import RNG, Array, eps, frobenius
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.inverse._lowered import lowered
from lowrank_sp.inverse.measurements import Measurement
from lowrank_sp.inverse.sensing.problem import (
    Callback,
    Problem,
    plain,
    relative_change,
    transposed,
)
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import LinearOperator

# Singular values asked for beyond those that passed the threshold before.
_AHEAD = 4

# Shorter steps that are tried before a point counts as one from which none goes down.
_HALVINGS = 20


class _Hard(NamedTuple):
    value: SVD
    residual: Array


class _Soft(NamedTuple):
    value: SVD
    before: SVD
    momentum: float
    lipschitz: float
    penalty: float
    residual: Array


def niht(
    measurement: Measurement,
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
) -> Solution:
    r"""Recover a matrix by normalized iterative hard thresholding.

    .. math:: X \leftarrow H_r\bigl(X + \alpha\, G\bigr), \quad
              G = \mathcal{A}^*(y - \mathcal{A}(X)), \quad
              \alpha = \frac{\lVert P_U G \rVert^2}{\lVert \mathcal{A}(P_U G) \rVert^2}

    with the best approximation ``H_r`` of rank ``r`` and the projection ``P_U`` on the columns of
    ``X`` :cite:p:`tanner2013normalized`. No step length has to be chosen. One that would raise the
    residual is halved; without that, measurements with heavy tails, such as those of rank one, let
    the iteration run in circles on some problems.

    Parameters are those of :func:`~lowrank_sp.inverse.sensing.factored.factored_gd`.

    Notes
    -----
    A step costs two ``A``, one ``A^*`` and a truncated SVD of the sum of ``X`` and an operator.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=1, oversampling=5, rng=0)
    >>> solution = niht(p.measurement, p.data, rank=1, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(measurement, data, rank)
    a = problem.measurement

    def step(state: _Hard) -> tuple[_Hard, float]:
        downhill = a.adjoint(state.residual)
        along = LowRank(state.value.u, transposed(downhill, state.value.u))
        squares = frobenius(a.forward(along)) ** 2
        length = frobenius(along.right) ** 2 / squares if squares else 0.0
        old = frobenius(state.residual)
        for _ in range(_HALVINGS):
            value = _leading(state.value + length * downhill, rank)
            residual = problem.residual(value)
            if frobenius(residual) <= old:
                return _Hard(value, residual), relative_change(value, state.value)
            length /= 2
        # Rounding: no step along the gradient lowers the residual.
        return state, 0.0

    f = problem.start(rank, init, rng)
    return problem.solve(
        step,
        _Hard(f, problem.residual(f)),
        value=lambda state: state.value,
        stop=stop,
        callback=callback,
    )


def nuclear_norm(
    measurement: Measurement,
    data: Array,
    *,
    regularization: float = 1e-3,
    init: Factored | None = None,
    stop: Stop = Stop(),
    callback: Callback = None,
) -> Solution:
    r"""Recover a matrix by least squares with a nuclear-norm penalty.

    .. math:: \min_X\; \tfrac12 \lVert \mathcal{A}(X) - y \rVert^2 + \lambda \lVert X \rVert_*

    By FISTA :cite:p:`beck2009fast` with backtracking, and a penalty that falls to ``lambda`` in
    steps :cite:p:`toh2010accelerated`. The problem is convex: the solution depends on no start, and
    no rank is asked for. It is biased by about ``lambda``.

    Parameters
    ----------
    regularization : float
        ``lambda``, in units of ``||A^*(y)||_2``, from which on the solution is zero; in (0, 1].
    init : SVD or LowRank, optional
        Where to start; by default at zero.
    stop : Stop
        The change monitored is that of ``X``, relative to it, once the penalty is ``lambda``.

    The other parameters are those of :func:`~lowrank_sp.inverse.sensing.factored.factored_gd`.

    Returns
    -------
    Solution
        ``value`` has the rank that was found.

    Raises
    ------
    ValueError
        If ``regularization`` is not in (0, 1], or data are not finite.

    Notes
    -----
    A step costs three ``A``, one ``A^*`` and an SVD of as many triplets as pass the threshold.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=1, oversampling=5, rng=0)
    >>> solution = nuclear_norm(p.measurement, p.data, regularization=1e-3)
    >>> solution.converged, solution.value.rank
    (True, 1)
    >>> bool((solution.value - p.truth).norm() < 1e-2 * p.truth.norm())
    True
    """
    if not 0 < regularization <= 1:
        raise ValueError(f"regularization must be in (0, 1], got {regularization}")
    problem = Problem.of(measurement, data)
    if problem.size == 0.0:
        return problem.zero()
    a = problem.measurement
    top = _leading(a.adjoint(problem.data), 1)
    largest = float(top.s[0])
    target = regularization * largest

    def step(state: _Soft) -> tuple[_Soft, float]:
        momentum = (1 + (1 + 4 * state.momentum**2) ** 0.5) / 2
        beyond = (state.momentum - 1) / momentum
        at = plain(state.value) * (1 + beyond) - plain(state.before) * beyond
        downhill = a.adjoint(problem.residual(at))
        lipschitz = state.lipschitz
        while True:
            ahead = state.value.rank + _AHEAD
            value = _soft(at + (1 / lipschitz) * downhill, state.penalty / lipschitz, ahead)
            move = value - at
            length = float(move.norm())
            if not length or frobenius(a.forward(move)) <= (lipschitz**0.5) * length:
                break
            lipschitz *= 2
        # A step back along the path: start the momentum anew.
        if _inner(at - value, value - state.value) > 0:
            momentum = 1.0
        penalty = max(target, 0.7 * state.penalty)
        new = _Soft(value, state.value, momentum, lipschitz, penalty, problem.residual(value))
        change = relative_change(value, state.value)
        return new, change if state.penalty == target else max(change, 1.0)

    f = top.truncate(1) if init is None else problem.start(init.rank, init, None)
    if init is None:
        f = SVD(f.u, 0 * f.s, f.vh)
    start = _Soft(f, f, 1.0, problem.gain(top), max(target, 0.7 * largest), problem.residual(f))
    return problem.solve(step, start, value=lambda state: state.value, stop=stop, callback=callback)


def _leading(a: LinearOperator, rank: int) -> SVD:
    """The leading triplets, well below the accuracy at which an iteration stops."""
    return truncated_svd(a, rank, tol=eps(a.dtype) ** 0.75, rng=0)


def _soft(a: LinearOperator, threshold: float, ahead: int) -> SVD:
    """Singular values lowered by a threshold, of which ``ahead`` are sought at first."""
    most = min(a.shape)
    count = min(ahead, most)
    f = _leading(a, count)
    while float(f.s[-1]) > threshold and count < most:
        count = min(2 * count, most)
        f = _leading(a, count)
    return lowered(f, threshold)


def _inner(x: Factored, y: Factored) -> float:
    return complex(x.inner(y)).real
