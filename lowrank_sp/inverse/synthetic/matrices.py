"""Matrices to complete, to sense, and to free of gross errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowrank_sp._arrays import RNG, Array, device, from_host, is_complex, namespace
from lowrank_sp.factors import SVD
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.measurements import GaussianSensing, Measurement
from lowrank_sp.inverse.synthetic.draws import (
    degrees_of_freedom,
    low_rank,
    noisy,
    positions,
    power_law,
    rms,
)


class _Matrix:
    """What the three kinds of problems share."""

    truth: SVD

    @property
    def rank(self) -> int:
        """Rank of the truth."""
        return self.truth.rank

    @property
    def dof(self) -> int:
        """Degrees of freedom ``rank (m + n - rank)``."""
        return degrees_of_freedom(self.truth.shape, self.rank)


@dataclass(frozen=True)
class Completion(_Matrix):
    """Observed entries of a low-rank matrix.

    Attributes
    ----------
    truth : SVD
    entries : Entries
        Entries of the truth plus noise.
    noise : float
        Standard deviation of the noise, in units of the root mean square of the clean entries.
    """

    truth: SVD
    entries: Entries
    noise: float

    @property
    def oversampling(self) -> float:
        """Observed entries a degree of freedom."""
        return self.entries.size / self.dof


@dataclass(frozen=True)
class Sensing(_Matrix):
    """Linear measurements of a low-rank matrix: ``data = measurement.forward(truth) + noise``.

    Attributes
    ----------
    truth : SVD
    measurement : Measurement
    data : array, shape (M,)
    noise : float
        Standard deviation of the noise, in units of the root mean square of the clean data.
    """

    truth: SVD
    measurement: Measurement
    data: Array
    noise: float

    @property
    def oversampling(self) -> float:
        """Measurements a degree of freedom."""
        return self.measurement.size / self.dof


@dataclass(frozen=True)
class Robust(_Matrix):
    """A low-rank matrix with gross errors: ``data = truth + outliers + noise``.

    Attributes
    ----------
    truth : SVD
    outliers : array, shape (m, n)
        Zero where there is none.
    data : array, shape (m, n)
        Missing columns are outliers of the size of the truth: the data are zero there.
    support : boolean host array, shape (m, n)
        Where outliers are.
    missing : integer host array
        Columns that are missing.
    noise : float
        Standard deviation of the noise, in units of the root mean square of the truth.
    """

    truth: SVD
    outliers: Array
    data: Array
    support: np.ndarray
    missing: np.ndarray
    noise: float

    @property
    def oversampling(self) -> float:
        """Entries without outliers a degree of freedom."""
        return float(np.sum(~self.support)) / self.dof


def completion(
    *,
    shape: tuple[int, int] = (100, 80),
    rank: int = 3,
    oversampling: float = 3.0,
    condition: float = 1.0,
    spectrum: Any = None,
    coherence: float = 0.0,
    noise: float = 0.0,
    mask: Literal["uniform", "conditioned", "power-law"] = "conditioned",
    like: Array | None = None,
    rng: RNG = None,
) -> Completion:
    """Entries of a random low-rank matrix.

    Parameters
    ----------
    shape : (int, int)
    rank : int
    oversampling : float
        Entries a degree of freedom: ``M = round(oversampling rank (m + n - rank))``.
    condition, spectrum, coherence
        See :func:`low_rank`.
    noise : float
        Standard deviation, in units of the root mean square of the clean entries.
    mask : {"uniform", "conditioned", "power-law"}
        "uniform": every set of ``M`` positions is equally likely. "conditioned": such a set,
        repaired so that every line has at least ``rank`` entries, without which nothing can be
        recovered; see :func:`positions`. "power-law": repaired as well, from rates that fall as
        ``1 / sqrt(line)`` in random order of lines, as in data on people and things.
    like : array, optional
        Gives library, device and dtype; NumPy and float64 by default.
    rng : int, Generator or None

    Returns
    -------
    Completion

    Raises
    ------
    ValueError
        If there are more entries than positions, or too few for ``rank`` in every line.

    Examples
    --------
    >>> p = completion(shape=(60, 50), rank=2, oversampling=2.5, rng=0)
    >>> p.entries, p.truth, p.dof
    (Entries(60 x 50, 540 observed, float64), SVD(60 x 50, rank 2, float64), 216)
    """
    generator = np.random.default_rng(rng)
    like = np.zeros(0) if like is None else like
    truth = low_rank(shape, rank, condition, spectrum, coherence, like=like, rng=generator)
    m, n = truth.shape
    size = round(oversampling * degrees_of_freedom((m, n), rank))
    if size > m * n:
        raise ValueError(
            f"oversampling {oversampling} needs {size} entries, but the matrix has {m * n}; lower "
            f"it to at most {m * n / degrees_of_freedom((m, n), rank):.3g}"
        )
    if mask not in ("uniform", "conditioned", "power-law"):
        raise ValueError(f"mask must be 'uniform', 'conditioned' or 'power-law', got {mask!r}")
    least = 0 if mask == "uniform" else rank
    rates = (power_law(m, generator), power_law(n, generator)) if mask == "power-law" else None
    rows, cols = positions((m, n), size, least=least, rates=rates, rng=generator)
    xp = namespace(like)
    zeros = xp.zeros(len(rows), dtype=truth.dtype, device=device(truth.u))
    entries = Entries(rows, cols, zeros, (m, n))
    clean = entries.sample(truth)
    data = noisy(clean, noise, generator)
    return Completion(truth, entries.with_values(data), float(noise))


def sensing(
    *,
    shape: tuple[int, int] = (30, 20),
    rank: int = 2,
    oversampling: float = 3.0,
    condition: float = 1.0,
    spectrum: Any = None,
    coherence: float = 0.0,
    noise: float = 0.0,
    measurement: Measurement | None = None,
    like: Array | None = None,
    rng: RNG = None,
) -> Sensing:
    """Linear measurements of a random low-rank matrix.

    Parameters
    ----------
    measurement : Measurement, optional
        Gives shape and number of measurements as well. By default a
        :class:`~lowrank_sp.inverse.GaussianSensing` of
        ``round(oversampling rank (m + n - rank))``.
    shape, rank, oversampling, condition, spectrum, coherence, noise, like, rng
        As in :func:`completion`.

    Returns
    -------
    Sensing

    Examples
    --------
    >>> p = sensing(shape=(12, 10), rank=1, rng=0)
    >>> p.measurement, p.oversampling
    (GaussianSensing(12 x 10 -> 63, float64), 3.0)
    """
    generator = np.random.default_rng(rng)
    if measurement is None:
        like = np.zeros(0) if like is None else like
        seed = int(generator.integers(2**32))
        size = round(oversampling * degrees_of_freedom(shape, rank))
        measurement = GaussianSensing(shape, size, like=like, seed=seed)
    truth = low_rank(
        measurement.shape,
        rank,
        condition,
        spectrum,
        coherence,
        like=measurement.like,
        rng=generator,
    )
    data = noisy(measurement.forward(truth), noise, generator)
    return Sensing(truth, measurement, data, float(noise))


def robust(
    *,
    shape: tuple[int, int] = (100, 80),
    rank: int = 3,
    outliers: float = 0.1,
    amplitude: float = 10.0,
    missing: int = 0,
    condition: float = 1.0,
    spectrum: Any = None,
    coherence: float = 0.0,
    noise: float = 0.0,
    like: Array | None = None,
    rng: RNG = None,
) -> Robust:
    """A random low-rank matrix with gross errors at random entries.

    Parameters
    ----------
    outliers : float
        Share of the entries, in [0, 1); uniformly at random.
    amplitude : float
        Outliers are uniform in ``[-amplitude, amplitude]`` (in a disk, if complex), in units of the
        mean magnitude of the truth.
    missing : int
        Number of columns whose data are zero.
    noise : float
        Standard deviation, in units of the root mean square of the truth.
    shape, rank, condition, spectrum, coherence, like, rng
        As in :func:`completion`.

    Returns
    -------
    Robust

    Examples
    --------
    >>> p = robust(shape=(20, 15), rank=2, outliers=0.2, rng=0)
    >>> int(p.support.sum()), bool(abs(p.data - p.truth.to_dense() - p.outliers).max() < 1e-12)
    (60, True)
    """
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be a share in [0, 1), got {outliers}")
    generator = np.random.default_rng(rng)
    like = np.zeros(0) if like is None else like
    truth = low_rank(shape, rank, condition, spectrum, coherence, like=like, rng=generator)
    m, n = truth.shape
    if not 0 <= missing < n:
        raise ValueError(f"missing must be a number of columns in 0..{n - 1}, got {missing}")
    dense = truth.to_dense()
    xp = namespace(dense)
    rows, cols = positions((m, n), round(outliers * m * n), rng=generator)
    support = np.zeros((m, n), bool)
    support[rows, cols] = True
    draw = generator.uniform(-1.0, 1.0, (m, n))
    if is_complex(dense.dtype):
        draw = np.sqrt(abs(draw)) * np.exp(2j * np.pi * generator.random((m, n)))
    draw = from_host(np.where(support, draw, 0.0), dense, dense.dtype)
    gross = draw * (amplitude * float(xp.mean(abs(dense))))
    columns = np.sort(generator.permutation(n)[:missing])
    data = noisy(dense + gross, noise, generator, unit=rms(dense))
    if missing:
        gone = np.zeros((1, n), bool)
        gone[0, columns] = True
        support |= gone
        hidden = xp.asarray(gone, device=device(dense))
        data = xp.where(hidden, xp.zeros_like(data), data)
        gross = xp.where(hidden, -dense, gross)
    return Robust(truth, gross, data, support, columns, float(noise))
