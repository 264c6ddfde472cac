"""Time to sum vectors in CUDA memory over ranks: by an MPI that takes such memory, and through pinned host memory.

`mpirun -n 2 python -m bench.gpu.exchange --out FILE.json`, where ranks may share a card; from the tree, after
`make test-gpu` or `make bench-gpu` built it. Exit code 2 where there is no GPU, or one rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import jointspar as js
from bench.gpu import environment
from bench.gpu.timing import summary
from jointspar.comm.transport import Transport
from jointspar.step.exchange import Exchange, Slices, candidates
from jointspar.step.exchange.staged import Staged

SIZES = (65_536, 1_048_576, 25_557_032)  # elements; the last are ResNet-50's


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def ways_of(comm: Transport) -> dict[str, Exchange]:
    """By name, each staged and, where the transport takes device memory, allreduce as it is."""
    ways: dict[str, Exchange] = {}
    if comm.agree_on_cuda():
        ways["allreduce of device memory"] = candidates("allreduce", comm, torch.float32)["allreduce"]
    staged = {f"{name}, staged": Staged(way) for name, way in candidates("auto", comm, torch.float32).items()}
    return ways | staged


def measure(
    comm: Transport, ways: dict[str, Exchange], size: int, rounds: int, device: str = "cuda"
) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank in each round, by way; the ways alternate, and each sum is checked."""
    slices = Slices(np.array([size]), np.ones((comm.world_size, 1), dtype=bool))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    parts = [torch.randn(size, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.world_size)]
    own, expected = parts[comm.rank].to(device), torch.stack(parts).sum(dim=0).to(device)
    packed, times = torch.empty_like(own), defaultdict(list)
    for index in range(-2, rounds):  # the first ones allocate
        for name, exchange in ways.items():
            packed.copy_(own)
            wait()
            comm.start_headers(np.zeros(1, dtype=np.int64), what="start").wait()
            began = time.perf_counter_ns()
            exchange(comm, packed, what=name, slices=slices)
            wait()
            nanoseconds = np.array([time.perf_counter_ns() - began])
            torch.testing.assert_close(packed, expected, msg=lambda text, name=name: f"{name}: {text}")
            slowest = comm.start_headers(nanoseconds, what="time").wait().max()
            if index >= 0:
                times[name].append(float(slowest) / 1e6)
    return times


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    comm = js.comm.world()
    if comm.world_size == 1:
        print("one rank sums nothing: start it as mpirun -n 2 python -m bench.gpu.exchange ...", file=sys.stderr)
        return 2
    torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    ways = ways_of(comm)
    results = {"environment": environment.describe() | {"transport": comm.name, "ranks": comm.world_size}, "sums": []}
    for size in SIZES:
        for name, milliseconds in measure(comm, ways, size, options.rounds).items():
            record = {"way": name, "megabytes": 4e-6 * size, "milliseconds": summary(milliseconds)}
            results["sums"].append(record)
            if comm.rank == 0:
                print(json.dumps(record), flush=True)
    if comm.rank == 0:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
