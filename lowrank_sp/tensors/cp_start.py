"""Where a CP decomposition starts: Gaussian factors, or generalized eigenvectors of a core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowrank_sp._arrays import RNG, Array, frobenius, from_host, standard_normal, to_host
from lowrank_sp.tensors.alternating import State, gram_of
from lowrank_sp.tensors.cp import CP
from lowrank_sp.tensors.modes import khatri_rao
from lowrank_sp.tensors.mttkrp import Rows, conjugate
from lowrank_sp.tensors.source import Dense, Source

# Columns of the bases beyond the rank: noise may hide a weak direction among the others.
_OVERSAMPLING = 5
# Pencils that are tried.
_TRIALS = 4


def random_factors(like: Array, shape: Sequence[int], rank: int, rng: RNG) -> list[Array]:
    """Gaussian factors of unit variance, of shapes ``(n_k, R)``."""
    generator = np.random.default_rng(rng)
    return [standard_normal((n, rank), like=like, rng=generator) for n in shape]


def given_factors(init: CP, shape: tuple[int, ...], rank: int) -> list[Array]:
    """Factors of a start that carry its weights."""
    if init.shape != shape or init.rank != rank:
        raise ValueError(
            f"init must have shape {shape} and rank {rank}, got {init.shape} and {init.rank}"
        )
    return list(init.unweighted())


class Core(NamedTuple):
    """A tensor as ``data`` times orthonormal ``bases`` in all modes, nearly."""

    data: Dense
    bases: tuple[Array, ...]

    @classmethod
    def of(cls, source: Source, rank: int) -> Core:
        """The core of a truncated HOSVD, a little larger than ``rank`` in every mode."""
        data, bases = source.core(core_shape(source.shape, rank))
        if isinstance(data, np.ndarray):
            # In C order, so that its axes are those of the source.
            data = np.ascontiguousarray(data)
        return cls(Dense.of(data, frobenius(data)), bases)

    def started(self, rows: Rows) -> State:
        """State before the first sweep from rows of the tensor.

        Its Gram matrices are those of the whole rows, so that the sweep is the one over the tensor
        of which the core is all.
        """
        inside = [r @ conjugate(u) for r, u in zip(rows, self.bases, strict=True)]
        return State(self.data, inside, [gram_of(r) for r in rows])

    def outside(self, rows: Rows) -> list[Array]:
        """Rows of the tensor from rows of the core."""
        return [r @ u.mT for r, u in zip(rows, self.bases, strict=True)]

    def lifted(self, state: State, source: Source) -> State:
        """A state on the core as one on the tensor."""
        return state._replace(source=source, rows=self.outside(state.rows), before=None, slow=False)


def core_shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Sizes of the core for ``rank`` terms."""
    return tuple(min(n, rank + _OVERSAMPLING) for n in shape)


def has_pencils(shape: Sequence[int], rank: int) -> bool:
    """Whether generalized eigenvectors, or an SVD for order 2, can give ``rank`` terms."""
    return len(shape) >= 2 and sum(n >= rank for n in shape) >= 2


def algebraic_rows(core: Core, rank: int, rng: np.random.Generator) -> list[Array] | None:
    """Rows of the tensor whose slices the core's pencils, or the SVD of a matrix, explain.

    Random combinations of the slices along all modes but two are ``A D B^T`` with one ``A`` and
    one ``B`` and diagonal ``D``, so that for two of them ``B^-T`` holds the generalized
    eigenvectors. Of several pencils the one that leaves the smallest residual is taken; None if
    all of them are singular.
    """
    shape = tuple(min(n, rank) for n in core.data.shape)
    smaller, inside = core.data.core(shape)
    bases = [u @ v for u, v in zip(core.bases, inside, strict=True)]
    data = to_host(smaller)
    square = [axis for axis, n in enumerate(shape) if n == rank][:2]
    rest = [axis for axis in range(len(shape)) if axis not in square]
    sizes = tuple(shape[axis] for axis in rest)
    slices = data.transpose(*rest, *square).reshape(math.prod(sizes), rank, rank)
    if not rest:
        return _outside([slices[0].T, np.eye(rank)], bases)
    best, smallest = None, math.inf
    for _ in range(_TRIALS):
        weights = rng.standard_normal((2, len(slices))).astype(data.dtype)
        try:
            a, b, c = _from_pencil(slices, *np.tensordot(weights, slices, axes=1))
        except np.linalg.LinAlgError:
            continue
        parts = [*_rank_one(c, sizes), a, b]
        model = khatri_rao(parts[:-2]) @ khatri_rao(parts[-2:]).T
        residual = np.linalg.norm(slices.reshape(len(slices), -1) - model)
        if residual < smallest:
            best, smallest = parts, residual
    if best is None:
        return None
    order = [*rest, *square]
    rows = [best[order.index(axis)].T for axis in range(len(shape))]
    return _outside(rows, bases)


def _outside(rows: list[np.ndarray], bases: Rows) -> list[Array]:
    return [from_host(r, u) @ u.mT for r, u in zip(rows, bases, strict=True)]


def _from_pencil(
    slices: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``a, b, c`` with ``slices[k]`` close to ``a diag(c[k]) b^T``."""
    values, vectors = np.linalg.eig(np.linalg.solve(second, first))
    if not np.iscomplexobj(slices):
        # A conjugate pair spans a real plane, of which any basis will do.
        vectors = np.where(np.imag(values) < 0, np.imag(vectors), np.real(vectors))
    a = second @ vectors
    a = a / np.linalg.norm(a, axis=0)
    c = np.einsum("ar,kar->kr", a.conj(), slices @ vectors)
    return a, np.linalg.inv(vectors).T, c


def _rank_one(c: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Factors of rank-one tensors of the given shape near the columns of ``c``."""
    if len(shape) == 1:
        return [c]
    tensors = c.T.reshape(-1, *shape)
    factors = []
    for mode in range(1, tensors.ndim):
        unfolded = np.moveaxis(tensors, mode, 1).reshape(len(tensors), shape[mode - 1], -1)
        _, vectors = np.linalg.eigh(unfolded @ unfolded.conj().swapaxes(1, 2))
        factors.append(vectors[:, :, -1].T)
    scales = np.sum(khatri_rao(factors).conj() * c, axis=0)
    return [factors[0] * scales, *factors[1:]]
