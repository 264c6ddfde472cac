"""Adding one packed buffer to another, as a reduction over ranks does."""

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
from packed_problem import WIRE_DTYPES, AddProblem


def ours(problem: AddProblem) -> None:
    ops.add_packed(problem.total, problem.packed)


def naive(problem: AddProblem) -> None:
    """What one writes first: new memory in each call."""
    total = problem.total + problem.packed
    problem.total.copy_(total)


def foreach(problem: AddProblem) -> None:
    torch._foreach_add_([problem.total], [problem.packed])


def preallocated(problem: AddProblem) -> None:
    problem.total.add_(problem.packed)


@functools.cache
def compiled_add() -> Callable[..., Any]:
    """Compiled once for every size."""

    def add(total: torch.Tensor, packed: torch.Tensor) -> None:
        total.add_(packed)

    return compile_for_any_size(add)


def compiled(problem: AddProblem) -> None:
    compiled_add()(problem.total, problem.packed)


OPERATION = Operation(
    "add_packed",
    model_cases(WIRE_DTYPES),
    AddProblem,
    [
        *backends_of(ours),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("preallocated", "peer", preallocated),
        Variant("compile", "peer", compiled, compiles=True),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_add_packed(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
