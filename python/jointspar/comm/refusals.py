"""What every transport with several ranks refuses: use after a failure, other memory, ranks that do not exist."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import torch

from jointspar.comm.transport import as_bytes, check_buffer
from jointspar.errors import JointSparError


class CheckedTransport:
    """The part of a `Transport` that moves nothing. library: in errors, "MPI"."""

    is_simulated = False
    is_thread_safe = True
    is_in_background = False
    eager_bytes: int | None = None

    def __init__(self, *, library: str, name: str, rank: int, world_size: int, timeout: float) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self.timeout = timeout
        self.bytes_sent = 0
        self._library = library
        self._is_closed = False
        self._failure: str | None = None
        self._pid = os.getpid()
        self._borrower: int | None = None  # a thread
        self._give_back: Callable[[], None] | None = None

    def agree_on_cuda(self) -> bool:
        return False

    @property
    def is_closed(self) -> bool:
        return self._is_closed or self._is_shut_down()

    @property
    def is_usable(self) -> bool:
        """Whether nothing has failed on it and nobody closed it, as far as this rank knows."""
        return self._failure is None and not self._is_shut_down()

    def lend(self, thread: int | None, give_back: Callable[[], None] | None = None) -> None:
        assert give_back is None or self._give_back is None
        self._borrower, self._give_back = thread, give_back

    def take_back(self) -> None:
        if self._give_back is not None:
            self._give_back()

    def fail(self, reason: str) -> None:
        self._failure = self._failure or reason

    def leave_alone(self) -> None:
        self._mark_closed()

    def abort(self, message: str) -> None:
        raise NotImplementedError

    def _is_shut_down(self) -> bool:
        """Whether somebody ended the library below."""
        return False

    def _mark_closed(self) -> None:
        self._is_closed = True
        self.fail("the transport is closed")

    def _memory(self, buffer: torch.Tensor, what: str) -> np.ndarray:
        """The bytes of host memory that the library may touch."""
        self._check_usable(what)
        check_buffer(buffer)
        if buffer.device.type != "cpu":
            raise TypeError(f"{what}: only CPU tensors go to {self._library}, not one on {buffer.device}")
        return as_bytes(buffer)

    def _check_usable(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise JointSparError(f"{what}: a forked process cannot use its parent's {self._library}")
        if threading.get_ident() != self._borrower:
            self.take_back()  # raises what the borrower met, such as RanksLost
        if self._failure is not None:
            raise JointSparError(f"rank {self.rank}: {what}: the transport cannot be used any more: {self._failure}")
        if self._is_shut_down():
            raise JointSparError(f"{what}: {self._library} was shut down")

    def _check_rank(self, rank: int, argument: str) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{argument} must be in 0 .. {self.world_size - 1}, not {rank}")
