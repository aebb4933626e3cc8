"""What an update did to a weight: intruder dimensions, shared directions, where its energy lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lowrank_sp._arrays import RNG, Array, adjoint, frobenius, namespace, to_host
from lowrank_sp.adapters.algebra.sums import Update, checked, factored, resize
from lowrank_sp.factors import SVD, Factored, LowRank
from lowrank_sp.linalg.spectrum import subspace_overlap
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import as_operator


@dataclass(frozen=True)
class Intruders:
    r"""How much the leading singular vectors of an updated weight resemble those of the base.

    With :math:`c_j = \max_i |\langle u_j, u_i^0 \rangle|` over *all* left singular vectors
    of the base, ``similarity <= c <= bound``.

    Attributes
    ----------
    merged : SVD
        Leading triplets of ``weight + delta``.
    similarity : array, shape (k,)
        The maximum over the base vectors at hand.
    bound : array, shape (k,)
        The most that it can be over all: what of :math:`u_j` lies outside their span could be one
        vector. Equal to ``similarity`` if all were at hand.
    threshold : float
        Below it, a direction is an intruder.
    """

    merged: SVD
    similarity: Array
    bound: Array
    threshold: float

    @property
    def certain(self) -> list[int]:
        """Indices ``j`` whose vectors are intruders, whatever the base vectors not at hand are."""
        return [j for j, c in enumerate(to_host(self.bound)) if c < self.threshold]

    @property
    def possible(self) -> list[int]:
        """Indices ``j`` whose vectors resemble none of the base vectors at hand."""
        return [j for j, c in enumerate(to_host(self.similarity)) if c < self.threshold]


def intruders(
    weight: Any,
    delta: Update,
    base: SVD,
    *,
    rank: int = 10,
    threshold: float = 0.5,
    tol: float | None = None,
    rng: RNG = None,
) -> Intruders:
    """Leading directions of ``weight + delta`` that the weight did not have.

    Parameters
    ----------
    weight : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
    delta : LowRank or SVD, shape (m, n)
        In the compute dtype of ``weight``.
    base : SVD
        Triplets of ``weight``. All of them give exact similarities; leading ones give bounds. An
        intruder has most of its length outside of few leading ones, so that with those alone only
        what is *not* an intruder is settled.
    rank : int
        Number of directions to look at.
    threshold : float
        In (0, 1).
    tol, rng
        As in :func:`~lowrank_sp.linalg.svd.truncated_svd`. A direction is found to about
        ``tol s / gap`` for the gap to the next singular value ``s``; equal ones have none.

    Returns
    -------
    Intruders

    Notes
    -----
    One truncated SVD of the sum, which is not formed, and ``2 m k rank`` flops for ``k`` triplets
    of the base :cite:p:`shuttleworth2025lora`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_sp as lr
    >>> weight = np.diag([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    >>> flat = np.full((6, 1), 6**-0.5)
    >>> found = intruders(weight, LowRank(20 * flat, flat.T), lr.truncated_svd(weight), rank=2)
    >>> found.certain
    [0]
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}; it is a cosine")
    update = factored(delta)
    operator = as_operator(weight)
    if not operator.shape == update.shape == base.shape:
        raise ValueError(
            f"weight, update and base must have one shape, got {operator.shape}, {update.shape} "
            f"and {base.shape}"
        )
    merged = truncated_svd(operator + update, rank, tol=tol, rng=rng)
    xp = namespace(merged.u, base.u)
    products = adjoint(base.u) @ merged.u
    similarity = xp.max(abs(products), axis=0)
    bound = similarity
    if base.rank < min(operator.shape):
        outside = xp.linalg.vector_norm(merged.u - base.u @ products, axis=0)
        bound = xp.where(outside > similarity, outside, similarity)
    return Intruders(merged, similarity, bound, threshold)


def reduce_intruders(
    delta: Update,
    found: Intruders,
    *,
    keep: float = 0.75,
    rank: int | None = None,
    tol: float | None = None,
) -> SVD:
    r"""An update whose intruder dimensions are weakened.

    .. math:: \Delta + (\lambda - 1) \sum_{j\ \text{intruder}} \sigma_j u_j v_j^H

    with the triplets of ``weight + delta``, cut back to the rank of ``delta``.

    Parameters
    ----------
    delta : LowRank or SVD, shape (m, n)
    found : Intruders
        Those that are ``certain`` are weakened.
    keep : float
        The share :math:`\lambda` of every intruder that is kept, in [0, 1]: 1 changes nothing.
        (PEFT has the same formula under the name ``mitigation_lambda``, described the other way
        round.)
    rank, tol
        As in :func:`~lowrank_sp.adapters.algebra.sums.resize`; by default the rank of ``delta``.

    Returns
    -------
    SVD
        ``error`` is what cutting the rank took: part of the mitigation may be lost in it.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {keep}; it is the share that is kept")
    update = factored(delta)
    rank = min(update.rank, *update.shape) if rank is None and tol is None else rank
    indices = found.certain
    if indices and keep < 1:
        xp = namespace(found.merged.u)
        u, s, vh = found.merged
        columns = xp.asarray(indices, device=found.merged.device)
        left = xp.take(u, columns, axis=1) * xp.astype(xp.take(s, columns), u.dtype)
        update = update + (keep - 1) * LowRank(left, xp.take(vh, columns, axis=0))
    return resize(update, rank=rank, tol=tol)


class Sides(NamedTuple):
    """A number for the column space and one for the row space."""

    left: float
    right: float


def adapter_overlap(first: Update, second: Update, *, rank: int | None = None) -> Sides:
    """How much of their directions two updates share, from 0 to 1.

    :func:`~lowrank_sp.linalg.spectrum.subspace_overlap` of their left and of their right singular
    vectors.

    Parameters
    ----------
    first, second : LowRank or SVD, shape (m, n)
    rank : int, optional
        Leading vectors to compare; by default all that are above rounding.

    Raises
    ------
    ValueError
        If an update is zero, as before training: it has no directions.

    Examples
    --------
    >>> import numpy as np
    >>> e = np.eye(4)
    >>> adapter_overlap(LowRank(e[:, :2], e[:2]), LowRank(e[:, :2], e[2:]))
    Sides(left=1.0, right=0.0)
    """
    pairs, _ = checked([first, second], None)
    one, two = (_directions(delta, rank) for delta in pairs)
    return Sides(subspace_overlap(one.u, two.u), subspace_overlap(adjoint(one.vh), adjoint(two.vh)))


def base_energy(delta: Update, base: SVD, *, rank: int | None = None) -> Sides:
    r"""Shares of an update's energy that lie in the leading singular subspaces of the base.

    .. math:: \lVert U_k^H \Delta \rVert_F^2 / \lVert \Delta \rVert_F^2, \qquad
              \lVert \Delta V_k \rVert_F^2 / \lVert \Delta \rVert_F^2

    A random update has shares of about ``k / m`` and ``k / n``.

    Parameters
    ----------
    delta : LowRank or SVD, shape (m, n)
    base : SVD, shape (m, n)
        Triplets of the base weight.
    rank : int, optional
        ``k``; by default all of ``base``.

    Raises
    ------
    ValueError
        If the update is zero or of another shape.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_sp as lr
    >>> base = lr.truncated_svd(np.diag([4.0, 3.0, 2.0, 1.0]), rank=2)
    >>> left, right = base_energy(LowRank(np.eye(4, 1), np.ones((1, 4))), base)
    >>> round(left, 12), round(right, 12)
    (1.0, 0.5)
    """
    delta = factored(delta)
    if delta.shape != base.shape:
        raise ValueError(f"update and base must have one shape, got {delta.shape} and {base.shape}")
    base = base.truncate(rank)
    f = _directions(delta, None)
    s = namespace(f.u).astype(f.s / float(f.s[0]), f.u.dtype)
    norm = frobenius(s)
    left = frobenius(adjoint(base.u) @ (f.u * s))
    right = frobenius((s[:, None] * f.vh) @ adjoint(base.vh))
    return Sides((left / norm) ** 2, (right / norm) ** 2)


def _directions(delta: Factored, rank: int | None) -> SVD:
    """Triplets of an update that are above its rounding."""
    f = resize(delta)
    xp = namespace(f.s)
    resolved = int(xp.sum(xp.astype(f.s > f.bounds, xp.int32)))
    if resolved == 0:
        raise ValueError("an update that is zero has no directions; was the adapter trained?")
    return f.truncate(resolved if rank is None else min(rank, resolved))
