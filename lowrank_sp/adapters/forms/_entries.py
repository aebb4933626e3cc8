"""Forms that are known by their entries: applied and merged by blocks of rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lowrank_sp._arrays import Array, device, namespace, slices
from lowrank_sp.adapters.forms._form import Form

# Entries in a block of rows, at least: a few megabytes, near a core between being made and used.
_BLOCK = 2**20


@dataclass(frozen=True, repr=False)
class Entrywise(Form, ABC):
    """An update whose rows are cheap to compute, and which is no short product of factors."""

    @abstractmethod
    def rows(self, rows: slice) -> Array:
        """Some rows of the update."""

    @property
    def rank_bound(self) -> int:
        return min(self.shape)

    def delta(self) -> Array:
        return self.rows(slice(0, self.shape[0]))

    def apply(self, x: Array) -> Array:
        return apply_rows(x, self.rows, self.shape)

    def _rows(self) -> Callable[[slice], Array]:
        return self.rows


def apply_rows(x: Array, rows: Callable[[slice], Array], shape: tuple[int, int]) -> Array:
    """``x @ delta.T`` with no more than a block of rows of ``delta`` at a time.

    A library that differentiates keeps what it needs of every block.
    """
    m, n = shape
    # Many inputs are multiplied faster by taller blocks, of up to a quarter of their size.
    height = max(1, _BLOCK // n, count_of(x) // 4)
    parts = [x @ rows(block).mT for block in slices(m, height)]
    return parts[0] if len(parts) == 1 else namespace(x).concat(parts, axis=-1)


def count_of(x: Array) -> int:
    """Number of inputs in ``x`` of shape ``(..., n)``."""
    return math.prod(x.shape[:-1])


def none_of(x: Array, m: int) -> Array:
    """The outputs, of ``m`` entries, where there are no inputs."""
    return namespace(x).zeros((*x.shape[:-1], m), dtype=x.dtype, device=device(x))
