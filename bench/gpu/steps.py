"""Whole optimizer steps with gradients at hand: wall time per step, kernels launched, waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import jointspar as js
from bench.gpu.cases import SCALE, SHAPES, TRUST_COEFFICIENT
from bench.gpu.launches import kernel_names, waits
from bench.gpu.report import Measurement, Record
from bench.gpu.timing import captured, wall_milliseconds
from bench.gpu.update_cases import LARS, SGD
from jointspar import ops


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


def captured_operations(shapes: str) -> Callable[[], object]:
    """What a step has the device do, of which a graph can be captured, unlike of the step, whose draw is the host's."""
    parameters = parameters_of(shapes)
    params, grads = [parameter.detach() for parameter in parameters], [parameter.grad for parameter in parameters]
    momenta = [torch.zeros_like(param) for param in params]
    norms = ops.squared_norms(params).sqrt()

    def operations() -> None:
        packed, squared = ops.pack_gradients(grads, SCALE)
        ops.lars_update(params, momenta, packed, **LARS, adapt=[True] * len(params), param_norms=norms,
                        grad_norms=squared.sqrt())  # fmt: skip

    return captured(operations)


OPTIMIZERS: dict[str, Callable[[str], Any]] = {
    "torch SGD": lambda shapes: torch.optim.SGD(parameters_of(shapes), **SGD, foreach=True).step,
    "torch SGD fused": lambda shapes: torch.optim.SGD(parameters_of(shapes), **SGD, fused=True).step,
    **{
        f"{kind.__name__}, budget {budget}": jointspar_step(kind, budget, **settings)
        for kind, settings in ((js.JointSparLARS, {"trust_coefficient": TRUST_COEFFICIENT}), (js.JointSparSGD, {}))
        for budget in (1.0, 0.5, 0.25)
    },
    "pack_gradients and lars_update, in a graph": captured_operations,
}


def measure_steps(*, rounds: int) -> Iterator[Measurement]:
    """One measurement per optimizer and set of tensors."""
    for shapes in ("161 x 64", "resnet50"):
        for name in OPTIMIZERS:
            yield Measurement(f"{name}, {shapes}", partial(records_of, name, shapes, rounds))


def records_of(name: str, shapes: str, rounds: int) -> Iterator[Record]:
    step = OPTIMIZERS[name](shapes)
    wall = wall_milliseconds(step, rounds=rounds, calls=20)
    record = {"optimizer": name, "shapes": shapes, "wall_milliseconds": wall}
    yield record | {"launches": len(kernel_names(step)), "waits": waits(step)}
