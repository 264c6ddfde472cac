"""A packed buffer beside the gradients of every second tensor: what a budget of one half packs in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from operation import TOLERANCE, Case, Traffic, assert_close

WIRE_DTYPES = ("float32", "bfloat16", "float16")
SCALE = 2.0  # 1 / p of a layer that is drawn half of the time
NORM_TOLERANCE = 2e-3  # torch's float32 norm of 17 million values is off by 6.5e-4; tests hold ours to 1e-6


class PackedProblem:
    """float32 gradients and a packed buffer of the case's dtype. Subclasses say what is written and what is right."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.dtype = case.dtype
        self.grads = [torch.randn(shape) for shape in case.shapes[::2]]
        self.flat_grads = [grad.view(-1) for grad in self.grads]
        self.sizes = [grad.numel() for grad in self.grads]
        self.packed = torch.cat(self.flat_grads).to(case.torch_dtype)
        self.slices = list(self.packed.split(self.sizes))
        self.views = [part.view_as(grad) for part, grad in zip(self.slices, self.grads, strict=True)]
        self.num_elements = self.packed.numel()


class PackProblem(PackedProblem):
    """Writes `packed` and finds the norms. packed_float is where peers scale before they cast."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.inputs = self.grads
        self.scales = np.full(len(self.grads), SCALE)
        self.packed_float = torch.zeros(self.num_elements)
        self.float_slices = list(self.packed_float.split(self.sizes))
        self.traffic: Traffic | None = Traffic("copy", self.num_elements, 4, self.packed.itemsize)

    def reset(self) -> None:
        self.packed.zero_()

    def check(self, call: Callable[[], Any]) -> None:
        """`call` returns (packed, norms or squared norms): peers find the former, ours the latter."""
        packed, norms = call()
        assert_close("packed", packed.split(self.sizes), [SCALE * grad.double() for grad in self.flat_grads],
                     TOLERANCE[self.dtype])  # fmt: skip
        assert_close("norms", [norms], [self.expected_norms()], NORM_TOLERANCE)

    def expected_norms(self) -> torch.Tensor:
        return torch.stack([grad.double().norm() for grad in self.flat_grads])


class UnpackProblem(PackedProblem):
    """Writes `outs`, float32, in the gradients' shapes."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.inputs = [self.packed]
        self.outs = [torch.zeros_like(grad) for grad in self.grads]
        self.flat_outs = [out.view(-1) for out in self.outs]
        self.traffic: Traffic | None = Traffic("copy", self.num_elements, self.packed.itemsize, 4)

    def reset(self) -> None:
        torch._foreach_zero_(self.outs)

    def check(self, call: Callable[[], Any]) -> None:
        call()
        assert_close("outs", self.outs, [view.double() for view in self.views], 0.0)


class AddProblem(PackedProblem):
    """Adds `packed` to `total`."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.inputs = [self.packed]
        self.total = torch.randn(self.num_elements).to(self.packed.dtype)
        self._first_total = self.total.clone()
        itemsize = self.packed.itemsize
        self.traffic: Traffic | None = Traffic("add", self.num_elements, itemsize, itemsize)

    def reset(self) -> None:
        self.total.copy_(self._first_total)

    def check(self, call: Callable[[], Any]) -> None:
        call()
        assert_close("total", [self.total], [self._first_total.double() + self.packed.double()], TOLERANCE[self.dtype])
