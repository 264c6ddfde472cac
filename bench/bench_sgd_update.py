"""SGD with momentum, with the gradients' norms that ours returns and the layer probabilities need."""

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
from update_problem import LR, MOMENTUM, SGD, WEIGHT_DECAY, UpdateProblem, fused_sgd


def ours(problem: UpdateProblem) -> Any:
    return ops.sgd_update(problem.params, problem.momenta, problem.grads, **SGD)


def ours_packed(problem: UpdateProblem) -> Any:
    return ops.sgd_update(problem.params, problem.momenta, problem.packed_grads, **SGD)


def naive(problem: UpdateProblem) -> list[torch.Tensor]:
    """Tensor by tensor, as the formula reads."""
    norms = []
    for param, momentum_buffer, grad in zip(problem.params, problem.momenta, problem.grads, strict=True):
        norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))
        momentum_buffer.mul_(MOMENTUM).add_(grad.float() + WEIGHT_DECAY * param)
        param.sub_(LR * momentum_buffer)
    return norms


def foreach(problem: UpdateProblem) -> list[torch.Tensor]:
    """As torch.optim.SGD(foreach=True), with its temporary list preallocated."""
    norms = torch._foreach_norm(problem.grads, dtype=torch.float32)
    torch._foreach_copy_(problem.work, problem.grads)
    torch._foreach_add_(problem.work, problem.params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(problem.momenta, MOMENTUM)
    torch._foreach_add_(problem.momenta, problem.work)
    torch._foreach_add_(problem.params, problem.momenta, alpha=-LR)
    return norms


def preallocated(problem: UpdateProblem) -> list[torch.Tensor]:
    """Three passes a tensor that write no temporary."""
    for param, momentum_buffer, grad in zip(problem.params, problem.momenta, problem.grads, strict=True):
        momentum_buffer.mul_(MOMENTUM).add_(grad).add_(param, alpha=WEIGHT_DECAY)
        param.add_(momentum_buffer, alpha=-LR)
    return torch._foreach_norm(problem.grads, dtype=torch.float32)


def fused(problem: UpdateProblem) -> list[torch.Tensor]:
    """As torch.optim.SGD(fused=True)."""
    norms = torch._foreach_norm(problem.grads, dtype=torch.float32)
    fused_sgd(problem.params, problem.momenta, problem.grads)
    return norms


def fused_without_norms(problem: UpdateProblem) -> None:
    fused_sgd(problem.params, problem.momenta, problem.grads)


@functools.cache
def compiled_tensor() -> Callable[..., Any]:
    """One tensor's update, compiled once for every size."""

    def update(param: torch.Tensor, momentum_buffer: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        momentum_buffer.mul_(MOMENTUM).add_(grad + WEIGHT_DECAY * param)
        param.sub_(LR * momentum_buffer)
        return torch.linalg.vector_norm(grad, dtype=torch.float32)

    return compile_for_any_size(update)


def compiled(problem: UpdateProblem) -> list[torch.Tensor]:
    update = compiled_tensor()
    return [update(param, momentum_buffer, grad) for param, momentum_buffer, grad in problem.flat]


OPERATION = Operation(
    "sgd_update",
    model_cases(),
    functools.partial(UpdateProblem, uses_lars=False),
    [
        *backends_of(ours),
        Variant("native_packed", "ours", ours_packed, "native"),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("preallocated", "peer", preallocated),
        Variant("fused", "peer", fused, dtypes=("float32",)),
        Variant("compile", "peer", compiled, compiles=True),
        Variant("fused_without_norms", "floor", fused_without_norms, dtypes=("float32",)),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_sgd_update(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
