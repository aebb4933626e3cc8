"""The same function on every task, over any executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol


class Executor(Protocol):
    """What is needed of an executor: those of concurrent.futures, Dask and MPI have it."""

    def submit(self, function: Callable, /, *args: Any) -> Any:
        """Start ``function(*args)`` and return a future."""
        ...


def run(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    executor: Executor | None = None,
    ahead: int = 4,
) -> Iterator[Any]:
    """``function`` of each task, in order.

    At most ``ahead`` results exist at a time, so that memory stays bounded. Without an executor the
    calls happen one by one in this process.
    """
    if executor is None:
        yield from map(function, tasks)
        return
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(function, task))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
