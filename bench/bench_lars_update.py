"""LARS over the 161 tensors of ResNet-50, over a model that fits the cache, and over 161 small tensors.

`python bench/bench_lars_update.py [--threads 1 2]` alternates the variants and prints ratios;
`pytest bench/bench_lars_update.py` records times with pytest-benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from alternate import alternate, print_ratios
from jointspar.backends import native
from shapes import Shape, resnet50_shapes

# lr is tiny, so that thousands of timed steps do not change the data that is timed.
LR, MOMENTUM, WEIGHT_DECAY, TRUST_COEFFICIENT, EPS = 1e-9, 0.9, 1e-4, 1e-3, 1e-8
CASES: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "in_cache": [(4348,)] * 161,
    "small": [(64,)] * 161,
}
REPEATS = {"resnet50": 1, "in_cache": 10, "small": 50}
PEERS = ("foreach", "foreach_norm_mul_out")


@dataclass
class Tensors:
    """Parameters with momentum, gradients, a preallocated work list, and the norms that a run carries along."""

    params: list[torch.Tensor]
    momenta: list[torch.Tensor]
    grads: list[torch.Tensor]
    work: list[torch.Tensor]
    packed_grads: torch.Tensor
    param_norms: np.ndarray
    grad_norms: np.ndarray

    @staticmethod
    def random(shapes: list[Shape]) -> Tensors:
        torch.manual_seed(0)
        params = [torch.randn(shape) for shape in shapes]
        grads = [0.01 * torch.randn(shape) for shape in shapes]
        return Tensors(
            params,
            [torch.zeros(shape) for shape in shapes],
            grads,
            [torch.zeros(shape) for shape in shapes],
            torch.cat([grad.flatten() for grad in grads]),
            np.sqrt(native.squared_norms(params)),
            np.sqrt(native.squared_norms(grads)),
        )


def local_rates(tensors: Tensors) -> list[float]:
    """LARS's rate of each tensor, from norms that torch measures."""
    param_norms = torch.stack(torch._foreach_norm(tensors.params))
    grad_norms = torch.stack(torch._foreach_norm(tensors.grads))
    rates = TRUST_COEFFICIENT * param_norms / (grad_norms + WEIGHT_DECAY * param_norms + EPS)
    return torch.where((param_norms > 0) & (grad_norms > 0), rates, 1.0).tolist()


def foreach_lars(tensors: Tensors) -> None:
    """The usual `_foreach_` formulation, with the temporary list preallocated."""
    rates = local_rates(tensors)
    torch._foreach_copy_(tensors.work, tensors.grads)
    torch._foreach_add_(tensors.work, tensors.params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(tensors.work, rates)
    torch._foreach_mul_(tensors.momenta, MOMENTUM)
    torch._foreach_add_(tensors.momenta, tensors.work)
    torch._foreach_add_(tensors.params, tensors.momenta, alpha=-LR)


def foreach_norm_mul_out_lars(tensors: Tensors) -> None:
    """`_foreach_norm`, then three passes per tensor that write no temporary."""
    for param, momentum_buffer, grad, rate in zip(
        tensors.params, tensors.momenta, tensors.grads, local_rates(tensors), strict=True
    ):
        momentum_buffer.mul_(MOMENTUM).add_(grad, alpha=rate).add_(param, alpha=rate * WEIGHT_DECAY)
        param.add_(momentum_buffer, alpha=-LR)


def variants(tensors: Tensors) -> dict[str, Callable[[], object]]:
    """`fused_sgd` does less (no norms): a floor for torch, not a peer."""
    count = len(tensors.params)
    hyper = np.tile([LR, MOMENTUM, WEIGHT_DECAY, TRUST_COEFFICIENT, EPS], (count, 1))
    adapt = np.ones(count, dtype=bool)
    unknown = np.full(count, np.nan)

    def lars(
        grads: list[torch.Tensor] | torch.Tensor, param_norms: np.ndarray, grad_norms: np.ndarray
    ) -> Callable[[], object]:
        return lambda: native.lars_update(
            tensors.params,
            tensors.momenta,
            grads,
            hyper=hyper,
            adapt=adapt,
            nesterov=False,
            param_norms=param_norms,
            grad_norms=grad_norms,
        )

    return {
        "foreach": lambda: foreach_lars(tensors),
        "foreach_norm_mul_out": lambda: foreach_norm_mul_out_lars(tensors),
        "fused_sgd": lambda: torch._fused_sgd_(
            tensors.params,
            tensors.grads,
            tensors.momenta,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            lr=LR,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        ),
        "native": lars(tensors.grads, tensors.param_norms, tensors.grad_norms),
        "native_packed": lars(tensors.packed_grads, tensors.param_norms, tensors.grad_norms),
        "native_measure_grads": lars(tensors.grads, tensors.param_norms, unknown),
        "native_measure_both": lars(tensors.grads, unknown, unknown),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", [*PEERS, "fused_sgd", "native", "native_packed", "native_measure_grads"])
def bench_lars_update(benchmark, case: str, variant: str) -> None:
    benchmark(variants(Tensors.random(CASES[case]))[variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        for case, shapes in CASES.items():
            medians_ms = alternate(variants(Tensors.random(shapes)), rounds=options.rounds, repeats=REPEATS[case])
            print_ratios(f"lars_update, {case}, {num_threads} threads", medians_ms, peers=PEERS)


if __name__ == "__main__":
    main()
