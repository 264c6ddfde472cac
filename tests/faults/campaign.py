"""Injects faults into jobs and counts what becomes of them: `make test-faults`, or a part of it.

    python tests/faults/campaign.py [--scale 0.1] [--cases kill stop] [--mpi "Open MPI"] [--out tests/faults]

Adds its counts to OUT/report.json, one entry for each MPI, and writes OUT/REPORT.md of all entries there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

from jobs import Finished, command_on_ranks, find_launcher, try_job

PROGRAM = f"{Path(__file__).with_name('programs.py')}:train"
LIMIT_SECONDS = 5.0
STOP_TIMEOUT = 2.0


@dataclass(frozen=True)
class Case:
    """A fault, how often it is injected in a full campaign, and what must become of it."""

    fault: str
    count: int
    must: str  # "end": non-zero in time; "leave no mark": end, without completion; "survive": completion on all ranks
    says: str = ""  # what the output must hold


CASES = (
    Case("kill", 100, "end"),
    Case("stop", 20, "end", "CollectiveTimeout"),
    Case("raise", 20, "end", "ZeroDivisionError"),
    Case("memory", 20, "end", "MemoryError"),
    Case("exit", 20, "end", "DesyncError"),
    Case("os-exit", 20, "leave no mark"),
    Case("seed", 10, "end", "setting 'seed' differs"),
    Case("dtype", 10, "end", "setting 'wire_dtype' differs"),
    Case("layers", 10, "end", "differs: rank"),
    Case("probabilities", 10, "end", "the shared probabilities differ"),
    Case("bit", 20, "end", "check of the weights at step 4: layer"),
    Case("loader", 10, "end", "finish"),
    Case("even", 10, "survive"),
    Case("nan", 12, "survive"),
    Case("inf", 12, "survive"),
    Case("infs", 12, "survive"),
    Case("fork", 10, "survive"),
)


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
    slowest_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.injected == self.detected + self.survived and not (self.wrong_sums or self.orphans)


def inject(case: Case, seed: int, launcher: list[str], num_ranks: int) -> Finished:
    with tempfile.TemporaryDirectory() as folder:
        env = {"FAULT": case.fault, "FAULT_SEED": str(seed), "FAULT_RANKS": str(num_ranks), "FAULT_FOLDER": folder}
        env["JOINTSPAR_TIMEOUT"] = str(STOP_TIMEOUT if case.fault == "stop" else 30)
        return try_job(command_on_ranks(launcher, num_ranks, [PROGRAM]), 90, env)


def judge(case: Case, job: Finished, num_ranks: int, counts: Counts) -> None:
    """Count one injection."""
    counts.injected += 1
    counts.wrong_sums += "WRONG SUM" in job.output
    counts.orphans += job.orphans
    is_complete = job.output.count("COMPLETE rank") == num_ranks
    has_end = case.must != "survive" and "FAULT " in job.output
    seconds = job.seconds_after("FAULT") if has_end else 0.0
    counts.slowest_seconds = max(counts.slowest_seconds, round(seconds, 2))
    limit = LIMIT_SECONDS + (STOP_TIMEOUT if case.fault == "stop" else 0.0)
    if job.code is None:
        counts.hung += 1
    elif case.must == "survive" and job.code == 0 and is_complete:
        counts.survived += 1
    elif case.must == "survive" or is_complete or case.says not in job.output or (case.must == "end" and job.code == 0):
        counts.unnoticed += 1
    elif seconds > limit:
        counts.slow += 1
    else:
        counts.detected += 1
        return
    if case.must != "survive" or job.code != 0:
        counts.problems.append(job.output[-2000:])


def run_cases(cases: list[Case], scale: float, launcher: list[str]) -> Iterator[tuple[Case, Counts]]:
    for case in cases:
        counts = Counts()
        for seed in range(max(1, math.ceil(case.count * scale))):
            num_ranks = 2 + seed % 3
            judge(case, inject(case, seed, launcher, num_ranks), num_ranks, counts)
        yield case, counts


def report(entries: dict[str, dict]) -> str:
    """All entries as Markdown."""
    lines = [
        "# Faults injected",
        "",
        "Written by `make test-faults`; `tests/faults/campaign.py` says what each is.",
        "",
    ]
    columns = ("injected", "detected", "survived", "hung", "slow", "unnoticed", "wrong_sums", "orphans")
    for name, entry in entries.items():
        lines += [f"## {name}", "", f"{entry['seconds']:.0f} s, scale {entry['scale']:g} of a full campaign.", ""]
        lines += ["| fault | " + " | ".join(columns).replace("_", " ") + " | slowest end, s |"]
        lines += ["|" + "---|" * (len(columns) + 2)]
        for fault, counts in entry["cases"].items():
            figures = " | ".join(str(counts[column]) for column in columns)
            lines.append(f"| {fault} | {figures} | {counts['slowest_seconds']:g} |")
        lines.append("")
    return "\n".join(lines)


def add_entry(out: Path, name: str, entry: dict) -> None:
    path = out / "report.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = entry
    path.write_text(json.dumps(entries, indent=1) + "\n")
    (out / "REPORT.md").write_text(report(entries))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of injections")
    parser.add_argument("--cases", nargs="+", choices=[case.fault for case in CASES], metavar="FAULT")
    parser.add_argument("--launcher", choices=["mpirun", "torchrun"], default="mpirun")
    parser.add_argument("--name", default="Open MPI", help="heading of the entry in the report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases is None or case.fault in options.cases]
    began = time.monotonic()
    results: dict[str, dict] = {}
    is_good = True
    for case, counts in run_cases(cases, options.scale, find_launcher(options.launcher)):
        is_good &= counts.is_good
        results[case.fault] = asdict(counts)
        print(f"{case.fault}: {'good' if counts.is_good else 'NOT GOOD'}: {asdict(counts)}", flush=True)
        entry = {"scale": options.scale, "seconds": time.monotonic() - began, "cases": results}
        add_entry(options.out, options.name, entry)
    return 0 if is_good else 1


if __name__ == "__main__":
    os.environ.setdefault("JOINTSPAR_REQUIRE_MPI", "")
    sys.exit(main())
