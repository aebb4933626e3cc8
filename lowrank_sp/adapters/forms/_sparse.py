"""Sparse matrices of fixed support: values at sorted places, row by row."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, namespace, to_host

# Draws at a time, of the permutations of large matrices.
_STEPS = 2**20


def check_places(places: Array, shape: tuple[int, int]) -> np.ndarray:
    """``places`` on the host, or an error unless they are sorted, distinct, inside, and some."""
    host, size = to_host(places), shape[0] * shape[1]
    if not (len(host) and np.all(host[1:] > host[:-1]) and host[0] >= 0 and host[-1] < size):
        raise ValueError(
            f"places must be sorted, distinct and in 0..{size - 1}, at least one; "
            "numpy.unique sorts them"
        )
    return host


def row_counts(places: np.ndarray, columns: int) -> tuple[int, ...]:
    """How many rows have a first entry, a second one, and so on."""
    degrees = np.bincount(places // columns)
    return tuple(int(np.sum(degrees > j)) for j in range(degrees.max()))


def times_sparse(
    z: Array, values: Array, places: Array, counts: tuple[int, ...], rows: int
) -> Array:
    """``z @ S.T`` for ``z`` of shape ``(..., n)`` and ``S`` of shape ``(rows, n)``.

    ``S`` is applied by jagged diagonals: the first entries of all rows, longer rows before shorter
    ones, then the second entries of those that have one, and so on, each a gather and a sum of
    slices. ``counts`` are :func:`row_counts`.
    """
    xp = namespace(places)
    columns = z.shape[-1]
    row, column = places // columns, places % columns
    every = xp.arange(rows + 1, dtype=row.dtype, device=device(row))
    bounds = xp.searchsorted(row, every)
    order = xp.argsort(bounds[1:] - bounds[:-1], descending=True)
    heads = xp.take(bounds, order)
    total = z[..., :0]
    for j, count in reversed(list(enumerate(counts))):
        at = heads[:count] + j
        term = xp.take(z, xp.take(column, at), axis=-1) * xp.take(values, at)
        shorter = total.shape[-1]
        total = xp.concat([term[..., :shorter] + total, term[..., shorter:]], axis=-1)
    empty = xp.zeros((*z.shape[:-1], rows - counts[0]), dtype=z.dtype, device=device(z))
    return xp.take(xp.concat([total, empty], axis=-1), xp.argsort(order), axis=-1)


def random_places(size: int, count: int, rng: RNG) -> np.ndarray:
    """``count`` of the places ``0..size - 1`` on the host, uniform, distinct and sorted."""
    if not 1 <= count <= size:
        raise ValueError(f"count must be in 1..{size}, the entries that there are, got {count}")
    return np.sort(np.random.default_rng(rng).choice(size, count, replace=False))


def peft_places(size: int, count: int, *, seed: int = 777) -> np.ndarray:
    """The places that PEFT draws for FourierFT and WaveFT, in its order, without PyTorch.

    They are the first of a random permutation by PyTorch's generator on the CPU.

    Parameters
    ----------
    size : int
        Entries of the matrix: its places are ``0..size - 1``, row by row.
    count : int
    seed : int
        ``random_loc_seed`` of the configuration.

    Notes
    -----
    ``count`` draws, but for matrices of 215 million entries or more, where PyTorch has another
    method and all of them are drawn: some seconds.

    Returns
    -------
    numpy.ndarray, shape (count,)

    Examples
    --------
    >>> peft_places(12, 4)
    array([11,  7,  3,  8])
    """
    if not 1 <= count <= size:
        raise ValueError(f"count must be in 1..{size}, the entries that there are, got {count}")
    bits = np.random.RandomState(seed)
    if size >= (2**32 - 1) // 20:
        return _inside_out(size, count, bits)
    moved: dict[int, int] = {}
    drawn = np.empty(count, np.int64)
    for i, step in enumerate(bits.randint(0, 2**32, count, dtype=np.uint32)):
        j = i + int(step) % (size - i)
        drawn[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return drawn


def _inside_out(size: int, count: int, bits: np.random.RandomState) -> np.ndarray:
    """The same where PyTorch shuffles a growing array: every step may reach its first entries."""
    drawn = np.empty(count, np.int64)
    for start, stop in pairwise([0, count, *range(count + _STEPS, size, _STEPS), size]):
        high, low = bits.randint(0, 2**32, (stop - start, 2), dtype=np.uint32).astype(np.uint64).T
        z = ((high << np.uint64(32)) | low) % np.arange(start + 1, stop + 1, dtype=np.uint64)
        if start == 0:
            for i, j in enumerate(z):
                drawn[i] = drawn[j]
                drawn[j] = i
        else:
            reached = np.flatnonzero(z < count)
            # Where several steps reach a place, the last one stays.
            drawn[z[reached]] = start + reached
    return drawn
