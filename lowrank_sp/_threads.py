"""Threads that stay out of each other's way."""

from __future__ import annotations

from threading import Lock
from typing import Any

from threadpoolctl import ThreadpoolController

_LOCK = Lock()


class _BlasOnOneThread:
    """Context in which BLAS has one thread; may be entered from several threads at a time.

    After a call the idle threads of a BLAS library spin for a while, on the very cores that a
    compiled kernel is about to use.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with _LOCK:
            self._entered += 1
            if self._entered == 1:
                self._limit = ThreadpoolController().limit(limits=1, user_api="blas")

    def __exit__(self, *error: object) -> None:
        with _LOCK:
            self._entered -= 1
            if self._entered == 0:
                self._limit.restore_original_limits()


blas_on_one_thread = _BlasOnOneThread()
