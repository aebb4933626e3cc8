"""How a budget of ranks is shared out over layers, at one scale for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, to_host
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import as_operator


@dataclass(frozen=True)
class Allocation:
    """Ranks and alphas of layers; both together, since the scale of a layer is their ratio.

    Attributes
    ----------
    rank_pattern : dict from str to int
        Layers that get an adapter, with its rank.
    alpha_pattern : dict from str to float
        Of the same layers.
    dropped : tuple of str
        Layers that get none.
    """

    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        alone = self.rank_pattern.keys() ^ self.alpha_pattern.keys()
        if alone:
            raise ValueError(
                "rank_pattern and alpha_pattern must name the same layers, or their scale changes "
                f"silently; only one of them names {', '.join(sorted(alone))}"
            )

    def scales(self) -> dict[str, float]:
        """``alpha / rank`` of every layer."""
        return {name: self.alpha_pattern[name] / rank for name, rank in self.rank_pattern.items()}


def allocate_by_variance(
    explained: Mapping[str, Array],
    rank: int,
    *,
    alpha: float | None = None,
    largest: float = 2.0,
) -> Allocation:
    """Ranks by the variance of the inputs that they explain: the rule of EVA.

    The budget, ``rank`` times the number of layers, goes to the largest of all shares, whatever
    their layer :cite:p:`paischer2024eva`.

    Parameters
    ----------
    explained : mapping from layer to array, shape (k,)
        Shares of the leading directions, as
        :attr:`~lowrank_sp.adapters.statistics.InputPCA.explained`.
    rank : int
        On average over the layers.
    alpha : float, optional
        Of a layer of rank ``rank``; by default ``rank``. Every layer gets the scale
        ``alpha / rank``.
    largest : float
        No layer gets more than ``largest * rank``.

    Returns
    -------
    Allocation
        Of the whole budget, where the shares given suffice for it.

    Examples
    --------
    >>> import numpy as np
    >>> shares = {"q": np.array([0.6, 0.3]), "v": np.array([0.2, 0.1])}
    >>> allocate_by_variance(shares, rank=1, alpha=4)
    Allocation(rank_pattern={'q': 2}, alpha_pattern={'q': 8.0}, dropped=('v',))
    """
    return _pooled({k: to_host(v) for k, v in explained.items()}, rank, alpha, largest)


def allocate_by_energy(
    spectra: Mapping[str, Array],
    rank: int,
    *,
    alpha: float | None = None,
    largest: float = 2.0,
    relative: bool = True,
) -> Allocation:
    """Ranks by the energy of the singular values of the weights.

    Of all allocations of the budget this one keeps most of ``sum_l ||W_l||_F^2``, or, if
    ``relative``, of the mean share of every layer.

    Parameters
    ----------
    spectra : mapping from layer to array, shape (k,)
        Singular values, from large to small; all of them if ``relative``, for their sum is needed.
    rank, alpha, largest
        As in :func:`allocate_by_variance`.
    relative : bool
        Whether the energy of a layer is divided by that of all its values.
    """
    scores = {}
    for name, s in spectra.items():
        energy = to_host(s).astype(np.float64) ** 2
        scores[name] = energy / (energy.sum() or 1.0) if relative else energy
    return _pooled(scores, rank, alpha, largest)


def allocate_by_sensitivity(
    gradients: Mapping[str, Any],
    rank: int,
    *,
    alpha: float | None = None,
    largest: float = 2.0,
    rng: RNG = None,
) -> Allocation:
    """Ranks by how much the loss falls along the best rank-``r_l`` parts of the gradients.

    To first order a step along ``(G_l)_{r_l}`` lowers the loss by ``sum_l ||(G_l)_{r_l}||_F^2``
    per unit of the learning rate, and this allocation maximizes that sum.

    Parameters
    ----------
    gradients : mapping from layer to array or operator, shape (m, n)
        Mean gradients: see :class:`~lowrank_sp.adapters.statistics.MeanGradient`.
    rank, alpha, largest
        As in :func:`allocate_by_variance`.
    rng : int, Generator or None
    """
    _check_budget(rank, largest)
    scores = {}
    for name, gradient in gradients.items():
        operator = as_operator(gradient)
        count = min(math.floor(largest * rank), *operator.shape)
        try:
            f = truncated_svd(gradient, count, rng=rng)
        except ValueError as error:
            raise ValueError(f"gradient of {name}: {error}") from error
        scores[name] = to_host(f.s).astype(np.float64) ** 2
    return _pooled(scores, rank, alpha, largest)


def _check_budget(rank: int, largest: float) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}; it multiplies the rank")


def _pooled(
    scores: Mapping[str, np.ndarray], rank: int, alpha: float | None, largest: float
) -> Allocation:
    """Give one rank each to the ``rank * layers`` largest scores; ties go to earlier layers."""
    _check_budget(rank, largest)
    if not scores:
        raise ValueError("there must be at least one layer, got none")
    for name, values in scores.items():
        if not np.isfinite(values).all() or (np.diff(values) > 0).any():
            raise ValueError(f"values of {name} must be finite and sorted from large to small")
    most = math.floor(largest * rank)
    names = list(scores)
    capped = [scores[name][:most] for name in names]
    owner = np.repeat(np.arange(len(names)), [len(values) for values in capped])
    pooled = np.concatenate(capped)
    order = np.argsort(-pooled, kind="stable")[: rank * len(names)]
    counts = np.bincount(owner[order[pooled[order] > 0]], minlength=len(names))
    scale = 1.0 if alpha is None else alpha / rank
    ranks = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
    return Allocation(
        ranks,
        {name: scale * count for name, count in ranks.items()},
        tuple(name for name in names if name not in ranks),
    )
