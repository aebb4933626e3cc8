"""Block Krylov subspaces for singular triplets, one read of the matrix per step.

The space is spanned by ``(A^H A)^j A^H omega``, ``j = 0, 1, ...``, for a Gaussian block ``omega``.
It starts from the left sketch ``A^H omega`` rather than from a random block, for ``A^H (A x)`` with
random ``x`` loses every direction with a singular value below ``sqrt(eps) sigma_1``. A
:class:`Basis` keeps an orthonormal ``p`` of the space and ``y = A p``; each step multiplies the
newest block by ``A`` and ``A^H`` together and orthogonalizes the result against all of ``p``.
Singular values come from ``y``, never from its Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    eps,
    from_host,
    namespace,
    standard_normal,
    to_host,
)
from lowrank_sp.factors import SVD
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.operators import LinearOperator, Scaled

NOT_FINITE = (
    "the matrix must be finite, got NaN or infinite entries, or entries too large to multiply; "
    "clean or rescale it first"
)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of a block Krylov space and what is known of ``A`` on it.

    Attributes
    ----------
    p : array, shape (n, d)
        Orthonormal columns.
    y : array, shape (m, d)
        ``A p``.
    gram : ndarray, shape (d, d)
        ``y^H y``, on the host.
    fresh : array, shape (n, w)
        The next orthonormal block, not multiplied yet.
    coupling : ndarray
        ``A^H A`` takes the last columns of ``p`` out of the space by ``fresh @ coupling``.
    sketch : ndarray
        ``r`` of the first block: the columns of ``A^H omega`` are ``p[:, :w] @ r``.
    size : float
        Estimate of ``||A||_F``, from the sketch.
    sketched : int
        Random columns that the space started from.
    reads : int
        Reads of ``A`` so far.
    """

    p: Array
    y: Array
    gram: np.ndarray
    fresh: Array
    coupling: np.ndarray
    sketch: np.ndarray
    size: float
    sketched: int
    reads: int

    @property
    def columns(self) -> int:
        """Dimension ``d`` of the space."""
        return self.p.shape[1]


def start(
    a: LinearOperator, width: int, rng: np.random.Generator
) -> tuple[Basis, LinearOperator, float]:
    """Sketch ``A^H omega``: an empty basis with its first fresh block.

    The operator is returned times a factor: 1 where its size is moderate, and otherwise the power
    of two that keeps squares in range. Raises ValueError where ``A`` is not finite.
    """
    xp = namespace(a.like)
    m, n = a.shape
    z = a.sketch(width, rng)
    largest = float(xp.max(abs(z)))
    if not math.isfinite(largest):
        raise ValueError(NOT_FINITE)
    exponent = math.frexp(largest)[1]
    factor = 1.0 if abs(exponent) <= 24 else 2.0**-exponent
    if factor != 1.0:
        a, z = Scaled(a, factor), z * factor
    fresh, r = orthonormalize(z)
    empty = {"dtype": a.dtype, "device": a.device}
    basis = Basis(
        p=xp.zeros((n, 0), **empty),
        y=xp.zeros((m, 0), **empty),
        gram=np.zeros((0, 0), dtype=np.result_type(to_host(r), np.float64)),
        fresh=fresh,
        coupling=np.zeros((0, 0)),
        sketch=to_host(r),
        size=float(np.linalg.norm(to_host(r))) / width**0.5,
        sketched=width,
        reads=1,
    )
    return basis, a, factor


def expand(a: LinearOperator, basis: Basis) -> Basis:
    """Multiply the fresh block and make the next one: one read of ``A``."""
    y, z = a.normal(basis.fresh)
    basis = _append(basis, y)
    # p^H z = y^H y_fresh is in the Gram matrix already.
    cross = from_host(basis.gram[:, -y.shape[1] :], y)
    z = z - basis.p @ cross
    floor = 10 * eps(a.dtype) * float(np.max(np.abs(np.diag(basis.gram)), initial=0.0))
    fresh, r = _orthonormalize_against(basis.p, z, floor)
    width = min(fresh.shape[1], min(a.shape) - basis.columns)
    return replace(basis, fresh=fresh[:, :width], coupling=to_host(r)[:width, :])


def _append(basis: Basis, y: Array) -> Basis:
    xp = namespace(y)
    # Blocks of columns are kept as rows in memory, which makes appending a plain copy.
    p = xp.concat([basis.p.mT, basis.fresh.mT], axis=0).mT
    y = xp.concat([basis.y.mT, y.mT], axis=0).mT
    d = basis.columns
    cross = to_host(adjoint(y) @ y[:, d:])
    gram = np.zeros((p.shape[1],) * 2, dtype=np.result_type(cross, np.float64))
    gram[:d, :d] = basis.gram
    gram[:, d:] = cross
    gram[d:, :d] = cross[:d].conj().T
    return replace(basis, p=p, y=y, gram=gram, reads=basis.reads + 1)


def _orthonormalize_against(p: Array, z: Array, floor: float) -> tuple[Array, Array]:
    """``q`` and ``r`` with ``z = q r``, where ``p^H z = 0`` up to rounding, and ``p^H q = 0``.

    The second round of projection and orthonormalization restores what small ``z`` lost. What it
    halves was rounding to begin with: it is dropped, like directions no longer than ``floor``.
    """
    q, first = orthonormalize(z, floor=floor)
    q, second = orthonormalize(_project_out(p, q), floor=0.5)
    return q, second @ first


def _project_out(p: Array, z: Array) -> Array:
    return z - p @ (adjoint(p) @ z)


def inject(a: LinearOperator, basis: Basis, width: int, rng: np.random.Generator) -> Basis:
    """Add random directions to the fresh block, by another sketch ``A^H omega``: one read."""
    xp = namespace(basis.p)
    width = min(width, a.shape[1] - basis.columns - basis.fresh.shape[1])
    known = xp.concat([basis.p, basis.fresh], axis=1)
    z = a.sketch(width, rng)
    random, _ = _orthonormalize_against(
        known, _project_out(known, z), 10 * eps(a.dtype) * basis.size
    )
    return replace(
        basis,
        fresh=xp.concat([basis.fresh, random], axis=1),
        coupling=np.concatenate(
            [basis.coupling, np.zeros((random.shape[1], basis.coupling.shape[1]))]
        ),
        sketched=basis.sketched + width,
        reads=basis.reads + 1,
    )


def rotate(basis: Basis, keep: int) -> Basis:
    """Thick restart: keep the leading Ritz vectors and the fresh block."""
    values, vectors = _ritz(basis.gram)
    small = vectors[:, :keep]
    turn = from_host(small, basis.p)
    width = basis.coupling.shape[1]
    return replace(
        basis,
        p=basis.p @ turn,
        y=basis.y @ turn,
        gram=np.diag(values[:keep]).astype(basis.gram.dtype),
        coupling=basis.coupling @ small[-width:] if width else basis.coupling,
    )


def _ritz(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def residuals(basis: Basis, theta: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """``||A^H u_i - theta_i v_i||`` of Ritz triplets, from the recurrence: no read."""
    width = basis.coupling.shape[1]
    out = np.linalg.norm(basis.coupling @ vectors[len(vectors) - width :], axis=0)
    return np.divide(out, theta, out=np.zeros_like(theta), where=theta > 0)


def triplets(basis: Basis, k: int) -> tuple[Array, np.ndarray, Array, np.ndarray]:
    """The ``k`` leading Ritz triplets ``u, s, v``, and the coordinates of ``v`` in ``p``."""
    q, r = orthonormalize(basis.y)
    left, s, right = np.linalg.svd(to_host(r).astype(basis.gram.dtype), full_matrices=False)
    small = right[:k].conj().T
    u = q @ from_host(left[:, :k], q)
    return u, s[:k], basis.p @ from_host(small, basis.p), small


def leave_one_out(basis: Basis, replicates: int = 10) -> float:
    """Estimate of ``||A - A p p^H||_F`` without another read.

    For each of several columns ``omega_i`` of the sketch, ``||(A - A_i)^H omega_i||^2`` is an
    unbiased estimate of ``||A - A_i||_F^2``, where ``A_i`` is what the same number of steps makes
    of the other columns :cite:p:`epperly2024efficient`. All ``A_i`` lie in the space at hand, so
    their bases come from a block Krylov recurrence in its coordinates; ``O(d^3)`` each.
    """
    w, width = basis.sketch.shape
    d = basis.columns
    steps = -(-d // max(w, 1))
    total = 0.0
    replicates = min(replicates, width)
    for i in range(replicates):
        others = np.zeros((d, width - 1), dtype=basis.gram.dtype)
        others[:w] = np.delete(basis.sketch, i, axis=1)
        space = block = _range(others)
        for _ in range(steps - 1):
            block = _range(_project_out(space, _project_out(space, basis.gram @ block)))
            space = np.concatenate([space, block], axis=1)
        column = np.zeros(d, dtype=basis.gram.dtype)
        column[:w] = basis.sketch[:, i]
        total += float(np.linalg.norm(column - space @ (space.conj().T @ column)) ** 2)
    return math.sqrt(total / max(replicates, 1))


def _range(x: np.ndarray) -> np.ndarray:
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-12 * np.max(s, initial=0.0)]


class Found(NamedTuple):
    """Triplets, the certified error of each ``s``, and whether that meets the tolerance."""

    u: Array
    s: np.ndarray
    v: Array
    bounds: np.ndarray
    converged: bool


@dataclass(frozen=True)
class _Search:
    """The parameters of one call of :func:`block_krylov`."""

    a: LinearOperator
    wanted: Callable[[np.ndarray], int | None]
    tol: float
    unit: float  # rounding in a product with A
    max_columns: int
    max_reads: float

    def target(self, s: np.ndarray) -> float:
        return max(self.tol * float(np.min(s, initial=math.inf)), 2 * self.unit)

    def grow(self, basis: Basis) -> Basis:
        """Expand until the recurrence shows convergence, or can show no more."""
        checks: list[tuple[int, float, float]] = []
        while basis.fresh.shape[1] and basis.reads < self.max_reads:
            basis = expand(self.a, self._restarted(basis))
            if basis.reads < _next_check(checks):
                continue
            theta, vectors = _ritz(basis.gram)
            theta = np.sqrt(theta)
            k = self.wanted(theta)
            if k is None or k > basis.columns:
                continue
            target, rounding = self.target(theta[:k]), _rounding(theta[:k], self.unit)
            residual = float(residuals(basis, theta[:k], vectors[:, :k]).max())
            checks.append((basis.reads, residual, target))
            if rounding[-1] > target / 2:
                break
            if residual + rounding[-1] <= target and (
                _copies(theta[:k], 2 * (residual + rounding[-1])) < basis.sketched
                or residual < 1e-2 * target
            ):
                break
        return basis

    def _restarted(self, basis: Basis) -> Basis:
        width = basis.fresh.shape[1]
        if basis.columns + width <= self.max_columns:
            return basis
        k = self.wanted(np.sqrt(_ritz(basis.gram)[0])) or basis.columns
        if 2 * (k + width) > self.max_columns:
            return basis
        return rotate(basis, k + width)

    def extract(self, basis: Basis) -> Found:
        """Triplets with residuals from the recurrence: no read."""
        k = self.wanted(np.sqrt(_ritz(basis.gram)[0])) or basis.columns
        u, s, v, small = triplets(basis, k)
        bounds = residuals(basis, s, small) + _rounding(s, self.unit)
        converged = len(s) == k and bool(np.all(bounds <= self.target(s)))
        return Found(u, s, v, bounds, converged)

    def polish(self, basis: Basis, k: int) -> tuple[Basis, Found]:
        """Triplets with residuals ``A^H u - s v`` themselves, which also expand the basis."""
        xp = namespace(basis.p)
        while True:
            u, s, v, _ = triplets(basis, k)
            z = self.a.rmatmul(u) - v * from_host(s, v)
            residual = to_host(xp.linalg.vector_norm(z, axis=0)).astype(np.float64)
            z = _project_out(basis.p, z)
            fresh, _ = _orthonormalize_against(basis.p, z, 2 * self.unit)
            basis = replace(basis, fresh=fresh, reads=basis.reads + 1)
            converged = bool(np.all(residual <= self.target(s)))
            if converged or not fresh.shape[1] or basis.reads >= self.max_reads:
                none = replace(basis, fresh=fresh[:, :0], coupling=np.zeros((0, 0)))
                return none, Found(u, s, v, residual + self.unit, converged)
            basis = _append(basis, self.a.matmul(fresh))


@dataclass(frozen=True)
class Krylov:
    """What :func:`block_krylov` found: the SVD, whether it met its tolerance, and its cost."""

    svd: SVD
    converged: bool
    reads: int
    columns: int


def block_krylov(
    a: LinearOperator,
    wanted: Callable[[np.ndarray], int | None],
    *,
    tol: float,
    rng: np.random.Generator,
    width: int | None = None,
    max_columns: int | None = None,
    max_reads: float = math.inf,
) -> Krylov:
    """Leading singular triplets, to a residual of ``tol`` times the last wanted singular value.

    Parameters
    ----------
    a : LinearOperator, shape (m, n)
        The space lies on the side of the columns: best the shorter one, unless ``a.one_read``.
    wanted : callable
        From the Ritz values found so far, sorted, to how many triplets are wanted, or None while
        that cannot be told.
    tol : float
        A triplet has converged once ``||A^H u - s v|| <= tol s_k``, or once that is rounding.
    rng : Generator
    width : int, optional
        Columns of a block; ``a.block_columns`` by default.
    max_columns : int, optional
        Dimension of the space at which to restart, where it is at least twice what must be kept;
        by default there is no restart.
    max_reads : float
        Reads of the matrix after which to give up, with ``converged=False``.

    Notes
    -----
    A space grown from ``w`` random columns holds at most ``w`` copies of a repeated singular value.
    So when ``w`` wanted values coincide within the tolerance, more random columns are added until
    the copies are outnumbered; with probability one, none is missed.

    Where singular values are so graded that rounding in ``A^H A`` hides the residual, the method
    goes on with the residuals ``A^H u - s v`` themselves, at two reads a step.
    """
    m, n = a.shape
    width = min(width or a.block_columns, m, n)
    basis, scaled, factor = start(a, width, rng)
    search = _Search(
        scaled,
        lambda theta: wanted(theta / factor),
        tol,
        5 * eps(a.dtype) * basis.size,
        max_columns or n,
        max_reads,
    )
    while True:
        basis = search.grow(basis)
        found = search.extract(basis)
        if not found.converged and basis.reads < max_reads:
            basis, found = search.polish(basis, search.wanted(found.s) or basis.columns)
        told = search.wanted(found.s)
        k = told or len(found.s)
        spread = 2 * float(np.max(found.bounds, initial=0.0))
        hidden = _copies(found.s, spread) >= basis.sketched
        enough = told is not None and k <= len(found.s) and not hidden
        if enough or basis.columns >= min(m, n):
            break
        if basis.reads >= max_reads:
            found = found._replace(converged=False)
            break
        known = basis.columns + basis.fresh.shape[1]
        basis = inject(scaled, basis, width, rng)
        if basis.columns + basis.fresh.shape[1] == known:
            break
    svd = _finish(found, k, factor, 2 * search.unit, rng)
    return Krylov(svd, found.converged, basis.reads, basis.columns)


def fixed_reads(a: LinearOperator, rank: int, *, width: int, reads: int, rng: RNG) -> SVD:
    """``rank`` triplets from a sketch of ``width`` columns and ``reads - 1`` steps, ``n <= m``."""
    generator = np.random.default_rng(rng)
    basis, scaled, factor = start(a, width, generator)
    while basis.reads < reads and basis.fresh.shape[1]:
        basis = expand(scaled, basis)
    unit = 5 * eps(a.dtype) * basis.size
    u, s, v, small = triplets(basis, basis.columns)
    bounds = residuals(basis, s, small) + _rounding(s, unit)
    error = math.hypot(leave_one_out(basis), float(np.linalg.norm(s[rank:])))
    svd = _finish(Found(u, s, v, bounds, True), rank, factor, 2 * unit, generator)
    return replace(svd, error=error / factor)


def _finish(found: Found, k: int, factor: float, noise: float, rng: np.random.Generator) -> SVD:
    """The first ``k`` triplets in the units of ``A``, zeros where there are not so many."""
    known = min(k, len(found.s))
    u, v = found.u[:, :known], found.v[:, :known]
    s, bounds = found.s[:known], found.bounds[:known]
    if k > len(s):
        missing = np.zeros(k - len(s))
        s, bounds = np.concatenate([s, missing]), np.concatenate([bounds, missing + noise])
        u, v = _complete(u, k, rng), _complete(v, k, rng)
    return SVD.canonical(u, from_host(s / factor, u), adjoint(v), from_host(bounds / factor, u))


def _rounding(s: np.ndarray, unit: float) -> np.ndarray:
    """Rounding in ``A^H A v / s``, which the recurrence cannot see."""
    largest = np.max(s, initial=0.0)
    return unit * np.divide(largest, s, out=np.full_like(s, math.inf), where=s > 0)


def _next_check(checks: list[tuple[int, float, float]]) -> float:
    """Read at which to look again, from the rate at which the residual fell so far."""
    if len(checks) < 2:
        return 0
    (reads0, before, _), (reads, now, target) = checks[-2:]
    if not 0 < now < before:
        return reads + 1
    rate = math.log(before / now) / (reads - reads0)
    ahead = 0.7 * math.log(now / target) / rate
    # The rate grows, so an early one must not be trusted for long.
    return reads + max(1, min(int(ahead), reads // 4))


def _copies(s: np.ndarray, spread: float) -> int:
    """Most entries of ``s`` that lie within ``spread`` of one of them."""
    return int(np.max(np.sum(np.abs(s[:, None] - s) <= spread, axis=0), initial=0))


def _complete(q: Array, k: int, rng: np.random.Generator) -> Array:
    """Orthonormal columns appended to ``q`` up to ``k`` of them."""
    extra = standard_normal((q.shape[0], k - q.shape[1]), like=q, rng=rng)
    extra, _ = _orthonormalize_against(q, _project_out(q, extra), 0.0)
    return namespace(q).concat([q, extra], axis=1)
