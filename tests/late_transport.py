"""Ranks as threads, over a transport that takes every liberty that MPI has with the buffers it was given."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DEADLINE = 10


@dataclass
class Message:
    """A send: its buffer may be read at any time until its wait returns."""

    buffer: torch.Tensor
    taken: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        assert self.taken.wait(timeout=DEADLINE), "a send was never received"

    def done(self) -> bool:
        return self.taken.is_set()


@dataclass
class Receive:
    """A receive: its buffer may be written at any time until its wait returns."""

    buffer: torch.Tensor
    is_early: bool
    message: Message | None = None
    matched: threading.Event = field(default_factory=threading.Event)

    def match(self, message: Message) -> None:
        self.message = message
        if self.is_early:
            self._take()
        self.matched.set()

    def wait(self) -> None:
        assert self.matched.wait(timeout=DEADLINE), "nothing came"
        if self.message is not None and not self.message.done():
            self._take()

    def _take(self) -> None:
        assert self.message is not None and self.message.buffer.numel() == self.buffer.numel()
        self.buffer.copy_(self.message.buffer)
        self.message.taken.set()


class Mailbox:
    """Messages of one tag from one rank to one other; the n-th receive gets the n-th message, as MPI matches them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: list[Message] = []
        self._receives: list[Receive] = []

    def put(self, message: Message) -> None:
        with self._lock:
            self._messages.append(message)
            self._match()

    def post(self, receive: Receive) -> None:
        with self._lock:
            self._receives.append(receive)
            self._match()

    def _match(self) -> None:
        if self._messages and self._receives:
            self._receives.pop(0).match(self._messages.pop(0))


class LateTransport:
    """Receives spoil their buffer at once. Late: data is read and written in the receive's wait; else as both meet."""

    def __init__(
        self, rank: int, world_size: int, mailboxes: dict[tuple[int, int, int], Mailbox], is_late: bool
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.bytes_sent = 0
        self._mailboxes, self._is_late = mailboxes, is_late  # by from, to and tag

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Message:
        assert rank != self.rank
        message = Message(buffer)
        self._mailboxes[self.rank, rank, tag].put(message)
        self.bytes_sent += buffer.numel() * buffer.element_size()
        return message

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Receive:
        assert rank != self.rank
        buffer.view(torch.uint8).fill_(255)  # NaN in every float dtype
        receive = Receive(buffer, is_early=not self._is_late)
        self._mailboxes[rank, self.rank, tag].post(receive)
        return receive

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


class _Mailboxes(defaultdict[tuple[int, int, int], Mailbox]):
    """Made at their first use, by whichever thread that is."""

    def __init__(self) -> None:
        super().__init__(Mailbox)
        self._lock = threading.Lock()

    def __missing__(self, key: tuple[int, int, int]) -> Mailbox:
        with self._lock:
            return self.setdefault(key, Mailbox())


def on_threads(world_size: int, run: Callable[[Any], None], *, is_late: bool = True) -> list[LateTransport]:
    """Call `run(transport)` for each rank at once; returns the transports. Raises what a rank raised."""
    mailboxes = _Mailboxes()
    transports = [LateTransport(rank, world_size, mailboxes, is_late) for rank in range(world_size)]
    errors: list[BaseException] = []

    def run_rank(transport: LateTransport) -> None:
        try:
            run(transport)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_rank, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return transports
