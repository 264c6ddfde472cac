"""Ranks as threads on links that share their rate fairly, in a time of their own: how long an exchange takes, exactly.

Each rank sends and receives one byte in a unit of time, in both directions at once, over one connection to each other
rank. A message travels once it was sent and is expected, one after the other on its connection. The connections of a
moment share the ranks' rates so that none gets more where another one has less of the same (max-min fairness).
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jointspar.comm.turns import Turns

Connection = tuple[int, int]  # from, to


@dataclass
class Message:
    source: torch.Tensor | None = None
    target: torch.Tensor | None = None
    left: float = 0.0  # bytes
    is_done: bool = False


class Links:
    def __init__(self, world_size: int) -> None:
        self.turns = Turns(world_size)
        self.now = 0.0
        self.sent, self.received = Counter[int](), Counter[int]()  # bytes by rank
        self._messages: dict[tuple[int, int, int], list[Message]] = defaultdict(list)  # by from, to and tag
        self._num_started: Counter[tuple[str, int, int, int]] = Counter()
        self._travelling: dict[Connection, deque[Message]] = defaultdict(deque)

    def start(self, side: str, source: int, target: int, tag: int, buffer: torch.Tensor) -> Message:
        """The n-th send of a tag meets the n-th receive. side: which of both, "source" or "target"."""
        messages, number = self._messages[source, target, tag], self._num_started[side, source, target, tag]
        self._num_started[side, source, target, tag] += 1
        if number == len(messages):
            messages.append(Message())
        message = messages[number]
        setattr(message, side, buffer)
        if message.source is not None and message.target is not None:
            assert message.source.numel() == message.target.numel()
            message.left = buffer.numel() * buffer.element_size()
            self.sent[source] += int(message.left)
            self.received[target] += int(message.left)
            self._travelling[source, target].append(message)
        return message

    def wait(self, rank: int, message: Message) -> None:
        while not message.is_done:
            if not self.turns.wait_until(rank, lambda: message.is_done):  # all ranks wait
                self._advance()

    def _advance(self) -> None:
        """To the end of the next message."""
        heads = {connection: messages[0] for connection, messages in self._travelling.items() if messages}
        assert heads, "the ranks wait for each other for ever"
        rates = fair_rates(list(heads))
        seconds = min(message.left / rates[connection] for connection, message in heads.items())
        self.now += seconds
        for connection, message in heads.items():
            message.left -= rates[connection] * seconds
            if message.left < 1e-6:
                self._travelling[connection].popleft()
                assert message.target is not None and message.source is not None
                message.target.copy_(message.source)
                message.is_done = True


def fair_rates(connections: list[Connection]) -> dict[Connection, float]:
    """The most crowded end shares its rate out evenly; then the next one what it has left."""
    free: dict[tuple[int, int], float] = {(side, end[side]): 1.0 for end in connections for side in (0, 1)}
    rates: dict[Connection, float] = {}
    while len(rates) < len(connections):
        rest = [connection for connection in connections if connection not in rates]
        crowd = Counter((side, connection[side]) for connection in rest for side in (0, 1))
        rate, (side, rank) = min((free[end] / number, end) for end, number in crowd.items())
        for connection in rest:
            if connection[side] == rank:
                rates[connection] = rate
                for each in (0, 1):
                    free[each, connection[each]] -= rate
    return rates


class _Pending:
    def __init__(self, links: Links, rank: int, message: Message) -> None:
        self._links, self._rank, self._message = links, rank, message

    def wait(self) -> None:
        self._links.wait(self._rank, self._message)

    def done(self) -> bool:
        return self._message.is_done


class LinkTransport:
    def __init__(self, links: Links, rank: int, world_size: int) -> None:
        self._links, self.rank, self.world_size = links, rank, world_size

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Pending:
        return _Pending(self._links, self.rank, self._links.start("source", self.rank, rank, tag, buffer))

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Pending:
        return _Pending(self._links, self.rank, self._links.start("target", rank, self.rank, tag, buffer))

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


def on_links(world_size: int, run: Callable[[Any], None]) -> Links:
    """Call `run(transport)` for each rank; returns the links as they are at the end. Raises what a rank raised."""
    links, errors = Links(world_size), []

    def run_rank(rank: int) -> None:
        if rank > 0:
            links.turns.begin(rank)
        try:
            run(LinkTransport(links, rank, world_size))
        except BaseException as error:
            errors.append(error)
        links.turns.end(rank)

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return links
