"""The tensor-train format: a chain of cores, one a mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, adjoint, device, frobenius, namespace, slices
from lowrank_sp.gauge import fix_signs
from lowrank_sp.tensors.factored import FactoredTensor, slices_of

# Numbers gathered at a time.
_CHUNK = 2**22


@dataclass(frozen=True, repr=False)
class TT(FactoredTensor):
    r"""A tensor train, also called matrix product state.

    .. math:: X_{i_1 \dots i_N} = G_1[i_1]\, G_2[i_2] \cdots G_N[i_N], \qquad
              G_k[i] \in \mathbb{C}^{r_{k-1} \times r_k}, \quad r_0 = r_N = 1

    It unpacks into its cores, like a tensor train of TensorLy.

    Parameters
    ----------
    cores : sequence of N arrays of shape (r_(k-1), n_k, r_k)
    error : float or None
        Frobenius norm of the tensor that was decomposed minus this one, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> t = TT([np.ones((1, n, 1)) for n in (2, 3, 4)])
    >>> t
    TT(2 x 3 x 4, rank (1, 1, 1, 1), float64)
    >>> (t + t).rank, bool(np.isclose((t + t).norm(), 96**0.5))
    ((1, 2, 2, 1), True)
    """

    cores: Sequence[Array]
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cores", tuple(self.cores))
        check_chain([(c.shape[0], c.shape[-1]) for c in self.cores])
        if any(c.ndim != 3 for c in self.cores):
            raise ValueError(
                "cores must have shape (r, n, r'), got shapes "
                + ", ".join(str(tuple(c.shape)) for c in self.cores)
            )

    @classmethod
    def from_tensorly(cls, tensor: Any) -> TT:
        """From a sequence of cores, such as a ``TTTensor``."""
        return cls(tuple(tensor))

    def to_tensorly(self) -> Any:
        from tensorly import tt_tensor  # pyright: ignore[reportMissingImports]

        return tt_tensor.TTTensor(list(self.cores))

    def __iter__(self) -> Iterator[Array]:
        return iter(self.cores)

    def arrays(self) -> tuple[Array, ...]:
        return tuple(self.cores)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(c.shape[1] for c in self.cores)

    @property
    def rank(self) -> tuple[int, ...]:
        """``(1, r_1, ..., r_(N-1), 1)``."""
        return (1, *(c.shape[2] for c in self.cores))

    def to_dense(self) -> Array:
        xp = namespace(*self.cores)
        whole = reduce(lambda x, c: xp.reshape(x, (-1, c.shape[0])) @ wide(c), self.cores)
        return xp.reshape(whole, self.shape)

    def sample(self, indices: np.ndarray) -> Array:
        xp = namespace(*self.cores)
        parts = [xp.zeros(0, dtype=self.dtype, device=self.device)]
        most = max(a * b for a, b in pairwise(self.rank))
        for part in slices(len(indices), max(1, _CHUNK // most)):
            row = xp.ones((len(indices[part]), 1, 1), dtype=self.dtype, device=self.device)
            for k, core in enumerate(self.cores):
                at = xp.asarray(indices[part, k], device=self.device)
                row = row @ xp.take(xp.permute_dims(core, (1, 0, 2)), at, axis=0)
            parts.append(row[:, 0, 0])
        return xp.concat(parts)

    def inner(self, other: TT) -> Array:
        self._check_same_shape(other)
        xp = namespace(*self.cores, *other.cores)
        cross = xp.ones((1, 1), dtype=self.dtype, device=self.device)
        for a, b in zip(self.cores, other.cores, strict=True):
            part = xp.reshape(cross @ wide(b), (-1, b.shape[2]))
            cross = adjoint(tall(a)) @ part
        return cross[0, 0]

    def norm(self) -> float:
        return frobenius(right_orthogonal(self.cores)[0])

    def hadamard(self, other: TT) -> TT:
        self._check_same_shape(other)
        return TT(tuple(_kron(a, b) for a, b in zip(self.cores, other.cores, strict=True)))

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, TT):
            return NotImplemented
        self._check_same_shape(other)
        pairs = list(zip(self.cores, other.cores, strict=True))
        xp = namespace(*self.cores, *other.cores)
        if len(pairs) == 1:
            return TT((pairs[0][0] + pairs[0][1],))
        cores = [xp.concat(pairs[0], axis=2)]
        cores += [_block_diagonal(a, b) for a, b in pairs[1:-1]]
        return TT((*cores, xp.concat(pairs[-1], axis=0)))

    def __mul__(self, factor: Any) -> Any:
        number = self._as_scalar(factor)
        if number is NotImplemented:
            return number
        return TT((self.cores[0] * number, *self.cores[1:]))

    def __getitem__(self, index: Any) -> TT:
        parts = slices_of(index, self.ndim)
        return TT(tuple(c[:, part, :] for c, part in zip(self.cores, parts, strict=True)))

    def canonical(self, center: int = 0) -> TT:
        """The same tensor in the gauge of its singular vectors, with one core that is not unitary.

        Every bond carries the singular vectors of the unfolding it divides, sorted, on the side
        away from ``center``, with the largest entry of each positive. So cores before ``center``
        are left-orthogonal, those after it right-orthogonal, and its norm is that of the tensor.
        """
        if not 0 <= center < self.ndim:
            raise ValueError(f"center must be in 0..{self.ndim - 1}, got {center}")
        cores = sorted_bonds(right_orthogonal(self.cores), self.ndim - 1)
        return TT(mirrored(sorted_bonds(mirrored(cores), self.ndim - 1 - center)), self.error)


def sorted_bonds(cores: Sequence[Array], count: int) -> tuple[Array, ...]:
    """Left singular vectors for the first ``count`` bonds of right-orthogonal cores."""
    xp = namespace(*cores)
    cores = list(cores)
    for k in range(count):
        u, s, vh = xp.linalg.svd(tall(cores[k]), full_matrices=False)
        u, vh = fix_signs(u, vh)
        cores[k] = xp.reshape(u, (*cores[k].shape[:2], -1))
        cores[k + 1] = times(xp.astype(s, vh.dtype)[:, None] * vh, cores[k + 1])
    return tuple(cores)


def right_orthogonal(cores: Sequence[Array]) -> tuple[Array, ...]:
    """Cores of the same train, all but the first with orthonormal rows ``(r, n r')``."""
    xp = namespace(*cores)
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        q, r = xp.linalg.qr(adjoint(wide(cores[k])))
        cores[k] = xp.reshape(adjoint(q), (-1, *cores[k].shape[1:]))
        cores[k - 1] = xp.reshape(tall(cores[k - 1]) @ adjoint(r), (*cores[k - 1].shape[:2], -1))
    return tuple(cores)


def mirrored(cores: Sequence[Array]) -> tuple[Array, ...]:
    """Cores of the train with its modes in the opposite order."""
    return tuple(namespace(c).permute_dims(c, (2, 1, 0)) for c in reversed(cores))


def times(matrix: Array, core: Array) -> Array:
    """A core multiplied by a matrix on its left bond."""
    return namespace(matrix, core).reshape(matrix @ wide(core), (-1, *core.shape[1:]))


def check_chain(bonds: Sequence[tuple[int, int]]) -> None:
    """Raise unless pairs of left and right bond sizes form a chain that begins and ends with 1."""
    ends = [1, *(right for _, right in bonds)]
    if not bonds or [left for left, _ in bonds] != ends[:-1] or ends[-1] != 1:
        raise ValueError(
            f"bonds of cores must agree and be 1 at both ends, got {', '.join(map(str, bonds))}"
        )


def tall(core: Array) -> Array:
    """A core as the matrix ``(r n, r')``."""
    return namespace(core).reshape(core, (-1, core.shape[2]))


def wide(core: Array) -> Array:
    """A core as the matrix ``(r, n r')``."""
    return namespace(core).reshape(core, (core.shape[0], -1))


def _kron(a: Array, b: Array) -> Array:
    xp = namespace(a, b)
    core = a[:, None, :, :, None] * b[None, :, :, None, :]
    return xp.reshape(core, (a.shape[0] * b.shape[0], a.shape[1], a.shape[2] * b.shape[2]))


def _block_diagonal(a: Array, b: Array) -> Array:
    xp = namespace(a, b)

    def zeros(left: int, right: int) -> Array:
        return xp.zeros((left, a.shape[1], right), dtype=a.dtype, device=device(a))

    upper = xp.concat([a, zeros(a.shape[0], b.shape[2])], axis=2)
    lower = xp.concat([zeros(b.shape[0], a.shape[2]), b], axis=2)
    return xp.concat([upper, lower], axis=0)
