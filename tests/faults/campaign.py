"""Injects faults into jobs and counts what becomes of them: `make test-faults`, or a part of it.

    python tests/faults/campaign.py [--scale 0.1] [--cases kill stop] [--seconds 150 --append] [--name "Open MPI"]

A fault counts where it is certain that it was there before the job was complete; another is injected for any other.
Counts go to OUT/report.json after each job, one entry for each MPI, and with them OUT/REPORT.md is written anew. With
--append a campaign goes on where an earlier call ended, so that it may run in pieces.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

import report
from jobs import Finished, command_on_ranks, find_launcher, try_job
from report import Counts

HERE = Path(__file__).parent
LIMIT_SECONDS = 5.0
STOP_TIMEOUT = 5.0  # of every wait in such a job, those before the fault too
JOB_SECONDS = 90.0


@dataclass(frozen=True)
class Case:
    """A fault, how often it is injected in a full campaign, and what must become of it."""

    fault: str
    count: int
    must: str  # "end": non-zero in time; "leave no mark": end, without completion; "go on": the job outlives it
    says: str = ""  # what the output must hold
    per_job: int = 1

    @property
    def program(self) -> str:
        return f"{HERE}/one_fault.py:train" if self.per_job == 1 else f"{HERE}/many_faults.py:inject_all"


CASES = (
    Case("kill", 100, "end"),
    Case("stop", 20, "end", "CollectiveTimeout"),
    Case("raise", 20, "end", "ZeroDivisionError"),
    Case("memory", 20, "end", "MemoryError"),
    Case("exit", 20, "end", "DesyncError"),
    Case("os-exit", 20, "leave no mark"),
    Case("loader", 10, "end", "finish"),
    Case("seed", 60, "go on", per_job=20),
    Case("dtype", 60, "go on", per_job=20),
    Case("layers", 60, "go on", per_job=20),
    Case("probabilities", 60, "go on", per_job=20),
    Case("draw", 60, "go on", per_job=20),
    Case("bit", 60, "go on", per_job=20),
    Case("operation", 60, "go on", per_job=20),
    Case("active", 60, "go on", per_job=20),
    Case("nan", 144, "go on", per_job=48),  # 48: 4 layers, up to 4 ranks, 3 exchanges
    Case("inf", 144, "go on", per_job=48),
    Case("infs", 144, "go on", per_job=48),
    Case("float16", 99, "go on", per_job=33),
    Case("even", 30, "go on", per_job=10),
    Case("fork", 30, "go on", per_job=10),
    Case("resume", 30, "go on", per_job=10),
)


def ranks_of(number: int) -> int:
    """For jobs with one fault: mostly two; a tenth has three, a tenth four."""
    return {8: 3, 9: 4}.get(number % 10, 2)


def inject(case: Case, launcher: list[str], num_faults: int, counts: Counts) -> None:
    """Run the next job of a case and count it."""
    number, first = counts.jobs, counts.injected + counts.not_injected
    num_ranks = ranks_of(number) if case.per_job == 1 else 2 + number % 3
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        env = {"FAULT": case.fault, "FAULT_SEED": str(first), "FAULT_RANKS": str(num_ranks)}
        env |= {"FAULT_FOLDER": folder, "FAULT_COUNT": str(num_faults)}
        env["JOINTSPAR_TIMEOUT"] = str(STOP_TIMEOUT if case.fault == "stop" else 30)
        job = try_job(command_on_ranks(launcher, num_ranks, [case.program]), JOB_SECONDS, env)
        places = {path.name: path.read_bytes().decode().strip() for path in Path(folder).glob("place-*")}
    counts.jobs += 1
    counts.seconds += round(time.monotonic() - began, 2)
    counts.wrong_sums += job.output.count("WRONG SUM")
    counts.orphans += job.orphans
    is_single = case.per_job == 1
    if not (_judge_one(case, job, places, counts) if is_single else _judge_many(job, num_ranks, counts)):
        counts.problems.append(job.output[-4000:])


def _judge_one(case: Case, job: Finished, places: dict[str, str], counts: Counts) -> bool:
    """Whether the job did what it must. A fault was injected where its rank said so and did not come to the end."""
    if "FAULT " not in job.output:
        counts.not_injected += 1
        return job.code == 0
    counts.injected += 1
    seconds = job.seconds_after("FAULT")
    counts.slowest_end = max(counts.slowest_end, round(seconds, 2))
    if case.fault in ("kill", "stop"):
        place = places["place-" + re.findall(r"FAULT \d+\.\d+ rank (\d)", job.output)[0]]
        counts.places[place] = counts.places.get(place, 0) + 1
    if job.code is None:
        counts.hung += 1
    elif "COMPLETE rank" in job.output or case.says not in job.output or (case.must == "end" and job.code == 0):
        counts.unnoticed += 1
    elif seconds > LIMIT_SECONDS + (STOP_TIMEOUT if case.fault == "stop" else 0.0):
        counts.slow += 1
    else:
        counts.detected += 1
        return True
    return False


def _judge_many(job: Finished, num_ranks: int, counts: Counts) -> bool:
    """Each injection has the outcome that all ranks agree on; one that the job did not outlive was not noticed."""
    begun = set(re.findall(r"^INJECTED (\w+ \d+)$", job.output, re.MULTILINE))
    outcomes = Counter(re.findall(r"^OUTCOME (\w+ \d+) (\w+) on rank \d+$", job.output, re.MULTILINE))
    detected = sum(outcomes[fault, "detected"] == num_ranks for fault in begun)
    survived = sum(outcomes[fault, "survived"] == num_ranks for fault in begun)
    rest = len(begun) - detected - survived
    counts.injected += len(begun)
    counts.detected += detected
    counts.survived += survived
    counts.hung += rest if job.code is None else 0
    counts.unnoticed += 0 if job.code is None else rest
    return bool(begun) and rest == 0 and job.code == 0


def run_case(case: Case, count: int, launcher: list[str], counts: Counts) -> Iterator[None]:
    """Inject until `count` faults are counted; `counts` is whole after each job, when this yields."""
    most_jobs = 2 * math.ceil(count / case.per_job) + 5
    while counts.injected < count and counts.jobs < most_jobs:
        inject(case, launcher, min(case.per_job, count - counts.injected), counts)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of injections")
    parser.add_argument("--cases", nargs="+", choices=[case.fault for case in CASES], metavar="FAULT")
    parser.add_argument("--launcher", choices=["mpirun", "torchrun"], default="mpirun")
    parser.add_argument("--name", default="Open MPI", help="heading of the entry in the report")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no job after so long")
    parser.add_argument("--append", action="store_true", help="go on with the counts in the report")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    launcher, commit = find_launcher(options.launcher), report.commit()
    end = time.monotonic() + options.seconds
    is_good = True
    for case in CASES:
        if options.cases is not None and case.fault not in options.cases:
            continue
        known = report.read(options.out).get(options.name, {}).get(case.fault, {}) if options.append else {}
        counts = Counts(**known)
        for _ in run_case(case, max(1, math.ceil(case.count * options.scale)), launcher, counts):
            counts.commits = sorted({*counts.commits, commit})
            report.add(options.out, options.name, case.fault, asdict(counts))
            if time.monotonic() > end:
                break
        is_good &= counts.is_good
        print(f"{case.fault}: {'good' if counts.is_good else 'NOT GOOD'}: {asdict(counts)}", flush=True)
        if time.monotonic() > end:
            print("faults: not all cases were reached; --append goes on")
            break
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
