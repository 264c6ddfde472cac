"""A sum that sends only what was computed: each slice to its owner, who adds in the order of ranks, then to everybody.

Where k of M ranks computed a slice of n elements, all ranks together send n (k + M - 2) elements, against 2 n (M - 1)
in a ring; n more where the owner is none of several, which evens out what ranks send. What one rank alone computed
needs no addition: it is handed on.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from jointspar import ops
from jointspar.comm.transport import Pending, Transport, check_buffer, failing
from jointspar.step.exchange.interface import Slices
from jointspar.step.exchange.scratch import Scratch
from jointspar.step.exchange.segments import Segment, partition

_MIN_SEGMENT_BYTES = 128 * 1024  # less costs more in calls than it gains in overlap
_SEGMENTS_PER_RANK = 16
_CONTRIBUTION, _SUM, _SUM_BACK = 1, 2, 3  # tags; sums that go back to a contributor are expected later than others
_NUM_AHEAD = 8  # segments, for each other rank, that there is scratch memory for: to receive while answers wait

Part = tuple[Pending | None, torch.Tensor]  # of a segment, as one rank computed it; None: this one


def two_shot(
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
    slices: who computed what; elsewhere a rank's buffer is taken for zero and not read. Contributions are added in the
    order of ranks, and the bits depend on nothing else; a 16-bit sum is rounded at each addition.
    scratch: reused memory. segment_bytes: of the longest message; None: a 16th of the buffer / world_size, at least
    128 KiB. Changes no bits.
    Raises ValueError for slices of another buffer, CollectiveTimeout, after which the buffer holds partial sums.
    """
    check_buffer(packed)
    if slices is None:
        slices = Slices(np.array([packed.numel()]), np.ones((transport.world_size, 1), dtype=bool))
    if slices.sizes.sum() != packed.numel() or slices.computed.shape != (transport.world_size, slices.sizes.size):
        raise ValueError(f"slices are not of {packed.numel()} elements and {transport.world_size} ranks")
    if transport.world_size == 1 or packed.numel() == 0:
        return
    with failing(transport, what):  # an interrupt between two waits also leaves messages under way
        _TwoShot(transport, packed, what, slices, scratch or Scratch(), segment_bytes).run()


def _add_up(parts: list[Part]) -> None:
    """Leave the sum in this rank's buffer: ((rank a + rank b) + rank c) for contributors a < b < c."""
    (pending, total), *others = parts
    if pending is not None:
        pending.wait()
    for pending, part in others:
        if pending is None:  # the own part, after others
            ops.add_packed(part, total)
            total = part
        else:
            pending.wait()
            ops.add_packed(total, part)


def _sum_tag(segment: Segment, rank: int) -> int:
    return _SUM_BACK if rank in segment.contributors else _SUM


class _TwoShot:
    """One call of `two_shot`.

    All ranks walk the same list of segments, so messages of one kind between two ranks meet in its order; for sums
    that is so because what is ready stands first. What a rank has from the start, contributions first, is all under
    way before it expects anything (within one machine, Open MPI is slower the other way round), and sums are waited
    for only after all contributions were received, so no cycle of waits can form. Long messages travel only when
    they are expected: sums of what this rank did not compute are before it waits, the others in the order of
    segments as its contributions have left.
    """

    def __init__(
        self,
        transport: Transport,
        packed: torch.Tensor,
        what: str,
        slices: Slices,
        scratch: Scratch,
        segment_bytes: int | None,
    ) -> None:
        self._transport, self._packed, self._what = transport, packed, what
        self._rank, self._world_size = transport.rank, transport.world_size
        if segment_bytes is None:
            per_rank = -(-packed.numel() // (self._world_size * _SEGMENTS_PER_RANK))
            longest = max(per_rank, _MIN_SEGMENT_BYTES // packed.element_size())
        else:
            longest = max(1, segment_bytes // packed.element_size())
        self._segments = partition(slices, longest)
        longest = max((segment.end - segment.start for segment in self._segments), default=0)
        needed = sum(len(segment.contributors) - 1 for segment in self._segments if segment.owner == self._rank)
        self._free_slots = scratch.slots(min(_NUM_AHEAD * (self._world_size - 1), needed), longest, packed.dtype)
        self._contributions: dict[Segment, Pending] = {}
        self._sums: list[Pending] = []

    def run(self) -> None:
        owned = [segment for segment in self._segments if segment.owner == self._rank]
        for segment in self._segments:
            if self._rank in segment.contributors and self._rank != segment.owner:
                self._contributions[segment] = self._send(segment, segment.owner, _CONTRIBUTION)
        for segment in owned:
            if segment.is_ready:
                self._spread(segment)
        awaited = [segment for segment in self._segments if segment.sum_goes_to(self._rank)]
        self._receives = [self._receive_sum(segment) for segment in awaited if segment not in self._contributions]
        self._blocked = deque(segment for segment in awaited if segment in self._contributions)
        self._reduce([segment for segment in owned if not segment.is_ready])
        while self._blocked:
            self._contributions[self._blocked[0]].wait()
            self._receive_unblocked()
        for pending in (*self._receives, *self._contributions.values(), *self._sums):
            pending.wait()

    def _reduce(self, owned: list[Segment]) -> None:
        """Add up segments that this rank owns, and send each sum on its way."""
        arriving: deque[tuple[list[Part], list[torch.Tensor]]] = deque()
        coming = deque(owned)
        for segment in owned:
            while coming and len(coming[0].contributors) - 1 <= len(self._free_slots):
                arriving.append(self._receive_contributions(coming.popleft()))
            parts, slots = arriving.popleft()
            _add_up(parts)
            self._free_slots += slots
            self._spread(segment)
            self._receive_unblocked()

    def _spread(self, segment: Segment) -> None:
        for step in range(1, self._world_size):
            rank = (self._rank + step) % self._world_size
            if segment.sum_goes_to(rank):
                self._sums.append(self._send(segment, rank, _sum_tag(segment, rank)))

    def _receive_unblocked(self) -> None:
        """Post receives of sums into memory that this rank's contributions no longer need."""
        while self._blocked and self._contributions[self._blocked[0]].done():
            self._receives.append(self._receive_sum(self._blocked.popleft()))

    def _receive_contributions(self, segment: Segment) -> tuple[list[Part], list[torch.Tensor]]:
        """Post the receives of one segment. Returns its parts in the order of ranks, and the slots that they are in."""
        slots = [self._free_slots.pop() for _ in segment.contributors[1:]]
        own = self._view(segment)
        targets = iter(slots if self._rank in segment.contributors else [own, *slots])  # the first in place
        parts: list[Part] = []
        for rank in segment.contributors:
            if rank == self._rank:
                parts.append((None, own))
                continue
            target = next(targets)[: segment.end - segment.start]
            pending = self._transport.start_receive(target, rank, what=self._what, tag=_CONTRIBUTION)
            parts.append((pending, target))
        return parts, slots

    def _receive_sum(self, segment: Segment) -> Pending:
        tag = _sum_tag(segment, self._rank)
        return self._transport.start_receive(self._view(segment), segment.owner, what=self._what, tag=tag)

    def _send(self, segment: Segment, rank: int, tag: int) -> Pending:
        return self._transport.start_send(self._view(segment), rank, what=self._what, tag=tag)

    def _view(self, segment: Segment) -> torch.Tensor:
        return self._packed[segment.start : segment.end]
