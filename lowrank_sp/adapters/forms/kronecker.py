r"""Kronecker products, of which either part may be a product of factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, namespace
from lowrank_sp.adapters.forms._draws import (
    Like,
    factor_scale,
    kaiming_uniform,
    template,
    zeros,
)
from lowrank_sp.adapters.forms._form import Form, Start, check_weight
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.modes import kronecker
from lowrank_sp.tensors.rearrange import Kronecker, nearest_kronecker

Pair = tuple[int, int]


@dataclass(frozen=True, repr=False)
class KroneckerProduct(Form):
    r"""Kronecker product, :math:`\Delta = s\, W_1 \otimes W_2`.

    LoKr :cite:p:`yeh2024navigating` and KronA :cite:p:`edalati2022krona`. Either part is a matrix,
    or a product of two factors. The rank is that of ``W1`` times that of ``W2``: a large rank from
    few numbers.

    Attributes
    ----------
    left : array, shape (m1, n1), or (m1, q)
        ``W1``, or its first factor; ``lokr_w1`` or ``lokr_w1_a`` of PEFT.
    right : array, shape (m2, n2), or (m2, r)
        ``W2``, or its first factor; ``lokr_w2`` or ``lokr_w2_a``.
    left_down : array, shape (q, n1), or None
        ``lokr_w1_b``.
    right_down : array, shape (r, n2), or None
        ``lokr_w2_b``.
    scale : float

    Notes
    -----
    An input is reshaped to ``n1 x n2`` and multiplied from both sides, in the cheaper order: with
    all parts of size ``d = 64`` and ``W2`` of rank ``r``, ``6 r d^2`` flops where the matrix takes
    ``2 d^4``. :meth:`delta` is a :class:`~lowrank_sp.factors.LowRank` if a part is factored.

    Examples
    --------
    >>> import numpy as np
    >>> form = KroneckerProduct.create((4096, 4096), rank=16, rng=0)
    >>> form
    KroneckerProduct(left 64 x 64, right 64 x 16, right_down 16 x 64)
    >>> form.num_trainable, form.rank_bound
    (6144, 1024)
    """

    left: Trained[Array, "a e"]
    right: Trained[Array, "c f"]
    left_down: Trained[Array, "e b"] = None
    right_down: Trained[Array, "f d"] = None
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        factor: int = -1,
        both: bool = False,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """As PEFT: ``left`` zero, the rest Kaiming, ``scale = alpha / rank``.

        Parameters
        ----------
        weight : array or (int, int)
        rank : int
            Of ``W2``, which is not factored where that would not save half of it.
        factor : int
            As in :func:`factorization`.
        both : bool
            Factor ``W1`` as well, on the same terms.
        alpha : float, optional
            By default ``rank``.
        rng : int, Generator or None
        """
        sides = _sides(weight, factor)
        return cls._drawn(weight, rank, sides, both, alpha, rng, zero="left")

    @classmethod
    def create_right_zero(
        cls,
        weight: Like,
        rank: int,
        *,
        factor: int = -1,
        both: bool = False,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """As PEFT's option ``"lycoris"``: ``right``, or ``right_down``, is what is zero."""
        sides = _sides(weight, factor)
        return cls._drawn(weight, rank, sides, both, alpha, rng, zero="right")

    @classmethod
    def create_sorted(
        cls,
        weight: Like,
        rank: int,
        *,
        factor: int = -1,
        both: bool = False,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """As LyCORIS itself, which differs from :meth:`create_right_zero` in two points.

        The smaller number of a pair always comes first, and ``scale`` is 1 where neither part is
        factored, whatever ``alpha`` is.
        """
        (m1, m2), (n1, n2) = _sides(weight, factor)
        sides = (min(m1, m2), max(m1, m2)), (min(n1, n2), max(n1, n2))
        form = cls._drawn(weight, rank, sides, both, alpha, rng, zero="right")
        factored = form.left_down is not None or form.right_down is not None
        return form if factored else cls(form.left, form.right)

    @classmethod
    def from_weight(cls, weight: Array, shape: Pair, *, rng: RNG = None) -> Start:
        """The Kronecker product nearest to the weight, and the weight without it.

        Parameters
        ----------
        weight : array, shape (m1 m2, n1 n2)
        shape : (int, int)
            ``(m1, n1)``.
        rng : int, Generator or None
            Seed of the singular value decomposition in
            :func:`~lowrank_sp.tensors.rearrange.nearest_kronecker`.
        """
        nearest = nearest_kronecker(check_weight(weight, cls.__name__), shape, rng=rng)
        form = cls(nearest.left[0, ...], nearest.right[0, ...])
        return Start(form, form.unmerge(weight))

    @classmethod
    def _drawn(
        cls,
        weight: Like,
        rank: int,
        sides: tuple[Pair, Pair],
        both: bool,
        alpha: float | None,
        rng: RNG,
        *,
        zero: Literal["left", "right"],
    ) -> Self:
        (m1, m2), (n1, n2) = sides
        _, like, scale = factor_scale(weight, rank, alpha, max(m1 * m2, n1 * n2))
        generator = np.random.default_rng(rng)

        def part(rows: int, columns: int, *, may: bool) -> tuple[Array, Array | None]:
            if not (may and rank < max(rows, columns) / 2):
                return kaiming_uniform((rows, columns), like, generator), None
            first = kaiming_uniform((rows, rank), like, generator)
            return first, kaiming_uniform((rank, columns), like, generator)

        left, left_down = part(m1, n1, may=both)
        right, right_down = part(m2, n2, may=True)
        if zero == "left":
            left = zeros(tuple(left.shape), like)
        elif right_down is None:
            right = zeros(tuple(right.shape), like)
        else:
            right_down = zeros(tuple(right_down.shape), like)
        return cls(left, right, left_down, right_down, scale)

    @property
    def _left_shape(self) -> Pair:
        return self.left.shape[0], (self.left if self.left_down is None else self.left_down).shape[
            1
        ]

    @property
    def _right_shape(self) -> Pair:
        last = self.right if self.right_down is None else self.right_down
        return self.right.shape[0], last.shape[1]

    @property
    def shape(self) -> Pair:
        (m1, n1), (m2, n2) = self._left_shape, self._right_shape
        return m1 * m2, n1 * n2

    @property
    def rank_bound(self) -> int:
        left = min(*self._left_shape, self.left.shape[1])
        return left * min(*self._right_shape, self.right.shape[1])

    def delta(self) -> LowRank | Kronecker:
        if self.left_down is None and self.right_down is None:
            return Kronecker((self.left * self.scale)[None, ...], self.right[None, ...])
        up1, down1 = _split(self.left * self.scale, self.left_down)
        up2, down2 = _split(self.right, self.right_down)
        return LowRank(kronecker([up1, up2]), kronecker([down1, down2]))

    def apply(self, x: Array) -> Array:
        xp = namespace(x)
        (m1, n1), (m2, n2) = self._left_shape, self._right_shape
        y = xp.reshape(x, (-1, n1, n2))
        left = [a for a in (self.left_down, self.left * self.scale) if a is not None]
        right = [a.mT for a in (self.right_down, self.right) if a is not None]
        if self._right_outside():
            y = y @ right[0]
            for a in left:
                y = a @ y
            y = y if len(right) == 1 else y @ right[1]
        else:
            y = left[0] @ y
            for a in right:
                y = y @ a
            y = y if len(left) == 1 else left[1] @ y
        return xp.reshape(y, (*x.shape[:-1], m1 * m2))

    def rows(self, rows: slice) -> Array:
        """Some rows of the update."""
        m2, n = self._right_shape[0], self.shape[1]
        right = self.right if self.right_down is None else self.right @ self.right_down
        first, last = rows.start // m2, -(-rows.stop // m2)
        left = self.left[first:last, :] * self.scale
        left = left if self.left_down is None else left @ self.left_down
        grid = left[:, None, :, None] * right[None, :, None, :]
        block = namespace(grid).reshape(grid, ((last - first) * m2, n))
        return block[rows.start - first * m2 : rows.stop - first * m2, :]

    def _rows(self) -> Callable[[slice], Array]:
        return self.rows

    def _right_outside(self) -> bool:
        """Whether it is cheaper to multiply by the first matrix on the right first."""
        left, right = self._left_shape[::-1], self._right_shape[::-1]
        if self.left_down is not None:
            left = (left[0], self.left.shape[1], left[1])
        if self.right_down is not None:
            right = (right[0], self.right.shape[1], right[1])
        return _nested(right, left) <= _nested(left, right)


def factorization(size: int, factor: int = -1) -> Pair:
    """Two numbers whose product is ``size``, by the rule of LoKr.

    A ``factor`` that divides ``size`` is the first of them. Otherwise it bounds the smaller one,
    which comes first and is as large as it can be; ``-1`` is no bound.

    LyCORIS sorts the pair in the first case as well: ``sorted(factorization(size, factor))``.

    Examples
    --------
    >>> factorization(4096), factorization(11008), factorization(128, 64), factorization(127)
    ((64, 64), (86, 128), (64, 2), (1, 127))
    """
    if factor == 0 or factor < -1:
        raise ValueError(f"factor must be positive, or -1 for the most even pair, got {factor}")
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    smaller = max(k for k in range(1, int(size**0.5) + 1) if size % k == 0 and k <= most)
    return smaller, size // smaller


def _sides(weight: Like, factor: int) -> tuple[Pair, Pair]:
    (m, n), _ = template(weight)
    return factorization(m, factor), factorization(n, factor)


def _split(first: Array, second: Array | None) -> tuple[Array, Array]:
    """Two factors, one of them the identity where there is only a matrix."""
    if second is not None:
        return first, second
    m, n = first.shape
    eye = namespace(first).eye(min(m, n), dtype=first.dtype, device=device(first))
    return (eye, first) if m <= n else (first, eye)


def _nested(outer: tuple[int, ...], inner: tuple[int, ...]) -> int:
    """Products to multiply a matrix by those of one side, in between by all of the other."""
    first, middle = inner[0] * outer[0] * outer[1], outer[1] * _chain(inner)
    return first + middle + (inner[-1] * outer[1] * outer[2] if len(outer) == 3 else 0)


def _chain(sizes: tuple[int, ...]) -> int:
    return sum(a * b for a, b in pairwise(sizes))
