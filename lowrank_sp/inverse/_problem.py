"""What problems of every kind share: their scale, and how a solver is said to have failed."""

from __future__ import annotations

import math
from dataclasses import replace

from lowrank_sp.iterate import Solution

# A residual this many times the data is that of a method that diverges.
_DIVERGED = 2.0


def power_of_two(largest: float) -> float:
    """The scale of data with entries up to ``largest``, by which they divide without rounding."""
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000)


def fits(residual: float, size: float) -> bool:
    """Whether a residual, of data of norm ``size``, is not that of a method that diverges."""
    return residual <= _DIVERGED * size


def with_residual(solution: Solution, residual: float, of: str) -> Solution:
    """``solution``, whose reason says which relative residual it leaves."""
    return replace(solution, reason=f"{solution.reason}; residual {residual:.1e} {of}")


def rejected(solution: Solution, flaw: str) -> Solution:
    """``solution``, not converged because of a flaw, which its reason names first."""
    return replace(solution, converged=False, reason=f"{flaw}; {solution.reason}")
