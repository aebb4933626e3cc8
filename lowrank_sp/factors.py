"""Low-rank matrices: ``LowRank`` promises only its product, ``SVD`` is canonical."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

from lowrank_sp._arrays import (
    Array,
    adjoint,
    as_compute,
    dtype_name,
    eps,
    frobenius,
    is_complex,
    namespace,
    scalar,
)
from lowrank_sp.gauge import fix_signs, thin_svd
from lowrank_sp.operators import LinearOperator


class Factored(LinearOperator):
    """What :class:`LowRank` and :class:`SVD` share: exact algebra on the factors.

    Nothing here forms an ``m x n`` array but :meth:`to_dense`. Leading axes of the factors are
    batch axes throughout.
    """

    @abstractmethod
    def factors(self) -> tuple[Array, Array]:
        """``(left, right)`` with ``left (..., m, r) @ right (..., r, n)`` equal to the matrix."""

    @property
    def rank(self) -> int:
        """Number of columns of the left factor; the rank of the matrix is at most this."""
        return self.factors()[0].shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(..., m, n)``."""
        left, right = self.factors()
        return (*left.shape[:-1], right.shape[-1])

    @property
    def like(self) -> Array:
        return self.factors()[0]

    def matmul(self, x: Array) -> Array:
        left, right = self.factors()
        return left @ (right @ x)

    def rmatmul(self, x: Array) -> Array:
        left, right = self.factors()
        return adjoint(right) @ (adjoint(left) @ x)

    def to_dense(self) -> Array:
        """The matrix itself, of shape ``(..., m, n)``."""
        left, right = self.factors()
        return left @ right

    def norm(self) -> Any:
        """Frobenius norm: from the triangular factors of both sides, so that a difference of
        nearly equal matrices keeps its digits. ``O((m + n) r^2)``.
        """  # noqa: D205
        xp = namespace(self.like)
        left, right = map(as_compute, self.factors())
        core = xp.linalg.qr(left)[1] @ adjoint(xp.linalg.qr(adjoint(right))[1])
        return frobenius(core) if core.ndim == 2 else _norm(core)[..., 0]

    def inner(self, other: Factored) -> Array:
        """Inner product ``trace(self^H other)``, in ``O((m + n) r r')``."""
        left, right = self.factors()
        left2, right2 = other.factors()
        xp = namespace(left, left2)
        return xp.sum((adjoint(left) @ left2) * (right2 @ adjoint(right)).mT, axis=(-2, -1))

    def hadamard(self, other: Factored) -> LowRank:
        """Entrywise product, of rank ``r r'``: Khatri-Rao products of the factors."""
        left, right = self.factors()
        left2, right2 = other.factors()
        xp = namespace(left, left2)
        rows = left[..., :, None] * left2[..., None, :]
        columns = right[..., :, None, :] * right2[..., None, :, :]
        return LowRank(
            xp.reshape(rows, (*rows.shape[:-2], -1)),
            xp.reshape(columns, (*columns.shape[:-3], -1, columns.shape[-1])),
        )

    def svd(self, rank: int | None = None, *, tol: float | None = None) -> SVD:
        """SVD by two thin QRs and an SVD of the ``r x r`` core; ``O((m + n) r^2)``.

        Parameters
        ----------
        rank, tol
            How to truncate it, as in :meth:`SVD.truncate`; by default not at all.
        """
        xp = namespace(self.like)
        left, right = map(as_compute, self.factors())
        u, s, vh = thin_svd(left, right)
        # Backward error of the two QRs and the core, relative to the factors, not the product.
        rounding = self.rank * eps(u.dtype) * _norm(left) * _norm(right)
        f = SVD(u, s, vh, xp.zeros_like(s) + rounding)
        return f if rank is None and tol is None else f.truncate(rank, tol=tol)

    def __getitem__(self, index: Any) -> LowRank:
        """Rows and columns by slices, as a :class:`LowRank`: ``f[2:5]``, ``f[:, 10:20]``."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not (isinstance(rows, slice) and isinstance(columns, slice)):
            raise TypeError(
                f"index with slices, got {index!r}; entries need f.to_dense() or f @ basis vectors"
            )
        left, right = self.factors()
        return LowRank(left[..., rows, :], right[..., :, columns])

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, LinearOperator):
            return super().__matmul__(other)
        if self.shape[-1] != other.shape[-2]:
            return super().__matmul__(other)
        left, right = self.factors()
        if not isinstance(other, Factored):
            return LowRank(left, other.__rmatmul__(right))
        left2, right2 = other.factors()
        core = right @ left2
        if self.rank <= other.rank:
            return LowRank(left, core @ right2)
        return LowRank(left @ core, right2)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Factored):
            return super().__add__(other)
        if self.shape != other.shape:
            raise ValueError(f"shapes must be equal, got {self.shape} and {other.shape}")
        left, right = self.factors()
        left2, right2 = other.factors()
        xp = namespace(left, left2)
        return LowRank(xp.concat([left, left2], axis=-1), xp.concat([right, right2], axis=-2))

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, Number):
            return NotImplemented
        left, right = self.factors()
        return LowRank(left * scalar(factor, left.dtype), right)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{type(self).__name__}({size}, rank {self.rank}, {self.dtype})"


@dataclass(frozen=True, repr=False)
class LowRank(Factored):
    """The matrix ``left @ right``. Only the product has a meaning, not the factors.

    Parameters
    ----------
    left : array, shape (..., m, r)
    right : array, shape (..., r, n)

    Examples
    --------
    >>> import numpy as np
    >>> f = LowRank(np.ones((4, 1)), np.ones((1, 3)))
    >>> (f - 2 * f).norm() == 12**0.5
    True
    >>> (f + f).svd(rank=1)
    SVD(4 x 3, rank 1, float64)
    """

    left: Array
    right: Array

    def __post_init__(self) -> None:
        namespace(self.left, self.right)
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) < 2 or len(left) != len(right) or left[-1] != right[-2]:
            raise ValueError(
                f"factors must have shapes (..., m, r) and (..., r, n), got {left} and {right}"
            )
        if self.left.dtype != self.right.dtype:
            raise TypeError(
                f"factors must have one dtype, got {dtype_name(self.left.dtype)} and "
                f"{dtype_name(self.right.dtype)}; cast one of them first"
            )

    def factors(self) -> tuple[Array, Array]:
        return self.left, self.right

    @property
    def mT(self) -> LowRank:
        return LowRank(self.right.mT, self.left.mT)

    @property
    def mH(self) -> LowRank:
        return LowRank(adjoint(self.right), adjoint(self.left))


@dataclass(frozen=True, repr=False)
class SVD(Factored):
    """The matrix ``u @ diag(s) @ vh`` in canonical form.

    Orthonormal columns of ``u`` and rows of ``vh``, ``s`` sorted from large to small, and the
    largest entry of every column of ``u`` positive (:func:`lowrank_sp.gauge.fix_signs`). It unpacks
    like the tuple ``u, s, vh``.

    Attributes
    ----------
    u : array, shape (..., m, k)
    s : array, shape (..., k)
    vh : array, shape (..., k, n)
    bounds : array, shape (..., k), or None
        Certified error of each singular value: the matrix that was factorized has a singular value
        within ``bounds[i]`` of ``s[i]``, and different ones where these intervals do not overlap.
    error : float or None
        Frobenius norm of the matrix that was factorized minus this one, where it is known or
        estimated.
    """

    u: Array
    s: Array
    vh: Array
    bounds: Array = None
    error: Any = None

    @classmethod
    def canonical(
        cls, u: Array, s: Array, vh: Array, bounds: Array = None, error: Any = None
    ) -> SVD:
        """The SVD of orthonormal, sorted triplets, with their signs fixed."""
        u, vh = fix_signs(u, vh)
        return cls(u, s, vh, bounds, error)

    def factors(self) -> tuple[Array, Array]:
        return self.u * _as(self.s, self.u)[..., None, :], self.vh

    @property
    def rank(self) -> int:
        return self.s.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.u.shape[:-1], self.vh.shape[-1])

    @property
    def like(self) -> Array:
        return self.u

    def __iter__(self) -> Iterator[Array]:
        return iter((self.u, self.s, self.vh))

    @property
    def mT(self) -> SVD:
        return SVD.canonical(self.vh.mT, self.s, self.u.mT, self.bounds, self.error)

    @property
    def mH(self) -> SVD:
        return SVD.canonical(adjoint(self.vh), self.s, adjoint(self.u), self.bounds, self.error)

    def norm(self) -> Any:
        """Frobenius norm, ``||s||_2``."""
        if self.s.ndim == 1:
            return frobenius(self.s)
        return namespace(self.s).linalg.vector_norm(self.s, axis=-1)

    def truncate(self, rank: int | None = None, *, tol: float | None = None) -> SVD:
        """The leading triplets: ``rank`` of them, or as few as ``tol`` allows.

        Parameters
        ----------
        rank : int, optional
            In ``1..self.rank``. With ``tol`` as well, the most triplets to keep.
        tol : float, optional
            Keep the smallest rank whose error is within ``tol`` of the Frobenius norm of the matrix
            that was factorized (of this one, if ``error`` is not known).
        """
        k = self.rank if rank is None else check_rank(rank, self.rank, self.shape)
        if tol is not None:
            if self.s.ndim > 1:
                raise ValueError("tol needs one matrix, not a batch; truncate by rank instead")
            known = 0.0 if self.error is None else float(self.error)
            k = min(k, rank_for_tol(self.s, tol, known))
        error = None
        if self.error is not None:
            rest = self.s[..., k:]
            if self.s.ndim == 1:
                error = math.hypot(frobenius(rest), self.error)
            else:
                tail = namespace(rest).linalg.vector_norm(rest, axis=-1)
                error = (tail**2 + self.error**2) ** 0.5
        bounds = None if self.bounds is None else self.bounds[..., :k]
        return SVD(self.u[..., :k], self.s[..., :k], self.vh[..., :k, :], bounds, error)

    def split(self, where: Literal["balanced", "left", "right"] = "balanced") -> LowRank:
        """Factors of the product: ``s`` shared by both sides, or all of it on one."""
        if where == "left":
            return LowRank(*self.factors())
        if where == "right":
            return LowRank(self.u, _as(self.s, self.u)[..., :, None] * self.vh)
        if where != "balanced":
            raise ValueError(f"where must be 'balanced', 'left' or 'right', got {where!r}")
        root = _as(self.s**0.5, self.u)
        return LowRank(self.u * root[..., None, :], root[..., :, None] * self.vh)


def check_rank(rank: int, largest: int, shape: tuple[int, ...]) -> int:
    """``rank`` as an int in ``1..largest``, or an error that says the rule."""
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if not 1 <= rank <= largest:
        size = " x ".join(map(str, shape))
        raise ValueError(f"rank must be in 1..{largest} for shape {size}, got {rank}")
    return int(rank)


def rank_for_tol(s: Array, tol: float, error: float = 0.0) -> int:
    """Smallest ``k`` with ``error^2 + sum_{i > k} s_i^2 <= tol^2 (error^2 + sum_i s_i^2)``.

    At least 1, and ``len(s)`` where no ``k`` suffices.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol}; it is relative to the norm")
    xp = namespace(s)
    if s.shape[0] == 0:
        return 0
    scale = max(float(s[0]), error) or 1.0
    # Summed from the small end, so that small tails keep their digits.
    tails = xp.flip(xp.cumulative_sum(xp.flip(s / scale) ** 2)) + (error / scale) ** 2
    return max(1, int(xp.sum(xp.astype(tails > tol**2 * float(tails[0]), xp.int32))))


def _norm(a: Array) -> Any:
    """Frobenius norm: a float, or an array of shape ``(..., 1)`` for a batch."""
    if a.ndim == 2:
        return frobenius(a)
    return namespace(a).linalg.vector_norm(a, axis=(-2, -1), keepdims=True)[..., 0]


def _as(s: Array, u: Array) -> Array:
    return namespace(u).astype(s, u.dtype) if is_complex(u.dtype) else s
