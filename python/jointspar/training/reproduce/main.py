"""The command `jointspar reproduce`: run what is missing of a list, then write its results."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from jointspar.training.reproduce import results
from jointspar.training.reproduce.experiments import ExperimentList, load_list, select
from jointspar.training.reproduce.report import write_report
from jointspar.training.reproduce.runs import Run, RunError, check_folder, command, execute, runs_of

_STOPPED = 128 + signal.SIGTERM


def reproduce(
    name: str, out: Path, *, only: Sequence[str] = (), launcher: str | None = None, is_rehearsal: bool = False,
    is_report_only: bool = False,
) -> int:  # fmt: skip
    """Run every run of a list that is not complete in `out`, and write out/{results.json, report.html, figures/}.

    A run that was interrupted goes on from its last checkpoint; one that fails is reported and the others go on.
    is_rehearsal: print the commands instead. Returns the exit code: 1 where a run failed. Raises ListError, RunError.
    """
    whole = load_list(name)
    chosen = select(whole, only)
    words = shlex.split(launcher) if launcher else None
    runs = list(runs_of(chosen, out))
    if is_rehearsal:
        for run in runs:
            print(shlex.join(command(run, words or ["mpirun"])))
        return 0
    for run in runs_of(whole, out):
        check_folder(run)
    out.mkdir(parents=True, exist_ok=True)
    failures = [] if is_report_only else _run_all(runs, words)
    found = results.collect(whole, out, _own_command(name, only, launcher, out))
    results.save(found, out)
    page = write_report(found, out)
    _print_tables(found, chosen)
    print(f"report: {page}; data: {out / results.RESULTS_FILE}")
    for failure in failures:
        print(f"jointspar reproduce: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run_all(runs: Sequence[Run], launcher: Sequence[str] | None) -> list[RunError]:
    """Everything that is missing; what failed."""
    failures = []
    total = sum(run.config.epochs for run in runs)
    with _interrupt_on_sigterm(), tqdm(total=total, unit="epoch", disable=None) as progress:
        for run in runs:
            first = progress.n
            if run.is_complete:
                progress.total -= run.config.epochs  # of the time left only what is to be run speaks
                progress.refresh()
                continue
            progress.set_description(run.name)
            if not sys.stderr.isatty():
                print(run.name, flush=True)

            def show(line: str) -> None:
                progress.update()
                progress.set_postfix_str(line.partition("  ")[2])

            try:
                execute(run, launcher, show)
            except RunError as error:
                progress.write(f"failed: {run.name}", file=sys.stderr)
                failures.append(error)
            progress.update(first + run.config.epochs - progress.n)  # whatever a resumed or failed run did not say
    return failures


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves through the `finally` of what is running, which ends its job."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(_STOPPED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_tables(found: results.Result, chosen: ExperimentList) -> None:
    names = [experiment.name for experiment in chosen.experiments]
    for experiment in found["experiments"]:
        if experiment["name"] in names and experiment["runs"]:
            print(f"\n{experiment['title']}\n{results.table_text(experiment)}")
    print()


def _own_command(name: str, only: Sequence[str], launcher: str | None, out: Path) -> str:
    words = ["jointspar", "reproduce", "--list", name, "--out", str(out)]
    if only:
        words += ["--only", *only]
    if launcher:
        words += ["--launcher", launcher]
    return shlex.join(words)
