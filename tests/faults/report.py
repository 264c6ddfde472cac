"""The counts of faults, fuzzing and mutations: report.json, and REPORT.md for people."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FUZZ, MUTATIONS = "Fuzzing", "Mutations"
# What outcomes depend on; a commit of other files leaves them as they were.
_SOURCES = ("python", "csrc", "jointspar_ext", "tests/faults/*.py", "tests/fuzz/*.py", "tests/jobs.py")
_COLUMNS = ("injected", "detected", "survived", "hung", "slow", "unnoticed", "wrong_sums", "orphans", "not_injected")

Report = dict[str, dict[str, dict[str, Any]]]  # section -> case -> figures


@dataclass
class Counts:
    """Of one case: each injection is detected, survived, or wrong in some way."""

    injected: int = 0
    detected: int = 0
    survived: int = 0
    hung: int = 0
    slow: int = 0
    unnoticed: int = 0
    wrong_sums: int = 0
    orphans: int = 0
    not_injected: int = 0  # the job was complete before, or never came to the fault
    jobs: int = 0
    seconds: float = 0.0
    slowest_end: float = 0.0  # seconds from the fault to the end of the job
    places: dict[str, int] = field(default_factory=dict)  # phases in which a signal met the rank
    commits: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # the end of the output of jobs that went wrong

    @property
    def is_good(self) -> bool:
        is_whole = 0 < self.injected == self.detected + self.survived
        return is_whole and not (self.wrong_sums or self.orphans or self.problems)


def commit() -> str:
    """The commit of the sources that are run, with + where they were changed since; "unknown" outside of git."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments, "--", *_SOURCES]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(folder: Path) -> Report:
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add(folder: Path, section: str, case: str, figures: dict[str, Any]) -> None:
    """Put the figures of one case in the place of those before, and write the report anew."""
    entries = read(folder)
    entries.setdefault(section, {})[case] = figures
    (folder / "report.json").write_text(json.dumps(entries, indent=1) + "\n")
    (folder / "REPORT.md").write_text(as_markdown(entries))


def as_markdown(entries: Report) -> str:
    lines = [
        "# Faults injected",
        "",
        "Written by `make test-faults`, `make fuzz` and `make test-mutations`. `campaign.py`, `one_fault.py`, "
        "`differences.py`, `survivals.py` and `checkpoints.py` say what each fault is, and report.json holds more.",
        "",
    ]
    for section, cases in entries.items():
        table = {FUZZ: _fuzz_table, MUTATIONS: _mutation_table}.get(section, _fault_table)
        lines += [f"## {section}", "", *table(cases), ""]
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _fault_table(cases: dict[str, dict[str, Any]]) -> list[str]:
    names = [column.replace("_", " ") for column in _COLUMNS]
    lines = [_row("fault", *names, "jobs", "s", "slowest end, s", "commit"), "|" + "---|" * (len(names) + 5)]
    for fault, counts in cases.items():
        figures = [counts.get(column, 0) for column in _COLUMNS]
        slowest = f"{counts['slowest_end']:g}" if counts.get("slowest_end") else ""
        lines.append(
            _row(fault, *figures, counts["jobs"] or "", f"{counts['seconds']:.0f}", slowest, *_commits(counts))
        )
    for fault, counts in cases.items():
        if counts.get("places"):
            places = ", ".join(f"{place} {number}" for place, number in sorted(counts["places"].items()))
            lines += ["", f"Where '{fault}' met its rank: {places}."]
    return lines


def _fuzz_table(targets: dict[str, dict[str, Any]]) -> list[str]:
    lines = [_row("target", "inputs", "failures", "s", "commit"), "|---|---|---|---|---|"]
    for name, counts in targets.items():
        lines.append(
            _row(name, f"{counts['inputs']:,}", counts["failures"], f"{counts['seconds']:.0f}", *_commits(counts))
        )
    return [*lines, _row("all", f"{sum(counts['inputs'] for counts in targets.values()):,}", "", "", "")]


def _mutation_table(mutations: dict[str, dict[str, Any]]) -> list[str]:
    lines = [_row("what is taken out", "outcome", "test", "commit"), "|---|---|---|---|"]
    return lines + [_row(what, m["outcome"], f"`{m['test']}`", *_commits(m)) for what, m in mutations.items()]


def _commits(figures: dict[str, Any]) -> list[str]:
    return [", ".join(figures.get("commits", []))]
