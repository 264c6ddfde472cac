"""What a job must live through, with right sums and the same weights on all ranks.

Each function takes random numbers that are the same on all ranks, and says "survived" or fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import jointspar as js
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError
from jointspar.step.sampling import draw_layers
from small_training import (
    EXCHANGES,
    LAYER_SIZE,
    NUM_LAYERS,
    Numbers,
    assert_same_on_all_ranks,
    backward,
    build_model,
    build_optimizer,
    gather,
    layer_number,
    report_wrong_sum,
    slope,
    state_of,
    train_step,
)  # fmt: skip

LARGEST_FLOAT16 = 65504.0


def active(numbers: Numbers, comm: Transport) -> str:
    """Ranks that compute different layers: each sum against the strategy's formula."""
    strategy, size = numbers.choice(["independent", "stratified"]), comm.world_size
    model = build_model().double()
    sampling = js.Sampling(strategy=strategy, draw="bernoulli", p_min=0.1, seed=numbers.randrange(2**32))
    optimizer = build_optimizer(model, sampling=sampling, exchange=numbers.choice(EXCHANGES))
    for step in range(40):
        sets = gather(comm, optimizer.active.numpy().astype(np.int64))
        p = gather(comm, optimizer.probabilities.numpy())
        optimizer.zero_grad()
        backward(model, comm.rank, step)
        optimizer.synchronize()
        assert {layer_number(name) for name in optimizer.mean_grads} == set(np.flatnonzero(sets.any(axis=0)))
        for name, mean in optimizer.mean_grads.items():
            k = layer_number(name)
            divisors = sets[:, k].sum() * np.minimum(1, size * p[:, k]) if strategy == "stratified" else size * p[:, k]
            slopes = np.array([slope(rank, step, k) for rank in range(size)])
            expected = (sets[:, k] * slopes / divisors).sum()
            if not torch.allclose(mean, torch.full_like(mean, expected), rtol=1e-12):
                report_wrong_sum(f"{name} at step {step}", mean, expected)
        optimizer.step()
        if step > 0 and (sets != sets[0]).any():
            assert_same_on_all_ranks(comm, model)
            return "survived"
    raise AssertionError("the ranks computed the same layers in all steps")


def _skipped(numbers: Numbers, comm: Transport, damage: Callable[[torch.Tensor, bool], object]) -> str:
    """The step is skipped on all ranks, to the bit, and the next one is not.

    Every layer on every rank with every exchange, one after the other.
    """
    exchange, layer = EXCHANGES[numbers.number % len(EXCHANGES)], numbers.number % NUM_LAYERS
    faulty = (numbers.number + numbers.number // (len(EXCHANGES) * NUM_LAYERS)) % comm.world_size
    wires = [None, "float16", "bfloat16"] if exchange != "allreduce" else [None]
    model = build_model()
    optimizer = build_optimizer(
        model, exchange=exchange, wire_dtype=numbers.choice(wires), sampling=js.Sampling(budget=1.0)
    )
    place = numbers.randrange(LAYER_SIZE)
    for step in range(4):
        before = state_of(model, optimizer)
        optimizer.zero_grad()
        backward(model, comm.rank, step)
        if step == 2:
            weight = list(model.parameters())[layer]
            damage(weight.grad.view(-1)[place : place + 1], comm.rank == faulty)
        optimizer.step()
        assert (state_of(model, optimizer) == before) == (step == 2)
        assert_same_on_all_ranks(comm, model)
    assert optimizer.stats.skipped_steps == 1
    return "survived"


def nan(numbers: Numbers, comm: Transport) -> str:
    return _skipped(numbers, comm, lambda grad, is_faulty: is_faulty and grad.fill_(float("nan")))


def inf(numbers: Numbers, comm: Transport) -> str:
    value = numbers.choice([float("inf"), float("-inf")])
    return _skipped(numbers, comm, lambda grad, is_faulty: is_faulty and grad.fill_(value))


def infs(numbers: Numbers, comm: Transport) -> str:
    """+Inf on one rank, -Inf on the others: their sum is a NaN."""
    return _skipped(numbers, comm, lambda grad, is_faulty: grad.fill_(float("inf") * (-1) ** is_faulty))


def float16(numbers: Numbers, comm: Transport) -> str:
    """A layer of probability 1e-4 with gradients up to 65504 on a wire of 16 bits: right, or skipped everywhere."""
    sampling = _drawn_at_once(numbers, probability := 1e-4)
    model = build_model()
    optimizer = build_optimizer(
        model, sampling=sampling, wire_dtype="float16", exchange=numbers.choice(["ring", "two_shot"])
    )
    before = state_of(model, optimizer)
    largest = LARGEST_FLOAT16 * 10.0 ** numbers.choice([0, -1, -3, -4, -5, -8])
    grads = np.random.default_rng(numbers.number).uniform(-largest, largest, (comm.world_size, LAYER_SIZE))
    optimizer.zero_grad()
    own = torch.from_numpy(grads[comm.rank]).float()
    sum((weight.view(-1) * own).sum() for weight in model.parameters()).backward()
    optimizer.synchronize()
    terms = grads / (comm.world_size * probability)
    largest_sum = np.abs(terms).sum(axis=0)
    tolerance = comm.world_size * (2.0**-10 * largest_sum + 2.0**-24)
    means = [mean.double().numpy().ravel() for mean in optimizer.mean_grads.values()]
    is_finite = np.isfinite(means).all()
    if is_finite and (np.abs(means - terms.sum(axis=0)) > tolerance).any():
        report_wrong_sum("of a float16 wire", torch.tensor(means), terms.sum(axis=0))
    assert is_finite or largest_sum.max() > LARGEST_FLOAT16, "skipped without need"
    optimizer.step()
    assert (state_of(model, optimizer) == before) == (not is_finite)
    assert_same_on_all_ranks(comm, model)
    return "survived"


def _drawn_at_once(numbers: Numbers, probability: float) -> js.Sampling:
    """With a seed of which the first draw has a layer, though a layer's probability is so small."""
    drawn = np.full(NUM_LAYERS, probability)
    while True:
        sampling = js.Sampling(
            budget=probability, distribution="uniform", strategy="shared", draw="bernoulli",
            seed=numbers.randrange(2**32),
        )  # fmt: skip
        if draw_layers(drawn, sampling, sizes=np.ones(NUM_LAYERS), step=0, rank=0, world_size=1).any():
            return sampling


def even(numbers: Numbers, comm: Transport) -> str:
    """Loaders of different lengths end together."""
    model = build_model()
    optimizer = build_optimizer(model)
    lengths = [numbers.randrange(14) for _ in range(comm.world_size)]
    seen = []
    for batch in optimizer.even_batches(range(lengths[comm.rank])):
        seen.append(batch)
        train_step(model, optimizer, batch)
    assert seen == list(range(min(lengths)))
    optimizer.finish()
    return "survived"


def fork(numbers: Numbers, comm: Transport) -> str:
    """A child refuses to use its parent's transport, and the parent goes on."""
    if numbers.randrange(comm.world_size) == comm.rank:
        child = os.fork()
        if child == 0:
            try:
                comm.allreduce(torch.ones(1), what="in the child")
            except JointSparError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    total = torch.ones(3)
    comm.allreduce(total, what="in the parent")
    assert (total == comm.world_size).all()
    return "survived"


def resume(numbers: Numbers, comm: Transport) -> str:
    """From a checkpoint of a random step: what follows differs in 0 bytes."""
    folder = Path(os.environ["FAULT_FOLDER"]) / f"resume-{numbers.random()}"
    strategy, exchange = numbers.choice(["shared", "stratified", "independent"]), numbers.choice(EXCHANGES)
    settings = dict(sampling=js.Sampling(strategy=strategy, distribution="bandit"), exchange=exchange)
    model = build_model()
    optimizer = build_optimizer(model, **settings)
    saved_at, last = 1 + numbers.randrange(8), 12
    for step in range(last):
        train_step(model, optimizer, step)
        if step + 1 == saved_at:
            js.checkpoint.save(folder, model=model, optimizer=optimizer)
    other = build_model()
    resumed = build_optimizer(other, **settings)
    js.checkpoint.load(folder, model=other, optimizer=resumed)
    for step in range(saved_at, last):
        train_step(other, resumed, step)
    assert state_of(other, resumed) == state_of(model, optimizer)
    return "survived"
