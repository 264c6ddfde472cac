"""Buckets of gradients are packed and exchanged while backward computes the next ones."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from functools import partial

import torch

from jointspar.comm.transport import Transport, failing
from jointspar.errors import JointSparError
from jointspar.gradient_sum import GradientSum

_latest: weakref.WeakKeyDictionary[Transport, weakref.ref[EarlyExchange]] = weakref.WeakKeyDictionary()
Job = Callable[[], None]
_CHANGED = "gradients were changed after backward; clip by step(max_norm=...)"


class _Phase(Enum):
    ARMED = auto()  # the step's first gradient begins it
    UNDER_WAY = auto()
    OVER = auto()  # until the next step


class EarlyExchange:
    """Takes note of each gradient as it comes, and hands full buckets to a thread that exchanges them in their order.

    It is a bet that one backward makes the step's gradients. Where it is lost (a second backward, a gradient that was
    changed, another use of the transport between backward and step) what was sent is void, `why_void` says why, and
    the step exchanges anew. The ranks agree on a step's buckets before the first of them, and each sends all of them,
    whatever happens to it in between; so the transport is lent to the thread, and whoever else uses it first has the
    exchange end. Of several on one transport only the one that was made last sends early: the same on all ranks. Where
    nothing travels, among simulated ranks or with one, no thread is needed and `finish` exchanges.

    begin: makes the step's sum, from the plan of all ranks. agree: meets all ranks, before its first bucket.
    Raises JointSparError where the transport cannot be used from a thread beside others.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Sequence[torch.Tensor],
        begin: Callable[[], GradientSum],
        agree: Callable[[GradientSum], None],
    ) -> None:
        self._transport, self._parameters = transport, parameters
        self._begin, self._agree = weakref.WeakMethod(begin), weakref.WeakMethod(agree)  # of who holds this object
        self._thread: _Thread | None = None
        if transport.world_size > 1 and not transport.is_simulated:
            if not transport.is_thread_safe:
                raise JointSparError("overlap=True needs an MPI that was started with MPI_THREAD_MULTIPLE")
            self._thread = _Thread()
        _latest[transport] = weakref.ref(self)
        self._is_paused = False
        self.arm()

    def arm(self) -> None:
        """A new step."""
        self._phase = _Phase.ARMED
        self.why_void: str | None = None
        self._is_left = False  # by an exception: what is packed and sent may not fit together
        self._sum: GradientSum | None = None
        self._jobs: list[Job] = []  # the agreement, then a bucket each
        self._num_started = 0
        self._bucket_of: dict[int, int] = {}  # by position of a parameter whose gradient is still to come
        self._num_missing: list[int] = []  # of those, by bucket
        self._noted: set[int] = set()
        self._packed: list[tuple[int, torch.Tensor | None, int]] = []  # position, gradient, its version
        self._work = _Work()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backward passes inside are not taken note of."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def note(self, position: int) -> None:
        """Backward has accumulated a parameter's gradient. At the first one it waits for the plans of all ranks."""
        if self._is_paused or self._phase == _Phase.OVER or _latest[self._transport]() is not self:
            return
        if self._is_left:
            return
        try:
            self._note(position)
        except BaseException:
            self._is_left = True
            raise

    def _note(self, position: int) -> None:
        is_first = self._phase == _Phase.ARMED
        if is_first:
            with torch.no_grad():
                self._open()
        if position in self._noted:
            self.why_void = "a second backward before step(); accumulate inside `with optimizer.no_sync():`"
        self._noted.add(position)
        bucket = self._bucket_of.pop(position, None)
        if bucket is not None:
            self._num_missing[bucket] -= 1
        if is_first or (bucket is not None and self._num_missing[bucket] == 0):
            with torch.no_grad():
                self._pack_while_full()

    def finish(self) -> GradientSum | None:
        """Pack and send what is left, zeros where no gradient came. Returns the sum, or None where it is void.

        A change of a gradient is seen by autograd's version counter, or, where that does not count it (GradScaler's
        `unscale_`, writes through `.data`), by another norm.
        Raises what the exchange raised.
        """
        if self._is_left:
            self.why_void = "backward or step() was left by an exception"
            if self._phase == _Phase.UNDER_WAY:
                self._give_back(self.why_void)
            return None
        try:
            return self._finish()
        except BaseException:
            self._is_left = True
            raise

    def _finish(self) -> GradientSum | None:
        if self._phase == _Phase.ARMED:
            self._open()
        total = self._sum
        if self._phase == _Phase.UNDER_WAY:
            self._transport.is_in_background = False
            self._num_missing = [0] * len(self._num_missing)
            self._pack_while_full()
            if total is not None and not self._is_known_void() and total.has_other_norms():  # while buckets travel
                self.why_void = _CHANGED
            self._end()
        if self._is_known_void():
            self.why_void = self.why_void or _CHANGED
        return None if self.why_void else total

    def _open(self) -> None:
        self._transport.take_back()  # from another optimizer's exchange
        begin, agree = self._begin(), self._agree()
        assert begin is not None and agree is not None
        self._sum = total = begin()
        num_threads = torch.get_num_threads()

        def meet() -> None:
            torch.set_num_threads(num_threads)  # of this thread, for sums
            agree(total)

        buckets = range(len(total.layout.buckets))
        self._jobs = [meet, *(partial(total.exchange, bucket) for bucket in buckets)]
        to_compute = [total.positions_to_compute(bucket) for bucket in buckets]
        self._bucket_of = {position: bucket for bucket, found in enumerate(to_compute) for position in found}
        self._num_missing = [len(found) for found in to_compute]
        self._phase = _Phase.UNDER_WAY
        if self._thread is not None:
            self._transport.is_in_background = True
            self._transport.lend(self._thread.ident, self._give_back)
        self._start_next()

    def _pack_while_full(self) -> None:
        total = self._sum
        assert total is not None
        while self._num_started < len(self._jobs) and self._num_missing[self._num_started - 1] == 0:
            bucket = total.pack_next()
            for position in total.positions_to_compute(bucket):
                grad = self._parameters[position].grad
                self._packed.append((position, grad, 0 if grad is None else grad._version))
            self._start_next()

    def _give_back(self, why: str = "ranks met for something else between backward and step()") -> None:
        """Somebody else needs the transport: the other ranks get what they wait for, though it is worth nothing."""
        self.why_void = why
        self._transport.is_in_background = False
        while self._num_started < len(self._jobs):
            self._start_next()
        self._end()

    def _start_next(self) -> None:
        job = self._jobs[self._num_started]
        self._num_started += 1
        self._work.jobs.append(job)
        if self._thread is not None:
            self._thread.run(self._work.run_next)

    def _end(self) -> None:
        """Wait for the work, and take the transport back."""
        self._phase = _Phase.OVER
        work = self._work
        try:
            # Of one rank nothing is left half-way.
            alone = self._transport.world_size == 1
            with nullcontext() if alone else failing(self._transport, "an exchange during backward"):
                if self._thread is None:
                    while work.jobs:
                        work.run_next()
                else:
                    self._thread.wait()
        finally:
            self._transport.lend(None)
        if work.error is not None:
            raise work.error

    def _is_known_void(self) -> bool:
        return self.why_void is not None or any(self._has_changed(*packed) for packed in self._packed)

    def _has_changed(self, position: int, grad: torch.Tensor | None, version: int) -> bool:
        now = self._parameters[position].grad
        return now is not grad or (now is not None and now._version != version)


class _Work:
    """The jobs of one step, in their order, up to one that fails: by a DesyncError on all ranks alike."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.error: BaseException | None = None

    def run_next(self) -> None:
        job = self.jobs.pop(0)
        if self.error is None:
            try:
                job()
            except BaseException as error:
                self.error = error


class _Thread:
    """Runs jobs, which raise nothing, one after the other. It ends with this object, and does not hold the process."""

    def __init__(self) -> None:
        jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs = jobs

        def run() -> None:
            while (job := jobs.get()) is not None:
                job()

        thread = threading.Thread(target=run, name="jointspar", daemon=True)
        thread.start()
        self.ident = thread.ident
        weakref.finalize(self, jobs.put, None).atexit = False  # what exits may still need it

    def run(self, job: Job) -> None:
        self._jobs.put(job)

    def wait(self) -> None:
        """Until all jobs are done."""
        is_done = threading.Event()
        self._jobs.put(is_done.set)
        is_done.wait()
