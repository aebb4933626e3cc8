"""The CP format: a sum of outer products of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, adjoint, frobenius, namespace, slices
from lowrank_sp.factors import LowRank
from lowrank_sp.gauge import fix_signs
from lowrank_sp.tensors.factored import FactoredTensor, slices_of
from lowrank_sp.tensors.modes import khatri_rao

# Numbers gathered at a time.
_CHUNK = 2**22


@dataclass(frozen=True, repr=False)
class CP(FactoredTensor):
    r"""The tensor :math:`\sum_r \lambda_r\, a_r^{(1)} \circ \dots \circ a_r^{(N)}`.

    It unpacks like TensorLy's, as ``weights, factors``.

    Parameters
    ----------
    weights : array, shape (R,)
        :math:`\lambda`, real or of the dtype of the factors.
    factors : sequence of N arrays of shape (n_k, R)
        Column ``r`` of factor ``k`` is :math:`a_r^{(k)}`. Kept as a tuple.
    error : float, optional
        Frobenius norm of the tensor that was decomposed minus this one, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> t = CP(np.ones(1), [np.ones((2, 1)), np.ones((3, 1)), np.ones((4, 1))])
    >>> t, t.to_dense().sum()
    (CP(2 x 3 x 4, rank 1, float64), np.float64(24.0))
    >>> bool(abs((t - 2 * t).norm() - 24**0.5) < 1e-14)
    True
    >>> weights, factors = t.canonical()
    """

    weights: Array
    factors: tuple[Array, ...]
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        shapes = [tuple(f.shape) for f in self.factors]
        rank = self.weights.shape[0] if self.weights.ndim == 1 else None
        if not shapes or any(len(s) != 2 or s[1] != rank for s in shapes):
            raise ValueError(
                "weights and factors must have shapes (R,) and (n_k, R), "
                f"got {tuple(self.weights.shape)} and {shapes}"
            )
        namespace(self.weights, *self.factors)

    @classmethod
    def of_factors(cls, factors: Sequence[Array]) -> CP:
        """The tensor of factors that carry the weights."""
        return cls(namespace(*factors).ones_like(factors[0][0, :]), tuple(factors))

    @classmethod
    def from_tensorly(cls, tensor: Any) -> CP:
        """From ``(weights, factors)``, as TensorLy has them; the weights may be None."""
        weights, factors = tensor
        return cls.of_factors(factors) if weights is None else cls(weights, tuple(factors))

    def to_tensorly(self) -> Any:
        from tensorly.cp_tensor import CPTensor

        return CPTensor((self.weights, list(self.factors)))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.weights, self.factors))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(f.shape[0] for f in self.factors)

    @property
    def rank(self) -> int:
        """Number of terms; the rank of the tensor is at most this."""
        return self.weights.shape[0]

    @property
    def dtype(self) -> Any:
        return self.factors[0].dtype

    def arrays(self) -> tuple[Array, ...]:
        return (self.weights, *self.factors)

    def unweighted(self) -> tuple[Array, ...]:
        """Factors of the same tensor with unit weights."""
        xp = namespace(self.weights)
        return (self.factors[0] * xp.astype(self.weights, self.dtype), *self.factors[1:])

    def to_dense(self) -> Array:
        """The tensor itself: one product of two Khatri-Rao matrices, ``2 R`` flops an entry."""
        factors = self.unweighted()
        half = max(1, len(factors) // 2)
        left, right = khatri_rao(factors[:half]), factors[half:]
        xp = namespace(left)
        product = left @ khatri_rao(right).mT if right else xp.sum(left, axis=1)
        return xp.reshape(product, self.shape)

    def sample(self, indices: np.ndarray) -> Array:
        xp = namespace(self.weights)
        parts = [xp.zeros(0, dtype=self.dtype, device=self.device)]
        for part in slices(len(indices), max(1, _CHUNK // self.rank)):
            terms = self.contracted(indices[part], self.ndim - 1)
            last = xp.take(self.factors[-1], self._index(indices[part, -1]), axis=0)
            parts.append(xp.sum(terms * last, axis=1))
        return xp.concat(parts)

    def contracted(self, indices: np.ndarray, mode: int) -> Array:
        """Weights times the rows ``A_k[i_k]`` of all modes but one, of shape ``(M, R)``.

        An entry is the inner product of this with the row of the remaining mode.
        """
        xp = namespace(self.weights)
        terms = xp.astype(self.weights, self.dtype)[None, :]
        for k, factor in enumerate(self.factors):
            if k != mode:
                terms = terms * xp.take(factor, self._index(indices[:, k]), axis=0)
        return terms

    def _index(self, positions: np.ndarray) -> Array:
        return namespace(self.weights).asarray(positions, device=self.device, copy=True)

    def norm(self) -> float:
        """Frobenius norm: triangular factors are merged mode by mode, so that a difference of
        nearly equal tensors keeps its digits. ``O((n_1 + ... + n_N) R^2 + N R^4)``.
        """  # noqa: D205
        first, *rest = self.unweighted()
        merged = _triangle(first)
        for factor in rest[:-1]:
            merged = _triangle(khatri_rao((merged, _triangle(factor))))
        xp = namespace(merged)
        return frobenius(merged @ _triangle(rest[-1]).mT if rest else xp.sum(first, axis=1))

    def inner(self, other: CP) -> Array:
        """Inner product ``sum(conj(self) * other)``, in ``O((n_1 + ... + n_N) R R')``."""
        self._check_same_shape(other)
        pairs = zip(self.unweighted(), other.unweighted(), strict=True)
        grams = [adjoint(a) @ b for a, b in pairs]
        return namespace(*grams).sum(reduce(lambda a, b: a * b, grams))

    def hadamard(self, other: CP) -> CP:
        """Entrywise product, of rank ``R R'``: Khatri-Rao products of the rows of the factors."""
        self._check_same_shape(other)
        ours = (self.weights[None, :], *self.factors)
        theirs = (other.weights[None, :], *other.factors)
        pairs = zip(ours, theirs, strict=True)
        weights, *factors = (khatri_rao((a.mT, b.mT)).mT for a, b in pairs)
        return CP(weights[0, :], tuple(factors))

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, CP):
            return NotImplemented
        self._check_same_shape(other)
        xp = namespace(self.weights, other.weights)
        pairs = zip(self.factors, other.factors, strict=True)
        weights = xp.concat([self.weights, other.weights])
        return CP(weights, tuple(xp.concat([a, b], axis=1) for a, b in pairs))

    def __mul__(self, factor: Any) -> Any:
        factor = self._as_scalar(factor)
        if factor is NotImplemented:
            return NotImplemented
        xp = namespace(self.weights)
        return CP(xp.astype(self.weights, self.dtype) * factor, self.factors)

    def __getitem__(self, index: Any) -> CP:
        parts = slices_of(index, len(self.factors))
        pairs = zip(self.factors, parts, strict=True)
        return CP(self.weights, tuple(f[rows, :] for f, rows in pairs))

    def matrix(self, index: int) -> LowRank:
        """Slice ``index`` along the first mode of a tensor of order 3, as a low-rank matrix."""
        if len(self.factors) != 3:
            raise ValueError(f"slices are matrices for order 3, got order {len(self.factors)}")
        xp = namespace(self.weights)
        scale = xp.astype(self.weights, self.dtype) * self.factors[0][index, :]
        return LowRank(self.factors[1] * scale, self.factors[2].mT)

    def canonical(self) -> CP:
        """The same terms in one gauge.

        Unit columns, weights non-negative and sorted from large to small, and the largest entry of
        every column positive (:func:`lowrank_sp.gauge.fix_signs`) in all factors but the last,
        which carries the signs (the phases, for complex data).
        """
        xp = namespace(*self.factors)
        factors = list(self.factors)
        factors[-1] = factors[-1] * xp.astype(self.weights, self.dtype)
        weights = 1.0
        for k, f in enumerate(factors):
            lengths = xp.linalg.vector_norm(f, axis=0)
            weights = weights * lengths
            divisors = xp.where(lengths > 0, lengths, xp.ones_like(lengths))
            factors[k] = f / xp.astype(divisors, f.dtype)
        for k in range(len(factors) - 1):
            factors[k], last = fix_signs(factors[k], factors[-1].mT)
            factors[-1] = last.mT
        place = xp.argsort(weights, descending=True, stable=True)
        ordered = tuple(xp.take(f, place, axis=1) for f in factors)
        return CP(xp.take(weights, place), ordered, self.error)


def _triangle(a: Array) -> Array:
    return namespace(a).linalg.qr(a)[1]
