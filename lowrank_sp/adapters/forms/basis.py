"""Random bases that are never trained, and the gains that are: VeRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, from_host
from lowrank_sp.adapters.forms._draws import Like, full, template, uniform, zeros
from lowrank_sp.adapters.forms._form import Form, LayeredForm
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank, check_rank


@dataclass(frozen=True, repr=False)
class Gains(Form):
    r"""Two gains around fixed factors, :math:`\Delta = \operatorname{diag}(b) B
    \operatorname{diag}(d) A`: one layer of VeRA :cite:p:`kopiczko2024vera`.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    outer : array, shape (m,)
        ``b``.
    inner : array, shape (r,)
        ``d``.
    """  # noqa: D205

    up: Fixed[Array, "m r"]
    down: Fixed[Array, "r n"]
    outer: Trained[Array, "m"]
    inner: Trained[Array, "r"]

    @classmethod
    def create(cls, weight: Like, rank: int, *, gain: float = 0.1, rng: RNG = None) -> Gains:
        """A layer with a basis of its own: as :meth:`SharedBasis.create` of one weight."""
        return SharedBasis.create([weight], rank, gain=gain, rng=rng).layer(0)

    @property
    def rank_bound(self) -> int:
        return min(*self.up.shape, *self.down.shape)

    def delta(self) -> LowRank:
        return LowRank(self.up * self.outer[:, None], self.inner[:, None] * self.down)

    def apply(self, x: Array) -> Array:
        return (((x @ self.down.mT) * self.inner) @ self.up.mT) * self.outer


@dataclass(frozen=True, repr=False)
class SharedBasis(LayeredForm):
    r"""One pair of random factors for all layers: VeRA :cite:p:`kopiczko2024vera`.

    .. math:: \Delta_l = \operatorname{diag}(b_l)\, B_{:m_l,:} \operatorname{diag}(d_l)\,
              A_{:,:n_l}

    A layer has ``m_l + r`` trained numbers, so the rank may be large, beyond the sides of small
    layers too. The random factors are saved: which they are depends on the largest layer.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``, with as many rows as the largest layer.
    down : array, shape (r, n)
        ``A``, with as many columns as the largest layer.
    outer, inner : tuples of arrays, shapes (m_l,) and (r,)
        ``b`` and ``d``.
    widths : tuple of int
        The ``n_l``.

    Examples
    --------
    >>> form = SharedBasis.create([(6, 4), (3, 8)], rank=5, rng=0)
    >>> form.up.shape, form.down.shape, form.num_trainable
    ((6, 5), (5, 8), 19)
    >>> form.layer(1)
    Gains(up 3 x 5, down 5 x 8, outer 3, inner 5)
    """

    up: Fixed[Array, "m r"]
    down: Fixed[Array, "r n"]
    outer: Trained[tuple[Array, ...], "..."]
    inner: Trained[tuple[Array, ...], "..."]
    widths: tuple[int, ...]

    @classmethod
    def create(
        cls,
        weights: Sequence[Like],
        rank: int,
        *,
        gain: float = 0.1,
        basis: tuple[Array, Array] | None = None,
        rng: RNG = None,
    ) -> Self:
        """``outer`` zero, ``inner`` equal to ``gain``, and a basis that is uniform.

        Parameters
        ----------
        weights : sequence of arrays or shapes
        rank : int
        gain : float
        basis : (array, array), optional
            ``up`` and ``down``, such as :func:`peft_basis`. By default they are drawn on
            ``+-sqrt(6 / r)`` and ``+-sqrt(6 / n)``, Kaiming's bounds, row by row and column by
            column: a larger layer adds to ``up``, and to ``down`` up to its size, and changes
            nothing of what was there.
        rng : int, Generator or None
        """
        if not weights:
            raise ValueError("at least one weight is needed, got none")
        shapes, likes = zip(*map(template, weights), strict=True)
        m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        rank = check_rank(rank, max(m, n), (m, n))
        like = likes[0]
        if basis is None:
            of_up, of_down = np.random.default_rng(rng).spawn(2)
            up = uniform((m, rank), (6 / rank) ** 0.5, like, of_up)
            down = uniform((n, rank), (6 / n) ** 0.5, like, of_down).mT
        else:
            up, down = basis
        if up.shape[0] < m or down.shape[1] < n:
            raise ValueError(
                f"basis must reach {m} rows and {n} columns, got {up.shape[0]} and {down.shape[1]}"
            )
        outer = tuple(zeros((rows,), like) for rows, _ in shapes)
        inner = tuple(full((rank,), gain, like) for _ in shapes)
        return cls(up, down, outer, inner, tuple(columns for _, columns in shapes))

    @property
    def num_layers(self) -> int:
        return len(self.outer)

    @property
    def rank_bound(self) -> int:
        sides = [min(b.shape[0], n) for b, n in zip(self.outer, self.widths, strict=True)]
        return min(self.up.shape[1], max(sides))

    def layer(self, index: int) -> Gains:
        outer = self.outer[index]
        return Gains(
            self.up[: outer.shape[0], :],
            self.down[:, : self.widths[index]],
            outer,
            self.inner[index],
        )


def peft_basis(
    rank: int, rows: int, columns: int, like: Array, *, seed: int = 0
) -> tuple[Array, Array]:
    """The factors that PEFT draws for VeRA with ``projection_prng_key=seed``, without PyTorch.

    They are uniform draws in single precision of PyTorch's generator on the CPU, first of ``down``,
    then of ``up``. ``rows`` and ``columns`` must be the largest over all layers that PEFT adapts.

    Returns
    -------
    (array, array)
        ``up`` of shape (rows, rank) and ``down`` of shape (rank, columns), in the library and dtype
        of ``like``.
    """
    bits = np.random.RandomState(seed)

    def draw(shape: tuple[int, int]) -> Array:
        bound = float(np.float32(3.0**0.5 * (2.0**0.5 / shape[1] ** 0.5)))
        raw = bits.randint(0, 2**32, size=shape, dtype=np.uint32)
        # Of 32 random bits PyTorch keeps the 24 that a single has room for.
        unit = (raw & np.uint32(2**24 - 1)) * 2.0**-24
        return from_host((unit * (2 * bound) - bound).astype(np.float32), like, like.dtype)

    down = draw((rank, columns))
    return draw((rows, rank)), down
