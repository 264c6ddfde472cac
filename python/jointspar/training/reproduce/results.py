"""What complete runs found: results.json, and the table over seeds that is drawn from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jointspar.files import write_atomically
from jointspar.training.data.properties import PROPERTIES
from jointspar.training.records import (
    METRICS_FILE,
    SUMMARY_FILE,
    read_metrics,
    readable_bytes,
    text_table,
)
from jointspar.training.reproduce.experiments import Experiment, ExperimentList
from jointspar.training.reproduce.runs import RUN_FILE, Run, RunError, runs_of

SCHEMA = "jointspar-reproduce/1"
RESULTS_FILE = "results.json"
_OF_AN_EPOCH = ("epoch", "train_loss", "test_accuracy", "seconds", "bytes_sent", "active_fraction", "phase_ms")


def collect(chosen: ExperimentList, out: Path, command: str) -> dict[str, Any]:
    """Everything that complete runs under `out` left; runs that are missing are counted."""
    experiments = [_experiment(experiment, chosen, out) for experiment in chosen.experiments]
    return {
        "schema": SCHEMA,
        "list": chosen.name,
        "title": chosen.title,
        "text": chosen.text,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "experiments": experiments,
    }


def save(results: Mapping[str, Any], out: Path) -> None:
    write_atomically(out / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def _experiment(experiment: Experiment, chosen: ExperimentList, out: Path) -> dict[str, Any]:
    """Raises RunError where its runs were made on different data, which nothing compares."""
    runs = [run for run in runs_of(chosen, out) if run.experiment is experiment]
    by_label = {label: [run for run in runs if run.label == label and run.is_complete] for label in experiment.runs}
    seeds = {label: [_seed(run) for run in complete] for label, complete in by_label.items()}
    of_data = {seed["summary"].get("data"): label for label, rows in seeds.items() for seed in rows}
    of_data.pop(None, None)  # made before that was noted
    if len(of_data) > 1:
        (one, label), (another, other), *_ = of_data.items()
        raise RunError(
            f"{experiment.name}: runs of {label!r} saw {one}, runs of {other!r} {another}: remove the folders of those "
            "that are not of the data wanted"
        )
    return {
        "name": experiment.name,
        "title": experiment.title,
        "text": experiment.text,
        "ranks": experiment.num_ranks,
        "simulated": experiment.is_simulated,
        "reference": experiment.reference,
        "runs_missing": sum(not run.is_complete for run in runs),
        "failed": [
            {"label": run.label, "seed": run.seed, "how": how} for run in runs if (how := run.failure()) is not None
        ],
        "runs": [
            {"label": label, "settings": experiment.runs[label], "seeds": rows} for label, rows in seeds.items() if rows
        ],
    }


def _seed(run: Run) -> dict[str, Any]:
    is_first = run.seed == run.experiment.seeds[0]
    try:
        records = read_metrics(run.folder / METRICS_FILE)
        epochs = [record for record in records if record["kind"] == "epoch"]
        return {
            "seed": run.seed,
            "summary": json.loads((run.folder / SUMMARY_FILE).read_text(encoding="utf-8")),
            "made_with": json.loads((run.folder / RUN_FILE).read_text(encoding="utf-8"))["made_with"],
            "epochs": [{name: record[name] for name in _OF_AN_EPOCH} for record in epochs],
            "probabilities": _probabilities(records) if is_first else None,
        }
    except (ValueError, KeyError) as error:
        raise RunError(
            f"{run.name}: {run.folder} is damaged ({type(error).__name__}: {error}): remove it and run it again"
        ) from error


def _probabilities(records: Sequence[Mapping[str, Any]], most: int = 120) -> dict[str, Any]:
    """Of each layer over time, at most so many moments: {"epoch": [...], "values": [moment][layer]}."""
    steps = [record for record in records if record["kind"] == "step"]
    kept = steps[:: max(1, -(-len(steps) // most))]
    return {
        "epoch": [record["epoch"] for record in kept],
        "values": [[round(p, 3) for p in record["probabilities"]] for record in kept],
    }


class Column(NamedTuple):
    """A column of the table: what it is called, the number of one seed's summary, and how a number is written."""

    title: str
    value: Callable[[Mapping[str, Any]], float | None]
    write: Callable[[float], str]


COLUMNS = (
    Column("test accuracy", lambda summary: 100 * summary["test_accuracy"], lambda value: f"{value:.2f} %"),
    Column("train loss", lambda summary: summary["train_loss"], lambda value: f"{value:.4f}"),
    Column(
        "seconds", lambda summary: summary["seconds"], lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}"
    ),
    Column("sent per rank", lambda summary: summary["bytes_sent"], readable_bytes),
    Column("skipped steps", lambda summary: summary["skipped_steps"], lambda value: f"{value:.3g}"),
    Column("layers computed", lambda summary: 100 * summary["active_fraction"], lambda value: f"{value:.0f} %"),
)


class Row(NamedTuple):
    """A line of the table: mean and range of each column over the seeds that are not lost; points: see `_points`."""

    label: str
    seeds: str
    cells: tuple[str, ...]
    points: float | None


def table(experiment: Mapping[str, Any]) -> list[Row]:
    """The lines of an experiment's table, in the order of its list; a simulated one's seconds are left out."""
    reference = next((run for run in experiment["runs"] if run["label"] == experiment["reference"]), None)
    rows = []
    for run in experiment["runs"]:
        cells = tuple(_mean_and_range(_values(run, column), column.write) for column in columns(experiment))
        points = None if reference is None or run is reference else _points(run, reference)
        rows.append(Row(run["label"], _seeds_in_words(run, experiment["failed"]), cells, points))
    return rows


def kept_seeds(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The seeds that means are taken over: those that are not lost, or all where all are."""
    return [seed for seed in run["seeds"] if not is_lost(seed)] or list(run["seeds"])


def is_lost(seed: Mapping[str, Any]) -> bool:
    """Whether a seed ended below twice the accuracy of guessing."""
    summary = seed["summary"]
    return bool(summary["test_accuracy"] < 2 / PROPERTIES[summary["dataset"]].num_classes)


def _seeds_in_words(run: Mapping[str, Any], failed: Sequence[Mapping[str, Any]]) -> str:
    """Such as "3", or "2, 1 lost, 1 failed"."""
    num_failed = sum(each["label"] == run["label"] for each in failed)
    counts = {"lost": sum(map(is_lost, run["seeds"])), "failed": num_failed}
    return ", ".join([str(len(run["seeds"])), *(f"{count} {what}" for what, count in counts.items() if count)])


def _points(run: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    """Mean difference in accuracy over the seeds that both have, so that none stands against another's luck."""
    its, others = ({seed["seed"]: 100 * seed["summary"]["test_accuracy"] for seed in kept_seeds(each)}
                   for each in (run, reference))  # fmt: skip
    differences = [its[seed] - others[seed] for seed in its if seed in others]
    return float(np.mean(differences)) if differences else None


def columns(experiment: Mapping[str, Any]) -> tuple[Column, ...]:
    """A simulated experiment has no time that means something, one rank sends nothing, and few skip a step."""
    left_out = {"seconds"} if experiment["simulated"] else set()
    if experiment["ranks"] == 1:
        left_out.add("sent per rank")
    if not any(seed["summary"]["skipped_steps"] for run in experiment["runs"] for seed in run["seeds"]):
        left_out.add("skipped steps")
    return tuple(column for column in COLUMNS if column.title not in left_out)


def table_text(experiment: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    titles = (
        "run",
        "seeds",
        *(column.title for column in columns(experiment)),
        f"points from {experiment['reference']}",
    )
    lines = [titles]
    for row in table(experiment):
        lines.append((row.label, row.seeds, *row.cells, "" if row.points is None else f"{row.points:+.2f}"))
    return text_table(lines)


def _values(run: Mapping[str, Any], column: Column) -> list[float]:
    found = [column.value(seed["summary"]) for seed in kept_seeds(run)]
    return [float("nan") if value is None else value for value in found]  # null: a loss that was not finite


def _mean_and_range(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Such as "91.20 % (90.80 % to 91.50 %)"; one value alone where all are written alike."""
    num_lost = int(np.isnan(values).sum())
    if num_lost:
        return f"not finite in {num_lost} of {len(values)}"
    mean, low, high = write(float(np.mean(values))), write(min(values)), write(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"
