"""What headers, deadlines and the watchdog cost a step: run as `mpirun -n 2 python bench/step/protocol.py`.

The protocol of a step (hashes, plan, go) with both ranks ready, against iterations of the model in the same job. What a
rank waits for a slower one is no cost of it: the exchange would wait for as long. The exchange's own waits are watched
too: so many times what one watch and one look at the deadline take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import jointspar as js
from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op
from jointspar.comm.process import ProcessTransport
from jointspar.training.models import build_model

STEPS_AT_ONCE = 50  # of the protocol, for one figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    comm = js.comm.world()
    if not isinstance(comm, ProcessTransport):
        raise SystemExit("protocol.py: run it on 2 ranks or more, for example with mpirun -n 2")
    torch.set_num_threads(1)
    model = build_model(options.model, 3, 10, 32, seed=0)
    optimizer = js.JointSparLARS(model.named_parameters())
    batch = torch.randn(options.batch_size, 3, 32, 32), torch.randint(0, 10, (options.batch_size,))
    protocol = protocol_of(optimizer)
    iterations, protocols, waits = [], [], []
    for turn in range(-2, options.rounds):  # the first ones warm up
        num_waits, seconds = count_waits(comm, lambda: iterate(model, optimizer, batch))
        alone = timed(comm, lambda turn=turn: [protocol(STEPS_AT_ONCE * (turn + 2) + k) for k in range(STEPS_AT_ONCE)])
        if turn >= 0:
            iterations.append(seconds)
            protocols.append(alone / STEPS_AT_ONCE)
            waits.append(num_waits)
    report(comm, options.model, iterations, protocols, float(np.median(waits)), watch_seconds(comm))


def iterate(model: nn.Module, optimizer: js.JointSparLARS, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def protocol_of(optimizer: js.JointSparLARS) -> Callable[[int], None]:
    """What a step says to the other ranks, with the hashes in it, on an agreement of its own."""
    pipeline, num_layers = optimizer._pipeline, len(optimizer.layers)
    agreement = Agreement(
        optimizer.comm,
        layer_names=[layer.name for layer in optimizer.layers],
        layer_hashes=list(range(num_layers)),
        settings={},
        num_values=num_layers + 1,
    )

    def protocol(step: int) -> None:
        agreement.post_plan(step, pipeline.active, [pipeline.drawn])
        agreement.wait_plan()
        agreed = [optimizer._hyper.agreed(), None, pipeline.backward.updatable, "ring"]
        values = np.append(np.zeros(num_layers), 0.0)
        agreement.go(Op.EXCHANGE, step=step, count=1, dtype=torch.float32, agreed=agreed, values=values)

    return protocol


def timed(comm: ProcessTransport, run: Callable[[], object]) -> float:
    """Seconds, from a moment at which all ranks are there."""
    comm.start_headers(np.zeros(1, dtype=np.int64), what="start").wait()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def count_waits(comm: ProcessTransport, run: Callable[[], object]) -> tuple[int, float]:
    """How many waits of the transport were watched meanwhile, and the seconds of it all."""
    count, original = 0, comm._watch

    def counting(what: str) -> object:
        nonlocal count
        count += 1
        return original(what)

    comm._watch = counting  # type: ignore[method-assign,assignment]
    try:
        seconds = timed(comm, run)
    finally:
        del comm._watch
    return count, seconds


def watch_seconds(comm: ProcessTransport, times: int = 20_000) -> float:
    """Of arming and disarming the watchdog, and looking once at the deadline."""
    began = time.perf_counter()
    for _ in range(times):
        with comm._watch("measurement"):
            comm._check_deadline("measurement", time.monotonic(), has_warned=False)
    return (time.perf_counter() - began) / times


def report(
    comm: ProcessTransport, model: str, iterations: list[float], protocols: list[float], waits: float, watch: float
) -> None:
    if comm.rank != 0:
        return
    ratios = np.array(protocols) / np.array(iterations)
    tenth, median, ninetieth = np.percentile(ratios, (10, 50, 90))
    print(f"{model} on {comm.world_size} ranks, {comm.name}; medians of {len(iterations)} rounds")
    print(f"an iteration                     {1e3 * np.median(iterations):9.3f} ms")
    print(f"protocol of a step               {1e3 * np.median(protocols):9.3f} ms")
    print(f"of an iteration                  {100 * median:9.3f} % [{100 * tenth:.3f}, {100 * ninetieth:.3f}]")
    print(f"watchdog and deadline of a wait  {1e6 * watch:9.3f} us, {waits:g} waits in an iteration")


if __name__ == "__main__":
    main()
