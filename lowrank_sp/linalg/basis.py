"""Bases of block Krylov spaces, one read of the matrix per step.

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

import numpy as np

from lowrank_sp._arrays import Array, adjoint, eps, from_host, namespace, to_host
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.operators import LinearOperator, Scaled

NOT_FINITE = (
    "the matrix must be finite, got NaN or infinite entries, or entries too large to multiply; "
    "clean or rescale it first"
)


def check_oversampling(oversampling: int) -> None:
    """Raise where a sketch is asked to have fewer columns than the rank."""
    if oversampling < 0:
        raise ValueError(f"oversampling must be at least 0, got {oversampling}")


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
    basis = append(basis, y)
    # p^H z = y^H y_fresh is in the Gram matrix already.
    cross = from_host(basis.gram[:, -y.shape[1] :], y)
    z = z - basis.p @ cross
    floor = 10 * eps(a.dtype) * float(np.max(np.abs(np.diag(basis.gram)), initial=0.0))
    fresh, r = orthonormalize_against(basis.p, z, floor)
    width = min(fresh.shape[1], min(a.shape) - basis.columns)
    return replace(basis, fresh=fresh[:, :width], coupling=to_host(r)[:width, :])


def append(basis: Basis, y: Array) -> Basis:
    """Take the fresh block into the basis, given ``y``, its product with ``A``."""
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


def orthonormalize_against(p: Array, z: Array, floor: float) -> tuple[Array, Array]:
    """``q`` and ``r`` with ``z = q r``, where ``p^H z = 0`` up to rounding, and ``p^H q = 0``.

    The second round of projection and orthonormalization restores what small ``z`` lost. What it
    halves was rounding to begin with: it is dropped, like directions no longer than ``floor``.
    """
    xp = namespace(p, z)
    q, first = orthonormalize(z, floor=floor)
    overlap = adjoint(p) @ q
    q = q - p @ overlap
    # The Gram matrix of q is now I - overlap^H overlap.
    if overlap.shape[0] == 0 or float(xp.sum(abs(overlap) ** 2)) <= eps(q.dtype):
        return q, first
    q, second = orthonormalize(q, floor=0.5)
    return q, second @ first


def project_out(p: Array, z: Array) -> Array:
    """``z - p p^H z``."""
    return z - p @ (adjoint(p) @ z)


def inject(a: LinearOperator, basis: Basis, width: int, rng: np.random.Generator) -> Basis:
    """Add random directions to the fresh block, by another sketch ``A^H omega``: one read."""
    xp = namespace(basis.p)
    width = min(width, min(a.shape) - basis.columns - basis.fresh.shape[1])
    known = xp.concat([basis.p, basis.fresh], axis=1)
    z = a.sketch(width, rng)
    random, _ = orthonormalize_against(known, project_out(known, z), 10 * eps(a.dtype) * basis.size)
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
    values, vectors = ritz(basis.gram)
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


def ritz(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared Ritz values of ``y^H y``, from large to small, and their coordinates in ``p``."""
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def residuals(basis: Basis, theta: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """``||A^H u_i - theta_i v_i||`` of Ritz triplets, from the recurrence: no read."""
    width = basis.coupling.shape[1]
    out = np.linalg.norm(basis.coupling @ vectors[len(vectors) - width :], axis=0)
    return np.divide(out, theta, out=np.zeros_like(theta), where=theta > 0)


def triplets(
    basis: Basis, wanted: Callable[[np.ndarray], int | None]
) -> tuple[Array, np.ndarray, Array, np.ndarray]:
    """The leading Ritz triplets ``u, s, v``, and the coordinates of ``v`` in ``p``.

    As many as are ``wanted`` of the values ``s``, or all of them.
    """
    q, r = orthonormalize(basis.y)
    left, s, right = np.linalg.svd(to_host(r).astype(basis.gram.dtype), full_matrices=False)
    k = wanted(s) or len(s)
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
            block = _range(project_out(space, project_out(space, basis.gram @ block)))
            space = np.concatenate([space, block], axis=1)
        column = np.zeros(d, dtype=basis.gram.dtype)
        column[:w] = basis.sketch[:, i]
        total += float(np.linalg.norm(column - space @ (space.conj().T @ column)) ** 2)
    return math.sqrt(total / max(replicates, 1))


def _range(x: np.ndarray) -> np.ndarray:
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-12 * np.max(s, initial=0.0)]
