"""One rank of `jointspar bench step`: times methods in alternation, or records a loss curve; rank 0 writes a JSON file.

    mpirun -n 2 python -m step.worker --model resnet18 --out FILE.json          (bench/ in PYTHONPATH)
    mpirun -n 2 python -m step.worker --loss-curve stratified_0.5 --iterations 500 --out FILE.json

Each MPI rank is also a rank of a gloo group, which meets at rank 0's address: MASTER_ADDR, default 127.0.0.1. Gloo uses
the network interface that --interface names, and its bytes are what that interface sent. "lo" is taken to be shared by
all ranks, any other to belong to one rank alone, as in a network namespace.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import interface_counters
import jointspar as js
from jointspar.comm.hashing import stable_hash
from jointspar.training.config import DATASETS, REFERENCE_BATCH
from jointspar.training.data.batches import ShardedBatches, StreamedBatches, training_batches
from jointspar.training.data.datasets import load_dataset
from jointspar.training.models import build_model
from step.methods import METHODS, PHASES, Iteration, Ranks, Setting
from step.models import CASES, Batch, make_batch, make_model

WARM_UP = 3  # iterations: DDP orders its buckets after the first, PowerSGD starts with the third
TIMED_LR = 1e-3
DEADLINE = timedelta(seconds=120)
CURVE_MODEL, CURVE_BATCH = "resnet20", 64


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    ranks = connect(options.interface)
    result = loss_curve(ranks, options) if options.loss_curve else time_methods(ranks, options)
    result |= {
        "world_size": ranks.world_size,
        "threads": options.threads,
        "interface": options.interface,
        "transports": {"jointspar": ranks.comm.name, "peers": "torch.distributed: gloo"},
    }
    if ranks.rank == 0:
        options.out.write_text(json.dumps(result) + "\n")
    ranks.gloo.close()
    dist.destroy_process_group()


def connect(interface: str) -> Ranks:
    """The launcher's ranks, and a gloo group of the same ranks over `interface`. Collective."""
    comm = js.comm.world()
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store, port = None, 0
    if comm.rank == 0:
        store = dist.TCPStore(host, 0, comm.world_size, is_master=True, timeout=DEADLINE, wait_for_workers=False)
        port = store.port
    port = int(comm.start_headers(np.array([port]), what="port of the store").wait()[0, 0])
    if store is None:
        store = dist.TCPStore(host, port, comm.world_size, is_master=False, timeout=DEADLINE)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.world_size, timeout=DEADLINE)
    assert dist.group.WORLD is not None
    return Ranks(comm, dist.group.WORLD, js.comm.torch_dist())


def time_methods(ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which each method is built, warmed up, timed and closed, in a new order each time."""
    case = CASES[options.model]
    batch = make_batch(case, ranks.rank)
    order = np.random.default_rng(0)
    samples = []
    for turn in range(options.rounds):
        for index in order.permutation(len(options.methods)):
            name = options.methods[index]
            method = METHODS[name].build(Setting(make_model(case), ranks, TIMED_LR, seed=turn))
            figures = time_iterations(method, batch, options.iterations, options.interface)
            check_replicas(method, name)
            method.close()
            del method
            gc.collect()
            samples.append({"round": turn, "method": name, **figures})
            report(ranks, f"done {name}")
    return {"case": str(case), "iterations": options.iterations, "rounds": options.rounds, "samples": samples}


def time_iterations(method: Iteration, batch: Batch, iterations: int, interface: str) -> dict[str, Any]:
    """Means over iterations of the slowest rank's phases in ms, and of the bytes per rank and iteration.

    sent_bytes: as the transport counts them; None for peers. interface_bytes: as the interface does, headers included.
    exchange: that of the last iteration.
    """
    ranks = method.setting.ranks
    for _ in range(WARM_UP):
        method.run(batch)
    gc.collect()
    gc.disable()
    dist.barrier(ranks.group)
    before = method.sent_bytes, interface_counters.sent_bytes(interface)
    rows = [list(method.run(batch).values()) for _ in range(iterations)]
    dist.barrier(ranks.group)
    after = method.sent_bytes, interface_counters.sent_bytes(interface)
    gc.enable()
    sent = np.nan if before[0] is None or after[0] is None else after[0] - before[0]
    own = np.array([*np.sum(rows, axis=0), sent, after[1] - before[1]])
    of_ranks = gather(own / iterations, ranks)
    slowest = of_ranks[of_ranks[:, : len(PHASES)].sum(axis=1).argmax(), : len(PHASES)]
    sent_bytes, interface_bytes = of_ranks[:, -2].mean(), of_ranks[:, -1].mean()
    if interface == interface_counters.SHARED_INTERFACE:
        interface_bytes /= ranks.world_size  # every rank saw the bytes of all
    return {
        "ms": float(slowest.sum()),
        "phases": dict(zip(PHASES, slowest.tolist(), strict=True)),
        "sent_bytes": None if np.isnan(sent_bytes) else float(sent_bytes),
        "interface_bytes": float(interface_bytes),
        "exchange": method.exchange,
    }


def check_replicas(method: Iteration, name: str) -> None:
    """Raise AssertionError where the loss is not finite or ranks hold different weights. Collective."""
    digest = stable_hash([param.detach() for param in method.setting.parameters])
    own = np.array([digest, bool(method.loss.isfinite())], dtype=np.int64)
    rows = method.setting.ranks.comm.start_headers(own, what="check of the replicas").wait()
    assert rows[:, 1].all(), f"{name}: the loss is not finite"
    assert (rows == rows[0]).all(), f"{name}: the ranks hold different weights"


def loss_curve(ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Train one method on its shards of a real data set.

    losses: of every iteration, averaged over the ranks. seconds: when it ended, since the start, loading included.
    """
    dataset = load_dataset(options.dataset, options.data_dir)
    batches = training_batches(dataset.train, CURVE_BATCH, ranks.rank, ranks.world_size, options.seed)
    its = dataset.properties
    model = build_model(CURVE_MODEL, its.in_channels, its.num_classes, its.image_size, seed=options.seed)
    lr = options.base_lr * ranks.world_size * CURVE_BATCH / REFERENCE_BATCH
    method = METHODS[options.loss_curve].build(Setting(model, ranks, lr, seed=options.seed))
    losses, ends = [], []
    began = time.perf_counter()
    for batch, _ in zip(endless(batches), range(options.iterations), strict=False):
        method.run(batch)
        losses.append(method.loss.item())
        ends.append(time.perf_counter() - began)
        report(ranks, f"done {len(losses)}")
    check_replicas(method, options.loss_curve)
    method.close()
    of_ranks = gather(np.array(losses), ranks)
    return {
        "method": options.loss_curve,
        "case": f"{CURVE_MODEL} on {options.dataset}, {CURVE_BATCH} images a rank",
        "lr": lr,
        "seed": options.seed,
        "losses": of_ranks.mean(axis=0).tolist(),
        "seconds": ends,
    }


def endless(batches: ShardedBatches | StreamedBatches) -> Iterator[Batch]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def report(ranks: Ranks, line: str) -> None:
    """In one write, so that the launcher hands it on as a line."""
    if ranks.rank == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def gather(own: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Every rank's float64 [n] as [world_size, n]."""
    words = np.ascontiguousarray(own, dtype=np.float64).view(np.int64)
    return ranks.comm.start_headers(words, what="figures").wait().view(np.float64)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="step.worker", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--model", choices=CASES, default="resnet18")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="timed ones in a round, or those of the loss curve")
    parser.add_argument("--threads", type=int, default=1, help="of torch on each rank")
    parser.add_argument(
        "--interface", default=interface_counters.SHARED_INTERFACE, help="network interface of gloo (default lo)"
    )
    curve = parser.add_argument_group("loss curve")
    curve.add_argument("--loss-curve", choices=METHODS, metavar="METHOD", help=f"train {CURVE_MODEL} by this one")
    curve.add_argument("--dataset", choices=DATASETS, default="fashion-mnist", help="default fashion-mnist")
    curve.add_argument("--data-dir", type=Path, help="folder of the data set")
    curve.add_argument("--base-lr", type=float, default=0.4, help=f"for {REFERENCE_BATCH} samples a step (default 0.4)")
    curve.add_argument("--seed", type=int, default=0, help="of weights, data order and layer draws (default 0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
