"""Damped linear least squares on tuples of arrays, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lowrank_sp._arrays import Array, frobenius
from lowrank_sp.inverse.tangent import inner
from lowrank_sp.iterate import Stop, iterate

# A named tuple of arrays, such as a tangent or a pair of factors.
Vector = Any


class Fit(NamedTuple):
    """A solution ``x``, its residual ``data - forward(x)``, and the steps taken."""

    x: Vector
    residual: Array
    n_iter: int


class _State(NamedTuple):
    x: Vector
    residual: Array
    direction: Vector
    size: float  # squared norm of the preconditioned gradient


def least_squares(
    forward: Callable[[Vector], Array],
    backward: Callable[[Array], Vector],
    data: Array,
    start: Vector,
    weights: Vector,
    *,
    rate: float,
    tol: float,
    max_iter: int,
) -> Fit:
    r"""Conjugate gradients for a damped linear least-squares problem.

    .. math:: \min_x \lVert A x - y \rVert^2 + \langle x, D x \rangle

    They update the residual of the data rather than that of the normal equations, so that rounding
    does not see the square of the condition number :cite:p:`bjorck1996numerical`.

    Parameters
    ----------
    forward, backward : callable
        ``A`` and its adjoint, from named tuples of arrays to data and back.
    data : array
        ``y``.
    start : named tuple of arrays
        From zero and undamped, the answer is the one of least norm.
    weights : named tuple of arrays
        The diagonal ``D``, in shapes that broadcast to those of ``start``. The problem is
        preconditioned by ``1 / (rate + D)``.
    rate : float
        What ``A^H A`` is on average.
    tol : float
        End once the preconditioned gradient is this much smaller than it is at zero.
    max_iter : int
    """
    inverse = _each(lambda w: 1.0 / (rate + w), weights)

    def gradient(residual: Array, x: Vector) -> Vector:
        return _each(lambda g, w, a: g - w * a, backward(residual), weights, x)

    def scaled(g: Vector) -> Vector:
        return _each(lambda a, w: a * w, g, inverse)

    at_zero = backward(data)
    scale = inner(at_zero, scaled(at_zero))
    residual = data - forward(start)
    g = gradient(residual, start)
    z = scaled(g)
    size = inner(g, z)
    if size <= tol**2 * scale:
        return Fit(start, residual, 0)

    def step(state: _State) -> tuple[_State, float]:
        p = state.direction
        image = forward(p)
        curvature = frobenius(image) ** 2 + inner(p, _each(lambda a, w: a * w, p, weights))
        length = state.size / curvature
        x = _each(lambda a, b: a + length * b, state.x, p)
        residual = state.residual - length * image
        g = gradient(residual, x)
        z = scaled(g)
        size = inner(g, z)
        turn = size / state.size
        p = _each(lambda a, b: a + turn * b, z, p)
        return _State(x, residual, p, size), (size / scale) ** 0.5

    stop = Stop(max_iter=max_iter, tol=tol)
    found = iterate(step, _State(start, residual, z, size), stop=stop, dtype=data.dtype)
    return Fit(found.value.x, found.value.residual, found.n_iter)


def _each(function: Callable[..., Array], first: Vector, *others: Vector) -> Vector:
    return type(first)(*(function(*arrays) for arrays in zip(first, *others, strict=True)))
