"""Measures jointspar on the GPU of this machine: operations, optimizer steps, training iterations.

Writes DIR/<device>-<date>.json and .md, anew after every measurement: a run that is cut off leaves what it has.
Exit code 1 where a part failed, 2 where there is no GPU to measure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from bench.gpu import environment, report

PARTS = ("operations", "steps", "training")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backends", nargs="+", choices=("native", "cupy"), default=["native"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes minutes for ResNet-50's tensors alone",
    )
    return parser.parse_args(arguments)


def fill(
    results: report.Results,
    part: str,
    measurements: Iterable[Callable[[], Iterable[report.Record]]],
    save: Callable[[], object],
) -> None:
    """Add the records of a part; a measurement that fails is noted, and the others go on."""
    print(f"== {part}", flush=True)
    for index, measure in enumerate(measurements):
        try:
            for record in measure():
                results[part].append(record)
                print(json.dumps(record), flush=True)
        except Exception as error:
            traceback.print_exc()
            results["failed"][f"{part} {index}"] = f"{type(error).__name__}: {error}"
        save()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print(f"bench-gpu: torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    from bench.gpu import operations, steps, timing, training

    rounds = 15 if options.quick else 50
    is_compiled = not (options.quick or options.no_compile)
    measurements = {
        "operations": operations.measure_operations(options.backends, compiled=is_compiled, rounds=rounds),
        "steps": steps.measure_steps(rounds=rounds),
        "training": training.measure_training(iterations=20 if options.quick else 200),
    }
    results = report.empty(environment.describe())
    results["copy"] = timing.copy_bandwidth(rounds=rounds)
    stem = report.file_stem(results["environment"]["device"], datetime.date.today().isoformat())
    save = partial(report.write, results, options.out, stem)
    for part in options.parts:
        fill(results, part, measurements[part], save)
    print(report.markdown(results), *save(), sep="\n")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
