"""Adapter forms, what is known about each, and random values for their arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_sp.adapters import forms

SHAPE = (12, 8)


@dataclass(frozen=True)
class Case:
    """One form at one setting.

    ``create(weight, rng)`` makes it; ``naive(a, weight)`` computes the dense update from a
    dictionary ``a`` of its arrays by name, in float64, entry by entry where that reads best;
    ``lora`` is the rank of the exact conversion to plain LoRA, None where there is none.
    """

    name: str
    create: Callable[[Any, Any], forms.Form]
    naive: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
    num_trainable: int
    rank: int
    lora: int | None
    zero: bool = True
    shape: tuple[int, int] = SHAPE
    #: Rank that random values reach, where it is less than the bound.
    attained: int | None = None


def weight_of(case, dtype=np.float64):
    return np.random.default_rng(7).standard_normal(case.shape).astype(dtype)


def random_values(form, asarray, seed=1, scale=0.5):
    """The form with Gaussian values in place of all trained arrays."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, a in form.parameters().items():
        values = scale * rng.standard_normal(tuple(a.shape))
        drawn[name] = asarray(values.astype(str(a.dtype).rpartition(".")[2]))
    return form.replace(drawn)
