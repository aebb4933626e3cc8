"""Sums of damped exponentials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_sp._arrays import RNG, Array, compute_dtype, from_host, is_complex, namespace
from lowrank_sp.inverse.measurements import Hankel, HankelLift
from lowrank_sp.inverse.synthetic.draws import noisy


@dataclass(frozen=True)
class Harmonics:
    r"""A sum of damped exponentials, whose Hankel matrix has low rank.

    .. math:: x_t = \sum_k c_k\, e^{(2 \pi i f_k - d_k)\, t}, \qquad t = 0, \dots, N - 1

    Attributes
    ----------
    signal : array, shape (N,)
        Without noise; real if ``like`` was, and then with every frequency and its negative.
    data : array, shape (N,)
        With noise.
    frequencies, damping, amplitudes : host arrays, shape (rank,)
        ``f`` in cycles a sample, ``d`` a sample, and complex ``c``.
    lift : HankelLift
        The nearly square lift of the signal.
    noise : float
        Standard deviation of the noise, in units of the root mean square of the signal.
    """

    signal: Array
    data: Array
    frequencies: np.ndarray
    damping: np.ndarray
    amplitudes: np.ndarray
    lift: HankelLift
    noise: float

    @property
    def rank(self) -> int:
        """Number of exponentials: the rank of the lifted signal."""
        return len(self.frequencies)

    @property
    def truth(self) -> Hankel:
        """The Hankel matrix of the signal, of rank ``rank``, as an operator."""
        return self.lift.lift(self.signal)

    @property
    def dof(self) -> int:
        """Unknowns of the model in units of a sample: ``2 rank``.

        A complex exponential has two complex unknowns, its amplitude and its pole; of a conjugate
        pair in a real signal, both are shared.
        """
        return 2 * self.rank

    @property
    def oversampling(self) -> float:
        """Samples a degree of freedom."""
        return self.lift.size / self.dof


def harmonics(
    *,
    length: int = 200,
    rank: int = 4,
    separation: float = 1.5,
    damping: float = 0.0,
    noise: float = 0.0,
    like: Array = None,
    rng: RNG = None,
) -> Harmonics:
    r"""A signal of random damped exponentials, whose Hankel matrix has rank ``rank``.

    Parameters
    ----------
    length : int
        Samples ``N``.
    rank : int
        Exponentials, at most ``N / 2``. Real signals hold conjugate pairs, so it must be even.
    separation : float
        Least distance of frequencies on the circle, in units of ``1 / N``.
    damping : float
        Exponentials decay by factors ``exp(-d_k N)`` over the signal, with ``d_k N`` uniform in
        ``[0, damping]``.
    noise : float
        Standard deviation, in units of the root mean square of the signal.
    like : array, optional
        Gives library, device and dtype; NumPy and complex128 by default.
    rng : int, Generator or None

    Returns
    -------
    Harmonics

    Examples
    --------
    >>> import numpy as np
    >>> p = harmonics(length=40, rank=3, rng=0)
    >>> s = np.linalg.svd(p.truth.to_dense(), compute_uv=False)
    >>> int(np.sum(s > 1e-10 * s[0]))
    3
    """
    generator = np.random.default_rng(rng)
    like = np.zeros(0, complex) if like is None else like
    real = not is_complex(compute_dtype(namespace(like), like.dtype))
    if not 1 <= rank <= length // 2:
        raise ValueError(f"rank must be in 1..{length // 2} for a signal of {length}, got {rank}")
    if real and rank % 2:
        raise ValueError(f"rank must be even for a real signal, got {rank}; or give a complex like")
    count, span = (rank // 2, 0.5) if real else (rank, 1.0)
    gap = separation / length
    # Gaps of at least ``gap`` on the circle; half of it, with half a gap at its ends, if real.
    free = span - count * gap
    if free < 0:
        raise ValueError(
            f"{rank} frequencies with gaps of {separation} / {length} do not fit; lower separation"
        )
    offset = gap / 2 if real else generator.random()
    frequencies = np.sort(generator.random(count)) * free + np.arange(count) * gap + offset
    frequencies = (frequencies + 0.5) % 1.0 - 0.5
    decay = generator.uniform(0.0, damping, count) / length
    amplitudes = (1 + generator.random(count)) * np.exp(2j * np.pi * generator.random(count))
    if real:
        frequencies = np.concatenate([frequencies, -frequencies])
        decay, amplitudes = np.tile(decay, 2), np.concatenate([amplitudes, amplitudes.conj()]) / 2
    poles = 2j * np.pi * frequencies - decay
    signal = np.exp(np.arange(length)[:, None] * poles) @ amplitudes
    lift = HankelLift(length, length // 2 + 1, like=like)
    signal = from_host(signal.real if real else signal, lift.like)
    data = noisy(signal, noise, generator)
    return Harmonics(signal, data, frequencies, decay, amplitudes, lift, float(noise))
