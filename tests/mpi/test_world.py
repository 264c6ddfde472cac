"""Which transport `world()` finds, and what it refuses."""

import subprocess
import sys

import pytest

from jointspar import comm
from jointspar.comm import local, world
from jointspar.errors import JointSparError

LAUNCHER_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "PMIX_RANK",
    "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@pytest.fixture
def plain_process(monkeypatch):
    """As started from a shell, before any transport was made and without mpi4py in memory."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(comm, "_world", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    return monkeypatch


def test_a_plain_process_is_a_world_of_one(plain_process):
    assert world().name == "local"
    assert world() is world()
    assert "mpi4py.MPI" not in sys.modules


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_launcher_with_one_rank_is_a_world_of_one(plain_process, name):
    plain_process.setenv(name, "1")
    assert world().name == "local"


@pytest.mark.parametrize(("name", "value"), [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "3"), ("PMIX_RANK", "1")])
def test_a_launcher_without_mpi4py_is_refused(plain_process, name, value):
    plain_process.setenv(name, value)
    plain_process.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(JointSparError, match=r"the launcher started \d or more ranks, but mpi4py cannot be loaded"):
        world()


def test_a_single_task_of_a_batch_system_needs_no_mpi4py(plain_process):
    plain_process.setenv("PMIX_RANK", "0")
    plain_process.setitem(sys.modules, "mpi4py", None)
    assert world().name == "local"


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(plain_process):
    plain_process.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(JointSparError, match="srun started 4 tasks and tells none"):
        world()
    plain_process.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world().name == "local"


def test_several_ranks_without_a_meeting_point_are_refused_with_what_to_do(plain_process):
    plain_process.setenv("WORLD_SIZE", "2")
    with pytest.raises(JointSparError, match="RANK, MASTER_ADDR, MASTER_PORT not set: launch with `torchrun"):
        world()
    plain_process.setenv("WORLD_SIZE", "1")
    assert world().name == "local"


@pytest.mark.parametrize("outer", [{}, {"PMI_SIZE": "4", "PMI_RANK": "1"}, {"PMIX_RANK": "1"}])
def test_torchrun_counts_though_another_launcher_started_it(plain_process, outer):
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "2", **outer}.items():
        plain_process.setenv(name, value)
    plain_process.setattr(comm, "torch_dist", lambda: local())
    assert world().name == "local"


def test_variables_set_by_hand_do_not_count_under_mpirun(plain_process):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "PMI_SIZE": "2"}.items():
        plain_process.setenv(name, value)
    plain_process.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(JointSparError, match="mpi4py cannot be loaded"):
        world()


def test_a_closed_world_is_made_anew_and_a_failed_one_is_not(plain_process):
    first = world()
    first.close()
    assert world() is not first
    second = world()
    second.fail("the reason")
    assert world() is second
    with pytest.raises(JointSparError, match="the reason"):
        world().start_headers(None, what="test")


@pytest.mark.mpi
def test_the_launcher_of_another_mpi_is_refused(mpirun, plain_process):
    """As under the wrong mpirun: its variables speak of two ranks, but MPI knows of one. In a process of its own."""
    plain_process.setenv("OMPI_COMM_WORLD_SIZE", "2")
    program = [sys.executable, "-c", "from jointspar.comm import world; world()"]
    plain_process.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "the launcher started 2 or more ranks, but mpi4py's world has 1" in ended.stderr
    assert "Use the mpirun of that MPI" in ended.stderr
