"""A few of each kind of fault; `make test-faults` injects them all, and under MPICH too."""

import pytest

from campaign import CASES, Counts, inject, judge
from checkpoints import campaign as damage_checkpoints
from jobs import find_launcher

SHORT = {"kill": 2, "stop": 1, "raise": 1, "exit": 2, "os-exit": 1, "bit": 1, "even": 1, "infs": 1, "fork": 1}


@pytest.mark.mpi
@pytest.mark.parametrize("case", [case for case in CASES if case.fault in SHORT], ids=lambda case: case.fault)
def test_a_fault_ends_the_job_or_is_survived(case):
    counts = Counts()
    for seed in range(SHORT[case.fault]):
        judge(case, inject(case, seed, find_launcher("mpirun"), 2), 2, counts)
    counts.detected += counts.slow  # nothing here asserts a time
    assert counts.is_good, counts


def test_checkpoints_survive_kills_and_damage():
    counts = damage_checkpoints(kills=5, truncations=10, flips=10)
    assert counts["killed while saving"] == {"injected": 5, "survived": 5}
    for damage in ("truncated", "bit flipped"):
        assert counts[damage] == {"injected": 10, "detected": 10}
