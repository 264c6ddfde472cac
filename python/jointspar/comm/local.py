"""The transport of a single process: nothing travels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
import torch

from jointspar.comm.transport import Pending, check_buffer, check_words
from jointspar.errors import JointSparError


class LocalTransport:
    """A world of one rank: sums and broadcasts are what the buffer already holds. See `Transport`."""

    def __init__(self) -> None:
        self.name = "local"
        self.rank = 0
        self.world_size = 1
        self.timeout = float("inf")
        self.bytes_sent = 0
        self.is_simulated = False
        self.is_thread_safe = True
        self.is_in_background = False
        self.eager_bytes: int | None = None
        self.is_closed = False
        self._unusable: str | None = None

    def start_headers(self, words: np.ndarray, *, what: str) -> _OwnHeader:
        self._check_usable(what)
        return _OwnHeader(check_words(words)[None])

    def allreduce(self, buffer: torch.Tensor, *, what: str) -> None:
        self._check_usable(what)
        check_buffer(buffer)

    def agree_on_cuda(self) -> bool:
        return True

    def can_allreduce(self, dtype: torch.dtype) -> bool:
        return True

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Pending:
        raise ValueError(f"{what}: a single process has no rank {rank} to send to")

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Pending:
        raise ValueError(f"{what}: a single process has no rank {rank} to receive from")

    def broadcast(self, buffer: torch.Tensor, root: int, *, what: str) -> None:
        self._check_usable(what)
        check_buffer(buffer)
        if root != 0:
            raise ValueError(f"root must be 0 in a world of one rank, not {root}")

    def lend(self, thread: int | None, give_back: Callable[[], None] | None = None) -> None:
        """Changes nothing: a single process exchanges nothing."""

    def take_back(self) -> None:
        """Changes nothing."""

    def fail(self, reason: str) -> None:
        self._unusable = self._unusable or reason

    def leave_alone(self) -> None:
        """Changes nothing: a single process loses no other."""

    def abort(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def close(self) -> None:
        self.is_closed = True
        self.fail("the transport is closed")

    def _check_usable(self, what: str) -> None:
        if self._unusable is not None:
            raise JointSparError(f"{what}: {self._unusable}")


class _OwnHeader:
    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def wait(self) -> np.ndarray:
        return self._rows


def local() -> LocalTransport:
    """A transport for one process, without any message or MPI."""
    return LocalTransport()
