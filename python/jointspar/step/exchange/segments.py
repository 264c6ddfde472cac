"""The segments that `two_shot` sums a buffer in: who computed each, who adds it up, and which comes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jointspar.step.exchange.interface import Slices


@dataclass(frozen=True)
class Segment:
    """A part of the buffer that the same ranks computed, and the rank that adds it up."""

    start: int
    end: int
    owner: int
    contributors: tuple[int, ...]  # ascending

    @property
    def is_ready(self) -> bool:
        """Whether its owner has the sum from the start, having computed it alone."""
        return self.contributors == (self.owner,)

    def sum_goes_to(self, rank: int) -> bool:
        """Whether the owner sends this rank the sum: not to itself, nor where the sum came from."""
        return rank != self.owner and self.contributors != (rank,)


class _Run(NamedTuple):
    """Segments that lie side by side, of one set of contributors."""

    start: int
    end: int
    num_segments: int
    contributors: tuple[int, ...]  # ascending


def partition(slices: Slices, max_elements: int) -> list[Segment]:
    """Cut a buffer into segments of one set of contributors each, and share their ownership out.

    In the order in which all ranks treat them, for links that are busy all the time, in both directions: what is ready
    comes first, as it is sent first, and what its owner did not compute comes last, since the others, for which it
    waits, have more to send than it has at first. What nobody computed is in no segment.
    """
    runs = _runs(slices, max_elements)
    segments = [
        Segment(start, end, owner, run.contributors)
        for run, owners in zip(runs, _owners(slices, runs), strict=True)
        for (start, end), owner in zip(_evenly(run.start, run.end, run.num_segments), owners, strict=True)
    ]
    return sorted(segments, key=lambda segment: (not segment.is_ready, segment.owner not in segment.contributors))


def _owners(slices: Slices, runs: list[_Run]) -> list[list[int]]:
    """The ranks that add up each run's segments.

    Each segment, those of few contributors first, goes to the rank where the sum of load**8 over ranks and directions
    grows least: nearly the largest load counts, and sending less. On two ranks the loads are given, and the additions
    are shared out. Only correctly rounded operations, so that all hosts find the same owners.
    """
    loads, owners = _Loads(slices), [list[int]() for _ in runs]
    for run, chosen in sorted(zip(runs, owners, strict=True), key=lambda pair: len(pair[0].contributors)):
        costs = [loads.cost(run, rank) for rank in range(loads.world_size)]
        heapify(costs)
        for _ in range(run.num_segments):
            owner = costs[0][2]
            chosen.append(owner)
            loads.give(run, owner)
            heapreplace(costs, loads.cost(run, owner))
    return owners


class _Loads:
    """What each rank sends, receives and is given by others to add up, in sizes of the buffer.

    A rank sends what it computed and does not own, and receives the sums that it does not own; an owner receives all
    other contributions and sends the sum to all ranks but one that alone computed it.
    """

    def __init__(self, slices: Slices) -> None:
        self.world_size, self._total = len(slices.computed), max(1, int(slices.sizes.sum()))
        num_contributors = slices.computed.sum(axis=0)
        is_awaited = (num_contributors > 0) & ~(slices.computed & (num_contributors == 1))
        self._sends = ((slices.computed * slices.sizes).sum(axis=1) / self._total).tolist()
        self._receives = ((is_awaited * slices.sizes).sum(axis=1) / self._total).tolist()
        self._taken_in = [0.0] * self.world_size  # nobody owns anything yet

    def cost(self, run: _Run, rank: int) -> tuple[float, float, int]:
        """What sorts the ranks by how badly one more of the run's segments suits them."""
        sends, receives, taken_in = self._with(run, rank)
        more_sends = _eighth_power(sends) - _eighth_power(self._sends[rank])
        more_receives = _eighth_power(receives) - _eighth_power(self._receives[rank])
        return more_sends + more_receives, taken_in, rank

    def give(self, run: _Run, rank: int) -> None:
        """One more of the run's segments to add up."""
        self._sends[rank], self._receives[rank], self._taken_in[rank] = self._with(run, rank)

    def _with(self, run: _Run, rank: int) -> tuple[float, float, float]:
        share, count = (run.end - run.start) / run.num_segments / self._total, len(run.contributors)
        is_contributor = rank in run.contributors
        is_detour = not is_contributor and count > 1
        return (
            self._sends[rank] + share * (self.world_size - 2 + is_detour),
            self._receives[rank] + share * (max(count - 2, 0) + is_detour),
            self._taken_in[rank] + share * (count - is_contributor),
        )


def _runs(slices: Slices, max_elements: int) -> list[_Run]:
    """Neighbouring slices that the same ranks computed; not what nobody computed."""
    columns = slices.computed.T
    changes = np.flatnonzero((columns[1:] != columns[:-1]).any(axis=1)) + 1
    firsts = np.append(0, changes)
    bounds = np.append(np.append(0, np.cumsum(slices.sizes))[firsts], slices.sizes.sum()).tolist()
    return [
        _Run(start, end, -(-(end - start) // max_elements), tuple(np.flatnonzero(column).tolist()))
        for (start, end), column in zip(pairwise(bounds), columns[firsts], strict=True)
        if end > start and column.any()
    ]


def _eighth_power(load: float) -> float:
    """By multiplications: `**` rounds differently on different processors."""
    square = load * load
    fourth = square * square
    return fourth * fourth


def _evenly(first: int, last: int, parts: int) -> Iterator[tuple[int, int]]:
    return pairwise(first + (last - first) * part // parts for part in range(parts + 1))
