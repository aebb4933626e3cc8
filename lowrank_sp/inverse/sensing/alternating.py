"""Sensing one factor at a time: least squares for both, or for one and a gradient step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lowrank_sp._arrays import RNG, Array, adjoint, eps, namespace
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.inverse.least_squares import least_squares
from lowrank_sp.inverse.measurements import Measurement
from lowrank_sp.inverse.sensing.problem import (
    Callback,
    Problem,
    relative_change,
    transposed,
)
from lowrank_sp.iterate import Solution, Stop


class _Factor(NamedTuple):
    factor: Array


class _State(NamedTuple):
    left: Array
    right: Array
    residual: Array


def alternating_minimization(
    measurement: Measurement,
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    inner_iter: int = 50,
) -> Solution:
    r"""Recover a matrix by least squares for one factor at a time.

    .. math:: R \leftarrow \arg\min_R \lVert \mathcal{A}(L R) - y \rVert, \qquad
              L \leftarrow \arg\min_L \lVert \mathcal{A}(L R) - y \rVert

    From a spectral start :cite:p:`jain2013low`. The residual never grows. The path depends on the
    spans of the factors alone, so it is the same in every gauge.

    Parameters
    ----------
    inner_iter : int
        Most steps of conjugate gradients for each factor. With an orthonormal basis of the other
        one a few suffice; they start from what is there.

    The other parameters are those of :func:`~lowrank_sp.inverse.sensing.factored.factored_gd`.

    Notes
    -----
    An inner step costs one ``A`` and one ``A^*``.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=2, oversampling=3, condition=100, rng=0)
    >>> solution = alternating_minimization(p.measurement, p.data, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(measurement, data, rank)

    def step(state: _State) -> tuple[_State, float]:
        xp = namespace(state.left)
        left, upper = xp.linalg.qr(state.left)
        right = _right(problem, left, upper @ state.right, inner_iter)
        basis, lower = xp.linalg.qr(adjoint(right))
        left = _left(problem, adjoint(basis), left @ adjoint(lower), inner_iter)
        return _moved(problem, state, left, adjoint(basis))

    return _solve(problem, problem.start(rank, init, rng), step, stop, callback)


def alt_gd_min(
    measurement: Measurement,
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    lr: float = 0.7,
    inner_iter: int = 50,
) -> Solution:
    r"""Recover a matrix by least squares for the right factor and a gradient step for the left.

    .. math:: R = \arg\min_R \lVert \mathcal{A}(U R) - y \rVert, \qquad
              U \leftarrow \mathrm{qr}\bigl(U - \tfrac{\eta}{\sigma_1^2}
              \mathcal{A}^*(\mathcal{A}(U R) - y) R^H\bigr)

    AltGDMin :cite:p:`nayer2023fast`. Where every measurement concerns one column, the first problem
    is one small problem for each column, solved where its data are, and ``U`` is all that has to be
    communicated.

    Parameters
    ----------
    lr : float
        ``eta``, with the largest singular value ``sigma_1`` of the start. At one, few measurements
        make it oscillate.

    The other parameters are those of :func:`alternating_minimization`.

    Notes
    -----
    The number of steps grows with the square of the condition number of the matrix.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=1, oversampling=5, rng=0)
    >>> solution = alt_gd_min(p.measurement, p.data, rank=1, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(measurement, data, rank)
    f = problem.start(rank, init, rng)
    largest = float(f.s[0]) or 1.0
    length = lr / (problem.gain(f) * largest**2)

    def step(state: _State) -> tuple[_State, float]:
        downhill = problem.measurement.adjoint(state.residual).matmul(adjoint(state.right))
        left, upper = namespace(state.left).linalg.qr(state.left + length * downhill)
        right = _right(problem, left, upper @ state.right, inner_iter)
        return _moved(problem, state, left, right)

    return _solve(problem, f, step, stop, callback)


def _right(problem: Problem, left: Array, start: Array, max_iter: int) -> Array:
    """The right factor that fits best, for orthonormal columns ``left``."""
    a = problem.measurement
    return _best(
        lambda x: a.forward(LowRank(left, x)),
        lambda y: transposed(a.adjoint(y), left),
        problem.data,
        start,
        max_iter,
    )


def _left(problem: Problem, right: Array, start: Array, max_iter: int) -> Array:
    """The left factor that fits best, for orthonormal rows ``right``."""
    a = problem.measurement
    return _best(
        lambda x: a.forward(LowRank(x, right)),
        lambda y: a.adjoint(y).matmul(adjoint(right)),
        problem.data,
        start,
        max_iter,
    )


def _best(
    forward: Callable[[Array], Array],
    backward: Callable[[Array], Array],
    data: Array,
    start: Array,
    max_iter: int,
) -> Array:
    return least_squares(
        lambda x: forward(x.factor),
        lambda y: _Factor(backward(y)),
        data,
        _Factor(start),
        tol=eps(start.dtype) ** 0.75,
        max_iter=max_iter,
    ).x.factor


def _moved(problem: Problem, old: _State, left: Array, right: Array) -> tuple[_State, float]:
    x = LowRank(left, right)
    new = _State(left, right, problem.residual(x))
    return new, relative_change(x, LowRank(old.left, old.right))


def _solve(problem: Problem, f: SVD, step, stop: Stop, callback: Callback) -> Solution:
    left, right = f.split("right").factors()
    return problem.solve(
        step,
        _State(left, right, problem.residual(f)),
        value=lambda state: LowRank(state.left, state.right),
        stop=stop,
        callback=callback,
    )
