"""Whole optimizer steps with gradients at hand: wall time per step, kernels launched, waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import jointspar as js
from bench.gpu.cases import LR, MOMENTUM, SHAPES, TRUST_COEFFICIENT, WEIGHT_DECAY
from bench.gpu.launches import count_waits, kernel_names
from bench.gpu.report import Record
from bench.gpu.timing import wall_milliseconds

SGD = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


def parameters_of(shapes: str) -> list[torch.nn.Parameter]:
    """With gradients, which stay."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES[shapes]]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return parameters


def jointspar_step(kind: type[torch.optim.Optimizer], budget: float, **settings: Any) -> Callable[[str], Any]:
    """Tensors are the layers, so that every step handles another subset of them."""
    sampling = js.Sampling(budget=budget, lag=1, grouping="tensor")
    return lambda shapes: kind(parameters_of(shapes), sampling=sampling, **SGD, **settings).step  # type: ignore[call-arg]


OPTIMIZERS: dict[str, Callable[[str], Any]] = {
    "torch SGD": lambda shapes: torch.optim.SGD(parameters_of(shapes), **SGD, foreach=True).step,
    "torch SGD fused": lambda shapes: torch.optim.SGD(parameters_of(shapes), **SGD, fused=True).step,
    **{
        f"{kind.__name__}, budget {budget}": jointspar_step(kind, budget, **settings)
        for kind, settings in ((js.JointSparLARS, {"trust_coefficient": TRUST_COEFFICIENT}), (js.JointSparSGD, {}))
        for budget in (1.0, 0.5, 0.25)
    },
}


def measure_steps(*, rounds: int) -> Iterator[Callable[[], Iterator[Record]]]:
    """One measurement per optimizer and set of tensors."""
    for shapes in ("161 x 64", "resnet50"):
        for name in OPTIMIZERS:
            yield partial(records_of, name, shapes, rounds)


def records_of(name: str, shapes: str, rounds: int) -> Iterator[Record]:
    step = OPTIMIZERS[name](shapes)
    wall = wall_milliseconds(step, rounds=rounds, calls=20)
    record = {"optimizer": name, "shapes": shapes, "wall_milliseconds": wall}
    yield record | {"launches": len(kernel_names(step)), "waits": count_waits(step)}
