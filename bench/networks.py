"""Measures exchanges and training iterations between hosts, on links of several rates. Needs root and iproute2.

Hosts are network namespaces of this machine, one rank on each. Three parts: each exchange against the time that the
link needs (transfers); the time of a training iteration by each method (iterations); and the time to the same training
loss on Fashion-MNIST (loss), which is iterations to that loss times time of an iteration, with one run in full to check
it. Prints tables and writes <date>-network.json and pictures into --out; the same command on the same commit and day
replaces them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from command_line import positive, refuse_beside_quick
from jointspar.training.data.datasets import DatasetError, load_dataset
from network import launchers, training, transfers
from network.hosts import INTERFACE, Hosts, HostsError, JobError, refusal, standing
from network.launchers import Launcher
from network.picture import draw_iterations, draw_transfers
from results import NETWORK_SCHEMA, Cell, Record, new_record, save
from step import summary
from step.methods import METHODS
from step.models import CASES

RATES, RANKS = [10.0, 1.0, 0.3, 0.1], [2, 4]
PARTS = ("transfers", "iterations", "loss")
COMPARED = (
    "ddp", "ddp_4mb", "ddp_bf16", "ddp_powersgd", "topk", "jointspar_1.0", "jointspar_1.0_overlap", "stratified_0.5",
    "stratified_0.5_overlap", "stratified_0.5_bf16", "stratified_0.5_bf16_overlap", "independent_0.5", "shared_0.5",
    "shared_0.5_overlap", "shared_0.5_bf16_overlap",
)  # fmt: skip
MODEL = "resnet18"
LOSS_MODEL, LOSS_DATASET = "resnet20", "fashion-mnist"  # that `step.worker` trains
CHECKED = "stratified_0.5"  # trained in full on the slowest link
RESULTS = Path(__file__).with_name("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark of a command line; returns the exit code."""
    options = _parse(arguments)
    reason = refusal()
    if reason is not None:
        print(f"jointspar bench network: {'skipped: ' if options.quick else ''}{reason}", file=sys.stderr)
        return 0 if options.quick else 2
    found, left_out = launchers.find(options.launchers, INTERFACE)
    if all(launcher.name == "gloo" for launcher in found):  # `step.worker` makes its gloo group beside MPI
        left_out |= {part: "needs an MPI" for part in options.parts if part != "transfers"}
        options.parts = [part for part in options.parts if part == "transfers"]
    if not found or not options.parts:
        print(f"jointspar bench network: {'; '.join(left_out.values())}", file=sys.stderr)
        return 2
    try:
        if "loss" in options.parts:
            load_dataset(LOSS_DATASET)  # hours later would be late to find that it is missing
    except DatasetError as error:
        print(f"jointspar bench network: loss: {error}", file=sys.stderr)
        return 2
    found.sort(key=lambda launcher: launcher.name == "gloo")  # an MPI first
    arguments = sys.argv[1:] if arguments is None else arguments
    return _run(options, found, new_record("network", arguments, options, left_out, schema=NETWORK_SCHEMA))


def _run(options: argparse.Namespace, found: Sequence[Launcher], record: Record) -> int:
    """Measure, print and save; what came before an error is kept, with its pictures. Returns the exit code."""
    cells: list[Cell] = []
    code = 0
    try:
        with (
            standing(max(options.ranks), options.rates[0]) as hosts,
            tqdm(total=_num_jobs(options, found), unit="job", disable=None) as progress,
        ):
            for cell in _cells(hosts, options, found, progress):
                progress.write(_table(cell))
                cells.append(cell)
                path = save(record, cells, options.out, _name(options))  # each time: what there is, is kept
    except (HostsError, JobError) as error:
        print(f"jointspar bench network: {error}", file=sys.stderr)
        code = 1
    if cells:
        pictures = [draw_transfers(path, record, cells), draw_iterations(path, record, cells)]
        print(f"wrote {path}" + "".join(f", {picture.name}" for picture in pictures if picture))
    for what, why in record["left_out"].items():
        print(f"left out: {what}: {why}")
    return code


def _cells(hosts: Hosts, options: argparse.Namespace, found: Sequence[Launcher], progress: tqdm) -> Iterator[Cell]:
    for rate in options.rates:
        hosts.set_rate(rate)
        for num_ranks in options.ranks:
            progress.set_description(f"{num_ranks} ranks at {rate:g} Gbit/s")
            if "transfers" in options.parts:
                yield from _transfers(hosts, found, num_ranks, options, progress)
            if "iterations" in options.parts:
                settings = options.model, options.methods, options.rounds, options.iterations
                yield training.time_methods(hosts, found[0], num_ranks, *settings)
                progress.update()
    if "loss" in options.parts:
        yield from _time_to_loss(hosts, found[0], options, progress)


def _transfers(
    hosts: Hosts, found: Sequence[Launcher], num_ranks: int, options: argparse.Namespace, progress: tqdm
) -> Iterator[Cell]:
    raw = transfers.raw_rates(hosts, num_ranks, seconds=0.1 if options.quick else 1.0)
    for launcher in found:
        yield from transfers.measure_exchanges(hosts, launcher, num_ranks, raw, options)
        progress.update()


def _time_to_loss(hosts: Hosts, launcher: Launcher, options: argparse.Namespace, progress: tqdm) -> Iterator[Cell]:
    """On the first number of ranks. The curves are recorded on the fastest link, since no link changes them."""
    num_ranks = options.ranks[0]
    hosts.set_rate(max(options.rates))
    curves = {}
    for method in options.methods:
        progress.set_description(f"loss of {method}")
        curves[method] = training.loss_curve(hosts, launcher, num_ranks, method, options.loss_iterations)["losses"]
        progress.update()
    cells = []
    for rate in options.rates:
        hosts.set_rate(rate)
        progress.set_description(f"{LOSS_MODEL} at {rate:g} Gbit/s")
        settings = LOSS_MODEL, options.methods, options.rounds, options.iterations
        cells.append(training.time_methods(hosts, launcher, num_ranks, *settings))
        yield cells[-1]
        progress.update()
    cell = training.times_to_loss(curves, cells)
    checked = CHECKED if CHECKED in options.methods else options.methods[0]
    progress.set_description(f"{checked} in full")
    hosts.set_rate(min(options.rates))
    run = training.loss_curve(hosts, launcher, num_ranks, checked, options.loss_iterations)
    progress.update()
    yield {**cell, "curves": curves, "check": training.check(cell, checked, run)}


def _table(cell: Cell) -> str:
    if cell["kind"] == "transfers":
        return transfers.table(cell)
    if cell["kind"] == "iterations":
        return f"{cell['gbits']:g} Gbit/s: {summary.table(cell)}"
    return training.loss_table(cell)


def _num_jobs(options: argparse.Namespace, found: Sequence[Launcher]) -> int:
    places = len(options.rates) * len(options.ranks)
    jobs = places * len(found) if "transfers" in options.parts else 0
    jobs += places if "iterations" in options.parts else 0
    return jobs + (len(options.methods) + len(options.rates) + 1 if "loss" in options.parts else 0)


def _name(options: argparse.Namespace) -> str:
    """Names the selection."""
    if options.quick:
        return "network-quick"
    parts = [] if options.parts == list(PARTS) else options.parts
    chosen = [] if options.launchers == list(launchers.NAMES) else options.launchers
    rates = [] if options.rates == RATES else [f"{rate:g}gbits" for rate in options.rates]
    ranks = [] if options.ranks == RANKS else [f"{number}r" for number in options.ranks]
    model = [] if options.model == MODEL else [options.model]
    methods = [] if options.methods == list(COMPARED) else [f"{len(options.methods)}methods"]
    return "-".join(["network", *parts, *chosen, *model, *rates, *ranks, *methods])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jointspar bench network", description=" ".join(__doc__.split()[:16]))
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    add("--rates", type=_rate, nargs="+", default=RATES, help="in Gbit/s, default 10 1 0.3 0.1")
    add("--ranks", type=_ranks, nargs="+", default=RANKS, metavar="N", help="one a host, default 2 4")
    add(
        "--launchers", nargs="+", choices=launchers.NAMES, default=list(launchers.NAMES), metavar="L",
        help=f"of {', '.join(launchers.NAMES)} (default all); iterations and loss take the first MPI",
    )  # fmt: skip
    add("--rounds", type=positive, default=5, help="samples of each exchange and method (default 5)")
    add(
        "--megabytes",
        type=_megabytes,
        nargs="+",
        default=[4.0, 16.0],
        metavar="MB",
        help="of dense buffers, default 4 16",
    )
    add("--model", choices=CASES, default=MODEL, help=f"whose gradients and iterations (default {MODEL})")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(COMPARED),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    add("--iterations", type=positive, default=2, help="timed ones in a sample (default 2)")
    add("--loss-iterations", type=positive, default=1000, metavar="N", help="of each loss curve (default 1000)")
    add("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    add("--quick", action="store_true", help="small sizes, one rate: shows that all is right, measures nothing")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    fixed = "rates", "ranks", "rounds", "megabytes", "model", "methods", "iterations", "loss_iterations"
    refuse_beside_quick(parser, options, *fixed)
    for name in ("parts", "rates", "ranks", "launchers", "methods"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))  # none twice
    options.parts = options.parts or list(PARTS)
    if options.quick:
        if options.parts == ["loss"]:
            parser.error("loss: there is no --quick form, since it needs a data set")
        options.parts = [part for part in options.parts if part != "loss"]
        options.rates, options.ranks, options.rounds, options.megabytes = [1.0], [2], 1, [1.0]
        options.model, options.iterations, options.methods = "lenet5", 1, ["ddp", "stratified_0.5"]
        if options.launchers == list(launchers.NAMES):
            options.launchers = ["openmpi", "gloo"]
    return options


def _rate(text: str) -> float:
    gbits = float(text)
    if not 0.01 <= gbits <= 100:
        raise ValueError(text)
    return gbits


def _megabytes(text: str) -> float:
    megabytes = float(text)
    if not 0.001 <= megabytes <= 4096:
        raise ValueError(text)
    return megabytes


def _ranks(text: str) -> int:
    number = int(text)
    if not 2 <= number <= 64:
        raise ValueError(text)
    return number


# what argparse calls the types when it refuses a value
_rate.__name__, _ranks.__name__ = "rate from 0.01 to 100", "number from 2 to 64"
_megabytes.__name__ = "number from 0.001 to 4096"


if __name__ == "__main__":
    sys.exit(main())
