"""What the operations are measured on: arrays, torch's ways to do the same, and a float64 check of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu.timing import Call
from bench.shapes import Shape, resnet50_shapes
from jointspar import ops

SHAPES: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "161 x 64": [(64,)] * 161,
    "100M": [(1000, 1000)] * 100,
    "10, resnet50": [(10,), *resnet50_shapes()],  # slices of the packed buffer begin between two vectors
}
LR, MOMENTUM, WEIGHT_DECAY, TRUST_COEFFICIENT, EPS = 1e-4, 0.9, 1e-4, 1e-3, 1e-8
SCALE = 2.0  # 1 / p of a layer that is drawn half of the time


class Loop(NamedTuple):
    """The plain way in torch, tensor by tensor, and what torch.compile may make of it."""

    function: Callable[..., object]
    arguments: tuple[list[torch.Tensor], ...]

    def run(self) -> object:
        return self.function(*self.arguments)

    def compiled(self) -> Call:
        return partial(torch.compile(self.function), *self.arguments)


@dataclass
class Case:
    """One operation on one set of tensors."""

    operation: str
    shapes: str
    num_bytes: int  # read plus written by an implementation that touches each array once
    loop: Loop
    variants: dict[str, Call]  # without the loop
    written: list[torch.Tensor]
    expected: Callable[[], list[torch.Tensor]]  # what `written` is after one call, in float64
    tolerance: float = 1e-5
    floors: frozenset[str] = field(default_factory=frozenset)  # variants that do less, so they are not checked


def wrong_variants(case: Case, variants: dict[str, Call]) -> dict[str, str]:
    """Why, of each variant that fails or does not write what float64 says."""
    before = [tensor.clone() for tensor in case.written]
    expected, wrong = case.expected(), {}
    for name, call in variants.items():
        if name in case.floors:
            continue
        try:
            call()  # compiles
            torch._foreach_copy_(case.written, before)
            call()
            for index, (actual, wanted) in enumerate(zip(case.written, expected, strict=True)):
                error = float((actual.double() - wanted).norm() / wanted.norm())
                assert error <= case.tolerance, f"array {index} is off by {error}"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:500]
        torch._foreach_copy_(case.written, before)
    return wrong


def by_backends(backends: list[str], name: str, call: Call) -> dict[str, Call]:
    """The call once for each backend, named "native", or "native (name)"."""

    def served(backend: str) -> Call:
        def run() -> object:
            if os.environ.get("JOINTSPAR_BACKEND") != backend:  # as in calls of one variant after another
                os.environ["JOINTSPAR_BACKEND"] = backend
            return call()

        return run

    return {backend + f" ({name})" * bool(name): served(backend) for backend in backends}


class Tensors:
    """Parameters, momenta, gradients and a packed buffer of random numbers."""

    def __init__(self, shapes: list[Shape]) -> None:
        torch.manual_seed(0)
        self.params, self.momenta, grads = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(3))
        self.sizes = [param.numel() for param in self.params]
        self.packed = torch.cat([0.01 * grad.flatten() for grad in grads])
        self.grads = [part.view(s) for part, s in zip(self.packed.split(self.sizes), shapes, strict=True)]
        self.total = sum(self.sizes)


def pack_case(wire: torch.dtype, name: str, backends: list[str]) -> Case:
    tensors = Tensors(SHAPES[name])
    packed = torch.zeros(tensors.total, dtype=wire, device="cuda")
    slices = [part.view_as(grad) for part, grad in zip(packed.split(tensors.sizes), tensors.grads, strict=True)]

    def naive(grads: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
        for grad, target in zip(grads, targets, strict=True):
            target.copy_(grad * SCALE)
        return [grad.norm() for grad in grads]

    def foreach() -> list[torch.Tensor]:
        torch._foreach_copy_(slices, torch._foreach_mul(tensors.grads, SCALE))
        return torch._foreach_norm(tensors.grads)

    def preallocated() -> list[torch.Tensor]:
        for grad, target in zip(tensors.grads, slices, strict=True):
            torch.mul(grad, SCALE, out=target)
        return torch._foreach_norm(tensors.grads)

    def concatenated() -> list[torch.Tensor]:
        torch.cat([grad.flatten() for grad in tensors.grads], out=packed)
        packed.mul_(SCALE)
        return torch._foreach_norm(tensors.grads)

    variants: dict[str, Call] = {
        "torch _foreach_": foreach,
        "torch mul(out=)": preallocated,
    }
    if wire == torch.float32:
        variants["torch cat(out=)"] = concatenated
    variants |= by_backends(backends, "", lambda: ops.pack_gradients(tensors.grads, SCALE, out=packed))
    return Case(
        f"pack_gradients to {str(wire).removeprefix('torch.')}",
        name,
        tensors.total * (4 + wire.itemsize),
        Loop(naive, (tensors.grads, slices)),
        variants,
        [packed],
        lambda: [torch.cat([grad.flatten() for grad in tensors.grads]).double() * SCALE],
        tolerance=1e-5 if wire == torch.float32 else 4e-3,
    )


def unpack_case(name: str, backends: list[str]) -> Case:
    tensors = Tensors(SHAPES[name])
    outs = tensors.params

    def naive(targets: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        for target, part in zip(targets, parts, strict=True):
            target.add_(part)

    variants: dict[str, Call] = {
        "torch _foreach_": lambda: torch._foreach_add_(outs, tensors.grads),
    }
    variants |= by_backends(backends, "", lambda: ops.unpack_gradients(tensors.packed, outs, add=True))
    return Case(
        "unpack_gradients, add",
        name,
        tensors.total * 12,
        Loop(naive, (outs, tensors.grads)),
        variants,
        outs,
        lambda: [out.double() + grad.double() for out, grad in zip(outs, tensors.grads, strict=True)],
    )
