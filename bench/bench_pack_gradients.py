"""Packing half of a model's float32 gradients into one buffer of float32, bfloat16 or float16, with their norms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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
from packed_problem import SCALE, WIRE_DTYPES, PackProblem

Packed = tuple[torch.Tensor, Sequence[Any]]  # the buffer and the norms of the unscaled gradients


def ours(problem: PackProblem) -> Packed:
    packed, squared_norms = ops.pack_gradients(problem.grads, problem.scales, out=problem.packed)
    return packed, np.sqrt(squared_norms)


def naive(problem: PackProblem) -> Packed:
    """What one writes first: new memory in each call."""
    packed = torch.cat([(SCALE * grad).flatten() for grad in problem.grads]).to(problem.packed.dtype)
    return packed, [grad.norm() for grad in problem.grads]


def foreach(problem: PackProblem) -> Packed:
    norms = torch._foreach_norm(problem.grads)
    torch._foreach_copy_(problem.float_slices, problem.flat_grads)
    torch._foreach_mul_(problem.float_slices, SCALE)
    return _in_wire_dtype(problem), norms


def cat_out(problem: PackProblem) -> Packed:
    norms = torch._foreach_norm(problem.grads)
    torch.cat(problem.flat_grads, out=problem.packed_float)
    problem.packed_float.mul_(SCALE)
    return _in_wire_dtype(problem), norms


def preallocated(problem: PackProblem) -> Packed:
    """Each gradient scaled straight into its slice."""
    norms = torch._foreach_norm(problem.grads)
    for grad, part in zip(problem.flat_grads, problem.slices, strict=True):
        torch.mul(grad, SCALE, out=part)
    return problem.packed, norms


def _in_wire_dtype(problem: PackProblem) -> torch.Tensor:
    is_narrow = problem.packed.dtype != torch.float32
    return problem.packed.copy_(problem.packed_float) if is_narrow else problem.packed_float


@functools.cache
def compiled_tensor() -> Callable[..., Any]:
    """One gradient, compiled once for every size."""

    def pack(grad: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        part.copy_(grad * SCALE)
        return torch.linalg.vector_norm(grad)

    return compile_for_any_size(pack)


def compiled(problem: PackProblem) -> Packed:
    pack = compiled_tensor()
    norms = [pack(grad, part) for grad, part in zip(problem.flat_grads, problem.slices, strict=True)]
    return problem.packed, norms


def copy_without_norms(problem: PackProblem) -> None:
    torch._foreach_copy_(problem.slices, problem.flat_grads)


OPERATION = Operation(
    "pack_gradients",
    model_cases(WIRE_DTYPES),
    PackProblem,
    [
        *backends_of(ours),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("cat_out", "peer", cat_out),
        Variant("preallocated", "peer", preallocated),
        Variant("compile", "peer", compiled, compiles=True),
        Variant("copy_without_norms", "floor", copy_without_norms),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_pack_gradients(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
