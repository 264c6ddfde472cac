"""Training iterations with a dense step and with JointSpar at several budgets: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch

import jointspar as js
from bench.gpu.models import WORKLOADS, Workload
from bench.gpu.report import Record
from bench.gpu.timing import summary

WARM_UP = 10
BATCHES = {"resnet50": 128, "transformer": 16}
BUDGETS = (1.0, 0.5, 0.25)


def measure_training(*, iterations: int) -> Iterator[Callable[[], Iterator[Record]]]:
    """One per network and optimizer; the dense step comes first and last, which shows the drift between."""
    for network in WORKLOADS:
        for name in ("dense", *(f"budget {budget}" for budget in BUDGETS), "dense again"):
            yield partial(records_of, network, name, iterations)


def records_of(network: str, name: str, iterations: int) -> Iterator[Record]:
    torch.cuda.empty_cache()
    batch = BATCHES[network]
    record = {"network": network, "batch": batch, "optimizer": name}
    yield record | train(WORKLOADS[network]("cuda", batch), name, iterations)


def optimizer_of(workload: Workload, name: str) -> torch.optim.Optimizer:
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    if name.startswith("dense"):
        return torch.optim.SGD(workload.model.parameters(), **settings, fused=True)
    sampling = js.Sampling(budget=float(name.removeprefix("budget ")), lag=1)
    return js.JointSparLARS(workload.model.named_parameters(), sampling=sampling, **settings)


def train(workload: Workload, name: str, iterations: int) -> Record:
    """Milliseconds per iteration by events at their ends, so queueing on the host counts where the device waits."""
    optimizer = optimizer_of(workload, name)
    ends = []
    for index in range(WARM_UP + iterations + 1):
        if index == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        workload.loss().backward()
        optimizer.step()
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        ends.append(end)
    torch.cuda.synchronize()
    ends = ends[WARM_UP:]
    milliseconds = [before.elapsed_time(after) for before, after in pairwise(ends)]
    return {"milliseconds": summary(milliseconds), "peak_bytes": torch.cuda.max_memory_allocated()}
