"""Nearest sums of Kronecker products: the singular value decomposition of a rearranged matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowrank_sp._arrays import RNG, Array, as_compute, eps, frobenius, is_array, namespace
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import LinearOperator
from lowrank_sp.tensors.mttkrp import conjugate


@dataclass(frozen=True, repr=False)
class Kronecker(LinearOperator):
    r"""The matrix :math:`\sum_t A_t \otimes B_t`.

    Parameters
    ----------
    left : array, shape (T, m1, n1)
    right : array, shape (T, m2, n2)
    error : float, optional
        Frobenius norm of the matrix that was approximated minus this one, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> k = Kronecker(np.ones((1, 2, 3)), np.ones((1, 4, 5)))
    >>> k, k.norm() == 120**0.5
    (Kronecker(8 x 15, 1 term, float64), True)
    >>> k @ np.ones(15)
    array([15., 15., 15., 15., 15., 15., 15., 15.])
    """

    left: Array
    right: Array
    error: float | None = None

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) != 3 or len(right) != 3 or left[0] != right[0]:
            raise ValueError(
                f"factors must have shapes (T, m1, n1) and (T, m2, n2), got {left} and {right}"
            )

    @property
    def terms(self) -> int:
        """Number of Kronecker products."""
        return self.left.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(m1 m2, n1 n2)``."""
        (_, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        return m1 * m2, n1 * n2

    @property
    def like(self) -> Array:
        return self.left

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return math.prod(self.left.shape) + math.prod(self.right.shape)

    def matmul(self, x: Array) -> Array:
        return _applied(self.left, self.right, x)

    def rmatmul(self, x: Array) -> Array:
        return _applied(conjugate(self.left).mT, conjugate(self.right).mT, x)

    def rearranged(self) -> LowRank:
        """The ``(m1 n1) x (m2 n2)`` matrix with the same entries, of rank ``T``."""
        xp = namespace(self.left, self.right)
        left = xp.reshape(self.left, (self.terms, -1))
        return LowRank(left.mT, xp.reshape(self.right, (self.terms, -1)))

    def norm(self) -> float:
        """Frobenius norm, that of the rearranged matrix."""
        return self.rearranged().norm()

    def to_dense(self) -> Array:
        """The matrix itself."""
        xp = namespace(self.left)
        (_, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        grid = xp.reshape(self.rearranged().to_dense(), (m1, n1, m2, n2))
        return xp.reshape(xp.permute_dims(grid, (0, 2, 1, 3)), self.shape)

    def __repr__(self) -> str:
        size, count = " x ".join(map(str, self.shape)), self.terms
        return f"Kronecker({size}, {count} term{'s' * (count > 1)}, {self.dtype})"


def _applied(left: Array, right: Array, x: Array) -> Array:
    xp = namespace(left, right, x)
    (terms, m1, n1), (_, m2, n2), k = left.shape, right.shape, x.shape[1]
    inside = right[:, None, :, :] @ xp.reshape(x, (1, n1, n2, k))
    products = left @ xp.reshape(inside, (terms, n1, m2 * k))
    return xp.reshape(xp.sum(products, axis=0), (m1 * m2, k))


def nearest_kronecker(
    w: Any, shape: tuple[int, int], *, terms: int = 1, rng: RNG = None
) -> Kronecker:
    r"""Nearest sum of Kronecker products to a matrix.

    .. math:: \min_{A_t, B_t} \Bigl\lVert W - \sum_{t=1}^T A_t \otimes B_t \Bigr\rVert_F

    Parameters
    ----------
    w : array of shape (m1 m2, n1 n2), LowRank or SVD
        A matrix of low rank is not formed.
    shape : (int, int)
        ``(m1, n1)``, the shape of the ``A_t``, which divides that of ``w``.
    terms : int
        ``T``, in ``1..min(m1 n1, m2 n2)``.
    rng : int, Generator or None
        Seed of the singular value decomposition.

    Returns
    -------
    Kronecker
        Factors of equal norm, orthogonal among the ``A_t`` and among the ``B_t``; the largest entry
        of each ``A_t`` is positive.

    Raises
    ------
    ValueError
        If ``shape`` does not divide that of ``w``, or ``terms`` is out of range.

    Notes
    -----
    Rows of the rearranged matrix are blocks of ``w``, so that the problem is that of its best
    approximation of rank ``T`` :cite:p:`vanloan1993approximation`: one copy of ``w`` and one
    :func:`~lowrank_sp.linalg.svd.truncated_svd`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> w = np.kron(rng.standard_normal((2, 3)), rng.standard_normal((4, 5)))
    >>> bool(np.allclose(nearest_kronecker(w, (2, 3)).to_dense(), w))
    True
    """
    if len(w.shape) != 2:
        raise ValueError(f"w must be one matrix, got shape {tuple(w.shape)}")
    (m, n), (m1, n1) = w.shape, shape
    if m1 < 1 or n1 < 1 or m % m1 or n % n1:
        raise ValueError(f"shape must divide that of the matrix, {m} x {n}, got {m1} x {n1}")
    inside = (m // m1, n // n1)
    if is_array(w):
        xp = namespace(w)
        blocks = xp.reshape(as_compute(w), (m1, inside[0], n1, inside[1]))
        matrix = xp.reshape(xp.permute_dims(blocks, (0, 2, 1, 3)), (m1 * n1, -1))
        f = truncated_svd(matrix, terms, rng=rng)
        error = frobenius(matrix - f.to_dense())
    else:
        f = truncated_svd(_Rearranged(w, shape, inside), terms, rng=rng)
        square = w.norm() ** 2 - f.norm() ** 2
        error = square**0.5 if square > 1e4 * eps(w.dtype) * w.norm() ** 2 else None
    left, right = f.split().factors()
    xp = namespace(left)
    return Kronecker(
        xp.reshape(left.mT, (terms, m1, n1)), xp.reshape(right, (terms, *inside)), error
    )


class _Rearranged(LinearOperator):
    """The rearrangement of a matrix of low rank, by products with its factors."""

    def __init__(self, w: Factored, outer: tuple[int, int], inner: tuple[int, int]):
        (m1, n1), (m2, n2) = outer, inner
        left, right = w.factors()
        xp = namespace(left, right)
        super().__init__((m1 * n1, m2 * n2), left[:0, :0])
        self._left = xp.reshape(left, (m1, m2, w.rank))
        self._right = xp.reshape(right, (w.rank, n1, n2))

    def matmul(self, x: Array) -> Array:
        # y[i j, c] = sum_{k l r} left[i, k, r] right[r, j, l] x[k l, c]
        xp = namespace(x)
        (m1, m2, r), (_, n1, n2) = self._left.shape, self._right.shape
        inside = self._right[:, None, :, :] @ xp.reshape(x, (1, m2, n2, -1))
        inside = xp.permute_dims(inside, (1, 0, 2, 3))
        product = xp.reshape(self._left, (m1, -1)) @ xp.reshape(inside, (m2 * r, -1))
        return xp.reshape(product, (m1 * n1, -1))

    def rmatmul(self, x: Array) -> Array:
        xp = namespace(x)
        (m1, m2, r), (_, n1, n2) = self._left.shape, self._right.shape
        left, right = conjugate(self._left), conjugate(self._right)
        inside = xp.reshape(left, (m1, -1)).mT @ xp.reshape(x, (m1, -1))
        inside = xp.reshape(inside, (m2, r * n1, -1))
        return xp.reshape(xp.reshape(right, (r * n1, n2)).mT @ inside, (m2 * n2, -1))
