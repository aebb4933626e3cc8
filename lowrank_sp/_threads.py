"""Threads: a pool that shares work out, and BLAS, whose threads stay out of its way.

Threads of the pool sleep until they are called, which takes a tenth of a millisecond, and leave
the cores to others; those of BLAS and of OpenMP spin for a while after every call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

# Multiplications from which a product is shared.
_SHARED = 2**22
_LOCK = Lock()


class _BlasOnOneThread:
    """Context in which BLAS has one thread; may be entered from several threads at a time.

    After a call the idle threads of a BLAS library spin for a while, on the very cores that a
    compiled kernel is about to use.
    """

    def __init__(self) -> None:
        self.before = 0
        self._entered = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with _LOCK:
            if self._entered == 0:
                self.before = _blas_threads()
                self._limit = _blas(len(sys.modules)).limit(limits=1)
            self._entered += 1

    def __exit__(self, *error: object) -> None:
        with _LOCK:
            self._entered -= 1
            if self._entered == 0:
                self._limit.restore_original_limits()
                self.before = 0


blas_on_one_thread = _BlasOnOneThread()


def count() -> int:
    """Threads to use: as many as BLAS, whose number people set by ``OMP_NUM_THREADS`` and such."""
    return blas_on_one_thread.before or _blas_threads()


def shares(length: int) -> list[tuple[int, int]]:
    """Ranges that cover ``range(length)``, one for every thread."""
    parts = max(1, min(count(), length))
    return list(pairwise(length * k // parts for k in range(parts + 1)))


def run(jobs: Sequence[Callable[[], object]], *, most: int | None = None) -> None:
    """Call every job once, shared among threads; they should leave the interpreter's lock.

    No more threads than ``most``, where the jobs do not leave it for long.
    """
    todo = iter(jobs)

    def work() -> None:
        for job in todo:
            job()

    others = range(min(count(), len(jobs), most or len(jobs)) - 1)
    helpers = [_pool(os.getpid()).submit(work) for _ in others]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


def matmul(a: Any, b: Any) -> Any:
    """``a @ b``, large products of NumPy's arrays shared among threads while BLAS has one."""
    if not _to_share(a, b):
        return a @ b
    out = np.empty((*b.shape[:-2], a.shape[-2], b.shape[-1]), np.result_type(a, b))
    if b.ndim > 2:
        jobs = [partial(np.matmul, a, b[i:j], out=out[i:j]) for i, j in shares(len(b))]
    elif len(a) > b.shape[1]:
        jobs = [partial(np.matmul, a[i:j], b, out=out[i:j]) for i, j in shares(len(a))]
    else:
        parts = shares(b.shape[1])
        jobs = [partial(np.matmul, a, b[:, i:j], out=out[:, i:j]) for i, j in parts]
    run(jobs)
    return out


def gram(x: Any) -> Any:
    """``x^H x`` of tall ``x``, shared as in :func:`matmul`."""
    if not _to_share(x.T, x):
        return x.conj().T @ x
    parts = shares(len(x))
    out = np.empty((len(parts), x.shape[1], x.shape[1]), x.dtype)
    rows = [x[i:j] for i, j in parts]
    jobs = [partial(np.matmul, y.conj().T, y, out=to) for y, to in zip(rows, out, strict=True)]
    run(jobs)
    return out.sum(axis=0)


def _to_share(a: Any, b: Any) -> bool:
    plain = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    return plain and blas_on_one_thread.before > 1 and len(a) * b.size >= _SHARED


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """The threads of this process: those of its parent did not come along with a fork."""
    return ThreadPoolExecutor(os.cpu_count())


@lru_cache(1)
def _blas(modules: int) -> ThreadpoolController:  # noqa: ARG001
    """The BLAS libraries that are loaded; they come with modules, when these are imported."""
    return ThreadpoolController().select(user_api="blas")


def _blas_threads() -> int:
    numbers = [library["num_threads"] for library in _blas(len(sys.modules)).info()]
    return max(numbers, default=os.cpu_count() or 1)
