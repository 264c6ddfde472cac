"""The command line: jointspar train | reproduce | data | doctor | bench."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

from jointspar.training.config import DATASETS, TrainConfig, flag
from jointspar.training.flags import DATA_DIR_HELP, add_train_flags
from jointspar.training.launch import launcher_rank, local_ranks

EXIT_USAGE = 2  # and missing or damaged data
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_STOPPED = 128 + signal.SIGTERM  # as a shell reports a process that SIGTERM ended
_SPEAKER_GRACE_SECONDS = 1.0


class _Benchmark(NamedTuple):
    script: str  # in bench/ of a checkout; takes all further arguments
    help: str
    packages: tuple[str, ...] = ("matplotlib", "tqdm")  # that it imports, beside the library's own


_BENCHMARKS = {
    "ops": _Benchmark(
        "ops.py",
        "the operations against PyTorch, NumPy and the machine's limit",
        ("matplotlib", "tqdm", "numba", "scipy", "pytest_benchmark"),
    ),
    "backward": _Benchmark("backward.py", "forward and backward at several budgets: time, bytes kept", ()),
    "step": _Benchmark("steps.py", "training iterations by phase, against DDP and its hooks: time, bytes sent"),
    "network": _Benchmark(
        "networks.py", "exchanges and iterations on links of several rates between hosts; needs root"
    ),
    "compare": _Benchmark("compare.py", "two result files of ops, step or network: which ratios got worse", ()),
}


class UsageError(ValueError):
    """A wrong command line."""


class MissingPackages(UsageError):
    """Perhaps on this rank's host alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    0 fine, 1 failed or not usable, 2 wrong flags, missing or damaged data, 128 + N ended by signal N.
    """
    try:
        parser = _make_parser()
        options, rest = parser.parse_known_args(arguments)
        if options.command == "bench":
            return _bench(options.benchmark, rest)
        if rest:
            raise UsageError(f"jointspar {options.command}: unknown argument {rest[0]!r}; see --help")
        if options.command == "train":
            return _train(options)
        if options.command == "reproduce":
            return _reproduce(options)
        if options.command == "data":
            return _check_data(options)
        return _doctor()
    except UsageError as error:
        return _refuse(str(error), is_speaker=launcher_rank() == 0, is_local=isinstance(error, MissingPackages))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of printing the whole usage first."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see `{self.prog} --help`")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jointspar", description="Training with fewer computed and communicated layers per step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,reproduce,data,doctor,bench}")
    train = commands.add_parser(
        "train",
        help="train a model, alone or under mpirun or torchrun",
        description="Train a model, alone or under `mpirun -n N` or `torchrun --nproc-per-node N`. Writes "
        "summary.json, metrics.jsonl, curves.png and checkpoint/ into --out.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_train_flags(train)
    _add_reproduce_flags(
        commands.add_parser(
            "reproduce", help="run a list of experiments, and write tables, figures and a report", allow_abbrev=False
        )
    )
    data = commands.add_parser("data", help="look after the data files")
    actions = data.add_subparsers(dest="action", required=True, metavar="{check}")
    _add_check_flags(actions.add_parser("check", help="say whether a folder holds a dataset, complete and sound"))
    commands.add_parser("doctor", help="say what was built, which MPI is used, and what to do about problems")
    bench = commands.add_parser("bench", help="run the benchmarks of a checkout")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar=f"{{{','.join(_BENCHMARKS)}}}")
    for name, benchmark in _BENCHMARKS.items():
        benchmarks.add_parser(name, help=benchmark.help, add_help=False)  # the script has a --help of its own
    return parser


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what is there, missing or damaged, and where to get it; exit code 0 where all is sound."
    parser.add_argument("--dataset", required=True, choices=DATASETS, metavar="D", help=", ".join(DATASETS))
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help=DATA_DIR_HELP)
    parser.add_argument(
        "--full",
        action="store_true",
        help="decode every picture of ImageNet, not one per class folder or shard (other data are read whole anyway)",
    )


def _add_reproduce_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run every run of a list that is not complete in --out; write results.json, figures/ and report.html there. "
        "What was interrupted goes on from its last checkpoint."
    )
    parser.add_argument(
        "--list", required=True, metavar="L", help="quick (minutes), reduced (hours), paper (a cluster), or a TOML file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results; made if needed")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these experiments of the list")
    parser.add_argument(
        "--launcher", metavar="CMD", help='starts ranks, such as "mpirun --hostfile hosts" (default the mpirun found)'
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the command of each run, and run nothing")
    what.add_argument("--report", action="store_true", help="write the results of what is complete, and run nothing")


def _train(options: argparse.Namespace) -> int:
    given = {field.name: getattr(options, field.name) for field in fields(TrainConfig) if hasattr(options, field.name)}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    try:
        config = TrainConfig(**given)
    except ValueError as error:
        raise UsageError(f"jointspar train: {error}") from error
    _require_packages("train", "matplotlib", "safetensors", "tqdm")
    from jointspar import comm
    from jointspar.training.data.readers import DatasetError
    from jointspar.training.loop import StoppedError
    from jointspar.training.setup import SetupError
    from jointspar.training.start import train

    try:
        train(config)
    except StoppedError as stopped:
        print(f"jointspar train: {stopped}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except SetupError as error:
        return _refuse(f"jointspar train: {_with_flag_names(str(error))}", is_speaker=error.is_speaker)
    except DatasetError as error:
        if comm.world().world_size > 1:
            raise  # what leaves the program ends the other ranks, too
        print(f"jointspar train: {error}; what was saved can be continued with --resume", file=sys.stderr, flush=True)
        return EXIT_USAGE
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    _require_packages(
        "reproduce", "matplotlib", "safetensors", "tqdm", "jinja2", *["tomli"] * (sys.version_info < (3, 11))
    )
    if launcher_rank() > 0 or local_ranks() > 1:
        raise UsageError("jointspar reproduce: start it without a launcher: it starts the ranks of each run itself")
    from jointspar.training.reproduce import ListError, RunError, Terminated, reproduce

    try:
        return reproduce(
            options.list,
            options.out,
            only=options.only,
            launcher=options.launcher,
            is_rehearsal=options.dry_run,
            is_report_only=options.report,
        )
    except (ListError, RunError) as error:
        raise UsageError(f"jointspar reproduce: {error}") from error
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Terminated as stopped:
        code = 128 + stopped.number
    except OSError as error:  # such as a full disk
        print(f"jointspar reproduce: {error}; once that is mended the same command goes on", file=sys.stderr)
        return 1
    print("jointspar reproduce: interrupted; the same command goes on", file=sys.stderr)
    return code


def _require_packages(command: str, *names: str, extra: str = "train") -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackages(f"jointspar {command}: needs {', '.join(missing)}: pip install 'jointspar[{extra}]'")


def _with_flag_names(message: str) -> str:
    """The library's errors begin with the argument's name; on the command line that is a flag."""
    found = re.match(r"(\w+): ", message)
    names = {field.name for field in fields(TrainConfig)}
    return flag(found[1]) + message[found.end(1) :] if found and found[1] in names else message


def _check_data(options: argparse.Namespace) -> int:
    _require_packages("data check", "tqdm")
    from jointspar.training.data.check import check_dataset
    from jointspar.training.data.datasets import is_packaged
    from jointspar.training.data.properties import PROPERTIES

    if options.data_dir is not None and is_packaged(PROPERTIES[options.dataset]):
        raise UsageError(f"jointspar data check: --data-dir: {options.dataset} is part of a package: leave it out")
    return 0 if check_dataset(options.dataset, options.data_dir, is_full=options.full) else EXIT_USAGE


def _doctor() -> int:
    from jointspar.training.doctor import examine

    return examine()


def _bench(name: str, arguments: Sequence[str]) -> int:
    checkout = Path(__file__).resolve().parents[2]
    script = checkout / "bench" / _BENCHMARKS[name].script
    if not script.exists():
        raise UsageError(
            f"jointspar bench {name}: needs a checkout of the sources, whose bench/ folder is not part of an "
            "installation: clone the repository, and install it there with `pip install -e '.[bench,mpi]'`"
        )
    _require_packages(f"bench {name}", *_BENCHMARKS[name].packages, extra="bench")
    search_path = [str(checkout / "python"), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    return _run_script([sys.executable, str(script), *arguments], environment)


def _run_script(command: Sequence[str], environment: dict[str, str]) -> int:
    """Its exit code. Ctrl-C reaches the script as well as this process, and it may have things to take down."""
    script = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: script.terminate())
    try:
        code = script.wait()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    return code if code >= 0 else 128 - code  # a signal ended it


def _refuse(message: str, *, is_speaker: bool, is_local: bool = False) -> int:
    """One rank speaks for all; the others give it time to, since a launcher ends the job when one rank fails.

    is_local: those that are still there then have a reason of their own.
    """
    if not is_speaker:
        time.sleep(_SPEAKER_GRACE_SECONDS)
        message = f"rank {launcher_rank()}: {message}"
    if is_speaker or is_local:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
