"""Training iterations of each method on links of several rates, and the time to the same training loss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from network.hosts import INTERFACE, Hosts
from network.launchers import Launcher
from results import Cell
from step.summary import cell_of
from step.worker import WARM_UP

SMOOTHING = 50  # iterations over which a loss is averaged
# What one job may take at 0.1 Gbit/s, several times what it does: to start, and for an iteration.
_START_SECONDS, _ITERATION_SECONDS = 300.0, 20.0


def time_methods(
    hosts: Hosts, launcher: Launcher, num_ranks: int, model: str, methods: Sequence[str], rounds: int, iterations: int
) -> Cell:
    """A cell of `step.summary` for the hosts' present rate, which is added as "gbits"."""
    arguments = ["--model", model, "--rounds", str(rounds), "--iterations", str(iterations), "--methods", *methods]
    num_iterations = rounds * len(methods) * (WARM_UP + iterations)
    result = _run_worker(hosts, launcher, num_ranks, arguments, num_iterations)
    return {"kind": "iterations", "launcher": launcher.name, "gbits": hosts.gbits, **cell_of(model, result)}


def loss_curve(hosts: Hosts, launcher: Launcher, num_ranks: int, method: str, iterations: int) -> dict[str, Any]:
    """What a worker writes of one training run on Fashion-MNIST; "gbits" is added."""
    arguments = ["--loss-curve", method, "--iterations", str(iterations)]
    return {"gbits": hosts.gbits, **_run_worker(hosts, launcher, num_ranks, arguments, iterations)}


def _run_worker(
    hosts: Hosts, launcher: Launcher, num_ranks: int, arguments: Sequence[str], num_iterations: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        program = ["-m", "step.worker", "--interface", INTERFACE, "--out", str(out), *arguments]
        seconds = (_START_SECONDS + _ITERATION_SECONDS * num_iterations) * hosts.slowness
        hosts.run(launcher, program, timeout=seconds, num_ranks=num_ranks)
        return json.loads(out.read_text())


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Means over the last `SMOOTHING` iterations, float64 [len(losses) - SMOOTHING + 1]; shorter runs have one."""
    width = min(SMOOTHING, len(losses))
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return (sums[width:] - sums[:-width]) / width


def iterations_to(losses: Sequence[float], target: float) -> int | None:
    """After how many iterations the smoothed loss first is at most `target`; None if it never is."""
    means = smoothed(losses)
    reached = np.flatnonzero(means <= target)
    return int(reached[0]) + min(SMOOTHING, len(losses)) if reached.size else None


def times_to_loss(curves: Mapping[str, Sequence[float]], cells: Sequence[Cell]) -> Cell:
    """Seconds to each method's lowest smoothed loss, for the methods that reach it, by method and rate.

    That is the number of iterations to a loss, which no link changes, times the iteration's time at each rate. One loss
    alone would let the slowest method choose it. targets: from the loss that all reach to the last that two do.
    """
    lowest = sorted((float(smoothed(losses).min()) for losses in curves.values()), reverse=True)
    targets = [_times_to(target, curves, cells) for target in lowest[: max(len(lowest) - 1, 1)]]
    return {"kind": "time to loss", "targets": targets}


def _times_to(target: float, curves: Mapping[str, Sequence[float]], cells: Sequence[Cell]) -> dict[str, Any]:
    needed = {method: iterations_to(losses, target) for method, losses in curves.items()}
    seconds: dict[str, dict[str, float]] = {}
    for cell in cells:
        for row in cell["variants"]:
            if needed.get(row["variant"]) is not None:
                by_rate = seconds.setdefault(row["variant"], {})
                by_rate[f"{cell['gbits']:g}"] = needed[row["variant"]] * row["ms"]["median"] / 1e3
    return {"loss": target, "iterations": needed, "seconds": seconds}


def loss_table(cell: Cell) -> str:
    """For each loss a line a method: iterations and, for each rate, seconds. Then the run in full."""
    lines = []
    for target in cell["targets"]:
        rates = list(next(iter(target["seconds"].values()), {}))
        lines.append(f"to a training loss of {target['loss']:.4f}, mean of {SMOOTHING} iterations")
        lines.append(f"  {'':22}{'iterations':>12}" + "".join(f"{rate + ' Gbit/s':>14}" for rate in rates))
        for method, by_rate in target["seconds"].items():
            times = "".join(f"{by_rate[rate]:12.1f} s" for rate in rates)
            lines.append(f"  {method:22}{target['iterations'][method]:>12}{times}")
    run = cell["check"]
    for reached in run["reached"]:
        lines.append(
            f"  check: {run['method']} in full at {run['gbits']:g} Gbit/s to {reached['loss']:.4f}: "
            f"{reached['measured_seconds']:.1f} s (promised {reached['promised_seconds']:.1f} s)"
        )
    return "\n".join(lines) + "\n"


def check(cell: Cell, method: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """A run in full against what `times_to_loss` promised for its rate: seconds to each loss reached, both ways."""
    reached = []
    for target in cell["targets"]:
        needed = iterations_to(run["losses"], target["loss"])
        promised = target["seconds"].get(method, {}).get(f"{run['gbits']:g}")
        if needed is not None and promised is not None:
            measured = run["seconds"][needed - 1]
            reached.append({"loss": target["loss"], "promised_seconds": promised, "measured_seconds": measured})
    return {"method": method, "gbits": run["gbits"], "reached": reached}
