"""Sensing by descent on the factors: the update rules that also train adapters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lowrank_sp._arrays import RNG, Array
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.inverse.descent import descend
from lowrank_sp.inverse.measurements import Measurement
from lowrank_sp.inverse.sensing.problem import Callback, Problem
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.operators import LinearOperator
from lowrank_sp.updates.first_order import GradientDescent, ScaledGD
from lowrank_sp.updates.rule import Rule


def factored_gd(
    measurement: Measurement,
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    lr: float = 0.5,
) -> Solution:
    r"""Recover a matrix from linear measurements by gradient descent on balanced factors.

    .. math:: \min_{L, R}\; \tfrac12 \lVert \mathcal{A}(L R) - y \rVert^2

    What is said here of parameters, answer and errors holds for all sensing solvers, but for what
    they say themselves.

    :class:`~lowrank_sp.updates.GradientDescent` from a spectral start
    :cite:p:`tu2016procrustes`. The number of steps grows with the condition number of the matrix.

    Parameters
    ----------
    measurement : Measurement
    data : array, shape (M,)
    rank : int
        In ``1..min(m, n)``.
    init : SVD or LowRank, optional
        Where to start; by default at the leading part of ``A^*(y)``, scaled to fit.
    rng : int, Generator or None
        Seed of the start.
    stop : Stop
        The change monitored is that of the matrix, relative to it.
    callback : callable, optional
        Called after every step, as by :func:`~lowrank_sp.iterate.iterate`.
    lr : float
        Step in units of ``1 / sigma_1``, with the largest singular value of the start.

    Returns
    -------
    Solution
        ``value`` is an :class:`~lowrank_sp.factors.SVD`.

    Raises
    ------
    ValueError
        If there are fewer measurements than degrees of freedom, or data are not finite.

    Notes
    -----
    A step costs one ``A``, one ``A^*`` with two products of ``r`` columns, and ``O((m + n) r^2)``.
    Measurements of any scale will do: ``A^* A`` is taken as a multiple of the identity, which is
    found from the start.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=1, oversampling=5, rng=0)
    >>> solution = factored_gd(p.measurement, p.data, rank=1, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(measurement, data, rank)
    f = problem.start(rank, init, rng)
    largest = float(f.s[0]) or 1.0
    return _descend(problem, f, GradientDescent(lr=lr / largest), stop, callback)


def scaled_gd(
    measurement: Measurement,
    data: Array,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    lr: float = 0.5,
    damping: float = 0.0,
) -> Solution:
    r"""Recover a matrix from linear measurements by scaled gradient descent.

    .. math:: L \leftarrow L - \eta\, G R^H (R R^H)^{-1}, \qquad
              R \leftarrow R - \eta\, (L^H L)^{-1} L^H G, \qquad
              G = \mathcal{A}^*(\mathcal{A}(L R) - y)

    :class:`~lowrank_sp.updates.ScaledGD` from a spectral start. Its rate does not depend on the
    condition number of the matrix :cite:p:`tong2021accelerating`.

    Parameters
    ----------
    lr : float
        ``eta``; 0.5 is the published choice.
    damping : float
        As for the rule. Needed where ``rank`` exceeds that of the matrix.

    The other parameters are those of :func:`factored_gd`.

    Notes
    -----
    The cost of a step is that of :func:`factored_gd`.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.sensing(shape=(15, 12), rank=2, oversampling=5, condition=100, rng=0)
    >>> solution = scaled_gd(p.measurement, p.data, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(measurement, data, rank)
    f = problem.start(rank, init, rng)
    return _descend(problem, f, ScaledGD(lr=lr, damping=damping), stop, callback)


def _descend(problem: Problem, start: SVD, rule: Rule, stop: Stop, callback: Callback) -> Solution:
    if problem.size == 0.0:
        return problem.zero()
    gain = problem.gain(start)

    def gradient(x: LowRank) -> LinearOperator:
        residual = problem.residual(x)
        # Not a number ends the descent with the iterate before.
        return problem.measurement.adjoint(
            residual / (-gain if problem.fits(residual) else math.nan)
        )

    def restored(k: int, change: float, x: LowRank) -> Any:
        return callback is not None and callback(k, change, problem.restore(x))

    solution = descend(gradient, start.split(), rule, stop=stop, callback=restored)
    return problem.finish(replace(solution, value=problem.restore(solution.value)))
