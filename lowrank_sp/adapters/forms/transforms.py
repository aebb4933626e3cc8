r"""A few coefficients of the update in a fixed basis: frequencies, wavelets.

.. math:: \Delta = s\, T_m\, S\, T_n^T, \qquad S_{ij} = 0 \text{ outside a fixed support}

with fast transforms ``T``. Neither the matrix ``S`` nor the update is formed to apply it: the input
is transformed, multiplied by the sparse ``S``, and transformed back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, dtype_name, from_host, namespace, placed
from lowrank_sp.adapters.forms._draws import Like, normal, template, zeros
from lowrank_sp.adapters.forms._entries import none_of
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.adapters.forms._sparse import (
    check_places,
    peft_places,
    random_places,
    row_counts,
    times_sparse,
)


class _Coefficients(Form, ABC):
    """Sparse coefficients between a transform of the inputs and one of the outputs."""

    values: Array
    places: Array
    size: tuple[int, int]
    scale: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = self._grid
        places = check_places(self.places, grid)
        object.__setattr__(self, "counts", row_counts(places, grid[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, int]:
        """Shape of the matrix of all coefficients."""

    @abstractmethod
    def _inwards(self, x: Array) -> Array:
        """``x @ T_n``: coefficients of inputs."""

    @abstractmethod
    def _outwards(self, y: Array, length: int) -> Array:
        """``y @ T.T``, of ``length`` entries: outputs from their coefficients."""

    def coefficients(self) -> Array:
        """``S``, dense."""
        rows, columns = self._grid
        flat = placed(as_compute(self.values), self.places, rows * columns)
        return namespace(flat).reshape(flat, (rows, columns))

    def apply(self, x: Array) -> Array:
        if 0 in x.shape:  # FFTs of PyTorch cannot do without inputs.
            return none_of(x, self.size[0])
        z = self._inwards(as_compute(x))
        z = times_sparse(z, as_compute(self.values), self.places, self.counts, self._grid[0])
        y = self._outwards(z, self.size[0]) * self.scale
        return namespace(x).astype(y, x.dtype, copy=False)


@dataclass(frozen=True, repr=False)
class FourierCoefficients(_Coefficients):
    r"""Real coefficients of the two-dimensional Fourier transform: FourierFT
    :cite:p:`gao2024parameter`.

    .. math:: \Delta = s\, \operatorname{Re} F_m^{-1} S F_n^{-1}, \qquad
              \Delta_{xy} = \frac{s}{m n} \sum_{(i, j)} S_{ij} \cos 2 \pi (i x / m + j y / n)

    Sines are not among them: the update is even in ``(x, y)``, up to periods. Every coefficient
    adds a matrix of rank 2, or less.

    Attributes
    ----------
    values : array, shape (k,)
        The coefficients.
    places : integer array, shape (k,)
        Where they stand, ``i n + j`` for row ``i`` and column ``j``: sorted and distinct.
    size : (int, int)
        Shape ``(m, n)`` of the weight.
    scale : float
        ``s``.
    seed : int, optional
        What PEFT draws ``places`` from, if they are its: its files hold them only by that number.
    counts : tuple of int
        How many rows have a first entry, a second one, and so on; found if not given.

    Notes
    -----
    Per input ``O(m log m + n log n + k)`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> form = FourierCoefficients(np.array([8.0]), np.array([1]), (2, 4))
    >>> np.round(form.delta(), 12) + 0.0
    array([[ 1.,  0., -1.,  0.],
           [ 1.,  0., -1.,  0.]])
    """  # noqa: D205

    values: Trained[Array, "k"]
    places: Fixed[Array, "k"]
    size: tuple[int, int]
    scale: float = 1.0
    seed: int | None = None
    counts: tuple[int, ...] = ()

    @classmethod
    def create(
        cls,
        weight: Like,
        count: int,
        *,
        scale: float = 150.0,
        seed: int | None = None,
        rng: RNG = None,
    ) -> Self:
        """Standard normal coefficients, so that the layer starts elsewhere, as published.

        Parameters
        ----------
        weight : array, shape (m, n), or its shape
        count : int
            Trained numbers.
        scale : float
            ``s``: 150 in PEFT, 300 for larger models.
        seed : int, optional
            Draw the places as PEFT does, so that it can load the adapter: 777 by default there. All
            layers of one shape then have the same places. Without a seed ``rng`` draws them.
        rng : int, Generator or None
        """
        generator = np.random.default_rng(rng)
        (m, n), like = template(weight)
        drawn = _drawn((m, n), count, seed, generator)
        places = from_host(np.sort(drawn), like, namespace(like).int64)
        return cls(normal((count,), 1.0, like, generator), places, (m, n), scale, seed)

    @property
    def rank_bound(self) -> int:
        return min(*self.size, 2 * self.values.shape[0])

    @property
    def _grid(self) -> tuple[int, int]:
        return self.size

    def delta(self) -> Array:
        xp = namespace(self.values)
        return xp.real(xp.fft.ifftn(_complex(self.coefficients()), axes=(0, 1))) * self.scale

    def _inwards(self, x: Array) -> Array:
        return namespace(x).fft.ifft(_complex(x))

    def _outwards(self, y: Array, length: int) -> Array:
        del length
        xp = namespace(y)
        return xp.real(xp.fft.ifft(y))


@dataclass(frozen=True, repr=False)
class WaveletCoefficients(_Coefficients):
    r"""Coefficients of a wavelet transform of one level: WaveFT :cite:p:`bilican2025exploring`.

    .. math:: \Delta = s\, T_m\, S\, T_n^T, \qquad
              (T c)_x = \sum_j h_{x + l - 2 - 2j}\, c_j + g_{x + l - 2 - 2j}\, c_{q/2 + j}

    with the low-pass filter ``h`` of length ``l``, the high-pass filter
    :math:`g_t = (-1)^t h_{l - 1 - t}`, and as many coefficients ``q`` of a side as reach all of it,
    its length plus ``l - 2``, made even. Rows of a coefficient and neighbours overlap by ``l``.

    Attributes
    ----------
    values : array, shape (k,)
    places : integer array, shape (k,)
        ``i q_n + j`` for coefficient ``i`` of the outputs and ``j`` of the inputs, averages before
        details: sorted and distinct.
    filter : array, shape (l,)
        ``h`` of an orthogonal wavelet, such as :func:`daubechies`.
    size : (int, int)
        Shape ``(m, n)`` of the weight.
    scale : float
        ``s``.
    seed : int, optional
        What PEFT draws ``places`` from, if they are its: its files hold them only by that number.
    counts : tuple of int
        How many rows have a first entry, a second one, and so on; found if not given.

    Notes
    -----
    Per input ``2 l (m + n) + 2 k`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> haar = daubechies(1)
    >>> WaveletCoefficients(np.array([2.0]), np.array([5]), haar, (4, 4)).delta()
    array([[0., 0., 0., 0.],
           [0., 0., 0., 0.],
           [0., 0., 1., 1.],
           [0., 0., 1., 1.]])
    """

    values: Trained[Array, "k"]
    places: Fixed[Array, "k"]
    filter: Fixed[Array, "l"]
    size: tuple[int, int]
    scale: float = 1.0
    seed: int | None = None
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.filter.shape[0] % 2:
            raise ValueError(
                f"filter of an orthogonal wavelet has an even length, got {self.filter.shape[0]}"
            )
        super().__post_init__()

    @classmethod
    def create(
        cls,
        weight: Like,
        count: int,
        *,
        order: int = 1,
        scale: float = 25.0,
        seed: int | None = None,
        rng: RNG = None,
    ) -> Self:
        """Coefficients that are zero, of Daubechies' wavelet of an order: 1 is that of Haar.

        ``seed`` draws the places as PEFT does, so that it can load the adapter: 777 by default
        there. Without a seed ``rng`` draws them, in the same way.
        """
        (m, n), like = template(weight)
        filter_ = daubechies(order)
        drawn = _drawn((m, n), count, seed, rng)
        places = np.sort(wavelet_places(drawn, (m, n), len(filter_)))
        return cls(
            zeros((count,), like),
            from_host(places, like, namespace(like).int64),
            from_host(filter_, like),
            (m, n),
            scale,
            seed,
        )

    @property
    def rank_bound(self) -> int:
        return min(*self.size, self.values.shape[0])

    @property
    def _grid(self) -> tuple[int, int]:
        return _wavelet_grid(self.size, self.filter.shape[0])

    def delta(self) -> Array:
        (m, n), core = self.size, self.coefficients()
        return self._outwards(self._outwards(core, n).mT, m).mT * self.scale

    def _outwards(self, y: Array, length: int) -> Array:
        # Outputs 2p and 2p + 1 are made of l/2 averages and l/2 details from place p on.
        xp, pairs, taps = namespace(y), -(-length // 2), self.filter.shape[0] // 2
        half = y.shape[-1] // 2
        starts = [side + k for side in (0, half) for k in range(taps)]
        windows = xp.stack([y[..., k : k + pairs] for k in starts], axis=-1)
        found = windows @ self._kernel()
        return xp.reshape(found, (*y.shape[:-1], 2 * pairs))[..., :length]

    def _inwards(self, x: Array) -> Array:
        xp, taps = namespace(x), self.filter.shape[0] // 2
        if x.shape[-1] % 2:
            x = xp.concat([x, xp.zeros_like(x[..., :1])], axis=-1)
        pairs = xp.reshape(x, (*x.shape[:-1], x.shape[-1] // 2, 2))
        found = pairs @ self._kernel().mT
        none = xp.zeros_like(found[..., : taps - 1, 0])
        sides = []
        for side in (0, taps):
            total = xp.concat([found[..., side], none], axis=-1)
            for k in range(1, taps):
                before, after = none[..., :k], none[..., k:]
                total = total + xp.concat([before, found[..., side + k], after], axis=-1)
            sides.append(total)
        return xp.concat(sides, axis=-1)

    def _kernel(self) -> Array:
        """From ``l/2`` averages and as many details to two outputs, shape (l, 2)."""
        low = as_compute(self.filter)
        xp = namespace(low)
        pairs = xp.reshape(xp.flip(low), (-1, 2))
        high = xp.concat([pairs[:, :1], -pairs[:, 1:]], axis=1)
        low = xp.flip(xp.reshape(low, (-1, 2)), axis=0)
        return xp.concat([low, xp.flip(high, axis=0)], axis=0)


def daubechies(order: int) -> np.ndarray:
    """Low-pass filter of Daubechies' orthogonal wavelet with ``order`` vanishing moments.

    Its polynomial has ``order`` roots at -1 and the ``order - 1`` roots within the unit circle that
    make it orthogonal :cite:p:`daubechies1988orthonormal`.

    Parameters
    ----------
    order : int
        In 1..10, where the roots are accurate to rounding.

    Returns
    -------
    numpy.ndarray, shape (2 order,)
        Its squares sum to one.

    Examples
    --------
    >>> import numpy as np
    >>> bool(np.allclose(daubechies(2)[:2], (np.array([1, 3]) + 3**0.5) / 32**0.5))
    True
    """
    if not 1 <= order <= 10:
        raise ValueError(f"order must be in 1..10, got {order}")
    y = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    middle = 1 - 2 * y
    root = np.sqrt(middle * middle - 1 + 0j)
    inside = np.where(abs(middle + root) < 1, middle + root, middle - root)
    taps = np.real(np.poly(np.concatenate([-np.ones(order), inside])))
    return taps * (2**0.5 / np.sum(taps))


def wavelet_places(drawn: np.ndarray, shape: tuple[int, int], taps: int) -> np.ndarray:
    """Places in the coefficients of a weight of places in the weight, as WaveFT takes them.

    It lays the weight into the middle of the matrix of coefficients; and it stacks the quarter of
    details of rows to the right of the averages, where ``T S T'`` has it below.

    Parameters
    ----------
    drawn : numpy.ndarray
        In ``0..m n - 1``, such as :func:`peft_places`; the order is kept.
    shape : (int, int)
        ``(m, n)``.
    taps : int
        Length of the filter.
    """
    (m, n), (rows, columns) = shape, _wavelet_grid(shape, taps)
    i, j = drawn // n + (rows - m) // 2, drawn % n + (columns - n) // 2
    lower, right = i >= rows // 2, j >= columns // 2
    i, j = i - lower * (rows // 2), j - right * (columns // 2)
    return (i + right * (rows // 2)) * columns + j + lower * (columns // 2)


def _wavelet_grid(shape: tuple[int, int], taps: int) -> tuple[int, int]:
    m, n = (side + taps - 2 for side in shape)
    return m + m % 2, n + n % 2


def _drawn(shape: tuple[int, int], count: int, seed: int | None, rng: RNG) -> np.ndarray:
    if seed is None:
        return random_places(math.prod(shape), count, rng)
    return peft_places(math.prod(shape), count, seed=seed)


def _complex(x: Array) -> Array:
    xp = namespace(x)
    return xp.astype(x, {"float32": xp.complex64}.get(dtype_name(x.dtype), xp.complex128))
