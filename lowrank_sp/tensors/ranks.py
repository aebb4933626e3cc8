"""What every decomposition checks at its edge: the tensor, its rank or tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lowrank_sp._arrays import Array, as_compute, eps, frobenius, is_array
from lowrank_sp.factors import check_rank

# One number for all modes, one for each, or the fraction of the entries to keep as parameters.
Rank = int | float | Sequence[int]

NOT_FINITE = (
    "the tensor must be finite, got NaN or infinite entries; clean it, or complete it from the "
    "entries that are known"
)


def as_tensor(x: Any) -> tuple[Array, float]:
    """A tensor of at least one mode in its compute dtype, and its Frobenius norm.

    Raises
    ------
    TypeError, ValueError
        If ``x`` is not an array, has no modes or no entries, or is not finite.
    """
    if not is_array(x):
        raise TypeError(f"a tensor must be an array, got {type(x).__name__}; use numpy.asarray")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"a tensor needs a mode and an entry, got shape {tuple(x.shape)}")
    x = as_compute(x)
    norm = frobenius(x)
    if not math.isfinite(norm):
        raise ValueError(NOT_FINITE)
    return x, norm


def scaled(x: Array, norm: float) -> tuple[Array, float]:
    """``x`` divided by a power of two, and that power, where squares of it could leave the range.

    Elsewhere ``x`` itself, which is not copied.
    """
    limit = 1e100 if eps(x.dtype) < 1e-10 else 1e12
    if norm == 0.0 or 1 / limit < norm < limit:
        return x, 1.0
    exponent = math.frexp(norm)[1]
    # Two steps, for the power may leave the range where the quotients do not.
    half = exponent // 2
    return x * 2.0**-half * 2.0 ** (half - exponent), 2.0**exponent


def check_truncation(rank: Rank | None, tol: float | None) -> None:
    """Raise unless at most one of both is given, and ``tol`` lies in (0, 1)."""
    if rank is not None and tol is not None:
        raise ValueError(f"give rank or tol, not both, got rank={rank} and tol={tol}")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol}; it is relative to the norm")


def tucker_rank(rank: Rank | None, shape: Sequence[int], *, copies: int = 1) -> tuple[int, ...]:
    """Multilinear rank for a tensor of ``shape``, one number a mode.

    Parameters
    ----------
    rank : int, sequence of int, float or None
        One number is used for all modes that are as large; smaller ones keep their size. A fraction
        in (0, 1] gives ranks proportional to the sizes of which the Tucker form has that fraction
        of the number of entries. None is full rank.
    shape : sequence of int
    copies : int
        How many tensors of this shape share their factors; for a fraction.

    Examples
    --------
    >>> tucker_rank(4, (10, 3, 5)), tucker_rank(0.1, (10, 10, 10))
    ((4, 3, 4), (3, 3, 3))
    """
    shape = tuple(shape)
    if rank is None:
        return shape
    if isinstance(rank, float):
        size, squares = math.prod(shape), sum(n * n for n in shape) / copies
        share = _root(lambda c: size * (c ** len(shape) - _fraction(rank)) + squares * c)
        return tuple(max(1, round(n * share)) for n in shape)
    if not isinstance(rank, Sequence):
        rank = check_rank(rank, max(shape), shape)
        return tuple(min(rank, n) for n in shape)
    return _each(rank, shape, shape)


def tt_rank(rank: Rank | None, shape: Sequence[int]) -> tuple[int, ...]:
    """Ranks ``(1, r_1, ..., r_(N-1), 1)`` of a tensor train of ``shape``.

    Parameters
    ----------
    rank : int, sequence of int, float or None
        One number is used for all bonds, as far as their unfoldings allow it. A sequence has
        ``N + 1`` entries, the first and the last being 1. A fraction in (0, 1] gives ranks
        proportional to the neighbouring sizes of which the train has that fraction of the number of
        entries. None is full rank.
    shape : sequence of int

    Examples
    --------
    >>> tt_rank(4, (2, 10, 10)), tt_rank(0.1, (10, 10, 10))
    ((1, 2, 4, 1), (1, 2, 2, 1))
    """
    shape = tuple(shape)
    largest = tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(len(shape) + 1))
    if rank is None:
        return largest
    if isinstance(rank, float):
        means = [(n + m) / 2 for n, m in pairwise(shape)]
        pairs = zip([0.0, *means], shape, [*means, 0.0], strict=True)
        square = sum(before * n * after for before, n, after in pairs)
        linear = (shape[0] * means[0] + shape[-1] * means[-1]) if means else 1.0
        size = _fraction(rank) * math.prod(shape)
        # The positive root of square c^2 + linear c = size.
        share = 2 * size / (linear + math.sqrt(linear**2 + 4 * square * size))
        inner = [max(1, round(mean * share)) for mean in means]
        return tuple(map(min, (1, *inner, 1), largest))
    if not isinstance(rank, Sequence):
        rank = check_rank(rank, max(largest), shape)
        return tuple(min(rank, r) for r in largest)
    return _each(rank, largest, shape)


def cp_rank(rank: int | float, shape: Sequence[int]) -> int:
    """Number of terms of a CP decomposition of a tensor of ``shape``.

    It may be above the sizes. A fraction in (0, 1] is that of the number of entries to keep.

    Examples
    --------
    >>> cp_rank(7, (2, 2, 2)), cp_rank(0.1, (10, 10, 10))
    (7, 3)
    """
    if isinstance(rank, float):
        return max(1, round(_fraction(rank) * math.prod(shape) / sum(shape)))
    return check_rank(rank, math.prod(shape), tuple(shape))


def _each(rank: Sequence[int], largest: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    size = " x ".join(map(str, shape))
    if len(rank) != len(largest):
        raise ValueError(f"rank must have {len(largest)} entries for shape {size}, got {len(rank)}")
    for k, (r, most) in enumerate(zip(rank, largest, strict=True)):
        if isinstance(r, bool) or not hasattr(r, "__index__"):
            raise TypeError(f"rank[{k}] must be an integer, got {r!r}")
        if not 1 <= r <= most:
            raise ValueError(f"rank[{k}] must be in 1..{most} for shape {size}, got {r}")
    return tuple(int(r) for r in rank)


def _fraction(rank: float) -> float:
    if not 0 < rank <= 1:
        raise ValueError(
            f"rank as a fraction must be in (0, 1], got {rank}; a number of terms is an integer"
        )
    return rank


def _root(function: Callable[[float], float]) -> float:
    """Root of an increasing function in (0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return high
