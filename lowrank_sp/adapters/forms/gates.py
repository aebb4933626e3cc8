"""Gates on pairs of axes of the inputs: full-rank updates like circuits of two-qubit gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, namespace
from lowrank_sp.adapters.forms._chains import factorized
from lowrank_sp.adapters.forms._draws import Like, kaiming_uniform, template
from lowrank_sp.adapters.forms._form import Form, Start, check_weight
from lowrank_sp.adapters.forms._parts import Fixed, Trained


@dataclass(frozen=True, repr=False)
class PairGates(Form):
    r"""A product of matrices that each act on two axes of the inputs.

    .. math:: \Delta = s \left(T_\theta - T_{\theta_0}\right), \qquad
              T_\theta = \prod_{a < b} I \otimes \theta_{ab} \otimes I

    QuanTA :cite:p:`chen2024quanta`. Inputs are reshaped to axes ``(d_1, ..., d_N)``, and the gate
    of every pair of them, the last pair first, is multiplied along both. The rank may be full. With
    a fixed copy of the first gates the update starts at zero.

    Published for square layers. Here inputs are padded by zeros to ``d_1 ... d_N`` entries, of
    which the first ``m`` are the outputs: the update is a corner of the square one.

    Attributes
    ----------
    gates : tuple of arrays of shape (d_a d_b, d_a d_b)
        For ``(a, b)`` in the order ``(N-1, N), (N-2, N), ..., (1, 2)``; of both axes the later one
        is the faster index.
    start : tuple of arrays of the same shapes
        ``theta_0``, or empty where the weight was shifted by it.
    axes : tuple of N int
        ``d_k``.
    size : (int, int)
        Shape of the weight.
    scale : float

    Notes
    -----
    ``2 d_1 ... d_N sum d_a d_b`` flops an input and copy. Where the update itself takes fewer, for
    many inputs, it is formed.

    Examples
    --------
    >>> form = PairGates.create((8, 8), axes=(2, 2, 2), rng=0)
    >>> form.num_trainable, form.rank_bound, abs(form.delta()).max()
    (48, 8, np.float64(0.0))
    """

    gates: Trained[tuple[Array, ...], "..."]
    start: Fixed[tuple[Array, ...], "..."]
    axes: tuple[int, ...]
    size: tuple[int, int]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = [(self.axes[a] * self.axes[b],) * 2 for a, b in _pairs(len(self.axes))]
        for name, gates in (("gates", self.gates), ("start", self.start)):
            found = [tuple(g.shape) for g in gates]
            if found != wanted and (found or name == "gates"):
                raise ValueError(
                    f"{name} for axes {self.axes} must have shape "
                    f"{', '.join(map(str, wanted))}, got {', '.join(map(str, found))}"
                )
        if math.prod(self.axes) < max(self.size):
            raise ValueError(
                f"the product of axes must be at least {max(self.size)}, got {self.axes}"
            )

    @classmethod
    def create(
        cls,
        weight: Like,
        *,
        order: int = 3,
        axes: Sequence[int] | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """Gates uniform on ``+-1/sqrt(d_a d_b)``, and a fixed copy of them.

        Parameters
        ----------
        weight
        order : int
            How many axes there are, where they are not given: factors of the longer side.
        axes : sequence of int, optional
            With a product of at least ``max(m, n)``.
        """
        shape, like = template(weight)
        axes = factorized(max(shape), order) if axes is None else tuple(axes)
        if len(axes) < 2:
            raise ValueError(f"gates need at least two axes, got {axes}")
        generator = np.random.default_rng(rng)
        sizes = [axes[a] * axes[b] for a, b in _pairs(len(axes))]
        gates = tuple(kaiming_uniform((d, d), like, generator) for d in sizes)
        xp = namespace(like)
        start = tuple(xp.asarray(gate, copy=True) for gate in gates)
        return cls(gates, start, axes, shape, scale)

    @classmethod
    def shifted(
        cls,
        weight: Array,
        *,
        order: int = 3,
        axes: Sequence[int] | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Start:
        """The same start as published: no copy, but a weight that ``T`` of it was taken from.

        Half the flops of :meth:`create`, for a weight that is rounded once more.
        """
        weight = check_weight(weight, cls.__name__)
        form = cls.create(weight, order=order, axes=axes, scale=scale, rng=rng)
        form = cls(form.gates, (), form.axes, form.size, scale)
        return Start(form, form.unmerge(weight))

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        return min(self.size)

    def delta(self) -> Array:
        xp, like = namespace(self.gates[0]), self.gates[0]
        n = self.size[1]
        return self._through(xp.eye(n, dtype=like.dtype, device=device(like))).mT

    def apply(self, x: Array) -> Array:
        xp, lead, (m, n) = namespace(x), tuple(x.shape[:-1]), self.size
        count = math.prod(lead)
        rows = xp.reshape(x, (count, n))
        copies = 2 if self.start else 1
        flops = copies * math.prod(self.axes) * sum(g.shape[0] for g in self.gates)
        direct = count * flops <= n * flops + count * m * n
        y = self._through(rows) if direct else rows @ self.delta().mT
        return xp.reshape(y, (*lead, m))

    def _through(self, rows: Array) -> Array:
        """Rows ``(T, n)`` after the gates, without what the start makes of them: ``(T, m)``."""
        xp, whole = namespace(rows), math.prod(self.axes)
        if whole > self.size[1]:
            pad = (rows.shape[0], whole - self.size[1])
            zeros = xp.zeros(pad, dtype=rows.dtype, device=device(rows))
            rows = xp.concat([rows, zeros], axis=1)
        y = _gated(rows, self.gates, self.axes)
        if self.start:
            y = y - _gated(rows, self.start, self.axes)
        return y[:, : self.size[0]] * self.scale


def _pairs(order: int) -> list[tuple[int, int]]:
    """Pairs of axes in the order of their gates."""
    return list(combinations(range(order - 1, -1, -1), 2))


def _gated(rows: Array, gates: Sequence[Array], axes: Sequence[int]) -> Array:
    """Every gate along its two axes. Axes are moved when the next gate needs them, not back."""
    xp, count = namespace(rows), rows.shape[0]
    part, order = xp.reshape(rows, (count, *axes)), list(range(len(axes)))
    for gate, pair in zip(gates, _pairs(len(axes)), strict=True):
        following = [k for k in order if k not in pair] + sorted(pair)
        part = xp.permute_dims(part, (0, *[1 + order.index(k) for k in following]))
        shape, order = part.shape, following
        part = xp.reshape(xp.reshape(part, (-1, gate.shape[0])) @ gate.mT, shape)
    part = xp.permute_dims(part, (0, *[1 + order.index(k) for k in range(len(axes))]))
    return xp.reshape(part, (count, math.prod(axes)))
