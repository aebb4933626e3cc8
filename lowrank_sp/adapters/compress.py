r"""Weights in two factors, and the ranks that a budget of parameters buys.

A layer :math:`W` (``m x n``) becomes :math:`W' = B A` of rank ``r``, with ``r (m + n)`` parameters
instead of ``m n``. What it costs is :math:`\mathbb{E} \lVert (W - W') x \rVert^2 = \sum_{i > r}
\sigma_i^2` of the singular values of :math:`W M`, for any root :math:`M` of the second moment of
the inputs; so the ranks of all layers are chosen from these spectra, before anything is compressed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, device, namespace, to_host
from lowrank_sp.adapters.initializers._start import check_finite, checked
from lowrank_sp.linalg.svd import singular_values
from lowrank_sp.linalg.weighted import Weighted, checked_scales, data_root, projected


def svd_llm(
    weight: Array,
    rank: int,
    *,
    second_moment: Array | None = None,
    inputs: Array | None = None,
    rng: RNG = None,
) -> Weighted:
    r"""SVD-LLM: the matrix of given rank that keeps most of the outputs.

    .. math:: \min_{\operatorname{rank} W' \le r} \; \mathbb{E}\, \lVert (W - W') x \rVert^2

    From the Cholesky factor of the second moment, or from a QR factorization of the samples
    themselves, which does not square their condition number. Either way :math:`W' = U_r U_r^H W`,
    so that no factor is inverted :cite:p:`wang2025svdllm,parkina2025coala`.

    Parameters
    ----------
    weight : array, shape (m, n)
        In the layout of ``torch.nn.Linear``: outputs by inputs.
    rank : int
        In ``1..min(m, n)``. It saves parameters below ``m n / (m + n)``.
    second_moment : array, shape (n, n)
        ``E[x x^H]``, uncentred: see :class:`~lowrank_sp.adapters.statistics.SecondMoment`.
    inputs : array, shape (N, n)
        Samples of ``x`` instead, one a row.
    rng : int, Generator or None

    Returns
    -------
    Weighted
        ``approximation``, a :class:`~lowrank_sp.factors.LowRank`, and ``error``, the square root of
        the minimum.

    Raises
    ------
    ValueError
        If the data are not finite, or too few for the rank: fewer samples, or a second moment of
        lower rank.

    Notes
    -----
    ``O(N n^2 + m n min(N, n))`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> w = rng.standard_normal((40, 30))
    >>> x = rng.standard_normal((99, 30)) * np.linspace(0.1, 3, 30)
    >>> one, error = svd_llm(w, 10, inputs=x, rng=0)
    >>> other, same = svd_llm(w, 10, second_moment=x.T @ x / 99, rng=0)
    >>> bool((one - other).norm() < 1e-10 * one.norm()), bool(np.isclose(error, same))
    (True, True)
    """
    checked(weight, rank, None, None)
    wide, image = _image(weight, second_moment, inputs, rank)
    return projected(wide, image, rank, rng)


def asvd(
    weight: Array, rank: int, *, magnitude: Array, exponent: float = 0.5, rng: RNG = None
) -> Weighted:
    r"""ASVD: columns count by the magnitude of their inputs.

    .. math:: W' = (W D)_r D^{-1}, \qquad D = \operatorname{diag}(\mathbb{E} |x_j|)^\alpha, \qquad
              \text{error } \lVert (W - W') D \rVert_F

    :cite:p:`yuan2023asvd`.

    Parameters
    ----------
    weight, rank, rng
        As in :func:`svd_llm`.
    magnitude : array, shape (n,)
        Not negative: see :class:`~lowrank_sp.adapters.statistics.MeanMagnitude`.
    exponent : float
        :math:`\alpha`, at least 0.
    """
    checked(weight, rank, None, None)
    check_finite(weight)
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be at least 0 and finite, got {exponent}")
    wide = as_compute(weight)
    size = checked_scales(magnitude, wide, "magnitude")
    return projected(wide, wide * size**exponent, rank, rng)


def output_spectrum(
    weight: Array, *, second_moment: Array | None = None, inputs: Array | None = None
) -> Array:
    """All singular values of the outputs of a layer, those of ``W M``, from large to small.

    Those beyond the rank have the error of :func:`svd_llm` as their norm. Accurate to rounding of
    the largest.

    Parameters
    ----------
    weight, second_moment, inputs
        As in :func:`svd_llm`.

    Returns
    -------
    array, shape (min(m, n),)
    """
    checked(weight, 1, None, None)
    _, image = _image(weight, second_moment, inputs, 1)
    xp = namespace(image)
    # A singular moment has a root with fewer columns.
    missing = max(0, min(weight.shape) - image.shape[1])
    zeros = xp.zeros((image.shape[0], missing), dtype=image.dtype, device=device(image))
    return singular_values(xp.concat([image, zeros], axis=1))


@dataclass(frozen=True)
class RankPlan:
    """Ranks of layers that fit a budget of parameters, and the error that they make.

    Attributes
    ----------
    ranks : mapping from layer to int
        Layers to be factorized, each below the rank at which factors take more than the matrix.
    dense : tuple of str
        Layers that stay as they are.
    parameters : int
        What both take together.
    error : float
        Square root of the weighted sum of the squared errors of all layers.
    bound : float
        No ranks within the budget have a smaller error than this.
    """

    ranks: Mapping[str, int]
    dense: tuple[str, ...]
    parameters: int
    error: float
    bound: float


def plan_ranks(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    parameters: int,
    *,
    relative: bool = True,
) -> RankPlan:
    r"""Ranks of all layers at a budget of parameters, from the spectra of their outputs.

    .. math:: \min_r \sum_l c_l \sum_{i > r_l} \sigma_{l,i}^2 \qquad \text{subject to} \qquad
              \sum_l \min\bigl(r_l (m_l + n_l),\, m_l n_l\bigr) \le P, \qquad r_l \ge 1

    with ``c_l`` one, or, if ``relative``, one over the sum of squares of the layer. Triplets are
    taken in the order of what they gain per parameter. The last ones of a layer are taken together
    with all that the matrix itself has beyond them, where that gains more: the layer stays dense.

    Parameters
    ----------
    spectra : mapping from layer to array, shape (min(m, n),)
        From :func:`output_spectrum`: all values, from large to small.
    shapes : mapping from layer to (m, n)
        Of the same layers.
    parameters : int
        The budget: of all these layers together, biases left out.
    relative : bool
        Whether a layer counts by the share of its outputs that is lost.

    Returns
    -------
    RankPlan

    Raises
    ------
    ValueError
        If the budget is below that of rank one everywhere, or spectra are not finite, sorted and
        complete.

    Notes
    -----
    Greedy, on the concave envelopes of the gains: this solves the Lagrangian problem, and is the
    optimum whenever a step ends at the budget, as it does for layers of one shape whose envelopes
    are their gains. What is left of the budget then goes to steps that still fit. The relaxation to
    fractions of a step gives ``bound``. ``O(K log K)`` for ``K`` triplets in all.

    Examples
    --------
    >>> import numpy as np
    >>> spectra = {"q": np.array([4.0, 2.0, 1.0, 0.0]), "v": np.array([3.0, 0.5, 0.0, 0.0])}
    >>> plan = plan_ranks(spectra, {"q": (8, 4), "v": (8, 4)}, 36, relative=False)
    >>> plan.ranks, plan.parameters, plan.error == plan.bound == 1.25**0.5
    ({'q': 2, 'v': 1}, 36, True)
    """
    layers = [_layer(name, spectra, shapes, relative) for name in _names(spectra, shapes)]
    used = sum(layer.least for layer in layers)
    if parameters < used:
        raise ValueError(
            f"a budget of {parameters} parameters cannot be met: rank 1 in every layer takes "
            f"{used}; raise the budget, or leave layers out"
        )
    counts, bound = _greedy(layers, parameters - used)
    counts = _filled(layers, counts, parameters)
    pairs = list(zip(layers, counts, strict=True))
    loss = float(sum(layer.losses[count] for layer, count in pairs))
    return RankPlan(
        {layer.name: int(count) + 1 for layer, count in pairs if count < layer.last},
        tuple(layer.name for layer, count in pairs if count == layer.last),
        int(sum(layer.costs[count] for layer, count in pairs)),
        math.sqrt(loss),
        math.sqrt(min(bound, loss)),
    )


@dataclass(frozen=True)
class _Layer:
    """Choices of one layer, from rank one up to the matrix itself, each with cost and loss."""

    name: str
    costs: np.ndarray
    losses: np.ndarray

    @property
    def last(self) -> int:
        """Index of the matrix itself."""
        return len(self.costs) - 1

    @property
    def least(self) -> int:
        return int(self.costs[0])

    def envelope(self) -> np.ndarray:
        """Indices of the choices on the lower convex envelope of the loss over the cost.

        Ranks are convex already, so it is ranks up to the one from which the chord to the last
        choice falls faster than the next step.
        """
        ranks = np.arange(self.last)
        chords = (self.losses[:-1] - self.losses[-1]) / (self.costs[-1] - self.costs[:-1])
        steps = (self.losses[:-1] - self.losses[1:]) / (self.costs[1:] - self.costs[:-1])
        tangent = int(np.argmax(chords >= steps)) if self.last else 0
        return np.append(ranks[: tangent + 1], self.last) if self.last else np.array([0])


def _names(spectra: Mapping[str, Array], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    if not spectra:
        raise ValueError("there must be at least one layer, got none")
    alone = spectra.keys() ^ shapes.keys()
    if alone:
        raise ValueError(
            f"spectra and shapes must be of the same layers; only one has {sorted(alone)[0]}"
        )
    return list(spectra)


def _layer(
    name: str,
    spectra: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, int]],
    relative: bool,
) -> _Layer:
    m, n = shapes[name]
    s = to_host(spectra[name]).astype(np.float64)
    if s.shape != (min(m, n),):
        raise ValueError(
            f"the spectrum of {name} must have all {min(m, n)} values of shape {m} x {n}, "
            f"got shape {s.shape}"
        )
    if not np.isfinite(s).all() or (s < 0).any() or (np.diff(s) > 0).any():
        raise ValueError(
            f"the spectrum of {name} must be finite, not negative and sorted from large to small"
        )
    # Summed from the small end, so that small tails keep their digits.
    tails = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
    if relative:
        tails /= tails[0] or 1.0
    most = (m * n - 1) // (m + n)  # the largest rank that saves parameters
    ranks = np.arange(1, most + 1)
    return _Layer(name, np.append(ranks * (m + n), m * n), np.append(tails[1 : most + 1], 0.0))


def _greedy(layers: list[_Layer], budget: int) -> tuple[np.ndarray, float]:
    """Choices along the envelopes until a step exceeds the budget; the least loss that could be."""
    corners = [layer.envelope() for layer in layers]
    pairs = list(zip(layers, corners, strict=True))
    costs = np.concatenate([np.diff(layer.costs[at]) for layer, at in pairs])
    gains = np.concatenate([-np.diff(layer.losses[at]) for layer, at in pairs])
    owner = np.repeat(np.arange(len(layers)), [len(at) - 1 for at in corners])
    order = np.argsort(-gains / costs, kind="stable")
    spent = np.cumsum(costs[order])
    within = int(np.searchsorted(spent, budget, side="right"))
    taken = min(within, int(np.count_nonzero(gains > 0)))
    gained = float(np.sum(gains[order[:taken]]))
    if taken < len(order):
        left = budget - (spent[taken - 1] if taken else 0)
        gained += float(gains[order[taken]] * left / costs[order[taken]])
    steps = np.bincount(owner[order[:taken]], minlength=len(layers))
    counts = np.array([at[k] for at, k in zip(corners, steps, strict=True)])
    start = float(sum(layer.losses[0] for layer in layers))
    return counts, max(0.0, start - gained)


def _filled(layers: list[_Layer], counts: np.ndarray, budget: int) -> np.ndarray:
    """Further single steps, the one of most gain per parameter first, while any fits."""
    counts = counts.copy()
    left = budget - sum(int(layer.costs[k]) for layer, k in zip(layers, counts, strict=True))
    while True:
        best, target, density = None, 0, 0.0
        for i, layer in enumerate(layers):
            k = counts[i]
            for choice in {min(k + 1, layer.last), layer.last} - {k}:
                cost = layer.costs[choice] - layer.costs[k]
                gain = (layer.losses[k] - layer.losses[choice]) / cost
                if cost <= left and gain > density:
                    best, target, density = i, choice, gain
        if best is None:
            return counts
        left -= int(layers[best].costs[target] - layers[best].costs[counts[best]])
        counts[best] = target


def _image(
    weight: Array, second_moment: Array | None, inputs: Array | None, least: int
) -> tuple[Array, Array]:
    """The weight in its compute dtype, and ``W M``."""
    check_finite(weight)
    wide = as_compute(weight)
    root = data_root(wide.shape[1], inputs, second_moment, name="second_moment", least=least)
    return wide, wide @ namespace(wide, root).astype(root, wide.dtype)
