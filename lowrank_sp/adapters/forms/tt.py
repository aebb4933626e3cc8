"""Tensor trains of one update: of its inputs and outputs, interleaved, or one for each factor."""

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
    factorized,
    merged,
    merging_flops,
)
from lowrank_sp.adapters.forms._draws import Like, normal, template, uniform
from lowrank_sp.adapters.forms._form import Fit, Form
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import Factored, LowRank, check_rank
from lowrank_sp.tensors.ranks import Rank, tt_rank
from lowrank_sp.tensors.tt import TT
from lowrank_sp.tensors.tt_matrix import TTMatrix
from lowrank_sp.tensors.tt_round import tt_round
from lowrank_sp.tensors.tt_svd import tt_svd

Cores = tuple[Array, ...]


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
        inputs = _modes(inputs, n, order, "inputs")
        outputs = _modes(outputs, m, order, "outputs")
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
    inputs = _modes(inputs, n, order, "inputs")
    outputs = _modes(outputs, m, order, "outputs")
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
    The cores are contracted with the inputs one by one, unless multiplying them out takes fewer
    flops for the number of inputs.

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
        inputs = _modes(inputs, n, order, "inputs")
        outputs = _modes(outputs, m, order, "outputs")
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
        return math.prod(c.shape[1] for c in self.cores), math.prod(c.shape[2] for c in self.cores)

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
        if self._contraction_flops() * count <= self._dense_flops(count):
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

    def _dense_flops(self, count: int) -> int:
        """Of the matrix and its product with ``count`` inputs, halved."""
        return merging_flops(self.cores) + count * math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class TrainFactors(Form):
    r"""Plain LoRA whose factors are tensor trains, :math:`\Delta = s B A`.

    LoRETTA_rep :cite:p:`yang2024loretta`. ``A^T`` is a train through the factors of the inputs that
    ends with the rank, ``B^T`` one that begins with the rank. So the update has at most the rank of
    the bonds next to it, too. Published shapes are a table of some sizes; here they follow from
    :func:`factorized`.

    Attributes
    ----------
    downs : tuple of arrays of shape (t, n_k, t')
        The last one of shape ``(t, r, 1)``.
    ups : tuple of arrays of shape (t, m_k, t')
        The first one of shape ``(1, r, t)``.
    scale : float
        ``alpha / r``.

    Examples
    --------
    >>> form = TrainFactors.create((12, 8), rank=3, bond=2, order=2, rng=0)
    >>> form.num_trainable, form.rank_bound
    (52, 2)
    """

    downs: Trained[Cores, "..."]
    ups: Trained[Cores, "..."]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_cores(name, self.downs, 3)
        check_cores(name, self.ups, 3)
        if self.downs[-1].shape[1] != self.ups[0].shape[1]:
            raise ValueError(
                f"the last of downs and the first of ups of {name} must have shape (t, r, 1) and "
                f"(1, r, t), got {tuple(self.downs[-1].shape)} and {tuple(self.ups[0].shape)}"
            )

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        bond: int = 5,
        order: int = 3,
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        alpha: float | None = None,
        rng: RNG = None,
    ) -> Self:
        """Gaussian cores, such that entries of ``A`` have variance ``1 / (n + r)`` or so.

        Parameters
        ----------
        weight, rank, alpha, rng
            As for plain LoRA.
        bond : int
            Size of all bonds, as far as there are entries for it.
        order, inputs, outputs
            As for :meth:`TensorTrain.create`.
        """
        (m, n), like = template(weight)
        rank = check_rank(rank, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        down = (*_modes(inputs, n, order, "inputs"), rank)
        up = (rank, *_modes(outputs, m, order, "outputs"))
        downs = _gaussian_cores(down, bond, 1 / (n + rank), like, generator)
        ups = _gaussian_cores(up, bond, 1 / (m + rank), like, generator)
        return cls(downs, ups, (rank if alpha is None else alpha) / rank)

    @property
    def shape(self) -> tuple[int, int]:
        m = math.prod(c.shape[1] for c in self.ups[1:])
        return m, math.prod(c.shape[1] for c in self.downs[:-1])

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, *self.downs[-1].shape[:2], *self.ups[0].shape[1:])

    def _ends(self) -> tuple[Array, Array]:
        """The cores at the rank, ``(t, r)`` and ``(r, t')``, with the scale."""
        return self.downs[-1][:, :, 0], self.ups[0][0, :, :] * self.scale

    def delta(self) -> LowRank:
        inner, outer = self._ends()
        right = merged(self.downs[:-1])[0, :, :].mT
        left = merged(self.ups[1:])[:, :, 0].mT
        t, rank, s = *inner.shape, outer.shape[1]
        if min(t, s) < rank:
            middle = inner @ outer
            return LowRank(left @ middle.mT, right) if t <= s else LowRank(left, middle.mT @ right)
        return LowRank(left @ outer.mT, inner.mT @ right)

    def apply(self, x: Array) -> Array:
        xp, lead = namespace(x), tuple(x.shape[:-1])
        inner, outer = self._ends()
        rows = xp.reshape(x, (math.prod(lead), x.shape[-1]))
        z = (absorbed(rows, self.downs[:-1]) @ inner) @ outer
        y = expanded(z, self.ups[1:])
        return xp.reshape(y, (*lead, y.shape[1]))


@dataclass(frozen=True, repr=False)
class GeneratedFactors(Form):
    r"""Plain LoRA whose factors are the image of a fixed vector under a tensor train.

    .. math:: (\mathrm{vec}\, A^T, \mathrm{vec}\, B^T) = T z, \qquad \Delta = s B A

    TensorGuide :cite:p:`qi2025tensorguide`: ``T`` is a matrix in tensor-train format that is
    trained, ``z`` a Gaussian vector that is not, and has to be saved.

    Attributes
    ----------
    cores : tuple of arrays of shape (t, m_k, n_k, t')
        ``T``, with ``r (m + n)`` rows.
    latent : array, shape (k,)
        ``z``.
    size : (int, int)
        Shape of the weight.
    scale : float

    Examples
    --------
    >>> form = GeneratedFactors.create((12, 8), rank=2, order=3, rng=0)
    >>> form.delta()
    LowRank(12 x 8, rank 2, float64)
    """

    cores: Trained[Cores, "..."]
    latent: Fixed[Array, "k"]
    size: tuple[int, int]
    scale: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cores(type(self).__name__, self.cores, 4)

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        bond: int = 4,
        order: int = 4,
        width: int = 4,
        scale: float = 0.01,
        rng: RNG = None,
    ) -> Self:
        """Gaussian cores of standard deviation 0.1, so that the update is not zero.

        Parameters
        ----------
        weight, rank
        bond : int
            Size of all bonds.
        order : int
            How many cores there are.
        width : int
            Factor of the length of ``z`` that every core takes.
        """
        (m, n), like = template(weight)
        rank = check_rank(rank, min(m, n), (m, n))
        generator = np.random.default_rng(rng)
        rows = factorized(rank * (m + n), order)
        bonds = (1, *[bond] * (order - 1), 1)
        cores = tuple(
            normal((r, k, width, s), 0.1, like, generator)
            for k, (r, s) in zip(rows, pairwise(bonds), strict=True)
        )
        return cls(cores, normal((width**order,), 1.0, like, generator), (m, n), scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        return math.prod(c.shape[1] for c in self.cores) // sum(self.size)

    def _factors(self) -> tuple[Array, Array]:
        """``B`` and ``A`` with the scale."""
        m, n = self.size
        xp = namespace(self.latent)
        flat = TTMatrix(self.cores).matmul(self.latent[:, None])[:, 0] * self.scale**0.5
        rank = flat.shape[0] // (m + n)
        down = xp.reshape(flat[: n * rank], (n, rank)).mT
        return xp.reshape(flat[n * rank :], (rank, m)).mT, down

    def delta(self) -> LowRank:
        return LowRank(*self._factors())

    def apply(self, x: Array) -> Array:
        up, down = self._factors()
        return (x @ down.mT) @ up.mT


def _modes(modes: Sequence[int] | None, size: int, order: int, name: str) -> tuple[int, ...]:
    if modes is None:
        return factorized(size, order)
    if math.prod(modes) != size or not modes:
        raise ValueError(f"{name} must be factors of {size}, got {tuple(modes)}")
    return tuple(modes)


def _unit_cores(
    modes: Sequence[int], bonds: Sequence[int], like: Array, rng: np.random.Generator
) -> Cores:
    draws = [
        rng.uniform(-1.0, 1.0, (r, n, s)) for n, (r, s) in zip(modes, pairwise(bonds), strict=True)
    ]
    return tuple(from_host(draw / np.linalg.norm(draw), like, like.dtype) for draw in draws)


def _gaussian_cores(
    modes: Sequence[int], bond: int, variance: float, like: Array, rng: np.random.Generator
) -> Cores:
    if bond < 1:
        raise ValueError(f"bond must be at least 1, got {bond}")
    bonds = [min(bond, most) for most in tt_rank(None, modes)]
    share = variance ** (0.5 / len(modes))
    return tuple(
        normal((r, n, s), share / math.sqrt(s), like, rng)
        for n, (r, s) in zip(modes, pairwise(bonds), strict=True)
    )
