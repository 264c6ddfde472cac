"""report.html: results.json as one page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jointspar.files import write_atomically
from jointspar.training.reproduce import figures
from jointspar.training.reproduce.experiments import FIGURES_FOLDER
from jointspar.training.reproduce.results import columns, table

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"


def write_report(results: Mapping[str, Any], out: Path) -> Path:
    """Draw out/figures/*.png and write out/report.html, which holds them; returns its path."""
    folder = out / FIGURES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [_for_template(experiment) for experiment in results["experiments"]]
    pictures = {picture.name: picture.content for experiment in experiments for picture in experiment["pictures"]}
    for former in folder.glob("*.png"):
        if former.name not in pictures:
            former.unlink()
    for name, content in pictures.items():
        write_atomically(folder / name, content)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(_TEMPLATE).render(
        results=results, experiments=experiments, made_with=_made_with(results), base64=_base64
    )
    write_atomically(out / REPORT_FILE, page)
    return out / REPORT_FILE


def _for_template(experiment: Mapping[str, Any]) -> dict[str, Any]:
    if not experiment["runs"]:
        return {**experiment, "rows": [], "pictures": [], "settings": []}
    return {
        **experiment,
        "settings": _settings(experiment),
        "rows": table(experiment),
        "columns": [column.title for column in columns(experiment)],
        "pictures": list(figures.draw(experiment)),
    }


def _settings(experiment: Mapping[str, Any]) -> list[str]:
    """A line a run: what the list says of it, how gradients were summed, and the commits that made its seeds."""
    return [
        f"{run['label']}: {json.dumps(run['settings'])}"
        + "".join(f" · {word}" for word in _sums(run) + _commits(run["seeds"]))
        for run in experiment["runs"]
    ]


def _sums(run: Mapping[str, Any]) -> list[str]:
    names = {each["summary"].get("exchange") for each in run["seeds"]}
    return sorted(f"sums by {name}" for name in names if name)


def _commits(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Such as "commit 0123456789", or "seed 1: commit 0123456789" where they differ."""
    made = {seed["seed"]: ", ".join(_commit(each) for each in seed["made_with"]) for seed in seeds}
    if len(set(made.values())) == 1:
        return [next(iter(made.values()))]
    return [f"seed {seed}: {words}" for seed, words in made.items()]


def _commit(circumstances: Mapping[str, Any]) -> str:
    commit = circumstances["commit"]
    return "commit unknown" if commit is None else f"commit {commit[:10]}{'+' * commit.endswith('+')}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _made_with(results: Mapping[str, Any]) -> list[str]:
    """On what the runs were made, one line each, in the order of the page."""
    found = [
        _in_words(circumstances)
        for experiment in results["experiments"]
        for run in experiment["runs"]
        for seed in run["seeds"]
        for circumstances in seed["made_with"]
    ]
    return list(dict.fromkeys(found))


def _in_words(circumstances: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {circumstances[name.lower()]}" for name in ("jointspar", "torch", "Python"))
    kernels = f", {circumstances['backend']} kernels" if "backend" in circumstances else ""
    return f"{circumstances['processor']}, {circumstances['cores']} cores · {versions}{kernels}"
