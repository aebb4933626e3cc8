"""Tensor trains of one update: through its inputs, then its outputs, or through both at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, from_host, namespace
from lowrank_sp.adapters.forms._chains import (
    absorbed,
    check_cores,
    expanded,
    merged,
    merging_flops,
    modes_of,
)
from lowrank_sp.adapters.forms._draws import Like, template, uniform
from lowrank_sp.adapters.forms._form import Fit, Form
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.tensors.ranks import Rank, tt_rank
from lowrank_sp.tensors.tt import TT
from lowrank_sp.tensors.tt_matrix import TTMatrix
from lowrank_sp.tensors.tt_round import tt_round
from lowrank_sp.tensors.tt_svd import tt_svd

Cores = tuple[Array, ...]
# Against a product of large matrices: the time of a flop where cores are contracted with many
# inputs, which memory bounds, and where they are multiplied out, whose result is put in order.
_CONTRACTION, _MERGING = 2.2, 16.0


@dataclass(frozen=True, repr=False)
class TensorTrain(Form):
    r"""One tensor train through all factors of the inputs, then all of the outputs.

    .. math:: \Delta_{i j} = s\, G_1[j_1] \cdots G_p[j_p]\, H_1[i_1] \cdots H_q[i_q]

    TT-LoRA :cite:p:`anjum2024ttlora`, whose code names inputs and outputs the other way round than
    PyTorch and is right for square layers only. The rank of the update is at most the size of the
    bond in the middle; :class:`TrainMatrix` has no such bound. Rows and columns are numbered in C
    order by ``(i_1, ..., i_q)`` and ``(j_1, ..., j_p)``.

    Attributes
    ----------
    inputs : tuple of arrays of shape (r, n_k, r')
        ``G_k``, which begin with a bond of size 1.
    outputs : tuple of arrays of shape (r, m_k, r')
        ``H_k``, which end with a bond of size 1.
    scale : float
        ``s``: ``alpha`` itself, not divided by the rank.

    Notes
    -----
    Either half is contracted core by core or multiplied out first, whichever takes fewer flops for
    the number of inputs: ``2 (m + n) r`` flops an input for many of them.

    Examples
    --------
    >>> form = TensorTrain.create((12, 8), rank=2, order=2, rng=0)
    >>> form
    TensorTrain(inputs.0 1 x 2 x 2, inputs.1 2 x 4 x 2, outputs.0 2 x 3 x 2, outputs.1 2 x 4 x 1)
    >>> form.delta()
    LowRank(12 x 8, rank 2, float64)
    """

    inputs: Trained[Cores, "..."]
    outputs: Trained[Cores, "..."]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cores(type(self).__name__, (*self.inputs, *self.outputs), 3)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: Rank,
        *,
        order: int = 3,
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """Uniform cores of unit norm, so that the update is not zero.

        Parameters
        ----------
        weight
        rank : int, or sequence of int
            Of the bonds, as :func:`~lowrank_sp.tensors.ranks.tt_rank` reads it.
        order : int
            How many factors the number of inputs, and that of outputs, is split into.
        inputs, outputs : sequence of int, optional
            These factors themselves; by default those of :func:`factorized`.
        """
        (m, n), like = template(weight)
        inputs = modes_of(inputs, n, order, "inputs")
        outputs = modes_of(outputs, m, order, "outputs")
        bonds = tt_rank(rank, (*inputs, *outputs))
        generator = np.random.default_rng(rng)
        cores = _unit_cores((*inputs, *outputs), bonds, like, generator)
        return cls(cores[: len(inputs)], cores[len(inputs) :], scale)

    @classmethod
    def create_tt_svd(
        cls,
        weight: Like,
        rank: Rank,
        *,
        order: int = 3,
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """TT-SVD of a matrix that is uniform on ``+-sqrt(2 / (3 n))``: the other published start.

        Parameters as for :meth:`create`.
        """
        (m, n), like = template(weight)
        matrix = uniform((m, n), math.sqrt(2 / (3 * n)), like, rng)
        form = fit_tensor_train(matrix, rank, order=order, inputs=inputs, outputs=outputs).form
        return cls(form.inputs, form.outputs, scale)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = (math.prod(c.shape[1] for c in part) for part in (self.outputs, self.inputs))
        return m, n

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.outputs[0].shape[0])

    def delta(self) -> LowRank:
        left = merged(self.outputs)[:, :, 0].mT * self.scale
        return LowRank(left, merged(self.inputs)[0, :, :].mT)

    def apply(self, x: Array) -> Array:
        xp, lead = namespace(x), tuple(x.shape[:-1])
        rows = xp.reshape(x, (math.prod(lead), x.shape[-1]))
        y = expanded(absorbed(rows, self.inputs) * self.scale, self.outputs)
        return xp.reshape(y, (*lead, y.shape[1]))


def fit_tensor_train(
    delta: Any,
    rank: Rank | None = None,
    *,
    tol: float | None = None,
    order: int = 3,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
) -> Fit:
    """:class:`TensorTrain` of a given update, by TT-SVD.

    Parameters
    ----------
    delta : array of shape (m, n), LowRank or SVD
        A factored update is never multiplied out: its factors are made trains, joined, and rounded.
    rank, tol
        As in :func:`~lowrank_sp.tensors.tt_svd.tt_svd`.
    order, inputs, outputs
        As for :meth:`TensorTrain.create`.

    Returns
    -------
    Fit
        The form at scale 1, and the Frobenius norm of the difference: at most the square root of
        the number of bonds times the least possible.

    Examples
    --------
    >>> import numpy as np
    >>> w = LowRank(np.ones((8, 1)), np.ones((1, 12)))
    >>> form, error = fit_tensor_train(w, tol=1e-10)
    >>> form.delta().rank, error < 1e-13
    (1, True)
    """
    m, n = delta.shape
    inputs = modes_of(inputs, n, order, "inputs")
    outputs = modes_of(outputs, m, order, "outputs")
    if isinstance(delta, Factored):
        left, right = (as_compute(part) for part in delta.factors())
        xp = namespace(left)
        head = tt_svd(xp.reshape(right.mT, (*inputs, delta.rank))).cores
        tail = tt_svd(xp.reshape(left.mT, (delta.rank, *outputs))).cores
        middle = head[-1][:, :, 0] @ tail[0][0, :, :]
        first = xp.reshape(
            middle @ xp.reshape(tail[1], (middle.shape[1], -1)), (-1, *tail[1].shape[1:])
        )
        train = tt_round(TT((*head[:-1], first, *tail[2:])), rank, tol=tol)
    else:
        xp = namespace(delta)
        train = tt_svd(xp.reshape(delta.mT, (*inputs, *outputs)), rank, tol=tol)
    cores = tuple(train.cores)
    form = TensorTrain(cores[: len(inputs)], cores[len(inputs) :])
    return Fit(form, float(train.error or 0.0))


@dataclass(frozen=True, repr=False)
class TrainMatrix(Form):
    r"""A tensor train whose cores hold a factor of the inputs and one of the outputs each.

    .. math:: \Delta_{i j} = s\, G_1[i_1, j_1] \cdots G_N[i_N, j_N]

    A matrix product operator, the interleaved variant of :class:`TensorTrain`. With bonds of size 1
    it is a Kronecker product; its rank is not bounded by that of one bond, and may be full.

    Attributes
    ----------
    cores : tuple of arrays of shape (r, m_k, n_k, r')
    scale : float

    Notes
    -----
    The cores are contracted with the inputs one by one, unless multiplying them out takes less
    time for the number of inputs.

    Examples
    --------
    >>> form = TrainMatrix.create((12, 8), rank=2, order=2, rng=0)
    >>> form, form.rank_bound
    (TrainMatrix(cores.0 1 x 3 x 2 x 2, cores.1 2 x 4 x 4 x 1), 8)
    """

    cores: Trained[Cores, "..."]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cores(type(self).__name__, self.cores, 4)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: Rank,
        *,
        order: int = 3,
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        scale: float = 1.0,
        rng: RNG = None,
    ) -> Self:
        """Uniform cores of unit norm, so that the update is not zero.

        Parameters as for :meth:`TensorTrain.create`; there are equally many inputs and outputs.
        """
        (m, n), like = template(weight)
        inputs = modes_of(inputs, n, order, "inputs")
        outputs = modes_of(outputs, m, order, "outputs")
        if len(inputs) != len(outputs):
            raise ValueError(
                f"inputs and outputs must be equally many factors, got {inputs} and {outputs}"
            )
        pairs = list(zip(outputs, inputs, strict=True))
        bonds = tt_rank(rank, [a * b for a, b in pairs])
        flat = _unit_cores([a * b for a, b in pairs], bonds, like, np.random.default_rng(rng))
        xp = namespace(like)
        cores = [
            xp.reshape(c, (c.shape[0], *pair, c.shape[2]))
            for c, pair in zip(flat, pairs, strict=True)
        ]
        return cls(tuple(cores), scale)

    @property
    def shape(self) -> tuple[int, int]:
        # Lists: torch.compile does not take generators into products.
        return (
            math.prod([c.shape[1] for c in self.cores]),
            math.prod([c.shape[2] for c in self.cores]),
        )

    @property
    def rank_bound(self) -> int:
        # A sum over the bonds of Kronecker products.
        terms = math.prod(c.shape[3] for c in self.cores)
        return min(*self.shape, terms * math.prod(min(c.shape[1:3]) for c in self.cores))

    def delta(self) -> TTMatrix:
        return TTMatrix((self.cores[0] * self.scale, *self.cores[1:]))

    def apply(self, x: Array) -> Array:
        xp, lead = namespace(x), tuple(x.shape[:-1])
        count, delta = math.prod(lead), self.delta()
        rows = xp.reshape(x, (count, x.shape[-1]))
        if _CONTRACTION * self._contraction_flops() * count <= self._dense_flops(count):
            y = delta.matmul(rows.mT).mT
        else:
            y = rows @ delta.to_dense().mT
        return xp.reshape(y, (*lead, y.shape[1]))

    def _contraction_flops(self) -> int:
        """Of the products of all cores with one input, halved."""
        done, left, total = 1, self.shape[1], 0
        for core in self.cores:
            r, m, n, s = core.shape
            left //= n
            total += done * m * s * r * n * left
            done *= m
        return total

    def _dense_flops(self, count: int) -> float:
        """Of the matrix and its product with ``count`` inputs, halved, in time of the latter."""
        return _MERGING * merging_flops(self.cores) + count * math.prod(self.shape)


def _unit_cores(
    modes: Sequence[int], bonds: Sequence[int], like: Array, rng: np.random.Generator
) -> Cores:
    draws = [
        rng.uniform(-1.0, 1.0, (r, n, s)) for n, (r, s) in zip(modes, pairwise(bonds), strict=True)
    ]
    return tuple(from_host(draw / np.linalg.norm(draw), like, like.dtype) for draw in draws)
