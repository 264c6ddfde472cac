"""Measures the operations: time on the device, bytes over time, launches; a variant that is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu.cases import Case, wrong_variants
from bench.gpu.launches import kernel_names
from bench.gpu.report import Failure, Measurement, Record
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


def measure_operations(backends: list[str], *, rounds: int) -> Iterator[Measurement]:
    """One measurement per case, whose records are its variants."""
    for name, make in all_cases(backends):
        yield Measurement(name, partial(records_of, make, rounds))


def measure_compiled(backends: list[str], *, rounds: int) -> Iterator[Measurement]:
    """Ours beside what torch.compile, which takes up to a minute a case, makes of the loop over ResNet-50's tensors."""
    for name, make in all_cases(backends, ["resnet50"]):
        yield Measurement(name, partial(records_of, make, rounds, is_compiled=True))


def variants_of(case: Case, is_compiled: bool) -> dict[str, Call]:
    if not is_compiled:
        return {"torch loop": case.loop.run} | case.variants
    ours = {name: call for name, call in case.variants.items() if not name.startswith("torch")}
    return {"torch.compile": case.loop.compiled()} | ours


def records_of(make: Callable[[], Case], rounds: int, is_compiled: bool = False) -> Iterator[Record | Failure]:
    case = make()
    variants = variants_of(case, is_compiled)
    for name, reason in wrong_variants(case, variants).items():
        del variants[name]
        yield Failure(name, reason)
    if case.shapes != LAUNCH_BOUND:
        variants[COPY] = copy_of(case.num_bytes)
    launches = {name: len(kernel_names(call)) for name, call in variants.items()}
    are_captured = {name for name, number in launches.items() if number > MOST_LAUNCHES}
    timed = {name: captured(call) if name in are_captured else call for name, call in variants.items()}
    milliseconds = device_milliseconds(timed, rounds=rounds)
    for name, call in variants.items():
        record: Record = {"operation": case.operation, "shapes": case.shapes, "variant": name}
        record |= {"bytes": case.num_bytes, "milliseconds": milliseconds[name]}
        record |= {"is_floor": name in case.floors | {COPY}}
        record |= {"launches": launches[name], "is_captured": name in are_captured}
        if case.shapes == LAUNCH_BOUND or are_captured:  # where launches count, or are left out of a graph's time
            record["wall_milliseconds"] = wall_milliseconds(call, rounds=rounds, calls=20)
        if case.shapes == LAUNCH_BOUND and name.startswith("native"):
            record["graph_milliseconds"] = graph_milliseconds(call, rounds=rounds, calls=20)
        yield record
    torch._dynamo.reset()
