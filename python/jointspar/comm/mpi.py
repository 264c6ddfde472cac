"""The MPI transport, over mpi4py: private communicators, deadlines, and an end of the job when one rank fails.

Every operation is started non-blocking and polled against a deadline, because a blocking MPI call cannot be left when
a peer has gone. After a timeout, an MPI error or an interrupt in mid-operation nothing is known about what is still
under way, so the transport refuses all further use and the process must not finalise MPI: at exit it aborts the job.

MPI traffic is neither authenticated nor encrypted: use it among machines that trust each other.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch

from jointspar.comm import cuda_mpi
from jointspar.comm.device import call_with_deadline, wait_for_stream
from jointspar.comm.mpi_library import (
    check_running,
    eager_bytes,
    library_version,
    load_mpi,
    lost_classes,
    outlives_ranks,
    size_of_world,
)
from jointspar.comm.process import Options, ProcessHeaders, ProcessTransport, checked_options
from jointspar.comm.recorder import Record
from jointspar.comm.transport import check_buffer, check_words, failing
from jointspar.comm.watchdog import end_within
from jointspar.errors import JointSparError, RanksLost

_MAX_CHUNK = 2**30  # elements or bytes of one MPI call: counts are C ints
_SPIN_SECONDS = 0.002  # polling without sleep: covers a message on its way, not a peer that still computes
_LONGEST_SLEEP = 2e-4  # between polls later on: MPI makes progress only inside them
_BACKGROUND_SLEEP = 2e-3  # between polls while this process computes: each takes some of its time
_FINALIZE_SECONDS = 20.0
_NO_END = "rank {}: all is done, but MPI does not end"
_DROP_SECONDS = 1.0  # for what other ranks' revoking ends, too

_in_flight: set[_Pending] = set()  # MPI writes into their buffers, so they outlive whoever started them


class MpiTransport(ProcessTransport):
    """Operations among the ranks of an MPI communicator; see `Transport` and `mpi`."""

    def __init__(self, mpi_module: ModuleType, communicator: Any, options: Options) -> None:
        self._mpi = mpi_module
        self._parent, self._options = communicator, options
        self.successor: MpiTransport | None = None  # of the ranks that were left
        super().__init__(
            library="MPI",
            name=f"mpi: {library_version(mpi_module)}",
            rank=communicator.Get_rank(),
            world_rank=mpi_module.COMM_WORLD.Get_rank(),
            world_size=communicator.Get_size(),
            options=options,
        )
        self.is_thread_safe = mpi_module.Query_thread() >= mpi_module.THREAD_MULTIPLE
        self._datatypes = {
            torch.float32: mpi_module.FLOAT,
            torch.float64: mpi_module.DOUBLE,
            torch.int64: mpi_module.INT64_T,
        }
        self.eager_bytes = eager_bytes(mpi_module)
        try:
            with failing(self, "start"):
                self._headers, self._payload = self._duplicate(communicator), self._duplicate(communicator)
        except RanksLost:
            self._mark_closed()
            raise
        self._takes_cuda: bool | None = None  # not asked yet

    def _duplicate(self, communicator: Any) -> Any:
        """A communicator of our own; unlike Dup, with a deadline."""
        private, request = self._call("start", communicator.Idup)
        self._wait([request], "start")
        private.Set_errhandler(self._mpi.ERRORS_RETURN)
        return private

    def start_headers(self, words: np.ndarray, *, what: str) -> ProcessHeaders:
        self._check_usable(what)
        own = check_words(words)
        rows = np.empty((self.world_size, own.size), dtype=np.int64)
        int64 = self._mpi.INT64_T
        pending = _Pending(self, (own, rows), self.recorder.start(what, "header", own.nbytes))
        pending.start(self._headers.Iallgather, [own, own.size, int64], [rows, own.size, int64])
        self.bytes_sent += own.nbytes * (self.world_size - 1)
        return ProcessHeaders(pending, rows)

    def allreduce(self, buffer: torch.Tensor, *, what: str) -> None:
        if not self.can_allreduce(buffer.dtype):
            raise TypeError(f"{what}: {self.name} cannot sum {buffer.dtype}")
        if buffer.device.type == "cuda":
            self._allreduce_on_device(buffer, what)
            return
        datatype = self._datatypes[buffer.dtype]
        memory = self._memory(buffer, what).view(buffer.detach().numpy().dtype)
        if self.world_size == 1:
            return
        pending = _Pending(self, buffer, self.recorder.start(what, "allreduce", memory.nbytes))
        for chunk in _chunks(memory):
            pending.start(self._payload.Iallreduce, self._mpi.IN_PLACE, [chunk, chunk.size, datatype], self._mpi.SUM)
        self.bytes_sent += memory.nbytes
        pending.wait()

    def _allreduce_on_device(self, buffer: torch.Tensor, what: str) -> None:
        """By a blocking call: Open MPI crashes where a non-blocking one gets CUDA memory."""
        self._check_usable(what)
        check_buffer(buffer)
        if not self.agree_on_cuda():
            raise TypeError(f"{what}: {self.name} does not take CUDA memory ({cuda_mpi.ENVIRONMENT_VARIABLE})")
        if self.world_size == 1 or buffer.numel() == 0:
            return
        datatype = self._datatypes[buffer.dtype]
        chunks = [[chunk, chunk.numel(), datatype] for chunk in buffer.detach().split(_MAX_CHUNK)]

        def sum_chunks() -> None:
            torch.cuda.set_device(buffer.device)
            for chunk in chunks:
                self._call(what, self._payload.Allreduce, self._mpi.IN_PLACE, chunk, self._mpi.SUM)

        wait_for_stream(self, buffer.device, what=what)
        record = self.recorder.start(what, "allreduce on the device", buffer.numel() * buffer.element_size())
        with self._watch(what):
            call_with_deadline(self, sum_chunks, what=what)
        record.finish()
        self.bytes_sent += record.num_bytes

    def agree_on_cuda(self) -> bool:
        if self._takes_cuda is None:
            verdict = cuda_mpi.decide()
            is_threaded = self._mpi.Query_thread() >= self._mpi.THREAD_SERIALIZED  # the call runs on a helper thread
            own = np.array([verdict.is_usable and is_threaded], dtype=np.int64)
            rows = self.start_headers(own, what="agreement on CUDA memory").wait()
            self._takes_cuda = bool(rows.all())
        return self._takes_cuda

    def can_allreduce(self, dtype: torch.dtype) -> bool:
        return dtype in self._datatypes

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Pending:
        pending = self._start(self._payload.Isend, buffer, rank, what, tag, f"send to rank {rank}")
        self.bytes_sent += buffer.numel() * buffer.element_size()
        return pending

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> _Pending:
        return self._start(self._payload.Irecv, buffer, rank, what, tag, f"receive from rank {rank}")

    def broadcast(self, buffer: torch.Tensor, root: int, *, what: str) -> None:
        memory = self._memory(buffer, what)
        self._check_rank(root, "root")
        byte = self._mpi.BYTE
        pending = _Pending(self, buffer, self.recorder.start(what, f"broadcast from rank {root}", memory.nbytes))
        for chunk in _chunks(memory):
            pending.start(self._payload.Ibcast, [chunk, chunk.size, byte], root)
        if self.rank == root and self.world_size > 1:
            self.bytes_sent += memory.nbytes
        pending.wait()

    def close(self) -> None:
        """Free the communicators, together with all other ranks."""
        if self.is_closed:
            return
        self._check_usable("close")
        for pending in self._unfinished():  # a plan that no step asked for: every rank has posted it
            pending.wait()
        self._mark_closed()
        self._headers.Free()
        self._payload.Free()

    def shrink(self) -> MpiTransport:
        """The transport of the ranks that are left; this one is closed then. Collective among them.

        From its exit handler on the process has 20 s to end: handlers that the program registered before take part.
        Can be called again where it raised RanksLost, since more were lost meanwhile.
        Raises JointSparError where on_failure is not "shrink".
        """
        if self._options.on_failure != "shrink":
            raise JointSparError("only a transport made with on_failure='shrink' goes on without the ranks that died")
        self._revoke()  # whoever waits for this rank learns of it
        with suppress(JointSparError):  # an exchange during backward ends with it
            self.take_back()
        self._drop_requests()
        survivors: list[Any] = []
        with self._watch("shrink"):  # blocking: Open MPI's Ishrink fails where a rank has died
            call_with_deadline(self, lambda: survivors.append(self._parent.Shrink()), what="shrink")
        survivors[0].Set_errhandler(self._mpi.ERRORS_RETURN)
        # After the successor has met the others. Open MPI's finalising hangs in one of twenty jobs that lost a rank.
        atexit.register(end_within, _FINALIZE_SECONDS, _NO_END.format(self.rank))
        successor = MpiTransport(self._mpi, survivors[0], self._options)
        successor.bytes_sent = self.bytes_sent
        self.successor = successor
        self._mark_closed()
        return successor

    def leave_alone(self) -> None:
        """See `Transport`. A rank that works on alone for longer than 20 s from here is ended too: by mpirun, since the
        ranks that wait for it in MPI's end have left by then.
        """
        self._drop_requests()
        super().leave_alone()
        end_within(_FINALIZE_SECONDS, _NO_END.format(self.rank))

    def _drop_requests(self) -> None:
        """What is under way on revoked communicators ends with errors, once it is looked at; MPI would wait at exit."""
        until = time.monotonic() + _DROP_SECONDS
        for pending in self._unfinished():
            have_ended = [self._has_ended(request, until) for request in pending._requests]
            if all(have_ended):
                _in_flight.discard(pending)

    def _unfinished(self) -> list[_Pending]:
        return [pending for pending in list(_in_flight) if pending._transport is self]  # others change it

    def _has_ended(self, request: Any, until: float) -> bool:
        """Whether MPI certainly touches the request's memory no more; waits for that for a while."""
        try:
            while not request.Test():
                if time.monotonic() > until:
                    return False
                time.sleep(_LONGEST_SLEEP)
        except self._mpi.Exception:  # parts of a collective may still be under way
            return False
        return True

    def _revoke(self) -> None:
        for communicator in (getattr(self, "_headers", None), getattr(self, "_payload", None)):
            if communicator is not None and not communicator.Is_revoked():
                communicator.Revoke()

    def _start(
        self, operation: Callable[..., Any], buffer: torch.Tensor, rank: int, what: str, tag: int, op: str
    ) -> _Pending:
        memory = self._memory(buffer, what)
        self._check_rank(rank, "rank")
        byte = self._mpi.BYTE
        pending = _Pending(self, buffer, self.recorder.start(what, op, memory.nbytes))
        for chunk in _chunks(memory):
            pending.start(operation, [chunk, chunk.size, byte], rank, tag)
        return pending

    def _is_shut_down(self) -> bool:
        return bool(self._mpi.Is_finalized())

    def _end_job(self) -> None:
        if not self._mpi.Is_finalized():
            self._mpi.COMM_WORLD.Abort(1)
        super()._end_job()

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._mpi.Exception as error:
            if self._options.on_failure == "shrink" and error.Get_error_class() in lost_classes(self._mpi):
                self._revoke()
                self.fail(f"{what}: other ranks have died")
                raise RanksLost(f"rank {self.rank}: {what}: other ranks have died") from error
            self.fail(f"{what} failed with {error.Get_error_string()}")
            raise JointSparError(f"rank {self.rank}: {what}: {error.Get_error_string()}") from error

    def _wait(self, requests: list[Any], what: str) -> None:
        began = time.monotonic()
        has_warned = False
        with self._watch(what):
            while not self._call(what, _all_done, requests):
                has_warned = self._check_deadline(what, began, has_warned)
                waited = time.monotonic() - began
                if self.is_in_background:
                    time.sleep(_BACKGROUND_SLEEP)
                elif waited < _SPIN_SECONDS:
                    os.sched_yield()
                else:
                    time.sleep(min(_LONGEST_SLEEP, waited / 50))


class _Pending:
    """Requests and the memory that they read or write, kept together until all are done.

    It is kept from before the first request, so that no interrupt leaves MPI with memory that nobody holds.
    """

    def __init__(self, transport: MpiTransport, buffers: object, record: Record) -> None:
        self._transport = transport
        self._requests: list[Any] = []
        self._buffers = buffers
        self._record = record
        _in_flight.add(self)

    def start(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Hand MPI one more operation, on memory of these buffers."""
        with failing(self._transport, self._record.what):
            self._requests.append(self._transport._call(self._record.what, operation, *arguments))

    def done(self) -> bool:
        if self in _in_flight:
            self._transport._check_usable(self._record.what)
            if self._transport._call(self._record.what, _all_done, self._requests):
                self._finish()
        return self not in _in_flight

    def wait(self) -> None:
        if self.done():
            return
        with failing(self._transport, self._record.what):  # an interrupt too leaves the operation half-way
            self._transport._wait(self._requests, self._record.what)
        self._finish()

    def _finish(self) -> None:
        self._record.finish()
        _in_flight.discard(self)


def mpi(
    communicator: Any = None, *, timeout: float | None = None, warn: float | None = None, on_failure: str = "abort"
) -> MpiTransport:
    """The ranks of an mpi4py communicator, COMM_WORLD by default; collective.

    timeout: seconds that one wait may last, but for that at exit for ranks that still work alone; None is
        JOINTSPAR_TIMEOUT from the environment, else 300. Seconds in which the job is suspended count.
    warn: seconds after which a wait is logged, except for sums of CUDA memory; None is JOINTSPAR_WARN, else 60.
    on_failure: "abort" ends the job, non-zero, when an uncaught exception leaves this process or a JointSparError one
    of its threads; "raise" leaves exceptions to the program, which must then end the other ranks too. Either way an
    exit after a failed operation aborts, since MPI_Finalize would hang. "shrink" is "abort", but where other ranks
    have died RanksLost is raised, after which `optimizer.shrink()` goes on with those that are left: for Open MPI 5
    under `mpirun --with-ft ulfm`.
    With an MPI that was started below MPI_THREAD_SERIALIZED, call from the main thread only.
    Raises JointSparError where mpi4py is missing or MPI is not running, or is another than the launcher's, so that each
    rank would be alone, or cannot go on without a rank though it should, or this process is not in the communicator;
    ValueError for a bad argument.
    """
    options = checked_options(timeout, warn, on_failure, ("abort", "raise", "shrink"))
    mpi_module = load_mpi()
    if on_failure == "shrink" and not outlives_ranks(mpi_module):
        raise JointSparError("on_failure='shrink' needs Open MPI 5 or later, started as `mpirun --with-ft ulfm -n N`")
    check_running(mpi_module)
    if on_failure == "shrink" and mpi_module.Query_thread() < mpi_module.THREAD_SERIALIZED:
        raise JointSparError("on_failure='shrink' needs an MPI that was started with MPI_THREAD_SERIALIZED or more")
    is_alone = communicator is None and mpi_module.COMM_WORLD.Get_size() == 1
    if is_alone:  # else a launcher around this one may say more
        size_of_world(mpi_module)
    world = mpi_module.COMM_WORLD if communicator is None else communicator
    if world == mpi_module.COMM_NULL:  # what Split and Create give to ranks outside
        raise JointSparError("this process is not in the given communicator")
    return MpiTransport(mpi_module, world, options)


def _all_done(requests: list[Any]) -> bool:
    """One by one, because Testall only says that some request failed, not how."""
    return all(request.Test() for request in requests)


def _chunks(memory: np.ndarray) -> Iterator[np.ndarray]:
    """At least one, so that an empty message is sent as one too."""
    for start in range(0, max(memory.size, 1), _MAX_CHUNK):
        yield memory[start : start + _MAX_CHUNK]
