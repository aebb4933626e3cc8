"""Where a matrix was observed: positions, their order by rows and columns, what they identify."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_NAMED = 5  # lines that an error names


@dataclass(frozen=True, eq=False)
class Pattern:
    """Distinct positions in a matrix, sorted by rows, then columns.

    Attributes
    ----------
    rows, cols : integer arrays, shape (M,)
        int32 where ``shape`` allows it.
    shape : (int, int)
    """

    rows: np.ndarray
    cols: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def sort(cls, rows: Any, cols: Any, shape: tuple[int, int]) -> tuple[Pattern, Any]:
        """The pattern of positions in any order, and the order (None if sorted already)."""
        m, n = (int(size) for size in shape)
        rows, cols = _indices(rows, m, "row"), _indices(cols, n, "column")
        if len(rows) != len(cols):
            raise ValueError(f"rows and cols must be equally long, got {len(rows)} and {len(cols)}")
        keys = rows.astype(np.int64) * max(n, 1)
        keys += cols
        order = None
        if not np.all(keys[1:] > keys[:-1]):
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            twice = np.flatnonzero(keys[1:] == keys[:-1])
            if len(twice):
                i, j = divmod(int(keys[twice[0]]), n)
                raise ValueError(
                    f"positions must be distinct, got ({i}, {j}) more than once and "
                    f"{len(twice)} repetitions in all; sum or average them first"
                )
            rows, cols = rows[order], cols[order]
        return cls(rows, cols, (m, n)), order

    @property
    def size(self) -> int:
        """Number ``M`` of positions."""
        return len(self.rows)

    @cached_property
    def row_starts(self) -> np.ndarray:
        """Row ``i`` holds the positions ``row_starts[i]`` to ``row_starts[i + 1]``."""
        return _starts(self.row_counts)

    @cached_property
    def column_starts(self) -> np.ndarray:
        """Column ``j`` holds ``column_order[column_starts[j]:column_starts[j + 1]]``."""
        return _starts(self.column_counts)

    @cached_property
    def row_counts(self) -> np.ndarray:
        """Positions in every row."""
        return np.bincount(self.rows, minlength=self.shape[0])

    @cached_property
    def column_counts(self) -> np.ndarray:
        """Positions in every column."""
        return np.bincount(self.cols, minlength=self.shape[1])

    @property
    def column_order(self) -> np.ndarray:
        """Positions sorted by columns, then rows, as indices into the order by rows."""
        return self._by_column[0]

    @cached_property
    def mT(self) -> Pattern:
        """The transposed positions, sorted by the columns of this pattern."""
        order, rows = self._by_column
        return Pattern(self.cols[order], rows, (self.shape[1], self.shape[0]))

    @cached_property
    def _by_column(self) -> tuple[np.ndarray, np.ndarray]:
        # A counting sort, which the conversion between sparse formats does in linear time.
        from scipy.sparse import csr_array

        positions = np.arange(self.size, dtype=np.int32 if self.size < 2**31 else np.int64)
        by_row = csr_array((positions, self.cols, self.row_starts), shape=self.shape)
        by_column = by_row.tocsc()
        return by_column.data, by_column.indices.astype(self.rows.dtype, copy=False)

    def check_identifiable(self, rank: int) -> Identifiability:
        """What these positions cannot tell about a matrix of rank ``rank``; see there."""
        rows, cols = self.core(rank)
        return Identifiability(
            rank=rank,
            size=self.size,
            dof=rank * (sum(self.shape) - rank),
            short_rows=np.flatnonzero(self.row_counts < rank),
            short_columns=np.flatnonzero(self.column_counts < rank),
            lost_rows=np.flatnonzero(~rows),
            lost_columns=np.flatnonzero(~cols),
            components=self._components(np.ones(self.size, bool))[1],
        )

    def core(self, rank: int, *, connected: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the rows and columns that a matrix of rank ``rank`` is identified on.

        Lines of fewer than ``rank`` positions say nothing about other lines, so they are removed
        until none is left; of what falls apart then, the part with the most positions is kept,
        unless it need not be ``connected``. Necessary for identifiability, and for random positions
        nearly sufficient :cite:p:`pimentel2016characterization`.
        """
        rows, cols = self.row_counts >= rank, self.column_counts >= rank
        inside = np.ones(self.size, bool)
        lost = not (rows.all() and cols.all())
        while lost:
            inside = rows[self.rows] & cols[self.cols]
            keep_rows = rows & (np.bincount(self.rows[inside], minlength=len(rows)) >= rank)
            keep_cols = cols & (np.bincount(self.cols[inside], minlength=len(cols)) >= rank)
            lost = keep_rows.sum() < rows.sum() or keep_cols.sum() < cols.sum()
            rows, cols = keep_rows, keep_cols
        labels, count = self._components(inside) if connected else (None, 1)
        if labels is not None and count > 1:
            sizes = np.bincount(labels[self.rows[inside]], minlength=len(labels))
            largest = labels == np.argmax(sizes)
            rows, cols = rows & largest[: len(rows)], cols & largest[len(rows) :]
        return rows, cols

    def _components(self, inside: np.ndarray) -> tuple[np.ndarray, int]:
        """Label of every line in the graph that joins rows and columns, and how many have edges."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        m, n = self.shape
        rows, cols = self.rows[inside], self.cols[inside]
        starts = np.full(m + n + 1, len(rows), dtype=np.int64)
        starts[: m + 1] = _starts(np.bincount(rows, minlength=m))
        edges = csr_array((np.ones(len(rows), np.int8), cols + m, starts), shape=(m + n, m + n))
        _, labels = connected_components(edges, directed=False)
        return labels, len(np.unique(labels[:m][np.diff(starts[: m + 1]) > 0]))


@dataclass(frozen=True)
class Identifiability:
    """What observed positions cannot tell about a matrix of rank ``rank``.

    Attributes
    ----------
    rank, size, dof : int
        The rank, the number of positions, and the degrees of freedom ``rank (m + n - rank)``.
    short_rows, short_columns : integer arrays
        Lines with fewer than ``rank`` positions.
    lost_rows, lost_columns : integer arrays
        Lines outside the :meth:`core <Pattern.core>`: the short ones, those that depend on them,
        and those that no chain of positions joins to the rest.
    components : int
        Parts that the graph of rows and columns falls into; one, if it is connected.
    """

    rank: int
    size: int
    dof: int
    short_rows: np.ndarray
    short_columns: np.ndarray
    lost_rows: np.ndarray
    lost_columns: np.ndarray
    components: int

    @property
    def complete(self) -> bool:
        """Whether every line is in the core, and there are as many positions as unknowns."""
        return not (len(self.lost_rows) or len(self.lost_columns)) and self.size >= self.dof

    def __str__(self) -> str:
        problems = []
        for name, short in (("row", self.short_rows), ("column", self.short_columns)):
            if len(short):
                problems.append(f"{_lines(name, short)} with fewer than {self.rank} entries")
        if self.components > 1:
            problems.append(f"{self.components} parts that no entry connects")
        if not problems:
            for name, lost in (("row", self.lost_rows), ("column", self.lost_columns)):
                if len(lost):
                    problems.append(f"{_lines(name, lost)} with too few entries in other lines")
        if self.size < self.dof:
            problems.append(f"{self.size} entries for {self.dof} degrees of freedom")
        return "; ".join(problems) or f"every line has the entries that rank {self.rank} needs"


def _lines(name: str, lines: np.ndarray) -> str:
    shown = ", ".join(map(str, lines[:_NAMED]))
    if len(lines) == 1:
        return f"{name} {shown}"
    return f"{name}s {shown}" + (f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else "")


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _indices(indices: Any, size: int, name: str) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise TypeError(
            f"{name} indices must be a one-dimensional integer array, got {indices.dtype} of "
            f"shape {indices.shape}"
        )
    if len(indices):
        for worst in (int(indices.min()), int(indices.max())):
            if not 0 <= worst < size:
                raise ValueError(f"{name} indices must be in 0..{size - 1}, got {worst}")
    # Owned, so that nobody else can change what was checked.
    return np.array(indices, dtype=np.int32 if size < 2**31 else np.int64)
