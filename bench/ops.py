"""Measures every operation of jointspar.ops against its peers and against what the machine can move.

For each operation, size, dtype and number of threads, every variant is checked against float64; then the variants
alternate in one process. Prints a table for each, and writes <date>-ops.json and .png into --out; a second run of the
same command on the same commit and day replaces them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from alternate import alternate
from command_line import positive, refuse_beside_quick
from layer_problem import MANY_LAYERS
from limits import Limit, compiler
from operation import Case, Operation, Problem, Variant, verify
from picture import draw_fractions
from results import Cell, cell_of, new_record, save, table
from shapes import MODELS

OPERATIONS = (
    "sample_layers", "project_probabilities", "update_probabilities", "pack_gradients", "unpack_gradients",
    "add_packed", "squared_norms", "lars_update", "sgd_update",
)  # fmt: skip
CASES = (*MODELS, MANY_LAYERS)
QUICK_CASES = {"small", "in_cache", "resnet18-float64"}  # names, or with a dtype
QUICK_ROUNDS = 2
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Settings:
    """What a run does for every operation."""

    rounds: int
    cases: Sequence[str]
    quick: bool
    compiles: bool  # whether the variants of torch.compile take part
    has_limit: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks of a command line; returns the exit code."""
    options = _parse(arguments)
    settings, left_out = _settings(options)
    operations = [load(name) for name in options.operations or OPERATIONS]
    plan = [
        (operation, case, num_threads)
        for operation in operations
        for case in cases_of(operation, settings)
        for num_threads in options.threads
    ]
    if not plan:
        print("jointspar bench ops: none of these operations has such a case", file=sys.stderr)
        return 2
    record = new_record("ops", sys.argv[1:] if arguments is None else arguments, options, left_out)
    cells = []
    with tqdm(total=len(plan) * settings.rounds, unit="round", disable=None) as progress:
        for operation, case, num_threads in plan:
            progress.set_description(f"{operation.name} {case} {num_threads}t")
            cells.append(measure(operation, case, num_threads, settings, progress))
            progress.write(table(cells[-1]))
            path = save(record, cells, options.out, _name(options))  # each time: an interrupted run keeps what it has
    picture = path.with_suffix(".png")
    is_drawn = draw_fractions(picture, record, cells)
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")
    print(f"wrote {path}" + (f" and {picture.name}" if is_drawn else "; no operation has a limit to draw"))
    return 0


def load(name: str) -> Operation:
    """The operation that bench_<name>.py describes."""
    return importlib.import_module(f"bench_{name}").OPERATION


def cases_of(operation: Operation, settings: Settings) -> list[Case]:
    if settings.quick:
        return [replace(case, calls=1) for case in operation.cases if QUICK_CASES & {case.name, str(case)}]
    return [case for case in operation.cases if case.name in settings.cases]


def measure(operation: Operation, case: Case, num_threads: int, settings: Settings, progress: tqdm) -> Cell:
    """Check, then time, all variants of one operation on one case."""
    torch.set_num_threads(num_threads)
    problem = operation.make_problem(case)
    variants = [variant for variant in operation.variants_of(case) if settings.compiles or not variant.compiles]
    for variant in variants:
        verify(operation, case, variant, problem)
    if settings.has_limit:
        variants += _limit_of(problem, case)
    seconds = alternate(variants, problem, case, rounds=settings.rounds, after_round=progress.update)
    return cell_of(operation.name, case, num_threads, problem.traffic, variants, seconds)


def _limit_of(problem: Problem, case: Case) -> list[Variant]:
    if problem.traffic is None:
        return []
    limit = Limit(problem.traffic, streaming=not case.in_cache)
    return [Variant("limit", "limit", lambda _: limit())]


def _settings(options: argparse.Namespace) -> tuple[Settings, dict[str, str]]:
    """Settings, and what they leave out, with the reason."""
    left_out = {}
    if compiler() is None:
        left_out["limit"] = left_out["compile"] = "no C++ compiler was found"
    if options.quick or options.no_compile:
        left_out["compile"] = "--quick" if options.quick else "--no-compile"
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    settings = Settings(
        rounds, options.cases or CASES, options.quick, "compile" not in left_out, "limit" not in left_out
    )
    return settings, left_out


def _name(options: argparse.Namespace) -> str:
    return "-".join(["ops", *options.operations, *options.cases, *(["quick"] if options.quick else [])])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jointspar bench ops", description=__doc__.splitlines()[0])
    parser.add_argument(
        "operations",
        nargs="*",
        type=_operation,
        metavar="OPERATION",
        help=f"of {', '.join(OPERATIONS)} (default all)",
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[], metavar="CASE", help=f"of {', '.join(CASES)} (default all)"
    )
    parser.add_argument("--threads", type=positive, nargs="+", default=_default_threads(), help="default 1 2")
    parser.add_argument("--rounds", type=positive, default=20, help="samples of each variant (default 20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    parser.add_argument("--no-compile", action="store_true", help="without the variants of torch.compile")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"small cases, {QUICK_ROUNDS} rounds: shows that everything is right, measures nothing",
    )
    options = parser.parse_args(arguments)
    refuse_beside_quick(parser, options, "cases", "rounds", "no_compile")
    return options


def _operation(text: str) -> str:
    if text not in OPERATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(OPERATIONS)}")
    return text


def _default_threads() -> list[int]:
    return [1, 2] if len(os.sched_getaffinity(0)) > 1 else [1]


if __name__ == "__main__":
    sys.exit(main())
