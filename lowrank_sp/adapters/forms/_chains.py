"""Half trains: cores with a bond of size 1 at one end, multiplied out or by inputs, as is cheaper.

Inputs are rows. Flops are counted in multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank_sp._arrays import Array, namespace
from lowrank_sp.tensors.tt import check_chain


def factorized(size: int, order: int) -> tuple[int, ...]:
    """``order`` factors of ``size``, as equal as its primes allow, from small to large.

    Examples
    --------
    >>> factorized(768, 3), factorized(11008, 4), factorized(7, 2)
    ((8, 8, 12), (4, 8, 8, 43), (1, 7))
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    primes, rest, prime = [], size, 2
    while prime * prime <= rest:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    factors = [1] * order
    for p in sorted([*primes, rest], reverse=True):
        factors[factors.index(min(factors))] *= p
    return tuple(sorted(factors))


def modes_of(modes: Sequence[int] | None, size: int, order: int, name: str) -> tuple[int, ...]:
    """Factors of a size that were given, or those of :func:`factorized`."""
    if modes is None:
        return factorized(size, order)
    if math.prod(modes) != size or not modes:
        raise ValueError(f"{name} must be factors of {size}, got {tuple(modes)}")
    return tuple(modes)


def check_cores(form: str, cores: Sequence[Array], ndim: int) -> None:
    """Raise unless arrays are the cores of a train with ``ndim`` axes each."""
    shapes = [tuple(c.shape) for c in cores]
    if not shapes or any(len(shape) != ndim for shape in shapes):
        names = "(r, n, r')" if ndim == 3 else "(r, m, n, r')"
        raise ValueError(
            f"cores of {form} must have shape {names}, got {', '.join(map(str, shapes))}"
        )
    check_chain([(shape[0], shape[-1]) for shape in shapes])


def merged(cores: Sequence[Array]) -> Array:
    """The product of cores ``(r, n_k, r')``, of shape ``(r_0, n_1 ... n_p, r_p)``."""
    xp = namespace(cores[0])
    left, right = cores[0].shape[0], cores[-1].shape[2]
    if left <= right:
        whole = cores[0]
        for core in cores[1:]:
            rows = xp.reshape(whole, (-1, core.shape[0]))
            whole = xp.reshape(
                rows @ xp.reshape(core, (core.shape[0], -1)), (left, -1, core.shape[2])
            )
        return whole
    whole = cores[-1]
    for core in reversed(cores[:-1]):
        columns = xp.reshape(whole, (core.shape[2], -1))
        whole = xp.reshape(
            xp.reshape(core, (-1, core.shape[2])) @ columns, (core.shape[0], -1, right)
        )
    return whole


def absorbed(rows: Array, cores: Sequence[Array]) -> Array:
    """``rows (T, n) @ merged(cores)[0]``, of shape ``(T, r_p)``, for cores with ``r_0 = 1``."""
    count, n = rows.shape
    left, steps = n, 0
    for r, k, s in (core.shape for core in cores):
        steps += r * s * left
        left //= k
    if count * steps > merging_flops(cores) + count * n * cores[-1].shape[2]:
        return rows @ merged(cores)[0, :, :]
    xp = namespace(rows)
    part = xp.reshape(rows, (count, 1, n))
    for core in cores:
        r, k, s = core.shape
        n //= k
        part = xp.reshape(core, (r * k, s)).mT @ xp.reshape(part, (count, r * k, n))
    return part[:, :, 0]


def expanded(rows: Array, cores: Sequence[Array]) -> Array:
    """``rows (T, r_0) @ merged(cores)[:, :, 0]``, of shape ``(T, m)``, for ``r_p = 1``."""
    count, done, steps = rows.shape[0], 1, 0
    for r, k, s in (core.shape for core in cores):
        done *= k
        steps += r * s * done
    if count * steps > merging_flops(cores) + count * rows.shape[1] * done:
        return rows @ merged(cores)[:, :, 0]
    xp = namespace(rows)
    part = rows
    for core in cores:
        r, k, s = core.shape
        part = xp.reshape(part, (-1, r)) @ xp.reshape(core, (r, k * s))
    return xp.reshape(part, (count, done))


def merging_flops(cores: Sequence[Array]) -> int:
    """What :func:`merged` takes for cores whose axes between the bonds count as one."""
    shapes = [(c.shape[0], math.prod(c.shape[1:-1]), c.shape[-1]) for c in cores]
    if shapes[0][0] > shapes[-1][2]:
        shapes = [shape[::-1] for shape in reversed(shapes)]
    size, total = shapes[0][0] * shapes[0][1], 0
    for r, k, s in shapes[1:]:
        size *= k
        total += size * r * s
    return total
