"""Checkpoints under fire: killed while saving, truncated, with flipped bits; counts as `campaign.py` does.

python tests/faults/checkpoints.py [--count 200] [--scale 1.0] [--seconds 150 --append]
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

import jointspar as js
import report
from jointspar.errors import CheckpointError
from report import Counts

SECTION = "Checkpoints"
KEPT = 2  # checkpoints that a save leaves
Run = tuple[nn.Module, js.JointSparLARS]


def build() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 3))
    return model, js.JointSparLARS(model.named_parameters(), comm=js.comm.local())


def train(run: Run, steps: int) -> None:
    model, optimizer = run
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.state_dict()["jointspar"]["step"])
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()
        optimizer.step()


def contents(run: Run) -> bytes:
    model, optimizer = run
    tensors = [*model.parameters(), *(entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values())]
    parts = [tensor.detach().numpy().tobytes() for tensor in tensors]
    return b"".join([*parts, optimizer.probabilities.numpy().tobytes()])


def kill_while_saving(folder: Path, number: int) -> str:
    """In a child; what the folder then loads must be what that step had, and train on alike."""
    child = os.fork()
    if child == 0:
        run = build()
        while True:
            train(run, 1)
            js.checkpoint.save(folder, model=run[0], optimizer=run[1])
    until = time.monotonic() + 30
    while not list(folder.glob("step-*")) and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(random.Random(number).random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    is_half_way = bool(list(folder.glob(".partial-*"))) or len(list(folder.glob("step-*"))) > KEPT
    loaded, alone = build(), build()
    js.checkpoint.load(folder, model=loaded[0], optimizer=loaded[1])
    train(alone, loaded[1].state_dict()["jointspar"]["step"])
    for run in (loaded, alone):
        train(run, 2)
    if contents(loaded) != contents(alone):
        return "unnoticed"
    return "survived" if is_half_way else "not_injected"


def damage(folder: Path, number: int, *, is_flip: bool) -> str:
    """Of the newer of two checkpoints: the older one must be loaded."""
    numbers, run = random.Random(number), build()
    train(run, 1)
    js.checkpoint.save(folder, model=run[0], optimizer=run[1])
    good = contents(run)
    train(run, 1)
    newest = js.checkpoint.save(folder, model=run[0], optimizer=run[1])
    file = numbers.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    if is_flip:
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    else:
        del data[numbers.randrange(len(data)) :]
    file.write_bytes(data)
    loaded = build()
    with warnings.catch_warnings(), suppress(CheckpointError):
        warnings.simplefilter("ignore")
        js.checkpoint.load(folder, model=loaded[0], optimizer=loaded[1])
        return "detected" if contents(loaded) == good else "unnoticed"
    return "unnoticed"  # not even the older one


CASES: dict[str, Callable[[Path, int], str]] = {
    "killed while saving": kill_while_saving,
    "truncated": partial(damage, is_flip=False),
    "bit flipped": partial(damage, is_flip=True),
}


def run_case(inject: Callable[[Path, int], str], count: int, counts: Counts) -> Iterator[None]:
    """Inject until `count` faults are counted; `counts` is whole whenever this yields."""
    while counts.injected < count and counts.not_injected < 3 * count:
        began, number = time.monotonic(), counts.injected + counts.not_injected
        with tempfile.TemporaryDirectory() as folder:
            outcome = inject(Path(folder), number)
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        counts.injected += outcome != "not_injected"
        counts.seconds += round(time.monotonic() - began, 3)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="of each case")
    parser.add_argument("--scale", type=float, default=1.0, help="share of that number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="inject nothing after so long")
    parser.add_argument("--append", action="store_true", help="go on with the counts in the report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit, end, is_good = report.commit(), time.monotonic() + options.seconds, True
    for name, inject in CASES.items():
        known = report.read(options.out).get(SECTION, {}).get(name, {}) if options.append else {}
        counts = Counts(**known)
        for _ in run_case(inject, math.ceil(options.count * options.scale), counts):
            counts.commits = sorted({*counts.commits, commit})
            if time.monotonic() > end:
                break
        report.add(options.out, SECTION, name, asdict(counts))
        print(f"{name}: {'good' if counts.is_good else 'NOT GOOD'}: {asdict(counts)}", flush=True)
        is_good &= counts.is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
