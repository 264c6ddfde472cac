"""Copying a packed buffer of float32, bfloat16 or float16 back into float32 tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jointspar import ops
from operation import (
    Case,
    Operation,
    Variant,
    backends_of,
    compile_for_any_size,
    model_cases,
    pytest_cases,
    pytest_id,
    run_in_pytest,
)
from packed_problem import WIRE_DTYPES, UnpackProblem


def ours(problem: UnpackProblem) -> None:
    ops.unpack_gradients(problem.packed, problem.outs)


def naive(problem: UnpackProblem) -> None:
    """What one writes first: a view at a time, with an offset."""
    offset = 0
    for out in problem.outs:
        out.copy_(problem.packed[offset : offset + out.numel()].view_as(out))
        offset += out.numel()


def foreach(problem: UnpackProblem) -> None:
    parts = problem.packed.split(problem.sizes)
    torch._foreach_copy_(problem.flat_outs, parts)


def preallocated(problem: UnpackProblem) -> None:
    """The views of the buffer are made once."""
    torch._foreach_copy_(problem.flat_outs, problem.slices)


@functools.cache
def compiled_tensor() -> Callable[..., Any]:
    """One tensor, compiled once for every size."""

    def unpack(part: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(part)

    return compile_for_any_size(unpack)


def compiled(problem: UnpackProblem) -> None:
    unpack = compiled_tensor()
    for part, out in zip(problem.slices, problem.flat_outs, strict=True):
        unpack(part, out)


OPERATION = Operation(
    "unpack_gradients",
    model_cases(WIRE_DTYPES),
    UnpackProblem,
    [
        *backends_of(ours),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("preallocated", "peer", preallocated),
        Variant("compile", "peer", compiled, compiles=True),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_unpack_gradients(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
