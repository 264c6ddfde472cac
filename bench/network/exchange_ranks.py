"""What each rank runs to time the exchanges; rank 0 writes the figures of all ranks as JSON.

Two things are exchanged: buffers of given lengths which all ranks computed ("dense"), and a model's packed gradients
with half of the layers drawn for each rank ("stratified"). In each round the exchanges follow one another.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import jointspar as js
from interface_counters import received_bytes, sent_bytes
from jointspar.comm.transport import Transport
from jointspar.step.exchange import Chooser, Slices, candidates
from jointspar.step.layers import group_layers
from jointspar.step.packing import Packer
from step.exchange import draw_slices
from step.models import CASES, make_model

Rows = dict[str, list[np.ndarray]]  # by exchange; a round each: int64 [world_size, 4], see `run_once`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interface", required=True)
    parser.add_argument("--megabytes", type=float, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--model", choices=CASES, default="resnet18")
    options = parser.parse_args()
    comm = js.comm.world()
    torch.set_num_threads(1)
    figures = [exchange_dense(comm, options, round(1e6 * megabytes)) for megabytes in options.megabytes]
    figures.append(exchange_stratified(comm, options))
    if comm.rank == 0:
        options.out.write_text(json.dumps({"transport": comm.name, "figures": figures}))


def exchange_dense(comm: Transport, options: argparse.Namespace, num_bytes: int) -> dict[str, Any]:
    """Every exchange of one buffer that all ranks computed; the first round only warms up."""
    packed = torch.zeros(num_bytes // 4)
    slices = Slices(np.array([packed.numel()]), np.ones((comm.world_size, 1), dtype=bool))
    chooser = Chooser("auto", comm, packed.dtype, is_partial=False)
    chooser.prepare(num_bytes)
    rows: Rows = {name: [] for name in candidates("auto", comm, packed.dtype)}
    for turn in range(options.rounds + 1):
        run_round(comm, options.interface, packed, slices, rows if turn else {name: [] for name in rows})
    return report("dense", comm, rows, num_bytes, [num_bytes] * options.rounds, chooser.choose(slices))


def exchange_stratified(comm: Transport, options: argparse.Namespace) -> dict[str, Any]:
    """Every exchange of a model's packed gradients at a budget of one half, a draw a round."""
    layers = group_layers(make_model(CASES[options.model]).named_parameters())
    packer = Packer(layers.parameters, layers.names, None)
    dense_bytes = packer.dense_bytes(np.ones(len(layers.parameters), dtype=bool))
    chooser = Chooser("auto", comm, packer.wire_dtype, is_partial=True)
    chooser.prepare(dense_bytes)
    sampling = js.Sampling(budget=0.5, strategy="stratified")
    rows: Rows = {name: [] for name in candidates("auto", comm, packer.wire_dtype)}
    lengths, chosen = [], []
    for step in range(options.rounds):
        slices = draw_slices(layers, packer, sampling, step, comm.world_size)
        packed = torch.zeros(int(slices.sizes.sum()), dtype=packer.wire_dtype)
        run_round(comm, options.interface, packed, slices, rows)
        lengths.append(packed.numel() * packed.element_size())
        chosen.append(chooser.choose(slices))
    return report("stratified", comm, rows, dense_bytes, lengths, max(chosen, key=chosen.count))


def run_round(comm: Transport, interface: str, packed: torch.Tensor, slices: Slices, rows: Rows) -> None:
    for name, exchange in candidates("auto", comm, packed.dtype).items():
        if name in rows:
            rows[name].append(run_once(comm, interface, exchange, packed, slices))


def run_once(comm: Transport, interface: str, exchange: Any, packed: torch.Tensor, slices: Slices) -> np.ndarray:
    """[world_size, 4]: each rank's nanoseconds, bytes handed to the transport, bytes that its interface sent, received.

    The interface is read when all ranks are done: what one rank has received, another's interface has sent.
    """
    comm.start_headers(np.zeros(1, dtype=np.int64), what="start").wait()
    before = comm.bytes_sent, sent_bytes(interface), received_bytes(interface)
    began = time.perf_counter_ns()
    exchange(comm, packed, what="exchange", slices=slices)
    nanoseconds = time.perf_counter_ns() - began
    counted = comm.bytes_sent - before[0]
    comm.start_headers(np.zeros(1, dtype=np.int64), what="end").wait()
    own = [nanoseconds, counted, sent_bytes(interface) - before[1], received_bytes(interface) - before[2]]
    return comm.start_headers(np.array(own), what="figures").wait()


def report(what: str, comm: Transport, rows: Rows, full_bytes: int, lengths: list[int], chosen: str) -> dict[str, Any]:
    """Of each exchange: seconds of the slowest rank a round, and bytes, averaged over ranks and rounds.

    full_bytes: of the gradients of all layers. needed_bytes, a round each: what the busiest direction of any link
    carries. In a ring, and so of allreduce, 2 (world_size - 1) / world_size of the buffer; of two_shot it depends on
    the draw, and is what the interfaces counted.
    """
    ring = 2 * (comm.world_size - 1) / comm.world_size
    exchanges = {}
    for name, rounds in rows.items():
        table = np.stack(rounds)
        needed = table[:, :, 2:].max(axis=(1, 2)) if name.startswith("two_shot") else ring * np.array(lengths)
        exchanges[name] = {
            "seconds": (table[:, :, 0].max(axis=1) / 1e9).tolist(),
            "needed_bytes": needed.tolist(),
            "transport_bytes": float(table[:, :, 1].mean()),
            "interface_bytes": float(table[:, :, 2].mean()),
        }
    return {"what": what, "full_bytes": full_bytes, "chosen": chosen, "exchanges": exchanges}


if __name__ == "__main__":
    main()
