"""The agreement over MPI: differing ranks raise everywhere, before any payload, and the job ends."""

import sys
import time

import numpy as np
import pytest
import torch

from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op
from jointspar.errors import DesyncError
from support import launched

pytestmark = pytest.mark.mpi


def agreement(transport, *, num_layers=70, seed=0, layer_hash=1):
    return Agreement(
        transport,
        layer_names=[f"layer{k}" for k in range(num_layers)],
        layer_hashes=[layer_hash] * num_layers,
        settings={"seed": seed, "budget": 0.5},
        num_values=2,
    )


def train(transport, agreed, num_steps, first_step=0):
    """What an optimizer does with an agreement: a plan per step, a go before each payload."""
    for step in range(first_step, first_step + num_steps):
        active = np.arange(70) % 7 == (step + transport.rank) % 7
        agreed.post_plan(step, active)
        plan = agreed.wait_plan()
        for rank in range(transport.world_size):
            assert (plan[rank] == (np.arange(70) % 7 == (step + rank) % 7)).all()
        values = agreed.go(
            Op.EXCHANGE, step=step, count=4, dtype=torch.float32, values=np.array([transport.rank, step])
        )
        assert (values == [[rank, step] for rank in range(transport.world_size)]).all()
        buffer = torch.full((4,), float(step))
        transport.allreduce(buffer, what=f"step {step} exchange")
        assert (buffer == step * transport.world_size).all()


def desync_message(action):
    with pytest.raises(DesyncError) as caught:
        action()
    return str(caught.value)


def differ_at_the_start(transport):
    last = transport.world_size - 1
    is_last = transport.rank == last
    message = desync_message(lambda: agreement(transport, seed=5 if is_last else 0))
    assert f"setting 'seed' differs: rank {last} against rank 0 (here {5 if is_last else 0})" in message
    message = desync_message(lambda: agreement(transport, layer_hash=2 if is_last else 1))
    assert f"layer 0 'layer0' differs: rank {last} against rank 0" in message
    message = desync_message(lambda: agreement(transport, num_layers=200 if is_last else 70))
    assert "the numbers of layers differ: rank 0: 70" in message


def differ_on_the_way(transport):
    """The last rank saves, or finishes, where the others make their next step."""
    last = transport.world_size - 1
    for op, text in ((Op.SAVE, "save at step 3"), (Op.FINISH, "finish at step 3")):
        agreed = agreement(transport)
        train(transport, agreed, 3)
        agreed.post_plan(3, np.ones(70, dtype=bool))
        other = agreed.finish if op is Op.FINISH else lambda agreed=agreed: agreed.go(Op.SAVE, step=3)
        message = desync_message(other if transport.rank == last else lambda agreed=agreed: next_step(agreed))
        assert "rank 0: step 3 exchange; " in message
        assert f"rank {last}: {text}" in message


def next_step(agreed):
    agreed.wait_plan()
    agreed.go(Op.EXCHANGE, step=3, count=4)


def agree_and_differ():
    transport = launched(timeout=20, on_failure="raise")
    agreed = agreement(transport)
    train(transport, agreed, 20)
    agreed.go(Op.SAVE, step=20)
    agreed.finish()
    if transport.world_size > 1:
        differ_at_the_start(transport)
        differ_on_the_way(transport)
    else:
        assert transport.bytes_sent == 0
    left = agreement(transport)
    left.post_plan(0, np.ones(70, dtype=bool))  # the exit finishes what is left in flight
    print(f"agree_and_differ: rank {transport.rank} is done\n", end="", flush=True)


def test_ranks_that_differ_raise_on_every_rank_and_equal_ones_train(checks):
    checks("agree_and_differ")


def start_with_another_seed():
    transport = launched()
    print(f"FAULT {time.time()}\n", end="", flush=True)
    agreement(transport, seed=transport.rank // 2)


def test_an_uncaught_difference_prints_on_every_rank_and_ends_the_job(run_ranks):
    job = run_ranks(3, start_with_another_seed, expect_code=None)
    for rank in range(3):
        assert f"DesyncError: rank {rank}: setting 'seed' differs: rank 2 against rank 0" in job.output
    assert job.seconds_after("FAULT") < 5


def leave_early():
    transport = launched()
    agreed = agreement(transport)
    train(transport, agreed, 3)
    agreed.post_plan(3, np.ones(70, dtype=bool))
    if transport.rank == 1:
        print(f"FAULT {time.time()}\n", end="", flush=True)
        sys.exit(0)
    next_step(agreed)


def test_a_rank_that_exits_early_is_noticed_by_all_and_the_job_fails(run_ranks):
    job = run_ranks(2, leave_early, expect_code=None)
    text = "rank 0: step 3 exchange; rank 1: finish at step 3"
    assert f"DesyncError: rank 0: the ranks are about to do different things: {text}" in job.output
    assert f"rank 1 ends the job: at exit: rank 1: the ranks are about to do different things: {text}" in job.output
    assert job.seconds_after("FAULT") < 5
