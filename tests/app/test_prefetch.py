"""Prefetching changes nothing but the time."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from jointspar.training.data.prefetch import prefetch


class Source:
    """Counts up; remembers what it gave and whether it was closed, and can wait and fail."""

    def __init__(self, stop: int, *, fails: bool = False) -> None:
        self.stop, self.fails = stop, fails
        self.given: list[int] = []
        self.is_closed = False
        self.has_given = threading.Semaphore(0)

    def items(self) -> Generator[int, None, None]:
        try:
            for item in range(self.stop):
                self.given.append(item)
                self.has_given.release()
                yield item
            if self.fails:
                raise KeyError("damaged")
        finally:
            self.is_closed = True


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("stop", [0, 1, 2, 50])
def test_items_come_in_order(stop: int, depth: int) -> None:
    assert list(prefetch(Source(stop).items(), depth)) == list(range(stop))
    assert prefetch_threads() == []


def test_next_item_is_prepared_while_the_caller_has_one() -> None:
    source = Source(50)
    with closing(prefetch(source.items(), depth=2)) as items:
        assert next(items) == 0
        for _ in range(3):  # the one in hand and two ahead
            assert source.has_given.acquire(timeout=20)
        assert not source.has_given.acquire(timeout=0.05)
        assert source.given == [0, 1, 2]


def test_exception_comes_in_its_place() -> None:
    items = prefetch(Source(3, fails=True).items())
    assert [next(items), next(items), next(items)] == [0, 1, 2]
    with pytest.raises(KeyError, match="damaged"):
        next(items)
    assert prefetch_threads() == []


def test_closing_ends_thread_and_source() -> None:
    source = Source(50)
    with closing(prefetch(source.items())) as items:
        next(items)
    assert source.is_closed
    assert len(source.given) <= 4
    assert prefetch_threads() == []


def test_callers_exception_ends_thread_and_source() -> None:
    source = Source(50)
    with pytest.raises(RuntimeError), closing(prefetch(source.items())) as items:  # noqa: PT012
        next(items)
        raise RuntimeError("of the step")
    assert source.is_closed
    assert prefetch_threads() == []
