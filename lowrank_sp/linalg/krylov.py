"""Leading singular triplets from block Krylov spaces: when to stop, and with what certificate."""

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
from lowrank_sp.linalg.basis import (
    Basis,
    append,
    expand,
    inject,
    leave_one_out,
    orthonormalize_against,
    project_out,
    residuals,
    ritz,
    rotate,
    start,
    triplets,
)
from lowrank_sp.operators import LinearOperator


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

    def grow(self, basis: Basis, least: int) -> Basis:
        """Expand, up to ``least`` reads at least, until the recurrence shows convergence, or can
        show no more.
        """  # noqa: D205
        checks: list[tuple[int, float, float]] = []
        while basis.fresh.shape[1] and basis.reads < self.max_reads:
            basis = expand(self.a, self._restarted(basis))
            if basis.reads < max(least, _next_check(checks)):
                continue
            theta, vectors = ritz(basis.gram)
            theta = np.sqrt(theta)
            k = self.wanted(theta)
            if k is None or k > basis.columns:
                # The cost of looking grows faster than that of a read.
                least = basis.reads + max(1, basis.reads // 8)
                continue
            theta, target = theta[:k], self.target(theta[:k])
            rounding = _rounding(theta, self.unit)
            bounds = residuals(basis, theta, vectors[:, :k]) + rounding
            largest = float(bounds.max())
            checks.append((basis.reads, largest, target))
            if rounding[-1] > target / 2:
                break
            if largest <= target and (
                _displacement(theta, bounds, basis.sketched)[-1] <= target
                or largest < 1e-2 * target
            ):
                break
        return basis

    def _restarted(self, basis: Basis) -> Basis:
        width = basis.fresh.shape[1]
        if basis.columns + width <= self.max_columns:
            return basis
        k = self.wanted(np.sqrt(ritz(basis.gram)[0])) or basis.columns
        if 2 * (k + width) > self.max_columns:
            return basis
        return rotate(basis, k + width)

    def extract(self, basis: Basis) -> Found:
        """Triplets with residuals from the recurrence: no read."""
        u, s, v, small = triplets(basis, self.wanted)
        k = len(s)
        bounds = residuals(basis, s, small) + _rounding(s, self.unit)
        converged = self.wanted(s) == k and bool(np.all(bounds <= self.target(s)))
        return Found(u, s, v, bounds, converged)

    def polish(self, basis: Basis) -> tuple[Basis, Found]:
        """Triplets with residuals ``A^H u - s v`` themselves, which also expand the basis."""
        xp = namespace(basis.p)
        while True:
            u, s, v, _ = triplets(basis, self.wanted)
            z = self.a.rmatmul(u) - v * from_host(s, v)
            residual = to_host(xp.linalg.vector_norm(z, axis=0)).astype(np.float64)
            z = project_out(basis.p, z)
            fresh, _ = orthonormalize_against(basis.p, z, 2 * self.unit)
            fresh = fresh[:, : min(fresh.shape[1], min(self.a.shape) - basis.columns)]
            basis = replace(basis, fresh=fresh, reads=basis.reads + 1)
            converged = bool(np.all(residual <= self.target(s)))
            if converged or not fresh.shape[1] or basis.reads >= self.max_reads:
                none = replace(basis, fresh=fresh[:, :0], coupling=np.zeros((0, 0)))
                return none, Found(u, s, v, residual + self.unit, converged)
            basis = append(basis, self.a.matmul(fresh))


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
    init: Array | None = None,
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
    init : array, shape (n, k), optional
        Orthonormal columns to start from, such as right singular vectors of a matrix nearby. They
        take the places of all random columns but ``width - k``, which find what they do not see.
    width : int, optional
        Columns of a block, more than ``k``; ``a.block_columns`` by default.
    max_columns : int, optional
        Dimension of the space at which to restart, where it is at least twice what must be kept;
        by default there is no restart.
    max_reads : float
        Reads of the matrix after which to give up, with ``converged=False``.

    Notes
    -----
    A space grown from ``w`` random columns holds at most ``w`` copies of a repeated singular value.
    So when ``w`` wanted values coincide within their bounds, and lie above the last one by more
    than the tolerance, more random columns are added until the copies are outnumbered; with
    probability one, none is missed. Where further copies could only change values by less than the
    tolerance, the search ends and the bounds widen by as much.

    Where singular values are so graded that rounding in ``A^H A`` hides the residual, the method
    goes on with the residuals ``A^H u - s v`` themselves, at two reads a step.
    """
    m, n = a.shape
    width = min(width or a.block_columns, m, n)
    if init is not None and n > m:
        raise ValueError(
            f"init must lie on the shorter side of a matrix, got shape {m} x {n}; "
            "pass the adjoint and left singular vectors"
        )
    given = 0 if init is None else init.shape[1]
    basis, scaled, factor = start(a, max(1, width - given), rng)
    if init is not None and basis.size > 0:
        basis = _beside(init, basis, width)
    search = _Search(
        scaled,
        lambda theta: wanted(theta / factor),
        tol,
        5 * eps(a.dtype) * basis.size,
        max_columns or n,
        max_reads,
    )
    least = steps = 0
    polished = False
    while True:
        basis = search.grow(basis, least)
        found = search.extract(basis)
        if (polished or not found.converged) and basis.reads < max_reads:
            # What a polished basis lacks is no longer known to the recurrence.
            basis, found = search.polish(basis)
            polished = True
        told = search.wanted(found.s)
        k = told or len(found.s)
        whole = basis.columns >= min(m, n)
        most = min(m, n) if whole else basis.sketched
        displaced = _displacement(found.s, found.bounds, most)
        hidden = float(np.max(displaced, initial=0.0)) > search.target(found.s)
        if whole or (told is not None and k <= len(found.s) and not hidden):
            break
        known, steps = basis.columns + basis.fresh.shape[1], steps or basis.reads
        if basis.reads < max_reads:
            basis = inject(scaled, basis, width, rng)
        if basis.columns + basis.fresh.shape[1] == known:
            found = found._replace(converged=found.converged and basis.reads < max_reads)
            break
        # New columns bring out their copies in as many steps as the first ones did.
        least = basis.reads + steps
    if told is None:
        found = found._replace(converged=False)
    found = found._replace(bounds=found.bounds + displaced)
    svd = _finish(found, k, factor, 2 * search.unit, rng)
    return Krylov(svd, found.converged, basis.reads, basis.columns)


def fixed_reads(a: LinearOperator, rank: int, *, width: int, reads: int, rng: RNG) -> SVD:
    """``rank`` triplets from a sketch of ``width`` columns and ``reads - 1`` steps, ``n <= m``."""
    generator = np.random.default_rng(rng)
    basis, scaled, factor = start(a, width, generator)
    while basis.reads < reads and basis.fresh.shape[1]:
        basis = expand(scaled, basis)
    unit = 5 * eps(a.dtype) * basis.size
    u, s, v, small = triplets(basis, len)
    bounds = residuals(basis, s, small) + _rounding(s, unit)
    error = math.hypot(leave_one_out(basis), float(np.linalg.norm(s[rank:])))
    svd = _finish(Found(u, s, v, bounds, True), rank, factor, 2 * unit, generator)
    return replace(svd, error=error / factor)


def _beside(init: Array, basis: Basis, width: int) -> Basis:
    """The basis that starts from the columns of ``init`` and what its own first block adds."""
    floor = 10 * eps(init.dtype)
    new, _ = orthonormalize_against(init, project_out(init, basis.fresh), floor)
    fresh = namespace(init).concat([init, new], axis=1)[:, :width]
    return replace(basis, fresh=fresh, sketched=fresh.shape[1])


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


def _displacement(s: np.ndarray, bounds: np.ndarray, most: int) -> np.ndarray:
    """How far each value may lie below the true one of its index, for want of copies.

    The space holds at most ``most`` copies of a repeated value. ``most`` values in a row that their
    bounds cannot tell apart may be such, and further copies would take the places of what follows.
    """
    if len(s) < most:
        return np.zeros_like(s)
    reach = np.lib.stride_tricks.sliding_window_view(bounds, most).max(axis=1)
    alike = np.flatnonzero(s[: len(s) - most + 1] - s[most - 1 :] <= 2 * reach)
    return np.maximum(s[alike[0]] - s, 0.0) if len(alike) else np.zeros_like(s)


def _complete(q: Array, k: int, rng: np.random.Generator) -> Array:
    """Orthonormal columns appended to ``q`` up to ``k`` of them."""
    extra = standard_normal((q.shape[0], k - q.shape[1]), like=q, rng=rng)
    extra, _ = orthonormalize_against(q, project_out(q, extra), 0.0)
    return namespace(q).concat([q, extra], axis=1)
