"""What sampling layers saves in forward and backward: time of a ResNet-18 iteration, bytes that a transformer keeps.

    jointspar bench backward [--rounds 12]

Budgets alternate within one process in a new order each round, and times are the median of rounds, ratios of ratios
within a round, so that they hold although a shared machine drifts. The step itself (pack, exchange, update) is not part
of the time. Bytes are those of the distinct storages that autograd saves for the backward pass, parameters left out,
averaged over draws. Prints a table and writes <date>-backward.json into --out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import jointspar as js
from alternate import spread
from command_line import positive
from jointspar.training.models import build_model
from results import Cell, new_record, save
from step.models import Transformer

SCHEMA = "jointspar-bench-backward/1"
BUDGETS = (1.0, 0.5, 0.25)
RESULTS = Path(__file__).with_name("results")


def iterate(model: nn.Module, optimizer: js.JointSparSGD, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of one forward and backward; then a step at learning rate 0 draws the next layers."""
    optimizer.zero_grad()
    start = time.perf_counter()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    seconds = time.perf_counter() - start
    optimizer.step()
    return seconds


def optimizer_for(model: nn.Module, budget: float) -> js.JointSparSGD:
    sampling = js.Sampling(budget=budget, distribution="uniform")
    return js.JointSparSGD(model.named_parameters(), lr=0.0, sampling=sampling, comm=js.comm.local())


def time_resnet18(rounds: int) -> dict[float, list[float]]:
    """Seconds of forward and backward at each budget, batch 32 of 32x32: the mean of four iterations of each round."""
    torch.manual_seed(0)
    batch = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    pairs = {}
    for budget in BUDGETS:
        model = build_model("resnet18", in_channels=3, num_classes=10, image_size=32)
        pairs[budget] = (model, optimizer_for(model, budget))
    seconds: dict[float, list[float]] = {budget: [] for budget in BUDGETS}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for budget in order.sample(BUDGETS, len(BUDGETS)):
            elapsed = [iterate(*pairs[budget], batch) for _ in range(4)]
            if turn:
                seconds[budget].append(statistics.mean(elapsed))
    return seconds


def saved_bytes(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of the distinct storages that one forward saves for backward, parameters and input left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch)}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return sum(storages.values())


def transformer_bytes(draws: int) -> dict[float, float]:
    """Mean bytes saved for backward at each budget, 4 sequences of 128 tokens."""
    torch.manual_seed(0)
    batch = torch.randint(0, 512, (4, 128)), torch.randint(0, 512, (512,))
    means = {}
    for budget in BUDGETS:
        model = Transformer()
        optimizer = optimizer_for(model, budget)
        counted = []
        for _ in range(draws):
            optimizer.zero_grad()
            counted.append(saved_bytes(model, batch))
            optimizer.step()
        means[budget] = statistics.mean(counted)
    return means


def cells_of(seconds: Mapping[float, Sequence[float]], saved: Mapping[float, float]) -> list[Cell]:
    """Of each budget: ms, time over that of budget 1 in the same round, bytes saved, and their share of budget 1's."""
    times = {budget: np.array(rounds) for budget, rounds in seconds.items()}
    return [
        {
            "budget": budget,
            "ms": spread(1e3 * rounds)._asdict(),
            "of_dense": spread(rounds / times[1.0])._asdict(),
            "saved_bytes": saved[budget],
            "saved_of_dense": saved[budget] / saved[1.0],
        }
        for budget, rounds in times.items()
    ]


def table(cells: Sequence[Cell]) -> str:
    """A line a budget; times are medians, ratios with the 10th and 90th percentile."""
    lines = [f"{'budget':>6}  {'resnet18 forward+backward':>40}  {'transformer, saved for backward':>32}"]
    for cell in cells:
        ratio = cell["of_dense"]
        lines.append(
            f"{cell['budget']:6.2f}  {cell['ms']['median']:12.1f} ms  "
            f"{ratio['median']:6.3f} x [{ratio['p10']:.3f}, {ratio['p90']:.3f}]"
            f"  {cell['saved_bytes'] / 2**20:18.2f} MiB  {cell['saved_of_dense']:6.3f} x"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark of a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jointspar bench backward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(quick=False)  # there is no such form
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    options = parser.parse_args(arguments)
    record = new_record("backward", sys.argv[1:] if arguments is None else arguments, options, {}, schema=SCHEMA)
    torch.set_num_threads(1)
    cells = cells_of(time_resnet18(options.rounds), transformer_bytes(4 * options.rounds))
    print(table(cells))
    print(f"wrote {save(record, cells, options.out, 'backward')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
