"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One Ctrl-C in a terminal reaches the process itself and, once more, through torchrun.
GRACE_SEC = 5.0


class Stop:
    """requested: whether a signal has come."""

    requested = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for a stop, and leave the time for a last checkpoint.

    More of them change nothing, for launchers and schedulers send several; but a Ctrl-C that comes `GRACE_SEC` or more
    after the first signal raises KeyboardInterrupt at once. Outside the main thread signals stay as they are.
    """
    stop = Stop()
    first = 0.0

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first >= GRACE_SEC:
            signal.default_int_handler(number, frame)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:  # a test, a notebook
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
