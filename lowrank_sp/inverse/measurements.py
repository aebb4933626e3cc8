"""Linear measurements of a matrix, with their exact adjoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    Array,
    adjoint,
    as_compute,
    compute_dtype,
    device,
    from_host,
    is_complex,
    namespace,
    slices,
)
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.operators import LinearOperator, as_operator

# Numbers of a sensing matrix that are generated at a time.
_BLOCK = 2**21


class Measurement(ABC):
    r"""A linear map from matrices to vectors, ``A: K^(m x n) -> K^M``.

    .. math:: \langle \mathcal{A}(X), y \rangle = \langle X, \mathcal{A}^*(y) \rangle

    :func:`lowrank_sp.testing.assert_exact_adjoint` checks this law.

    Attributes
    ----------
    shape : (int, int)
        Shape of the matrices.
    size : int
        Number ``M`` of measurements.
    like : array
        Carries the library, dtype and device of measurements.
    """

    shape: tuple[int, int]
    size: int
    like: Array

    @abstractmethod
    def forward(self, x: Any) -> Array:
        """``A(x)``, of shape ``(M,)``, of a dense array, a ``LowRank`` or an ``SVD``."""

    @abstractmethod
    def adjoint(self, y: Array) -> LinearOperator:
        """``A^*(y)`` as an operator of shape ``(m, n)``, never denser than it must be."""

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{type(self).__name__}({m} x {n} -> {self.size}, {self.like.dtype})"


class EntrySampling(Measurement):
    """The entries at given positions: ``A(X) = X[rows, cols]``.

    Parameters
    ----------
    entries : Entries
        Gives positions, library and dtype; its values are not used.
    """

    def __init__(self, entries: Entries):
        self.shape, self.size, self.like = entries.pattern.shape, entries.size, entries.values[:0]
        self._entries = entries

    def forward(self, x: Any) -> Array:
        return self._entries.sample(x)

    def adjoint(self, y: Array) -> Entries:
        return self._entries.with_values(y)


class DenseSensing(Measurement):
    """Inner products with stored matrices: ``A(X)_l = trace(A_l^H X)``.

    Parameters
    ----------
    matrices : array, shape (M, m, n)
    """

    def __init__(self, matrices: Array):
        if matrices.ndim != 3:
            raise ValueError(f"matrices must have shape (M, m, n), got {tuple(matrices.shape)}")
        matrices = as_compute(matrices)
        self.size, *shape = matrices.shape
        self.shape = (shape[0], shape[1])
        self.like = matrices[:0, 0, 0]
        self._flat = namespace(matrices).reshape(matrices, (self.size, -1))

    def forward(self, x: Any) -> Array:
        return _inner_products(self._flat, _dense(x, self.like))

    def adjoint(self, y: Array) -> LinearOperator:
        return as_operator(namespace(y).reshape(self._flat.mT @ y, self.shape))


class GaussianSensing(Measurement):
    """Inner products with Gaussian matrices of variance ``1 / M``, generated when they are needed.

    ``E ||A(X)||^2 = ||X||^2``. A block of matrices follows from ``(seed, number of the block)``
    by a counter-based generator: the map takes no memory, and every pass draws the same numbers.

    Parameters
    ----------
    shape : (int, int)
    size : int
    like : array
        Gives library, device, and compute dtype; complex matrices for a complex one.
    seed : int
    """

    def __init__(self, shape: tuple[int, int], size: int, *, like: Array, seed: int = 0):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.shape, self.size, self.seed = (int(shape[0]), int(shape[1])), int(size), int(seed)
        xp = namespace(like)
        self.like = xp.zeros(0, dtype=compute_dtype(xp, like.dtype), device=device(like))

    def forward(self, x: Any) -> Array:
        x = _dense(x, self.like)
        xp = namespace(x)
        return xp.concat([_inner_products(block, x) for _, block in self._blocks()])

    def adjoint(self, y: Array) -> LinearOperator:
        xp = namespace(y)
        total = xp.zeros(self.shape[0] * self.shape[1], dtype=y.dtype, device=device(y))
        for part, block in self._blocks():
            total = total + block.mT @ y[part]
        return as_operator(xp.reshape(total, self.shape))

    def stored(self) -> DenseSensing:
        """The same map with all ``M m n`` numbers in memory."""
        xp = namespace(self.like)
        flat = xp.concat([block for _, block in self._blocks()], axis=0)
        return DenseSensing(xp.reshape(flat, (self.size, *self.shape)))

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        count = self.shape[0] * self.shape[1]
        for number, part in enumerate(slices(self.size, max(1, _BLOCK // max(1, count)))):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, number]))
            draw = rng.standard_normal((part.stop - part.start, count)) / self.size**0.5
            if is_complex(self.like.dtype):
                draw = (draw + 1j * rng.standard_normal(draw.shape) / self.size**0.5) / 2**0.5
            yield part, from_host(draw, self.like)


class RankOneSensing(Measurement):
    """Bilinear samples ``A(X)_l = a_l^H X b_l``.

    Parameters
    ----------
    a : array, shape (M, m)
    b : array, shape (M, n)
    """

    def __init__(self, a: Array, b: Array):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
            raise ValueError(
                f"a and b must have shapes (M, m) and (M, n), got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
        a, b = as_compute(a), as_compute(b)
        namespace(a, b)
        self.shape, self.size = (a.shape[1], b.shape[1]), a.shape[0]
        self.like = a[:0, 0]
        self._a, self._b = a, b

    def forward(self, x: Any) -> Array:
        xp = namespace(self._a)
        if isinstance(x, Factored):
            left, right = x.factors()
            return xp.sum((adjoint(self._a).mT @ left) * (self._b @ right.mT), axis=1)
        return xp.sum((adjoint(self._a).mT @ x) * self._b, axis=1)

    def adjoint(self, y: Array) -> LowRank:
        return LowRank(self._a.mT * y[None, :], adjoint(self._b).mT)


class PartialFourier(Measurement):
    """Some coefficients of the unitary two-dimensional Fourier transform.

    Complex; real matrices are taken as complex ones.

    Parameters
    ----------
    rows, cols : integer arrays on the host, shape (M,)
        Distinct frequencies; measurements are sorted by rows, then columns.
    shape : (int, int)
    like : array
        Gives library, device and precision.
    """

    def __init__(self, rows: Any, cols: Any, shape: tuple[int, int], *, like: Array):
        xp = namespace(like)
        self.like = _complex(xp.zeros(0, dtype=compute_dtype(xp, like.dtype), device=device(like)))
        zeros = xp.zeros(len(rows), dtype=self.like.dtype, device=device(like))
        self._coefficients = Entries(rows, cols, zeros, shape)
        self.shape, self.size = self._coefficients.pattern.shape, self._coefficients.size

    @property
    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the coefficients, in the order of the measurements."""
        return self._coefficients.rows, self._coefficients.cols

    def forward(self, x: Any) -> Array:
        fft = namespace(self.like).fft.fft
        if isinstance(x, Factored):
            left, right = (_complex(f) for f in x.factors())
            left, right = fft(left, axis=0, norm="ortho"), fft(right, axis=1, norm="ortho")
            return self._coefficients.sampled(left, right)
        spectrum = fft(fft(_complex(x), axis=0, norm="ortho"), axis=1, norm="ortho")
        return self._coefficients.sample(spectrum)

    def adjoint(self, y: Array) -> LinearOperator:
        return _Spectrum(self._coefficients.with_values(_complex(y)))


class _Spectrum(LinearOperator):
    """``F^H S F^*`` of the sparse matrix ``S`` of Fourier coefficients."""

    def __init__(self, coefficients: Entries):
        super().__init__(coefficients.shape, coefficients.values[:0])
        self.coefficients = coefficients

    # The transform of the columns is symmetric, so F^* is its inverse.
    def matmul(self, x: Array) -> Array:
        fft = namespace(x).fft
        y = self.coefficients.matmul(fft.ifft(x, axis=0, norm="ortho"))
        return fft.ifft(y, axis=0, norm="ortho")

    def rmatmul(self, x: Array) -> Array:
        fft = namespace(x).fft
        y = self.coefficients.rmatmul(fft.fft(x, axis=0, norm="ortho"))
        return fft.fft(y, axis=0, norm="ortho")


class Hankel(LinearOperator):
    """The matrix ``H_ij = h_(i + j)`` of a signal, multiplied by fast Fourier transforms.

    Parameters
    ----------
    signal : array, shape (N,)
    rows : int
        Rows ``m`` of the matrix, in ``1..N``; it has ``N - m + 1`` columns.

    Notes
    -----
    A product with ``k`` columns takes ``O(k N log N)``; no ``m x n`` array is formed.

    Examples
    --------
    >>> import numpy as np
    >>> np.round(Hankel(np.arange(1.0, 6.0), 3) @ np.array([1.0, 0.0, 0.0]), 12)
    array([1., 2., 3.])
    """

    def __init__(self, signal: Array, rows: int):
        if signal.ndim != 1 or not 1 <= rows <= signal.shape[0]:
            raise ValueError(
                f"a Hankel matrix needs a signal of shape (N,) and rows in 1..N, got shape "
                f"{tuple(signal.shape)} and {rows}"
            )
        self.signal = as_compute(signal)
        super().__init__((rows, signal.shape[0] - rows + 1), self.signal[:0])

    def matmul(self, x: Array) -> Array:
        return self._correlate(self.signal, x, self.shape[0])

    def rmatmul(self, x: Array) -> Array:
        signal = self.signal
        if is_complex(self.dtype):
            signal = namespace(signal).conj(signal)
        return self._correlate(signal, x, self.shape[1])

    def _correlate(self, signal: Array, x: Array, count: int) -> Array:
        # A cyclic convolution of the length of the signal wraps only into rows that are not kept.
        xp, n = namespace(x), signal.shape[0]
        product = _convolve(signal[:, None], xp.flip(x, axis=0), n)
        return product[n - count :, :]


class HankelLift(Measurement):
    r"""Scaled sums along anti-diagonals, whose adjoint lifts a signal to a Hankel matrix.

    .. math:: \mathcal{A}(X)_k = w_k^{-1/2} \sum_{i + j = k} X_{ij}, \qquad
              \mathcal{A}^*(y)_{ij} = w_{i+j}^{-1/2} y_{i+j}

    with ``w_k`` the number of entries on the anti-diagonal ``k``. ``A A^*`` is the identity, and
    ``A^* A`` the projection onto Hankel matrices. :meth:`lift` and :meth:`average` are the same
    without the scaling.

    Parameters
    ----------
    length : int
        Samples ``N`` of the signal.
    rows : int
        Rows of the matrix, in ``1..N``; it has ``N - rows + 1`` columns.
    like : array
        Gives library, device, and compute dtype.
    """

    def __init__(self, length: int, rows: int, *, like: Array):
        if not 1 <= rows <= length:
            raise ValueError(f"rows must be in 1..{length} for a signal of {length}, got {rows}")
        self.shape, self.size = (rows, length - rows + 1), length
        xp = namespace(like)
        self.like = xp.zeros(0, dtype=compute_dtype(xp, like.dtype), device=device(like))

    @cached_property
    def _weights(self) -> Array:
        k = np.arange(self.size)
        counts = np.minimum(np.minimum(k, k[::-1]) + 1, min(self.shape))
        return from_host(counts.astype(np.float64), self.like, self.like.dtype)

    def forward(self, x: Any) -> Array:
        return self._sums(x) / self._weights**0.5

    def adjoint(self, y: Array) -> Hankel:
        return Hankel(y / self._weights**0.5, self.shape[0])

    def lift(self, signal: Array) -> Hankel:
        """The Hankel matrix of a signal, of shape ``(N,)``."""
        return Hankel(signal, self.shape[0])

    def average(self, x: Any) -> Array:
        """The signal whose Hankel matrix is closest to ``x``: means of its anti-diagonals."""
        return self._sums(x) / self._weights

    def _sums(self, x: Any) -> Array:
        xp = namespace(self.like)
        if isinstance(x, Factored):
            left, right = x.factors()
            return xp.sum(_convolve(left, right.mT, self.size), axis=1)
        m, n = self.shape
        # Row i of the padded matrix, read without row ends, starts i places later.
        padding = xp.zeros((m, m), dtype=x.dtype, device=device(x))
        skewed = xp.reshape(xp.concat([x, padding], axis=1), (-1,))[: m * (m + n - 1)]
        return xp.sum(xp.reshape(skewed, (m, m + n - 1)), axis=0)


def _convolve(x: Array, y: Array, length: int) -> Array:
    """Cyclic convolution of the columns of ``x`` and ``y``."""
    fft = namespace(x, y).fft
    if is_complex(x.dtype):
        return fft.ifft(fft.fft(x, n=length, axis=0) * fft.fft(y, n=length, axis=0), axis=0)
    product = fft.rfft(x, n=length, axis=0) * fft.rfft(y, n=length, axis=0)
    return fft.irfft(product, n=length, axis=0)


def _inner_products(flat: Array, x: Array) -> Array:
    xp = namespace(flat, x)
    product = flat @ xp.reshape(xp.conj(x) if is_complex(x.dtype) else x, (-1,))
    return xp.conj(product) if is_complex(x.dtype) else product


def _dense(x: Any, like: Array) -> Array:
    """A matrix in the dtype of the measurements."""
    x = x.to_dense() if isinstance(x, Factored) else x
    return x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype)


def _complex(x: Array) -> Array:
    if is_complex(x.dtype):
        return x
    xp = namespace(x)
    return xp.astype(x, xp.complex64 if x.dtype == xp.float32 else xp.complex128)
