"""report.html: results.json as one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jointspar.training.records import write_atomically
from jointspar.training.reproduce import figures
from jointspar.training.reproduce.results import columns, table

REPORT_FILE, FIGURES_FOLDER = "report.html", "figures"
_TEMPLATE = "report.html.jinja"


def write_report(results: Mapping[str, Any], out: Path) -> Path:
    """Draw out/figures/*.png and write out/report.html, which holds them; returns its path."""
    folder = out / FIGURES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [_for_template(experiment, folder) for experiment in results["experiments"]]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(_TEMPLATE).render(
        results=results, experiments=experiments, commits=_commits(results)
    )
    write_atomically(out / REPORT_FILE, page)
    return out / REPORT_FILE


def _for_template(experiment: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if not experiment["runs"]:
        return {**experiment, "rows": []}
    drawn = figures.draw(experiment, folder)
    return {
        **experiment,
        "rows": table(experiment),
        "columns": [column.title for column in columns(experiment)],
        "figures": {caption: base64.b64encode(path.read_bytes()).decode() for caption, path in drawn.items()},
    }


def _commits(results: Mapping[str, Any]) -> list[str]:
    """Of all runs, shortened, in the order of the page."""
    found = [
        commit[:10] + "+" * commit.endswith("+")
        for experiment in results["experiments"]
        for run in experiment["runs"]
        for seed in run["seeds"]
        for commit in seed["commits"]
        if commit
    ]
    return list(dict.fromkeys(found))
