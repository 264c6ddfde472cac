"""Ranks that die while the others go on, means over those that are left; Open MPI under `mpirun --with-ft ulfm`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import command_on_ranks, environment, find_launcher, find_mpirun, try_job

pytestmark = pytest.mark.mpi

PROGRAMS = Path(__file__).parents[1] / "faults" / "losses.py"


def is_open_mpi():
    path = find_mpirun()
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout if path else ""
    return "Open MPI" in version


@pytest.fixture
def run_mortals():
    """run_mortals(n, name, victims, seed): a job of n ranks that run a program of losses.py, and of which some die."""
    launcher = [*find_launcher("mpirun")[:1], "--with-ft", "ulfm", "-n"]
    if not is_open_mpi():
        pytest.skip("needs Open MPI's mpirun")

    def run(n, name, victims=(), seed=0):
        env = {"VICTIMS": " ".join(map(str, victims)), "SEED": str(seed), "JOINTSPAR_TIMEOUT": "20"}
        return try_job(command_on_ranks(launcher, n, [f"{PROGRAMS}:{name}"]), 60, env)

    return run


@pytest.mark.parametrize(("num_ranks", "victims", "seed"), [(3, [0], 1), (2, [1], 3), (4, [1, 2], 7)])
def test_the_ranks_that_are_left_go_on_with_their_means(run_mortals, num_ranks, victims, seed):
    job = run_mortals(num_ranks, "survive", victims, seed)
    left = num_ranks - len(victims)
    ends = re.findall(rf"END rank \d of {left} after [1-9] losses", job.output)
    assert len(ends) == left, job.output
    assert job.code is not None and job.orphans == 0, job.output


def test_a_transport_is_shrunk_where_it_was_made_for_that(run_mortals):
    job = run_mortals(2, "use_what_is_left")
    assert job.output.count("DONE") == 2 and job.code == 0, job.output


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_two_optimizers_on_a_transport_that_shrinks_both_go_on(run_mortals, num_ranks):
    job = run_mortals(num_ranks, "share_what_is_left")
    assert job.output.count("DONE") == num_ranks and job.code == 0, job.output


def test_a_transport_may_be_shrunk_while_buckets_travel(run_mortals):
    job = run_mortals(2, "leave_what_travels_during_backward")
    assert job.output.count("DONE") == 2 and job.code == 0, job.output


@pytest.mark.parametrize("name", ["lose_a_rank_at_exit", "lose_a_rank_after_the_finish"])
def test_a_rank_that_dies_while_all_leave_takes_no_other_along(run_mortals, name):
    job = run_mortals(3, name)
    assert job.output.count("LEFT") == 2 and "ends the job" not in job.output, job.output
    assert job.code is not None and job.orphans == 0, job.output


def test_an_exception_still_ends_the_whole_job(run_mortals):
    job = run_mortals(2, "raise_on_one_rank")
    assert job.code not in (0, None) and "ZeroDivisionError: the fault" in job.output, job.output
    assert job.seconds_after("FAULT") < 5


def test_without_a_launcher_that_goes_on_it_is_refused():
    script = "import jointspar as js; js.comm.mpi(on_failure='shrink')"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "needs Open MPI 5 or later, started as `mpirun --with-ft ulfm -n N`" in ended.stderr
