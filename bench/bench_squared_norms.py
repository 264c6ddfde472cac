"""The squared norm of every tensor of a list, or of every slice of a packed buffer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from jointspar import ops
from operation import (
    Case,
    Operation,
    Traffic,
    Variant,
    assert_close,
    backends_of,
    compile_for_any_size,
    model_cases,
    pytest_cases,
    pytest_id,
    run_in_pytest,
)
from packed_problem import NORM_TOLERANCE


class NormProblem:
    """Gradients of the case's dtype, as tensors and as slices of one buffer. Nothing is written but `out`."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.grads = [torch.randn(shape).to(case.torch_dtype) for shape in case.shapes]
        self.flat_grads = [grad.view(-1) for grad in self.grads]
        self.packed = torch.cat(self.flat_grads)
        self.sizes = [grad.numel() for grad in self.grads]
        self.out = torch.zeros(len(self.grads))
        self.out_elements = list(self.out.unbind())
        self.inputs = [*self.grads, self.packed]
        self.traffic: Traffic | None = Traffic("read", self.packed.numel(), self.packed.itemsize)

    def reset(self) -> None:
        self.out.zero_()

    def check(self, call: Callable[[], Any]) -> None:
        expected = torch.stack([grad.double().square().sum() for grad in self.flat_grads])
        assert_close("squared norms", [call()], [expected], NORM_TOLERANCE)


def ours(problem: NormProblem) -> Any:
    return ops.squared_norms(problem.grads)


def ours_packed(problem: NormProblem) -> Any:
    return ops.squared_norms(problem.packed, layout=problem.sizes)


def naive(problem: NormProblem) -> Sequence[torch.Tensor]:
    """What one writes first: squares in new memory."""
    return [grad.float().square().sum() for grad in problem.grads]


def foreach(problem: NormProblem) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(problem.grads, dtype=torch.float32)).square_()


def preallocated(problem: NormProblem) -> torch.Tensor:
    for grad, element in zip(problem.flat_grads, problem.out_elements, strict=True):
        torch.linalg.vector_norm(grad, dtype=torch.float32, out=element)
    return problem.out.square_()


def dot(problem: NormProblem) -> torch.Tensor:
    """By the BLAS library."""
    return torch.stack([torch.dot(grad, grad) for grad in problem.flat_grads])


@functools.cache
def compiled_tensor() -> Callable[..., Any]:
    """One tensor, compiled once for every size."""

    def squared_norm(grad: torch.Tensor) -> torch.Tensor:
        return grad.float().square().sum()

    return compile_for_any_size(squared_norm)


def compiled(problem: NormProblem) -> Sequence[torch.Tensor]:
    squared_norm = compiled_tensor()
    return [squared_norm(grad) for grad in problem.flat_grads]


OPERATION = Operation(
    "squared_norms",
    model_cases(),
    NormProblem,
    [
        *backends_of(ours),
        Variant("native_packed", "ours", ours_packed, "native"),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("preallocated", "peer", preallocated),
        Variant("dot", "peer", dot, dtypes=("float32",)),
        Variant("compile", "peer", compiled, compiles=True),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_squared_norms(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
