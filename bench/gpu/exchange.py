"""Time to sum vectors in CUDA memory over ranks: by an MPI that takes such memory, and through pinned host memory.

Ranks may share a card. `python -m bench.gpu --parts exchange` starts it on 2 ranks; the results become a part of those
in its folder. Exit code 1 where this MPI does not take device memory, 2 where there is no GPU, or one rank.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import jointspar as js
from bench.gpu import environment, report
from bench.gpu.__main__ import fill, open_results
from jointspar.comm import cuda_mpi
from jointspar.comm.transport import Transport
from jointspar.step.exchange import Exchange, Slices, candidates
from jointspar.step.exchange.staged import Staged

ROUNDS = {100_000: 1000, 1_048_576: 100, 25_557_032: 20}  # by elements; the last are ResNet-50's
ON_DEVICE = "allreduce of device memory"


def ways_of(comm: Transport) -> dict[str, Exchange]:
    """By name, each staged and, where the transport takes device memory, allreduce as it is."""
    ways: dict[str, Exchange] = {}
    if comm.agree_on_cuda():
        ways[ON_DEVICE] = candidates("allreduce", comm, torch.float32)["allreduce"]
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


def records_of(comm: Transport, ways: dict[str, Exchange], size: int, device: str) -> Iterator[report.Record]:
    for name, milliseconds in measure(comm, ways, size, ROUNDS[size], device).items():
        times = report.summary(milliseconds)
        yield {"way": name, "megabytes": 4e-6 * size, "milliseconds": times, "right_sums": len(milliseconds)}


def why_staged_only(ways: dict[str, Exchange]) -> Iterator[report.Failure]:
    if ON_DEVICE not in ways:
        yield report.Failure(ON_DEVICE, f"not taken: {cuda_mpi.decide().reason}")


def measure_sums(comm: Transport, out: Path, device: str = "cuda") -> int:
    """The exit code of this rank, of which the first writes the results. Collective."""
    ways = ways_of(comm)
    measurements = [report.Measurement(f"{comm.world_size} ranks of {comm.name}", partial(why_staged_only, ways))]
    measurements += [
        report.Measurement(f"{size} elements", partial(records_of, comm, ways, size, device)) for size in ROUNDS
    ]
    if comm.rank > 0:
        for _, make in measurements:
            list(make())
        return 0
    results, save = open_results(out, environment.describe("bench.gpu.exchange"))
    fill(results, "exchange", measurements, save, goes_on=False)
    print(report.markdown(results), *save(), sep="\n")
    return 1 if any(what.startswith("exchange: ") for what in results["failed"]) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    comm = js.comm.world()
    if comm.world_size == 1:
        print("one rank sums nothing: start it as mpirun -n 2 python -m bench.gpu.exchange ...", file=sys.stderr)
        return 2
    torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    return measure_sums(comm, options.out)


if __name__ == "__main__":
    sys.exit(main())
