"""An own ring allreduce: reduce-scatter, then allgather, in pipelined segments with the native add.

It sums dtypes that MPI lacks, reaches the wire's rate where a library's non-blocking allreduce does not, and each of
its waits has a deadline.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import torch

from jointspar import ops
from jointspar.comm.transport import Pending, Transport, check_buffer, failing
from jointspar.step.exchange.interface import Slices
from jointspar.step.exchange.scratch import Scratch

_MIN_SEGMENT_BYTES = 128 * 1024  # less costs more in calls than it gains in overlap
_SEGMENTS_PER_CHUNK = 16  # enough to hide one segment's hop, few enough Python calls
_NUM_POSTED = 4  # receives posted ahead


def ring(
    transport: Transport,
    packed: torch.Tensor,
    *,
    what: str,
    slices: Slices | None = None,
    scratch: Scratch | None = None,
    segment_bytes: int | None = None,
) -> None:
    """Sum `packed` over the ranks, in place; bitwise the same result on all ranks and in every run.

    packed: contiguous 1-D CPU tensor of float32, float64, bfloat16 or float16; same length and dtype on all ranks.
    A 16-bit sum is rounded at each of the world_size - 1 additions. slices: not needed. scratch: reused memory.
    segment_bytes: of the longest message; None: a 16th of the buffer / world_size, at least 128 KiB. Changes no bits.
    Each rank sends 2 (world_size - 1) / world_size of the buffer's bytes.
    Raises CollectiveTimeout, after which the buffer holds partial sums.
    """
    check_buffer(packed)
    if transport.world_size == 1 or packed.numel() == 0:
        return
    with failing(transport, what):  # an interrupt between two waits also leaves messages under way
        _Ring(transport, packed, what, scratch or Scratch(), segment_bytes).run()


class _Ring:
    """One call of `ring`. Segments are numbered along the whole journey: number = step * num_segments + segment.

    In step s a rank sends chunk rank - s to the next rank and receives chunk rank - s - 1 from the previous one; the
    first world_size - 1 steps add what they receive, the others replace. What arrives as number i leaves as number
    i + num_segments. Every wait is for a smaller number of a neighbour than the one it holds back, so no cycle of
    waits can form.
    """

    def __init__(
        self, transport: Transport, packed: torch.Tensor, what: str, scratch: Scratch, segment_bytes: int | None
    ) -> None:
        self._transport = transport
        self._what = what
        self._chunks = _split(packed, transport.world_size, segment_bytes)
        self._num_segments = len(self._chunks[0])
        self._num_reduced = (transport.world_size - 1) * self._num_segments
        longest = max(segment.numel() for chunk in self._chunks for segment in chunk)
        self._slots = scratch.slots(_NUM_POSTED, longest, packed.dtype)
        self._sends: list[Pending] = []
        self._receives: deque[tuple[Pending, torch.Tensor]] = deque()

    def run(self) -> None:
        total = 2 * self._num_reduced
        num_posted = min(_NUM_POSTED, self._num_reduced)
        for number in range(num_posted):
            self._post_receive(number)
        for number in range(self._num_segments):
            self._post_send(number)
        for number in range(total):
            pending, received = self._receives.popleft()
            pending.wait()
            if number < self._num_reduced:
                ops.add_packed(self._segment(number, 1), received)
            if number + self._num_segments < total:
                self._post_send(number + self._num_segments)
            if number + num_posted < total:
                self._post_receive(number + num_posted)
        for send in self._sends:
            send.wait()

    def _post_send(self, number: int) -> None:
        following = (self._transport.rank + 1) % self._transport.world_size
        self._sends.append(self._transport.start_send(self._segment(number, 0), following, what=self._what))

    def _post_receive(self, number: int) -> None:
        target = self._segment(number, 1)
        if number < self._num_reduced:
            target = self._slots[number % _NUM_POSTED][: target.numel()]
        else:
            self._sends[number - self._num_reduced].wait()  # it may still read the memory that is written now
        preceding = (self._transport.rank - 1) % self._transport.world_size
        self._receives.append((self._transport.start_receive(target, preceding, what=self._what), target))

    def _segment(self, number: int, hop: int) -> torch.Tensor:
        """What is sent (hop 0) or received (hop 1) under this number."""
        step, segment = divmod(number, self._num_segments)
        return self._chunks[(self._transport.rank - step - hop) % self._transport.world_size][segment]


def _split(packed: torch.Tensor, world_size: int, segment_bytes: int | None) -> list[list[torch.Tensor]]:
    """Views [world_size][num_segments]: chunks of nearly equal length, each in as many segments."""
    bounds = [packed.numel() * chunk // world_size for chunk in range(world_size + 1)]
    chunk_bytes = -(-packed.numel() // world_size) * packed.element_size()
    if segment_bytes is None:
        num_segments = max(1, min(_SEGMENTS_PER_CHUNK, chunk_bytes // _MIN_SEGMENT_BYTES))
    else:
        num_segments = -(-chunk_bytes // segment_bytes)
    return [list(packed[start:end].tensor_split(num_segments)) for start, end in pairwise(bounds)]
