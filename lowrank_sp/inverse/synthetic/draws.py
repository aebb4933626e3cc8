"""Random low-rank matrices, observed positions, and noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    compute_dtype,
    from_host,
    is_complex,
    namespace,
    real_dtype,
)
from lowrank_sp.factors import SVD, check_rank

# Repairs of a mask before it is built up instead.
_ATTEMPTS = 20


def degrees_of_freedom(shape: tuple[int, ...], rank: int) -> int:
    """Dimension ``rank (m + n - rank)`` of the matrices of rank ``rank``."""
    m, n = shape
    return rank * (m + n - rank)


def low_rank(
    shape: tuple[int, int],
    rank: int,
    condition: float = 1.0,
    spectrum: Any = None,
    coherence: float = 0.0,
    *,
    like: Array,
    rng: RNG = None,
) -> SVD:
    """A random matrix with chosen singular values, and entries of mean square about one.

    Parameters
    ----------
    shape : (int, int)
    rank : int
    condition : float
        Ratio of the largest to the smallest singular value, which are spaced geometrically.
    spectrum : sequence of float, optional
        The ``rank`` singular values themselves, positive and from large to small, instead.
    coherence : float
        Zero for singular vectors uniform on the sphere. Otherwise the lines of both bases are
        weighted by ``(1 + line)^(-coherence)`` in random order: leverage gathers in few lines.
    like : array
        Gives library, device and dtype.
    rng : int, Generator or None
    """
    m, n = (int(size) for size in shape)
    rank = check_rank(rank, min(m, n), (m, n))
    generator = np.random.default_rng(rng)
    if spectrum is None:
        if not condition >= 1:
            raise ValueError(f"condition must be at least 1, got {condition}")
        spectrum = condition ** -np.linspace(0, 1, rank) if rank > 1 else np.ones(1)
        spectrum = spectrum * (m * n / np.sum(spectrum**2)) ** 0.5
    s = np.asarray(spectrum, dtype=np.float64)
    if s.shape != (rank,) or not np.all(s > 0) or np.any(np.diff(s) > 0):
        raise ValueError(f"spectrum must be {rank} positive values from large to small, got {s}")
    xp = namespace(like)
    dtype = compute_dtype(xp, like.dtype)
    bases = []
    for size in (m, n):
        x = generator.standard_normal((size, rank))
        if is_complex(dtype):
            x = x + 1j * generator.standard_normal((size, rank))
        if coherence:
            x *= (1.0 + generator.permutation(size))[:, None] ** -coherence
        bases.append(np.linalg.qr(x)[0])
    f = SVD.canonical(bases[0], s, bases[1].conj().T)
    return SVD(
        from_host(f.u, like, dtype),
        from_host(f.s, like, real_dtype(xp, dtype)),
        from_host(f.vh, like, dtype),
    )


def positions(
    shape: tuple[int, int],
    size: int,
    *,
    least: int = 0,
    rates: tuple[np.ndarray, np.ndarray] | None = None,
    rng: RNG = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct random positions, with at least ``least`` in every line.

    Lines that have too few get positions of their own, at random among the free ones, and as many
    of the others are dropped at random from lines that can spare them. To draw the whole mask again
    would take forever near the information limit. Memory is ``O(size)``.

    Parameters
    ----------
    shape : (int, int)
    size : int
    least : int
    rates : (array, array), optional
        Relative rates of rows and columns; uniform by default.
    rng : int, Generator or None

    Returns
    -------
    (array, array)
        Rows and columns, sorted.
    """
    m, n = shape
    if size < least * max(m, n):
        raise ValueError(
            f"{least} entries in each of {max(m, n)} lines need {least * max(m, n)} entries, got "
            f"{size}; raise oversampling"
        )
    if least > min(m, n) or size > m * n:
        raise ValueError(f"{size} entries do not fit in a matrix of {m} x {n}")
    generator = np.random.default_rng(rng)
    keys = _distinct(shape, size, rates, generator)
    for _ in range(_ATTEMPTS):
        rows, cols = keys // n, keys % n
        row_counts, col_counts = np.bincount(rows, minlength=m), np.bincount(cols, minlength=n)
        poor_rows = np.repeat(np.arange(m), np.maximum(least - row_counts, 0))
        poor_cols = np.repeat(np.arange(n), np.maximum(least - col_counts, 0))
        if not len(poor_rows) and not len(poor_cols) and len(keys) == size:
            return rows, cols
        # Never a poor row with a poor column: two lines that each need the entry they share are
        # not identified by it.
        add_rows = np.concatenate([poor_rows, _draw(m, len(poor_cols), rates, 0, generator)])
        add_cols = np.concatenate([_draw(n, len(poor_rows), rates, 1, generator), poor_cols])
        fresh = np.setdiff1d(add_rows.astype(np.int64) * n + add_cols, keys)
        keys = np.concatenate([keys, fresh])
        keys = _thinned(keys, len(keys) - size, shape, least, generator)
    # So near the limit that hardly an entry can be spared: begin with the fewest that will do.
    keys = _fewest(shape, least, generator)
    while len(keys) < size:
        others = _distinct(shape, size, rates, generator)
        others = generator.permutation(np.setdiff1d(others, keys))
        keys = np.sort(np.concatenate([keys, others[: size - len(keys)]]))
    return keys // n, keys % n


def power_law(size: int, generator: np.random.Generator) -> np.ndarray:
    """Rates that fall as ``1 / sqrt(line)``, in random order."""
    return generator.permutation(np.arange(1, size + 1) ** -0.5)


def noisy(x: Array, noise: float, rng: np.random.Generator, unit: float | None = None) -> Array:
    """``x`` plus Gaussian noise of deviation ``noise`` in units of ``unit``, by default its own."""
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    draw = rng.standard_normal(tuple(x.shape))
    if is_complex(x.dtype):
        draw = (draw + 1j * rng.standard_normal(tuple(x.shape))) / 2**0.5
    return x + from_host(draw * noise * (rms(x) if unit is None else unit), x, x.dtype)


def rms(x: Array) -> float:
    """Root mean square of the entries."""
    xp = namespace(x)
    return float(xp.mean(abs(x) ** 2)) ** 0.5


def _distinct(
    shape: tuple[int, int], size: int, rates: Any, generator: np.random.Generator
) -> np.ndarray:
    """``size`` distinct flat positions, sorted."""
    m, n = shape
    if 3 * size > m * n:
        # The first arrivals of a race: without replacement, in proportion to the rates.
        times = generator.standard_exponential(m * n)
        if rates is not None:
            times /= np.outer(*rates).ravel()
        return np.sort(np.argsort(times)[:size])
    keys = np.zeros(0, dtype=np.int64)
    while len(keys) < size:
        count = int(1.1 * (size - len(keys))) + 16
        rows, cols = _draw(m, count, rates, 0, generator), _draw(n, count, rates, 1, generator)
        # Faster than np.union1d, which hashes.
        keys = np.sort(np.concatenate([keys, rows.astype(np.int64) * n + cols]))
        keys = keys[np.diff(keys, prepend=-1) > 0]
    surplus = len(keys) - size
    keep = np.ones(len(keys), bool)
    keep[generator.permutation(len(keys))[:surplus]] = False
    return keys[keep]


def _draw(size: int, count: int, rates: Any, side: int, generator: np.random.Generator) -> Any:
    if rates is None:
        return generator.integers(size, size=count)
    edges = np.cumsum(rates[side])
    return np.minimum(np.searchsorted(edges, generator.random(count) * edges[-1]), size - 1)


def _fewest(shape: tuple[int, int], least: int, generator: np.random.Generator) -> np.ndarray:
    """``least max(m, n)`` positions with ``least`` or more in every line: a permuted band."""
    m, n = shape
    i = np.arange(max(m, n))
    shift = np.arange(least)[:, None]
    rows, cols = (i + shift * (m < n)) % m, (i + shift * (m >= n)) % n
    rows, cols = np.broadcast_arrays(rows, cols)
    rows, cols = generator.permutation(m)[rows.ravel()], generator.permutation(n)[cols.ravel()]
    return np.sort(rows * n + cols)


def _thinned(
    keys: np.ndarray, surplus: int, shape: tuple[int, int], least: int, rng: np.random.Generator
) -> np.ndarray:
    """``keys`` without ``surplus`` random ones, none of them from a line of ``least`` entries."""
    m, n = shape
    rows, cols = keys // n, keys % n
    row_counts, col_counts = np.bincount(rows, minlength=m), np.bincount(cols, minlength=n)
    keep = np.ones(len(keys), bool)
    for k in rng.permutation(len(keys)):
        if surplus == 0:
            break
        i, j = rows[k], cols[k]
        if row_counts[i] > least and col_counts[j] > least:
            keep[k] = False
            row_counts[i] -= 1
            col_counts[j] -= 1
            surplus -= 1
    return np.sort(keys[keep])
