"""Which transport `world()` finds, and what it refuses."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

import warm_python
from jointspar import comm
from jointspar.comm import local, mpi_library, world
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
    plain_process.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world().name == "local"


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_task_of_several_is_refused_without_mpi4py(plain_process, rank):
    plain_process.setenv("PMIX_RANK", rank)
    plain_process.setenv("SLURM_STEP_NUM_TASKS", "4")
    plain_process.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(JointSparError, match="the launcher started 4 or more ranks, but mpi4py cannot be loaded"):
        world()


def an_mpi_of(size):
    """mpi4py.MPI whose world has so many ranks."""
    world_of = SimpleNamespace(Get_size=lambda: size)
    return SimpleNamespace(
        COMM_WORLD=world_of, Is_initialized=lambda: True, Is_finalized=lambda: False,
        Get_library_version=lambda: "MPICH Version: 5.0",
    )  # fmt: skip


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_task_is_refused_by_an_mpi_that_does_not_speak_the_launchers_pmix(plain_process, rank):
    plain_process.setenv("PMIX_RANK", rank)
    plain_process.setenv("SLURM_STEP_NUM_TASKS", "4")
    plain_process.setattr(comm, "load_mpi", lambda: an_mpi_of(1))
    with pytest.raises(JointSparError, match="started 4 or more ranks, but mpi4py's world has 1"):
        world()
    plain_process.setenv("WORLD_SIZE", "1")  # tasks that are meant to be alone
    assert world().name == "local"


def test_mpi_by_name_is_refused_under_the_launcher_of_another(plain_process):
    plain_process.setenv("OMPI_COMM_WORLD_SIZE", "2")
    plain_process.setattr(sys.modules["jointspar.comm.mpi"], "load_mpi", lambda: an_mpi_of(1))
    with pytest.raises(JointSparError, match="started 2 or more ranks, but mpi4py's world has 1"):
        comm.mpi(timeout=5.0)


@pytest.mark.parametrize(
    ("library", "limit", "expected"),
    [
        ("Open MPI v5.0.11, package", "", 65536 - 4096),
        ("Open MPI v5.0.11, package", "131072", 131072 - 4096),
        ("Open MPI v5.0.11, package", "1048576", 2**18),
        ("Open MPI v5.0.11, package", "64k", 65536 - 4096),
        ("Open MPI v5.0.11, package", "0", 4096),
        ("MPICH Version: 5.0", "1048576", None),
    ],
)
def test_a_short_message_is_within_open_mpis_limit(plain_process, library, limit, expected):
    plain_process.setenv("OMPI_MCA_btl_tcp_eager_limit", limit)
    assert mpi_library.eager_bytes(SimpleNamespace(Get_library_version=lambda: library)) == expected


def tell_the_eager_limit():
    transport = comm.mpi()
    print(f"{transport.name}: {transport.eager_bytes}\n", end="", flush=True)


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)
@pytest.mark.parametrize(("limit", "expected"), [(None, 2**18), ("131072", 131072 - 4096)])
def test_open_mpi_gets_a_longer_limit_unless_it_has_one(run_ranks, monkeypatch, limit, expected):
    monkeypatch.delenv("OMPI_MCA_btl_tcp_eager_limit", raising=False)
    given = {"OMPI_MCA_btl_tcp_eager_limit": limit} if limit else {}
    lines = [line for line in run_ranks(2, tell_the_eager_limit, env=given).output.splitlines() if "mpi: " in line]
    told = "None" if all("MPICH" in line for line in lines) else str(expected)
    assert [line.rpartition(": ")[2] for line in lines] == [told] * 2


def test_an_outer_launchers_count_is_no_reason_to_refuse_a_world_of_several(plain_process):
    """Such as srun's, in whose job an mpirun of another MPI was started."""
    plain_process.setenv("PMI_SIZE", "8")
    given = an_mpi_of(2)
    given.COMM_NULL = given.COMM_WORLD  # where the call is to end
    plain_process.setattr(sys.modules["jointspar.comm.mpi"], "load_mpi", lambda: given)
    with pytest.raises(JointSparError, match="not in the given communicator"):
        comm.mpi(timeout=5.0)


def test_to_go_on_without_ranks_needs_an_mpi_that_takes_calls_of_any_thread(plain_process):
    plain_process.setattr(sys.modules["jointspar.comm.mpi"], "outlives_ranks", lambda _: True)
    given = an_mpi_of(2)
    given.Query_thread, given.THREAD_SERIALIZED = (lambda: 1), 2
    plain_process.setattr(sys.modules["jointspar.comm.mpi"], "load_mpi", lambda: given)
    with pytest.raises(JointSparError, match="MPI_THREAD_SERIALIZED or more"):
        comm.mpi(on_failure="shrink")


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


def test_a_single_process_that_gets_others_later_has_their_transport(plain_process):
    """As where a program logs the rank before it initialises torch.distributed, or forks and sets RANK afterwards."""
    alone = world()
    plain_process.setenv("WORLD_SIZE", "1")
    assert world() is alone
    plain_process.setenv("WORLD_SIZE", "2")
    with pytest.raises(JointSparError, match="launch with `torchrun"):
        world()


AFTER_A_FORK = """
import os, jointspar as js
assert js.comm.world().world_size == 1
rank = 1 if os.fork() == 0 else 0
os.environ.update(RANK=str(rank), WORLD_SIZE="2")
print(f"of {js.comm.world().world_size}\\n", end="", flush=True)
"""
INITIALISED_LATER = """
import os, jointspar as js, torch.distributed as dist
assert js.comm.world().world_size == 1
address = "file://" + os.environ["MEETING_FILE"]
rank = 1 if os.fork() == 0 else 0
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
print(f"of {js.comm.world().world_size}\\n", end="", flush=True)
"""


def run_alone(patch, script):
    """In a process of its own, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    command = warm_python.command("-c", script)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.mpi
@pytest.mark.parametrize("script", [AFTER_A_FORK, INITIALISED_LATER])
def test_processes_that_meet_after_the_first_call_find_each_other(plain_process, script, tmp_path):
    plain_process.setenv("MEETING_FILE", str(tmp_path / "meeting"))
    ended = run_alone(plain_process, script)
    assert (ended.returncode, ended.stdout) == (0, "of 2\nof 2\n"), ended.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("state", ["MPI.Init(); MPI.Finalize()", "MPI"])
@pytest.mark.parametrize(("variable", "text"), [
    ("OMPI_COMM_WORLD_SIZE", "JointSparError: the launcher started 2 or more ranks, but MPI is not running"),
    ("NO_LAUNCHER", "local"),
])  # fmt: skip
def test_an_mpi_that_does_not_run_is_refused_under_a_launcher_only(mpirun, plain_process, state, variable, text):
    plain_process.setenv(variable, "2")
    script = f"""
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
import jointspar as js
{state}
try:
    print(js.comm.world().name)
except js.errors.JointSparError as error:
    print("JointSparError:", error)
"""
    ended = run_alone(plain_process, script)
    assert ended.returncode == 0 and text in ended.stdout, ended.stderr


@pytest.mark.mpi
def test_the_launcher_of_another_mpi_is_refused(mpirun, plain_process):
    """As under the wrong mpirun: its variables speak of two ranks, but MPI knows of one. In a process of its own."""
    plain_process.setenv("OMPI_COMM_WORLD_SIZE", "2")
    ended = run_alone(plain_process, "from jointspar.comm import world; world()")
    assert ended.returncode != 0
    assert "the launcher started 2 or more ranks, but mpi4py's world has 1" in ended.stderr
    assert "Use the mpirun of that MPI" in ended.stderr


@pytest.mark.mpi
def test_a_process_outside_the_given_communicator_is_told_so(mpirun, plain_process):
    script = """
import jointspar as js
from mpi4py import MPI
try:
    js.comm.mpi(MPI.COMM_NULL)
except js.errors.JointSparError as error:
    print("JointSparError:", error)
"""
    ended = run_alone(plain_process, script)
    assert ended.stdout == "JointSparError: this process is not in the given communicator\n", ended.stderr
