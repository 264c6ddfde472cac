"""What an optimizer's step costs beside its kernels: 60 layers of tiny tensors on one rank, so that only calls count.

    python bench/step/python_cost.py

Prints microseconds of a step, of the same operations called by themselves, and the difference: medians of 2,000.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import jointspar as js
from jointspar import ops

NUM_LAYERS, WIDTH, ROUNDS, WARM_UP = 60, 8, 2000, 200


def main() -> None:
    torch.set_num_threads(1)
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)])
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    step = median_us(optimizer.step)
    kernels = sum(map(median_us, operations(list(model.parameters())[::2])))
    print(f"a step {step:.0f} us, its operations {kernels:.0f} us, beside them {step - kernels:.0f} us")


def operations(active: list[nn.Parameter]) -> list[Callable[[], object]]:
    """The native calls of a step that computes these parameters."""
    sizes = [parameter.numel() for parameter in active]
    grads, momenta = [parameter.grad for parameter in active], [torch.zeros_like(parameter) for parameter in active]
    packed, scales = torch.zeros(sum(sizes)), np.ones(len(active))
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001, "eps": 1e-8}
    probabilities = np.full(NUM_LAYERS, 0.5)
    return [
        lambda: ops.sample_layers(probabilities, seed=0, step=1),
        lambda: ops.pack_gradients(grads, scales, layout=sizes, out=packed),
        lambda: ops.squared_norms(packed, layout=sizes),
        torch.no_grad()(lambda: ops.lars_update(active, momenta, packed, **hyper)),
        lambda: ops.project_probabilities(np.log(probabilities), budget=NUM_LAYERS / 2, p_min=0.1),
    ]


def median_us(function: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        function()
    seconds = np.empty(ROUNDS)
    for turn in range(ROUNDS):
        began = time.perf_counter()
        function()
        seconds[turn] = time.perf_counter() - began
    return 1e6 * float(np.median(seconds))


if __name__ == "__main__":
    main()
