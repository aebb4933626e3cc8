r"""The spectrum of the weight, trained in its own singular basis: shifts, or a sparse core.

The basis is stored. Computed again when an adapter is loaded, it would be another one wherever
singular values are close, by whole rotations, and in every sign; the trained numbers mean nothing
without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, from_host, namespace, placed
from lowrank_sp.adapters.forms._draws import normal, zeros
from lowrank_sp.adapters.forms._form import Form, check_weight
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.adapters.forms._sparse import check_places, row_counts, times_sparse
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.svd import truncated_svd


@dataclass(frozen=True, repr=False)
class SpectralShift(Form):
    r"""Singular values moved, vectors fixed: SVDiff :cite:p:`han2023svdiff`.

    .. math:: W + \Delta = U \operatorname{diag}(\max(\sigma + s\,\delta, 0))\, V^H, \qquad
              \Delta = U \operatorname{diag}(\max(s\,\delta, -\sigma))\, V^H

    The second formula is the one computed: it does not lose small shifts of large values.

    Attributes
    ----------
    u : array, shape (m, k)
    s : array, shape (k,)
        ``sigma``.
    vh : array, shape (k, n)
    shift : array, shape (k,)
        ``delta``.
    scale : float
        The authors train at 1, with a learning rate a thousand times the usual one.

    Examples
    --------
    >>> import numpy as np
    >>> form = SpectralShift.create(np.diag([4.0, 2.0]))
    >>> form.replace({"shift": np.array([1.0, -3.0])}).merge(np.diag([4.0, 2.0]))
    array([[5., 0.],
           [0., 0.]])
    """

    u: Fixed[Array, "m k"]
    s: Fixed[Array, "k"]
    vh: Fixed[Array, "k n"]
    shift: Trained[Array, "k"]
    scale: float = 1.0

    @classmethod
    def create(
        cls, weight: Array, rank: int | None = None, *, scale: float = 1.0, rng: RNG = None
    ) -> Self:
        """No shift, in the basis of all triplets, or of the leading ``rank``."""
        u, s, vh = truncated_svd(check_weight(weight, cls.__name__), rank, rng=rng)
        return cls(u, s, vh, namespace(s).zeros_like(s), scale)

    @property
    def rank_bound(self) -> int:
        return self.s.shape[0]

    def delta(self) -> LowRank:
        return LowRank(self.u * self._change(), self.vh)

    def apply(self, x: Array) -> Array:
        return ((x @ self.vh.mT) * self._change()) @ self.u.mT

    def _change(self) -> Array:
        moved = self.shift * self.scale
        return namespace(moved).where(moved > -self.s, moved, -self.s)


@dataclass(frozen=True, repr=False)
class SparseCore(Form):
    r"""A sparse core in the singular basis of the weight: SVFT :cite:p:`lingam2024svft`.

    .. math:: \Delta = \sigma(g)\, U M V^H, \qquad M_{ij} = 0 \text{ outside a fixed support}

    with the logistic function of a trained gate. Nothing is taken from the weight, so a basis of
    fewer than all triplets loses nothing either.

    Attributes
    ----------
    u : array, shape (m, k)
    vh : array, shape (k, n)
    places : integer array, shape (z,)
        Where the entries of ``M`` stand, ``i k + j`` for row ``i`` and column ``j``: sorted and
        distinct.
    values : array, shape (z,)
    gate : array, shape (1,)
    counts : tuple of int
        How many rows have a first entry, a second one, and so on; found if not given.

    Notes
    -----
    ``2 k (m + n)`` flops per input for the basis and ``2 z`` for the core: twice those of the
    weight, if it is square and all of its triplets are taken.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.diag([4.0, 2.0, 1.0])
    >>> form = SparseCore.create(weight, places=banded_places(3, 1, like=weight), rng=0)
    >>> form.num_trainable, form.counts
    (8, (3, 3, 1))
    >>> np.flatnonzero(form.core_matrix() == 0)
    array([2, 6])
    """

    u: Fixed[Array, "m k"]
    vh: Fixed[Array, "k n"]
    places: Fixed[Array, "z"]
    values: Trained[Array, "z"]
    gate: Trained[Array, "1"]
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.u.shape[1]
        places = check_places(self.places, (size, size))
        object.__setattr__(self, "counts", row_counts(places, size))

    @classmethod
    def create(
        cls, weight: Array, rank: int | None = None, *, places: Array, rng: RNG = None
    ) -> Self:
        """Values of variance ``2 / z`` and ``sigma(g) = 1/2``: an update that is not zero.

        So it is published. For a start at zero, replace ``values``.

        Parameters
        ----------
        weight : array, shape (m, n)
        rank : int, optional
            Of the leading triplets only; by default all, ``min(m, n)``.
        places : integer array, shape (z,)
            In a core of ``rank`` rows and columns: from :func:`banded_places`,
            :func:`~lowrank_sp.updates.factorized.random_support` or
            :func:`~lowrank_sp.adapters.forms.largest_places`.
        rng : int, Generator or None
        """
        generator = np.random.default_rng(rng)
        f = truncated_svd(check_weight(weight, cls.__name__), rank, rng=generator)
        count = int(places.shape[0])
        values = normal((count,), (2 / max(count, 1)) ** 0.5, f.u, generator)
        return cls(f.u, f.vh, places, values, zeros((1,), f.u))

    @property
    def rank_bound(self) -> int:
        return self.u.shape[1]

    def core_matrix(self) -> Array:
        """``M``, dense, without the gate."""
        size = self.u.shape[1]
        flat = placed(self.values, self.places, size**2)
        return namespace(flat).reshape(flat, (size, size))

    def delta(self) -> LowRank:
        return LowRank(self.u * self._opening(), self._times_core(self.vh.mT).mT)

    def apply(self, x: Array) -> Array:
        return (self._times_core(x @ self.vh.mT) * self._opening()) @ self.u.mT

    def _opening(self) -> Array:
        return 1.0 / (1.0 + namespace(self.gate).exp(-self.gate))

    def _times_core(self, z: Array) -> Array:
        """``z @ M.T`` for ``z`` of shape ``(..., k)``."""
        return times_sparse(z, self.values, self.places, self.counts, self.u.shape[1])


def banded_places(size: int, width: int = 0, *, like: Array) -> Array:
    """Places of a matrix on its diagonal and ``width`` diagonals on each side, row by row.

    Parameters
    ----------
    size : int
        Rows and columns of the matrix.
    width : int
    like : array
        Gives library and device.

    Returns
    -------
    integer array, shape (size * (2 width + 1) - width * (width + 1),)

    Examples
    --------
    >>> import numpy as np
    >>> banded_places(3, 1, like=np.empty(0))
    array([0, 1, 3, 4, 5, 7, 8])
    """
    if not 0 <= width < size:
        raise ValueError(f"width must be in 0..{size - 1} for size {size}, got {width}")
    rows = np.arange(size)[:, None]
    columns = rows + np.arange(-width, width + 1)
    inside = (columns >= 0) & (columns < size)
    return from_host((rows * size + columns)[inside], like, namespace(like).int64)
