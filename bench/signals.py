"""Signals that end a benchmark in order, so that nothing it started is left behind."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside SIGINT, which Python raises by itself


@contextmanager
def as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP (a terminal that is gone) as SystemExit, so that `finally` comes to its right.

    What is ignored (nohup) stays so.
    Raises RuntimeError outside of the main thread, where no handler can be set.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("in the main thread only: elsewhere a signal would leave behind what was started")
    numbers = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
