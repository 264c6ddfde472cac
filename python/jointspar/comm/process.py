"""What the transports of several processes share: refusals, deadlines, and no exit that waits for what was left."""

from __future__ import annotations

import atexit
import os
import sys

import numpy as np
import torch

from jointspar.comm.failure import abort_on_uncaught
from jointspar.comm.transport import as_bytes, check_buffer
from jointspar.errors import JointSparError

WARN_SECONDS = 60.0


class ProcessTransport:
    """The part of a `Transport` that does not depend on who carries the messages.

    library: in errors, "MPI". After a failed operation nothing is known about what is still under way, so all further
    use is refused and the process ends at exit instead of finalising the library, which would wait for ever.
    """

    def __init__(self, *, library: str, name: str, rank: int, world_size: int, timeout: float, on_failure: str) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self.timeout = timeout
        self.bytes_sent = 0
        self._library = library
        self._is_closed = False
        self._failure: str | None = None
        self._pid = os.getpid()
        atexit.register(self._abort_if_failed)
        if on_failure == "abort" and world_size > 1:
            abort_on_uncaught(self)  # type: ignore[arg-type]  # before the first operation that could fail

    def agree_on_cuda(self) -> bool:
        return False

    @property
    def is_closed(self) -> bool:
        return self._is_closed or self._is_shut_down()

    def fail(self, reason: str) -> None:
        self._failure = self._failure or reason

    def abort(self, message: str) -> None:
        print(f"jointspar: rank {self.rank} ends the job: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._end_job()

    def _is_shut_down(self) -> bool:
        """Whether somebody ended the library below."""
        raise NotImplementedError

    def _end_job(self) -> None:
        """Leave the process, non-zero, so that the others end too."""
        os._exit(1)

    def _mark_closed(self) -> None:
        self._is_closed = True
        self.fail("the transport is closed")
        atexit.unregister(self._abort_if_failed)

    def _memory(self, buffer: torch.Tensor, what: str) -> np.ndarray:
        """The bytes of host memory that the library may touch."""
        self._check_usable(what)
        check_buffer(buffer)
        if buffer.device.type != "cpu":
            raise TypeError(f"{what}: only CPU tensors go to {self._library}, not one on {buffer.device}")
        return as_bytes(buffer)

    def _check_usable(self, what: str) -> None:
        if self._failure is not None:
            raise JointSparError(f"rank {self.rank}: {what}: the transport cannot be used any more: {self._failure}")
        if self._is_shut_down():
            raise JointSparError(f"{what}: {self._library} was shut down")
        if os.getpid() != self._pid:
            raise JointSparError(f"{what}: a forked process cannot use its parent's {self._library}")

    def _check_rank(self, rank: int, argument: str) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{argument} must be in 0 .. {self.world_size - 1}, not {rank}")

    def _abort_if_failed(self) -> None:
        if self._failure is not None and os.getpid() == self._pid and not self._is_shut_down():
            self.abort(f"at exit, after a failure: {self._failure}")


def checked_timeout(timeout: float | None, on_failure: str) -> float:
    """The options of `mpi` and `torch_dist`: seconds of one wait, JOINTSPAR_TIMEOUT for None. Raises ValueError."""
    if on_failure not in ("abort", "raise"):
        raise ValueError(f"on_failure must be 'abort' or 'raise', not {on_failure!r}")
    text = os.environ.get("JOINTSPAR_TIMEOUT", "300")
    try:
        seconds = float(text) if timeout is None else float(timeout)
    except ValueError:
        raise ValueError(f"JOINTSPAR_TIMEOUT must be a number of seconds, not {text!r}") from None
    if not seconds > 0:
        raise ValueError(f"timeout must be positive seconds, not {seconds}")
    return seconds
