"""The operator interface and its algebra: adjoint, sum, product and scalar multiple."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Number
from typing import Any

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    dtype_name,
    frobenius,
    is_array,
    is_complex,
    namespace,
    scalar,
    standard_normal,
)


class LinearOperator(ABC):
    """A matrix ``A`` of shape ``(m, n)`` known by its products.

    A subclass passes its shape and ``like``, an empty array that carries the library, compute
    dtype and device of every result, to this constructor, and defines :meth:`matmul` and
    :meth:`rmatmul`. It may override :meth:`normal` when both products can share one read of the
    data, :meth:`norm`, and ``block_columns``.

    Operators combine by ``+``, ``-``, ``@`` and multiplication by a number.
    """

    #: Least width at which a block of columns is multiplied efficiently.
    block_columns: int = 8
    #: Whether :meth:`normal` reads the data once.
    one_read: bool = False
    #: Whether the matrix is an array in memory.
    in_memory: bool = False

    # NumPy hands ``array @ operator`` and ``scalar * operator`` over to this class.
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, ...], like: Array):
        self._shape, self._like = tuple(shape), like

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(m, n)``."""
        return self._shape

    @property
    def like(self) -> Array:
        """Array whose library, dtype and device the products have."""
        return self._like

    @property
    def dtype(self) -> Any:
        """Dtype of the products."""
        return self.like.dtype

    @property
    def device(self) -> Any:
        """Device of the products."""
        return device(self.like)

    @abstractmethod
    def matmul(self, x: Array) -> Array:
        """``A @ x`` for a block of columns ``x`` of shape ``(n, k)``."""

    @abstractmethod
    def rmatmul(self, x: Array) -> Array:
        """``A^H @ x`` for a block of columns ``x`` of shape ``(m, k)``."""

    def normal(self, x: Array) -> tuple[Array, Array]:
        """``(A @ x, A^H @ A @ x)``, reading the data once where the operator can."""
        y = self.matmul(x)
        return y, self.rmatmul(y)

    def two_sided(self, x: Array, y: Array) -> tuple[Array, Array]:
        """``(A @ x, A^H @ y)``, reading the data once where the operator can."""
        return self.matmul(x), self.rmatmul(y)

    def sketch(self, width: int, rng: RNG = None) -> Array:
        """``A^H @ omega`` with ``width`` Gaussian columns of unit variance."""
        return self.rmatmul(standard_normal((self.shape[0], width), like=self.like, rng=rng))

    def session(self) -> AbstractContextManager[Any]:
        """Context to enter around a series of products."""
        return nullcontext()

    def norm(self) -> float:
        """Frobenius norm. By default from products with blocks of the identity."""
        return math.hypot(*(frobenius(block) for _, block in self._column_blocks()))

    def to_dense(self) -> Array:
        """The matrix itself, of shape ``(m, n)``."""
        xp = namespace(self.like)
        return xp.concat([block for _, block in self._column_blocks()], axis=1)

    def _column_blocks(self, width: int = 64) -> Iterator[tuple[int, Array]]:
        xp = namespace(self.like)
        n = self.shape[-1]
        for start in range(0, max(n, 1), width):
            # Ones on the diagonal that begins at row ``start``.
            columns = xp.eye(
                n, min(width, n - start), k=-start, dtype=self.dtype, device=self.device
            )
            yield start, self.matmul(columns)

    @property
    def mH(self) -> LinearOperator:
        """Adjoint, of shape ``(n, m)``."""
        return Adjoint(self)

    @property
    def mT(self) -> LinearOperator:
        """Transpose, of shape ``(n, m)``; the adjoint when the operator is real."""
        return _Conjugate(Adjoint(self)) if is_complex(self.dtype) else self.mH

    def __matmul__(self, other: Any) -> Any:
        inner = other.shape[0] if getattr(other, "ndim", 2) == 1 else other.shape[-2]
        if self.shape[-1] != inner:
            raise ValueError(
                f"inner dimensions must agree, got shapes {self.shape} and {tuple(other.shape)}"
            )
        if isinstance(other, LinearOperator):
            return Product(self, other)
        if not is_array(other):
            return NotImplemented
        return self.matmul(other[:, None])[:, 0] if other.ndim == 1 else self.matmul(other)

    def __rmatmul__(self, other: Array) -> Array:
        if other.ndim == 1:
            return adjoint(self.rmatmul(adjoint(other[None, :])))[0, :]
        return adjoint(self.rmatmul(adjoint(other)))

    def __add__(self, other: Any) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: Any) -> LinearOperator:
        return Scaled(self, factor) if isinstance(factor, Number) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' x '.join(map(str, self.shape))}, {self.dtype})"


class Adjoint(LinearOperator):
    """``A^H``."""

    def __init__(self, operator: LinearOperator):
        super().__init__((operator.shape[1], operator.shape[0]), operator.like)
        self.operator = operator
        self.block_columns, self.in_memory = operator.block_columns, operator.in_memory

    def matmul(self, x: Array) -> Array:
        return self.operator.rmatmul(x)

    def rmatmul(self, x: Array) -> Array:
        return self.operator.matmul(x)

    def norm(self) -> float:
        return self.operator.norm()

    def to_dense(self) -> Array:
        return adjoint(self.operator.to_dense())

    @property
    def mH(self) -> LinearOperator:
        return self.operator


class _Conjugate(LinearOperator):
    """``conj(A)``."""

    def __init__(self, operator: LinearOperator):
        super().__init__(operator.shape, operator.like)
        self.operator = operator

    def matmul(self, x: Array) -> Array:
        xp = namespace(x)
        return xp.conj(self.operator.matmul(xp.conj(x)))

    def rmatmul(self, x: Array) -> Array:
        xp = namespace(x)
        return xp.conj(self.operator.rmatmul(xp.conj(x)))

    def norm(self) -> float:
        return self.operator.norm()


class Scaled(LinearOperator):
    """``factor * A``."""

    def __init__(self, operator: LinearOperator, factor: Any):
        super().__init__(operator.shape, operator.like)
        self.operator = operator
        self.factor = scalar(factor, operator.dtype)
        self.block_columns = operator.block_columns

    def matmul(self, x: Array) -> Array:
        return self.operator.matmul(x) * self.factor

    def rmatmul(self, x: Array) -> Array:
        return self.operator.rmatmul(x) * self.factor.conjugate()

    def normal(self, x: Array) -> tuple[Array, Array]:
        # Scaling the input keeps y, from which z is formed, within range.
        y, z = self.operator.normal(x * self.factor)
        return y, z * self.factor.conjugate()

    def sketch(self, width: int, rng: RNG = None) -> Array:
        return self.operator.sketch(width, rng) * self.factor.conjugate()

    def norm(self) -> float:
        return abs(self.factor) * self.operator.norm()


class Sum(LinearOperator):
    """``A + B``."""

    def __init__(self, left: LinearOperator, right: LinearOperator):
        if left.shape != right.shape:
            raise ValueError(f"shapes must be equal, got {left.shape} and {right.shape}")
        _check_alike(left, right)
        super().__init__(left.shape, left.like)
        self.left, self.right = left, right
        self.block_columns = max(left.block_columns, right.block_columns)

    def matmul(self, x: Array) -> Array:
        return self.left.matmul(x) + self.right.matmul(x)

    def rmatmul(self, x: Array) -> Array:
        return self.left.rmatmul(x) + self.right.rmatmul(x)


class Product(LinearOperator):
    """``A @ B``."""

    def __init__(self, left: LinearOperator, right: LinearOperator):
        _check_alike(left, right)
        super().__init__((left.shape[0], right.shape[1]), left.like)
        self.left, self.right = left, right
        self.block_columns = max(left.block_columns, right.block_columns)

    def matmul(self, x: Array) -> Array:
        return self.left.matmul(self.right.matmul(x))

    def rmatmul(self, x: Array) -> Array:
        return self.right.rmatmul(self.left.rmatmul(x))


def _check_alike(left: LinearOperator, right: LinearOperator) -> None:
    """Raise unless two operators are of one library, device and dtype."""
    namespace(left.like, right.like)
    if left.dtype != right.dtype:
        raise TypeError(
            f"operators must have one dtype, got {dtype_name(left.dtype)} and "
            f"{dtype_name(right.dtype)}; convert the data of one of them first"
        )
