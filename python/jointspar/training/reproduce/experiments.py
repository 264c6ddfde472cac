"""Lists of experiments: what a TOML file says, checked before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jointspar.training.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTS = Path(__file__).parent
FIGURES_FOLDER = "figures"  # beside the folders of the experiments
# What the list says elsewhere, or what belongs to the machine and not to the experiment.
_NOT_SETTINGS = ("out", "seed", "resume", "data_dir", "max_steps", "simulate_workers")
_SETTINGS = tuple(field.name for field in fields(TrainConfig) if field.name not in _NOT_SETTINGS)
_TYPES = get_type_hints(TrainConfig)
_LIST_KEYS = {"title": str, "text": str, "settings": dict, "runs": dict, "experiments": list}
_EXPERIMENT_KEYS = {"name": str, "title": str, "text": str, "ranks": int, "simulate_workers": int, "seeds": list,
                    "settings": dict, "reference": str, "runs": dict}  # fmt: skip


class ListError(ValueError):
    """A list of experiments is missing or wrong; the message names file, experiment and run."""


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared with each other. runs: settings of `jointspar train` by label; seeds: of each run.

    num_ranks: 1 for one process. is_simulated: that process plays the ranks. reference: the label that others are
    compared with.
    """

    name: str
    title: str
    text: str
    num_ranks: int
    is_simulated: bool
    seeds: tuple[int, ...]
    reference: str
    runs: dict[str, dict[str, Any]]

    def config(self, label: str, seed: int, out: Path) -> TrainConfig:
        """The settings of one training run. Raises ValueError naming the flag that is wrong."""
        settings = dict(self.runs[label])
        if "milestones" in settings:
            settings["milestones"] = tuple(settings["milestones"])
        workers = self.num_ranks if self.is_simulated else None
        return TrainConfig(out=out, seed=seed, simulate_workers=workers, **settings)


@dataclass(frozen=True)
class ExperimentList:
    """A whole file: what it is about, and its experiments in order."""

    name: str
    title: str
    text: str
    experiments: tuple[Experiment, ...]


def load_list(name: str) -> ExperimentList:
    """Read the list of that name that comes with jointspar, else the TOML file at that path. Raises ListError."""
    path = LISTS / f"{name}.toml"
    if not re.fullmatch(r"[\w-]+", name) or not path.is_file():
        path = Path(name)
    known = ", ".join(sorted(each.stem for each in LISTS.glob("*.toml")))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ListError(f"--list {name}: there is no such list or file; choose from {known}, or give a path") from error
    except OSError as error:
        raise ListError(f"--list {name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ListError(f"--list {name}: not TOML: {error}") from error
    return parse_list(path.stem, content)


def parse_list(name: str, content: Mapping[str, Any]) -> ExperimentList:
    """Check what a file holds. Raises ListError, before anything of it was run."""
    _check_keys(name, content, _LIST_KEYS, required=("title", "experiments"))
    if not content["experiments"]:
        raise ListError(f"{name}: experiments is empty")
    found = tuple(_parse_experiment(f"{name}, experiment {i + 1}", each, content)
                  for i, each in enumerate(content["experiments"]))  # fmt: skip
    names = [experiment.name for experiment in found]
    repeated = sorted({each for each in names if names.count(each) > 1})
    if repeated:
        raise ListError(f"{name}: two experiments are named {repeated[0]!r}")
    return ExperimentList(name, content["title"], content.get("text", ""), found)


def select(chosen: ExperimentList, names: Sequence[str]) -> ExperimentList:
    """Only the named experiments, all if none is named. Raises ListError for an unknown name."""
    known = [experiment.name for experiment in chosen.experiments]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ListError(f"--only {unknown[0]}: no such experiment in {chosen.name}; choose from {', '.join(known)}")
    kept = tuple(each for each in chosen.experiments if not names or each.name in names)
    return ExperimentList(chosen.name, chosen.title, chosen.text, kept)


def folder_name(label: str) -> str:
    """A run's folder: its label, blanks as dashes."""
    return label.replace(" ", "-")


def _parse_experiment(place: str, content: Mapping[str, Any], whole: Mapping[str, Any]) -> Experiment:
    """whole: the list, whose settings and runs hold where an experiment does not say otherwise."""
    if not isinstance(content, Mapping):
        raise ListError(f"{place}: must be a table")
    _check_keys(place, content, _EXPERIMENT_KEYS, required=("name",))
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", content["name"]) or content["name"] == FIGURES_FOLDER:
        raise ListError(
            f"{place}: name {content['name']!r} names a folder: use a-z, 0-9 and dashes, and not {FIGURES_FOLDER!r}"
        )
    place = f"{place} ({content['name']})"
    if "ranks" in content and "simulate_workers" in content:
        raise ListError(f"{place}: ranks and simulate_workers exclude each other")
    num_ranks = content.get("simulate_workers", content.get("ranks", 1))
    if num_ranks < 1:
        raise ListError(f"{place}: {num_ranks} ranks; at least 1 is needed")
    seeds = content.get("seeds", [0])
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ListError(f"{place}: seeds must be different integers, got {seeds}")
    common = {**whole.get("settings", {}), **content.get("settings", {})}
    runs = _parse_runs(place, content.get("runs", whole.get("runs", {})), common)
    reference = content.get("reference", next(iter(runs)))
    if reference not in runs:
        raise ListError(f"{place}: reference {reference!r} is none of its runs")
    title = content.get("title", content["name"])
    experiment = Experiment(content["name"], title, content.get("text", ""), num_ranks, "simulate_workers" in content,
                            tuple(seeds), reference, runs)  # fmt: skip
    for label in runs:
        try:
            for seed in seeds:
                experiment.config(label, seed, Path())
        except (ValueError, TypeError) as error:
            raise ListError(f"{place}, run {label!r}: {error}") from error
    return experiment


def _parse_runs(place: str, content: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not content:
        raise ListError(f"{place}: runs is empty")
    runs: dict[str, dict[str, Any]] = {}
    for label, own in content.items():
        where = f"{place}, run {label!r}"
        if not re.fullmatch(r"[^\W_][\w .,+=-]*", label):
            raise ListError(
                f"{where}: a label names a folder: use letters, digits, blanks and . , + = - _ after a letter or digit"
            )
        if not isinstance(own, Mapping):
            raise ListError(f"{where}: must be a table of settings")
        settings = {name: _as_type(where, name, value) for name, value in {**common, **own}.items()}
        if folder_name(label) in map(folder_name, runs):
            raise ListError(f"{where}: its folder would be that of another run")
        runs[label] = settings
    return runs


def _as_type(where: str, name: str, value: Any) -> Any:
    """A TOML value as the setting's annotation wants it, such as `int | None`; whole numbers may stand for floats."""
    if name not in _SETTINGS:
        raise ListError(f"{where}: unknown setting {name!r}; choose from {', '.join(_SETTINGS)}")
    annotation = _TYPES[name]
    types = {getattr(each, "__origin__", None) or each for each in get_args(annotation) or (annotation,)}
    if isinstance(value, list) and tuple in types and all(type(item) in (int, float) for item in value):
        return [float(item) for item in value]
    if type(value) is int and float in types and int not in types:
        return float(value)
    if isinstance(value, list) or type(value) not in types:
        raise ListError(f"{where}: {name} = {value!r} has the wrong type")
    return value


def _check_keys(place: str, content: Mapping[str, Any], known: Mapping[str, type], required: Sequence[str]) -> None:
    for name, value in content.items():
        if name not in known:
            raise ListError(f"{place}: unknown entry {name!r}; choose from {', '.join(known)}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise ListError(f"{place}: {name} must be {_TOML_NAMES[known[name]]}")
    missing = [name for name in required if name not in content]
    if missing:
        raise ListError(f"{place}: {missing[0]} is missing")


_TOML_NAMES = {str: "a string", int: "an integer", list: "a list", dict: "a table"}
