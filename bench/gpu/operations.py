"""Measures the operations: time on the device, bytes over time, launches; a case that is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu.cases import Case, check
from bench.gpu.launches import kernel_names
from bench.gpu.report import Record
from bench.gpu.timing import (
    MOST_LAUNCHES,
    Call,
    captured,
    device_milliseconds,
    graph_milliseconds,
    wall_milliseconds,
)
from bench.gpu.update_cases import all_cases

LAUNCH_BOUND = "161 x 64"  # where the time from the host's first call to the device's last kernel is what counts
COPY = "copy of as many bytes"  # the limit at this size, with a launch's own time


def copy_of(num_bytes: int) -> Call:
    """Reads and writes half of the bytes each."""
    source = torch.ones(num_bytes // 8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure_operations(backends: list[str], *, compiled: bool, rounds: int) -> Iterator[Callable[[], Iterator[Record]]]:
    """One measurement per case, whose records are its variants."""
    for make in all_cases(backends, compiled):
        yield partial(records_of, make, rounds)


def records_of(make: Callable[[], Case], rounds: int) -> Iterator[Record]:
    case = make()
    check(case)
    variants = case.variants if case.shapes == LAUNCH_BOUND else case.variants | {COPY: copy_of(case.num_bytes)}
    launches = {name: len(kernel_names(call)) for name, call in variants.items()}
    are_captured = {name for name, number in launches.items() if number > MOST_LAUNCHES}
    timed = {name: captured(call) if name in are_captured else call for name, call in variants.items()}
    milliseconds = device_milliseconds(timed, rounds=rounds)
    for name, call in variants.items():
        record: Record = {"operation": case.operation, "shapes": case.shapes, "variant": name}
        record |= {
            "bytes": case.num_bytes,
            "milliseconds": milliseconds[name],
            "is_floor": name in case.floors | {COPY},
        }
        record |= {"launches": launches[name], "is_captured": name in are_captured}
        if case.shapes == LAUNCH_BOUND:
            record["wall_milliseconds"] = wall_milliseconds(call, rounds=rounds, calls=20)
            if name.startswith("native"):
                record["graph_milliseconds"] = graph_milliseconds(call, rounds=rounds, calls=20)
        yield record
    torch._dynamo.reset()
