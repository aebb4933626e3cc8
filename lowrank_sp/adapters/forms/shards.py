r"""Small blocks shared by pieces of the input: alone, or times the blocks of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import Array, as_compute, device, namespace
from lowrank_sp.adapters.forms._draws import Like, template, zeros
from lowrank_sp.adapters.forms._entries import Entrywise
from lowrank_sp.adapters.forms._form import Form, check_weight
from lowrank_sp.adapters.forms._parts import Trained, Weight
from lowrank_sp.adapters.forms.compress import tiled
from lowrank_sp.factors import LowRank, check_rank


@dataclass(frozen=True, repr=False)
class SharedShard(Form):
    r"""One shard for all pieces of the input: MiSS :cite:p:`kang2026miss`.

    .. math:: \Delta = \begin{pmatrix} S & S & \dots & S \end{pmatrix}

    cut to the width of the weight: the inputs are summed in groups, every ``r``-th, and multiplied
    by the shard. It is plain LoRA with a fixed ``down`` of ones and zeros. A shard of fewer rows
    than the weight is repeated for further outputs too.

    Attributes
    ----------
    shard : array, shape (p, r)
        ``S``, ``p`` rows where ``p`` divides ``m``.
    size : (int, int)
        Shape ``(m, n)`` of the weight.

    Notes
    -----
    ``n + 2 p r`` flops per input. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> SharedShard(np.array([[1.0, 2.0], [3.0, 4.0]]), (2, 5)).delta().to_dense()
    array([[1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.]])
    """

    shard: Trained[Array, "p r"]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, (m, n) = self.shard.shape[0], self.size
        if m % rows or self.shard.shape[1] > n:
            raise ValueError(
                f"shard of a weight {m} x {n} must have rows that divide {m}, and at most {n} "
                f"columns, got {tuple(self.shard.shape)}"
            )

    @classmethod
    def create(cls, weight: Like, rank: int, *, rows: int | None = None) -> Self:
        """Zero, with a row for every output, or ``rows`` of them for all."""
        size, like = template(weight)
        rank = check_rank(rank, size[1], size)
        return cls(zeros((size[0] if rows is None else rows, rank), like), size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        return min(self.shard.shape)

    def delta(self) -> LowRank:
        xp = namespace(self.shard)
        eye = xp.eye(self.shard.shape[1], dtype=self.shard.dtype, device=device(self.shard))
        return LowRank(tiled(self.shard.mT, self.size[0]).mT, tiled(eye, self.size[1]))

    def apply(self, x: Array) -> Array:
        xp, r = namespace(x), self.shard.shape[1]
        padding = -x.shape[-1] % r
        if padding:
            none = xp.zeros((*x.shape[:-1], padding), dtype=x.dtype, device=device(x))
            x = xp.concat([x, none], axis=-1)
        pieces = xp.reshape(x, (*x.shape[:-1], x.shape[-1] // r, r))
        return tiled(xp.sum(pieces, axis=-2) @ self.shard.mT, self.size[0])


@dataclass(frozen=True, repr=False)
class WeightShards(Entrywise):
    r"""A block of the update is a block of the weight, plus one, times a shard: Bone, or MiSS
    :cite:p:`kang2026miss` by "block affine transformation".

    .. math:: \Delta_{ij} = (W_{ij} + I)\, S_i

    for square blocks of ``r`` rows; all blocks in a row share a shard. The rank is up to
    ``min(m, n)``.

    Attributes
    ----------
    shards : array, shape (m / r, r, r)
        ``S``.
    weight : array, shape (m, n)
        ``W``. The update depends on it: on a merged weight it is another one.

    Notes
    -----
    ``2 m n r`` flops and the products of a dense update, of which a block of rows is formed at a
    time. There is no scale.

    Examples
    --------
    >>> import numpy as np
    >>> form = WeightShards.create(np.arange(8.0).reshape(2, 4), rank=2)
    >>> form.replace({"shards": np.array([[[1.0, 0.0], [0.0, 2.0]]])}).delta()
    array([[ 1.,  2.,  3.,  6.],
           [ 4., 12.,  6., 16.]])
    """  # noqa: D205

    shards: Trained[Array, "p r r"]
    weight: Weight[Array, "m n"]

    def __post_init__(self) -> None:
        super().__post_init__()
        (count, r, _), (m, n) = self.shards.shape, self.weight.shape
        if count * r != m or n % r:
            raise ValueError(
                f"shards of a weight {m} x {n} must have a size that divides both sides, and as "
                f"many as there are in {m}, got {count} of size {r}"
            )

    @classmethod
    def create(cls, weight: Array, rank: int) -> Self:
        """Zero; ``rank`` divides both sides."""
        weight = as_compute(check_weight(weight, cls.__name__))
        (m, n), like = template(weight)
        rank = check_rank(rank, min(m, n), (m, n))
        return cls(zeros((m // rank, rank, rank), like), weight)

    def rows(self, rows: slice) -> Array:
        xp, (_, r, _), n = namespace(self.shards), self.shards.shape, self.weight.shape[1]
        first, last = rows.start // r, -(-rows.stop // r)
        shards = self.shards[first:last, ...]
        blocks = xp.reshape(self.weight[first * r : last * r, :], (last - first, n, r))
        mixed = xp.reshape(blocks @ shards, (last - first, r, n // r, r)) + shards[:, :, None, :]
        whole = xp.reshape(mixed, ((last - first) * r, n))
        return whole[rows.start - first * r : rows.stop - first * r, :]
