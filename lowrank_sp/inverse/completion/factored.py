"""First-order methods on the factors: over-relaxation, steepest and scaled gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, frobenius, namespace
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.inverse._problem import fits
from lowrank_sp.inverse.completion.problem import Callback, Fit, Problem, fit, relative_change
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.tangent import inner
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.updates.first_order import scaled
from lowrank_sp.updates.frames import frame, solve_right
from lowrank_sp.updates.rule import Pair


class _Relaxed(NamedTuple):
    """A :class:`Fit`, and the over-relaxation of the method of successive over-relaxation."""

    base: Fit
    relaxation: float
    increment: float
    change: float


def lmafit(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by alternating projections of the filled-in matrix, over-relaxed.

    .. math:: \min_{L, R, Z} \lVert L R - Z \rVert_F^2, \qquad P_\Omega(Z) = P_\Omega(X)

    Parameters
    ----------
    stop : Stop
        The change monitored is that of the entries of ``L R``, relative to the data.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Notes
    -----
    A step takes one orthonormalization and ``3 M r + 3 (m + n) r^2`` multiplications; no system is
    solved. The filled-in matrix is a low-rank one plus the sparse residual. The relaxation grows
    while the residual falls slowly, and steps that raise it are taken back
    :cite:p:`wen2012lmafit`.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=5, rng=0)
    >>> solution = lmafit(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    size = problem.entries.norm()

    def step(state: _Relaxed) -> tuple[_Relaxed, float]:
        left, right, residual = state.base
        xp = namespace(left)
        # Z = L R + (1 + relaxation) * residual, as a low-rank matrix plus a sparse one.
        filled = residual.with_values(residual.values * (1.0 + state.relaxation))
        image = left @ (right @ adjoint(right)) + filled.matmul(adjoint(right))
        new_left = xp.linalg.qr(image)[0]
        new_right = (adjoint(new_left) @ left) @ right + adjoint(filled.rmatmul(new_left))
        new = fit(problem.entries, new_left, new_right)
        old_norm = residual.norm()
        ratio = new.residual.norm() / old_norm if old_norm else 0.0
        change = relative_change(new.residual, residual, size)
        # The schedule of Wen, Yin and Zhang.
        if ratio >= 1.0 and state.relaxation > 0.0:
            increment = max(0.1 * state.relaxation, 0.1 * state.increment)
            return _Relaxed(state.base, 0.0, increment, state.change), state.change
        relaxation, increment = state.relaxation, state.increment
        if ratio > 0.7:
            increment = max(increment, 0.25 * relaxation)
            relaxation += increment
        return _Relaxed(new, relaxation, increment, change), change

    f = problem.start(init, rng)
    start = _Relaxed(fit(problem.entries, *f.split("left").factors()), 0.0, 1.0, 1.0)
    return problem.solve(
        step,
        start,
        value=lambda state: LowRank(state.base.left, state.base.right),
        stop=stop,
        callback=callback,
    )


def scaled_asd(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by scaled alternating steepest descent, with exact line searches.

    .. math:: \min_{L, R} \tfrac12 \lVert P_\Omega(X - L R) \rVert_F^2

    One factor at a time moves along its gradient, preconditioned by the Gram matrix of the other
    one, as far as is best.

    Parameters
    ----------
    stop : Stop
        As in :func:`lmafit`.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Notes
    -----
    A step costs ``4 M r + 2 (m + n) r^2`` multiplications, and the residual never increases
    :cite:p:`tanner2016asd`. The line search costs nothing beyond the update of the residual. No
    gauge is singled out: factors ``(L G, G^-1 R)`` give the same products.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=5, condition=10, rng=0)
    >>> solution = scaled_asd(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    size = problem.entries.norm()

    def step(state: Fit) -> tuple[Fit, float]:
        left, right, residual = state
        gradient = residual.matmul(adjoint(right))
        direction = solve_right(gradient, frame(adjoint(right)))
        move = residual.sampled(direction, right)
        length = _ratio(direction, gradient, move)
        left, residual = (
            left + direction * length,
            residual.with_values(residual.values - move * length),
        )
        gradient = residual.rmatmul(left)
        direction = solve_right(gradient, frame(left))
        move = residual.sampled(left, adjoint(direction))
        length = _ratio(direction, gradient, move)
        right = right + adjoint(direction) * length
        residual = residual.with_values(residual.values - move * length)
        return Fit(left, right, residual), relative_change(residual, state.residual, size)

    f = problem.start(init, rng)
    return problem.solve(
        step,
        fit(problem.entries, *f.split("left").factors()),
        value=lambda state: LowRank(state.left, state.right),
        stop=stop,
        callback=callback,
    )


def scaled_gd(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    step_size: float = 0.5,
    damping: float = 0.0,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by scaled gradient descent on both factors at once.

    .. math:: L_+ = L - \tfrac{\eta}{p} P_\Omega(L R - X) R^H (R R^H + \delta I)^{-1}, \qquad
              R_+ = R - \tfrac{\eta}{p} (L^H L + \delta I)^{-1} L^H P_\Omega(L R - X)

    with ``p = M / (m n)``: the metric of :class:`~lowrank_sp.updates.ScaledGD`. Its rate does not
    depend on the condition of the matrix :cite:p:`tong2021accelerating`.

    Parameters
    ----------
    rank : int
        With ``damping`` it may exceed the rank of the matrix.
    stop : Stop
        As in :func:`lmafit`.
    step_size : float
        ``eta``. A step that would diverge, as the first ones from few entries do, goes to the least
        residual along its direction instead.
    damping : float
        ``delta``, in units of the largest singular value of the matrix, as the spectral start
        estimates it: the ``ridge`` of the rule, which stays as it is while the factors grow, and
        not its ``damping``, which follows them. With values of 0.3 to 1, and an ``init`` of any
        directions but small (1e-6 of that value), components grow from large to small, and those
        beyond the rank of the matrix stay as small as they began
        :cite:p:`xu2023overparameterized`. So does the error.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Notes
    -----
    A step costs ``3 M r + 2 (m + n) r^2`` multiplications, and ``3 M r`` more where it is
    shortened: along a line the squared residual is a polynomial of degree four.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=6, condition=10, rng=0)
    >>> solution = scaled_gd(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}")
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    (m, n), size = problem.entries.shape, problem.entries.norm()
    length = step_size * m * n / problem.entries.size
    ridge = damping * float(problem.start(None, rng).s[0]) if damping else 0.0

    def step(state: Fit) -> tuple[Fit, float]:
        left, right, residual = state
        downhill = Pair(residual.matmul(adjoint(right)), adjoint(residual.rmatmul(left)))
        move = scaled(Pair(left, right), downhill, 1.0, ridge=ridge)
        new = fit(problem.entries, left + length * move.up, right + length * move.down)
        if not fits(new.residual.norm(), max(size, residual.norm())):
            best = _best_length(residual, left, right, move)
            new = fit(problem.entries, left + best * move.up, right + best * move.down)
        return new, relative_change(new.residual, residual, size)

    f = problem.start(init, rng)
    return problem.solve(
        step,
        fit(problem.entries, *f.split("balanced").factors()),
        value=lambda state: LowRank(state.left, state.right),
        stop=stop,
        callback=callback,
    )


def _best_length(residual: Entries, left: Array, right: Array, move: Pair) -> float:
    """The ``t`` for which ``(left + t move.up) (right + t move.down)`` leaves least."""
    e = residual.values
    first = -residual.sampled(move.up, right) - residual.sampled(left, move.down)
    second = -residual.sampled(move.up, move.down)
    products = [[inner((a,), (b,)) for b in (e, first, second)] for a in (e, first, second)]
    (a, b, c), (_, d, f), (_, _, g) = products
    # ||e + t first + t^2 second||^2, from t^4 down.
    polynomial = np.array([g, 2 * f, d + 2 * c, 2 * b, a])
    roots = np.roots(np.polyder(polynomial))
    flat = np.append(roots[abs(roots.imag) <= 1e-6 * abs(roots)].real, 0.0)
    return float(flat[np.argmin(np.polyval(polynomial, flat))])


def _ratio(direction: Array, gradient: Array, move: Array) -> float:
    """The best step: ``<direction, gradient> / ||move||^2``; none where nothing moves."""
    squares = frobenius(move) ** 2
    return inner((direction,), (gradient,)) / squares if squares else 0.0
