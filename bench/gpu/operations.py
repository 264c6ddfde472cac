"""Measures the operations: time on the device, bytes over time, launches; a case that is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu.cases import Case, check
from bench.gpu.launches import kernel_names
from bench.gpu.report import Record
from bench.gpu.timing import device_milliseconds, graph_milliseconds, wall_milliseconds
from bench.gpu.update_cases import all_cases

LAUNCH_BOUND = "161 x 64"  # where the time from the host's first call to the device's last kernel is what counts


def measure_operations(backends: list[str], *, compiled: bool, rounds: int) -> Iterator[Callable[[], Iterator[Record]]]:
    """One measurement per case, whose records are its variants."""
    for make in all_cases(backends, compiled):
        yield partial(records_of, make, rounds)


def records_of(make: Callable[[], Case], rounds: int) -> Iterator[Record]:
    case = make()
    check(case)
    milliseconds = device_milliseconds(case.variants, rounds=rounds)
    for name, call in case.variants.items():
        record: Record = {"operation": case.operation, "shapes": case.shapes, "variant": name}
        record |= {"bytes": case.num_bytes, "milliseconds": milliseconds[name], "is_floor": name in case.floors}
        record["launches"] = len(kernel_names(call))
        if case.shapes == LAUNCH_BOUND:
            record["wall_milliseconds"] = wall_milliseconds(call, rounds=rounds, calls=20)
            if name.startswith("native"):
                record["graph_milliseconds"] = graph_milliseconds(call, rounds=rounds, calls=20)
        yield record
    torch._dynamo.reset()
