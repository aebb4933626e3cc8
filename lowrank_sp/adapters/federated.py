r"""Federated aggregation: the adapters of many clients as one, and the error that this makes.

A client ``k`` trained ``scale * up_k @ down_k`` on a common base weight. What a server wants is the
weighted mean of the updates,

.. math:: D^* = \sum_k p_k \, s \, B_k A_k, \qquad \sum_k p_k = 1

whose rank is up to the sum ``R`` of all ranks. The methods differ in how they come back to an
adapter. Each is a function of the clients' adapters and weights that returns :class:`Aggregate`,
with the distance of ``D*`` from what the clients will get. Nothing of size ``m x n`` is formed: the
memory is ``O((m + n) R)``, and so are the flops of every average; the errors of inexact methods
cost ``O((m + n) R min(R, m, n))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    eps,
    frobenius,
    max_abs,
    namespace,
    slices,
)
from lowrank_sp.adapters._products import check_alike, products_of
from lowrank_sp.adapters.algebra.sums import weighted_sum
from lowrank_sp.adapters.forms import Product
from lowrank_sp.factors import SVD, LowRank, check_rank
from lowrank_sp.linalg.svd import truncated_svd

# Rows of a product that are formed at a time.
_ROWS = 256


@dataclass(frozen=True)
class Aggregate:
    """What the clients get after a round.

    Attributes
    ----------
    adapter : Product or None
        The adapter from which a client goes on; None where it begins a new one.
    correction : LowRank or None
        What a client adds to its base weight.
    error : float
        Frobenius norm of ``D* - update()``, computed from factors.
    """

    adapter: Product | None
    correction: LowRank | None
    error: float

    def update(self) -> LowRank:
        """By how much the weight has changed: the correction and the adapter."""
        parts = [self.correction, None if self.adapter is None else self.adapter.delta()]
        first, *rest = [part for part in parts if part is not None]
        return sum(rest, first)


def fedit(adapters: Sequence[Any], weights: Sequence[float] | None = None) -> Aggregate:
    r"""Mean of the factors, one by one.

    .. math:: \bar B = \sum_k p_k B_k, \quad \bar A = \sum_k p_k A_k, \qquad
              D^* - s \bar B \bar A = s \sum_k p_k (B_k - \bar B)(A_k - \bar A)

    The bias is the covariance of the factors over the clients, of rank up to ``R``.

    Parameters
    ----------
    adapters : sequence
        One per client, of one shape, rank, scale, dtype and array library:
        :class:`~lowrank_sp.adapters.forms.Product`, anything else with ``up``, ``down`` and
        ``scale``, or a ``LowRank`` (of scale 1).
    weights : sequence of float, optional
        ``p_k``: not negative, of sum 1. By default all equal.

    Returns
    -------
    Aggregate
        In the compute dtype of the factors. ``error`` is the norm of the bias
        :cite:p:`zhang2024building`.

    Raises
    ------
    ValueError
        If the adapters do not fit each other, which names the client; if weights do not sum to 1.

    Examples
    --------
    >>> import numpy as np
    >>> one, two = np.eye(2)[:, :1], np.eye(2)[:, 1:]
    >>> a = fedit([Product(one, one.T), Product(two, two.T)])
    >>> a.adapter.up[:, 0], a.error
    (array([0.5, 0.5]), 0.5)
    """
    clients, p = _round(adapters, weights)
    mean = _mean(clients, p)
    return Aggregate(mean, None, _norm(_bias(clients, p, mean)))


def flora(adapters: Sequence[Any], weights: Sequence[float] | None = None) -> Aggregate:
    r"""All factors side by side: ``D*`` itself, folded into the base; clients begin anew.

    .. math:: D^* = [B_1 \cdots B_K] \, [p_1 s_1 A_1; \ldots; p_K s_K A_K]

    Ranks and scales may differ. Exact, at the price of sending rank ``R``
    :cite:p:`wang2024flora`. Parameters and errors are those of :func:`fedit`.
    """
    clients, p = _round(adapters, weights, alike=())
    return Aggregate(None, _ideal(clients, p), 0.0)


def fedex(
    adapters: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    rng: RNG = None,
) -> Aggregate:
    """The mean of :func:`fedit`, and its bias added to the base weight.

    Parameters
    ----------
    adapters, weights
        As in :func:`fedit`.
    rank : int, optional
        Send the best approximation of the bias of this rank instead of all of it, of rank up to
        ``R``.
    rng : int, Generator or None
        For that approximation.

    Returns
    -------
    Aggregate
        Exact without ``rank``; else ``error`` is what the truncation loses
        :cite:p:`singhal2025fedex`.
    """
    clients, p = _round(adapters, weights)
    mean = _mean(clients, p)
    bias = _bias(clients, p, mean)
    if rank is None:
        return Aggregate(mean, bias, 0.0)
    f = _leading(bias, check_rank(rank, min(*bias.shape, bias.rank), bias.shape), rng)
    return Aggregate(mean, f.split(), float(f.error))


def ffa(adapters: Sequence[Any], weights: Sequence[float] | None = None) -> Aggregate:
    """Mean of ``up``, where no client has trained ``down``: exact, since the update is linear.

    :func:`rolora` with ``frozen="down"`` in all rounds :cite:p:`sun2024improving`.
    """
    return rolora(adapters, weights, frozen="down")


def rolora(
    adapters: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    frozen: Literal["up", "down"],
) -> Aggregate:
    """Mean of the factor that was trained, where the other one is the same at every client.

    Rounds alternate between the two, so that both are trained and every round is exact
    :cite:p:`chen2025robust`.

    Parameters
    ----------
    adapters, weights
        As in :func:`fedit`.
    frozen : "up" or "down"
        The factor that nobody trained in this round.

    Raises
    ------
    ValueError
        If a client's frozen factor differs from that of the first one, which names the client.
    """
    if frozen not in ("up", "down"):
        raise ValueError(f"frozen must be 'up' or 'down', got {frozen!r}")
    clients, p = _round(adapters, weights)
    kept = getattr(clients[0], frozen)
    xp = namespace(kept)
    for k, client in enumerate(clients):
        if not bool(xp.all(getattr(client, frozen) == kept)):
            raise ValueError(
                f"{frozen} must be frozen, but that of client {k} differs from client 0's; "
                "aggregate by fedex if both factors were trained"
            )
    return Aggregate(replace(_mean(clients, p), **{frozen: kept}), None, 0.0)


def flexlora(
    adapters: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    rng: RNG = None,
) -> tuple[Aggregate, ...]:
    """Best approximation of ``D*`` of the rank of every client: one SVD, cut at many ranks.

    Parameters
    ----------
    adapters, weights
        As in :func:`fedit`; ranks and scales may differ.
    ranks : sequence of int, optional
        Of the adapter that each client gets; by default of the one that it sent.
    rng : int, Generator or None
        Of the SVD, where ``D*`` has many more terms than are wanted.

    Returns
    -------
    tuple of Aggregate
        One per client. Adapters are balanced and keep the scale of the client, so that its
        ``alpha / rank`` stays as it is :cite:p:`bai2024federated`.
    """
    clients, p = _round(adapters, weights, alike=())
    ideal = _ideal(clients, p)
    wanted = [client.rank for client in clients] if ranks is None else list(ranks)
    if len(wanted) != len(clients):
        raise ValueError(f"ranks must be one per client, got {len(wanted)} for {len(clients)}")
    largest = min(*ideal.shape, ideal.rank)
    wanted = [check_rank(r, largest, ideal.shape) for r in wanted]
    f = _leading(ideal, max(wanted), rng)
    found = [f.truncate(r) for r in wanted]
    return tuple(
        Aggregate(_balanced(part, client.scale), None, float(part.error))
        for part, client in zip(found, clients, strict=True)
    )


def lora_fair(
    adapters: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    regularization: float = 0.01,
) -> Aggregate:
    r"""The mean of ``down``, and the ``up`` that with it comes closest to ``D*``.

    .. math:: \min_{\Delta} \; \lVert D^* - s (\bar B + \Delta) \bar A \rVert_F^2
              + \rho \, \sigma_1(s \bar A)^2 \, \lVert \Delta \rVert_F^2

    Published with a cosine similarity in place of the distance, and gradient steps. In this form
    :math:`\Delta = s E \bar A^H (s^2 \bar A \bar A^H + \rho \sigma_1^2 I)^{-1}` with the bias
    ``E`` of :func:`fedit`, by an SVD of :math:`\bar A`, which does not square its condition number.

    Parameters
    ----------
    adapters, weights
        As in :func:`fedit`.
    regularization : float
        ``rho``, without units; 0 is plain least squares.

    Returns
    -------
    Aggregate
        ``error`` is never above that of :func:`fedit` :cite:p:`bian2025lorafair`.
    """
    if not 0 <= regularization < math.inf:
        raise ValueError(f"regularization must be finite and at least 0, got {regularization}")
    clients, p = _round(adapters, weights)
    mean = _mean(clients, p)
    bias = _bias(clients, p, mean)
    xp = namespace(mean.up)
    u, s, vh = xp.linalg.svd(mean.down, full_matrices=False)
    top = float(s[0])
    keep = s > max(mean.down.shape) * eps(mean.down.dtype) * top
    safe, size = xp.where(keep, s, xp.ones_like(s)), s / (top or 1.0)
    # s_i^2 / (s_i^2 + rho s_1^2) and 1 / s_i times that, 0 for directions that down lacks.
    share = xp.where(keep, size**2, xp.zeros_like(s))
    share = share / (xp.where(keep, size**2, xp.ones_like(s)) + regularization)
    share, inverse = (xp.astype(x, vh.dtype) for x in (share, share / safe))
    along = bias.right @ adjoint(vh)
    step = bias.left @ ((along * inverse) @ adjoint(u)) / mean.scale
    rest = LowRank(bias.left, bias.right - (along * share) @ vh)
    return Aggregate(replace(mean, up=mean.up + step), None, _norm(rest))


def flora_na(
    adapters: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    rng: RNG = None,
) -> Aggregate:
    """The factors nearest to ``D*``: its best approximation of rank ``r``, balanced.

    Parameters
    ----------
    adapters, weights
        As in :func:`fedit`; ranks and scales may differ.
    rank : int, optional
        By default the largest rank of a client.
    rng : int, Generator or None

    Returns
    -------
    Aggregate
        Of the scale of the first client. ``error`` is the least that an adapter of this rank can
        have :cite:p:`nguyen2025flora`.
    """
    clients, p = _round(adapters, weights, alike=())
    rank = max(client.rank for client in clients) if rank is None else rank
    return flexlora(clients, p, ranks=[rank] * len(clients), rng=rng)[0]


def _round(
    adapters: Sequence[Any],
    weights: Sequence[float] | None,
    alike: Sequence[str] = ("rank", "scale"),
) -> tuple[list[Product], list[float]]:
    """The clients in their compute dtype and their weights, checked."""
    clients = products_of(list(adapters), "client")
    check_alike(clients, "client", ("shape", *alike))
    for k, client in enumerate(clients):
        if not math.isfinite(max_abs(client.up) + max_abs(client.down)):
            raise ValueError(f"the factors of client {k} must be finite, got NaN or infinite")
        if client.scale == 0.0 or not math.isfinite(client.scale):
            raise ValueError(f"scales must be finite and not 0, got {client.scale} of client {k}")
    if weights is None:
        return clients, [1 / len(clients)] * len(clients)
    p = [float(weight) for weight in weights]
    if len(p) != len(clients):
        raise ValueError(f"weights must be one per client, got {len(p)} for {len(clients)}")
    if not all(0 <= weight < math.inf for weight in p):
        raise ValueError(f"weights must be finite and not negative, got {min(p)}")
    total = math.fsum(p)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"weights must sum to 1, got {total:g}; divide them by their sum")
    # What is left is their rounding, which no formula here allows for.
    return clients, [weight / total for weight in p]


def _mean(clients: Sequence[Product], p: Sequence[float]) -> Product:
    """The means of both factors."""

    def mean(factors: Sequence[Array]) -> Array:
        total = p[0] * factors[0]
        for weight, factor in zip(p[1:], factors[1:], strict=True):
            total = total + weight * factor
        return total

    up, down = mean([c.up for c in clients]), mean([c.down for c in clients])
    return Product(up, down, clients[0].scale)


def _ideal(clients: Sequence[Product], p: Sequence[float]) -> LowRank:
    """``D*``, of rank ``R``."""
    return weighted_sum([client.delta() for client in clients], p)


def _bias(clients: Sequence[Product], p: Sequence[float], mean: Product) -> LowRank:
    """``D*`` minus the product of the means, as a covariance: nothing cancels."""
    moved = [Product(c.up - mean.up, c.down - mean.down, c.scale) for c in clients]
    return _ideal(moved, p)


def _leading(a: LowRank, rank: int, rng: RNG) -> SVD:
    """``rank`` triplets and their error: of few terms exactly, of many by a Krylov space."""
    if a.rank <= min(4 * rank, *a.shape):
        return replace(a.svd(), error=0.0).truncate(rank)
    f = truncated_svd(a, rank, rng=rng)
    left = a.left - f.u @ (adjoint(f.u) @ a.left)
    # The best right factor for these left vectors, so that what is left out is orthogonal to it.
    f = LowRank(f.u, (adjoint(f.u) @ a.left) @ a.right).svd()
    return replace(f, error=_norm(LowRank(left, a.right)))


def _balanced(f: SVD, scale: float) -> Product:
    pair = f.split()
    root = abs(scale) ** -0.5
    return Product(pair.left * math.copysign(root, scale), pair.right * root, scale)


def _norm(a: LowRank) -> float:
    """Frobenius norm: of triangular factors, or of the entries by blocks, whichever is cheaper."""
    m, n = a.shape
    if 4 * (m + n) * a.rank < m * n:
        return float(a.norm())
    left, right = a.factors()
    return math.hypot(*(frobenius(left[rows, :] @ right) for rows in slices(m, _ROWS)))
