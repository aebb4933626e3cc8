"""Where gradients are projected: the basis of a subspace, when to renew it, how moments turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    device,
    host_view,
    is_array,
    namespace,
    standard_normal,
    to_host,
)
from lowrank_sp.factors import check_rank
from lowrank_sp.gauge import fix_signs
from lowrank_sp.linalg.krylov import block_krylov
from lowrank_sp.operators import LinearOperator, as_operator
from lowrank_sp.updates.rule import State, over

#: Random columns beyond the rank.
_OVERSAMPLING = 8
#: Squared singular values that differ by less than this, relatively, have no gap between them.
_NO_GAP = 0.05


class Subspace(NamedTuple):
    """What :func:`leading_subspace` found.

    Attributes
    ----------
    basis : array, shape (m, r)
        Orthonormal columns, in the order of the singular values that they belong to.
    angle : float
        Bound of the sine of the largest angle to the leading subspace; 1 where the gap behind the
        ``r``-th singular value is too small to determine one.
    reads : int
        Reads of the matrix.
    zero : bool
        Whether the matrix is zero. ``basis`` is then ``init``, or zero without one.
    """

    basis: Array
    angle: float
    reads: int
    zero: bool


def leading_subspace(
    a: Any,
    rank: int,
    *,
    init: Array | None = None,
    tol: float = 1e-2,
    max_reads: int = 12,
    rng: RNG = None,
) -> Subspace:
    r"""The span of the leading left singular vectors, started from the one of an earlier matrix.

    .. math:: \max_{P^H P = I} \lVert P^H A \rVert_F, \qquad P \in \mathbb{C}^{m \times r}

    Parameters
    ----------
    a : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
    rank : int
        In ``1..min(m, n)``.
    init : array, shape (m, r), optional
        Orthonormal columns. A block Krylov space is grown from them and a few random columns, or
        from random columns alone.
    tol : float
        Largest sine of an angle to accept, where there is a gap. Where squared singular values
        about the ``r``-th are closer than five percent, no angle is defined and the residual of a
        gap of five percent is asked for.
    max_reads : int
        At most so many products with blocks of ``r + 8`` columns.
    rng : int, Generator or None

    Returns
    -------
    Subspace

    Raises
    ------
    ValueError
        If the rank is out of range, or the matrix is not finite.

    Notes
    -----
    ``4 m n r`` flops a read, by :func:`~lowrank_sp.linalg.krylov.block_krylov`, which certifies the
    residuals. From a subspace that is right already it takes two or three. The angle is bounded
    after Davis and Kahan: residuals of ``A A^H`` over gaps of the squared singular values. The next
    singular value, behind the gap, is found from above in what the subspace leaves of ``A``.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.diag(1.0 / np.arange(1, 201))
    >>> found = leading_subspace(a, rank=3, rng=0)
    >>> sine = np.linalg.norm(found.basis[3:], 2)
    >>> bool(sine <= found.angle <= 1e-2)
    True
    >>> leading_subspace(a, rank=3, init=found.basis, rng=0).reads < found.reads
    True
    """
    if (
        is_array(a)
        and not isinstance(a, np.ndarray)
        and (host := host_view(as_compute(a))) is not None
    ):
        first = None if init is None else host_view(init)
        found = leading_subspace(host, rank, init=first, tol=tol, max_reads=max_reads, rng=rng)
        xp = namespace(a)
        return found._replace(basis=xp.asarray(found.basis, device=device(a), copy=True))
    operator = as_operator(a)
    m, n = operator.shape
    rank = check_rank(rank, min(m, n), (m, n))
    check_angle(tol)
    generator = np.random.default_rng(rng)
    # The Krylov space lies on the shorter side; on the longer one, ``init`` could leave the range.
    tall, basis, near = m > n, init, init
    width, reads = min(m, n, rank + _OVERSAMPLING), 0
    if tall:
        near = None if init is None else namespace(init).linalg.qr(operator.rmatmul(init))[0]
        reads = 0 if init is None else 1
    else:
        operator = operator.mH
    residual, beyond = 2 * _NO_GAP * tol, None
    while True:
        found = block_krylov(
            operator,
            lambda _: rank,
            tol=residual,
            rng=generator,
            init=near,
            width=width,
            max_reads=max_reads - reads,
        )
        reads += found.reads
        s, bounds = (to_host(x).astype(np.float64) for x in (found.svd.s, found.svd.bounds))
        u, _, vh = found.svd if tall else found.svd.mH
        if s[0] == 0.0:
            return Subspace(0 * u if basis is None else basis, 1.0, reads, True)
        basis, vh = fix_signs(u, vh)
        near = adjoint(vh) if tall else basis
        if beyond is None:
            beyond = _largest(operator - found.svd, generator) if rank < min(m, n) else 0.0
        angle = _sine(s, bounds, beyond)
        if angle <= tol or angle == 1.0 or not found.converged or reads + 2 >= max_reads:
            return Subspace(basis, angle, reads, False)
        residual *= tol / (2 * angle)


def check_angle(tol: float) -> None:
    """Raise unless ``tol`` is the sine of an angle that can be reached."""
    if not 0 < tol <= 1:
        raise ValueError(f"tol must be in (0, 1], got {tol}")


def _largest(a: LinearOperator, rng: np.random.Generator) -> float:
    """A singular value from above, to a few percent."""
    found = block_krylov(a, lambda _: 1, tol=_NO_GAP, rng=rng, width=_OVERSAMPLING, max_reads=8).svd
    return float(found.s[0]) + float(found.bounds[0])


def _sine(s: np.ndarray, bounds: np.ndarray, beyond: float) -> float:
    """Sine of the largest angle, if the next singular value is ``beyond``; 1 without a gap.

    Davis and Kahan, vector by vector: ``||(A A^H - s_i^2) u_i|| <= s_i b_i`` on the side of the
    Krylov space, over its gap. On the other side it is ``A`` times a residual of length ``b_i``,
    and outside of the leading subspace ``A`` is at most ``beyond``, which is less than ``s_i``.
    """
    gaps = s**2 - beyond**2
    if gaps[-1] <= _NO_GAP * s[-1] ** 2:
        return 1.0
    return min(1.0, float(np.linalg.norm(s * bounds / gaps)))


def sketch(like: Array, rank: int, *, rng: RNG) -> Array:
    """Gaussian ``P (m, r)`` with ``E P P^H = I``, for a matrix ``like`` of ``m`` rows.

    ``||P^H x||`` is ``||x||`` up to about ``1 / sqrt(r)``. One seed gives one sketch everywhere.
    """
    return standard_normal((like.shape[-2], rank), like=like, rng=rng) / rank**0.5


def overlap(turn: Array) -> Array:
    """Mean squared cosine of the angles between two subspaces, from ``turn = P_new^H P_old``."""
    xp = namespace(turn)
    return xp.sum(abs(turn) ** 2, axis=(-2, -1)) / turn.shape[-1]


@dataclass(frozen=True)
class Every:
    """Renew the subspace every ``gap`` steps, as GaLore does.

    Parameters
    ----------
    gap : int
        Steps.
    """

    gap: int = 200

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise ValueError(f"gap must be at least 1, got {self.gap}")

    def init(self, coordinates: Array) -> State:  # noqa: ARG002
        """What the schedule keeps, for coordinates ``(..., r, n)`` of a gradient."""
        return {}

    def due(self, state: State) -> Array:
        """Whether to renew the subspace before the next step, ``(...)``."""
        return state["age"] >= state["interval"]

    def watch(self, coordinates: Array, gradient: Array, state: State) -> State:  # noqa: ARG002
        """What to change in the state after a gradient of these coordinates."""
        return {}

    def renewed(self, similarity: Array, state: State) -> State:  # noqa: ARG002
        """What to change in the state when the subspace is renewed, given their :func:`overlap`."""
        return {}


@dataclass(frozen=True)
class Growing(Every):
    """Renew after ``gap`` steps, then ``gap * factor``, ``gap * factor^2``, as LoQT does.

    Parameters
    ----------
    gap : int
    factor : float
        At least 1.
    """

    gap: int = 100
    factor: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be finite and at least 1, got {self.factor}")

    def renewed(self, similarity: Array, state: State) -> State:  # noqa: ARG002
        return {"interval": _stretched(state["interval"], self.factor)}


@dataclass(frozen=True)
class Lazy(Every):
    """Renew ever more rarely where the subspace stays, as Q-GaLore does.

    Once ``patience`` renewals in a row found a subspace whose :func:`overlap` with the one before
    is more than ``similarity``, the interval of this weight doubles.

    Parameters
    ----------
    gap : int
        The first interval.
    similarity : float
        In ``[0, 1]``. A random subspace overlaps by ``r / m``.
    patience : int

    Notes
    -----
    The published rule :cite:p:`zhang2024qgalore` compares the first basis vectors, by the mean of
    their last five cosines: these have a sign of their own, and turn within a subspace that stays.
    """

    similarity: float = 0.4
    patience: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.similarity <= 1:
            raise ValueError(f"similarity must be in [0, 1], got {self.similarity}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")

    def init(self, coordinates: Array) -> State:
        xp = namespace(coordinates)
        calm = xp.zeros(coordinates.shape[:-2], dtype=xp.int32, device=device(coordinates))
        return {"calm": calm}

    def renewed(self, similarity: Array, state: State) -> State:
        xp = namespace(similarity)
        zero = xp.zeros_like(state["calm"])
        calm = xp.where(similarity > self.similarity, state["calm"] + 1, zero)
        doubles = calm >= self.patience
        interval = xp.where(doubles, 2 * state["interval"], state["interval"])
        return {"calm": xp.where(doubles, zero, calm), "interval": interval}


@dataclass(frozen=True)
class Displacement(Every):
    r"""Renew once the gradients have stopped to lead anywhere in the subspace, as Lotus does.

    The unit gradients since the last renewal make a walk inside the subspace, whose displacement
    per step is

    .. math:: \rho = \Bigl\lVert \frac1k \sum_{i=1}^k \frac{P^H G_i}{\lVert G_i \rVert_F}
              \Bigr\rVert_F \in [0, 1].

    It is 1 for a gradient that stays as it is, and falls where gradients leave the subspace or turn
    about in it. The subspace is renewed where ``rho < least`` after ``gap`` steps or more.

    Parameters
    ----------
    gap : int
        The fewest steps between two renewals.
    least : float

    Notes
    -----
    State: the ``r n`` numbers of the sum.

    The paper :cite:p:`miao2026lotus` defines the path in the subspace over the one of steps that
    all agree, which is this. Its algorithm divides the distance of the last unit gradient in the
    subspace from the first by the number of steps, every 25 to 100 of them, against a threshold of
    0.005 to 0.02: as unit gradients are no further apart than 2, that renews by ``2 / least`` steps
    in any case.
    """

    gap: int = 50
    least: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be in [0, 1], got {self.least}")

    def init(self, coordinates: Array) -> State:
        xp = namespace(coordinates)
        path = xp.zeros_like(coordinates)
        walked = xp.zeros(path.shape[:-2], dtype=xp.int32, device=device(path))
        return {"path": path, "walked": walked, "displacement": abs(path[..., 0, 0])}

    def due(self, state: State) -> Array:
        return super().due(state) & (state["displacement"] < self.least)

    def watch(self, coordinates: Array, gradient: Array, state: State) -> State:
        xp = namespace(coordinates)
        norm = xp.sum(abs(gradient) ** 2, axis=(-2, -1)) ** 0.5
        norm = over(xp.where(norm > 0, norm, xp.ones_like(norm)))
        walked = state["walked"] + 1
        path = state["path"] + coordinates / norm
        length = xp.sum(abs(path) ** 2, axis=(-2, -1)) ** 0.5
        displacement = length / xp.astype(walked, length.dtype)
        return {"path": path, "walked": walked, "displacement": displacement}

    def renewed(self, similarity: Array, state: State) -> State:  # noqa: ARG002
        xp = namespace(state["path"])
        return {
            "path": xp.zeros_like(state["path"]),
            "walked": xp.zeros_like(state["walked"]),
            "displacement": xp.zeros_like(state["displacement"]),
        }


def _stretched(interval: Array, factor: float) -> Array:
    xp = namespace(interval)
    return xp.astype(xp.ceil(xp.astype(interval, xp.float32) * factor), interval.dtype)
