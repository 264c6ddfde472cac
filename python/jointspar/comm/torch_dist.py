"""The torch.distributed transport, over gloo: what torchrun launches, with the promises of the MPI transport.

Gloo moves messages in threads of its own. A started collective can be waited for in slices, so that the deadline, the
warning and an interrupt are ours; a message between two ranks can be waited for once only, with a deadline that breaks
the connection. After either the transport refuses all further use, and the process ends at exit without destroying
its groups, which would wait for what was left. A message longer than its receive ends the receiving process at once,
from gloo's thread.

A group's threads are joined only when nothing refers to the group any more, so groups are dropped at exit, while the
interpreter is whole: ranks have been seen to end in "terminate called without an active exception" when threads were
left to its end, for a reason that could not be reproduced.

Traffic is neither authenticated nor encrypted: use it among machines that trust each other.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import ref

import numpy as np
import torch
import torch.distributed as dist

from jointspar.comm.process import Options, ProcessHeaders, ProcessTransport, checked_options
from jointspar.comm.recorder import Record
from jointspar.comm.transport import check_words, failing
from jointspar.errors import JointSparError

_SLICE_SECONDS = 0.5  # of one uninterruptible wait for a collective
_OWN_DEADLINE = timedelta(days=30)  # gloo counts from the start of a collective, we from the start of the wait for it


def _deadline(seconds: float) -> timedelta:
    """For gloo, which knows no infinite one."""
    return min(timedelta(seconds=min(seconds, 1e9)), _OWN_DEADLINE)


@contextmanager
def _undebugged() -> Iterator[None]:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL has a group wait, at the start of every operation, until all ranks are there."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        yield
    finally:
        dist.set_debug_level(level)


class TorchTransport(ProcessTransport):
    """Operations among the ranks of a torch.distributed group; see `Transport` and `torch_dist`."""

    def __init__(self, group: Any, options: Options) -> None:
        self._world = ref(dist.group.WORLD)  # weak: a group ends its threads when nothing refers to it
        ranks = sorted(dist.get_process_group_ranks(group))  # the order of new groups, whatever the given one has
        super().__init__(
            library="torch.distributed",
            name="torch.distributed: gloo",
            rank=ranks.index(dist.get_rank()),
            world_rank=dist.get_rank(),
            world_size=len(ranks),
            options=options,
        )
        self._headers: Any = None  # until it is made: an exit may come before
        self._payload: Any = None
        with failing(self, "start"):
            self._headers, self._payload = self._private_group(ranks), self._private_group(ranks)
        self._summed = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64))

    def _private_group(self, ranks: list[int]) -> Any:
        """A group of our own. Gloo's deadline ends its construction where a rank stays away, and no later wait."""
        is_part = len(ranks) < dist.get_world_size()
        deadline = _deadline(self.timeout)
        with self._watch("start"), _undebugged():
            group = self._call("start", dist.new_group, ranks, deadline, "gloo", use_local_synchronization=is_part)
        group._get_backend(torch.device("cpu"))._set_default_timeout(_OWN_DEADLINE)
        return group

    def start_headers(self, words: np.ndarray, *, what: str) -> ProcessHeaders:
        self._check_usable(what)
        own = torch.from_numpy(check_words(words))
        rows = torch.empty((self.world_size, own.numel()), dtype=torch.int64, device="cpu")
        record = self.recorder.start(what, "header", words.nbytes)
        work = self._call(what, dist.all_gather, list(rows), own, group=self._headers, async_op=True)
        self.bytes_sent += words.nbytes * (self.world_size - 1)
        return ProcessHeaders(_Collective(self, work, record), rows.numpy())

    def allreduce(self, buffer: torch.Tensor, *, what: str) -> None:
        if not self.can_allreduce(buffer.dtype):
            raise TypeError(f"{what}: {self.name} cannot sum {buffer.dtype}")
        num_bytes = self._memory(buffer, what).nbytes
        if self.world_size == 1 or num_bytes == 0:
            return
        record = self.recorder.start(what, "allreduce", num_bytes)
        work = self._call(what, dist.all_reduce, buffer.detach(), group=self._payload, async_op=True)
        self.bytes_sent += num_bytes
        _Collective(self, work, record).wait()

    def can_allreduce(self, dtype: torch.dtype) -> bool:
        return dtype in self._summed

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Message:
        message = self._start(dist.isend, buffer, rank, what, tag, "group_dst", f"send to rank {rank}")
        self.bytes_sent += buffer.numel() * buffer.element_size()
        return message

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Message:
        return self._start(dist.irecv, buffer, rank, what, tag, "group_src", f"receive from rank {rank}")

    def broadcast(self, buffer: torch.Tensor, root: int, *, what: str) -> None:
        memory = self._memory(buffer, what)
        self._check_rank(root, "root")
        if self.world_size == 1 or memory.nbytes == 0:
            return
        as_tensor = torch.from_numpy(memory)
        record = self.recorder.start(what, f"broadcast from rank {root}", memory.nbytes)
        work = self._call(what, dist.broadcast, as_tensor, group_src=root, group=self._payload, async_op=True)
        if self.rank == root:
            self.bytes_sent += memory.nbytes
        _Collective(self, work, record).wait()

    def close(self) -> None:
        """Destroy the private groups; torch's default group stays."""
        if self.is_closed:
            return
        self._check_usable("close")
        self._mark_closed()
        self._release()

    def _release(self) -> None:
        """Destroy the private groups, and drop them: only then their threads are joined."""
        if not self._is_shut_down():
            dist.destroy_process_group(self._headers)
            dist.destroy_process_group(self._payload)
        del self._headers, self._payload

    def _start(
        self, operation: Callable[..., Any], buffer: torch.Tensor, rank: int, what: str, tag: int, peer: str, op: str
    ) -> _Message:
        memory = torch.from_numpy(self._memory(buffer, what))
        self._check_rank(rank, "rank")
        if rank == self.rank:
            raise ValueError(f"rank must be another rank than this one, {rank}: gloo has no connection to itself")
        record = self.recorder.start(what, op, memory.numel())
        work = self._call(what, operation, memory, group=self._payload, tag=tag, **{peer: rank})
        return _Message(self, work, memory, record)

    def _is_shut_down(self) -> bool:
        """Also where torch.distributed was destroyed and initialised again: our groups went with the first one."""
        return not dist.is_initialized() or dist.group.WORLD is not self._world()

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*arguments, **named)
        except RuntimeError as error:
            raise self._failed(what, error, time.monotonic() - began) from error

    def _failed(self, what: str, error: RuntimeError, waited: float) -> JointSparError:
        """Poison the transport; the error to raise for one of gloo's, which has one type for all of them."""
        if waited >= 0.99 * self.timeout:
            return self._timed_out(what, waited)
        text = str(error).strip().partition("\n")[0]
        self.fail(f"{what} failed with {text}")
        return JointSparError(f"rank {self.rank}: {what}: {text}")


class _Collective:
    """A started collective, which holds its tensors itself."""

    def __init__(self, transport: TorchTransport, work: Any, record: Record) -> None:
        self._transport = transport
        self._work = work
        self._record = record

    def done(self) -> bool:
        if self._work is not None:
            self._transport._check_usable(self._record.what)
            if self._work.is_completed():
                self._transport._call(self._record.what, self._work.wait)  # raises what went wrong
                self._record.finish()
                self._work = None
        return self._work is None

    def wait(self) -> None:
        transport, what = self._transport, self._record.what
        began = time.monotonic()
        has_warned = False
        with failing(transport, what), transport._watch(what):  # an interrupt too leaves the operation half-way
            while not self.done():
                has_warned = transport._check_deadline(what, began, has_warned)
                self._wait_a_slice(transport.timeout - (time.monotonic() - began))

    def _wait_a_slice(self, remaining: float) -> None:
        with suppress(RuntimeError):  # not in time; or it failed, which done() reports
            self._work.wait(timedelta(seconds=max(0.001, min(_SLICE_SECONDS, remaining + 0.001))))


class _Message:
    """A started send or receive with its memory."""

    def __init__(self, transport: TorchTransport, work: Any, memory: torch.Tensor, record: Record) -> None:
        self._transport = transport
        self._work = work
        self._memory = memory
        self._record = record

    def done(self) -> bool:
        """Whether it was waited for: gloo tells no sooner."""
        return self._work is None

    def wait(self) -> None:
        if self._work is None:
            return
        transport, what = self._transport, self._record.what
        transport._check_usable(what)
        with failing(transport, what), transport._watch(what):
            transport._call(what, self._work.wait, _deadline(transport.timeout))
        self._record.finish()
        self._work = None


def torch_dist(
    group: Any = None, *, timeout: float | None = None, warn: float | None = None, on_failure: str = "abort"
) -> TorchTransport:
    """The ranks of a torch.distributed group, by default of all processes that torchrun started; collective.

    Makes two gloo groups of its own, whatever backend `group` has. Where torch.distributed is not initialised, it is,
    with gloo and the launcher's variables, and shut down at exit. For a group of some of the processes, all of these
    have to be in equally many groups at that moment, since torch names new ones by that.

    timeout: seconds that one wait may last, but for that at exit for ranks that still work alone; None is
        JOINTSPAR_TIMEOUT from the environment, else 300.
    warn: seconds after which a wait for a header or collective is logged; None is JOINTSPAR_WARN, else 60.
    on_failure: "abort" ends this process, non-zero, when an uncaught exception leaves it or a JointSparError one of its
    threads: torchrun then ends the other ranks, and without it they see the connection closed. "raise" leaves
    exceptions to the program. Either way an exit after a failed operation is at once and non-zero.
    Raises JointSparError where torch.distributed cannot start or this rank is not in `group`, ValueError for a bad
    argument.
    """
    options = checked_options(timeout, warn, on_failure)
    if not (dist.is_available() and dist.is_gloo_available()):
        raise JointSparError("this torch was built without torch.distributed or without gloo")
    if not dist.is_initialized():
        _initialise(options.timeout)
    if dist.get_rank(group) < 0:
        raise JointSparError("this process is not in the given group")
    return TorchTransport(group, options)


def is_running() -> bool:
    """Whether torch.distributed was initialised with several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _initialise(seconds: float) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise JointSparError(
            f"torch.distributed cannot start: {', '.join(missing)} not set: launch with `torchrun --nproc-per-node N`"
        )
    try:
        dist.init_process_group("gloo", timeout=_deadline(seconds))
    except (RuntimeError, ValueError) as error:
        raise JointSparError(f"torch.distributed cannot start: {error}") from error
    atexit.register(_shut_down, os.getpid())


def _shut_down(pid: int) -> None:
    if os.getpid() == pid and dist.is_initialized():
        dist.destroy_process_group()
