"""Checks of laws for operators and factorizations, for the tests of any project."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, adjoint, eps, frobenius, is_array, namespace, standard_normal
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.spectrum import principal_angles
from lowrank_sp.operators import as_operator


def assert_adjoint(a: Any, *, columns: int = 3, rng: RNG = 0) -> None:
    """Assert ``<A x, y> == <x, A^H y>`` on Gaussian blocks, and the shapes of both products.

    Parameters
    ----------
    a : anything :func:`~lowrank_sp.operators.as_operator` takes
    columns : int
        Width of the blocks.
    rng : int, Generator or None

    Raises
    ------
    AssertionError
        If the identity misses by more than the rounding of the two products.
    """
    operator = as_operator(a)
    m, n = operator.shape
    generator = np.random.default_rng(rng)
    x = standard_normal((n, columns), like=operator.like, rng=generator)
    y = standard_normal((m, columns), like=operator.like, rng=generator)
    ax, ahy = operator.matmul(x), operator.rmatmul(y)
    for name, product, shape in (("A x", ax, (m, columns)), ("A^H y", ahy, (n, columns))):
        assert tuple(product.shape) == shape, f"{name} has shape {product.shape}, expected {shape}"
        assert product.dtype == operator.dtype, f"{name} is {product.dtype}, not {operator.dtype}"
    difference = frobenius(adjoint(ax) @ y - adjoint(x) @ ahy)
    size = frobenius(ax) * frobenius(y) + frobenius(x) * frobenius(ahy)
    bound = 100 * eps(operator.dtype) * size
    assert difference <= bound, f"<Ax, y> and <x, A^H y> differ by {difference:.2e} > {bound:.2e}"


def assert_exact_adjoint(measurement: Any, *, rank: int = 2, rng: RNG = 0) -> None:
    """Assert ``<A(X), y> == <X, A^*(y)>`` for a Gaussian ``X``, dense and as a product of factors.

    Parameters
    ----------
    measurement : lowrank_sp.inverse.Measurement
    rank : int
        Rank of ``X``.
    rng : int, Generator or None

    Raises
    ------
    AssertionError
        If the identity misses by more than the rounding of both sides, or shapes differ.
    """
    (m, n), like = measurement.shape, measurement.like
    generator = np.random.default_rng(rng)
    left = standard_normal((m, rank), like=like, rng=generator)
    right = standard_normal((rank, n), like=like, rng=generator)
    y = standard_normal((measurement.size,), like=like, rng=generator)
    back = measurement.adjoint(y)
    assert tuple(back.shape) == (m, n), f"A^*(y) has shape {back.shape}, expected {(m, n)}"
    image = back.matmul(adjoint(right))
    expected = adjoint(left) @ image
    for x in (LowRank(left, right), left @ right):
        ax = measurement.forward(x)
        assert tuple(ax.shape) == (measurement.size,), f"A(X) has shape {tuple(ax.shape)}"
        difference = abs(
            complex(adjoint(ax[:, None])[0, :] @ y)
            - complex(namespace(left).linalg.trace(expected))
        )
        size = frobenius(ax) * frobenius(y) + frobenius(left) * frobenius(image)
        bound = 100 * eps(like.dtype) * size
        assert difference <= bound, f"<A(X), y> and <X, A^*(y)> differ by {difference:.2e}"


def assert_same_product(a: Any, b: Any, *, tol: float | None = None) -> None:
    """Assert that two matrices, dense or factored, agree: ``||a - b||_F <= tol ||a||_F``.

    ``tol`` is ``100 eps`` of the coarser of both dtypes by default.
    """
    x, y = _dense(a), _dense(b)
    tol = 100 * max(eps(x.dtype), eps(y.dtype)) if tol is None else tol
    error, size = frobenius(x - y), frobenius(x)
    assert error <= tol * size, f"products differ by {error:.2e} > {tol:.1e} * {size:.2e}"


def assert_same_subspace(u: Any, v: Any, *, tol: float | None = None) -> None:
    """Assert that two orthonormal bases span one subspace: the largest angle is at most ``tol``.

    ``tol`` is ``100 eps`` by default, in radians.
    """
    tol = 100 * eps(u.dtype) if tol is None else tol
    assert u.shape == v.shape, f"bases have shapes {u.shape} and {v.shape}"
    angle = float(namespace(u).max(principal_angles(u, v)))
    assert angle <= tol, f"largest principal angle is {angle:.2e} > {tol:.1e}"


def relative_error(a: Any, truth: Any) -> float:
    """``||a - truth||_F / ||truth||_F`` of matrices or tensors, dense or factored.

    Parameters
    ----------
    a, truth : array, LowRank, SVD, or a tensor such as Tucker, CP or TT
        Where one is dense, so is the difference.

    Examples
    --------
    >>> import numpy as np
    >>> relative_error(np.array([[1.0]]), np.array([[2.0]]))
    0.5
    """
    if not is_array(a) and not is_array(truth):
        return (a - truth).norm() / truth.norm()
    x, y = _dense(a), _dense(truth)
    return frobenius(x - y) / frobenius(y)


def _dense(a: Any) -> Any:
    return a if is_array(a) else a.to_dense()
