"""Orthonormal frames of tall blocks from small Gram matrices: all inverses of the rules."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    Array,
    across,
    adjoint,
    device,
    dtype_name,
    eps,
    from_host,
    has_numba,
    host_values,
    is_complex,
    namespace,
    wide_dtype,
)
from lowrank_sp.updates.rule import Pair, Scalar


class Frame(NamedTuple):
    """``x = q @ root`` and ``q = x @ inverse`` with ``q^H q`` a projection; ``q`` is not formed.

    For ``x`` of full rank ``root^H root`` is the Gram matrix ``x^H x``, and ``inverse inverse^H``
    its inverse. Null directions of ``x`` are zero columns of ``q`` and of ``inverse``, so that
    ``inverse inverse^H`` is a pseudo-inverse. ``q`` is determined up to a unitary factor on its
    right, which cancels in whatever a rule makes of it. Both arrays are ``r x r``, in float64 where
    the library has it.
    """

    root: Array
    inverse: Array


def gram(x: Array) -> Array:
    """``x^H x`` of a tall block ``(..., m, r)``, summed in float64 where the library has it."""
    xp = namespace(x)
    host = _single_on_host(x)
    if host is not None:
        from lowrank_sp.updates import _compiled

        return from_host(_compiled.grams(host), x, wide_dtype(xp, x.dtype))
    wide = xp.astype(x, wide_dtype(xp, x.dtype), copy=False)
    return adjoint(wide) @ wide


def frame(x: Array, *, ridge: float = 0.0) -> Frame:
    """Frame of a tall block ``x (..., m, r)``, in ``2 m r^2`` flops and one read of ``x``.

    The Gram matrix is scaled to unit diagonal before its eigenvectors are computed, so that
    columns of very different lengths do no harm. In single precision it is summed in float64; where
    that is not wider than ``x``, a second pass over ``x`` restores what squaring lost. Real float32
    arrays on the host take a compiled route, on one thread.

    Parameters
    ----------
    x : array, shape (..., m, r)
    ridge : float
        Added to the diagonal of the Gram matrix.
    """
    xp = namespace(x)
    wide = wide_dtype(xp, x.dtype)
    # Eigenvalues that are rounding reach a few r eps; a direction kept by mistake is noise.
    r = x.shape[-1]
    least = max((r * eps(x.dtype)) ** 2, 8 * r * eps(wide))
    host = _single_on_host(x)
    if host is not None:
        from lowrank_sp.updates import _compiled

        parts = _compiled.frames(host, ridge=ridge, least=least)
        return Frame(*(from_host(part, x, wide) for part in parts))
    n = gram(x)
    if ridge:
        n = n + ridge * xp.eye(r, dtype=n.dtype, device=device(n))
    found = _split(n, least)
    if n.dtype == x.dtype and not ridge:
        q = x @ found.inverse
        # q^H q = P + E with a small E: the symmetric step (P + E)^(-1/2) = P - E/2 + ...
        again = adjoint(q) @ q
        kept = found.root @ found.inverse
        half = (again - kept) / 2
        found = Frame(found.root + half @ found.root, found.inverse - found.inverse @ half)
    return found


def _single_on_host(x: Array) -> np.ndarray | None:
    """A real block in single precision on the host, for which Gram matrices are compiled."""
    return host_values(x) if dtype_name(x.dtype) == "float32" and has_numba() else None


def _split(n: Array, least: float) -> Frame:
    """Root and inverse root of a Gram matrix, without eigenvalues of up to ``least``.

    Eigenvalues are those of the matrix scaled to a unit diagonal.
    """
    xp = namespace(n)
    squares = xp.linalg.diagonal(n)
    squares = xp.real(squares) if is_complex(n.dtype) else squares
    one = xp.ones_like(squares)
    lengths = xp.where(squares > 0, squares, one) ** 0.5
    unit = n / (lengths[..., :, None] * lengths[..., None, :])
    values, vectors = xp.linalg.eigh(unit)
    keep = values > least
    sizes = xp.where(keep, values, xp.ones_like(values)) ** 0.5
    zero = xp.zeros_like(sizes)
    inverse = vectors * xp.where(keep, 1 / sizes, zero)[..., None, :] / lengths[..., :, None]
    root = xp.where(keep, sizes, zero)[..., :, None] * adjoint(vectors) * lengths[..., None, :]
    return Frame(root, inverse)


class Balance(NamedTuple):
    """The singular value decomposition of ``up @ down``, through frames turned to fit.

    With ``q_up = up left.inverse`` and ``q_down = down^H right.inverse`` it is
    ``q_up diag(sigma) q_down^H``. ``null`` marks singular values that are rounding.
    """

    left: Frame
    sigma: Array
    right: Frame
    null: Array


def balance_of(factors: Pair, of_up: Frame, of_down: Frame) -> Balance:
    """The balanced gauge from frames of ``up`` and ``down^H``, in ``O(r^3)``."""
    xp = namespace(of_up.root)
    u, sigma, vh = xp.linalg.svd(of_up.root @ adjoint(of_down.root), full_matrices=False)
    least = sigma.shape[-1] * eps(factors.up.dtype) * sigma[..., :1]
    left = Frame(adjoint(u) @ of_up.root, of_up.inverse @ u)
    right = Frame(vh @ of_down.root, of_down.inverse @ adjoint(vh))
    return Balance(left, sigma, right, sigma <= least)


def times(x: Array, small: Array) -> Array:
    """``x @ small`` in the dtype of ``x``, and laid out as ``x``."""
    small = namespace(x).astype(small, x.dtype)
    return (small.mT @ x.mT).mT if across(x) else x @ small


def left_times(small: Array, x: Array) -> Array:
    """``small @ x`` in the dtype of ``x``."""
    return namespace(x).astype(small, x.dtype) @ x


def combined(a: Scalar, x: Array, b: Scalar, y: Array) -> Array:
    """``a x + b y``; numbers for every pair of a batch have shape ``(..., 1, 1)``."""
    if to_compile(x, y):
        from lowrank_sp.updates import _compiled

        return _compiled.combined(a, x, b, y)
    return a * x + b * y


def to_compile(*arrays: Array) -> bool:
    """Whether there is compiled code for the arrays: real matrices of NumPy, all of one dtype."""
    first = arrays[0]
    alike = (isinstance(x, np.ndarray) and x.ndim > 1 and x.dtype == first.dtype for x in arrays)
    return all(alike) and first.dtype in (np.float32, np.float64) and has_numba()


def solve_right(x: Array, of: Frame, weights: Any = 1.0) -> Array:
    """``x (y^H y)^{-1}`` for the block ``y`` that ``of`` is a frame of.

    Each half of the inverse in its turn, so that rounding is magnified by the condition number of
    ``y`` and not by its square. ``weights``, a number or real and of shape ``(..., 1, r)``, go
    between the halves.
    """
    return times(times(x, of.inverse * weights), adjoint(of.inverse))


def solve_left(of: Frame, x: Array, weights: Any = 1.0) -> Array:
    """``(y^H y)^{-1} x``, as :func:`solve_right`."""
    return left_times(of.inverse, left_times(adjoint(of.inverse * weights), x))


def frames(factors: Pair, *, ridge: float = 0.0) -> tuple[Frame, Frame]:
    """Frames of ``up`` and of ``down^H``."""
    return frame(factors.up, ridge=ridge), frame(adjoint(factors.down), ridge=ridge)
