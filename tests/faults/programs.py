"""What every rank of a fault case runs: a training whose sums are known, with one fault in it."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from typing import NoReturn

import torch
from torch import nn

import jointspar as js

STEPS = 8
NUM_LAYERS = 4
PHASES = ("start", "built", "forward", "backward", "exchange", "update", "save")


class Fault:
    """FAULT at a phase, step and rank that follow from FAULT_SEED."""

    def __init__(self) -> None:
        self.kind = os.environ["FAULT"]
        self.random = random.Random(int(os.environ["FAULT_SEED"]))
        self.rank = self.random.randrange(int(os.environ["FAULT_RANKS"]))
        self.phase = self.random.choice(PHASES)
        self.step = 3 if self.phase == "save" else self.random.randrange(STEPS)
        self.layer = self.random.randrange(NUM_LAYERS)

    def is_on(self, rank: int, kind: str) -> bool:
        return self.kind == kind and rank == self.rank

    def at(self, rank: int, phase: str, step: int = 0) -> None:
        is_now = phase == self.phase and (step == self.step or phase in ("start", "built"))
        if rank != self.rank or not is_now or self.kind not in ACTIONS:
            return
        print(f"FAULT {time.time()}\n", end="", flush=True)
        ACTIONS[self.kind]()


def kill_soon() -> None:
    """In the middle of whatever comes then."""
    threading.Timer(random.random() * 0.05, os.kill, [os.getpid(), signal.SIGKILL]).start()


def raise_an_error() -> NoReturn:
    raise ZeroDivisionError("the fault")


def run_out_of_memory() -> NoReturn:
    raise MemoryError("the fault")


def fork_and_use_the_transport() -> None:
    child = os.fork()
    if child == 0:
        try:
            js.comm.world().allreduce(torch.ones(1), what="in the child")
        except js.errors.JointSparError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


ACTIONS = {
    "kill": kill_soon,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": raise_an_error,
    "memory": run_out_of_memory,
    "exit": lambda: sys.exit(0),
    "os-exit": lambda: os._exit(0),
    "fork": fork_and_use_the_transport,
}


def slope(rank: int, step: int, layer: int) -> float:
    """The gradient of every weight of a layer: the loss is their sum times this."""
    return 1.0 + rank + 0.5 * step + 0.25 * layer


def build(fault: Fault, rank: int) -> tuple[nn.Module, js.JointSparSGD]:
    torch.manual_seed(0)
    names = [f"layer{k}" for k in range(NUM_LAYERS)]
    if fault.is_on(rank, "layers"):  # of the same sizes
        names[fault.layer] = "other"
    model = nn.ModuleDict({name: nn.Linear(3, 5, bias=False) for name in names})
    sampling = js.Sampling(strategy="shared", seed=int(fault.is_on(rank, "seed")))
    wire = "float64" if fault.is_on(rank, "dtype") else None
    optimizer = js.JointSparSGD(model.named_parameters(), lr=1e-3, sampling=sampling, wire_dtype=wire, check_every=2)
    return model, optimizer


def damage(fault: Fault, rank: int, optimizer: js.JointSparSGD, model: nn.Module, step: int) -> None:
    """Differences that begin in mid-training."""
    if step != 2:
        return
    weight = list(model.parameters())[fault.layer]
    if fault.is_on(rank, "bit"):
        weight.data.view(torch.int32)[0, 0] ^= 1 << 21
    if fault.is_on(rank, "probabilities"):
        optimizer._pipeline.distribution.norm_ema[fault.layer] += 1.0
        optimizer._pipeline.distribution.norm_count[fault.layer] += 1
    values = {"nan": float("nan"), "inf": float("inf")}
    if fault.kind in values and rank == fault.rank and weight.grad is not None:
        weight.grad[0, 0] = values[fault.kind]
    if fault.kind == "infs" and weight.grad is not None:  # they sum to a NaN
        weight.grad[0, 0] = float("inf") * (-1) ** rank


def check_sums(optimizer: js.JointSparSGD, probabilities: torch.Tensor, step: int, world_size: int) -> None:
    """mean_grads against the strategy's formula, of slopes that every rank can work out."""
    for name, mean in optimizer.mean_grads.items():
        layer = [layer.name for layer in optimizer.layers].index(name.removesuffix(".weight"))
        expected = (
            sum(slope(rank, step, layer) for rank in range(world_size)) / world_size / float(probabilities[layer])
        )
        if mean.isfinite().all() and not torch.allclose(mean, torch.full_like(mean, expected), rtol=1e-5):
            print(f"WRONG SUM {name} at step {step}: {mean.flatten()[0]} instead of {expected}\n", end="", flush=True)


def train() -> None:
    fault = Fault()
    comm = js.comm.world()
    rank = comm.rank
    fault.at(rank, "start")
    model, optimizer = build(fault, rank)
    if fault.kind in ("seed", "dtype", "layers"):
        raise AssertionError("the difference was not noticed")
    fault.at(rank, "built")
    num_batches = STEPS - 3 if fault.is_on(rank, "loader") or fault.is_on(rank, "even") else STEPS
    steps = optimizer.even_batches(range(num_batches)) if fault.kind == "even" else range(num_batches)
    for step in steps:
        train_step(fault, rank, model, optimizer, step)
        if step == 3:
            fault.at(rank, "save", step)
            js.checkpoint.save(os.environ["FAULT_FOLDER"], model=model, optimizer=optimizer)
    optimizer.finish()
    if fault.kind in ("nan", "inf", "infs"):
        assert optimizer.stats.skipped_steps <= 1
    print(f"COMPLETE rank {rank}\n", end="", flush=True)


def train_step(fault: Fault, rank: int, model: nn.Module, optimizer: js.JointSparSGD, step: int) -> None:
    fault.at(rank, "forward", step)
    optimizer.zero_grad()
    probabilities = optimizer.probabilities
    loss = sum(slope(rank, step, k) * weight.sum() for k, weight in enumerate(model.parameters()))
    fault.at(rank, "backward", step)
    loss.backward()
    damage(fault, rank, optimizer, model, step)
    fault.at(rank, "exchange", step)
    optimizer.synchronize()
    check_sums(optimizer, probabilities, step, optimizer.comm.world_size)
    fault.at(rank, "update", step)
    optimizer.step()
