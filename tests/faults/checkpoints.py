"""Checkpoints under fire: killed while saving, truncated, with flipped bits. Prints counts as JSON.

python tests/faults/checkpoints.py [--kills 200] [--truncations 200] [--flips 200] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import jointspar as js
from jointspar.errors import CheckpointError

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


def kill_while_saving(folder: Path, seed: int) -> str:
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
    time.sleep(random.Random(seed).random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded, alone = build(), build()
    js.checkpoint.load(folder, model=loaded[0], optimizer=loaded[1])
    train(alone, loaded[1].state_dict()["jointspar"]["step"])
    for run in (loaded, alone):
        train(run, 2)
    return "survived" if contents(loaded) == contents(alone) else "wrong"


def damage(folder: Path, random_numbers: random.Random, *, is_flip: bool) -> str:
    """Of the newer of two checkpoints: the older one must be loaded."""
    run = build()
    train(run, 1)
    js.checkpoint.save(folder, model=run[0], optimizer=run[1])
    good = contents(run)
    train(run, 1)
    newest = js.checkpoint.save(folder, model=run[0], optimizer=run[1])
    file = random_numbers.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    if is_flip:
        data[random_numbers.randrange(len(data))] ^= 1 << random_numbers.randrange(8)
    else:
        del data[random_numbers.randrange(len(data)) :]
    file.write_bytes(data)
    loaded = build()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            js.checkpoint.load(folder, model=loaded[0], optimizer=loaded[1])
    except CheckpointError:
        return "nothing loaded"
    return "detected" if contents(loaded) == good else "wrong"


def count(number: int, inject: object) -> dict[str, int]:
    counts: dict[str, int] = {"injected": number}
    for seed in range(number):
        with tempfile.TemporaryDirectory() as folder:
            outcome = inject(Path(folder), seed)  # type: ignore[operator]
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def campaign(kills: int, truncations: int, flips: int) -> dict[str, dict[str, int]]:
    torch.set_num_threads(1)
    numbers = random.Random(0)
    return {
        "killed while saving": count(kills, kill_while_saving),
        "truncated": count(truncations, lambda folder, _: damage(folder, numbers, is_flip=False)),
        "bit flipped": count(flips, lambda folder, _: damage(folder, numbers, is_flip=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kills", "truncations", "flips"):
        parser.add_argument(f"--{name}", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="of these numbers")
    parser.add_argument("--out", type=Path, help="folder of report.json and REPORT.md")
    options = parser.parse_args()
    began = time.monotonic()
    numbers = (options.kills, options.truncations, options.flips)
    cases = campaign(*(math.ceil(number * options.scale) for number in numbers))
    print(json.dumps(cases))
    if options.out:
        from campaign import Counts, add_entry

        columns = vars(Counts())
        entry = {"scale": options.scale, "seconds": time.monotonic() - began, "cases": {}}
        for name, counts in cases.items():
            wrong = counts.get("wrong", 0) + counts.get("nothing loaded", 0)
            entry["cases"][name] = (
                columns | {key: counts[key] for key in counts if key in columns} | {"unnoticed": wrong}
            )
        add_entry(options.out, "Checkpoints", entry)
    return int(any("wrong" in counts or "nothing loaded" in counts for counts in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
