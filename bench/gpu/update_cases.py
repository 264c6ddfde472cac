"""LARS and SGD as torch does them, and as jointspar does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from bench.gpu.cases import (
    EPS,
    LR,
    MOMENTUM,
    SHAPES,
    TRUST_COEFFICIENT,
    WEIGHT_DECAY,
    Case,
    Loop,
    Tensors,
    by_backends,
    pack_case,
    unpack_case,
)
from bench.gpu.timing import Call
from jointspar import ops

List = list[torch.Tensor]
SGD = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
LARS = {**SGD, "trust_coefficient": TRUST_COEFFICIENT, "eps": EPS}


def lars_loop(params: List, momenta: List, grads: List) -> None:
    for w, u, g in zip(params, momenta, grads, strict=True):
        w_norm, g_norm = w.norm(), g.norm()
        rate = TRUST_COEFFICIENT * w_norm / (g_norm + WEIGHT_DECAY * w_norm + EPS)
        rate = torch.where((w_norm > 0) & (g_norm > 0), rate, 1.0)
        u.mul_(MOMENTUM).add_((g + WEIGHT_DECAY * w) * rate)
        w.add_(u, alpha=-LR)


def lars_steps(tensors: Tensors, is_waiting: bool) -> List:
    """Each tensor's step, adapted.

    `_foreach_` multiplies by numbers of the host in few launches, for which the host waits while the device is idle, or
    by numbers on the device in a launch for each tensor.
    """
    w_norms, g_norms = (torch.stack(torch._foreach_norm(group)) for group in (tensors.params, tensors.grads))
    rates = TRUST_COEFFICIENT * w_norms / (g_norms + WEIGHT_DECAY * w_norms + EPS)
    rates = torch.where((w_norms > 0) & (g_norms > 0), rates, 1.0)
    steps = torch._foreach_add(tensors.grads, tensors.params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(steps, rates.tolist() if is_waiting else list(rates.unbind()))
    return list(steps)


def lars_foreach(tensors: Tensors, is_waiting: bool) -> None:
    steps = lars_steps(tensors, is_waiting)
    torch._foreach_mul_(tensors.momenta, MOMENTUM)
    torch._foreach_add_(tensors.momenta, steps)
    torch._foreach_add_(tensors.params, tensors.momenta, alpha=-LR)


def lars_fused(tensors: Tensors, is_waiting: bool) -> None:
    """The last three passes in one, by what torch.optim.SGD(fused=True) calls."""
    steps = lars_steps(tensors, is_waiting)
    torch._fused_sgd_(
        tensors.params, steps, tensors.momenta, lr=LR, momentum=MOMENTUM, weight_decay=0.0, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


def sgd_loop(params: List, momenta: List, grads: List) -> None:
    for w, u, g in zip(params, momenta, grads, strict=True):
        u.mul_(MOMENTUM).add_(g + WEIGHT_DECAY * w)
        w.add_(u, alpha=-LR)


def sgd_foreach(tensors: Tensors) -> None:
    torch._foreach_mul_(tensors.momenta, MOMENTUM)
    torch._foreach_add_(tensors.momenta, tensors.grads)
    torch._foreach_add_(tensors.momenta, tensors.params, alpha=WEIGHT_DECAY)
    torch._foreach_add_(tensors.params, tensors.momenta, alpha=-LR)


def sgd_fused_with_norms(tensors: Tensors) -> None:
    """One pass, and the gradients' norms, which ours returns."""
    torch._fused_sgd_(
        tensors.params, tensors.grads, tensors.momenta, **SGD, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False,
    )  # fmt: skip
    torch._foreach_norm(tensors.grads)


def fused_sgd(tensors: Tensors) -> Call:
    """torch.optim.SGD(fused=True): one pass and no norms, so a floor of LARS in torch."""
    params = [torch.nn.Parameter(param) for param in tensors.params]
    for param, grad in zip(params, tensors.grads, strict=True):
        param.grad = grad
    return torch.optim.SGD(params, **SGD, fused=True).step


def in_float64(tensors: Tensors, is_lars: bool) -> List:
    params, momenta = [], []
    for w, u, g in zip(tensors.params, tensors.momenta, tensors.grads, strict=True):
        w, u, g = w.double(), u.double(), g.double()
        rate = TRUST_COEFFICIENT * w.norm() / (g.norm() + WEIGHT_DECAY * w.norm() + EPS) if is_lars else 1.0
        momenta.append(MOMENTUM * u + rate * (g + WEIGHT_DECAY * w))
        params.append(w - LR * momenta[-1])
    return [*params, *momenta]


def lars_case(name: str, backends: list[str]) -> Case:
    tensors = Tensors(SHAPES[name])
    variants: dict[str, Call] = {
        "torch _foreach_ (rates on the host)": lambda: lars_foreach(tensors, is_waiting=True),
        "torch _foreach_ (rates on the device)": lambda: lars_foreach(tensors, is_waiting=False),
        "torch fused, adapted (rates on the host)": lambda: lars_fused(tensors, is_waiting=True),
        "torch fused, adapted (rates on the device)": lambda: lars_fused(tensors, is_waiting=False),
        "torch SGD fused (floor)": fused_sgd(tensors),
    }
    both = ops.squared_norms(tensors.params).sqrt(), ops.squared_norms(tensors.grads).sqrt()
    for label, norms in (
        ("norms carried", both),
        ("gradient norms measured", (both[0], None)),
        ("all norms measured", (None, None)),
    ):
        variants |= by_backends(backends, label, lars_call(tensors, *norms))
    return Case(
        "lars_update", name, tensors.total * 20, Loop(lars_loop, (tensors.params, tensors.momenta, tensors.grads)),
        variants, [*tensors.params, *tensors.momenta],
        lambda: in_float64(tensors, is_lars=True), floors=frozenset({"torch SGD fused (floor)"}),
    )  # fmt: skip


def lars_call(tensors: Tensors, param_norms: torch.Tensor | None, grad_norms: torch.Tensor | None) -> Call:
    """The norms stay those of the first call: LR is small, and a value more or less does not change the work."""
    return lambda: ops.lars_update(
        tensors.params, tensors.momenta, tensors.packed, **LARS, adapt=[True] * len(tensors.params),
        param_norms=param_norms, grad_norms=grad_norms,
    )  # fmt: skip


def sgd_case(name: str, backends: list[str]) -> Case:
    tensors = Tensors(SHAPES[name])
    variants: dict[str, Call] = {
        "torch _foreach_": lambda: sgd_foreach(tensors),
        "torch fused, and norms": lambda: sgd_fused_with_norms(tensors),
        "torch SGD fused (floor)": fused_sgd(tensors),
    }
    variants |= by_backends(
        backends, "", lambda: ops.sgd_update(tensors.params, tensors.momenta, tensors.packed, **SGD)
    )
    return Case(
        "sgd_update", name, tensors.total * 20, Loop(sgd_loop, (tensors.params, tensors.momenta, tensors.grads)),
        variants, [*tensors.params, *tensors.momenta],
        lambda: in_float64(tensors, is_lars=False), floors=frozenset({"torch SGD fused (floor)"}),
    )  # fmt: skip


def all_cases(backends: list[str], names: Iterable[str] = SHAPES) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and makers, so that the memory of one case is free for the next."""
    makers = {
        "pack_gradients to float32": partial(pack_case, torch.float32),
        "pack_gradients to bfloat16": partial(pack_case, torch.bfloat16),
        "unpack_gradients, add": unpack_case,
        "lars_update": lars_case,
        "sgd_update": sgd_case,
    }
    for name in names:
        for operation, make in makers.items():
            yield f"{operation}, {name}", partial(make, name, backends)
