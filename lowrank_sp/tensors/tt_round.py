"""Rounding of tensor trains: fewer ranks for nearly the same tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    eps,
    frobenius,
    namespace,
    standard_normal,
    to_host,
)
from lowrank_sp.gauge import fix_signs
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.ranks import Rank, check_truncation, tt_rank
from lowrank_sp.tensors.subspace import rank_within
from lowrank_sp.tensors.tt import TT, mirrored, right_orthogonal, tall, times, wide

# Columns of the sketch that the error is estimated from.
_PROBES = 16


def tt_round(train: TT, rank: Rank | None = None, *, tol: float | None = None) -> TT:
    """Tensor train of smaller ranks, by orthogonalization and truncated SVDs of its cores.

    Parameters
    ----------
    train : TT
    rank : int, sequence of int, or float, optional
        As :func:`~lowrank_sp.tensors.ranks.tt_rank` reads it; ranks that are smaller already stay.
    tol : float, optional
        Instead of ``rank``: the error is at most ``tol`` times the norm. With neither, only what is
        superfluous to rounding is removed.

    Returns
    -------
    TT
        Left-orthogonal up to the last core. ``error`` is the Frobenius norm of the difference, and
        at most ``sqrt(N - 1)`` times the best that these ranks can do.

    Notes
    -----
    ``O(N n r^3)`` flops; no dense tensor :cite:p:`oseledets2011tensor`.

    Examples
    --------
    >>> import numpy as np
    >>> t = TT([np.ones((1, 5, 1))] * 4)
    >>> tt_round(t + t).rank
    (1, 1, 1, 1, 1)
    """
    check_truncation(rank, tol)
    ranks = tt_rank(rank, train.shape)
    if rank is None and tol is None:
        tol = 100 * eps(train.dtype)
    host = train.map(on_host)
    return moved(_truncated(right_orthogonal(host.cores), ranks, tol), train.cores[0])


def tt_round_randomized(
    train: TT | Sequence[TT], rank: Rank, *, oversampling: int | None = None, rng: RNG = None
) -> TT:
    """Tensor train of smaller ranks for a train or a sum of trains, by a random sketch.

    The train is contracted with a random one from the right; its cores, multiplied by what remains,
    show their ranges, and only small cores are ever orthogonalized.

    Parameters
    ----------
    train : TT, or sequence of TT
        A sequence stands for its sum, which is not formed.
    rank : int, sequence of int, or float
        As :func:`~lowrank_sp.tensors.ranks.tt_rank` reads it.
    oversampling : int, optional
        By how much the ranks of the sketch exceed those asked for, before they are truncated. By
        default half of them and at least 10, which keeps the expected error at one bond within
        ``3^(1/2)`` of the least.
    rng : int, Generator or None

    Returns
    -------
    TT
        ``error`` estimates the Frobenius norm of the difference, from 16 random probes.

    Notes
    -----
    ``O(N n r^2 l)`` flops for ranks ``l`` of the sketch, where :func:`tt_round` needs
    ``O(N n r^3)``, and half of that for a sum of two :cite:p:`aldaas2023randomized`.

    Examples
    --------
    >>> import numpy as np
    >>> t = TT([np.ones((1, 5, 1))] * 4)
    >>> s = tt_round_randomized([t, t], 1, rng=0)
    >>> s.rank, (s - 2 * t).norm() < 1e-12
    ((1, 1, 1, 1, 1), True)
    """
    trains = [train] if isinstance(train, TT) else list(train)
    if not trains or any(t.shape != trains[0].shape for t in trains):
        shapes = ", ".join(str(t.shape) for t in trains) or "none"
        raise ValueError(f"a sum needs trains of one shape, got {shapes}")
    if oversampling is not None and oversampling < 0:
        raise ValueError(f"oversampling must be at least 0, got {oversampling}")
    shape, like = trains[0].shape, trains[0].cores[0]
    ranks = tt_rank(rank, shape)
    terms = [t.map(on_host).cores for t in trains]
    namespace(*[c for cores in terms for c in cores])
    generator = np.random.default_rng(rng)
    most = tt_rank(None, shape)
    held = [sum(bonds) for bonds in zip(*(t.rank for t in trains), strict=True)]
    extra = [max(10, r // 2) if oversampling is None else oversampling for r in ranks]
    widths = [min(r + p, m, h) for r, p, m, h in zip(ranks, extra, most, held, strict=True)]
    cores = _sketched(terms, [1, *widths[1:-1], 1], generator)
    rounded = TT(mirrored(_truncated(mirrored(cores), ranks[::-1], None).cores))
    error = _difference([*terms, (-rounded).cores], generator)
    return moved(TT(rounded.cores, error), like)


def _truncated(cores: Sequence[Array], ranks: Sequence[int], tol: float | None) -> TT:
    """Truncated SVDs from the left of cores that are right-orthogonal."""
    xp = namespace(*cores)
    cores = list(cores)
    size = frobenius(cores[0])
    budget, error = (tol or 0.0) * size, 0.0
    bonds = len(cores) - 1
    for k in range(bonds):
        q, r = xp.linalg.qr(tall(cores[k]))
        u, s, vh = xp.linalg.svd(r, full_matrices=False)
        sigma = to_host(s).astype(np.float64)
        keep = min(len(sigma), ranks[k + 1])
        if tol is not None:
            left = math.sqrt(max(0.0, budget**2 - error**2) / (bonds - k))
            norm = float(np.linalg.norm(sigma))
            keep = rank_within(sigma, left / norm if norm else 1.0)
        error = math.hypot(error, float(np.linalg.norm(sigma[keep:])))
        columns, vh = fix_signs(q @ u[:, :keep], vh[:keep, :])
        cores[k] = xp.reshape(columns, (*cores[k].shape[:2], keep))
        cores[k + 1] = times(xp.astype(s[:keep], vh.dtype)[:, None] * vh, cores[k + 1])
    return TT(cores, error)


def _contractions(cores: Sequence[Array], sketch: Sequence[Array]) -> list[Array]:
    """Products of the last cores with those of the sketch: ``(r_k, l_k)`` for every bond ``k``."""
    xp = namespace(*cores)
    parts = [xp.ones((1, 1), dtype=cores[0].dtype, device=device(cores[0]))]
    for core, random in zip(reversed(cores), reversed(sketch), strict=True):
        part = xp.reshape(tall(core) @ parts[0], (core.shape[0], -1))
        parts.insert(0, part @ wide(random).mT)
    return parts


def _random_train(
    shape: Sequence[int], ranks: Sequence[int], like: Array, rng: np.random.Generator
) -> list[Array]:
    """Gaussian cores scaled so that contractions keep the size of what they contract."""
    return [
        standard_normal((a, n, b), like=like, rng=rng) * (1.0 / math.sqrt(b))
        for a, n, b in zip(ranks[:-1], shape, ranks[1:], strict=True)
    ]


def _sketched(
    terms: Sequence[Sequence[Array]], widths: Sequence[int], rng: np.random.Generator
) -> tuple[Array, ...]:
    """Left-orthogonal cores of ranks ``widths`` whose train is close to the sum of all terms."""
    like = terms[0][0]
    xp = namespace(like)
    shape = [c.shape[1] for c in terms[0]]
    sketch = _random_train(shape, widths, like, rng)
    parts = [_contractions(cores, sketch) for cores in terms]
    # Cores of all terms with the bases found so far multiplied into their left bonds.
    heads = [cores[0] for cores in terms]
    found = []
    for k in range(len(shape) - 1):
        images = [tall(head) @ part[k + 1] for head, part in zip(heads, parts, strict=True)]
        q, _ = xp.linalg.qr(sum(images[1:], images[0]))
        found.append(xp.reshape(q, (*heads[0].shape[:2], -1)))
        heads = [
            times(adjoint(q) @ tall(head), cores[k + 1])
            for head, cores in zip(heads, terms, strict=True)
        ]
    return (*found, sum(heads[1:], heads[0]))


def _difference(terms: Sequence[Sequence[Array]], rng: np.random.Generator) -> float:
    """Estimate of the norm of the sum of all terms, from its products with a random train."""
    like = terms[0][0]
    shape = [c.shape[1] for c in terms[0]]
    # An open bond on the left counts the probes.
    ranks = [_PROBES] * len(shape) + [1]
    sketch = _random_train(shape, ranks, like, rng)
    images = [_contractions(cores, sketch)[0] for cores in terms]
    # Entries of the last core are not averaged over a bond, and need no scaling.
    return frobenius(sum(images[1:], images[0])) / math.sqrt(_PROBES)
