"""What the operations are measured on: arrays, torch's ways to do the same, and a float64 check of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu.timing import Call
from bench.shapes import Shape, resnet50_shapes
from jointspar import ops

SHAPES: dict[str, list[Shape]] = {
    "resnet50": resnet50_shapes(),
    "10, resnet50": [(10,), *resnet50_shapes()],  # slices of the packed buffer begin between two vectors
    "100M": [(1000, 1000)] * 100,
    "161 x 64": [(64,)] * 161,
}
LR, MOMENTUM, WEIGHT_DECAY, TRUST_COEFFICIENT, EPS = 1e-4, 0.9, 1e-4, 1e-3, 1e-8
SCALE = 2.0  # 1 / p of a layer that is drawn half of the time


@dataclass
class Case:
    """One operation on one set of tensors."""

    operation: str
    shapes: str
    num_bytes: int  # read plus written by an implementation that touches each array once
    variants: dict[str, Call]
    written: list[torch.Tensor]
    expected: Callable[[], list[torch.Tensor]]  # what `written` is after one call, in float64
    tolerance: float = 1e-5
    floors: frozenset[str] = field(default_factory=frozenset)  # variants that do less, so they are not checked


def check(case: Case) -> None:
    """Every variant writes what float64 says. Raises AssertionError naming the variant."""
    before = [tensor.clone() for tensor in case.written]
    expected = case.expected()
    for name, call in case.variants.items():
        if name in case.floors:
            continue
        call()  # compiles
        torch._foreach_copy_(case.written, before)
        call()
        for index, (actual, wanted) in enumerate(zip(case.written, expected, strict=True)):
            error = float((actual.double() - wanted).norm() / wanted.norm())
            assert error <= case.tolerance, f"{case.operation}, {case.shapes}, {name}: array {index} is off by {error}"
        torch._foreach_copy_(case.written, before)


@contextmanager
def served_by(backend: str) -> Any:
    """Has device arrays served by one backend."""
    before = os.environ.get("JOINTSPAR_BACKEND")
    os.environ["JOINTSPAR_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["JOINTSPAR_BACKEND"]
        else:
            os.environ["JOINTSPAR_BACKEND"] = before


def by_backends(backends: list[str], name: str, call: Call) -> dict[str, Call]:
    """The call once for each backend, named "native", or "native (name)"."""

    def served(backend: str) -> Call:
        def run() -> object:
            with served_by(backend):
                return call()

        return run

    return {backend + f" ({name})" * bool(name): served(backend) for backend in backends}


def by_compiler(loop: Callable[..., object], *arguments: list[torch.Tensor]) -> dict[str, Call]:
    """The loop through torch.compile; nothing, with the reason on the screen, where that cannot compile it."""
    fast = torch.compile(loop)
    try:
        fast(*arguments)
    except Exception as error:
        print(f"torch.compile left out: {type(error).__name__}: {error}", flush=True)
        return {}
    return {"torch.compile": lambda: fast(*arguments)}


class Tensors:
    """Parameters, momenta, gradients and a packed buffer of random numbers."""

    def __init__(self, shapes: list[Shape]) -> None:
        torch.manual_seed(0)
        self.params, self.momenta, grads = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(3))
        self.sizes = [param.numel() for param in self.params]
        self.packed = torch.cat([0.01 * grad.flatten() for grad in grads])
        self.grads = [part.view(s) for part, s in zip(self.packed.split(self.sizes), shapes, strict=True)]
        self.work = [torch.empty_like(param) for param in self.params]
        self.total = sum(self.sizes)


def pack_case(wire: torch.dtype, name: str, backends: list[str], compiled: bool) -> Case:
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
        "torch loop": lambda: naive(tensors.grads, slices),
        "torch _foreach_": foreach,
        "torch mul(out=)": preallocated,
    }
    if wire == torch.float32:
        variants["torch cat(out=)"] = concatenated
    if compiled:
        variants |= by_compiler(naive, tensors.grads, slices)
    variants |= by_backends(backends, "", lambda: ops.pack_gradients(tensors.grads, SCALE, out=packed))
    return Case(
        f"pack_gradients to {str(wire).removeprefix('torch.')}",
        name,
        tensors.total * (4 + wire.itemsize),
        variants,
        [packed],
        lambda: [torch.cat([grad.flatten() for grad in tensors.grads]).double() * SCALE],
        tolerance=1e-5 if wire == torch.float32 else 4e-3,
    )


def unpack_case(name: str, backends: list[str], compiled: bool) -> Case:
    tensors = Tensors(SHAPES[name])
    outs = tensors.params

    def naive(targets: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        for target, part in zip(targets, parts, strict=True):
            target.add_(part)

    variants: dict[str, Call] = {
        "torch loop": lambda: naive(outs, tensors.grads),
        "torch _foreach_": lambda: torch._foreach_add_(outs, tensors.grads),
    }
    if compiled:
        variants |= by_compiler(naive, outs, tensors.grads)
    variants |= by_backends(backends, "", lambda: ops.unpack_gradients(tensors.packed, outs, add=True))
    return Case(
        "unpack_gradients, add",
        name,
        tensors.total * 12,
        variants,
        outs,
        lambda: [out.double() + grad.double() for out, grad in zip(outs, tensors.grads, strict=True)],
    )
