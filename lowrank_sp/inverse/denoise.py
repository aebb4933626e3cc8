r"""Denoising: a low-rank matrix, or a signal whose Hankel matrix has low rank, seen in full.

For :math:`Y = X + \sigma W` with independent entries of unit variance in the :math:`m \times n`
matrix :math:`W`, write :math:`\beta = \min(m, n) / \max(m, n)` and measure singular values in
units of :math:`\sqrt{\max(m, n)}\,\sigma`. A singular value :math:`x > \beta^{1/4}` of :math:`X`
appears in :math:`Y`, as its size grows, at

.. math:: y = \sqrt{(x + 1/x)(x + \beta/x)} > 1 + \sqrt\beta

with singular vectors whose cosines with the true ones multiply to :math:`c\,\tilde c`; smaller ones
do not appear. A shrinker :math:`\eta(y, \beta)` is what to put in the place of :math:`y`
:cite:p:`gavish2017optimal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, frobenius, from_host, host_view, to_host
from lowrank_sp.factors import SVD, check_rank
from lowrank_sp.inverse.measurements import HankelLift
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.linalg.spectrum import gavish_donoho_factor, gavish_donoho_threshold
from lowrank_sp.linalg.svd import singular_values, truncated_svd

#: From singular values ``y`` of the data, in the units above, and ``beta`` to those of the answer.
Shrinker = Callable[[np.ndarray, float], np.ndarray]


def hard(y: np.ndarray, beta: float) -> np.ndarray:
    """Keep or drop: the best threshold for the squared error :cite:p:`gavish2014optimal`.

    Examples
    --------
    >>> import numpy as np
    >>> hard(np.array([2.2, 2.3, 2.4]), 1.0)  # 4 / sqrt(3) = 2.309
    array([0. , 0. , 2.4])
    """
    return np.where(y > gavish_donoho_factor(beta), y, 0.0)


def frobenius_loss(y: np.ndarray, beta: float) -> np.ndarray:
    r"""The shrinker of least squared error: :math:`\sqrt{(y^2 - \beta - 1)^2 - 4\beta} / y`."""
    a, root = _quadratic(y, beta)
    return np.where(a > 0, root, 0.0) / np.where(a > 0, y, 1.0)


def operator_loss(y: np.ndarray, beta: float) -> np.ndarray:
    r"""The shrinker of least error in the spectral norm.

    .. math:: \eta = x \sqrt{(x^2 + \beta) / (x^2 + 1)}

    This is the true singular value :math:`x` for square matrices only :cite:p:`leeb2022optimal`.
    """
    x2 = _true_square(y, beta)
    return np.sqrt(x2 * (x2 + beta) / (x2 + 1))


def nuclear_loss(y: np.ndarray, beta: float) -> np.ndarray:
    r"""The shrinker of least error in the nuclear norm.

    .. math:: \eta = \max\bigl(0,\ (x^4 - \beta - \sqrt\beta\, x y) / (x^2 y)\bigr)
    """
    x = np.sqrt(_true_square(y, beta))
    seen = x > 0
    x, y = np.where(seen, x, 1.0), np.where(seen, y, 1.0)
    return np.where(seen, np.maximum(x**4 - beta - math.sqrt(beta) * x * y, 0.0) / (x**2 * y), 0.0)


def variational_bayes(y: np.ndarray, beta: float) -> np.ndarray:
    r"""Posterior mean of variational Bayesian matrix factorization with empirical priors.

    The global minimum of its free energy is :math:`\eta = x^2 / y` beyond
    :math:`y^2 = (1 + \tau)(1 + \beta/\tau)`, and zero up to there :cite:p:`nakajima2013global`;
    :math:`\tau` is the root of :math:`\Phi(\tau) + \Phi(\tau/\beta)` with
    :math:`\Phi(z) = \log(1 + z)/z - 1/2`.
    """
    tau = _vb_root(beta)
    seen = y**2 > (1 + tau) * (1 + beta / tau)
    return np.where(seen, _true_square(y, beta), 0.0) / np.where(seen, y, 1.0)


def shrink(a: Array, shrinker: Shrinker = frobenius_loss, *, noise: float | None = None) -> SVD:
    r"""Denoise a matrix: replace its singular values, keep its singular vectors.

    .. math:: \hat X = \sum_i \sqrt{\max(m, n)}\,\sigma\;
              \eta\Bigl(\frac{s_i}{\sqrt{\max(m, n)}\,\sigma}, \beta\Bigr)\, u_i v_i^H

    Parameters
    ----------
    a : array of shape (m, n), or an operator small enough to be made dense
    shrinker : callable
        :func:`hard`, :func:`frobenius_loss`, :func:`operator_loss`, :func:`nuclear_loss`,
        :func:`variational_bayes`, or any function ``(y, beta)`` of NumPy arrays.
    noise : float, optional
        Standard deviation of the noise, in units of the entries. By default it is estimated
        (:func:`noise_level`), for which the rank should be small against ``min(m, n)``.

    Returns
    -------
    SVD
        Of the rank that the shrinker leaves, which may be 0. ``error`` is how far it is from ``a``.

    Notes
    -----
    The cost is that of all singular values and of :func:`~lowrank_sp.linalg.svd.truncated_svd` at
    the rank that remains.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = np.outer(rng.standard_normal(300), rng.standard_normal(200))
    >>> data = truth + rng.standard_normal((300, 200))
    >>> f = shrink(data)
    >>> f
    SVD(300 x 200, rank 1, float64)
    >>> predicted = asymptotic_error(np.linalg.norm(truth) / 300**0.5, 200 / 300)
    >>> bool(abs(np.linalg.norm(f.to_dense() - truth) ** 2 / (300 * predicted) - 1) < 0.2)
    True
    """
    s = singular_values(a)
    m, n = a.shape
    if noise is None:
        noise = noise_level(s, (m, n))
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    y = to_host(s).astype(np.float64)
    if noise > 0:
        unit = math.sqrt(max(m, n)) * noise
        y = unit * shrinker(y / unit, min(m, n) / max(m, n))
    return _with_values(a, s, y)


def optshrink(a: Array, rank: int) -> SVD:
    r"""Denoise a matrix of known rank, in noise of unknown law.

    With the singular values :math:`s_{r+1}, \dots` as a sample of the noise,

    .. math:: \hat s_i = -2\, \frac{D(s_i)}{D'(s_i)}, \qquad
              D(z) = \frac{\operatorname{tr} z (z^2 - S S^T)^{-1}}{m - r} \cdot
                     \frac{\operatorname{tr} z (z^2 - S^T S)^{-1}}{n - r}

    are asymptotically the best weights of the leading singular vectors for the squared error, for
    any noise whose singular vectors are isotropic :cite:p:`nadakuditi2014optshrink`.

    Parameters
    ----------
    a : array of shape (m, n), or an operator small enough to be made dense
    rank : int
        In ``1..min(m, n) - 1``. One that is too large does little harm: the weights of noise are
        small.

    Returns
    -------
    SVD
        ``error`` is how far it is from ``a``.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = np.outer(rng.standard_normal(300), rng.standard_normal(200))
    >>> data = truth + rng.standard_normal((300, 200))
    >>> bool(abs(optshrink(data, rank=1).s[0] / shrink(data, noise=1.0).s[0] - 1) < 1e-2)
    True
    """
    m, n = a.shape
    rank = check_rank(rank, min(m, n) - 1, (m, n))
    s = singular_values(a)
    values = to_host(s).astype(np.float64)
    scale = values[0] or 1.0
    z, tail = values[:rank, None] / scale, values[None, rank:] / scale
    # A value that the tail repeats has weight zero, by continuity.
    alone = z[:, 0] > tail[0, 0] * (1 + 4 * np.finfo(np.float64).eps)
    z = np.where(alone[:, None], z, 2.0)
    parts = np.sum(z / (z**2 - tail**2), axis=1)
    slopes = -np.sum((z**2 + tail**2) / (z**2 - tail**2) ** 2, axis=1)
    z, (short, long) = z[:, 0], sorted((m, n))
    d = parts * (parts + (long - short) / z)
    slope = slopes * (parts + (long - short) / z) + parts * (slopes - (long - short) / z**2)
    weights = np.where(alone, -2 * scale * d / slope, 0.0)
    return _with_values(a, s, weights)


def cadzow(
    signal: Array,
    *,
    rank: int,
    rows: int | None = None,
    init: Array | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Array], Any] | None = None,
) -> Solution:
    r"""Denoise a sum of damped exponentials by Cadzow's alternating projections.

    The Hankel matrix :math:`H_{ij} = h_{i+j}` of :math:`h_t = \sum_{k=1}^r a_k z_k^t` has rank
    :math:`r`. From the data on, it is in turn truncated to that rank, and made Hankel again by
    averaging its anti-diagonals :cite:p:`cadzow1988signal`.

    Parameters
    ----------
    signal : array, shape (N,)
        Real or complex.
    rank : int
        Number of exponentials. A real sinusoid counts two.
    rows : int, optional
        Rows of the Hankel matrix; by default ``N // 2 + 1``, which makes it almost square.
    init : array, shape (N,), optional
        Signal to start from, by default the data.
    rng : int, Generator or None
        Seed of the truncated SVDs.
    stop : Stop
        Monitored is the change of the signal, relative to it.
    callback : callable, optional

    Returns
    -------
    Solution
        Of an array of shape (N,), whose Hankel matrix has rank ``rank`` to the accuracy of the last
        change. It is near, but not always nearest, to the data.

    Notes
    -----
    The Hankel matrix is multiplied by FFT, and its projection formed from the factors:
    ``O(r N log N)`` beside the truncated SVD.

    Examples
    --------
    >>> import numpy as np
    >>> t = np.arange(64)
    >>> truth = np.exp(2j * np.pi * 0.11 * t) + np.exp((-0.02 + 2j * np.pi * 0.3) * t)
    >>> noise = np.random.default_rng(0).standard_normal((64, 2)) @ [0.1, 0.1j]
    >>> found = cadzow(truth + noise, rank=2, rng=0)
    >>> found.converged, bool(np.linalg.norm(found.value - truth) < np.linalg.norm(noise) / 2)
    (True, True)
    """
    if signal.ndim != 1 or signal.shape[0] == 0:
        raise ValueError(f"signal must have shape (N,) with N > 0, got {tuple(signal.shape)}")
    length = signal.shape[0]
    # The FFTs of NumPy serve all arrays that it can read in place.
    data = signal if (host := host_view(signal)) is None else host
    lift = HankelLift(length, length // 2 + 1 if rows is None else rows, like=data)
    rank = check_rank(rank, min(lift.shape), lift.shape)
    seed = int(np.random.default_rng(rng).integers(2**63))
    start = as_compute(data)
    if init is not None:
        if init.shape != signal.shape:
            raise ValueError(f"init must have shape {signal.shape}, got {tuple(init.shape)}")
        start = as_compute(init if host is None else to_host(init))

    def step(x: Array) -> tuple[Array, float]:
        following = lift.average(truncated_svd(lift.lift(x), rank, rng=seed))
        return following, frobenius(following - x) / (frobenius(x) or 1.0)

    home = as_compute(signal[:0])
    return iterate(
        step,
        start,
        stop=stop,
        dtype=start.dtype,
        callback=callback,
        value=lambda x: x if host is None else from_host(x, home),
    )


def noise_level(s: Array, shape: tuple[int, int]) -> float:
    """Standard deviation of the noise from all singular values, most of which are noise.

    Their median, divided by that of the Marchenko-Pastur law.

    Parameters
    ----------
    s : array, shape (min(m, n),)
    shape : (int, int)
    """
    return gavish_donoho_threshold(s, shape) / gavish_donoho_threshold(s, shape, noise=1.0)


def asymptotic_error(
    x: Any, beta: float, shrinker: Shrinker = frobenius_loss
) -> float | np.ndarray:
    r"""Squared error of :func:`shrink` in the limit of large matrices, for each singular value.

    .. math:: \lim \frac{\|\hat X - X\|_F^2}{\max(m, n)\,\sigma^2} = \sum_i
              \bigl(x_i^2 + \eta_i^2 - 2 x_i \eta_i\, c_i \tilde c_i\bigr), \qquad
              \eta_i = \eta(y(x_i), \beta)

    Parameters
    ----------
    x : float or NumPy array
        True singular values in units of ``sqrt(max(m, n)) * noise``.
    beta : float
        Aspect ratio ``min(m, n) / max(m, n)``.
    shrinker : callable

    Examples
    --------
    >>> float(asymptotic_error(2.0, 1.0))
    1.75
    """
    x = np.asarray(x, dtype=np.float64)
    seen = x**4 > beta
    z = np.where(seen, x, 1.0)
    y = np.sqrt((z + 1 / z) * (z + beta / z))
    cosines = (z**4 - beta) / np.sqrt((z**4 + beta * z**2) * (z**4 + z**2))
    eta = np.where(seen, shrinker(y, beta), 0.0)
    return x**2 + eta**2 - 2 * x * eta * np.where(seen, cosines, 0.0)


def _quadratic(y: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """``a = y^2 - beta - 1``, zero within the noise, and ``sqrt(a^2 - 4 beta)``."""
    a = np.where(y > 1 + math.sqrt(beta), y**2 - beta - 1, 0.0)
    return a, np.sqrt(np.maximum(a**2 - 4 * beta, 0.0))


def _true_square(y: np.ndarray, beta: float) -> np.ndarray:
    """``x^2`` of the true singular value that appears as ``y``; zero within the noise."""
    a, root = _quadratic(y, beta)
    return (a + root) / 2


@lru_cache
def _vb_root(beta: float) -> float:
    from scipy.optimize import brentq

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    # Between the roots of the two terms.
    root: Any = brentq(lambda t: phi(t) + phi(t / beta), 2.5 * beta, 2.6)
    return root


def _with_values(a: Array, s: Array, values: np.ndarray) -> SVD:
    """The leading triplets of ``a``, whose singular values are ``s``, with others instead."""
    rank = int(np.count_nonzero(values))
    f = truncated_svd(a, max(rank, 1), rng=0)
    kept = from_host(values[:rank], f.u, f.s.dtype)
    error = math.hypot(frobenius(s[:rank] - kept), frobenius(s[rank:]))
    return SVD(f.u[:, :rank], kept, f.vh[:rank, :], None, error)
