"""What the transports of several processes share: deadlines, and exits that no other rank waits for."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from jointspar.comm.failure import abort_on_uncaught
from jointspar.comm.heads import leave
from jointspar.comm.recorder import Recorder
from jointspar.comm.refusals import CheckedTransport
from jointspar.comm.transport import PEER_GRACE_SECONDS, Pending
from jointspar.comm.watchdog import DEADLINE, seconds_from_environment, watched
from jointspar.errors import CollectiveTimeout, DesyncError, JointSparError, RanksLost

_ABORT_SECONDS = 5.0  # for an abort, before the watchdog ends the process without one

_logger = logging.getLogger("jointspar")


class Options(NamedTuple):
    """timeout, warn: seconds of one wait until it ends, and until it is logged. on_failure: see `mpi`."""

    timeout: float
    warn: float
    on_failure: str


class ProcessTransport(CheckedTransport):
    """The part of a `Transport` between processes that does not depend on who carries the messages.

    After a failed operation nothing is known about what is still under way, so all further use is refused and the
    process ends at exit instead of finalising the library, which would wait for ever.
    """

    def __init__(
        self, *, library: str, name: str, rank: int, world_rank: int, world_size: int, options: Options
    ) -> None:
        """world_rank: the launcher's number of this process; rank: that among the ranks of this transport."""
        super().__init__(library=library, name=name, rank=rank, world_size=world_size, timeout=options.timeout)
        self.recorder = Recorder(rank, world_rank)
        self._warn_seconds = options.warn
        atexit.register(self._leave)
        if options.on_failure != "raise" and world_size > 1:
            abort_on_uncaught(self)  # before the first operation that could fail

    def abort(self, message: str) -> None:
        with watched(_ABORT_SECONDS, f"rank {self.rank} leaves by _exit: its abort did not end", grace=0.0):
            try:
                print(f"jointspar: rank {self.rank} ends the job: {message}", file=sys.stderr)
                self.recorder.dump(message)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                self._end_job()

    def _is_shut_down(self) -> bool:
        """Whether somebody ended the library below."""
        raise NotImplementedError

    def _end_job(self) -> None:
        """Leave the process, non-zero, so that the others end too."""
        os._exit(1)

    def _release(self) -> None:
        """Let go of what the library made for this transport, while the interpreter is whole."""

    def _mark_closed(self) -> None:
        super()._mark_closed()
        atexit.unregister(self._leave)

    def _watch(self, what: str) -> AbstractContextManager[None]:
        """Around a wait: where Python itself is stopped, the watchdog ends the process some time past the deadline."""
        return watched(self.timeout, f"rank {self.rank}: {what}: no end, and Python does not run: the process leaves")

    def _check_deadline(self, what: str, began: float, has_warned: bool) -> bool:
        """In a wait that began then (time.monotonic()): whether the user has been warned that it takes long.

        Raises CollectiveTimeout past the deadline, after which the transport refuses all further use.
        """
        waited = time.monotonic() - began
        if waited > self.timeout:
            raise self._timed_out(what, waited)
        if waited > self._warn_seconds and not has_warned:
            _logger.warning("rank %d: %s: still waiting for other ranks after %.0f s", self.rank, what, waited)
            return True
        return has_warned

    def _timed_out(self, what: str, waited: float) -> CollectiveTimeout:
        reason = f"{what}: no answer from the other ranks for {waited:.1f} s"
        self.fail(reason)
        return CollectiveTimeout(f"rank {self.rank}: {reason}")

    def _leave(self) -> None:
        """At exit: meet the other ranks, so that one that leaves early is noticed, then let go of everything."""
        if os.getpid() != self._pid:
            return
        if not self._is_shut_down():
            if self._failure is not None:
                self.abort(f"at exit, after a failure: {self._failure}")
            self._meet_at_exit()
        self._release()

    def _meet_at_exit(self) -> None:
        if self.world_size == 1:
            return
        self.timeout = math.inf  # others may have work left that needs no messages; finalising would wait for them too
        try:
            leave(self)  # type: ignore[arg-type]
        except RanksLost:
            self.leave_alone()
        except JointSparError as error:
            if isinstance(error, DesyncError):
                time.sleep(PEER_GRACE_SECONDS)
            self.abort(f"at exit: {error}")


class ProcessHeaders:
    """Headers under way, and where they arrive, int64 [world_size, num_words]."""

    def __init__(self, pending: Pending, rows: np.ndarray) -> None:
        self._pending = pending
        self._rows = rows

    def wait(self) -> np.ndarray:
        self._pending.wait()
        return self._rows


def checked_options(
    timeout: float | None, warn: float | None, on_failure: str, ways: tuple[str, ...] = ("abort", "raise")
) -> Options:
    """The options of `mpi` and `torch_dist`; None is what the environment says. Raises ValueError."""
    if on_failure not in ways:
        raise ValueError(f"on_failure must be {' or '.join(map(repr, ways))}, not {on_failure!r}")
    given = {"timeout": (timeout, *DEADLINE), "warn": (warn, "JOINTSPAR_WARN", 60.0)}
    seconds = {}
    for name, (value, variable, default) in given.items():
        seconds[name] = seconds_from_environment(variable, default) if value is None else float(value)
        if not seconds[name] > 0:
            raise ValueError(f"{name} must be positive seconds, not {seconds[name]}")
    return Options(**seconds, on_failure=on_failure)
