"""The Tucker format: a small core multiplied by a factor along every mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, adjoint, device, frobenius, namespace, slices
from lowrank_sp.gauge import positive_columns
from lowrank_sp.tensors.factored import FactoredTensor, slices_of
from lowrank_sp.tensors.modes import multi_mode_dot, unfold

# Numbers gathered at a time.
_CHUNK = 2**22


@dataclass(frozen=True, repr=False)
class Tucker(FactoredTensor):
    r"""A tensor in Tucker format: a core multiplied by a matrix along every mode.

    .. math:: X_{i_1 \dots i_N} = \sum_{j_1 \dots j_N} G_{j_1 \dots j_N}
              (U_1)_{i_1 j_1} \cdots (U_N)_{i_N j_N}

    It unpacks like a Tucker tensor of TensorLy: ``core, factors = t``.

    Parameters
    ----------
    core : array, shape (r_1, ..., r_N)
    factors : sequence of N arrays of shape (n_k, r_k)
    error : float or None
        Frobenius norm of the tensor that was decomposed minus this one, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> t = Tucker(np.ones((1, 1, 1)), [np.ones((n, 1)) for n in (2, 3, 4)])
    >>> t, bool(np.isclose(t.norm(), 24**0.5))
    (Tucker(2 x 3 x 4, rank (1, 1, 1), float64), True)
    >>> (t + t).rank
    (2, 2, 2)
    """

    core: Array
    factors: Sequence[Array]
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        columns = tuple(f.shape[1] if f.ndim == 2 else -1 for f in self.factors)
        if columns != tuple(self.core.shape):
            raise ValueError(
                f"a core of shape {tuple(self.core.shape)} needs factors of as many columns, got "
                f"shapes {', '.join(str(tuple(f.shape)) for f in self.factors)}"
            )

    @classmethod
    def from_tensorly(cls, tensor: Any) -> Tucker:
        """From a pair ``core, factors``, such as a ``TuckerTensor``."""
        core, factors = tensor
        return cls(core, tuple(factors))

    def to_tensorly(self) -> Any:
        from tensorly import tucker_tensor  # pyright: ignore[reportMissingImports]

        return tucker_tensor.TuckerTensor((self.core, list(self.factors)))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.core, self.factors))

    def arrays(self) -> tuple[Array, ...]:
        return (self.core, *self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(f.shape[0] for f in self.factors)

    @property
    def rank(self) -> tuple[int, ...]:
        """Shape of the core."""
        return tuple(self.core.shape)

    def to_dense(self) -> Array:
        return multi_mode_dot(self.core, self.factors)

    def sample(self, indices: np.ndarray) -> Array:
        xp = namespace(*self.arrays())
        size = _CHUNK * self.rank[0] // _size(self.core)
        parts = [xp.zeros(0, dtype=self.dtype, device=self.device)]
        for part in slices(len(indices), max(1, size)):
            rows = self.contracted(indices[part], self.ndim - 1)
            last = xp.asarray(indices[part, -1], device=self.device)
            parts.append(xp.sum(rows * xp.take(self.factors[-1], last, axis=0), axis=1))
        return xp.concat(parts)

    def contracted(self, indices: np.ndarray, mode: int) -> Array:
        """The core times the rows ``U_k[i_k]`` of all modes but one, of shape ``(M, r_mode)``.

        An entry is the product of this with the row of the remaining mode.
        """
        xp = namespace(*self.arrays())
        others = [k for k in range(self.ndim) if k != mode]
        part = xp.permute_dims(self.core, (*others, mode))
        part = xp.reshape(part, (1, *part.shape))
        for k in others:
            rows = xp.take(self.factors[k], xp.asarray(indices[:, k], device=self.device), axis=0)
            flat = xp.reshape(part, (part.shape[0], part.shape[1], -1))
            # One matrix product for the first mode, and a stack of them for the others.
            product = rows @ flat[0, ...] if k == others[0] else (rows[:, None, :] @ flat)[:, 0, :]
            part = xp.reshape(product, (-1, *part.shape[2:]))
        return part if others else xp.broadcast_to(part, (len(indices), part.shape[1]))

    def inner(self, other: Tucker) -> Array:
        xp = namespace(*self.arrays(), *other.arrays())
        cross = [adjoint(u) @ v for u, v in zip(self.factors, other.factors, strict=True)]
        return xp.sum(xp.conj(self.core) * multi_mode_dot(other.core, cross))

    def norm(self) -> float:
        return frobenius(self._orthogonalized().core)

    def hadamard(self, other: Tucker) -> Tucker:
        self._check_same_shape(other)
        xp = namespace(*self.arrays(), *other.arrays())
        pairs = zip(self.factors, other.factors, strict=True)
        factors = [xp.reshape(u[:, :, None] * v[:, None, :], (u.shape[0], -1)) for u, v in pairs]
        ours = xp.reshape(self.core, tuple(n for r in self.rank for n in (r, 1)))
        theirs = xp.reshape(other.core, tuple(n for r in other.rank for n in (1, r)))
        return Tucker(xp.reshape(ours * theirs, tuple(f.shape[1] for f in factors)), tuple(factors))

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Tucker):
            return NotImplemented
        self._check_same_shape(other)
        xp = namespace(*self.arrays(), *other.arrays())
        ours, theirs = self.core, other.core
        for mode in range(self.ndim):
            before, after = list(theirs.shape), list(ours.shape)
            before[mode], after[mode] = self.rank[mode], other.rank[mode]
            ours = xp.concat([ours, _zeros(after, ours)], axis=mode)
            theirs = xp.concat([_zeros(before, theirs), theirs], axis=mode)
        pairs = zip(self.factors, other.factors, strict=True)
        return Tucker(ours + theirs, tuple(xp.concat(pair, axis=1) for pair in pairs))

    def __mul__(self, factor: Any) -> Any:
        number = self._as_scalar(factor)
        return number if number is NotImplemented else Tucker(self.core * number, self.factors)

    def __getitem__(self, index: Any) -> Tucker:
        parts = slices_of(index, self.ndim)
        return Tucker(
            self.core, tuple(f[part, :] for f, part in zip(self.factors, parts, strict=True))
        )

    def canonical(self) -> Tucker:
        """The same tensor in the gauge of the HOSVD.

        Factors with orthonormal columns, of which the largest entries are positive, and an
        all-orthogonal core: its slices along every mode are orthogonal to each other, with norms
        that fall. Ranks shrink where they were larger than the core can use.
        """
        t = self._orthogonalized()
        xp = namespace(*t.arrays())
        rotations = []
        for mode, factor in enumerate(t.factors):
            u, _, _ = xp.linalg.svd(unfold(t.core, mode), full_matrices=False)
            columns = positive_columns(factor @ u)
            rotations.append((adjoint(factor) @ columns, columns))
        core = multi_mode_dot(t.core, [adjoint(u) for u, _ in rotations])
        return Tucker(core, tuple(columns for _, columns in rotations), self.error)

    def permuted(self, axes: Sequence[int]) -> Tucker:
        """The tensor with its modes in the order ``axes``, as ``permute_dims`` does it."""
        core = namespace(self.core).permute_dims(self.core, tuple(axes))
        return Tucker(core, tuple(self.factors[k] for k in axes), self.error)

    def _orthogonalized(self) -> Tucker:
        """With orthonormal columns in every factor."""
        xp = namespace(*self.arrays())
        pairs = [xp.linalg.qr(f) for f in self.factors]
        return Tucker(multi_mode_dot(self.core, [r for _, r in pairs]), tuple(q for q, _ in pairs))


def project(x: Array, factors: Sequence[Array]) -> Array:
    """``x x_1 U_1^H ... x_N U_N^H``: the core that fits best for orthonormal factors."""
    return multi_mode_dot(x, [adjoint(u) for u in factors])


def _size(x: Array) -> int:
    return int(np.prod(x.shape))


def _zeros(shape: Sequence[int], like: Array) -> Array:
    return namespace(like).zeros(tuple(shape), dtype=like.dtype, device=device(like))
