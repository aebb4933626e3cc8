r"""Rows that are Kronecker products of short rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, device, namespace
from lowrank_sp.adapters.forms._draws import Like, kaiming_uniform, template, zeros
from lowrank_sp.adapters.forms._entries import Entrywise, apply_rows, count_of
from lowrank_sp.adapters.forms._parts import Trained


@dataclass(frozen=True, repr=False)
class KhatriRao(Entrywise):
    r"""Row-wise Khatri-Rao product of two narrow matrices: KRAdapter :cite:p:`albert2025kradapter`.

    .. math:: K_{i,\, b q + a} = s\, U_{ia} V_{ib}, \qquad \Delta = K_{:,\,:n}
              \text{ if } m < n, \text{ else } K_{:,\,:m}^T

    Its rows belong to the smaller side of the weight, and its columns, of which there may be some
    too many, to the larger. The rank is full for almost all values. The published code multiplies
    inputs by ``K`` and works for square weights only; this is the same for them, and transposed
    where the weight is wide.

    Attributes
    ----------
    left : array, shape (k, q)
        ``U``, with ``k = min(m, n)``.
    right : array, shape (k, p)
        ``V``, with ``q p >= max(m, n)``.
    size : (int, int)
        Shape ``(m, n)`` of the weight.
    scale : float

    Notes
    -----
    ``2 m n`` flops per input either way. Fewer inputs than ``p`` are contracted with one factor
    after the other; for more, blocks of rows are formed.

    Examples
    --------
    >>> import numpy as np
    >>> form = KhatriRao.create((4096, 1024), rng=0)
    >>> form.left.shape, form.right.shape, form.scale
    ((1024, 32), (1024, 128), 2.0)
    """

    left: Trained[Array, "k q"]
    right: Trained[Array, "k p"]
    size: tuple[int, int]
    scale: float = 2.0

    @classmethod
    def create(cls, weight: Like, *, scale: float = 2.0, rng: RNG = None) -> Self:
        """The shape of the weight gives all sizes; ``left`` is zero.

        ``q`` is the root of the smaller side, rounded down, and ``p`` the least that suffices.
        ``right`` is Kaiming with slope 5, not its square root, as published.
        """
        shape, like = template(weight)
        k, q = min(shape), math.isqrt(min(shape))
        p = max(q, -(-max(shape) // q))
        right = kaiming_uniform((k, p), like, rng, gain=(2 / 26) ** 0.5)
        return cls(zeros((k, q), like), right, shape, scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        (k, q), p = self.left.shape, self.right.shape[1]
        if k != min(self.size) or q * p < max(self.size):
            raise ValueError(
                f"factors of shapes ({k}, q) and ({k}, p) with q p = {q * p} do not fill a weight "
                f"of shape {self.size}: k must be its smaller side, and q p at least its larger"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def _wide(self) -> bool:
        return self.size[0] < self.size[1]

    def rows(self, rows: slice) -> Array:
        q = self.left.shape[1]
        if self._wide:
            return self._product(rows, slice(None))[:, : self.size[1]]
        # Rows b q + a of the transpose: whole groups of one b, of which the ends are cut off.
        first, last = rows.start // q, -(-rows.stop // q)
        group = self._product(slice(None), slice(first, last))
        return group[:, rows.start - first * q : rows.stop - first * q].mT

    def apply(self, x: Array) -> Array:
        if count_of(x) >= self.right.shape[1]:
            return apply_rows(x, self.rows, self.size)
        xp = namespace(x)
        (m, n), q, p = self.size, self.left.shape[1], self.right.shape[1]
        if self._wide:
            tail = xp.zeros((*x.shape[:-1], q * p - n), dtype=x.dtype, device=device(x))
            grid = xp.reshape(xp.concat([x, tail], axis=-1), (*x.shape[:-1], p, q))
            return xp.sum((grid.mT @ self.right.mT) * (self.left.mT * self.scale), axis=-2)
        grid = self.right.mT @ (x[..., None] * (self.left * self.scale))
        return xp.reshape(grid, (*x.shape[:-1], p * q))[..., :m]

    def _product(self, rows: slice, columns: slice) -> Array:
        """Rows of ``K``, for some of the columns of ``right``."""
        left, right = self.left[rows, :] * self.scale, self.right[rows, columns]
        grid = right[:, :, None] * left[:, None, :]
        return namespace(grid).reshape(grid, (left.shape[0], -1))
