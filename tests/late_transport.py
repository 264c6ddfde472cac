"""Ranks as threads, over a transport that uses every liberty that MPI has with the buffers it was given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEADLINE = 10


@dataclass
class Message:
    """Read from the sender's memory as late as possible: when the receiver waits for it."""

    buffer: torch.Tensor
    taken: threading.Event

    def wait(self) -> None:
        assert self.taken.wait(timeout=DEADLINE), "a send was never received"

    def done(self) -> bool:
        return self.taken.is_set()


@dataclass
class Receive:
    """Takes the message that is next in line when the receive is posted, as MPI matches them."""

    buffer: torch.Tensor
    turn: int
    mailbox: Mailbox
    is_done: bool = False

    def wait(self) -> None:
        if self.is_done:
            return
        message = self.mailbox.message(self.turn)
        assert message.buffer.numel() == self.buffer.numel()
        self.buffer.copy_(message.buffer)
        message.taken.set()
        self.is_done = True


class Mailbox:
    """Messages of one tag from one rank to one other; the n-th receive gets the n-th message."""

    def __init__(self) -> None:
        self._arriving: queue.Queue[Message] = queue.Queue()
        self._messages: list[Message] = []
        self._num_posted = 0

    def put(self, message: Message) -> None:
        self._arriving.put(message)

    def post(self, buffer: torch.Tensor) -> Receive:
        self._num_posted += 1
        return Receive(buffer, self._num_posted - 1, self)

    def message(self, turn: int) -> Message:
        while len(self._messages) <= turn:
            self._messages.append(self._arriving.get(timeout=DEADLINE))
        return self._messages[turn]


class LateTransport:
    """Receives spoil their buffer at once, sends are read late: either is allowed until its wait returns."""

    def __init__(self, rank: int, mailboxes: list[list[dict[int, Mailbox]]]) -> None:
        self.rank, self.world_size = rank, len(mailboxes)
        self.bytes_sent = 0
        self._mailboxes = mailboxes  # [from][to][tag]

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Message:
        assert rank != self.rank
        message = Message(buffer, threading.Event())
        self._mailboxes[self.rank][rank].setdefault(tag, Mailbox()).put(message)
        self.bytes_sent += buffer.numel() * buffer.element_size()
        return message

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Receive:
        assert rank != self.rank
        buffer.view(torch.uint8).fill_(255)  # NaN in every float dtype
        return self._mailboxes[rank][self.rank].setdefault(tag, Mailbox()).post(buffer)

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


def on_threads(world_size: int, run: Callable[[Any], None]) -> list[LateTransport]:
    """Call `run(transport)` for each rank at once; returns the transports."""
    mailboxes: list[list[dict[int, Mailbox]]] = [[{} for _ in range(world_size)] for _ in range(world_size)]
    transports = [LateTransport(rank, mailboxes) for rank in range(world_size)]
    threads = [threading.Thread(target=run, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return transports
