"""Descent on the manifold of the matrices of fixed rank."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_sp._arrays import RNG, adjoint, eps, frobenius
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.inverse._lowered import leading
from lowrank_sp.inverse.completion.problem import Callback, Problem, relative_change
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.tangent import Space, added, inner
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.updates.tangent import Tangent

# A direction this far from the gradient, by the cosine, is given up for the gradient.
_COSINE = 0.1
# Most halvings of a step.
_HALVINGS = 20
# Residual allowed in the singular vectors of an iterate, in units of what its entries miss.
_EXACT = 1e-3


class _State(NamedTuple):
    """An iterate, the sparse residual of the entries, its projection, and where to go."""

    f: SVD
    residual: Entries
    descent: Tangent
    direction: Tangent


def riemannian_cg(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by conjugate gradients on the manifold of fixed rank.

    .. math:: \min_{\operatorname{rank} X = r} \tfrac12 \lVert P_\Omega(X) - y \rVert_F^2

    Parameters
    ----------
    stop : Stop
        The change monitored is that of the entries of the iterate, relative to the data.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Notes
    -----
    Directions are those of Polak and Ribière, transported by projection
    :cite:p:`vandereycken2013low`. The step is exact for the linearized problem, and halved
    while it raises the residual. ``6 M r + 40 (m + n) r^2`` multiplications a step. The rate
    worsens with the condition of the matrix.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=5, rng=0)
    >>> solution = riemannian_cg(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    y, size = problem.entries, problem.entries.norm()

    def step(state: _State) -> tuple[_State, float]:
        space = Space(state.f.u, state.f.vh)
        old = state.residual.norm()
        image = y.sampled(*space.matrix(state.direction).factors())
        squares = frobenius(image) ** 2
        length = inner((image,), (state.residual.values,)) / squares if squares else 0.0
        for _ in range(_HALVINGS):
            f = space.retract(state.f.s, added(length, state.direction))
            residual = _residual(y, f)
            if residual.norm() <= old:
                break
            length /= 2
        else:
            # Rounding: no step along this direction lowers the residual.
            f, residual = state.f, state.residual
        change = frobenius(residual.values - state.residual.values) / size
        return _turned(space, state, f, residual), change

    f = problem.start(init, rng)
    residual = _residual(y, f)
    descent = Space(f.u, f.vh).project(residual)
    return problem.solve(
        step,
        _State(f, residual, descent, descent),
        value=lambda state: LowRank(*state.f.factors()),
        stop=stop,
        callback=callback,
    )


def niht(
    entries: Entries,
    *,
    rank: int,
    init: Factored | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callback = None,
    allow_unidentified: bool = False,
) -> Solution:
    r"""Completion by normalized iterative hard thresholding.

    .. math:: X_+ = H_r\big(X + \alpha G\big), \qquad G = P_\Omega(y - X), \qquad
              \alpha = \frac{\lVert U U^H G \rVert^2}{\lVert P_\Omega(U U^H G) \rVert^2}

    with the truncated SVD ``H_r`` and the left singular vectors ``U`` of ``X``
    :cite:p:`tanner2013normalized`.

    Parameters
    ----------
    stop : Stop
        As in :func:`riemannian_cg`.

    The other parameters are those of :func:`~lowrank_sp.inverse.completion.alternating.als`.

    Notes
    -----
    A step takes a truncated SVD of a low-rank matrix plus a sparse one: some ten products with
    about ``r`` columns, ``2 M + 4 (m + n) r`` multiplications each. It needs more entries than the
    other methods, and its rate worsens with the condition of the matrix.

    Examples
    --------
    >>> from lowrank_sp.inverse import synthetic
    >>> p = synthetic.completion(shape=(60, 50), rank=2, oversampling=6, rng=0)
    >>> solution = niht(p.entries, rank=2, rng=0)
    >>> solution.converged, bool((solution.value - p.truth).norm() < 1e-5 * p.truth.norm())
    (True, True)
    """
    problem = Problem.of(entries, rank, allow_unidentified=allow_unidentified)
    y, size = problem.entries, problem.entries.norm()

    def step(state: tuple[SVD, Entries]) -> tuple[tuple[SVD, Entries], float]:
        f, residual = state
        old = residual.norm()
        projected = adjoint(residual.rmatmul(f.u))
        squares = frobenius(y.sampled(f.u, projected)) ** 2
        length = frobenius(projected) ** 2 / squares if squares else 0.0
        for _ in range(_HALVINGS):
            moved = leading(
                f + residual * length,
                lambda theta: problem.rank if len(theta) >= problem.rank else None,
                tol=max(_EXACT * min(1.0, old / size), 10 * eps(y.dtype)),
                rng=0,
                near=f,
            )
            new = _residual(y, moved)
            if new.norm() <= old:
                return (moved, new), relative_change(new, residual, size)
            length /= 2
        # Rounding: no step along the gradient lowers the residual.
        return state, 0.0

    f = problem.start(init, rng)
    return problem.solve(
        step,
        (f, _residual(y, f)),
        value=lambda state: state[0],
        stop=stop,
        callback=callback,
    )


def _residual(y: Entries, f: Factored) -> Entries:
    return y.with_values(y.values - y.sample(f))


def _turned(space: Space, state: _State, f: SVD, residual: Entries) -> _State:
    """The state at ``f``: the old direction and gradient are carried over from ``space``."""
    here = Space(f.u, f.vh)
    descent = here.project(residual)
    direction = here.project(space.matrix(state.direction))
    before = here.project(space.matrix(state.descent))
    square, last = inner(descent, descent), inner(state.descent, state.descent)
    turn = max(0.0, (square - inner(descent, before)) / last) if last else 0.0
    direction = added(turn, direction, descent)
    lengths = (square * inner(direction, direction)) ** 0.5
    if inner(direction, descent) <= _COSINE * lengths:
        direction = descent
    return _State(f, residual, descent, direction)
