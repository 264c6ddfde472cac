"""The transports of several ranks: data, refusals, deadlines, and the end of the job when one rank fails."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jointspar.comm import mpi, torch_dist, world
from jointspar.errors import CollectiveTimeout, JointSparError
from support import launched

pytestmark = pytest.mark.mpi

EVERY_DTYPE = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def filled(length, dtype, rank):
    return torch.full((length,), rank + 1, dtype=dtype)


def check_broadcast(transport):
    for root in range(transport.world_size):
        for dtype in EVERY_DTYPE:
            for length in (0, 1, 5003):
                buffer = filled(length, dtype, transport.rank)
                transport.broadcast(buffer, root, what="broadcast")
                assert torch.equal(buffer, filled(length, dtype, root))


def check_messages_keep_their_order(transport):
    following = (transport.rank + 1) % transport.world_size
    preceding = (transport.rank - 1) % transport.world_size
    for dtype in EVERY_DTYPE:
        for length in (0, 1, 5003):
            received = [torch.empty(length, dtype=dtype) for _ in range(3)]
            receives = [transport.start_receive(buffer, preceding, what="receive") for buffer in received]
            before = transport.bytes_sent
            sends = [transport.start_send(filled(length, dtype, k), following, what="send") for k in range(3)]
            assert transport.bytes_sent - before == 3 * length * dtype.itemsize
            for pending in receives + sends:
                pending.wait()
                assert pending.done()
            assert all(torch.equal(buffer, filled(length, dtype, k)) for k, buffer in enumerate(received))


def check_messages_of_two_tags_pass_each_other(transport):
    following = (transport.rank + 1) % transport.world_size
    preceding = (transport.rank - 1) % transport.world_size
    for length in (1, 300_000):
        sent = [(tag, torch.full((length,), float(number))) for number, tag in enumerate((3, 0, 3, 32767))]
        sends = [transport.start_send(buffer, following, what="send", tag=tag) for tag, buffer in sent]
        for tag, number in ((32767, 3), (3, 0), (0, 1), (3, 2)):
            buffer = torch.empty(length)
            transport.start_receive(buffer, preceding, what="receive", tag=tag).wait()
            assert (buffer == number).all()
        for pending in sends:
            pending.wait()


def check_headers(transport):
    before = transport.bytes_sent
    first = transport.start_headers(np.arange(5) + 10 * transport.rank, what="first")
    second = transport.start_headers(np.array([-transport.rank]), what="second")
    transport.allreduce(torch.ones(4, dtype=torch.int64), what="payload between")
    expected = np.arange(5) + 10 * np.arange(transport.world_size)[:, None]
    assert (second.wait() == -np.arange(transport.world_size)[:, None]).all()
    assert (first.wait() == expected).all()
    payload = 32 if transport.world_size > 1 else 0
    assert transport.bytes_sent - before == 6 * 8 * (transport.world_size - 1) + payload


def check_refusals(transport):
    buffer = torch.ones(4)
    with pytest.raises(ValueError, match="contiguous"):
        transport.allreduce(torch.ones(8)[::2], what="test")
    with pytest.raises(ValueError, match="1-D"):
        transport.broadcast(torch.ones(2, 2), 0, what="test")
    with pytest.raises(TypeError, match=r"cannot sum torch\.complex64"):
        transport.allreduce(torch.ones(4, dtype=torch.complex64), what="test")
    with pytest.raises(TypeError, match="CPU tensors"):
        transport.allreduce(torch.ones(4, device="meta"), what="test")
    with pytest.raises(TypeError, match="buffer"):
        transport.start_send(np.ones(4), 0, what="test")
    with pytest.raises(TypeError, match="int64"):
        transport.start_headers(np.ones(4), what="test")
    for rank in (-1, transport.world_size):
        with pytest.raises(ValueError, match="must be in"):
            transport.start_send(buffer, rank, what="test")
        with pytest.raises(ValueError, match="must be in"):
            transport.broadcast(buffer, rank, what="test")


def check_forked_child_is_refused(transport):
    child = os.fork()
    if child == 0:
        try:
            transport.start_headers(np.zeros(1, dtype=np.int64), what="test")
        except JointSparError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def check_allreduce(transport):
    """Whole numbers, so that every partial sum is exact in every dtype that the library sums."""
    can_sum = [transport.can_allreduce(dtype) for dtype in EVERY_DTYPE]
    sums_16_bits = not transport.name.startswith("mpi")
    assert can_sum == [True, True, sums_16_bits, sums_16_bits, True, False, False]
    factor = sum(range(1, transport.world_size + 1))
    for dtype in (dtype for dtype in EVERY_DTYPE if transport.can_allreduce(dtype)):
        for length in (0, 1, 5003):
            ramp = torch.arange(length) % 41
            buffer = (ramp * (transport.rank + 1)).to(dtype)
            transport.allreduce(buffer, what="allreduce")
            assert torch.equal(buffer, (ramp * factor).to(dtype))


def check_data(transport):
    check_broadcast(transport)
    if transport.world_size > 1:
        check_messages_keep_their_order(transport)
        check_messages_of_two_tags_pass_each_other(transport)
    check_allreduce(transport)


def use_transport():
    transport = world()
    assert transport is world()
    if transport.world_size == 1:
        assert transport.name == "local"
        transport.close()
        transport = launched()
    assert transport.name.startswith(("mpi: Open MPI v", "mpi: MPICH Version: ", "torch.distributed: gloo"))
    check_data(transport)
    if transport.name.startswith("mpi"):
        module = sys.modules["jointspar.comm.mpi"]
        module._MAX_CHUNK = 1000  # splits the buffers as 2**30 splits huge ones
        check_data(transport)
        module._MAX_CHUNK = 2**30
        assert not module._in_flight
    check_headers(transport)
    check_refusals(transport)
    check_forked_child_is_refused(transport)
    unread = transport.start_headers(np.arange(3), what="a plan that no step asks for")
    transport.close()
    transport.close()
    if transport.name.startswith("mpi"):
        assert not module._in_flight
        assert unread._rows.tolist() == [[0, 1, 2]] * transport.world_size  # MPI writes there no more
    with pytest.raises(JointSparError, match="closed"):
        transport.allreduce(torch.ones(4), what="test")
    assert world() is not transport
    world().close()
    print(f"use_transport: rank {transport.rank} is done\n", end="", flush=True)


def test_transport_moves_all_dtypes_and_refuses_bad_arguments(checks):
    checks("use_transport")


def wait_for_a_stopped_rank():
    transport = launched(timeout=2, warn=0.5)
    transport.allreduce(torch.ones(4), what="step 1 exchange")
    if transport.rank == 1:
        wake = f"sleep 5; kill -CONT {os.getpid()}"  # torchrun asks a rank to end, and kills it only after 30 s
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(["sh", "-c", wake], start_new_session=True, **quiet)
        os.kill(os.getpid(), signal.SIGSTOP)
    transport.allreduce(torch.ones(4), what="step 2 exchange")


def test_a_stopped_rank_is_a_timeout_that_ends_the_job(run_ranks):
    job = run_ranks(2, wait_for_a_stopped_rank, expect_code=None, timeout=30)
    text = r"CollectiveTimeout: rank 0: step 2 exchange: no answer from the other ranks for [2-4]\.\d s"
    assert re.search(text, job.output)
    assert "rank 0: step 2 exchange: still waiting for other ranks after" in job.output


def time_out_and_try_again():
    transport = launched(on_failure="raise")
    assert transport.timeout == 2.0
    if transport.rank == 1:
        time.sleep(4)
        return
    with pytest.raises(CollectiveTimeout, match=r"rank 0: receive 7: .* [23]\.\d s"):
        transport.start_receive(torch.ones(4), 1, what="receive 7").wait()
    with pytest.raises(JointSparError, match="cannot be used any more: receive 7"):
        transport.allreduce(torch.ones(4), what="step 8")
    if transport.name.startswith("mpi"):
        assert sys.modules["jointspar.comm.mpi"]._in_flight  # MPI may still write there
    print("refused", flush=True)


def test_after_a_timeout_the_transport_refuses_and_exit_aborts_instead_of_hanging(run_ranks):
    job = run_ranks(2, time_out_and_try_again, expect_code=None, timeout=30, env={"JOINTSPAR_TIMEOUT": "2"})
    assert "refused" in job.output
    assert "at exit, after a failure: receive 7" in job.output


def post_a_header_long_before_the_others():
    """A header in flight may be older than the deadline, which counts from the start of the wait for it."""
    transport = launched(timeout=1.5)
    if transport.rank == 1:
        time.sleep(2.5)
    pending = transport.start_headers(np.array([transport.rank]), what="step 4 plan")
    if transport.rank == 0:
        time.sleep(1.5)
    assert pending.wait().tolist() == [[0], [1]]


def test_the_deadline_counts_from_the_start_of_a_wait_which_warns_when_it_is_long(run_ranks):
    job = run_ranks(2, post_a_header_long_before_the_others, timeout=30, env={"JOINTSPAR_WARN": "0.5"})
    assert "rank 0: step 4 plan: still waiting for other ranks" in job.output


def get_a_longer_message_than_expected():
    transport = launched(timeout=5, on_failure="raise")
    if transport.rank == 0:
        transport.start_send(torch.ones(100), 1, what="send").wait()
        transport.start_headers(np.zeros(1, dtype=np.int64), what="end")
        time.sleep(3)
        return
    with pytest.raises(JointSparError, match=r"rank 1: receive 3: .*[Tt]runc"):
        transport.start_receive(torch.ones(10), 0, what="receive 3").wait()
    with pytest.raises(JointSparError, match="cannot be used any more"):
        transport.broadcast(torch.ones(1), 0, what="test")
    print("refused", flush=True)


@pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)
def test_an_mpi_error_is_raised_and_poisons_the_transport(run_ranks):
    assert "refused" in run_ranks(2, get_a_longer_message_than_expected, expect_code=None, timeout=30).output


def get_a_longer_message_without_catching():
    transport = launched(timeout=5)
    print("READY\n", end="", flush=True)
    if transport.rank == 0:
        transport.start_send(torch.ones(100), 1, what="send").wait()
    else:
        transport.start_receive(torch.ones(10), 0, what="receive 3").wait()
    transport.start_headers(np.zeros(1, dtype=np.int64), what="end").wait()


def test_a_longer_message_than_expected_ends_the_job(run_ranks):
    job = run_ranks(2, get_a_longer_message_without_catching, expect_code=None, timeout=30)
    assert job.output.count("READY") == 2


def raise_on_one_rank():
    transport = launched()
    transport.allreduce(torch.ones(4), what="step 1")
    if transport.rank == 1:
        print(f"FAULT {time.time()}\n", end="", flush=True)
        raise ZeroDivisionError("the fault")
    transport.allreduce(torch.ones(4), what="step 2")


def test_an_exception_on_one_rank_ends_the_job(run_ranks):
    job = run_ranks(3, raise_on_one_rank, expect_code=None)
    assert "ZeroDivisionError: the fault" in job.output
    assert job.seconds_after("FAULT") < 5


def raise_in_a_thread():
    transport = launched()

    def fail():
        print(f"FAULT {time.time()}\n", end="", flush=True)
        raise JointSparError("the fault")

    if transport.rank == 1:
        harmless = threading.Thread(target=lambda: 1 / 0)
        harmless.start()
        harmless.join()
    transport.allreduce(torch.ones(4), what="step 1")
    if transport.rank == 1:
        threading.Thread(target=fail).start()
        time.sleep(30)
    transport.allreduce(torch.ones(4), what="step 2")


def test_a_joint_spar_error_in_a_thread_ends_the_job_but_another_error_does_not(run_ranks):
    job = run_ranks(2, raise_in_a_thread, expect_code=None)
    assert "JointSparError: the fault" in job.output
    assert job.seconds_after("FAULT") < 5


def use_a_part_of_the_processes():
    dist.init_process_group("gloo")
    part = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        with pytest.raises(JointSparError, match="not in the given group"):
            torch_dist(part)
        torch_dist().close()
        return
    transport = torch_dist(part)
    assert (transport.rank, transport.world_size) == (dist.get_rank() // 2, 2)
    buffer = torch.full((5,), 1.0 + transport.rank)
    transport.allreduce(buffer, what="test")
    assert buffer.tolist() == [3.0] * 5
    transport.close()
    torch_dist().close()  # of all processes, at the same point on each
    assert dist.is_initialized()


def start_a_header_before_the_other_rank_comes():
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # as TORCH_DISTRIBUTED_DEBUG=DETAIL
    transport = world()
    assert dist.get_debug_level() == dist.DebugLevel.DETAIL
    transport.start_headers(np.array([0]), what="both are there").wait()
    time.sleep(3 * transport.rank)
    began = time.monotonic()
    pending = transport.start_headers(np.array([transport.rank]), what="plan")
    assert time.monotonic() - began < 1.5
    assert pending.wait().ravel().tolist() == [0, 1]
    buffer = torch.ones(4)
    transport.allreduce(buffer, what="sum")
    assert buffer.tolist() == [2.0] * 4


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_the_debug_level_of_torch_does_not_make_starts_wait(run_ranks):
    run_ranks(2, start_a_header_before_the_other_rank_comes)


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_a_group_may_be_a_part_of_the_processes_that_the_program_initialised(run_ranks):
    run_ranks(3, use_a_part_of_the_processes)


@pytest.mark.parametrize("make", [mpi, torch_dist])
def test_bad_options_are_refused(make, monkeypatch):
    with pytest.raises(ValueError, match="on_failure must be"):
        make(on_failure="ignore")
    for name in ("timeout", "warn"):
        for seconds in (0, -1, float("nan")):
            with pytest.raises(ValueError, match=f"{name} must be"):
                make(**{name: seconds})
    for name in ("JOINTSPAR_TIMEOUT", "JOINTSPAR_WARN"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "soon")
            with pytest.raises(ValueError, match=name):
                make()
