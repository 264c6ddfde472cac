"""How ranks leave: after work of their own, with half a transport, or into a second process group."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import jointspar as js
from jobs import find_launcher, run_job
from jointspar.errors import JointSparError
from support import launched

pytestmark = pytest.mark.mpi


def build_optimizer(**settings):
    torch.manual_seed(0)
    return js.JointSparSGD(nn.Linear(3, 3).named_parameters(), exchange="ring", **settings)


def evaluate_alone_after_the_last_step():
    optimizer = build_optimizer()
    optimizer.comm.timeout = 1.0
    if optimizer.comm.rank == 0:
        time.sleep(3)
        print("EVALUATED", flush=True)


def test_a_rank_may_work_on_alone_for_longer_than_the_deadline(run_ranks):
    job = run_ranks(2, evaluate_alone_after_the_last_step)
    assert "EVALUATED" in job.output and "ends the job" not in job.output


END_BEFORE_MPI_STARTS = """
import os, sys
sys.exit(0) if os.environ["OMPI_COMM_WORLD_RANK"] == "1" else None
import jointspar
jointspar.comm.world()
"""


def test_a_rank_that_ends_before_mpi_starts_does_not_hang_the_others():
    """Interpreters of their own: Open MPI counts a rank of the others as one that failed."""
    command = [*find_launcher("mpirun"), "2", sys.executable, "-c", END_BEFORE_MPI_STARTS]
    job = run_job(command, 60, {"JOINTSPAR_TIMEOUT": "1"})
    assert job.code != 0
    assert "MPI did not start within 1 s: has a rank ended before it came to that?" in job.output


class GivenUp(Exception):
    pass


def give_up_while_a_transport_is_made():
    kind = js.comm.torch_dist.__globals__["TorchTransport"] if is_torchrun() else type_of_mpi()
    name = "_private_group" if is_torchrun() else "_duplicate"
    make, calls = getattr(kind, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            if is_torchrun():
                dist.barrier()  # the other rank may still be connecting the first group, and would see this one go
            raise GivenUp
        return make(*arguments)

    setattr(kind, name, interrupted)
    with pytest.raises(GivenUp):
        launched()


def is_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def type_of_mpi():
    return js.comm.mpi.__globals__["MpiTransport"]


def test_a_transport_that_was_left_half_made_ends_the_job_at_exit(run_ranks):
    job = run_ranks(2, give_up_while_a_transport_is_made, expect_code=None)
    assert "at exit, after a failure: start was left by GivenUp" in job.output
    assert "AttributeError" not in job.output


def give_up_and_destroy_the_process_group():
    give_up_while_a_transport_is_made()
    dist.destroy_process_group()


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_a_transport_that_was_left_half_made_goes_with_its_process_group(run_ranks):
    assert "Traceback" not in run_ranks(2, give_up_and_destroy_the_process_group).output


def sum_after_a_shutdown():
    transport = launched(on_failure="raise")
    transport.allreduce(torch.ones(2), what="step 1")
    shut_down = dist.destroy_process_group if is_torchrun() else sys.modules["mpi4py.MPI"].Finalize
    shut_down()
    with pytest.raises(JointSparError, match=r"step 2: .* was shut down"):
        transport.allreduce(torch.ones(2), what="step 2")
    print("refused\n", end="", flush=True)


def test_a_sum_after_the_librarys_end_is_refused(run_ranks):
    assert run_ranks(2, sum_after_a_shutdown, expect_code=0).output.count("refused") == 2


def interrupt_as_soon_as_a_sum_is_started():
    transport = js.comm.mpi(on_failure="raise")
    private, buffer = transport._payload, torch.ones(4)

    class Interrupted:
        def Iallreduce(self, *arguments):  # noqa: N802
            private.Iallreduce(*arguments)
            raise KeyboardInterrupt

    transport._payload = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        transport.allreduce(buffer, what="step 1")
    held = [pending._buffers for pending in sys.modules["jointspar.comm.mpi"]._in_flight]
    assert any(each is buffer for each in held)  # MPI may still write there
    with pytest.raises(JointSparError, match="cannot be used any more: step 1 was left by KeyboardInterrupt"):
        transport.start_headers(np.zeros(1, dtype=np.int64), what="step 2")
    print("REFUSED\n", end="", flush=True)


@pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)
def test_an_interrupt_between_the_start_and_the_wait_poisons_the_transport(run_ranks):
    job = run_ranks(2, interrupt_as_soon_as_a_sum_is_started, expect_code=None)
    assert "REFUSED" in job.output


def fail_in_a_part_of_the_ranks():
    world = launched()
    if is_torchrun():
        transport = js.comm.torch_dist(dist.new_group([1, 2])) if world.rank else None
    else:
        communicator = sys.modules["mpi4py.MPI"].COMM_WORLD.Split(min(world.rank, 1))
        transport = js.comm.mpi(communicator) if world.rank else None
    if transport is not None:
        assert transport.rank == world.rank - 1
        transport.allreduce(torch.ones(3), what="step 1")
    world.close()  # so that the part's own transport ends the job
    if transport is not None and transport.rank == 0:
        raise ZeroDivisionError("the fault")
    time.sleep(30)


def test_records_of_a_part_of_the_ranks_are_named_by_the_launchers_rank(run_ranks, tmp_path):
    run_ranks(3, fail_in_a_part_of_the_ranks, expect_code=None, env={"JOINTSPAR_FAILURE_DIR": str(tmp_path)})
    written = json.loads((tmp_path / "rank-1.json").read_text())
    assert (written["rank"], written["world_rank"]) == (0, 1)
    assert written["reason"] == "uncaught ZeroDivisionError"
    assert not (tmp_path / "rank-0.json").exists()


def train_in_two_process_groups():
    """The second with the ranks in the other order."""
    own, folder = int(os.environ["RANK"]), os.environ["RESULT"]
    first = None
    for number, rank in enumerate([own, 1 - own]):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=2)
        comm = js.comm.world()
        assert comm is not first and comm.rank == rank
        optimizer = build_optimizer(comm=comm)
        optimizer.finish()
        gathered = comm.start_headers(np.array([rank]), what="test").wait()
        assert gathered.tolist() == [[0], [1]]
        if first is None:
            dist.destroy_process_group()
            assert comm.is_closed
        first = comm
    print("DONE\n", end="", flush=True)


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_a_second_process_group_gets_a_transport_of_its_own(run_ranks, tmp_path):
    job = run_ranks(2, train_in_two_process_groups, env={"RESULT": str(tmp_path)})
    assert job.output.count("DONE") == 2 and "Traceback" not in job.output, job.output
