"""Parameters, momenta and gradients for the two updates, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from jointspar import ops
from operation import TOLERANCE, Case, Traffic, assert_close

LR, MOMENTUM, WEIGHT_DECAY, TRUST_COEFFICIENT, EPS = 0.1, 0.9, 1e-4, 0.02, 1e-8
SGD = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
LARS = {**SGD, "trust_coefficient": TRUST_COEFFICIENT, "eps": EPS}


# The rate comes from norms, and torch's float32 norms of millions of values are not exact; bfloat16 gradients may be
# rounded once more on their way into the float32 momentum.
MOMENTUM_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}


class UpdateProblem:
    """One state of an optimizer, with a work list and the norms that a run carries along.

    uses_lars: gradients are scaled by the trust ratio of their tensor; else the ratio is 1.
    """

    def __init__(self, case: Case, *, uses_lars: bool) -> None:
        torch.manual_seed(0)
        self.uses_lars = uses_lars
        self.params = [torch.randn(shape).to(case.torch_dtype) for shape in case.shapes]
        self.momenta = [0.1 * torch.randn(shape) for shape in case.shapes]
        self.grads = [(0.01 * torch.randn(shape)).to(case.torch_dtype) for shape in case.shapes]
        self.work = [torch.zeros(shape) for shape in case.shapes]  # float32: where peers form a gradient's step
        self.scratch = torch.zeros(max(param.numel() for param in self.params))  # a tensor's, used again by the next
        self.packed_grads = torch.cat([grad.flatten() for grad in self.grads])
        self.adapt = np.ones(len(self.params), dtype=bool)
        self.param_norms = np.sqrt(ops.squared_norms(self.params))
        self.grad_norms = np.sqrt(ops.squared_norms(self.grads))
        self.flat = [
            tuple(array.view(-1) for array in arrays)
            for arrays in zip(self.params, self.momenta, self.grads, strict=True)
        ]
        self.inputs = [*self.grads, self.packed_grads]
        element_bytes = self.params[0].itemsize
        num_elements = self.packed_grads.numel()
        self.traffic: Traffic | None = Traffic("update", num_elements, element_bytes, element_bytes)
        self._dtype = case.dtype
        self._first_params = [param.clone() for param in self.params]
        self._first_momenta = [momentum_buffer.clone() for momentum_buffer in self.momenta]

    def reset(self) -> None:
        torch._foreach_copy_(self.params, self._first_params)
        torch._foreach_copy_(self.momenta, self._first_momenta)

    def check(self, call: Callable[[], Any]) -> None:
        call()
        momenta, params = self._expected
        assert_close("momenta", self.momenta, momenta, MOMENTUM_TOLERANCE[self._dtype])
        assert_close("params", self.params, params, TOLERANCE[self._dtype])

    @cached_property
    def _expected(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Momenta and parameters after one update, float64."""
        momenta, params = [], []
        for param, velocity, grad in zip(self._first_params, self._first_momenta, self.grads, strict=True):
            w, g = param.double(), grad.double()
            step = g.add(w, alpha=WEIGHT_DECAY)
            if self.uses_lars:
                step *= TRUST_COEFFICIENT * w.norm() / (g.norm() + WEIGHT_DECAY * w.norm() + EPS)
            momenta.append(velocity.double().mul_(MOMENTUM).add_(step))
            params.append(w.add_(momenta[-1], alpha=-LR))
        return momenta, params


def fused_sgd(
    params: list[torch.Tensor],
    momenta: list[torch.Tensor],
    grads: list[torch.Tensor],
    *,
    weight_decay: float = WEIGHT_DECAY,
) -> None:
    """What torch.optim.SGD(fused=True) calls; all arrays have one dtype."""
    torch._fused_sgd_(
        params, grads, momenta, lr=LR, momentum=MOMENTUM, weight_decay=weight_decay, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False,
    )  # fmt: skip
