"""Buckets of gradients are packed and exchanged while backward computes the next ones."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch

from jointspar.comm.heads import is_occupied, occupy, vacate
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError
from jointspar.gradient_sum import GradientSum


class EarlyExchange:
    """Takes note of each gradient as it comes, and hands full buckets to a thread that exchanges them in their order.

    From a step's first gradient to the end of `wait` that thread alone uses the transport. The ranks agree on a step's
    buckets before the first of them. A rank that exits in between still sends what the others wait for. Where nothing
    travels, among simulated ranks or with one, the exchange is left to `wait`.

    begin: makes the step's sum, from the plan of all ranks. agree: meets all ranks, before its first bucket.
    Raises JointSparError where the transport is bound to this thread.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Sequence[torch.Tensor],
        begin: Callable[[], GradientSum],
        agree: Callable[[GradientSum], None],
    ) -> None:
        self._transport, self._parameters, self._begin, self._agree = transport, parameters, begin, agree
        self._is_threaded = transport.world_size > 1 and not transport.is_simulated
        if self._is_threaded and not transport.can_change_threads:
            raise JointSparError("overlap=True needs an MPI that was started with MPI_THREAD_SERIALIZED or more")
        self._thread = ThreadPoolExecutor(1, "jointspar", torch.set_num_threads, (torch.get_num_threads(),))
        self._is_paused = False
        self._forget()

    def _forget(self) -> None:
        self._sum: GradientSum | None = None
        self._missing: list[set[int]] = []  # by bucket, positions of parameters whose gradients are still to come
        self._noted: set[int] = set()
        self._packed: list[tuple[int, torch.Tensor | None, int]] = []  # position, gradient, its version
        self._work: list[Future[None]] = []  # of the thread
        self._later: list[Callable[[], None]] = []  # work for `wait`
        self._has_failed = False

    @property
    def is_under_way(self) -> bool:
        """Whether a backward has begun to send, and no `wait` has ended it."""
        return self._sum is not None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backward passes inside are not taken note of."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @torch.no_grad()
    def note(self, position: int) -> None:
        """Backward has accumulated a parameter's gradient. Raises JointSparError where it did so before in this step.

        Waits for the plans of all ranks at the first. While another optimizer's exchange is under way nothing is sent.
        """
        if self._is_paused or (self._sum is None and is_occupied(self._transport)):
            return
        if self._sum is None:
            self._open()
        if position in self._noted:
            raise JointSparError(
                "a second backward before step(): overlap=True has sent the first one's gradients already; accumulate "
                "inside `with optimizer.no_sync():` and leave it for the last backward"
            )
        self._noted.add(position)
        for missing in self._missing:
            missing.discard(position)
        self._pack_while_full()

    def pack_rest(self) -> None:
        """Pack and send what is left, zeros where no gradient came."""
        if self._sum is None:
            self._open()
        self._transport.is_in_background = False
        for missing in self._missing:
            missing.clear()
        self._pack_while_full()

    def wait(self) -> GradientSum:
        """The step's sum, once all of it has arrived. Raises what the exchange raised.

        Raises JointSparError where gradients have changed since they were packed.
        """
        assert self._sum is not None
        try:
            self._finish_work()
            self._check_unchanged()
            return self._sum
        finally:
            atexit.unregister(self._complete_at_exit)
            vacate(self._transport)
            self._forget()

    def _finish_work(self) -> None:
        try:
            for work in self._work:
                work.result()
        except BaseException as error:
            if not all(work.done() for work in self._work):  # an interrupt
                self._transport.fail(f"an exchange during backward was left by {type(error).__name__}")
            raise
        for job in self._later:
            job()

    def _check_unchanged(self) -> None:
        for position, grad, version in self._packed:
            now = self._parameters[position].grad
            if now is not grad or (now is not None and now._version != version):
                raise JointSparError(
                    "gradients were changed between backward and step(), but overlap=True had sent them: clip by "
                    "step(max_norm=...), change mean_grads after synchronize(), or leave overlap out"
                )

    def _open(self) -> None:
        occupy(self._transport)
        try:
            self._sum = total = self._begin()
        except BaseException:
            vacate(self._transport)
            raise
        if self._is_threaded:
            atexit.register(self._complete_at_exit)  # runs before those of the agreement and the transport
        self._missing = [total.positions_to_compute(bucket) for bucket in range(len(total.layout.buckets))]
        self._transport.is_in_background = True
        self._submit(lambda: self._agree(total))

    def _pack_while_full(self) -> None:
        total = self._sum
        assert total is not None
        while not total.is_packed and not self._missing[0]:
            del self._missing[0]
            bucket = total.pack_next()
            for position in total.positions_to_compute(bucket):
                grad = self._parameters[position].grad
                self._packed.append((position, grad, 0 if grad is None else grad._version))
            self._submit(lambda bucket=bucket: total.exchange(bucket))  # type: ignore[misc]

    def _submit(self, job: Callable[[], None]) -> None:
        def run() -> None:
            if self._has_failed:  # no other rank expects this job
                return
            try:
                job()
            except BaseException:
                self._has_failed = True
                raise

        if self._is_threaded:
            with suppress(RuntimeError):  # the interpreter ends: its threads have done all their work
                self._work.append(self._thread.submit(run))
                return
        self._later.append(run)

    def _complete_at_exit(self) -> None:
        """The other ranks wait for this rank's buckets, and learn from the next header that it has left."""
        self.pack_rest()
        self._finish_work()
        vacate(self._transport)
