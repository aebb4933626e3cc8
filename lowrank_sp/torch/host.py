"""Steps in host memory: by NumPy's arrays, and several batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_sp import _threads

# Threads for the steps of rules, which hold the lock of the interpreter for a fifth of the time.
_MOST = 4


def in_memory(x: Any) -> bool:
    """Whether ``x`` is a plain tensor in host memory."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def with_numpy(step: Callable[..., Any]) -> Callable[..., Any]:
    """The ``step`` of a rule; it gets NumPy's arrays where the tensors are in host memory.

    A step is made of some hundred small operations, which cost NumPy a third of the time.
    """

    def move(*given: Any, **numbers: float) -> Any:
        if not in_memory(given[0]):
            return step(*given, **numbers)
        with np.errstate(all="ignore"):  # as PyTorch does
            return tuple(map(_tensor, step(*map(_array, given), **numbers)))

    return move


def share(jobs: Sequence[Callable[[], None]]) -> None:
    """Do jobs that change different tensors; several at a time, each on one thread."""
    if torch.get_num_threads() == 1 or len(jobs) == 1:
        for job in jobs:
            job()
    else:
        with torch_on_one_thread(), _threads.blas_on_one_thread:
            _threads.run([partial(_alone, job) for job in jobs], most=_MOST)


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Context in which PyTorch has one thread; after a call its others spin for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _alone(job: Callable[[], None]) -> None:
    # The number of threads and the gradient mode are settings of a thread.
    torch.set_num_threads(1)
    job()


def _array(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _array(part) for name, part in x.items()}
    # NumPy has no bfloat16.
    return x if x is None else (x.float() if x.dtype.itemsize < 4 else x).numpy()


def _tensor(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _tensor(part) for name, part in x.items()}
    return torch.from_numpy(np.asarray(x))
