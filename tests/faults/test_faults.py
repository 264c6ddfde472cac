"""A short selection of the fault campaign; `make test-faults` runs it whole, under Open MPI and MPICH."""

import subprocess
import sys
from pathlib import Path

import pytest

from campaign import CASES, Case, run_case
from jobs import environment, find_launcher
from report import Counts, read

SINGLE = [case for case in CASES if case.per_job == 1]
MANY = [case.fault for case in CASES if case.per_job > 1]


def assert_good(case, count):
    counts = Counts()
    for _ in run_case(case, count, find_launcher("mpirun"), counts):
        pass
    assert counts.is_good, "\n".join([str(counts), *counts.problems])  # whole: pytest shortens tuples


@pytest.mark.mpi
@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.fault)
def test_one_ranks_failure_ends_the_job_in_time_and_without_orphans(case):
    assert_good(case, 3 if case.fault == "kill" else 1)


@pytest.mark.mpi
def test_differences_are_named_and_the_rest_is_survived_with_right_sums():
    assert_good(Case(" ".join(MANY), 4 * len(MANY), "go on", per_job=4), 4 * len(MANY))


def test_checkpoints_survive_kills_and_refuse_damage(tmp_path):
    script = str(Path(__file__).with_name("checkpoints.py"))
    command = [sys.executable, script, "--count", "5", "--out", str(tmp_path)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cases = read(tmp_path)["Checkpoints"]
    assert {name: counts["injected"] for name, counts in cases.items()} == dict.fromkeys(cases, 5)
    assert len(cases) == 3
