"""Layers in shared factors made of updates that are given, and made of fewer parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    compute_dtype,
    device,
    namespace,
    power_of_two,
    wide_dtype,
)
from lowrank_sp.adapters.forms._form import Fit
from lowrank_sp.adapters.forms._grid import LayerGrid, shapes_of
from lowrank_sp.adapters.forms.shared_core import SharedCore
from lowrank_sp.adapters.forms.shared_formats import SharedCP, SharedTT, SharedTucker
from lowrank_sp.factors import Factored, LowRank, check_rank
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.tensors.cp_als import cp_als
from lowrank_sp.tensors.hooi import hooi
from lowrank_sp.tensors.hosvd import st_hosvd
from lowrank_sp.tensors.joint import joint_svd
from lowrank_sp.tensors.ranks import tt_rank, tucker_rank
from lowrank_sp.tensors.tt import TT
from lowrank_sp.tensors.tt_round import tt_round
from lowrank_sp.tensors.tt_svd import tt_svd
from lowrank_sp.tensors.tucker import Tucker

# Columns of the factors that several axes are compressed to first, in units of the rank.
_WIDER = 4


def fit_shared_tt(
    deltas: Sequence[Factored],
    rank: int | Sequence[int],
    *,
    grid: LayerGrid | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
) -> Solution:
    r"""Updates of many layers as one :class:`~lowrank_sp.adapters.forms.SharedTT`.

    .. math:: \min \sum_l \lVert \Delta_l - U C_l V^T \rVert_F^2

    Parameters
    ----------
    deltas : sequence of LowRank or SVD
        The updates, for example ``scale * LowRank(up, down)`` of trained adapters. They are never
        multiplied out.
    rank : int, or K + 1 ints
        Sizes of the bonds.
    grid : LayerGrid, optional
        By default one block a layer, along one axis: a free core for each. What a layer lacks of
        its block, and positions of the grid that no layer has, are fitted as zeros.
    rng, stop
        Of :func:`~lowrank_sp.tensors.joint.joint_svd`.

    Returns
    -------
    Solution
        ``value`` is a :class:`Fit`: the form at scale 1, and the Frobenius norm of what it leaves
        out of all layers together.

    Notes
    -----
    Along one axis this is :func:`~lowrank_sp.tensors.joint.joint_svd`. Along several its core, of
    four times the rank, is the tensor of a :func:`~lowrank_sp.tensors.tt_svd.tt_svd`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u, v = rng.standard_normal((20, 3)), rng.standard_normal((3, 15))
    >>> deltas = [LowRank(u @ rng.standard_normal((3, 3)), v) for _ in range(5)]
    >>> form, error = fit_shared_tt(deltas, rank=3).value
    >>> form.num_trainable, error < 1e-12
    (150, True)
    """
    grid = _checked(deltas, grid)
    bonds = tuple(rank) if isinstance(rank, Sequence) else (rank,) * (len(grid.sizes) + 1)
    if len(bonds) != len(grid.sizes) + 1:
        raise ValueError(
            f"rank must be one number or {len(grid.sizes) + 1} for {len(grid.sizes)} axes, "
            f"got {len(bonds)}"
        )
    single = len(grid.sizes) == 1
    wider = 1 if single else _WIDER
    solution = _compressed(deltas, grid, (bonds[0], bonds[-1]), wider, rng, stop)
    tensor, left, right, size = solution.value
    if single:
        form = SharedTT(left, right.mT, grid, 1.0, (tensor * size,))
    else:
        order = tensor.ndim
        axes = (order - 2, *range(order - 2), order - 1)
        train = namespace(tensor).permute_dims(tensor, axes)
        most = tt_rank(None, train.shape)[1:-1]
        ranks = (1, *map(min, bonds, most), 1)
        form = _of_train(tt_svd(train, ranks), grid, 1.0, left, right.mT)
        form = form.replace({"cores.0": form.cores[0] * size})
    return replace(solution, value=Fit(form, _distance(form, deltas)))


def fit_shared_cp(
    deltas: Sequence[Factored],
    rank: int,
    *,
    grid: LayerGrid | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
) -> Solution:
    """Updates of many layers as one :class:`~lowrank_sp.adapters.forms.SharedCP`.

    Parameters
    ----------
    deltas, grid, rng
        As for :func:`fit_shared_tt`.
    rank : int
        Number of terms.
    stop : Stop
        Of :func:`~lowrank_sp.tensors.cp_als.cp_als`, which decomposes the core of all layers.

    Returns
    -------
    Solution
        As of :func:`fit_shared_tt`; whether the decomposition converged, and why it stopped.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u, v = rng.standard_normal((20, 3)), rng.standard_normal((3, 15))
    >>> deltas = [LowRank(u * rng.standard_normal(3), v) for _ in range(5)]
    >>> form, error = fit_shared_cp(deltas, rank=3, rng=0).value
    >>> form.num_trainable, error < 1e-10
    (120, True)
    """
    grid = _checked(deltas, grid)
    rank = check_rank(rank, max(grid.block), grid.block)
    tensor, left, right, size = _compressed(deltas, grid, (rank, rank), _WIDER, rng, Stop()).value
    solution = cp_als(tensor, rank=rank, rng=rng, stop=stop)
    weights, (*factors, up, down) = solution.value
    root = namespace(weights).astype(weights**0.5 * size**0.5, up.dtype)
    up, down = left @ (up * root), right @ (down * root)
    form = SharedCP(up, down.mT, grid, 1.0, tuple(factors))
    return replace(solution, value=Fit(form, _distance(form, deltas)))


def fit_shared_tucker(
    deltas: Sequence[Factored],
    rank: int | Sequence[int],
    *,
    grid: LayerGrid | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
) -> Solution:
    """Updates of many layers as one :class:`~lowrank_sp.adapters.forms.SharedTucker`.

    Parameters
    ----------
    deltas, grid, rng
        As for :func:`fit_shared_tt`.
    rank : int, or K + 2 ints
        Shape of the core, as :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    stop : Stop
        Of :func:`~lowrank_sp.tensors.hooi.hooi`, which decomposes the core of all layers.

    Returns
    -------
    Solution
        As of :func:`fit_shared_tt`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u, v, cores = (rng.standard_normal(s) for s in ((20, 3), (3, 15), (2, 3, 3)))
    >>> mixed = [np.tensordot(rng.standard_normal(2), cores, 1) for _ in range(5)]
    >>> form, error = fit_shared_tucker([LowRank(u @ c, v) for c in mixed], rank=(2, 3, 3)).value
    >>> form.num_trainable, error < 1e-12
    (133, True)
    """
    grid = _checked(deltas, grid)
    ranks = tucker_rank(rank, (*grid.sizes, *grid.block))
    tensor, left, right, size = _compressed(deltas, grid, ranks[-2:], _WIDER, rng, Stop()).value
    inner = tuple(map(min, ranks, tensor.shape))
    solution = hooi(tensor, rank=inner, rng=rng, stop=stop)
    core, (*factors, up, down) = solution.value
    up, down = left @ up, right @ down
    form = SharedTucker(up, down.mT, grid, 1.0, core * size, tuple(factors))
    return replace(solution, value=Fit(form, _distance(form, deltas)))


def truncate_shared_tt(
    form: SharedTT, rank: int | Sequence[int] | None = None, *, tol: float | None = None
) -> Fit:
    """The same layers with smaller bonds, as in the rank sweeps of MetaTT.

    At every bond the cores on both sides are merged, and parted again by a truncated SVD, with all
    other cores orthogonal: a sweep of the density matrix renormalization group, and
    :func:`~lowrank_sp.tensors.tt_round.tt_round`. Training may go on from the result.

    Parameters
    ----------
    form : SharedTT
    rank : int, or K + 1 ints, optional
        Largest sizes of the bonds.
    tol : float, optional
        Instead: the error of the tensor is at most this part of its norm, both with the positions
        of the grid that no layer has. With neither, only what is superfluous is removed.

    Returns
    -------
    Fit
        The form, and the Frobenius norm of what it leaves out of all layers together.

    Examples
    --------
    >>> start = SharedTT.create_zero_up([(8, 8)] * 4, rank=4, rng=0)
    >>> form, error = truncate_shared_tt(start, rank=2)
    >>> form, error
    (SharedTT(up 8 x 2, down 2 x 8, cores.0 4 x 2 x 2), 0.0)
    """
    xp = namespace(form.up)
    middle = [xp.permute_dims(c, (1, 0, 2)) for c in form.cores]
    train = TT((form.up[None, :, :], *middle, form.down[:, :, None]))
    if isinstance(rank, Sequence):
        rank = (1, *rank, 1)
    smaller = _of_train(tt_round(train, rank, tol=tol), form.grid, form.scale)
    return Fit(smaller, _distance(smaller, _deltas(form)))


def truncate_shared_tucker(
    form: SharedTucker, rank: int | Sequence[int] | None = None, *, tol: float | None = None
) -> Fit:
    """The same layers with a smaller core, by a truncated HOSVD.

    Parameters
    ----------
    form : SharedTucker
    rank : int, or K + 2 ints, optional
        Shape of the core, as :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    tol : float, optional
        Instead: the error of the tensor is at most this part of its norm, as there.

    Returns
    -------
    Fit
        As of :func:`truncate_shared_tt`.

    Examples
    --------
    >>> start = SharedTucker.create([(8, 8)] * 4, rank=3, rng=0)
    >>> truncate_shared_tucker(start, rank=2).form
    SharedTucker(up 8 x 2, down 2 x 8, core 2 x 2 x 2, factors.0 4 x 2)
    """
    whole = Tucker(form.core, (*form.factors, form.up, form.down.mT)).canonical()
    small, rotations = st_hosvd(whole.core, rank, tol=tol)
    factors = [f @ q for f, q in zip(whole.factors, rotations, strict=True)]
    *axes, up, down = factors
    smaller = SharedTucker(up, down.mT, form.grid, form.scale, small, tuple(axes))
    return Fit(smaller, _distance(smaller, _deltas(form)))


def _checked(deltas: Sequence[Any], grid: LayerGrid | None) -> LayerGrid:
    if not all(isinstance(delta, Factored) for delta in deltas):
        raise TypeError("updates must be LowRank or SVD; truncated_svd makes them of arrays")
    grid = LayerGrid.numbered(deltas) if grid is None else grid
    shapes = tuple(shapes_of(deltas))
    if shapes != grid.shapes:
        raise ValueError(f"the grid is for weights of shapes {grid.shapes}, got {shapes}")
    return grid


def _compressed(
    deltas: Sequence[Factored],
    grid: LayerGrid,
    rank: tuple[int, ...],
    wider: int,
    rng: RNG,
    stop: Stop,
) -> Solution:
    """Factors of all blocks and the tensor of their cores: ``(tensor, left, right, size)``.

    The factors are orthonormal, and ``wider`` than the rank, as far as the blocks can use it. The
    tensor is to be multiplied by ``size``, a power of two: it is of about one itself, so that
    squares of its entries do not leave the range of the dtype.
    """
    blocks, size = _of_unit_size(_blocks(deltas, grid))
    total = sum(block.rank for block in blocks)
    sides = [min(n, max(r, min(wider * r, total))) for r, n in zip(rank, grid.block, strict=True)]
    solution = joint_svd(blocks, rank=tuple(sides), rng=rng, stop=stop)
    core, (_, left, right) = solution.value
    tensor = namespace(core).reshape(core, (*grid.sizes, *core.shape[1:]))
    return replace(solution, value=(tensor, left, right, size))


def _blocks(deltas: Sequence[Factored], grid: LayerGrid) -> list[LowRank]:
    """The blocks at all positions of the grid in C order, padded by zeros."""
    u, v = grid.block
    found = {}
    for k, delta in enumerate(deltas):
        (_, b), factors = grid.counts(k), [as_compute(part) for part in delta.factors()]
        for place, index in enumerate(grid.indices[k]):
            i, j = divmod(place, b)
            left, right = factors[0][i * u : (i + 1) * u, :], factors[1][:, j * v : (j + 1) * v]
            found[index] = LowRank(_padded(left, u, 0), _padded(right, v, 1))
    some = next(iter(found.values()))
    empty = LowRank(some.left[:, :1] * 0.0, some.right[:1, :] * 0.0)
    return [found.get(index, empty) for index in product(*map(range, grid.sizes))]


def _of_unit_size(blocks: Sequence[LowRank]) -> tuple[list[LowRank], float]:
    """The blocks over a power of two which makes the largest one about one, and that."""
    powers = [[power_of_two(part) for part in block.factors()] for block in blocks]
    size = max(map(math.prod, powers)) or 1.0
    unit = [
        LowRank(block.left / left * (left * right / size), block.right / right)
        for block, (left, right) in zip(blocks, powers, strict=True)
    ]
    return unit, size


def _padded(part: Array, size: int, axis: int) -> Array:
    if part.shape[axis] == size:
        return part
    xp, shape = namespace(part), list(part.shape)
    shape[axis] = size - shape[axis]
    zeros = xp.zeros(tuple(shape), dtype=part.dtype, device=device(part))
    return xp.concat([part, zeros], axis=axis)


def _of_train(
    train: TT, grid: LayerGrid, scale: float, left: Array = None, right: Array = None
) -> SharedTT:
    """The form of a train ``(u, n_1, ..., n_K, v)``, its ends multiplied by factors if given."""
    first, *middle, last = train.cores
    xp = namespace(first)
    up, down = first[0, :, :], last[:, :, 0]
    up = up if left is None else left @ up
    down = down if right is None else down @ right
    return SharedTT(up, down, grid, scale, tuple(xp.permute_dims(c, (1, 0, 2)) for c in middle))


def _distance(form: SharedCore, deltas: Sequence[Factored]) -> float:
    """Frobenius norm of the layers of a form minus some updates, all together."""
    pairs = zip(_deltas(form), deltas, strict=True)
    # In double precision, for terms of a CP decomposition may be large and cancel.
    return math.hypot(*(float((_wide(x) - _wide(y)).norm()) for x, y in pairs))


def _wide(delta: Factored) -> LowRank:
    xp = namespace(delta.like)
    dtype = wide_dtype(xp, compute_dtype(xp, delta.dtype))
    return LowRank(*(xp.astype(part, dtype) for part in delta.factors()))


def _deltas(form: SharedCore) -> list[LowRank]:
    return [form.layer(k).delta() for k in range(form.num_layers)]
