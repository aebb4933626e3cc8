"""Observed entries of a matrix, and all that solvers do with them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    device,
    frobenius,
    is_array,
    max_abs,
    namespace,
    real_dtype,
    to_host,
)
from lowrank_sp.factors import Factored
from lowrank_sp.inverse._kernels import kernels
from lowrank_sp.inverse.pattern import Identifiability, Pattern
from lowrank_sp.operators import LinearOperator


def check_entries(entries: Any) -> None:
    """Raise unless they are :class:`Entries`."""
    if not isinstance(entries, Entries):
        raise TypeError(
            f"entries must be Entries, got {type(entries).__name__}; Entries.from_nan, "
            "Entries.from_mask and Entries.from_sparse make them of matrices"
        )


class Entries(LinearOperator):
    r"""Entries of an ``m x n`` matrix that were observed, and the sparse matrix of them.

    .. math:: S = P_\Omega(X), \qquad S_{ij} = \begin{cases}
              X_{ij} & (i, j) \in \Omega \\ 0 & \text{otherwise} \end{cases}

    Immutable. As an operator it multiplies by ``S``, whose zeros are never stored: ``entries @ x``,
    ``lr.truncated_svd(entries, 5)``.

    Parameters
    ----------
    rows, cols : integer arrays on the host, shape (M,)
        Positions in any order; they are kept sorted by rows.
    values : array, shape (M,)
        Of any library, device and dtype; computed in at least float32.
    shape : (int, int)

    Raises
    ------
    ValueError
        If positions repeat or lie outside of ``shape``, or values are not finite.

    Notes
    -----
    Products cost ``2 M k`` flops for ``k`` columns. NumPy arrays, and arrays of PyTorch and JAX in
    host memory, are multiplied by compiled loops where numba is installed; others by gathers and
    batched products on their device. Memory is 16 bytes an entry in double precision, and 8 more
    for the order by columns, once it is used.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, np.nan, 2.0], [np.nan, 3.0, np.nan]])
    >>> entries = Entries.from_nan(x)
    >>> entries
    Entries(2 x 3, 3 observed, float64)
    >>> entries @ np.ones(3)
    array([3., 3.])
    >>> print(entries.check_identifiable(1))
    2 parts that no entry connects; 3 entries for 4 degrees of freedom
    """

    def __init__(self, rows: Any, cols: Any, values: Array, shape: tuple[int, int]):
        pattern, order = Pattern.sort(rows, cols, shape)
        if not is_array(values) or tuple(values.shape) != (pattern.size,):
            raise ValueError(
                f"values must be an array of shape ({pattern.size},), one for every position, got "
                f"{getattr(values, 'shape', type(values).__name__)}"
            )
        values = as_compute(values)
        if order is not None:
            xp = namespace(values)
            values = xp.take(values, xp.asarray(order, device=device(values)))
        if not np.isfinite(max_abs(values)):
            raise ValueError(
                "values must be finite, got NaN or inf; leave such entries out, as "
                "Entries.from_nan does for NaN"
            )
        self._set(pattern, values, kernels(pattern, values))

    def _set(self, pattern: Pattern, values: Array, shared: Any) -> Entries:
        super().__init__(pattern.shape, values[:0])
        self._pattern, self._values, self._kernels = pattern, values, shared
        return self

    @classmethod
    def on(cls, pattern: Pattern, values: Array) -> Entries:
        """Values in their compute dtype, in the order of ``pattern``; neither is checked."""
        return cls.__new__(cls)._set(pattern, values, kernels(pattern, values))

    @classmethod
    def from_mask(cls, x: Array, mask: Array) -> Entries:
        """The entries of a matrix ``x`` where ``mask``, of the same shape, is true."""
        mask = to_host(mask)
        if x.ndim != 2 or mask.shape != tuple(x.shape) or mask.dtype != np.bool_:
            raise ValueError(
                f"mask must be boolean and of the shape {tuple(x.shape)} of the matrix, got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        xp = namespace(x)
        rows, cols = np.nonzero(mask)
        flat = xp.asarray(rows * mask.shape[1] + cols, device=device(x))
        return cls(rows, cols, xp.take(xp.reshape(x, (-1,)), flat), mask.shape)

    @classmethod
    def from_nan(cls, x: Array) -> Entries:
        """The entries of a matrix ``x`` that are not NaN."""
        return cls.from_mask(x, ~namespace(x).isnan(x))

    @classmethod
    def from_sparse(cls, a: Any) -> Entries:
        """The stored entries of a SciPy sparse matrix, explicit zeros included."""
        a = a.tocoo()
        rows, cols = a.coords
        return cls(rows, cols, a.data, a.shape)

    @property
    def pattern(self) -> Pattern:
        """Where the entries lie."""
        return self._pattern

    @property
    def rows(self) -> np.ndarray:
        """Row of every entry, ascending."""
        return self._pattern.rows

    @property
    def cols(self) -> np.ndarray:
        """Column of every entry, ascending within a row."""
        return self._pattern.cols

    @property
    def values(self) -> Array:
        """Value of every entry."""
        return self._values

    @property
    def size(self) -> int:
        """Number ``M`` of entries."""
        return self._pattern.size

    @property
    def like(self) -> Array:
        return self._values

    def with_values(self, values: Array) -> Entries:
        """Other values at the same positions; not checked, not copied, not sorted."""
        return Entries.__new__(Entries)._set(self._pattern, values, self._kernels)

    def matmul(self, x: Array) -> Array:
        return self._kernels.matmul(self._values, x)

    def rmatmul(self, x: Array) -> Array:
        return self._kernels.rmatmul(self._values, x)

    def session(self) -> AbstractContextManager[Any]:
        return self._kernels.session()

    def norm(self) -> float:
        return frobenius(self._values)

    @property
    def mT(self) -> Entries:
        """The entries of the transposed matrix, sorted by its rows."""
        xp = namespace(self._values)
        order = xp.asarray(self._pattern.column_order, device=self.device)
        return Entries.on(self._pattern.mT, xp.take(self._values, order))

    def sampled(self, left: Array, right: Array) -> Array:
        """``(left @ right)[i, j]`` at every entry: ``2 M r`` flops, no ``m x n`` array.

        Parameters
        ----------
        left : array, shape (m, r)
        right : array, shape (r, n)

        Returns
        -------
        array, shape (M,)
        """
        return self._kernels.sampled(left, right)

    def sample(self, x: Any) -> Array:
        """The entries of ``x``, a dense array, a ``LowRank`` or an ``SVD``, of shape ``(M,)``."""
        if isinstance(x, Factored):
            return self.sampled(*x.factors())
        xp = namespace(x)
        flat = self.rows.astype(np.int64) * self.shape[1] + self.cols
        return xp.take(xp.reshape(x, (-1,)), xp.asarray(flat, device=device(x)))

    def grams(self, right: Array) -> Array:
        """Gram matrices ``sum_j conj(x_j) x_j^T`` of the columns observed in every row.

        Parameters
        ----------
        right : array, shape (r, n)
            With columns ``x_j``.

        Returns
        -------
        array, shape (m, r, r)
        """
        return self._kernels.grams(right)

    def least_squares(
        self, left: Array, right: Array, ridge: Array | float = 0.0
    ) -> tuple[Array, float]:
        r"""The left factor that fits the entries best, given the right one.

        .. math:: \min_L \sum_{(i,j) \in \Omega} |X_{ij} - (L R)_{ij}|^2
                  + \sum_i \rho_i \lVert L_i \rVert^2

        One small system for every row, solved for a correction of ``left``, so that rounding does
        not grow with its condition number when this is repeated. ``M (r^2 + 4 r) + m r^3 / 3``
        multiplications.

        Parameters
        ----------
        left : array, shape (m, r)
            The point that is corrected.
        right : array, shape (r, n)
        ridge : float, or array of shape (m,)
            The weights ``rho_i``. Directions that the entries of a row leave open, and that no
            weight settles, stay as they are in ``left``.

        Returns
        -------
        array, shape (m, r)
            The new left factor.
        float
            ``sum |X_ij - (L R)_ij|^2`` before the correction.
        """
        xp = namespace(left)
        real = real_dtype(xp, left.dtype)
        if isinstance(ridge, float | int):
            ridge = xp.full(self.shape[0], float(ridge), dtype=real, device=device(left))
        return self._kernels.least_squares(self._values, left, right, ridge)

    def check_identifiable(self, rank: int) -> Identifiability:
        """What the positions cannot tell about a matrix of rank ``rank``, by lines."""
        return self._pattern.check_identifiable(rank)

    def select(self, chosen: np.ndarray) -> Entries:
        """The entries where ``chosen``, a boolean host array of shape ``(M,)``, is true."""
        index = np.flatnonzero(chosen)
        pattern = replace(self._pattern, rows=self.rows[index], cols=self.cols[index])
        xp = namespace(self._values)
        return Entries.on(pattern, xp.take(self._values, xp.asarray(index, device=self.device)))

    def split(self, share: float = 0.05, rng: RNG = None) -> tuple[Entries, Entries]:
        """A random ``share`` of the entries withheld: ``(kept, withheld)``."""
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), got {share}")
        count = round(share * self.size)
        withheld = np.zeros(self.size, bool)
        withheld[np.random.default_rng(rng).permutation(self.size)[:count]] = True
        return self.select(~withheld), self.select(withheld)

    def relative_residual(self, x: Any) -> float:
        """``||X - x||_F / ||X||_F`` over the entries; on withheld ones, an estimate of the error.

        Zero where both norms vanish, and infinite where only the second does.
        """
        error, size = frobenius(self._values - self.sample(x)), self.norm()
        if error == 0.0:
            return 0.0
        return error / size if size else float("inf")

    def __repr__(self) -> str:
        m, n = self.shape
        return f"Entries({m} x {n}, {self.size} observed, {self.dtype})"
