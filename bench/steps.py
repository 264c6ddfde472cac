"""Measures training iterations by phase: jointspar-lars, the plain dense step, and DDP with its hooks and top-k.

Methods alternate within one job, in rounds. Prints a table for each model and number of ranks, and writes
<date>-step.json and .png into --out; the same command on the same commit and day replaces them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from command_line import positive, refuse_beside_quick
from jointspar.training.launch import ending_signals_raise
from results import STEP_SCHEMA, Cell, new_record, save
from step.jobs import JobError, run
from step.methods import METHODS
from step.models import CASES
from step.picture import draw_phases
from step.summary import cell_of, table

MODELS, RANKS = ("resnet18", "resnet50", "transformer"), (1, 2, 4)
QUICK_MODEL, QUICK_RANKS = "lenet5", 2
RESULTS = Path(__file__).with_name("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark of a command line; returns the exit code."""
    options = _parse(arguments)
    plan = [(model, num_ranks) for model in options.models for num_ranks in options.ranks]
    record = new_record(
        "step", sys.argv[1:] if arguments is None else arguments, options, left_out={}, schema=STEP_SCHEMA
    )
    cells: list[Cell] = []
    total = len(plan) * options.rounds * len(options.methods)
    with (
        tqdm(total=total, unit="method", disable=None) as progress,
        ending_signals_raise(lambda number: SystemExit(128 + number)),  # a job ends with this process
    ):
        try:
            for cell in _cells(plan, options, progress):
                progress.write(table(cell))
                cells.append(cell)
                path = save(record, cells, options.out, _name(options))  # each time: what there is, is kept
        except JobError as error:
            print(f"jointspar bench step: {error}", file=sys.stderr)
            return 1
    draw_phases(path.with_suffix(".png"), record, cells)
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


def _cells(plan: Sequence[tuple[str, int]], options: argparse.Namespace, progress: tqdm) -> Iterator[Cell]:
    for model, num_ranks in plan:

        def show(method: str, place: str = f"{model} on {num_ranks}") -> None:
            progress.set_description(f"{place} {method}")
            progress.update()

        arguments = ["--model", model, "--rounds", str(options.rounds), "--iterations", str(options.iterations)]
        yield cell_of(model, run(num_ranks, [*arguments, "--methods", *options.methods], show))


def _name(options: argparse.Namespace) -> str:
    """Names the selection."""
    if options.quick:
        return "step-quick"
    models = [] if tuple(options.models) == MODELS else options.models
    ranks = [] if tuple(options.ranks) == RANKS else [f"{number}r" for number in options.ranks]
    methods = [] if options.methods == list(METHODS) else [f"{len(options.methods)}methods"]
    return "-".join(["step", *models, *ranks, *methods])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jointspar bench step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=list(MODELS), metavar="M", help=f"default {' '.join(MODELS)}"
    )
    parser.add_argument(
        "--ranks", nargs="+", type=positive, default=list(RANKS), metavar="N", help="one thread each; default 1 2 4"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument("--rounds", type=positive, default=3, help="samples of each method (default 3)")
    parser.add_argument("--iterations", type=positive, default=3, help="timed ones in a sample (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_MODEL} on {QUICK_RANKS} ranks, one iteration: shows that all is right, measures nothing",
    )
    options = parser.parse_args(arguments)
    refuse_beside_quick(parser, options, "models", "ranks", "rounds", "iterations")
    for name in ("models", "ranks", "methods"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))  # none twice
    if options.quick:
        options.models, options.ranks, options.rounds, options.iterations = [QUICK_MODEL], [QUICK_RANKS], 1, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
