"""Damped linear least squares on tuples of arrays, by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lowrank_sp._arrays import Array, device, frobenius, namespace, real_dtype
from lowrank_sp.inverse.tangent import inner

# A named tuple of arrays, such as a tangent or a pair of factors.
Vector = Any


class Fit(NamedTuple):
    """A solution ``x``, its residual ``data - forward(x)``, and the steps taken."""

    x: Vector
    residual: Array
    n_iter: int


def least_squares(
    forward: Callable[[Vector], Array],
    backward: Callable[[Array], Vector],
    data: Array,
    start: Vector,
    weights: Vector | None = None,
    *,
    rate: float = 1.0,
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
    weights : named tuple of arrays, optional
        The diagonal ``D``, in shapes that broadcast to those of ``start``; zero by default. The
        problem is preconditioned by ``1 / (rate + D)``.
    rate : float
        What ``A^H A`` is on average.
    tol : float
        End once the preconditioned gradient is this much smaller than it is at zero.
    max_iter : int
    """
    if weights is None:
        weights = _each(_zero, start)
    inverse = _each(lambda w: 1.0 / (rate + w), weights)

    def gradient(residual: Array, x: Vector) -> Vector:
        return _each(lambda g, w, a: g - w * a, backward(residual), weights, x)

    def scaled(g: Vector) -> Vector:
        return _each(lambda a, w: a * w, g, inverse)

    at_zero = backward(data)
    enough = tol**2 * inner(at_zero, scaled(at_zero))
    residual = data - forward(start)
    g = gradient(residual, start)
    z = scaled(g)
    found, p, size = Fit(start, residual, 0), z, inner(g, z)
    # A loop of its own: iterate() would take an interruption for the end of this system alone.
    while found.n_iter < max_iter and size > enough:
        image = forward(p)
        curvature = frobenius(image) ** 2 + inner(p, _each(lambda a, w: a * w, p, weights))
        length = size / curvature
        x = _added(found.x, length, p)
        residual = found.residual - length * image
        g = gradient(residual, x)
        z = scaled(g)
        size, before = inner(g, z), size
        if not math.isfinite(size):
            break
        p = _added(z, size / before, p)
        found = Fit(x, residual, found.n_iter + 1)
    return found


def _zero(like: Array) -> Array:
    xp = namespace(like)
    return xp.zeros((1, 1), dtype=real_dtype(xp, like.dtype), device=device(like))


def _added(x: Vector, step: float, p: Vector) -> Vector:
    return _each(lambda a, b: a + step * b, x, p)


def _each(function: Callable[..., Array], first: Vector, *others: Vector) -> Vector:
    return type(first)(*(function(*arrays) for arrays in zip(first, *others, strict=True)))
