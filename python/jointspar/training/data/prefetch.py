"""Prepares the next items on another thread while the caller works on one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _Failure(NamedTuple):
    error: BaseException


_END = object()


def prefetch(items: Generator[T, None, None], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them prepared ahead on a thread.

    An exception of `items` is raised here in its place. Closing this generator (leave it through contextlib.closing)
    waits for the item in preparation, then ends thread and `items`.
    """
    ready: SimpleQueue[object] = SimpleQueue()
    free = threading.Semaphore(depth)
    is_closed = threading.Event()

    def prepare() -> None:
        try:
            while free.acquire() and not is_closed.is_set():
                item = next(items, _END)
                ready.put(item)
                if item is _END:
                    return
        except BaseException as error:  # the caller's to handle
            ready.put(_Failure(error))
        finally:
            items.close()

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            free.release()
            yield item  # type: ignore[misc]
    finally:
        is_closed.set()
        free.release()
        thread.join()
