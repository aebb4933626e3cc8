"""Completion by the nuclear norm: soft thresholds on singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from lowrank_sp._arrays import RNG, Array, adjoint, device, eps, frobenius, inner, namespace
from lowrank_sp.factors import SVD, Factored, check_rank
from lowrank_sp.gauge import balance
from lowrank_sp.inverse._lowered import leading, lowered, soft_threshold
from lowrank_sp.inverse._problem import fits
from lowrank_sp.inverse.completion.problem import (
    Callback,
    Fit,
    Problem,
    fit,
    relative_change,
    spread,
)
from lowrank_sp.inverse.entries import Entries, check_entries
from lowrank_sp.iterate import Solution, Stop

# Further columns with which a path tries the next threshold.
_MARGIN = 5


def soft_impute(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    regularization: float = 0.01,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion with a penalty on the nuclear norm.

    .. math:: \min_Z \tfrac12 \lVert P_\Omega(X - Z) \rVert_F^2 + \lambda \lVert Z \rVert_*,
              \qquad \lambda = \rho\, \lVert P_\Omega(X) \rVert_2

    Parameters
    ----------
    rank : int
        The most singular values that the answer may have. The problem is convex where this does not
        bind, that is, where the last one is zero.
    stop : Stop
        The change monitored is that of the entries of ``Z``, relative to the data.
    regularization : float
        ``rho``, in (0, 1]. From 1 on the answer is zero.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`. One
    entry in every line is enough.

    Returns
    -------
    Solution
        ``value`` has exactly the rank of the answer.

    Notes
    -----
    Least squares for one factor of the filled-in matrix at a time, with the penalty
    ``lambda (||L||^2 + ||R||^2) / 2``, whose least value over all factors is the nuclear norm
    :cite:p:`hastie2015softimpute`. The objective never increases. A step costs
    ``4 M r + 6 (m + n) r^2`` multiplications and no large SVD.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=6, noise=0.1, rng=0)
    >>> solution = soft_impute(p.entries, rank=10, regularization=0.2, rng=0)
    >>> solution.converged, solution.value.rank
    (True, 2)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified, regularized=True)
    largest = _spectral_norm(problem.entries, rng)
    return _soft_impute(problem, largest, regularization, init, rng, stop, callback)


class PathPoint(NamedTuple):
    """One solution of a path, and its threshold relative to ``||P_Omega(X)||_2``."""

    regularization: float
    solution: Solution


def soft_impute_path(
    entries: Entries,
    *,
    rank: int,
    regularizations: Sequence[float] | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    allow_unidentified: bool = False,
) -> tuple[PathPoint, ...]:
    """:func:`soft_impute` for a falling sequence of thresholds, each started at the one before.

    Parameters
    ----------
    rank : int
        The most singular values that an answer may have. Each threshold begins with a few more
        columns than the last answer had.
    regularizations : sequence of float, optional
        Falling values in (0, 1]; by default 15 in geometric progression from 0.8 to 0.008.
    stop, callback
        As in :func:`soft_impute`, for every threshold.

    The other parameters are those of :func:`soft_impute`.

    Returns
    -------
    tuple of PathPoint

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=6, noise=0.1, rng=0)
    >>> path = soft_impute_path(p.entries, rank=10, regularizations=[0.8, 0.4, 0.1], rng=0)
    >>> [point.solution.value.rank for point in path]
    [2, 2, 2]
    """
    if regularizations is None:
        regularizations = [0.8 * 0.01 ** (k / 14) for k in range(15)]
    if any(b >= a for a, b in pairwise(regularizations)):
        raise ValueError(f"regularizations must fall, got {list(regularizations)}")
    check_entries(entries)
    shape = entries.pattern.shape
    rank = check_rank(rank, min(shape), shape)
    points: list[PathPoint] = []
    init, width = None, min(rank, _MARGIN)
    largest = None
    for value in regularizations:
        problem = Problem.of(
            entries, width, allow_unidentified=allow_unidentified, regularized=True
        )
        largest = _spectral_norm(problem.entries, rng) if largest is None else largest
        solution = _soft_impute(problem, largest, value, init, rng, stop, callback)
        points.append(PathPoint(value, solution))
        init = solution.value
        width = min(rank, solution.value.rank + _MARGIN)
    return tuple(points)


def svt(
    entries: Entries,
    *,
    rank: int,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    threshold: float = 5.0,
    step_size: float = 1.2,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion of least nuclear norm, by singular value thresholding.

    .. math:: Z_k = D_\tau(Y_{k-1}), \qquad Y_k = Y_{k-1} + \delta P_\Omega(X - Z_k)

    Parameters
    ----------
    rank : int
        The most singular values that an iterate may have.
    stop : Stop
        What is monitored is the residual on the entries, relative to the data.
    threshold : float
        ``tau``, in units of ``sqrt(m n)`` times the root mean square of the entries. Larger ones
        come closer to the least nuclear norm, in more steps.
    step_size : float
        ``delta``, in units of ``m n / M``. Steps below 2 in units of one converge for certain, but
        slowly.

    The other parameters are those of :func:`soft_impute`.

    Returns
    -------
    Solution
        With noise it follows the noise: prefer :func:`soft_impute` then.

    Notes
    -----
    Dual ascent :cite:p:`cai2010svt` with one truncated SVD of the sparse ``Y`` a step. Simple, and
    slow: for teaching and comparison.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=6, rng=0)
    >>> solution = svt(p.entries, rank=10, stop=Stop(tol=1e-4), rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-3 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified, regularized=True)
    data = problem.entries
    (m, n), size = data.shape, data.norm()
    tau = threshold * (m * n) ** 0.5 * size / data.size**0.5
    length = step_size * m * n / data.size
    accuracy = 4 * eps(data.dtype) ** 0.5
    # The first steps, in which nothing passes the threshold, all at once.
    largest = _spectral_norm(data, rng)
    skipped = math.ceil(tau / (length * largest)) if largest else 0
    start = data.with_values(data.values * (skipped * length))

    def step(state: tuple[Entries, SVD | None]) -> tuple[tuple[Entries, SVD | None], float]:
        dual = state[0]
        f = soft_threshold(dual, tau, most=problem.rank, tol=accuracy, rng=rng)
        residual = data.values - data.sampled(*f.factors())
        following = dual.with_values(dual.values + length * residual)
        left = frobenius(residual)
        return (following, f), left / size if fits(left, size) else math.inf

    return problem.solve(
        step,
        (start, None),
        value=lambda state: problem.zero() if state[1] is None else state[1],
        stop=stop,
        callback=callback,
    )


def _soft_impute(
    problem: Problem,
    largest: float,
    regularization: float,
    init: Factored | None,
    rng: RNG,
    stop: Stop,
    callback: Callback,
) -> Solution:
    if not 0 < regularization <= 1:
        raise ValueError(f"regularization must be in (0, 1], got {regularization}")
    data = problem.entries
    penalty, size = regularization * largest, data.norm()

    def step(state: Fit) -> tuple[Fit, float]:
        left, right, residual = state
        right = adjoint(_ridge_step(adjoint(right), left, residual.rmatmul(left), penalty))
        middle = fit(data, left, right).residual
        left = _ridge_step(left, adjoint(right), middle.matmul(adjoint(right)), penalty)
        new = fit(data, *balance(left, right))
        return new, relative_change(new.residual, residual, size)

    def value(state: Fit) -> SVD:
        # One exact step: the filled-in matrix on the row space found, thresholded.
        left, right, residual = state
        xp = namespace(left)
        basis = xp.linalg.qr(adjoint(right))[0]
        image = residual.matmul(basis) + left @ (right @ basis)
        u, s, vh = xp.linalg.svd(image, full_matrices=False)
        return lowered(SVD.canonical(u, s, vh @ adjoint(basis)), penalty)

    f = problem.start(init, rng)
    root, rest = spread(f)
    start = fit(data, f.u * root, rest[:, None] * f.vh)
    return problem.solve(step, start, value=value, stop=stop, callback=callback)


def _ridge_step(x: Array, basis: Array, image: Array, penalty: float) -> Array:
    """``argmin_y ||Z - B y^H||^2 + penalty ||y||^2`` from ``image = (Z - B x^H)^H B``."""
    xp = namespace(x)
    gram = xp.astype(inner(basis, basis), x.dtype)
    unit = xp.eye(gram.shape[0], dtype=x.dtype, device=device(x))
    return (image + x @ gram) @ xp.linalg.inv(gram + penalty * unit)


def _spectral_norm(entries: Entries, rng: RNG) -> float:
    return float(leading(entries, lambda _: 1, tol=1e-3, rng=rng).s[0])
