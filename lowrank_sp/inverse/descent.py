"""Descent on a factor pair by any update rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import Array, adjoint, max_abs
from lowrank_sp.factors import LowRank
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.operators import as_operator
from lowrank_sp.updates.rule import Rule, State

#: From a matrix to the gradient of the loss there, an array or an operator of its shape.
Gradient = Callable[[LowRank], Any]


def descend(
    gradient: Gradient,
    init: LowRank,
    rule: Rule,
    *,
    stop: Stop = Stop(),
    callback: Callable[[int, float, LowRank], Any] | None = None,
) -> Solution:
    r"""Minimize a loss of ``X = left @ right`` over the factors, by an update rule.

    .. math:: \nabla_L = G\, R^H, \qquad \nabla_R = L^H G, \qquad G = \nabla f(L R)

    The same rules train adapters; see the :doc:`guide </updates>`.

    Parameters
    ----------
    gradient : callable
        From a :class:`~lowrank_sp.factors.LowRank` to the gradient of the loss with respect to it,
        an array of shape ``(m, n)`` or an operator, of which two products with ``r`` columns are
        taken.
    init : LowRank
        Where to start.
    rule : Rule
    stop : Stop
        The change monitored is that of ``X``, relative to ``X``.
    callback : callable, optional

    Returns
    -------
    Solution
        ``value`` is a :class:`~lowrank_sp.factors.LowRank`. Where a gradient or a step is not
        finite, it is the last good one, and ``converged`` is False.

    Notes
    -----
    A step costs two products with the gradient, those of the rule, and ``O((m + n) r^2)`` for the
    change.

    Examples
    --------
    The closest matrix of rank 2, by scaled gradient descent:

    >>> import numpy as np
    >>> from lowrank_sp.updates import ScaledGD
    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((8, 2)) @ np.diag([1.0, 1e-3]) @ rng.standard_normal((2, 7))
    >>> start = LowRank(rng.standard_normal((8, 2)), rng.standard_normal((2, 7)))
    >>> solution = descend(lambda x: x.to_dense() - a, start, ScaledGD(lr=0.5, damping=0.0))
    >>> solution.converged, np.allclose(solution.value.to_dense(), a, atol=1e-6)
    (True, True)
    """

    def gradients(up: Array, down: Array) -> tuple[Array, Array]:
        g = as_operator(gradient(LowRank(up, down)))
        return g.matmul(adjoint(down)), adjoint(g.rmatmul(up))

    def step(state: _State) -> tuple[_State, float]:
        # Overflow is what a diverging step ends with; such a step is not taken.
        with np.errstate(over="ignore", invalid="ignore"):
            if not _finite(*state.grads):
                return state, math.nan
            up, down, memory = rule.step(state.up, state.down, *state.grads, state.memory)
            if not _finite(up, down):
                return state, math.nan
            new = _State(up, down, gradients(up, down), memory)
            x = LowRank(up, down)
            change, size = (x - LowRank(state.up, state.down)).norm(), x.norm()
        if not _finite(*new.grads):
            return state, math.nan
        return new, change / size if size else change

    up, down = init.factors()
    return iterate(
        step,
        _State(up, down, gradients(up, down), rule.init(up, down)),
        stop=stop,
        dtype=up.dtype,
        callback=callback,
        value=lambda state: LowRank(*rule.settle(state.up, state.down, state.memory)),
    )


class _State(NamedTuple):
    up: Array
    down: Array
    grads: tuple[Array, Array]
    memory: State


def _finite(*arrays: Array) -> bool:
    return all(math.isfinite(max_abs(x)) for x in arrays)
