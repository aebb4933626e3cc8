r"""A grid of circulant blocks, applied by fast Fourier transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, as_compute, device, namespace
from lowrank_sp.adapters.forms._draws import Like, template, uniform
from lowrank_sp.adapters.forms._entries import count_of, none_of
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Trained


@dataclass(frozen=True, repr=False)
class BlockCirculant(Form):
    r"""Circular correlations of pieces of the input: C3A :cite:p:`chen2025parameter`.

    .. math:: \Delta_{(i, k), (j, l)} = s\, w_{i j, (l - k) \bmod b}

    Block ``(i, j)`` has the kernel ``w_ij`` for its first row, and in every further row what stands
    above it, moved on by one. So ``b`` trained numbers make a block of any rank up to ``b``.

    Attributes
    ----------
    kernel : array, shape (p, q, b)
        ``w``, for a weight of ``p b`` rows and ``q b`` columns.
    scale : float
        ``s``: the inverse of the number of inputs, as published.

    Notes
    -----
    Per input ``4 m n / b`` flops and transforms of ``O((m + n) log b)``.

    Examples
    --------
    >>> import numpy as np
    >>> BlockCirculant(np.array([[[1.0, 2.0, 3.0]]])).delta()
    array([[1., 2., 3.],
           [3., 1., 2.],
           [2., 3., 1.]])
    """

    kernel: Trained[Array, "p q b"]
    scale: float = 1.0

    @classmethod
    def create(cls, weight: Like, *, block: int, rng: RNG = None) -> Self:
        """Uniform within Xavier's bounds, so that the layer starts elsewhere, as published.

        ``block`` divides both sides: with the greatest common divisor the numbers are fewest.
        """
        (m, n), like = template(weight)
        if block < 1 or m % block or n % block:
            raise ValueError(
                f"block must divide both sides of a weight {m} x {n}, so {math.gcd(m, n)}, got "
                f"{block}"
            )
        kernel = uniform((m // block, n // block, block), (6 / (m + n)) ** 0.5, like, rng)
        return cls(kernel, 1 / n)

    @property
    def shape(self) -> tuple[int, int]:
        p, q, b = self.kernel.shape
        return p * b, q * b

    @property
    def rank_bound(self) -> int:
        return min(self.shape)

    def delta(self) -> Array:
        xp = namespace(self.kernel)
        p, q, b = self.kernel.shape
        steps = xp.arange(b, device=device(self.kernel))
        index = xp.reshape((steps[None, :] - steps[:, None]) % b, (b * b,))
        blocks = xp.reshape(xp.take(self.kernel, index, axis=-1), (p, q, b, b))
        return xp.reshape(xp.permute_dims(blocks, (0, 2, 1, 3)), self.shape) * self.scale

    def apply(self, x: Array) -> Array:
        xp = namespace(x)
        p, q, b = self.kernel.shape
        count = count_of(x)
        if not count:  # FFTs of PyTorch cannot do without inputs.
            return none_of(x, p * b)
        pieces = xp.fft.rfft(xp.reshape(as_compute(x), (count, q, b)))
        kernel = xp.conj(xp.fft.rfft(as_compute(self.kernel)))
        products = xp.permute_dims(pieces, (2, 0, 1)) @ xp.permute_dims(kernel, (2, 1, 0))
        y = xp.fft.irfft(xp.permute_dims(products, (1, 2, 0)), n=b) * self.scale
        return xp.astype(xp.reshape(y, (*x.shape[:-1], p * b)), x.dtype, copy=False)
