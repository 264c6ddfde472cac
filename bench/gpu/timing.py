"""Times of device work: by CUDA events, with a cold cache, variants in alternation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np
import torch

from bench.gpu.report import Milliseconds, summary

Call = Callable[[], object]
MOST_LAUNCHES = 900  # of one call: the device's queue holds about 1,024, and beyond them the host waits
CYCLES_PER_SECOND = 2e9  # at most about this many: a pause may be longer than asked for, not shorter
LONGEST_PAUSE = 0.2  # seconds
LONGEST_ROUND = 0.02  # seconds of a round by the wall, if a call is not longer


class ColdCache:
    """Evicts what a call before left in the L2 cache, by reading a buffer of several times its size.

    To write one would leave the cache full of what is still to be written to memory, while the next call is timed.
    """

    def __init__(self) -> None:
        size = max(4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 1 << 28)
        self._buffer = torch.ones(size // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")

    def evict(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def host_seconds(call: Call) -> float:
    """What a call costs the host, with an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def device_milliseconds(variants: Mapping[str, Call], *, rounds: int) -> dict[str, Milliseconds]:
    """Milliseconds of each variant on the device; a round times each variant once, in a new order.

    The device pauses before each call for longer than the host takes to put the call there, so that launches do not
    count where nothing waits for them; a call that waits for the device pays for its launches, and so does one of more
    than `MOST_LAUNCHES`, whose graph is to be timed in its place (`captured`).
    """
    cache = ColdCache()
    pause = {}
    for name, call in variants.items():
        call()  # compiles
        call()
        pause[name] = min(LONGEST_PAUSE, 1e-4 + 2.0 * median(host_seconds(call) for _ in range(5)))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(variants)).tolist():
            call = variants[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.evict()
            torch.cuda._sleep(int(pause[name] * CYCLES_PER_SECOND))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            events[name].append((start, end))
    return {name: summary([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}


def wall_milliseconds(call: Call, *, rounds: int, calls: int) -> Milliseconds:
    """Milliseconds per call from the first to the end of the device's work, up to `calls` back to back a round."""
    for _ in range(3):
        call()
    calls = max(1, min(calls, int(LONGEST_ROUND / host_seconds(call))))
    for _ in range(calls):
        call()
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - start) / calls)
    return summary(samples)


def graph_milliseconds(call: Call, *, rounds: int, calls: int) -> Milliseconds:
    """The same of a CUDA graph that a call was captured in. Raises what capturing raises."""
    return wall_milliseconds(captured(call), rounds=rounds, calls=calls)


def captured(call: Call) -> Call:
    """The replay of a CUDA graph that a call was captured in. Raises what capturing raises."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(*, rounds: int, gigabytes: float = 1.0) -> dict[str, float]:
    """Bytes read plus bytes written per second, in GB/s, of a device-to-device copy of so many gigabytes."""
    source = torch.ones(int(gigabytes * 2.5e8), device="cuda")
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    milliseconds = device_milliseconds({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    of_time = {"median": "median", "p10": "p90", "p90": "p10"}  # the slowest copies have the lowest bandwidth
    per_second = {name: moved / milliseconds[other] / 1e6 for name, other in of_time.items()}
    return {**per_second, "samples": milliseconds["samples"]}
