"""What ranks run of which some die, while the others go on: means over those that are left. See tests/mpi."""

import atexit
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

import jointspar as js
from jointspar.errors import JointSparError, RanksLost
from small_training import assert_same_on_all_ranks, backward, build_model, build_optimizer, gather, layer_number, slope

STEPS = 100


def kill_soon(numbers):
    """In the middle of whatever comes within some dozen steps."""
    delay = 0.02 + numbers.random() * 0.1
    subprocess.Popen(["/bin/sh", "-c", f"sleep {delay:.4f}; kill -{int(signal.SIGKILL)} {os.getpid()}"])


def check_means(optimizer, step, ranks, p, active):
    """mean_grads against the formula of the strategy. ranks: those that are left, by their first numbers."""
    size = len(ranks)
    for name, mean in optimizer.mean_grads.items():
        k = layer_number(name)
        count = active[:, k].sum()
        is_stratified = optimizer.sampling.strategy == "stratified"
        divisors = count * np.minimum(1, size * p[:, k]) if is_stratified else size * p[:, k]
        expected = (active[:, k] * [slope(rank, step, k) for rank in ranks] / divisors).sum()
        assert torch.allclose(mean, torch.full_like(mean, expected), rtol=1e-5), (name, step, ranks)


def train_step(model, optimizer, step, own_number):
    ranks = gather(optimizer.comm, np.array([own_number])).ravel()
    p = gather(optimizer.comm, optimizer.probabilities.numpy())
    active = gather(optimizer.comm, optimizer.active.numpy().astype(np.int64))
    optimizer.zero_grad()
    backward(model, own_number, step)
    optimizer.synchronize()
    check_means(optimizer, step, ranks.tolist(), p, active)
    optimizer.step()


def survive():
    """Trains to the end, whoever dies; the rate follows a schedule, which must be the same on all ranks."""
    comm = js.comm.mpi(on_failure="shrink")
    numbers, own_number = random.Random(f"{os.environ['SEED']} {comm.rank}"), comm.rank
    victims = [int(rank) for rank in os.environ["VICTIMS"].split()]
    shared = random.Random(os.environ["SEED"])
    model = build_model()
    sampling = js.Sampling(strategy=shared.choice(["shared", "stratified", "independent"]), distribution="bandit")
    exchange = shared.choice(["allreduce", "ring", "two_shot", "auto"])
    settings = {"sampling": sampling, "exchange": exchange, "overlap": shared.choice([True, False])}
    optimizer = build_optimizer(model, comm=comm, check_every=3, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    step, losses = 0, 0
    dies_at = 5 + 20 * victims.index(comm.rank) if comm.rank in victims else STEPS
    while step < STEPS:
        try:
            if step >= dies_at:
                kill_soon(numbers)
                dies_at = STEPS
            train_step(model, optimizer, step, own_number)
            step += 1
            time.sleep(0.002)
        except RanksLost:
            step = go_on(optimizer)
            losses += 1
        while scheduler.last_epoch < step:
            scheduler.step()
    assert_same_on_all_ranks(optimizer.comm, model)
    optimizer.finish()
    print(f"END rank {own_number} of {optimizer.comm.world_size} after {losses} losses\n", end="", flush=True)


def go_on(optimizer):
    while True:
        try:
            return optimizer.shrink()
        except RanksLost:
            continue


def use_what_is_left():
    comm = js.comm.world()
    assert js.comm.world() is comm
    with pytest.raises(JointSparError, match="only a transport made with"):
        comm.shrink()
    optimizer = build_optimizer(build_model(), comm=js.comm.mpi(on_failure="shrink"))
    successor = optimizer.comm.shrink()  # though nobody died
    assert successor.world_size == comm.world_size and optimizer.comm.is_closed and not successor.is_closed
    total = torch.ones(3)
    successor.allreduce(total, what="test")
    assert (total == comm.world_size).all()
    print("DONE", flush=True)


def share_what_is_left():
    """Two optimizers on one transport, as for a GAN: whichever shrinks first, both go on, with what was wished."""
    comm, meeting = js.comm.mpi(on_failure="shrink"), js.comm.mpi(on_failure="shrink")
    models = [build_model(), build_model()]
    both = [build_optimizer(model, comm=comm) for model in models]
    steps = 0
    for number in both[0].even_batches(range(8 + comm.rank)):
        if number == 3:  # though nobody died, and every rank has ended its step
            meeting.start_headers(np.zeros(1, dtype=np.int64), what="all are here").wait()
            if comm.rank == 0:
                both[0].request_stop()
            order = both if comm.world_size % 2 else both[::-1]
            assert [optimizer.shrink() for optimizer in order] == [3, 3]
            assert both[0].comm is both[1].comm and not both[0].comm.is_closed
        for model, optimizer in zip(models, both, strict=True):
            optimizer.zero_grad()
            backward(model, comm.rank, number)
            optimizer.step()
        steps += 1
        assert both[0].stop_requested == (number >= 3)
    assert steps == 8
    for optimizer in both:
        optimizer.finish()
    print("DONE", flush=True)


def leave_what_travels_during_backward():
    """Shrunk with buckets still under way: their thread lets go of the old transport before its parts are dropped."""
    comm, meeting = js.comm.mpi(on_failure="shrink"), js.comm.mpi(on_failure="shrink")
    model = build_model()
    optimizer = build_optimizer(model, comm=comm, overlap=True)
    chooser, chooser_exchange = optimizer._pipeline.chooser, optimizer._pipeline.chooser.exchange

    def exchange_slowly(*given, **named):
        time.sleep(0.3)
        chooser_exchange(*given, **named)

    chooser.exchange = exchange_slowly
    backward(model, comm.rank, 0)
    meeting.start_headers(np.zeros(1, dtype=np.int64), what="all are here").wait()
    go_on(optimizer)
    assert comm.is_closed and comm._borrower is None and optimizer.comm.world_size == meeting.world_size
    for step in range(5):
        optimizer.zero_grad()
        backward(model, optimizer.comm.rank, step)
        optimizer.step()
    assert_same_on_all_ranks(optimizer.comm, model)
    optimizer.finish()
    print("DONE", flush=True)


def raise_on_one_rank():
    comm = js.comm.mpi(on_failure="shrink")
    comm.allreduce(torch.ones(3), what="step 1")
    if comm.rank == 1:
        print(f"FAULT {time.time()}\n", end="", flush=True)
        raise ZeroDivisionError("the fault")
    comm.allreduce(torch.ones(3), what="step 2")


def lose_a_rank_at_exit():
    """The others wait there for it, in the agreement of an optimizer that nobody finished."""
    say_when_all_is_done()
    end_without_a_rank(build_optimizer(build_model(), comm=js.comm.mpi(on_failure="shrink")).comm)


def lose_a_rank_after_the_finish():
    """The same in the transport's own last header."""
    say_when_all_is_done()
    optimizer = build_optimizer(build_model(), comm=js.comm.mpi(on_failure="shrink"))
    optimizer.finish()
    end_without_a_rank(optimizer.comm)


def say_when_all_is_done():
    """In the exit handler that was registered first, so runs last."""
    atexit.register(lambda: print("LEFT\n", end="", flush=True))


def end_without_a_rank(comm):
    if comm.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
