"""Bytes and time of each exchange for what the strategies compute; run as `mpirun -n 3 python bench/step/exchange.py`.

Under torchrun too. Bytes are what all ranks handed to the transport (of allreduce: the buffer's), as a part of what a
ring sends of all layers. Times are medians of the slowest rank, over draws, the exchanges alternating.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np
import torch

import jointspar as js
from jointspar.comm.transport import Transport
from jointspar.step.exchange import Slices, candidates
from jointspar.step.layers import Layers, group_layers
from jointspar.step.packing import Packer
from jointspar.step.sampling import draw_layers
from jointspar.training.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    comm = js.comm.world()
    torch.set_num_threads(1)
    layers = group_layers(build_model(options.model, 3, 10, 32, seed=0).named_parameters())
    packer = Packer(layers.parameters, layers.names, None)
    dense = packer.dense_bytes(np.ones(len(layers.parameters), dtype=bool))
    if comm.rank == 0:
        print(f"{options.model}, {dense / 1e6:.1f} MB, budget {options.budget}, {comm.world_size} ranks, {comm.name}")
    for strategy in ("shared", "stratified", "independent"):
        sampling = js.Sampling(budget=options.budget, strategy=strategy)
        figures = measure(comm, layers, packer, sampling, options.draws)
        ring_of_all = 2 * (comm.world_size - 1) * dense * options.draws
        for name, (sent, milliseconds) in figures.items():
            if comm.rank == 0:
                print(f"{strategy:12} {name:10} {sent / ring_of_all:6.3f} of the bytes {milliseconds:8.2f} ms")


def measure(
    comm: Transport, layers: Layers, packer: Packer, sampling: js.Sampling, num_draws: int
) -> dict[str, tuple[int, float]]:
    """Bytes that all ranks sent, and the median time in ms, by name of the exchange."""
    ways = candidates("auto", comm, packer.wire_dtype)
    sent, times = defaultdict(int), defaultdict(list)
    for draw in range(-1, num_draws):  # the first one warms up
        slices = draw_slices(layers, packer, sampling, draw + 1, comm.world_size)
        packed = torch.zeros(int(slices.sizes.sum()), dtype=packer.wire_dtype)
        for name, exchange in ways.items():
            comm.start_headers(np.zeros(1, dtype=np.int64), what="start").wait()
            before, began = comm.bytes_sent, time.perf_counter_ns()
            exchange(comm, packed, what=name, slices=slices)
            own = np.array([comm.bytes_sent - before, time.perf_counter_ns() - began])
            rows = comm.start_headers(own, what="figures").wait()
            if draw >= 0:
                sent[name] += int(rows[:, 0].sum())
                times[name].append(rows[:, 1].max() / 1e6)
    return {name: (sent[name], float(np.median(times[name]))) for name in ways}


def draw_slices(layers: Layers, packer: Packer, sampling: js.Sampling, step: int, world_size: int) -> Slices:
    """What the ranks compute in one step of a run whose probabilities are all alike."""
    probabilities = np.full(layers.num_layers, sampling.budget)
    plan = np.stack([
        draw_layers(probabilities, sampling, sizes=layers.sizes, step=step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ])  # fmt: skip
    layout = packer.layout(layers.wanted_parameters(plan))
    return Slices(layout.sizes, layout.computed)


if __name__ == "__main__":
    main()
