"""The one loop of every iterative method: stopping, history, interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lowrank_sp._arrays import eps


@dataclass(frozen=True)
class Stop:
    """When an iterative method ends.

    Parameters
    ----------
    max_iter : int
        Most steps to take.
    tol : float, "auto" or None
        The method has converged once the relative change it monitors is at most ``tol``. "auto" is
        ``4 sqrt(eps)`` of the compute dtype. With None the change is never read, so that the loop
        can be traced by a compiler, and ``Solution.converged`` is None.
    seconds : float
        Most wall-clock time to spend; checked after every step.
    """

    max_iter: int = 500
    tol: float | Literal["auto"] | None = "auto"
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.max_iter < 0:
            raise ValueError(f"max_iter must be at least 0, got {self.max_iter}")
        if isinstance(self.tol, (int, float)) and not self.tol >= 0:
            raise ValueError(f"tol must be at least 0, got {self.tol}; use None to disable it")

    def resolve(self, dtype: Any) -> float | None:
        """The tolerance as a number for computations in ``dtype``, or None."""
        return 4 * eps(dtype) ** 0.5 if self.tol == "auto" else self.tol


class Record(NamedTuple):
    """One step of an iteration: the change it monitored and the seconds elapsed since the start."""

    step: int
    change: float
    seconds: float


@dataclass(frozen=True)
class Solution:
    """The answer of an iterative method, and whether to trust it.

    Attributes
    ----------
    value
        The last good iterate.
    converged : bool or None
        Whether the stopping rule was met; None where no tolerance was set.
    reason : str
        Why the iteration ended, in words.
    n_iter : int
        Steps taken.
    history : tuple of Record
        What was monitored at every step.
    """

    value: Any
    converged: bool | None
    reason: str
    n_iter: int
    history: tuple[Record, ...] = field(repr=False)


def iterate(
    step: Callable[[Any], tuple[Any, Any]],
    state: Any,
    *,
    stop: Stop,
    dtype: Any,
    callback: Callable[[int, float, Any], Any] | None = None,
    value: Callable[[Any], Any] = lambda state: state,
) -> Solution:
    """Repeat ``state, change = step(state)`` until ``stop`` says so.

    Parameters
    ----------
    step : callable
        A pure function from a state to the next state and the relative change made.
    state
        Where to start.
    stop : Stop
    dtype
        Compute dtype, from which "auto" tolerances follow.
    callback : callable, optional
        Called as ``callback(k, change, value)`` after step ``k = 1, 2, ...``; a true result ends
        the iteration.
    value : callable
        Reads the answer off a state.

    Returns
    -------
    Solution
        A step whose change is not finite is discarded and ends the iteration: the iterate before it
        is returned with ``converged=False``. So does Ctrl-C, which keeps the last full step.

    Examples
    --------
    >>> import numpy as np
    >>> newton = lambda x: ((x + 2 / x) / 2, abs(x * x - 2))
    >>> root = iterate(newton, 1.0, stop=Stop(tol=1e-12), dtype=np.float64)
    >>> round(root.value, 6), root.converged, root.n_iter
    (1.414214, True, 6)
    """
    tol = stop.resolve(dtype)
    history: list[Record] = []
    start = time.perf_counter()

    def solution(converged: bool | None, reason: str) -> Solution:
        return Solution(value(state), converged, reason, len(history), tuple(history))

    for k in range(1, stop.max_iter + 1):
        try:
            following, change = step(state)
            change = float(change) if tol is not None else math.nan
        except KeyboardInterrupt:
            return solution(False, f"interrupted in step {k}")
        if tol is not None and not math.isfinite(change):
            return solution(False, f"diverged in step {k}: change is {change}")
        state = following
        history.append(Record(k, change, time.perf_counter() - start))
        if callback is not None and callback(k, change, value(state)):
            return solution(None if tol is None else False, f"stopped by the callback at step {k}")
        if tol is not None and change <= tol:
            return solution(True, f"change {change:.1e} <= tol {tol:.1e} after {k} steps")
        if history[-1].seconds > stop.seconds:
            return solution(None if tol is None else False, f"out of time after {k} steps")
    last = f", change {history[-1].change:.1e}" if history and tol is not None else ""
    return solution(None if tol is None else False, f"max_iter = {stop.max_iter} reached{last}")
