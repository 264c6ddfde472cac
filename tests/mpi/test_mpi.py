"""The MPI transport: data, refusals, deadlines, and the end of the job when one rank fails."""

import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from jointspar.comm import mpi, world
from jointspar.errors import CollectiveTimeout, JointSparError

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
    with pytest.raises(TypeError, match=r"cannot sum torch\.bfloat16"):
        transport.allreduce(buffer.bfloat16(), what="test")
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


def use_transport():
    transport = world()
    assert transport is world()
    if transport.world_size == 1:
        assert transport.name == "local"
        transport.close()
        transport = mpi()
    assert transport.name.startswith(("mpi: Open MPI v", "mpi: MPICH Version: "))
    assert [transport.can_allreduce(dtype) for dtype in EVERY_DTYPE[:4]] == [True, True, False, False]
    module = sys.modules["jointspar.comm.mpi"]
    for module._MAX_CHUNK in (2**30, 1000):  # the second splits the buffers as 2**30 splits huge ones
        check_broadcast(transport)
        check_messages_keep_their_order(transport)
        buffer = torch.arange(5003, dtype=torch.float64) * (transport.rank + 1)
        transport.allreduce(buffer, what="allreduce")
        factor = sum(range(1, transport.world_size + 1))
        assert torch.equal(buffer, torch.arange(5003, dtype=torch.float64) * factor)
    check_headers(transport)
    check_refusals(transport)
    check_forked_child_is_refused(transport)
    assert not module._in_flight
    transport.close()
    transport.close()
    with pytest.raises(JointSparError, match="closed"):
        transport.allreduce(torch.ones(4), what="test")
    assert world() is not transport
    world().close()
    module._MAX_CHUNK = 2**30
    print(f"use_transport: rank {transport.rank} is done\n", end="", flush=True)


def test_transport_moves_all_dtypes_and_refuses_bad_arguments(checks):
    checks("use_transport")


def wait_for_a_stopped_rank():
    transport = mpi(timeout=2)
    transport.allreduce(torch.ones(4), what="step 1 exchange")
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    transport.allreduce(torch.ones(4), what="step 2 exchange")


def test_a_stopped_rank_is_a_timeout_that_ends_the_job(run_ranks):
    job = run_ranks(2, wait_for_a_stopped_rank, expect_code=None, timeout=30)
    text = r"CollectiveTimeout: rank 0: step 2 exchange: no answer from the other ranks for [2-4]\.\d s"
    assert re.search(text, job.output)


def time_out_and_try_again():
    transport = mpi(on_failure="raise")
    module = sys.modules["jointspar.comm.mpi"]
    module._WARN_SECONDS = 0.5
    assert transport.timeout == 2.0
    if transport.rank == 1:
        time.sleep(4)
        return
    with pytest.raises(CollectiveTimeout, match=r"rank 0: receive 7: .* [23]\.\d s"):
        transport.start_receive(torch.ones(4), 1, what="receive 7").wait()
    with pytest.raises(JointSparError, match="cannot be used any more: receive 7"):
        transport.allreduce(torch.ones(4), what="step 8")
    assert module._in_flight  # MPI may still write there
    print("refused", flush=True)


def test_after_a_timeout_the_transport_refuses_and_exit_aborts_instead_of_hanging(run_ranks):
    job = run_ranks(2, time_out_and_try_again, expect_code=None, timeout=30, env={"JOINTSPAR_TIMEOUT": "2"})
    assert "refused" in job.output
    assert "receive 7: still waiting for other ranks" in job.output


def get_a_longer_message_than_expected():
    transport = mpi(timeout=5, on_failure="raise")
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


def test_an_mpi_error_is_raised_and_poisons_the_transport(run_ranks):
    assert "refused" in run_ranks(2, get_a_longer_message_than_expected, expect_code=None, timeout=30).output


def raise_on_one_rank():
    transport = mpi()
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
    transport = mpi()

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


def test_bad_options_are_refused(mpirun):
    with pytest.raises(ValueError, match="on_failure must be"):
        mpi(on_failure="ignore")
    with pytest.raises(ValueError, match="timeout must be"):
        mpi(timeout=0)


def test_a_timeout_in_the_environment_must_be_a_number(mpirun, monkeypatch):
    monkeypatch.setenv("JOINTSPAR_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="JOINTSPAR_TIMEOUT"):
        mpi()
