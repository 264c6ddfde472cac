"""Training iterations with a dense step and with JointSpar at several budgets: time and peak memory.

The dense step is torch's fused SGD, in one process: no exchange, and no norms of layers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

import jointspar as js
from bench.gpu.launches import waits
from bench.gpu.models import WORKLOADS, Workload
from bench.gpu.report import Measurement, Record, summary

WARM_UP = 10
BATCHES = {"resnet50": 128, "transformer": 16}
BUDGETS = (1.0, 0.5, 0.25)


def measure_training(*, iterations: int) -> Iterator[Measurement]:
    """One per network and optimizer; the dense step comes first and last, which shows the drift between."""
    for network in WORKLOADS:
        for name in ("dense", *(f"budget {budget}" for budget in BUDGETS), "dense again"):
            yield Measurement(f"{network}, {name}", partial(records_of, network, name, iterations))


def records_of(network: str, name: str, iterations: int) -> Iterator[Record]:
    gc.collect()  # an optimizer before this one may be a part of a cycle
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
    optimizer, loss = optimizer_of(workload, name), torch.zeros(())

    def iterate() -> torch.cuda.Event:
        nonlocal loss
        optimizer.zero_grad()
        value = workload.loss()
        value.backward()
        optimizer.step()
        loss = value.detach()
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        return end

    for _ in range(WARM_UP):
        iterate()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ends = [iterate() for _ in range(iterations + 1)]
    torch.cuda.synchronize()
    milliseconds = [before.elapsed_time(after) for before, after in pairwise(ends)]
    record = {"milliseconds": summary(milliseconds), "peak_bytes": torch.cuda.max_memory_allocated()}
    stats = getattr(optimizer, "stats", None)
    record |= {"loss": float(loss), "skipped_steps": 0 if stats is None else stats.skipped_steps}
    return record | {"waits": waits(lambda: [iterate() for _ in range(3)])}
