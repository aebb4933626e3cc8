"""Factorizations from sketches: streamed rows, one-pass and positive semidefinite Nystrom."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    detached,
    device,
    eps,
    frobenius,
    from_host,
    inner,
    max_abs,
    namespace,
    standard_normal,
    to_host,
    with_rows_added,
)
from lowrank_sp.factors import SVD, LowRank, check_rank
from lowrank_sp.linalg.basis import NOT_FINITE, check_oversampling
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.operators import as_operator

_SIGNS = 4  # nonzeros in each column of a sparse-sign sketch


class StreamingSVD:
    r"""Truncated SVD of a matrix whose rows are seen once, in any order.

    Four linear sketches are kept: a co-range :math:`\Upsilon A`, a range :math:`A \Omega^H`, a core
    :math:`\Phi A \Psi^H` and a small test sketch :math:`\Theta A`. As they are linear, updates to
    the same rows add up, and sketches of parts of the data can be merged.

    Parameters
    ----------
    shape : (int, int)
        Of the whole matrix, ``(m, n)``.
    rank : int
        In ``1..min(m, n)``.
    rng : int, Generator or None
        Objects to be merged need the same integer here.

    Notes
    -----
    With ``k = 4 rank + 1`` and ``s = 2 k + 1`` it keeps ``k (m + n) + s^2`` numbers and spends
    ``O(k + s)`` flops an entry :cite:p:`tropp2019streaming`. Blocks may come from any array
    library; all from one.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.outer(np.arange(1.0, 41), np.ones(30))
    >>> stream = StreamingSVD(a.shape, rank=1, rng=0)
    >>> for start in (0, 10, 20, 30):
    ...     stream.update(start, a[start : start + 10])
    >>> bool(np.allclose(stream.svd().to_dense(), a))
    True
    """

    def __init__(self, shape: tuple[int, int], rank: int, *, rng: RNG = None):
        m, n = shape
        self.shape = (m, n)
        self.rank = check_rank(rank, min(m, n), shape)
        k = min(4 * rank + 1, min(m, n))
        s = min(2 * k + 1, max(m, n))
        generator = np.random.default_rng(rng)
        self._left = _SparseSigns(k, m, generator)
        self._right = _SparseSigns(k, n, generator)
        self._core_left = _SparseSigns(s, m, generator)
        self._core_right = _SparseSigns(s, n, generator)
        self._test = generator.standard_normal((10, m))
        self._sketches: tuple[Array, Array, Array, Array] | None = None

    def update(self, start_row: int, block: Array) -> None:
        """Add ``block``, of shape ``(rows, n)``, to the rows from ``start_row`` on."""
        m, n = self.shape
        if block.ndim != 2 or block.shape[1] != n:
            raise ValueError(f"a block must have shape (rows, {n}), got {tuple(block.shape)}")
        stop = start_row + block.shape[0]
        if not 0 <= start_row <= stop <= m:
            raise ValueError(f"rows must lie in 0..{m}, got {start_row}..{stop}")
        block = as_compute(detached(block))
        if not math.isfinite(max_abs(block)):
            raise ValueError(f"a block must be finite, got NaN or inf in rows {start_row}..{stop}")
        rows = slice(start_row, stop)
        corange, range_, core, test = self._sketches or self._empty(block)
        xp = namespace(block, range_)
        range_ = xp.astype(range_, xp.result_type(range_, block), copy=False)
        part = self._core_left.columns(rows, block) @ block
        seen = block @ self._right.columns(slice(0, n), block).mT
        self._sketches = (
            corange + self._left.columns(rows, block) @ block,
            with_rows_added(range_, start_row, seen),
            core + part @ self._core_right.columns(slice(0, n), block).mT,
            test + from_host(self._test[:, rows], block, block.dtype) @ block,
        )

    def _empty(self, block: Array) -> tuple[Array, Array, Array, Array]:
        m, n = self.shape
        k, s = self._left.height, self._core_left.height
        shapes = ((k, n), (m, k), (s, s), (len(self._test), n))
        zeros = (from_host(np.zeros(shape), block, block.dtype) for shape in shapes)
        return tuple(zeros)  # pyright: ignore[reportReturnType]

    def merge(self, other: StreamingSVD) -> None:
        """Add what ``other`` has seen, which must have been made with the same arguments."""
        same = self.shape == other.shape and self.rank == other.rank
        if not same or not np.array_equal(self._test, other._test):
            raise ValueError(
                "only sketches of one shape, rank and integer rng can be merged, "
                f"got {self} and {other}"
            )
        if other._sketches is not None:
            mine = self._sketches or other._empty(other._sketches[0])
            total = (a + b for a, b in zip(mine, other._sketches, strict=True))
            self._sketches = tuple(total)  # pyright: ignore[reportAttributeAccessIssue]

    def svd(self) -> SVD:
        """The leading ``rank`` triplets of all that was seen, with :meth:`error_estimate`."""
        corange, range_, core, test = self._seen()
        q, _ = orthonormalize(range_)
        p, _ = orthonormalize(adjoint(corange))
        xp = namespace(core)
        if not (q.shape[1] and p.shape[1]):
            q, p = (xp.eye(n, self.rank, dtype=core.dtype, device=device(core)) for n in self.shape)
        left = self._core_left.columns(slice(0, self.shape[0]), q) @ q
        right = self._core_right.columns(slice(0, self.shape[1]), p) @ p
        middle = adjoint(_least_squares(right, adjoint(_least_squares(left, core))))
        f = LowRank(q @ middle, adjoint(p)).svd()
        if f.rank > self.rank:
            f = f.truncate(self.rank)
        probes = from_host(self._test, test, test.dtype)
        left, right = f.factors()
        error = frobenius(test - (probes @ left) @ right) / len(self._test) ** 0.5
        return SVD(f.u, f.s, f.vh, None, error)

    def error_estimate(self) -> float:
        r"""Estimate of ``||A - svd()||_F`` from the test sketch, unbiased in its square.

        Its relative standard deviation is at most :math:`\sqrt{2/10}`, the more singular values
        share the error the less.
        """
        return self.svd().error

    def _seen(self) -> tuple[Array, Array, Array, Array]:
        if self._sketches is None:
            raise ValueError("nothing was seen yet; call update first")
        return self._sketches

    def __repr__(self) -> str:
        return f"StreamingSVD({self.shape[0]} x {self.shape[1]}, rank {self.rank})"


class _SparseSigns:
    """A ``height x width`` sketch with a few entries ``+-1/sqrt(4)`` in every column.

    One that is no smaller than what it sketches is the identity.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.height = height
        if height >= width:
            self._rows, self._values = np.arange(width)[None], np.ones((1, width))
            return
        stacks = np.array_split(np.arange(height), min(_SIGNS, height))
        self._rows = np.stack([rng.choice(stack, width) for stack in stacks])
        self._values = rng.choice((-1.0, 1.0), (len(stacks), width)) / len(stacks) ** 0.5

    def columns(self, which: slice, like: Array) -> Array:
        """Some columns as a dense array of the library of ``like``."""
        rows, values = self._rows[:, which], self._values[:, which]
        dense = np.zeros((self.height, rows.shape[1]))
        dense[rows, np.arange(rows.shape[1])] = values
        return from_host(dense, like, like.dtype)


def _least_squares(a: Array, b: Array) -> Array:
    """``argmin_x ||a x - b||_F``, of minimum norm, with directions of rounding size left out."""
    xp = namespace(a, b)
    u, s, vh = xp.linalg.svd(a, full_matrices=False)
    floor = 10 * eps(a.dtype) * max_abs(s)
    inverse = xp.where(s > floor, 1.0 / xp.where(s > floor, s, xp.ones_like(s)), xp.zeros_like(s))
    return adjoint(vh) @ (xp.astype(inverse, u.dtype)[:, None] * (adjoint(u) @ b))


def generalized_nystrom(
    a: Any, rank: int, *, oversampling: int | None = None, rng: RNG = None
) -> LowRank:
    r"""Near-best approximation from one read, without orthogonalizing a tall block.

    .. math:: A \approx (A X)\, (Y^H A X)^{+}\, (Y^H A)

    Parameters
    ----------
    a : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
    rank : int
        Columns of the Gaussian ``X``, in ``1..min(m, n)``.
    oversampling : int, optional
        Further columns of ``Y``; half of ``rank`` by default.
    rng : int, Generator or None

    Returns
    -------
    LowRank
        Of rank at most ``rank``: directions that the core cannot resolve are dropped
        :cite:p:`nakatsukasa2020fast`.
    """
    operator = as_operator(a)
    m, n = operator.shape
    rank = check_rank(rank, min(m, n), (m, n))
    extra = max(1, rank // 2) if oversampling is None else oversampling
    check_oversampling(extra)
    generator = np.random.default_rng(rng)
    x = standard_normal((n, rank), like=operator.like, rng=generator)
    y = standard_normal((m, min(m, rank + extra)), like=operator.like, rng=generator)
    columns, rows = operator.two_sided(x, y)
    xp = namespace(columns)
    if not math.isfinite(max_abs(columns)):
        raise ValueError(NOT_FINITE)
    u, s, vh = xp.linalg.svd(adjoint(y) @ columns, full_matrices=False)
    keep = int(xp.sum(xp.astype(s > 10 * eps(s.dtype) * max_abs(s), xp.int32)))
    scale = xp.astype(s[:keep], u.dtype)
    return LowRank(columns @ (adjoint(vh[:keep, :]) / scale), adjoint(u[:, :keep]) @ adjoint(rows))


def nystrom(a: Any, rank: int, *, oversampling: int = 8, rng: RNG = None) -> SVD:
    r"""Leading eigenpairs of a positive semidefinite matrix from one product with it.

    .. math:: A \approx (A\Omega)\, (\Omega^H A \Omega)^{+}\, (A\Omega)^H

    Parameters
    ----------
    a : array of shape (n, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
        Hermitian positive semidefinite.
    rank : int
        In ``1..n``.
    oversampling : int
        Columns beyond ``rank``.
    rng : int, Generator or None

    Returns
    -------
    SVD
        ``vh`` is the adjoint of ``u``; ``s`` never exceeds the eigenvalues. ``error`` is a
        leave-one-out estimate of the Frobenius error :cite:p:`epperly2024efficient`.

    Raises
    ------
    ValueError
        If the sketch shows that ``a`` is not positive semidefinite.
    """
    operator = as_operator(a)
    n = operator.shape[0]
    if operator.shape != (n, n):
        raise ValueError(f"a must be square, got shape {operator.shape}")
    rank = check_rank(rank, n, (n, n))
    check_oversampling(oversampling)
    width = min(n, rank + oversampling)
    omega, _ = orthonormalize(standard_normal((n, width), like=operator.like, rng=rng))
    y = operator.matmul(omega)
    size = frobenius(y)
    if not math.isfinite(size):
        raise ValueError(NOT_FINITE)
    # A shift of rounding size makes the core positive definite; it is taken off again below.
    shift = n**0.5 * eps(operator.dtype) * size
    y = y + shift * omega
    core = _wide(inner(omega, y))
    values, vectors = np.linalg.eigh((core + core.conj().T) / 2)
    if values[0] < -10 * shift:
        raise ValueError(
            f"the matrix must be positive semidefinite, got a Rayleigh quotient of {values[0]:.3g}"
        )
    values = np.maximum(values, shift * eps(operator.dtype) or 1.0)
    xp = namespace(y)
    q, r = xp.linalg.qr(y @ from_host(vectors / np.sqrt(values), y))
    left, s, _ = xp.linalg.svd(r, full_matrices=False)
    s = xp.where(s**2 > shift, s**2 - shift, xp.zeros_like(s))
    u = (q @ left)[:, :rank]
    # (A - A_i) omega_i = y core^-1 e_i / (core^-1)_ii, for the sketch without column i.
    inverse = (vectors / values) @ vectors.conj().T
    left_out = to_host(xp.linalg.vector_norm(y @ from_host(inverse, y), axis=0))
    left_out = left_out / np.diag(inverse).real
    # A - A_i annihilates the other columns of omega, and omega_i is uniform on the unit sphere of
    # their orthogonal complement.
    error = float(np.sqrt(np.mean(left_out**2) * (n - width + 1))) if width < n else 0.0
    tail = float(xp.linalg.vector_norm(s[rank:])) if width > rank else 0.0
    f = SVD.canonical(u, s[:rank], adjoint(u))
    return SVD(f.u, f.s, f.vh, None, math.hypot(error, tail))


def _wide(x: Array) -> np.ndarray:
    host = to_host(x)
    return host.astype(np.result_type(host, np.float64), copy=False)
