"""Simulated ranks: threads of one process, one of which runs at a time; what they send passes through memory.

Everything above the transport is what real ranks do. As each runs until it waits for the others, in the order of ranks,
a run depends on no timing, the threads of torch and of the kernels serve one rank at a time, and a wait that nobody can
end is known at once, without a deadline. Each rank has its own state of torch's CPU random numbers, as a process has.

Times say nothing of so many machines, and whatever else a process has of its own (`warnings`, `random`, `np.random`,
environment variables) is shared.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from jointspar.comm.heads import leave
from jointspar.comm.meetings import Mailbox, Meeting, Meetings
from jointspar.comm.refusals import CheckedTransport
from jointspar.comm.transport import check_words, failing
from jointspar.comm.turns import Turns
from jointspar.errors import CollectiveTimeout, JointSparError

_SUMMED = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64))

Result = TypeVar("Result")
_this_thread = threading.local()  # .transport: of the rank that runs on it


class _World:
    """What the ranks share: whose turn it is, what is under way, and how ranks ended that did not come to the end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turns = Turns(size)
        self.headers, self.collectives = Meetings(size), Meetings(size)
        self.mailboxes: defaultdict[tuple[int, int, int], Mailbox] = defaultdict(Mailbox)  # (from, to, tag)
        self.errors: list[tuple[int, BaseException]] = []  # in the order of time
        self.waiting_for: dict[int, str] = {}
        self._why_stuck: str | None = None

    def note(self, rank: int, error: BaseException) -> None:
        """Remember how a rank failed."""
        self.errors.append((rank, error))
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"on simulated rank {rank}")

    def fault(self) -> str:
        """The rank that failed first, in words."""
        rank, error = self.errors[0]
        return f"rank {rank} ended with {type(error).__name__}: {error}"

    def stuck(self, rank: int, what: str) -> JointSparError:
        """The error of a rank whose wait nobody can end; ranks that wait for each other all get the same."""
        if self._why_stuck is None and self.errors:
            return JointSparError(f"rank {rank}: {what}: {self.fault()}")
        if self._why_stuck is None:
            waits = "; ".join(f"rank {other}: {name}" for other, name in sorted(self.waiting_for.items()))
            self._why_stuck = f"the ranks wait for each other for ever ({waits})"
        return CollectiveTimeout(f"rank {rank}: {what}: no answer can come: {self._why_stuck}")


class SimulatedTransport(CheckedTransport):
    """Operations among the simulated ranks of `run_simulated`; see `Transport`. To be used on its rank's thread.

    Bytes are counted as the MPI transport counts them.
    """

    is_simulated = True
    is_thread_safe = False

    def __init__(self, world: _World, rank: int) -> None:
        super().__init__(library="simulation", name="simulated", rank=rank, world_size=world.size, timeout=float("inf"))
        self._world = world
        self.latest_agreement: object = None  # held here, as an exit handler holds that of a real rank

    def start_headers(self, words: np.ndarray, *, what: str) -> _PendingHeaders:
        self._check_usable(what)
        own = check_words(words)
        meeting = self._world.headers.join(self.rank, ("header", own.size), own)
        self.bytes_sent += own.nbytes * (self.world_size - 1)
        return _PendingHeaders(self, meeting, what)

    def allreduce(self, buffer: torch.Tensor, *, what: str) -> None:
        """Sums in the order of ranks, rounding 16-bit types at each addition."""
        if not self.can_allreduce(buffer.dtype):
            raise TypeError(f"{what}: {self.name} cannot sum {buffer.dtype}")
        num_bytes = self._memory(buffer, what).nbytes
        if self.world_size == 1:
            return
        self.bytes_sent += num_bytes
        kind = ("allreduce", buffer.dtype, buffer.numel())
        meeting = self._world.collectives.join(self.rank, kind, buffer.detach())
        self._meet(meeting, what)
        buffer.detach().copy_(meeting.once(lambda: _sum(meeting.by_rank())))

    def can_allreduce(self, dtype: torch.dtype) -> bool:
        return dtype in _SUMMED

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Message:
        memory = self._memory(buffer, what)
        self._check_rank(rank, "rank")
        self._world.mailboxes[self.rank, rank, tag].put(memory.copy())
        self.bytes_sent += memory.nbytes
        return _Message(self, what)

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Message:
        memory = self._memory(buffer, what)
        self._check_rank(rank, "rank")
        mailbox = self._world.mailboxes[rank, self.rank, tag]
        number = mailbox.post()

        def take() -> None:
            message = mailbox.take(number)
            if message.size != memory.size:
                raise self._failed(f"{what}: rank {rank} sent {message.size} bytes, not {memory.size}")
            memory[:] = message

        return _Message(self, what, has_come=lambda: mailbox.holds(number), take=take)

    def broadcast(self, buffer: torch.Tensor, root: int, *, what: str) -> None:
        memory = self._memory(buffer, what)
        self._check_rank(root, "root")
        if self.world_size == 1:
            return
        is_root = self.rank == root
        self.bytes_sent += memory.nbytes if is_root else 0
        kind = ("broadcast", root, memory.nbytes)
        meeting = self._world.collectives.join(self.rank, kind, memory.copy() if is_root else None)
        self._meet(meeting, what)
        if not is_root:
            memory[:] = meeting.by_rank()[root]

    def abort(self, message: str) -> None:
        """Ends the process, with all ranks."""
        print(f"jointspar: rank {self.rank} ends the job: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def close(self) -> None:
        if not self.is_closed:
            self._check_usable("close")
            self._mark_closed()

    def _check_usable(self, what: str) -> None:
        super()._check_usable(what)
        if self._world.errors:  # so that no rank computes on in vain
            raise JointSparError(f"rank {self.rank}: {what}: {self._world.fault()}")

    def _meet(self, meeting: Meeting, what: str) -> None:
        """Wait until all ranks are there for the same."""
        self._wait(meeting.is_whole, what)
        if difference := meeting.difference():
            raise self._failed(f"{what}: {difference}")

    def _wait(self, is_over: Callable[[], bool], what: str) -> None:
        """Let the other ranks run until then. Raises what `_World.stuck` says where that never comes."""
        super()._check_usable(what)
        random_state = torch.get_rng_state()
        self._world.waiting_for[self.rank] = what
        with failing(self, what):
            has_come = self._world.turns.wait_until(self.rank, is_over)
        torch.set_rng_state(random_state)
        if not has_come:
            stuck = self._world.stuck(self.rank, what)
            self.fail(str(stuck))
            raise stuck
        del self._world.waiting_for[self.rank]

    def _failed(self, reason: str) -> JointSparError:
        self.fail(reason)
        return JointSparError(f"rank {self.rank}: {reason}")


class _Message:
    """A started send, which is over at once, or receive."""

    def __init__(
        self,
        transport: SimulatedTransport,
        what: str,
        has_come: Callable[[], bool] = lambda: True,
        take: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport, self._what = transport, what
        self._has_come, self._take = has_come, take
        self._is_done = False

    def done(self) -> bool:
        if not self._is_done:
            if not self._has_come():
                self._transport._wait(lambda: True, self._what)  # a turn for the others
            if self._has_come():
                self.wait()
        return self._is_done

    def wait(self) -> None:
        if self._is_done:
            return
        if not self._has_come():
            self._transport._wait(self._has_come, self._what)
        self._is_done = True
        self._take()


class _PendingHeaders:
    def __init__(self, transport: SimulatedTransport, meeting: Meeting, what: str) -> None:
        self._transport, self._meeting, self._what = transport, meeting, what

    def wait(self) -> np.ndarray:
        self._transport._meet(self._meeting, self._what)
        return np.stack(self._meeting.by_rank())


def run_simulated(world_size: int, function: Callable[[SimulatedTransport], Result]) -> list[Result]:
    """Call `function(transport)` once for each of `world_size` ranks, in this process; returns the results by rank.

    Rank 0 runs on the calling thread, the others on threads of their own, one at a time: each until it waits for the
    others. Inside `function` `js.comm.world()` is the rank's transport, so an optimizer there needs no `comm`. A rank
    that returns meets the others as a process does at its exit. Models and optimizers take their memory once a rank.

    Raises what the first rank raised that failed; the others get a JointSparError at their next operation.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    world = _World(world_size)
    transports = [SimulatedTransport(world, rank) for rank in range(world_size)]
    results: dict[int, Result] = {}
    num_threads, random_state = torch.get_num_threads(), torch.get_rng_state()

    def run_on_thread(transport: SimulatedTransport) -> None:
        world.turns.begin(transport.rank)
        torch.set_num_threads(num_threads)  # OpenMP counts them for each calling thread
        torch.set_rng_state(random_state)
        _run_rank(transport, function, results)

    threads = [threading.Thread(target=run_on_thread, args=(transport,), daemon=True) for transport in transports[1:]]
    for thread in threads:
        thread.start()
    try:
        random_state_after = _run_rank(transports[0], function, results)
        for thread in threads:
            thread.join()
    finally:
        for transport in transports:
            transport._mark_closed()  # nothing of it is waited for at exit
    torch.set_rng_state(random_state_after)
    if world.errors:
        first = world.errors[0][1]
        world.errors.clear()  # whoever keeps the first error, or a transport, keeps no other rank's frames with it
        raise first
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    transport: SimulatedTransport, function: Callable[[SimulatedTransport], Result], results: dict[int, Result]
) -> torch.Tensor:
    """One rank from its first turn to its last; returns its random state then."""
    before, _this_thread.transport = current_rank(), transport
    try:
        results[transport.rank] = function(transport)
        if not transport.is_closed:
            leave(transport)
    except BaseException as error:
        transport._world.note(transport.rank, error)
    _this_thread.transport = before
    random_state = torch.get_rng_state()
    transport._world.turns.end(transport.rank)
    return random_state


def current_rank() -> SimulatedTransport | None:
    """The transport of the simulated rank that runs on this thread; None elsewhere."""
    return getattr(_this_thread, "transport", None)


def _sum(buffers: list[Any]) -> torch.Tensor:
    total = buffers[0].clone()
    for buffer in buffers[1:]:
        total += buffer
    return total
