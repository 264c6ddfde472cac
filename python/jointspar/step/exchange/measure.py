"""A short measurement of the ways to exchange, and the choice that follows from it for a buffer of any size."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from jointspar.comm.device import wait_for_stream
from jointspar.comm.transport import Transport
from jointspar.step.exchange.interface import Exchange, Slices

_SMALLEST_BYTES = 16 * 1024
_GROWTH = 16  # from one buffer to the next
_LARGEST_BYTES = 32 * 1024 * 1024  # beyond the caches
_SECONDS = 1.0  # that one buffer may take: no further round, and no larger buffer, that promises to pass it
_SHORT_TRIAL = 1000  # elements
_LARGEST_TRIAL_BYTES = 4 * 1024 * 1024
_ADDING_RANKS = 32
_UNSTEADY = 1.1  # times that vary between calls, or with another algorithm for longer buffers: their best flatters
_ROUNDS = 3  # the best counts: anything else on the machine only makes an exchange slower


@dataclass(frozen=True)
class Costs:
    """What each way to exchange took for buffers of several lengths, which all ranks computed; the slowest rank's."""

    num_bytes: tuple[int, ...]  # ascending
    seconds: dict[str, tuple[float, ...]]  # by name, one for each length

    def promise(self, name: str, num_bytes: float) -> float:
        """Seconds for so many bytes: linear between lengths, the first below it, in proportion above the last."""
        inside = float(np.interp(num_bytes, self.num_bytes, self.seconds[name]))
        return inside * max(1.0, num_bytes / self.num_bytes[-1])

    def cheapest(self, slices: Slices, itemsize: int) -> str:
        """The name that promises the least time for a buffer; of equal ones the first.

        "two_shot", short or not, is judged by what it sends of these slices, the others by the buffer's length. A
        library's allreduce, and long messages where there are short ones, must promise a tenth less.
        """
        length = int(slices.sizes.sum())

        def promised(name: str) -> float:
            num_elements = slices.sent_by_two_shot() if name.startswith("two_shot") else length
            factor = _UNSTEADY if name == "allreduce" or f"{name}_short" in self.seconds else 1.0
            return factor * self.promise(name, itemsize * num_elements)

        return min(self.seconds, key=promised)


def measure(
    candidates: Mapping[str, Exchange],
    transport: Transport,
    dtype: torch.dtype,
    num_bytes: int,
    device: torch.device | None = None,
) -> Costs:
    """Time each candidate on buffers of growing length; the same costs on all ranks. Collective.

    num_bytes: of the largest buffer to come, the same on all ranks. device: where buffers are, default the CPU. From
    16 KiB the buffer grows to that, or 32 MiB, or on a slow link to what promises one round within a second: links let
    some hundred KiB pass at once after a pause, so a large buffer tells more about them than a further round.
    """
    longest = max(1, min(num_bytes, _LARGEST_BYTES) // dtype.itemsize)
    length = min(longest, _SMALLEST_BYTES // dtype.itemsize)

    def best_times(num_elements: int) -> np.ndarray:
        return _best_times(candidates, transport, torch.zeros(num_elements, dtype=dtype, device=device))

    lengths, times = [length], [best_times(length)]
    while True:
        affordable = int(length * _SECONDS / times[-1].sum())
        longer = min(longest, _GROWTH * length, affordable)
        if longer < 2 * length:
            break
        length = longer
        lengths.append(length)
        times.append(best_times(length))
    columns = np.array(times).T.tolist()
    seconds = {name: tuple(column) for name, column in zip(candidates, columns, strict=True)}
    return Costs(tuple(length * dtype.itemsize for length in lengths), seconds)


def adds_up(exchange: Exchange, transport: Transport, dtype: torch.dtype, num_bytes: int, device: torch.device) -> bool:
    """Whether an exchange gives every rank the right sums. Collective; the same answer on all ranks.

    num_bytes: of the largest buffer to come; the trials are a short buffer and one of that size or 4 MiB. Every rank
    adds numbers of its own, 32 ranks at a time, so that sums stay whole numbers below 256, exact in every float dtype.
    """
    is_right = True
    longest = max(1, min(num_bytes, _LARGEST_TRIAL_BYTES) // dtype.itemsize)
    for length in sorted({min(longest, _SHORT_TRIAL), longest}):
        positions = torch.arange(length, device=device)
        for first in range(0, transport.world_size, _ADDING_RANKS):
            adding = range(first, min(first + _ADDING_RANKS, transport.world_size))
            buffer = ((positions + transport.rank).remainder(8) * (transport.rank in adding)).to(dtype)
            exchange(transport, buffer, what="trying an exchange")
            wait_for_stream(transport, device, what="trying an exchange")
            expected = torch.zeros_like(positions)
            for rank in adding:
                expected += (positions + rank).remainder(8)
            is_right = is_right and torch.equal(buffer, expected.to(dtype))
    rows = transport.start_headers(np.array([is_right], dtype=np.int64), what="trying an exchange").wait()
    return bool(rows.all())


def _best_times(candidates: Mapping[str, Exchange], transport: Transport, buffer: torch.Tensor) -> np.ndarray:
    """Seconds of the slowest rank in the best round, float64 [num_candidates], never 0."""
    best, taken = np.full(len(candidates), math.inf), 0.0
    for turn in range(1, _ROUNDS + 1):
        nanoseconds = np.empty(len(candidates), dtype=np.int64)
        for number, exchange in enumerate(candidates.values()):
            transport.start_headers(np.zeros(1, dtype=np.int64), what="measuring exchanges").wait()  # start together
            began = time.perf_counter_ns()
            exchange(transport, buffer, what="measuring exchanges")
            wait_for_stream(transport, buffer.device, what="measuring exchanges")
            nanoseconds[number] = max(1, time.perf_counter_ns() - began)
        rows = transport.start_headers(nanoseconds, what="measuring exchanges").wait()
        slowest = rows.max(axis=0) / 1e9
        best = np.minimum(best, slowest)
        taken += slowest.sum()
        if taken * (turn + 1) / turn > _SECONDS:
            break
    return best
