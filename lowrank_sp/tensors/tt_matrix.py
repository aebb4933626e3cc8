"""Matrices as tensor trains with a row index and a column index in every core."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_sp._arrays import RNG, Array, is_complex, namespace
from lowrank_sp.operators import LinearOperator
from lowrank_sp.tensors.ranks import Rank, check_truncation
from lowrank_sp.tensors.tt import TT, check_chain
from lowrank_sp.tensors.tt_svd import tt_svd


@dataclass(frozen=True, repr=False)
class TTMatrix(LinearOperator):
    r"""A matrix as a train of cores with two indices, also called matrix product operator.

    .. math:: A_{i j} = G_1[i_1, j_1]\, G_2[i_2, j_2] \cdots G_N[i_N, j_N]

    Rows and columns are numbered in C order by ``(i_1, ..., i_N)`` and ``(j_1, ..., j_N)``. It is a
    linear operator, and unpacks into its cores, like a TT matrix of TensorLy.

    Parameters
    ----------
    cores : sequence of N arrays of shape (r_(k-1), m_k, n_k, r_k)
    error : float or None
        Frobenius norm of the matrix that was decomposed minus this one, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> eye = TTMatrix([np.eye(n)[None, :, :, None] for n in (3, 4, 5)])
    >>> eye
    TTMatrix(60 x 60 as (3, 4, 5) x (3, 4, 5), rank (1, 1, 1, 1), float64)
    >>> x = np.arange(60.0)
    >>> np.array_equal(eye @ x, x)
    True
    """

    cores: Sequence[Array]
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cores", tuple(self.cores))
        check_chain([(c.shape[0], c.shape[-1]) for c in self.cores])
        if any(c.ndim != 4 for c in self.cores):
            raise ValueError(
                "cores must have shape (r, m, n, r'), got shapes "
                + ", ".join(str(tuple(c.shape)) for c in self.cores)
            )

    @classmethod
    def of(cls, train: TT, rows: Sequence[int], columns: Sequence[int]) -> TTMatrix:
        """The matrix whose cores, with both indices as one, are those of ``train``."""
        xp = namespace(*train.cores)
        cores = [
            xp.reshape(c, (c.shape[0], m, n, c.shape[2]))
            for c, m, n in zip(train.cores, rows, columns, strict=True)
        ]
        return cls(tuple(cores), train.error)

    @classmethod
    def from_tensorly(cls, tensor: Any) -> TTMatrix:
        """From a sequence of cores, such as a ``TTMatrix`` of TensorLy."""
        return cls(tuple(tensor))

    def to_tensorly(self) -> Any:
        """The same cores as a TT matrix of TensorLy."""
        from tensorly import tt_matrix  # pyright: ignore[reportMissingImports]

        return tt_matrix.TTMatrix(list(self.cores))

    def __iter__(self) -> Iterator[Array]:
        return iter(self.cores)

    @property
    def train(self) -> TT:
        """The tensor train with both indices of a core as one: what :func:`tt_round` takes."""
        xp = namespace(*self.cores)
        return TT([xp.reshape(c, (c.shape[0], -1, c.shape[3])) for c in self.cores], self.error)

    @property
    def rows(self) -> tuple[int, ...]:
        """Sizes ``(m_1, ..., m_N)``."""
        return tuple(c.shape[1] for c in self.cores)

    @property
    def columns(self) -> tuple[int, ...]:
        """Sizes ``(n_1, ..., n_N)``."""
        return tuple(c.shape[2] for c in self.cores)

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.rows), math.prod(self.columns)

    @property
    def rank(self) -> tuple[int, ...]:
        """``(1, r_1, ..., r_(N-1), 1)``, the ranks of the train, not of the matrix."""
        return (1, *(c.shape[3] for c in self.cores))

    @property
    def like(self) -> Array:
        return self.cores[0]

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return sum(math.prod(c.shape) for c in self.cores)

    def matmul(self, x: Array) -> Array:
        xp = namespace(x, *self.cores)
        # Rows that are done, the bond with the column index of this core, all later columns.
        part = xp.reshape(x, (1, 1, -1))
        for core in self.cores:
            left, m, n, right = core.shape
            matrix = xp.reshape(xp.permute_dims(core, (1, 3, 0, 2)), (m * right, left * n))
            part = xp.reshape(part, (part.shape[0], left * n, -1))
            part = xp.reshape(matrix @ part, (part.shape[0] * m, right, -1))
        return xp.reshape(part, (self.shape[0], x.shape[1]))

    def rmatmul(self, x: Array) -> Array:
        return self.mH.matmul(x)

    @property
    def mH(self) -> TTMatrix:
        xp = namespace(*self.cores)
        conj = xp.conj if is_complex(self.dtype) else (lambda c: c)
        cores = [conj(xp.permute_dims(c, (0, 2, 1, 3))) for c in self.cores]
        return TTMatrix(tuple(cores), self.error)

    def to_dense(self) -> Array:
        xp = namespace(*self.cores)
        order = len(self.cores)
        pairs = [n for pair in zip(self.rows, self.columns, strict=True) for n in pair]
        dense = xp.reshape(self.train.to_dense(), tuple(pairs))
        axes = (*range(0, 2 * order, 2), *range(1, 2 * order, 2))
        return xp.reshape(xp.permute_dims(dense, axes), self.shape)

    def norm(self) -> float:
        return self.train.norm()

    def inner(self, other: TTMatrix) -> Array:
        """Inner product ``trace(self^H other)``."""
        return self.train.inner(other.train)

    def hadamard(self, other: TTMatrix) -> TTMatrix:
        """Entrywise product, of the product of the ranks."""
        return self._with(self.train.hadamard(other.train))

    def canonical(self, center: int = 0) -> TTMatrix:
        """The same matrix in the gauge of :meth:`TT.canonical`."""
        return self._with(self.train.canonical(center))

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, TTMatrix):
            return super().__add__(other)
        if (self.rows, self.columns) != (other.rows, other.columns):
            raise ValueError(
                f"index sizes must be equal, got {self.rows} x {self.columns} and "
                f"{other.rows} x {other.columns}"
            )
        return self._with(self.train + other.train)

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __mul__(self, factor: Any) -> Any:
        train = self.train * factor
        return train if train is NotImplemented else self._with(train)

    __rmul__ = __mul__

    def _with(self, train: TT) -> TTMatrix:
        return TTMatrix.of(train, self.rows, self.columns)

    def __repr__(self) -> str:
        m, n = self.shape
        sizes = f"{m} x {n} as {self.rows} x {self.columns}"
        return f"TTMatrix({sizes}, rank {self.rank}, {self.train.cores[0].dtype})"


def tt_matrix(
    a: Array,
    rows: Sequence[int],
    columns: Sequence[int],
    rank: Rank | None = None,
    *,
    tol: float | None = None,
    rng: RNG = None,
) -> TTMatrix:
    """A matrix as a train whose cores hold a row index and a column index each.

    Its ranks measure how the pairs ``(i_k, j_k)`` are coupled; the rank of the matrix itself may be
    full. For factors of a low-rank matrix, whose rank is that of the middle bond, use
    :func:`~lowrank_sp.tensors.tt_svd.tt_svd` of ``a`` reshaped to ``rows + columns`` instead.

    Parameters
    ----------
    a : array, shape (m, n)
    rows, columns : sequence of N int
        Sizes whose products are ``m`` and ``n``.
    rank, tol, rng
        As in :func:`~lowrank_sp.tensors.tt_svd.tt_svd`, for a tensor of shape
        ``(m_1 n_1, ..., m_N n_N)``.

    Returns
    -------
    TTMatrix
        ``error`` is ``||a - t||_F``. One copy of ``a`` is made, with its indices interleaved.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.kron(np.arange(6.0).reshape(2, 3), np.ones((4, 5)))
    >>> tt_matrix(a, (2, 4), (3, 5), tol=1e-12)
    TTMatrix(8 x 15 as (2, 4) x (3, 5), rank (1, 1, 1), float64)
    """
    rows, columns = tuple(rows), tuple(columns)
    check_truncation(rank, tol)
    if len(rows) != len(columns) or tuple(a.shape) != (math.prod(rows), math.prod(columns)):
        raise ValueError(
            f"rows and columns must be equally many sizes with products {tuple(a.shape)}, got "
            f"{rows} and {columns}"
        )
    xp, order = namespace(a), len(rows)
    axes = [axis for k in range(order) for axis in (k, order + k)]
    pairs = xp.permute_dims(xp.reshape(a, (*rows, *columns)), tuple(axes))
    sizes = tuple(m * n for m, n in zip(rows, columns, strict=True))
    return TTMatrix.of(tt_svd(xp.reshape(pairs, sizes), rank, tol=tol, rng=rng), rows, columns)
