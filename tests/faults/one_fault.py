"""What every rank of a job with one fault runs: a training whose sums are known, with the fault somewhere in it."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

import jointspar as js
from small_training import backward, build_model, build_optimizer, layer_number, report_wrong_sum, slope

STEPS = 40
SAVE_EVERY = 5
PHASES = ("start", "built", "forward", "backward", "exchange", "update", "save")
LONGEST_DELAY = 0.06  # seconds from a phase to a signal: some dozen steps


class Fault:
    """FAULT at a phase, step and rank that follow from FAULT_SEED.

    `place` is the phase that the rank is in, in a file that outlives it.
    """

    def __init__(self, rank: int) -> None:
        self.kind = os.environ["FAULT"]
        self.rank = rank
        self.random = random.Random(int(os.environ["FAULT_SEED"]))
        self.is_here = self.random.randrange(int(os.environ["FAULT_RANKS"])) == rank
        self.phase = self.random.choice(PHASES)
        self.step = self.random.randrange(STEPS)
        self.step -= self.step % SAVE_EVERY if self.phase == "save" else 0
        self._signaller: subprocess.Popen[bytes] | None = None
        self._place = _shared_file(Path(os.environ["FAULT_FOLDER"]) / f"place-{rank}", 16)

    def at(self, phase: str, step: int = 0) -> None:
        self._place[:] = phase.encode().ljust(16)
        is_now = phase == self.phase and (step == self.step or phase in ("start", "built"))
        if not self.is_here or not is_now:
            return
        if self.kind in SIGNALS:
            self._signaller = signal_soon(SIGNALS[self.kind], self.random.random() * LONGEST_DELAY, self.rank)
        elif self.kind in ACTIONS:
            print(f"FAULT {time.time()}\n", end="", flush=True)
            ACTIONS[self.kind]()

    def must_have_come(self) -> None:
        """Wait for a signal that is on its way: a fault after the job is complete would be none."""
        if self._signaller is not None:
            self._signaller.wait()


def _shared_file(path: Path, num_bytes: int) -> mmap.mmap:
    with path.open("w+b") as file:
        file.truncate(num_bytes)
        return mmap.mmap(file.fileno(), num_bytes)


def signal_soon(number: int, delay: float, rank: int) -> subprocess.Popen[bytes]:
    """From a process beside this one, hence in the middle of whatever comes then."""
    script = f"sleep {delay:.4f}; echo FAULT $(date +%s.%N) rank {rank}; kill -{number} {os.getpid()}"
    return subprocess.Popen(["/bin/sh", "-c", script])


def raise_an_error() -> NoReturn:
    raise ZeroDivisionError("the fault")


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ACTIONS: dict[str, Callable[[], object]] = {
    "raise": raise_an_error,
    "memory": lambda: bytearray(2**62),
    "exit": lambda: sys.exit(0),
    "os-exit": lambda: os._exit(0),
}


def check_sums(optimizer: js.JointSparSGD, probabilities: torch.Tensor, step: int, world_size: int) -> None:
    """mean_grads of the strategy "shared" against its formula, of slopes that every rank can work out."""
    for name, mean in optimizer.mean_grads.items():
        layer = layer_number(name)
        total = sum(slope(rank, step, layer) for rank in range(world_size))
        expected = total / world_size / float(probabilities[layer])
        if not torch.allclose(mean, torch.full_like(mean, expected), rtol=1e-5):
            report_wrong_sum(f"{name} at step {step}", mean, expected)


def train() -> None:
    comm = js.comm.world()
    fault = Fault(comm.rank)
    fault.at("start")
    model = build_model()
    optimizer = build_optimizer(model, exchange="auto", check_every=2)
    fault.at("built")
    is_short = fault.kind == "loader" and fault.is_here
    for step in range(STEPS - 3 if is_short else STEPS):
        train_step(fault, model, optimizer, step)
    if is_short:
        print(f"FAULT {time.time()}\n", end="", flush=True)
    fault.must_have_come()
    optimizer.finish()
    fault.at("complete")
    print(f"COMPLETE rank {comm.rank}\n", end="", flush=True)


def train_step(fault: Fault, model: torch.nn.Module, optimizer: js.JointSparSGD, step: int) -> None:
    fault.at("forward", step)
    optimizer.zero_grad()
    probabilities = optimizer.probabilities
    fault.at("backward", step)
    backward(model, optimizer.comm.rank, step)
    fault.at("exchange", step)
    optimizer.synchronize()
    check_sums(optimizer, probabilities, step, optimizer.comm.world_size)
    fault.at("update", step)
    optimizer.step()
    if step % SAVE_EVERY == 0:
        fault.at("save", step)
        js.checkpoint.save(os.environ["FAULT_FOLDER"], model=model, optimizer=optimizer)
