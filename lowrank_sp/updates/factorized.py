"""Weights that are trained as factors: LORO, the restarts of ReLoRA, the sparse part of SLTrain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lowrank_sp._arrays import RNG, Array, adjoint, as_compute, from_host, namespace, placed
from lowrank_sp.updates.frames import left_times, times
from lowrank_sp.updates.moments import Adam, Moments, init_pair, turn_pair
from lowrank_sp.updates.rule import (
    Gauge,
    Pair,
    Rule,
    Scalar,
    State,
    counter,
    nowhere,
    over,
    rounded,
    where,
)
from lowrank_sp.updates.slots import descend
from lowrank_sp.updates.tangent import Point, Tangent, point, retract


@dataclass(frozen=True)
class LORO(Rule):
    r"""LORO :cite:p:`mo2025loro`: descent among matrices of rank ``r``, exact from time to time.

    Every ``period`` steps the factors take an exact step: with the directions of the moments in the
    place of factor gradients, the tangent vector ``X`` at ``W = up down`` is formed and

    .. math:: W \leftarrow H_r(W - \eta X), \qquad X = P_B G + G P_A - P_B G P_A,

    where ``H_r`` is the best approximation of rank ``r``. Adam's directions of both factors are of
    no common ``G``: ``up`` gives what of ``X`` is in the rows of ``A``, ``down`` what is in the
    columns of ``B``, and the part in both is their mean. The new factors are balanced, and the
    moments begin anew. All steps between are plain steps of both factors.

    Parameters
    ----------
    lr : float
    period : int
        Steps from one exact step to the next; 1 for exact steps only.
    moments : Moments
        Of the factor gradients.
    lazy : float, optional
        Factor of the learning rate in the plain steps; by default the mean of ``r / m`` and
        ``r / n``, as published.
    weight_decay : float

    Notes
    -----
    ``O((m + n) r^2)`` for an exact step, ``O((m + n) r)`` for the others; state ``2 (m + n) r``
    under Adam. Where the counter is traced by a compiler, both are computed at every step.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> target = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    >>> up, down = rng.standard_normal((6, 2)), rng.standard_normal((2, 5))
    >>> rule = LORO(lr=0.03, period=20, lazy=1.0)
    >>> state = rule.init(up, down)
    >>> for k in range(400):
    ...     g = up @ down - target
    ...     grads = g @ down.T, up.T @ g
    ...     up, down, state = rule.step(up, down, *grads, state, lr=0.1 / (1 + k / 20))
    >>> bool(np.linalg.norm(up @ down - target) < 0.05 * np.linalg.norm(target))
    True
    """

    lr: float = 1e-3
    period: int = 250
    moments: Moments = field(default_factory=Adam)
    lazy: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1, got {self.period}")

    @property
    def joint(self) -> bool:
        return True

    @property
    def invariance(self) -> Gauge:
        if not self.moments.linear:
            return Gauge.NONE
        return Gauge.GENERAL if self.period == 1 else Gauge.UNITARY

    def _init(self, factors: Pair) -> State:
        return {"since": counter(factors), **init_pair(self.moments, factors)}

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        since = state["since"] + 1
        history = {name: x for name, x in state.items() if name != "since"}
        directions, history = turn_pair(self.moments, grads, history)
        rate = lr * (self._lazy(factors) if self.lazy is None else self.lazy)
        new = Pair(
            *(
                descend(x, d, rate, self.weight_decay)
                for x, d in zip(factors, directions, strict=True)
            )
        )
        exact = since >= self.period
        if nowhere(exact):
            return new, {"since": since, **history}
        at = point(factors)
        step = Tangent(*(lr / scale * part for part in _tangent(at, directions, scale)))
        there = _balanced(retract(at, step, 1 - lr * self.weight_decay))
        fresh = init_pair(self.moments, factors)
        new = Pair(*(where(exact, x, y) for x, y in zip(there, new, strict=True)))
        return new, {
            "since": where(exact, 0 * since, since),
            **{name: where(exact, fresh[name], x) for name, x in history.items()},
        }

    def _lazy(self, factors: Pair) -> float:
        r = factors.down.shape[-2]
        return (r / factors.up.shape[-2] + r / factors.down.shape[-1]) / 2


def _tangent(at: Point, directions: Pair, scale: Scalar) -> Tangent:
    """The tangent vector nearest to directions of both factors, which may be of no gradient."""
    g_down = times(directions.up, at.of_down.inverse / scale)
    up_g = left_times(adjoint(at.of_up.inverse / scale), directions.down)
    inside, also_inside = adjoint(at.q_up) @ g_down, up_g @ at.q_down
    core = (inside + also_inside) / 2
    return Tangent(core, g_down - at.q_up @ inside, up_g - also_inside @ adjoint(at.q_down))


def _balanced(factors: Pair) -> Pair:
    """Factors with equal Gram matrices, for a ``down`` with orthonormal rows."""
    xp = namespace(factors.up)
    size = xp.sum(abs(factors.up) ** 2, axis=-2, keepdims=True) ** 0.25
    # Where the rank is deficient, the rows of down stay, so that it can come back.
    root = xp.where(size > 0, size, xp.ones_like(size))
    return Pair(factors.up / root, root.mT * factors.down)


def merge_and_restart(
    weight: Array,
    up: Array,
    down: Array,
    state: State,
    *,
    scale: float = 1.0,
    keep: float = 0.01,
    rng: RNG = None,
) -> tuple[Array, Array, Array, State]:
    """ReLoRA's restart :cite:p:`lialin2023relora`: merge an adapter and begin with another.

    ``W <- W + scale up down``, ``up <- 0``, and ``down`` drawn anew. Restarts add up to updates of
    higher rank. Of the moments all but the largest entries become zero, for they belong to other
    directions; let the learning rate warm up afterwards (:func:`jagged_cosine`).

    Parameters
    ----------
    weight : array, shape (..., m, n)
    up : array, shape (..., m, r)
    down : array, shape (..., r, n)
    state : dict of arrays
        Of a rule such as :class:`~lowrank_sp.updates.first_order.AdamW`: entries named ``mean`` or
        ``square`` are pruned, counters stay.
    scale : float
    keep : float
        Share of the entries of each moment to keep.
    rng : int, Generator or None
        For ``down``, uniform with variance ``1 / (3 n)``, as PEFT draws it.

    Returns
    -------
    (array, array, array, dict of arrays)
        New weight, ``up``, ``down`` and state.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.updates import AdamW
    >>> up, down = np.ones((3, 1)), np.ones((1, 2))
    >>> state = AdamW().init(up, down)
    >>> w, up, down, state = merge_and_restart(np.zeros((3, 2)), up, down, state, scale=0.5, rng=0)
    >>> bool(np.all(w == 0.5)), bool(np.all(up @ down == 0))
    (True, True)
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    merged = rounded(as_compute(weight) + scale * (as_compute(up) @ as_compute(down)), weight)
    n = down.shape[-1]
    drawn = np.random.default_rng(rng).uniform(-(n**-0.5), n**-0.5, down.shape)
    pruned = {
        name: _largest(x, keep) if name.endswith(("mean", "square")) else x
        for name, x in state.items()
    }
    return merged, namespace(up).zeros_like(up), from_host(drawn, down), pruned


def _largest(x: Array, share: float) -> Array:
    """``x`` with all but this share of its entries, those of largest magnitude, set to zero."""
    xp = namespace(x)
    size = xp.reshape(abs(x), (*x.shape[:-2], -1))
    kept = math.ceil(share * size.shape[-1])
    if kept == 0:
        return xp.zeros_like(x)
    least = xp.sort(size, axis=-1)[..., size.shape[-1] - kept]
    return xp.where(abs(x) >= over(least), x, xp.zeros_like(x))


def jagged_cosine(
    step: int, *, total: int, period: int, warmup: int, restart_warmup: int, least: float = 0.1
) -> float:
    """ReLoRA's factor of the learning rate: a cosine, with a warm-up after each restart.

    Parameters
    ----------
    step : int
        From 0. Restarts are before steps ``period``, ``2 period``, and so on.
    total : int
        Steps of the training; the factor ends at ``least``.
    period : int
    warmup, restart_warmup : int
        Steps of the linear warm-ups, at the start and after a restart.
    least : float

    Examples
    --------
    >>> options = dict(total=1000, period=200, warmup=10, restart_warmup=5)
    >>> [round(jagged_cosine(k, **options), 3) for k in (0, 9, 199, 200, 205, 999)]
    [0.1, 1.0, 0.915, 0.183, 0.91, 0.1]
    """
    if total < 1 or period < 1:
        raise ValueError(f"total and period must be at least 1, got {total} and {period}")
    done = min(step, total) / total
    cosine = least + (1 - least) * (1 + math.cos(math.pi * done)) / 2
    length = warmup if step < period else restart_warmup
    return cosine * min(1.0, (step % period + 1) / max(length, 1))


def random_support(
    shape: tuple[int, int], density: float, *, like: Array, rng: RNG = None
) -> Array:
    """Positions of SLTrain's sparse part: uniform, without repetition, sorted.

    Parameters
    ----------
    shape : (int, int)
    density : float
        Share of the entries, in (0, 1].
    like : array
        Gives library and device.
    rng : int, Generator or None

    Returns
    -------
    integer array, shape (k,)
        Positions in the rows of the matrix, one after the other.
    """
    size = math.prod(shape)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    drawn = np.random.default_rng(rng).choice(size, max(1, round(density * size)), replace=False)
    return from_host(np.sort(drawn), like, namespace(like).int64)


def low_rank_plus_sparse(
    up: Array, down: Array, values: Array, support: Array, *, scale: float = 1.0
) -> Array:
    """SLTrain's weight :cite:p:`han2024sltrain`: ``scale up down`` plus ``values`` at ``support``.

    Parameters
    ----------
    up : array, shape (m, r)
    down : array, shape (r, n)
    values : array, shape (k,)
    support : integer array, shape (k,)
        Sorted, as :func:`random_support` gives it.
    scale : float

    Returns
    -------
    array, shape (m, n)

    Examples
    --------
    >>> import numpy as np
    >>> up, down, values = np.ones((2, 1)), np.ones((1, 3)), np.array([5.0, 7.0])
    >>> low_rank_plus_sparse(up, down, values, np.array([0, 4]))
    array([[6., 1., 1.],
           [1., 8., 1.]])
    """
    xp = namespace(up)
    shapes = tuple(up.shape), tuple(down.shape)
    if up.ndim != 2 or down.ndim != 2 or shapes[0][1] != shapes[1][0]:
        raise ValueError(
            f"up and down must have shapes (m, r) and (r, n), got {shapes[0]} and {shapes[1]}"
        )
    if tuple(values.shape) != tuple(support.shape):
        raise ValueError(
            f"values and support must have one length, got {values.shape[0]} and {support.shape[0]}"
        )
    m, n = up.shape[0], down.shape[1]
    sparse = placed(values, support, m * n)
    return scale * (up @ down) + xp.reshape(sparse, (m, n))


def low_rank_plus_sparse_gradients(
    grad: Array, up: Array, down: Array, support: Array, *, scale: float = 1.0
) -> tuple[Array, Array, Array]:
    """Gradients of ``up``, ``down`` and ``values`` of :func:`low_rank_plus_sparse`.

    ``scale G down^H``, ``scale up^H G`` and the entries of ``G`` at ``support``: ``4 m n r`` flops,
    and nothing of the size of ``G`` is kept.

    Parameters
    ----------
    grad : array, shape (m, n)
        Gradient with respect to the weight.
    up : array, shape (m, r)
    down : array, shape (r, n)
    support : integer array, shape (k,)
    scale : float

    Returns
    -------
    (array, array, array)
        Of shapes (m, r), (r, n) and (k,).
    """
    values = namespace(grad).take(namespace(grad).reshape(grad, (-1,)), support)
    return scale * (grad @ adjoint(down)), scale * (adjoint(up) @ grad), values
