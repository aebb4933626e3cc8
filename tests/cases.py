"""Matrices on which singular value decompositions go wrong, at small sizes."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

M, N = 160, 120
J = np.arange(1, N + 1)

#: Spectra of length N; see each name.
SPECTRA = {
    "1/j": 1.0 / J,
    "1/j^2": 1.0 / J**2,
    "exp(-j/5)": np.exp(-J / 5),
    "10^(-16j/n)": 10.0 ** (-16.0 * J / N),
    "step": np.where(J <= 10, 1.0, 1e-3),
    "S-shape": 1e-4 + 1.0 / (1.0 + np.exp((J - 30) / 4.0)),
    "top value 20-fold": np.where(J <= 20, 1.0, 0.5 / J),
    "cluster within 1e-8": np.where((J >= 8) & (J < 16), 0.1 * (1 + 1e-8 * (8 - J) / 8), 1.0 / J),
    "exact rank 5": np.where(J <= 5, 1.0 / J, 0.0),
    "graded 1..1e-9": np.where(J <= 10, 10.0 ** (-(J - 1.0)), 0.0),
    "slow": 1.0 - 0.5 * J / N,
    "scale 1e150": 1e150 / J,
    "scale 1e-150": 1e-150 / J,
    "scale 1e18": 1e18 / J,
    "scale 1e-18": 1e-18 / J,
}


def processes(count):
    """Workers that are new interpreters: a fork of one in which JAX runs may hang."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def orthonormal(m, k, rng, complex_=False):
    x = rng.standard_normal((m, k))
    return np.linalg.qr(x + 1j * rng.standard_normal((m, k)) if complex_ else x)[0]


def with_spectrum(s, m=M, n=N, *, complex_=False, seed=0):
    """Matrix with singular values ``s`` and random singular vectors."""
    rng = np.random.default_rng(seed)
    u, v = (orthonormal(size, len(s), rng, complex_) for size in (m, n))
    return (u * s) @ v.conj().T


def gaussian(*shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def _kahan(n=N, angle=1.2):
    upper = np.eye(n) - np.cos(angle) * np.triu(np.ones((n, n)), 1)
    return np.sin(angle) ** np.arange(n)[:, None] * upper


def _one_hot():
    a = np.zeros((M, N))
    a[np.arange(0, M, 2), np.arange(M // 2)] = 1.0 / np.arange(1, M // 2 + 1)
    return a


#: Matrices that are not made from a spectrum.
STRUCTURED = {
    "low rank + noise": lambda: (
        gaussian(M, 6) @ gaussian(6, N, seed=1) / 10 + 0.05 * gaussian(M, N, seed=2)
    ),
    "kahan": _kahan,
    "hilbert": lambda: 1.0 / (np.arange(M)[:, None] + np.arange(N) + 1.0),
    "one-hot rows": _one_hot,
    "identity": lambda: np.eye(M, N),
    "zero": lambda: np.zeros((M, N)),
    "ones": lambda: np.ones((M, N)),
}

NAMES = [*SPECTRA, *STRUCTURED]

#: Squares of these leave the range of single precision: that is their point, in double precision.
DOUBLE_ONLY = {"scale 1e150", "scale 1e-150"}


def matrix(name, dtype=np.float64):
    """The case ``name`` in ``dtype``, of shape (160, 120) (Kahan: square)."""
    if name in SPECTRA:
        complex_ = np.issubdtype(dtype, np.complexfloating)
        return with_spectrum(SPECTRA[name], complex_=complex_).astype(dtype)
    return STRUCTURED[name]().astype(dtype)


def exact(a):
    """Singular values by LAPACK in double precision."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    return np.linalg.svd(a.astype(wide), compute_uv=False)
