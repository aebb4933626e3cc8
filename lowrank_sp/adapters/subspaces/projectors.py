"""Orthogonal projectors that are known by a basis, and updates that are restricted by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    dtype_name,
    eps,
    frobenius,
    inner,
    is_array,
    is_complex,
    is_inexact,
    namespace,
)
from lowrank_sp.adapters._products import product_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.factors import Factored, LowRank, check_rank
from lowrank_sp.linalg.basis import orthonormalize_against
from lowrank_sp.linalg.orth import orthonormalize
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.linalg.weighted import data_root
from lowrank_sp.operators import LinearOperator, as_operator


@dataclass(frozen=True, repr=False)
class Projector(LinearOperator):
    r"""The orthogonal projector onto a subspace, by a basis of it or of what is orthogonal to it.

    .. math:: P = V V^H \quad \text{or} \quad P = I - V V^H, \qquad V^H V = I

    An operator: ``p @ up`` projects columns, ``down @ p`` rows, and products of factors stay
    products of factors. It is its own adjoint and its own square.

    Attributes
    ----------
    basis : array, shape (n, k)
        ``V``, orthonormal.
    outside : bool
        Whether ``V`` spans what the projector removes.

    Raises
    ------
    ValueError
        If the basis is not orthonormal to ``sqrt(eps)``.

    Notes
    -----
    ``4 n k`` flops a column, and twice as many to remove a subspace: what is left of a vector is
    then orthogonal to it up to rounding of what is left, not of what there was.

    Examples
    --------
    >>> import numpy as np
    >>> p = span(np.array([[3.0], [4.0]]))
    >>> p, p.rank, p.complement
    (Projector(2 x 2, rank 1, float64), 1, Projector(2 x 2, rank 1, float64))
    >>> np.round(np.array([[1.0, 0.0]]) @ p, 12)
    array([[0.36, 0.48]])
    """

    basis: Array
    outside: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.basis.shape)
        if len(shape) != 2 or shape[1] > shape[0]:
            raise ValueError(f"basis must have shape (n, k) with k <= n, got {shape}")
        if not is_inexact(self.basis.dtype):
            raise TypeError(f"basis must be floating, got {dtype_name(self.basis.dtype)}")
        if not self.error <= eps(self.basis.dtype) ** 0.5:
            raise ValueError(
                f"basis must be orthonormal, got V^H V - I of norm {self.error:.1e}; "
                "make the projector by span"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(n, n)``."""
        return self.basis.shape[0], self.basis.shape[0]

    @property
    def like(self) -> Array:
        return self.basis

    @property
    def rank(self) -> int:
        """Dimension of the subspace onto which it projects."""
        n, k = self.basis.shape
        return n - k if self.outside else k

    @property
    def error(self) -> float:
        """How far the basis is from orthonormal: ``||V^H V - I||_F``."""
        gram = inner(self.basis, self.basis)
        one = namespace(gram).eye(gram.shape[0], dtype=gram.dtype, device=device(gram))
        return frobenius(gram - one)

    @property
    def complement(self) -> Projector:
        """``I - P``, of the same basis."""
        return replace(self, outside=not self.outside)

    @property
    def mH(self) -> Projector:
        return self

    def matmul(self, x: Array) -> Array:
        if not self.outside:
            return self.basis @ (adjoint(self.basis) @ x)
        x = x - self.basis @ (adjoint(self.basis) @ x)
        return x - self.basis @ (adjoint(self.basis) @ x)

    def rmatmul(self, x: Array) -> Array:
        return self.matmul(x)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Factored) and other.shape[0] == self.shape[1]:
            left, right = other.factors()
            return LowRank(self.matmul(left), right)
        return super().__matmul__(other)

    def range_basis(self) -> Array:
        """An orthonormal basis of the subspace onto which it projects, shape ``(n, rank)``."""
        return complement_basis(self.basis) if self.outside else self.basis

    def astype(self, dtype: Any) -> Projector:
        """The projector in another dtype, with a basis that is orthonormal in it."""
        if self.basis.dtype == dtype:
            return self
        cast = namespace(self.basis).astype(self.basis, dtype)
        return replace(self, basis=orthonormalize(cast)[0])

    def grown(
        self, a: Any, *, rank: int | None = None, energy: float | None = None, rng: RNG = None
    ) -> Projector:
        r"""The projector onto the subspace and what some columns need beyond it.

        .. math:: P' = P + U_r U_r^H, \qquad (I - P) A = U \Sigma W^H

        It is the memory of gradient projection :cite:p:`saha2021gradient`, and once the subspace
        fills half of the space, that of InfLoRA :cite:p:`liang2024inflora`: then the basis of the
        complement is stored, of which ``n - k`` columns are left.

        Parameters
        ----------
        a : array of shape (n, N), or anything :func:`~lowrank_sp.operators.as_operator` takes
        rank : int, optional
            Number of directions to add; fewer are added if ``a`` has fewer.
        energy : float, optional
            In (0, 1]. Add as few directions as make
            :math:`\lVert P' A \rVert_F^2 \ge \text{energy} \, \lVert A \rVert_F^2`, which may be
            none. With neither, all directions above rounding.
        rng : int, Generator or None
            Of :func:`~lowrank_sp.linalg.svd.truncated_svd`.

        Notes
        -----
        One truncated SVD, of size ``(n - k) x N`` in a basis of the complement.

        Examples
        --------
        >>> import numpy as np
        >>> p = span(np.eye(4)[:, :1])
        >>> p = p.grown(np.diag([5.0, 3.0, 0.1, 0.0]), energy=0.99)
        >>> p.rank, p.outside
        (2, True)
        """
        if rank is not None and energy is not None:
            raise ValueError("give rank or energy, not both")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        operator = as_operator(a)
        n, room = self.shape[0], self.shape[0] - self.rank
        if operator.shape[0] != n:
            raise ValueError(f"columns must have {n} entries, got {operator.shape[0]}")
        if rank is not None:
            rank = check_rank(rank, max(1, room), (n, n))
        size = operator.norm()
        if not math.isfinite(size):
            raise ValueError("columns must be finite, got NaN or infinite entries")
        known = self.astype(
            namespace(self.basis, operator.like).result_type(self.dtype, operator.dtype)
        )
        # Coordinates in the complement where its basis is known, else the columns themselves.
        v, data = known.basis, a if is_array(a) else operator
        data = namespace(v).astype(data, v.dtype) if is_array(data) else data
        rest = adjoint(v) @ data if self.outside else known.complement @ data
        u = _leading(rest, size, rank, energy, rng)
        if u.shape[1] == 0:
            return self
        if self.outside:
            return Projector(orthonormalize(v @ complement_basis(u))[0], outside=True)
        xp = namespace(v, u)
        v = xp.concat([v, orthonormalize_against(v, u, 0.5)[0]], axis=1)
        if 2 * v.shape[1] < n:
            return Projector(v)
        return Projector(complement_basis(v), outside=True)

    def __repr__(self) -> str:
        n = self.shape[0]
        return f"Projector({n} x {n}, rank {self.rank}, {dtype_name(self.dtype)})"


def span(
    a: Any, *, rank: int | None = None, energy: float | None = None, rng: RNG = None
) -> Projector:
    """The projector onto the range of a matrix, or its leading left singular vectors.

    Parameters
    ----------
    a : array of shape (n, N), or anything :func:`~lowrank_sp.operators.as_operator` takes
    rank, energy, rng
        As in :meth:`Projector.grown`.

    Examples
    --------
    >>> import numpy as np
    >>> span(np.diag([3.0, 2.0, 1.0]), energy=0.7)
    Projector(3 x 3, rank 2, float64)
    """
    like = as_operator(a).like
    n = as_operator(a).shape[0]
    empty = namespace(like).zeros((n, 0), dtype=like.dtype, device=device(like))
    return Projector(empty).grown(a, rank=rank, energy=energy, rng=rng)


def input_span(
    *,
    inputs: Array | None = None,
    covariance: Array | None = None,
    rank: int | None = None,
    energy: float | None = None,
    rng: RNG = None,
) -> Projector:
    r"""The projector onto the directions in which the inputs of a layer lie.

    With ``energy`` it keeps :math:`\mathbb{E} \lVert P x \rVert^2 \ge \text{energy} \,
    \mathbb{E} \lVert x \rVert^2`. Its complement is the null space of the inputs: updates
    restricted to it change no output on them, up to the energy left out.

    Parameters
    ----------
    inputs : array, shape (N, n)
        Samples, one a row.
    covariance : array, shape (n, n)
        ``E[x x^H]`` instead, uncentred: see
        :class:`~lowrank_sp.adapters.statistics.SecondMoment`.
    rank, energy, rng
        As in :meth:`Projector.grown`.

    Examples
    --------
    >>> import numpy as np
    >>> p = input_span(inputs=np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
    >>> np.round(p.to_dense(), 12)
    array([[0.5, 0.5, 0. ],
           [0.5, 0.5, 0. ],
           [0. , 0. , 0. ]])
    """
    known = inputs if inputs is not None else covariance
    n = 0 if known is None else known.shape[-1]
    return span(data_root(n, inputs, covariance), rank=rank, energy=energy, rng=rng)


def restricted(
    adapter: Any, *, inputs: LinearOperator | None = None, outputs: LinearOperator | None = None
) -> Product:
    r"""An adapter that sees part of the inputs, or writes to part of the outputs.

    .. math:: s B A \; \mapsto \; s \, (P_{\text{out}} B) (A P_{\text{in}})

    Of the update only its product counts: factors in another gauge give the same one. With the
    complement of what earlier tasks occupy as ``inputs`` it is the exact constraint of O-LoRA, and
    the nearest update in the Frobenius norm that leaves the outputs on them alone.

    Parameters
    ----------
    adapter : Product, anything with ``up``, ``down`` and ``scale``, or a LowRank
    inputs : Projector or operator, shape (n, n)
    outputs : Projector or operator, shape (m, m)

    Returns
    -------
    Product
        Factors in their own dtype; ``scale`` and a factor that is not projected are kept.

    Examples
    --------
    >>> import numpy as np
    >>> adapter = Product(np.ones((2, 1)), np.array([[3.0, 4.0, 5.0]]))
    >>> restricted(adapter, inputs=span(np.eye(3)[:, :2]).complement).down
    array([[0., 0., 5.]])
    """
    if inputs is None and outputs is None:
        raise ValueError("give inputs, outputs, or both, to restrict the adapter to")
    pair = product_of(adapter, "the adapter")
    m, n = pair.shape
    for name, p, size in (("inputs", inputs, n), ("outputs", outputs, m)):
        if p is not None and p.shape != (size, size):
            raise ValueError(f"{name} must have shape ({size}, {size}), got {p.shape}")
    up = pair.up if outputs is None else through(outputs, pair.up)
    down = pair.down if inputs is None else adjoint(through(inputs.mH, adjoint(pair.down)))
    return Product(up, down, pair.scale)


def through(p: LinearOperator, x: Array) -> Array:
    """``p @ x`` in the dtype of ``x``, computed in the wider one of both."""
    xp = namespace(p.like, x)
    if is_complex(p.dtype) and not is_complex(x.dtype):
        raise TypeError("factors must be complex where the projector is; convert them first")
    if isinstance(p, Projector):
        p = p.astype(xp.result_type(p.dtype, x.dtype))
    return xp.astype(p @ xp.astype(x, p.dtype), x.dtype)


def complement_basis(v: Array) -> Array:
    """An orthonormal basis of what is orthogonal to orthonormal columns."""
    return namespace(v).linalg.qr(v, mode="complete")[0][:, v.shape[1] :]


def _leading(rest: Any, size: float, rank: int | None, energy: float | None, rng: RNG) -> Array:
    """Left singular vectors of ``rest`` that are wanted, of columns that had norm ``size``."""
    like = as_operator(rest).like
    length = frobenius(rest) if is_array(rest) else rest.norm()
    floor = 10 * max(rest.shape) ** 0.5 * eps(like.dtype) * size
    left_out = 0.0 if energy is None else (1 - energy) ** 0.5 * size
    if 0 in rest.shape or length <= max(floor, left_out):
        return namespace(like).zeros((rest.shape[0], 0), dtype=like.dtype, device=device(like))
    if rank is None:
        return truncated_svd(rest, tol=max(floor, left_out) / length, rng=rng).u
    f = truncated_svd(rest, min(rank, *rest.shape), rng=rng)
    xp = namespace(f.s)
    return f.u[:, : int(xp.sum(xp.astype(f.s > floor, xp.int32)))]
