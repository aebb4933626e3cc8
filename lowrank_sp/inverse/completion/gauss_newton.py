"""The Gauss-Newton method on factors."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_sp._arrays import RNG, Array, adjoint, eps, namespace
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.inverse.completion.certificate import certified
from lowrank_sp.inverse.completion.problem import Callback, Problem
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.least_squares import least_squares
from lowrank_sp.iterate import Solution, Stop

# Accuracy of a linear system, times the squared relative residual: steps converge quadratically.
_INNER_TOL = 1e-3


class _Pair(NamedTuple):
    left: Array
    right: Array


class _State(NamedTuple):
    """The factors, and the answer that their last step implies."""

    factors: _Pair
    f: SVD
    residual: float


def gnmr(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(max_iter=100),
    callback: Callback = None,
    inner_iter: int = 2000,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by the Gauss-Newton method on the factors, in its setting variant.

    .. math:: (L_+, R_+) = \arg\min_{L', R'} \lVert P_\Omega(L R' + L' R - L R - X) \rVert_F,
              \quad \text{of least norm } \lVert L' \rVert_F^2 + \lVert R' \rVert_F^2

    See :cite:p:`zilber2022gnmr`.

    Parameters
    ----------
    stop : Stop
        The change monitored is the residual on the entries, relative to the data, or the change of
        the answer if that is smaller.
    inner_iter : int
        Most conjugate gradient steps a linear system may take. They regularize: far from the
        solution the systems are nearly singular.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Returns
    -------
    Solution
        ``converged`` is False also where the answer misses the entries, or other matrices of rank
        ``rank`` have them too.

    Notes
    -----
    The answer is the best approximation of rank ``r`` to ``L R_+ + L_+ R - L R``, of rank ``2 r``.
    The product ``L_+ R_+`` need not converge when that does, since the factors may alternate
    between two gauges; and it must not be replaced by the answer, from which the next step recovers
    less.

    A conjugate gradient step costs ``8 M r`` flops. There are up to ``inner_iter`` in each of some
    60 steps near the information limit, and some tens in each of 5 far above it.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=2, condition=10, rng=0)
    >>> solution = gnmr(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-6 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    y, rank = problem.entries, problem.rank

    def step(state: _State) -> tuple[_State, float]:
        left, right = state.factors

        def forward(x: _Pair) -> Array:
            return y.sampled(*_tangent(left, right, x).factors())

        def backward(values: Array) -> _Pair:
            sparse = y.with_values(values)
            return _Pair(sparse.matmul(adjoint(right)), adjoint(sparse.rmatmul(left)))

        new = least_squares(
            forward,
            backward,
            y.values + y.sampled(left, right),
            _Pair(0 * left, 0 * right),
            tol=max(_INNER_TOL * min(1.0, state.residual) ** 2, 100 * eps(y.dtype)),
            max_iter=inner_iter,
        ).x
        tangent = _tangent(left, right, new._replace(right=new.right - right))
        f = tangent.svd(rank)
        residual = y.relative_residual(f)
        moved = float((f - state.f).norm()) / (float(f.norm()) or 1.0)
        return _State(new, f, residual), min(residual, moved)

    f = problem.start(init, rng)
    solution = problem.solve(
        step,
        _State(_Pair(*f.split().factors()), f, y.relative_residual(f)),
        value=lambda state: state.f,
        stop=stop,
        callback=callback,
    )
    return certified(problem, solution, stop)


def _tangent(left: Array, right: Array, x: _Pair) -> LowRank:
    """``left @ x.right + x.left @ right``."""
    xp = namespace(left)
    both = xp.concat([left, x.left], axis=1)
    return LowRank(both, xp.concat([x.right, right], axis=0))
