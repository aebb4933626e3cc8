"""What the tensor formats share: exact algebra on a tensor known by its factors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from numbers import Number
from typing import Any, Self

import numpy as np

from lowrank_sp._arrays import Array, device, host_view, is_array, is_complex, namespace


def on_host(x: Array) -> Array:
    """``x`` as a NumPy array where that needs no copy, else ``x``.

    On the host all libraries call the same kind of BLAS, and JAX would compile for every shape.
    """
    host = host_view(x)
    return x if host is None else host


def moved(tensor: Any, like: Array) -> Any:
    """A factored tensor that was computed by :func:`on_host`, in the library of ``like``."""
    xp = namespace(like)
    if isinstance(like, np.ndarray) or not isinstance(tensor.arrays()[0], np.ndarray):
        return tensor
    return tensor.map(lambda a: xp.asarray(a, device=device(like), copy=True))


class FactoredTensor(ABC):
    """A tensor of shape ``(n_1, ..., n_N)`` known by its factors.

    Nothing here forms all entries but :meth:`to_dense`.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    @abstractmethod
    def rank(self) -> Any:
        """Rank, as the functions that decompose take it."""

    @abstractmethod
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that hold the parameters."""

    @abstractmethod
    def to_dense(self) -> Array:
        """The tensor itself."""

    @abstractmethod
    def sample(self, indices: np.ndarray) -> Array:
        """Entries at the positions in the rows of ``indices``, a host array of shape ``(M, N)``."""

    @abstractmethod
    def inner(self, other: Any) -> Array:
        """Inner product ``sum(conj(self) * other)`` with a tensor of the same format."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm, by orthogonal factors: a difference of near tensors keeps its digits."""

    @abstractmethod
    def hadamard(self, other: Any) -> Any:
        """Entrywise product, of the product of the ranks."""

    @abstractmethod
    def __add__(self, other: Any) -> Any: ...

    @abstractmethod
    def __mul__(self, factor: Any) -> Any: ...

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """Part of the tensor by one slice a mode, as ``t[2:5, :, ::2]``; further modes stay."""

    @abstractmethod
    def to_tensorly(self) -> Any:
        """The same factors as a tensor of TensorLy."""

    def map(self, function: Callable[[Array], Array]) -> Self:
        """The same format with ``function``, such as a cast or a move, applied to every array."""
        mapped = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if is_array(value):
                mapped[field.name] = function(value)
            elif isinstance(value, tuple):
                mapped[field.name] = tuple(map(function, value))
        return replace(self, **mapped)  # pyright: ignore[reportArgumentType]

    @property
    def ndim(self) -> int:
        """Number of modes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the factors."""
        return self.arrays()[0].dtype

    @property
    def device(self) -> Any:
        """Device of the factors."""
        return device(self.arrays()[0])

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return sum(math.prod(a.shape) for a in self.arrays())

    def __rmul__(self, factor: Any) -> Any:
        return self * factor

    def __neg__(self) -> Any:
        return self * -1.0

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{type(self).__name__}({size}, rank {self.rank}, {self.dtype})"

    def _as_scalar(self, factor: Any) -> Any:
        """A number as these factors take it, or NotImplemented."""
        if not isinstance(factor, Number):
            return NotImplemented
        return complex(factor) if is_complex(self.dtype) else float(factor)  # pyright: ignore

    def _check_same_shape(self, other: FactoredTensor) -> None:
        if self.shape != other.shape:
            raise ValueError(f"shapes must be equal, got {self.shape} and {other.shape}")


def slices_of(index: Any, order: int) -> tuple[slice, ...]:
    """One slice for every mode from the argument of ``t[...]``."""
    index = index if isinstance(index, tuple) else (index,)
    if len(index) > order or not all(isinstance(part, slice) for part in index):
        raise TypeError(
            f"index with at most {order} slices, got {index!r}; entries need to_dense()"
        )
    return (*index, *[slice(None)] * (order - len(index)))
