"""Whether to merge an adapter into the weight, or to multiply by its factors beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a computation does: floating point operations, and bytes read and written."""

    flops: float
    bytes: float

    def seconds(self, *, flops: float, bandwidth: float) -> float:
        """Time on a machine of so many flops and bytes a second: the slower of the two."""
        return max(self.flops / flops, self.bytes / bandwidth)


def switch_work(shape: tuple[int, int], rank: int, *, itemsize: int = 2) -> Work:
    """Work to replace the adapter that is merged into a weight by another one of its rank.

    ``W + s B A - s' B' A'`` in one pass: ``4 m n r`` flops, one read and one write of ``W``.

    Parameters
    ----------
    shape : (int, int)
        ``(m, n)`` of the weight.
    rank : int
    itemsize : int
        Bytes of a number.
    """
    m, n = shape
    return Work(4.0 * m * n * rank, itemsize * (2.0 * m * n + 2.0 * (m + n) * rank))


def factor_work(shape: tuple[int, int], rank: int, *, batch: int = 1, itemsize: int = 2) -> Work:
    """Work of a pass of ``batch`` tokens through the factors, beside that through the weight.

    ``2 (m + n) r`` flops a token; a read of the factors, of the inputs once more, and of the
    outputs, which are written again. Parameters are those of :func:`switch_work`.
    """
    m, n = shape
    numbers = (m + n) * rank + batch * (n + 2 * m + 2 * rank)
    return Work(2.0 * (m + n) * rank * batch, itemsize * float(numbers))


def merging_pays_from(
    shape: tuple[int, int],
    rank: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    flops: float,
    bandwidth: float,
) -> float:
    """Tokens that must use an adapter in a row for merging it to be the faster way.

    The time of :func:`switch_work` over that of :func:`factor_work` a token. Where arithmetic is
    the limit it is ``2 m n / (m + n)``, of whatever rank.

    Parameters
    ----------
    shape, rank, itemsize
        As in :func:`switch_work`.
    batch : int
        Tokens in a pass.
    flops, bandwidth : float
        Of the machine, a second: multiplications and additions, and bytes from and to memory.

    Examples
    --------
    >>> round(merging_pays_from((4096, 4096), 16, batch=4096, flops=1e12, bandwidth=1e15))
    4096
    >>> round(merging_pays_from((4096, 4096), 16, batch=1, flops=1e15, bandwidth=3e12))
    236
    """
    machine = {"flops": flops, "bandwidth": bandwidth}
    if min(*shape, rank, batch, itemsize, flops, bandwidth) <= 0:
        raise ValueError("sizes, flops and bandwidth must be positive")
    switch = switch_work(shape, rank, itemsize=itemsize).seconds(**machine)
    batchwise = factor_work(shape, rank, batch=batch, itemsize=itemsize).seconds(**machine)
    return switch / batchwise * batch
