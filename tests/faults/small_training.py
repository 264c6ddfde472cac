"""A training of a few milliseconds a step whose sums every rank can work out, and what its tests look at."""

from __future__ import annotations

import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

import jointspar as js
from jointspar.comm.transport import Transport

# The first optimizer imports torch's compiler, which takes as long as torch itself, and nothing is compiled here.
_compiler = ModuleType("torch._dynamo")
_compiler.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
sys.modules["torch._dynamo"] = torch._dynamo = _compiler  # type: ignore[assignment]

NUM_LAYERS = 4
LAYER_SIZE = 15
EXCHANGES = ("allreduce", "ring", "two_shot")


class Numbers(random.Random):
    """Random numbers that follow from the number of an injection, so the same on all ranks."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({f"layer{k}": nn.Linear(3, 5, bias=False) for k in range(NUM_LAYERS)})


def build_optimizer(model: nn.Module, **settings: Any) -> js.JointSparSGD:
    """All ranks draw the same layers, and nothing is measured, unless the settings say otherwise."""
    settings = {"sampling": js.Sampling(strategy="shared", p_min=0.1), "exchange": "ring"} | settings
    return js.JointSparSGD(model.named_parameters(), lr=1e-3, **settings)


def slope(rank: int, step: int, layer: int) -> float:
    """The gradient of every weight of a layer: the loss is their sum times this."""
    return 1.0 + rank + 0.5 * step + 0.25 * layer


def backward(model: nn.Module, rank: int, step: int) -> None:
    sum(slope(rank, step, k) * weight.sum() for k, weight in enumerate(model.parameters())).backward()


def train_step(model: nn.Module, optimizer: js.JointSparSGD, step: int) -> None:
    optimizer.zero_grad()
    backward(model, optimizer.comm.rank, step)
    optimizer.step()


def layer_number(parameter_name: str) -> int:
    return int(parameter_name.removeprefix("layer").removesuffix(".weight"))


def report_wrong_sum(name: str, found: torch.Tensor, expected: Any) -> None:
    print(f"WRONG SUM {name}: {found.flatten()[0]} instead of {expected}\n", end="", flush=True)


def gather(comm: Transport, values: np.ndarray) -> np.ndarray:
    """Everybody's numbers of eight bytes, [world_size, n]."""
    words = np.ascontiguousarray(values).view(np.int64)
    return comm.start_headers(words, what="the test's own").wait().view(values.dtype)


def state_of(model: nn.Module, optimizer: js.JointSparSGD) -> bytes:
    """Weights, momenta, probabilities."""
    momenta = [entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values()]
    tensors = [*model.state_dict().values(), *momenta, optimizer.probabilities]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def assert_same_on_all_ranks(comm: Transport, model: nn.Module) -> None:
    weights = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()]).double().numpy()
    rows = gather(comm, weights)
    assert (rows == rows[0]).all() and np.isfinite(rows).all()
