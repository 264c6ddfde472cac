"""Threads of which one runs at a time, each until it waits for something that another one does."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turns:
    """Who runs, among numbered threads. Number 0 has the first turn; the others start with `begin`.

    The turn goes round in the order of numbers, to the next thread whose wait is over, so what happens depends on what
    the threads do and never on how fast they are. Where no wait can end any more, because every thread waits or has
    ended, the waiting ones get the turn all the same, the lowest number first, and are told so.
    """

    def __init__(self, num_threads: int) -> None:
        self._wake_ups = [threading.Semaphore(0) for _ in range(num_threads)]
        self._waiting: dict[int, Callable[[], bool]] = dict.fromkeys(range(1, num_threads), _at_once)
        self._holder = 0
        self._lock = threading.Lock()  # an interrupt lets a thread run that does not hold the turn

    def begin(self, number: int) -> None:
        """Wait for the first turn of a thread other than 0."""
        self._wake_ups[number].acquire()
        with self._lock:
            del self._waiting[number]

    def wait_until(self, number: int, is_over: Callable[[], bool]) -> bool:
        """Let the others run, and come back when `is_over()`; False: it never can be, whatever the others do.

        An interrupt (KeyboardInterrupt in the main thread) comes back without the turn: call nothing but `end` then.
        """
        with self._lock:
            self._waiting[number] = is_over
        try:
            self._hand_on(number)
            self._wake_ups[number].acquire()
        finally:
            with self._lock:
                del self._waiting[number]
        return is_over()

    def end(self, number: int) -> None:
        """Give the turn away for good."""
        self._hand_on(number)

    def _hand_on(self, number: int) -> None:
        with self._lock:
            if self._holder != number:
                return
            count = len(self._wake_ups)
            order = [(number + step) % count for step in range(1, count + 1)]
            waiting = [other for other in order if other in self._waiting]
            if waiting:
                is_over = (other for other in waiting if self._waiting[other]())
                self._holder = next(is_over, min(waiting))
                self._wake_ups[self._holder].release()


def _at_once() -> bool:
    return True
