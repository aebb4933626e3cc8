"""Whether an answer is the matrix that the entries come from."""

from __future__ import annotations

from lowrank_sp._arrays import adjoint, eps, frobenius, standard_normal
from lowrank_sp.factors import SVD
from lowrank_sp.inverse._problem import rejected
from lowrank_sp.inverse.completion.problem import Problem
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.least_squares import least_squares
from lowrank_sp.inverse.tangent import Space, added
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.updates.tangent import Tangent

# Steps within which a well-posed problem near the information limit is solved.
_MOST_STEPS = 2000
# Of a random tangent of unit variance, what an undetermined direction holds is below this once in
# a hundred draws.
_MISSED = 0.01


def certified(problem: Problem, solution: Solution, stop: Stop, noise: float = 0.0) -> Solution:
    """``solution``, not converged where it is not the answer, for methods without a penalty.

    A matrix of the right rank is the answer if it has all the entries, up to twice the noise (in
    units of their root mean square), and no matrix of that rank beside it has them as well. So no
    entries need be withheld, of which there are too few near the information limit.
    """
    tol = stop.resolve(problem.entries.dtype)
    if not solution.converged or tol is None or solution.n_iter == 0:
        return solution
    allowed = 2 * noise + max(10 * tol, 100 * eps(problem.entries.dtype))
    if problem.relative_residual(solution.value) > allowed:
        flaw = "a stationary point that misses the entries"
    elif not determined(problem.entries, problem.start(solution.value)):
        flaw = "other matrices of this rank have the same entries"
    else:
        return solution
    return rejected(solution, flaw)


def determined(y: Entries, f: SVD) -> bool:
    """Whether positions determine the matrix of rank ``r`` near ``f``.

    They do if sampling is injective on the tangent space. A random tangent is sought from its
    samples; the tangents that have no samples, if there are any, are missed. The cost is that of
    one step of a second-order method.
    """
    space = Space(f.u, f.vh)
    shapes = [(f.rank, f.rank), tuple(f.u.shape), tuple(f.vh.shape)]
    core, left, right = (standard_normal(shape, like=f.u, rng=k) for k, shape in enumerate(shapes))
    left = left - f.u @ (adjoint(f.u) @ left)
    sought = Tangent(core, left, right - (right @ adjoint(f.vh)) @ f.vh)
    found = least_squares(
        lambda x: y.sampled(*space.matrix(x).factors()),
        lambda values: space.project(y.with_values(values)),
        y.sampled(*space.matrix(sought).factors()),
        added(0.0, sought),
        tol=eps(f.u.dtype) ** 0.75,
        max_iter=_MOST_STEPS,
    )
    return max(frobenius(part) for part in added(-1.0, found.x, sought)) < _MISSED
