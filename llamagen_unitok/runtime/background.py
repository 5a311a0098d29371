"""Work that goes on beside the caller: decoding of pixels and writing of files while the next batch is generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

WAITING = 2  # pieces of work that may be unfinished: one that runs, one that is next; memory stays flat


class Background:
    """One thread that does pieces of work in the order in which they come; a context manager.

    Leaving it waits for all of them. A failed piece raises its error from the next call, or on leaving.
    beside: False does each piece at once in the caller's thread, where a second one would only take its cores.
    """

    def __init__(self, beside: bool = True) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1) if beside else None
        self._unfinished: deque[Future] = deque()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        while self._unfinished and error is None:
            self._unfinished.popleft().result()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Do ``work(*arguments)``, as soon as fewer than `WAITING` pieces are unfinished; its result comes later."""
        if self._thread is None:
            done: Future = Future()
            done.set_result(work(*arguments))
            return done
        while len(self._unfinished) >= WAITING:
            self._unfinished.popleft().result()
        future = self._thread.submit(work, *arguments)
        self._unfinished.append(future)
        return future
