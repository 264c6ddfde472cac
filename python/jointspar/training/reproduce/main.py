"""The command `jointspar reproduce`: run what is missing of a list, then write its results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jointspar.training.launch import ending_signals_raise
from jointspar.training.reproduce import results
from jointspar.training.reproduce.experiments import ExperimentList, load_list, select
from jointspar.training.reproduce.process import Terminated, alone_in
from jointspar.training.reproduce.report import write_report
from jointspar.training.reproduce.runs import (
    Run,
    RunError,
    check_folder,
    check_runs,
    command,
    execute,
    found_launcher,
    parse_launcher,
    runs_of,
)


def reproduce(
    name: str, out: Path, *, only: Sequence[str] = (), launcher: str | None = None, is_rehearsal: bool = False,
    is_report_only: bool = False,
) -> int:  # fmt: skip
    """Run every run of a list that is not complete in `out`, and write out/{results.json, report.html, figures/}.

    A run that was interrupted goes on from its last checkpoint; one that fails is reported and the others go on.
    is_rehearsal: print the commands instead. Returns the exit code: 1 where a run failed. Raises ListError and RunError
    before anything runs, Terminated and OSError at any time.
    """
    whole = load_list(name)
    chosen = select(whole, only)
    runs = list(runs_of(chosen, out))
    if is_report_only and launcher is not None:
        raise RunError("--launcher does not act with --report: leave it out")
    words = parse_launcher(launcher, runs)
    if is_rehearsal:
        for run in runs:
            print(shlex.join(command(run, words)))
        return 0
    for run in runs_of(whole, out):
        check_folder(run)
    missing = [] if is_report_only else [run for run in runs if not run.is_complete]
    check_runs(missing)
    if any(run.needs_launcher for run in missing):
        words = found_launcher(words)
    _prepare_folder(out, must_exist=is_report_only)
    with ending_signals_raise(Terminated):
        failures = _run_all(missing, words)
        _write(whole, chosen, out, _own_command(name, launcher, out))
    for failure in failures:
        print(f"jointspar reproduce: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _prepare_folder(out: Path, *, must_exist: bool) -> None:
    if must_exist and not out.is_dir():
        raise RunError(f"--out {out}: there is no such folder to report on")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}; give another folder") from error


def _run_all(runs: Sequence[Run], launcher: Sequence[str]) -> list[RunError]:
    """One run after the other; what failed."""
    failures = []
    total = sum(run.config.epochs for run in runs)
    with tqdm(total=total, unit="epoch", disable=None if runs else True) as progress:
        for number, run in enumerate(runs, start=1):
            last = progress.n + run.config.epochs
            progress.set_description(run.name)
            if progress.disable:
                print(f"{number}/{len(runs)}  {run.name}", flush=True)

            def show(line: str) -> None:
                progress.update()
                progress.set_postfix_str(line.partition("  ")[2])

            try:
                execute(run, launcher, show)
            except RunError as error:
                progress.write(f"failed: {run.name}", file=sys.stderr)
                failures.append(error)
            progress.update(last - progress.n)  # whatever a resumed or failed run did not say
    return failures


def _write(whole: ExperimentList, chosen: ExperimentList, out: Path, own_command: str) -> None:
    """The files of `whole`, whichever process made its runs, and the tables of `chosen`."""
    with alone_in(out):
        found = results.collect(whole, out, own_command)
        results.save(found, out)
        page = write_report(found, out)
    _print_tables(found, chosen)
    print(f"report: {page}; data: {out / results.RESULTS_FILE}")


def _print_tables(found: Mapping[str, Any], chosen: ExperimentList) -> None:
    names = [experiment.name for experiment in chosen.experiments]
    for experiment in found["experiments"]:
        if experiment["name"] in names and experiment["runs"]:
            print(f"\n{experiment['title']}\n{results.table_text(experiment)}")
    print()


def _own_command(name: str, launcher: str | None, out: Path) -> str:
    words = ["jointspar", "reproduce", "--list", name, "--out", str(out)]
    return shlex.join(words if launcher is None else [*words, "--launcher", launcher])
