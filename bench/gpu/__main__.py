"""Measures jointspar on the GPU of this machine: operations, optimizer steps, training iterations, sums over ranks.

Writes DIR/<device>-<date>.json and .md, anew after every measurement: a run that is cut off leaves what it has. Another
run of the same commit adds its parts to them. Each part has a process of its own, since an error of the device ends
all that its process could still measure; a variant that fails or is wrong is noted, and the others go on.
Exit code 1 where something failed, 2 where there is no GPU, or no MPI for the sums.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from bench.gpu import environment, report

DEFAULT_PARTS = ("operations", "steps", "training")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=report.PARTS,
        default=list(DEFAULT_PARTS),
        help=f"without it: {', '.join(DEFAULT_PARTS)}; compiled: the operations beside torch.compile, which takes "
        "minutes for ResNet-50's tensors; exchange: sums of device memory on 2 ranks, by mpirun",
    )
    parser.add_argument("--backends", nargs="+", choices=("native", "cupy"), default=["native"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and iterations")
    return parser.parse_args(arguments)


def fill(
    results: report.Results,
    part: str,
    measurements: Iterable[report.Measurement],
    save: Callable[[], object],
    goes_on: bool = True,
) -> None:
    """Add the records of a part. What fails is noted, and the rest goes on, but not where other ranks are in it."""
    print(f"== {part}", flush=True)
    report.begin(results, part)
    for name, make in measurements:
        try:
            for record in make():
                if isinstance(record, report.Failure):
                    note_failure(results, f"{part}: {name}, {record.what}", record.reason)
                else:
                    results[part].append(record)
                    print(json.dumps(record), flush=True)
        except Exception as error:
            traceback.print_exc()
            note_failure(results, f"{part}: {name}", f"{type(error).__name__}: {error}")
            if not goes_on:
                break
        finally:
            save()


def note_failure(results: report.Results, what: str, reason: str) -> None:
    results["failed"][what] = reason
    print(f"failed: {what}: {reason}", flush=True)


def measure(part: str, options: argparse.Namespace) -> int:
    """One part, in this process."""
    from bench.gpu import operations, steps, timing, training

    rounds = 15 if options.quick else 50
    measurements = {
        "operations": operations.measure_operations(options.backends, rounds=rounds),
        "compiled": operations.measure_compiled(options.backends, rounds=rounds),
        "steps": steps.measure_steps(rounds=rounds),
        "training": training.measure_training(iterations=20 if options.quick else 200),
    }
    results, save = open_results(options.out, environment.describe("bench.gpu"))
    if part in ("operations", "compiled"):
        results["copy"] = timing.copy_bandwidth(rounds=rounds)
    fill(results, part, measurements[part], save)
    print(report.markdown(results), *save(), sep="\n")
    return 1 if any(what.startswith(f"{part}: ") for what in results["failed"]) else 0


def open_results(folder: Path, described: dict[str, str]) -> tuple[report.Results, Callable[[], tuple[Path, Path]]]:
    """Today's results of this device, and what writes them."""
    stem = report.file_stem(described["device"], datetime.date.today().isoformat())
    results, stem = report.resume(folder, stem, described)
    return results, partial(report.write, results, folder, stem)


def run_part(part: str, options: argparse.Namespace) -> int:
    """One part, in a process of its own, or in one for each rank."""
    out, quick = ["--out", str(options.out)], ["--quick"] * options.quick
    if part != "exchange":
        module = ["bench.gpu", "--parts", part, "--backends", *options.backends]
        return exit_code(part, options, subprocess.run([sys.executable, "-m", *module, *out, *quick]).returncode)
    from jointspar.training.launch import find_launcher, job_environment

    launcher = find_launcher()
    if launcher is None:
        print("bench-gpu: exchange needs mpirun on the PATH, and mpi4py", file=sys.stderr)
        return 2
    command = [launcher, "-n", "2", sys.executable, "-m", "bench.gpu.exchange", *out]
    return exit_code(part, options, subprocess.run(command, env=job_environment()).returncode)


def exit_code(part: str, options: argparse.Namespace, code: int) -> int:
    """0, 1 or 2; a process that a signal ended has noted nothing of it."""
    if 0 <= code <= 2:
        return code
    results, save = open_results(options.out, environment.describe("bench.gpu"))
    note_failure(results, f"{part}: its process", f"ended with {code}")
    save()
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print(f"bench-gpu: torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    if options.parts != ["exchange"] and len(options.parts) == 1:
        return measure(options.parts[0], options)
    return max([run_part(part, options) for part in options.parts])


if __name__ == "__main__":
    sys.exit(main())
