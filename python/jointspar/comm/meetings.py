"""What simulated ranks hand each other: collectives, where all ranks meet, and messages from one to one other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Meeting:
    """One collective. `kind` is what all ranks must agree on."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._kinds: dict[int, object] = {}
        self._items: dict[int, Any] = {}
        self._shared: Any = None

    def join(self, rank: int, kind: object, item: Any) -> None:
        self._kinds[rank], self._items[rank] = kind, item

    def is_whole(self) -> bool:
        """Whether every rank is there."""
        return len(self._items) == self._num_ranks

    def difference(self) -> str:
        """How the ranks differ in what they came for; empty when they agree."""
        ranks = [rank for rank in range(self._num_ranks) if self._kinds[rank] != self._kinds[0]]
        return f"rank {ranks[0]} came with {self._kinds[ranks[0]]}, rank 0 with {self._kinds[0]}" if ranks else ""

    def by_rank(self) -> list[Any]:
        return [self._items[rank] for rank in range(self._num_ranks)]

    def once(self, make: Callable[[], Any]) -> Any:
        """What the first rank that asks makes, for all of them."""
        if self._shared is None:
            self._shared = make()
        return self._shared


class Meetings:
    """The n-th collective of each rank meets the n-th of every other."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._num_joined = [0] * num_ranks
        self._open: dict[int, Meeting] = {}

    def join(self, rank: int, kind: object, item: Any) -> Meeting:
        number = self._num_joined[rank]
        self._num_joined[rank] += 1
        meeting = self._open.setdefault(number, Meeting(self._num_ranks))
        meeting.join(rank, kind, item)
        if meeting.is_whole():
            del self._open[number]  # who has not left yet holds it
        return meeting


class Mailbox:
    """Messages from one rank to one other; the n-th receive gets the n-th message."""

    def __init__(self) -> None:
        self._num_put = self._num_posted = 0
        self._messages: dict[int, np.ndarray] = {}

    def put(self, message: np.ndarray) -> None:
        self._messages[self._num_put] = message
        self._num_put += 1

    def post(self) -> int:
        """The number of a receive."""
        self._num_posted += 1
        return self._num_posted - 1

    def holds(self, number: int) -> bool:
        return number in self._messages

    def take(self, number: int) -> np.ndarray:
        return self._messages.pop(number)
