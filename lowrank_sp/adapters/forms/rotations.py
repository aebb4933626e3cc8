r"""The weight rotated: pieces of the input are turned before it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import Array, as_compute, device, namespace
from lowrank_sp.adapters.forms._draws import full, template, zeros
from lowrank_sp.adapters.forms._form import Form, check_weight
from lowrank_sp.adapters.forms._parts import Trained, Weight
from lowrank_sp.adapters.forms.fixed_sides import skew_matrix


class _Rotations(Form, ABC):
    """Stages of rotations of the pieces of an input, and gains of the outputs."""

    weight: Array

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    @property
    def rank_bound(self) -> int:
        return min(self.weight.shape)

    @abstractmethod
    def _stages(self) -> list[Array]:
        """Rotations less one, of shape ``(pieces, b, b)``; the last ones meet the input first."""

    @abstractmethod
    def _gains(self) -> Array | None:
        """One number for every output."""

    def delta(self) -> Array:
        # The rows of W times R': all is transposed, so the first stage comes first.
        change = self.weight * 0.0
        for stage, turn in enumerate(self._stages()):
            change = change + _turned(self.weight + change, turn.mT, stage)
        return self._with_gains(change, self.weight, axis=0)

    def apply(self, x: Array) -> Array:
        change = self._change(x)
        return self._with_gains(change, x if self._gains() is None else x @ self.weight.mT, axis=1)

    def adapt(self, x: Array, y: Array) -> Array:
        return y + self._with_gains(self._change(x), y, axis=1)

    def _change(self, x: Array) -> Array:
        turned = x * 0.0
        for stage, turn in reversed(list(enumerate(self._stages()))):
            turned = turned + _turned(x + turned, turn, stage)
        return turned @ self.weight.mT

    def _with_gains(self, change: Array, before: Array, axis: int) -> Array:
        gains = self._gains()
        if gains is None:
            return change
        gains = gains[:, None] if axis == 0 else gains
        return change * gains + before * (gains - 1.0)


@dataclass(frozen=True, repr=False)
class BlockRotations(_Rotations):
    r"""Pieces of the input rotated: OFT :cite:p:`qiu2023controlling`.

    .. math:: W + \Delta = W \operatorname{blkdiag}(R_1, R_2, \dots)^T, \qquad
              R = (I + K)(I - K)^{-1}, \quad K^T = -K

    It keeps the angles between all outputs. A series takes the place of the inverse if ``order`` is
    given, :math:`R \approx I + 2 K + 2 K^2 + \dots + K^q`, which is a rotation up to
    :math:`\lVert K \rVert^q`.

    Attributes
    ----------
    skew : array, shape (p, b (b - 1) / 2)
        ``K`` above its diagonals, row by row, for every piece of ``b`` inputs, or one for all.
    weight : array, shape (m, n)
        ``W``. The update depends on it: on a merged weight it is another one.
    order : int, optional
        ``q``.

    Notes
    -----
    ``2 b n`` flops per input, then those of the weight. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> form = BlockRotations(np.array([[1.0]]), np.array([[3.0, 4.0]]))
    >>> form.merge(form.weight)  # a quarter turn
    array([[ 4., -3.]])
    """

    skew: Trained[Array, "p k"]
    weight: Weight[Array, "m n"]
    order: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        (count, numbers), n = self.skew.shape, self.weight.shape[1]
        size = self.size
        if size * (size - 1) // 2 != numbers or n % size or count not in (1, n // size):
            raise ValueError(
                f"skew of a weight of {n} inputs must have shape (p, b (b - 1) / 2), p b = {n}, "
                f"or p = 1 where b divides {n}, got {tuple(self.skew.shape)}"
            )

    @classmethod
    def create(
        cls, weight: Array, *, block: int, shared: bool = False, order: int | None = None
    ) -> Self:
        """No rotation, of pieces of ``block`` inputs, which divides their number."""
        weight = as_compute(check_weight(weight, cls.__name__))
        (m, n), like = template(weight)
        if block < 2 or n % block:
            raise ValueError(
                f"block must be at least 2 and divide the inputs of a weight {m} x {n}, got {block}"
            )
        count = 1 if shared else n // block
        return cls(zeros((count, block * (block - 1) // 2), like), weight, order)

    @property
    def size(self) -> int:
        """``b``, inputs in a piece."""
        return (1 + math.isqrt(1 + 8 * self.skew.shape[1])) // 2

    def _gains(self) -> None:
        return None

    def _stages(self) -> list[Array]:
        k = skew_matrix(as_compute(self.skew), self.size)
        xp = namespace(k)
        if self.order is None:
            return [xp.astype(_cayley(k), self.weight.dtype, copy=False)]
        series = k
        for _ in range(self.order - 1):
            series = 2.0 * k + k @ series
        return [xp.astype(series, self.weight.dtype, copy=False)]


@dataclass(frozen=True, repr=False)
class ButterflyRotations(_Rotations):
    r"""Pieces of the input rotated stage by stage, as in a fast transform: BOFT
    :cite:p:`liu2024boft`.

    .. math:: W + \Delta = \operatorname{diag}(g)\, W\, (M_f \cdots M_1)^T, \qquad
              M_i = P_i \operatorname{blkdiag}(R_{i1}, R_{i2}, \dots) P_i^T

    with permutations that bring halves of pieces together that are further apart in every stage, so
    that a few stages mix all inputs.

    Attributes
    ----------
    blocks : array, shape (f, p, b, b)
        :math:`R = (I - K)(I + K)^{-1}` with ``K`` half of ``blocks`` less its transpose. The order
        is that of PEFT, where the last stage meets the input first.
    gains : array, shape (m, 1)
        ``g``.
    weight : array, shape (m, n)
        ``W``. The update depends on it: on a merged weight it is another one.

    Notes
    -----
    ``2 f b n`` flops per input, then those of the weight. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> form = ButterflyRotations.create(np.ones((3, 8)), block=2, stages=3)
    >>> form, form.num_trainable
    (ButterflyRotations(blocks 3 x 4 x 2 x 2, gains 3 x 1, weight 3 x 8), 51)
    """  # noqa: D205

    blocks: Trained[Array, "f p b b"]
    gains: Trained[Array, "m 1"]
    weight: Weight[Array, "m n"]

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, count, size, _ = self.blocks.shape
        _check_butterfly(self.weight.shape[1], size, stages)
        if count * size != self.weight.shape[1]:
            raise ValueError(
                f"blocks of a weight of {self.weight.shape[1]} inputs must have shape (f, p, b, b) "
                f"with p b = {self.weight.shape[1]}, got {tuple(self.blocks.shape)}"
            )

    @classmethod
    def create(cls, weight: Array, *, block: int, stages: int = 1) -> Self:
        """No rotation, and gains of one."""
        weight = as_compute(check_weight(weight, cls.__name__))
        (m, n), like = template(weight)
        _check_butterfly(n, block, stages)
        blocks = zeros((stages, n // block, block, block), like)
        return cls(blocks, full((m, 1), 1.0, like), weight)

    def _gains(self) -> Array:
        return self.gains[:, 0]

    def _stages(self) -> list[Array]:
        blocks = as_compute(self.blocks)
        k = (blocks.mT - blocks) * 0.5
        xp = namespace(k)
        turns = xp.astype(_cayley(k), self.weight.dtype, copy=False)
        return [turns[i, ...] for i in range(turns.shape[0])]


def _cayley(k: Array) -> Array:
    """``(I + K)(I - K)^-1 - I`` of skew-symmetric matrices."""
    xp = namespace(k)
    eye = xp.eye(k.shape[-1], dtype=k.dtype, device=device(k))
    # The factors commute.
    return xp.linalg.solve(eye - k, 2.0 * k)


def _turned(x: Array, turn: Array, stage: int) -> Array:
    """``x`` times ``P blkdiag(turn) P'``, where ``P`` pairs halves of pieces ``2^stage`` apart."""
    xp = namespace(x)
    lead, n, size = x.shape[:-1], x.shape[-1], turn.shape[-1]
    if stage:
        x = _shuffled(x, (n // (size << stage), 2, 1 << stage, size // 2))
    pieces = xp.reshape(x, (*lead, n // size, 1, size))
    y = xp.reshape(pieces @ turn, (*lead, n))
    if stage:
        y = _shuffled(y, (n // (size << stage), 1 << stage, 2, size // 2))
    return y


def _shuffled(x: Array, shape: tuple[int, int, int, int]) -> Array:
    """The last axis as a matrix of matrices, transposed."""
    xp, d = namespace(x), x.ndim - 1
    grid = xp.reshape(x, (*x.shape[:-1], *shape))
    return xp.reshape(xp.permute_dims(grid, (*range(d), d, d + 2, d + 1, d + 3)), x.shape)


def _check_butterfly(n: int, size: int, stages: int) -> None:
    if stages < 1 or size < 2 or n % (size << (stages - 1)) or (stages > 1 and size % 2):
        raise ValueError(
            f"a butterfly of {stages} stages needs blocks of even size b where b 2^{stages - 1} "
            f"divides the {n} inputs, got b = {size}"
        )
