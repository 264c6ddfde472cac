"""LARS with momentum: peers measure both norms, as LARS needs; ours is shown with and without norms carried along."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from update_problem import EPS, LARS, LR, MOMENTUM, TRUST_COEFFICIENT, WEIGHT_DECAY, UpdateProblem, fused_sgd


def carried(problem: UpdateProblem) -> Any:
    """Both norms are known: ||w|| from the last update, ||g|| from whoever measured it."""
    return _lars(problem, problem.grads, problem.param_norms, problem.grad_norms)


def carried_packed(problem: UpdateProblem) -> Any:
    return _lars(problem, problem.packed_grads, problem.param_norms, problem.grad_norms)


def measures_grads(problem: UpdateProblem) -> Any:
    """As in a training step, which measures ||g|| of the mean gradient in a pass before the update."""
    return _lars(problem, problem.grads, problem.param_norms, None)


def measures_both(problem: UpdateProblem) -> Any:
    """What the peers do: nothing is known."""
    return _lars(problem, problem.grads, None, None)


def _lars(problem: UpdateProblem, grads: Any, param_norms: np.ndarray | None, grad_norms: np.ndarray | None) -> Any:
    return ops.lars_update(
        problem.params, problem.momenta, grads, adapt=problem.adapt, param_norms=param_norms, grad_norms=grad_norms,
        **LARS,
    )  # fmt: skip


def naive(problem: UpdateProblem) -> None:
    """Tensor by tensor, as the formula reads."""
    for param, momentum_buffer, grad in zip(problem.params, problem.momenta, problem.grads, strict=True):
        param_norm = float(torch.linalg.vector_norm(param, dtype=torch.float32))
        grad_norm = float(torch.linalg.vector_norm(grad, dtype=torch.float32))
        rate = 1.0
        if param_norm > 0 and grad_norm > 0:
            rate = TRUST_COEFFICIENT * param_norm / (grad_norm + WEIGHT_DECAY * param_norm + EPS)
        step = rate * (grad.float() + WEIGHT_DECAY * param)
        momentum_buffer.mul_(MOMENTUM).add_(step)
        param.sub_(LR * momentum_buffer)


def local_rates(problem: UpdateProblem) -> list[float]:
    """LARS's rate of each tensor, from norms that torch measures."""
    param_norms = torch.stack(torch._foreach_norm(problem.params, dtype=torch.float32))
    grad_norms = torch.stack(torch._foreach_norm(problem.grads, dtype=torch.float32))
    rates = TRUST_COEFFICIENT * param_norms / (grad_norms + WEIGHT_DECAY * param_norms + EPS)
    return torch.where((param_norms > 0) & (grad_norms > 0), rates, 1.0).tolist()


def foreach(problem: UpdateProblem) -> None:
    """The usual `_foreach_` formulation, with its temporary list preallocated."""
    rates = local_rates(problem)
    torch._foreach_copy_(problem.work, problem.grads)
    torch._foreach_add_(problem.work, problem.params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(problem.work, rates)
    torch._foreach_mul_(problem.momenta, MOMENTUM)
    torch._foreach_add_(problem.momenta, problem.work)
    torch._foreach_add_(problem.params, problem.momenta, alpha=-LR)


def preallocated(problem: UpdateProblem) -> None:
    """`_foreach_norm`, then three passes a tensor that write no temporary."""
    tensors = zip(problem.params, problem.momenta, problem.grads, local_rates(problem), strict=True)
    for param, momentum_buffer, grad, rate in tensors:
        momentum_buffer.mul_(MOMENTUM).add_(grad, alpha=rate).add_(param, alpha=rate * WEIGHT_DECAY)
        param.add_(momentum_buffer, alpha=-LR)


def fused(problem: UpdateProblem) -> None:
    """torch's private fused SGD on a scaled copy of the gradient, tensor by tensor, so that much stays in the cache."""
    for param, momentum_buffer, grad, rate in zip(
        problem.params, problem.momenta, problem.grads, local_rates(problem), strict=True
    ):
        scaled = problem.scratch[: grad.numel()].view(grad.shape)
        torch.mul(grad, rate, out=scaled)
        fused_sgd([param], [momentum_buffer], [scaled], weight_decay=rate * WEIGHT_DECAY)


def fused_without_norms(problem: UpdateProblem) -> None:
    """SGD in one pass: no norms, no rates."""
    fused_sgd(problem.params, problem.momenta, problem.grads)


@functools.cache
def compiled_tensor() -> Callable[..., Any]:
    """One tensor's update, compiled once for every size."""

    def update(param: torch.Tensor, momentum_buffer: torch.Tensor, grad: torch.Tensor) -> None:
        param_norm = torch.linalg.vector_norm(param, dtype=torch.float32)
        grad_norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        rate = TRUST_COEFFICIENT * param_norm / (grad_norm + WEIGHT_DECAY * param_norm + EPS)
        rate = torch.where((param_norm > 0) & (grad_norm > 0), rate, 1.0)
        momentum_buffer.mul_(MOMENTUM).add_(rate * (grad + WEIGHT_DECAY * param))
        param.sub_(LR * momentum_buffer)

    return compile_for_any_size(update)


def compiled(problem: UpdateProblem) -> None:
    update = compiled_tensor()
    for param, momentum_buffer, grad in problem.flat:
        update(param, momentum_buffer, grad)


OPERATION = Operation(
    "lars_update",
    model_cases(),
    functools.partial(UpdateProblem, uses_lars=True),
    [
        *backends_of(carried),
        Variant("native_packed", "ours", carried_packed, "native"),
        Variant("native_measures_grads", "ours", measures_grads, "native"),
        Variant("native_measures_both", "ours", measures_both, "native"),
        Variant("naive", "peer", naive),
        Variant("foreach", "peer", foreach),
        Variant("preallocated", "peer", preallocated),
        Variant("fused", "peer", fused, dtypes=("float32",)),
        Variant("compile", "peer", compiled, compiles=True),
        Variant("fused_without_norms", "floor", fused_without_norms, dtypes=("float32",)),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_lars_update(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
