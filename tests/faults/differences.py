"""Ranks that differ in one thing, each in a job of its own making: all of them must get a DesyncError that names it.

Each function takes random numbers that are the same on all ranks, and says "detected" or fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import jointspar as js
from jointspar import pipeline
from jointspar.comm.transport import Transport
from jointspar.errors import DesyncError
from small_training import LAYER_SIZE, NUM_LAYERS, Numbers, build_model, build_optimizer, train_step


def expect_desync(action: Callable[[], object], words: str) -> str:
    try:
        action()
    except DesyncError as error:
        if words in str(error):
            return "detected"
        raise
    raise AssertionError(f"not noticed: {words}")


def seed(numbers: Numbers, comm: Transport) -> str:
    own = int(numbers.randrange(comm.world_size) == comm.rank)
    sampling = js.Sampling(strategy=numbers.choice(["shared", "stratified", "independent"]), seed=own)
    return expect_desync(lambda: build_optimizer(build_model(), sampling=sampling), "setting 'seed' differs")


def dtype(numbers: Numbers, comm: Transport) -> str:
    """Of two bytes each, or another width."""
    kinds = numbers.sample(["float16", "bfloat16", "float32", "float64"], 2)
    own = kinds[numbers.randrange(comm.world_size) == comm.rank]
    return expect_desync(lambda: build_optimizer(build_model(), wire_dtype=own), "setting 'wire_dtype' differs")


def layers(numbers: Numbers, comm: Transport) -> str:
    """Of the same sizes, with another name or in another order."""
    model = build_model()
    layer, names = numbers.randrange(NUM_LAYERS - 1), list(model)
    if numbers.random() < 0.5:
        names[layer] = "other"
    else:
        names[layer], names[layer + 1] = names[layer + 1], names[layer]
    if numbers.randrange(comm.world_size) == comm.rank:
        model = nn.ModuleDict(dict(zip(names, model.values(), strict=True)))
    return expect_desync(lambda: build_optimizer(model), f"layer {layer} ")


def probabilities(numbers: Numbers, comm: Transport) -> str:
    model = build_model()
    sampling = js.Sampling(strategy=numbers.choice(["shared", "stratified"]), p_min=0.1)  # leaves room to learn
    optimizer = build_optimizer(model, sampling=sampling)
    faulty, layer = numbers.randrange(comm.world_size), numbers.randrange(NUM_LAYERS)

    def train() -> None:
        for step in range(3):
            if step == 1 and comm.rank == faulty:
                optimizer._pipeline.distribution.norm_ema[layer] += 1.0
                optimizer._pipeline.distribution.norm_count[layer] += 1
            train_step(model, optimizer, step)

    return expect_desync(train, "the shared probabilities or draws differ")


def draw(numbers: Numbers, comm: Transport) -> str:
    """One rank draws a layer more, or one less, where all must draw the same; no probability ever tells."""
    faulty, layer, wrong_step = numbers.randrange(comm.world_size), numbers.randrange(NUM_LAYERS), numbers.randrange(5)
    original = pipeline.draw_layers

    def draw_layers(*arguments: Any, step: int, **named: Any) -> np.ndarray:
        active = original(*arguments, step=step, **named)
        active[layer] ^= comm.rank == faulty and step == wrong_step
        return active

    def train() -> None:
        model = build_model()
        optimizer = build_optimizer(model, sampling=js.Sampling(strategy="shared", distribution="uniform"))
        for step in range(5):
            train_step(model, optimizer, step)

    pipeline.draw_layers = draw_layers
    try:
        return expect_desync(train, "the shared probabilities or draws differ")
    finally:
        pipeline.draw_layers = original


def bit(numbers: Numbers, comm: Transport) -> str:
    """One bit of one weight."""
    model = build_model()
    optimizer = build_optimizer(model, check_every=2)
    faulty, layer = numbers.randrange(comm.world_size), numbers.randrange(NUM_LAYERS)
    byte, flip = numbers.randrange(4 * LAYER_SIZE), 1 << numbers.randrange(8)

    def train() -> None:
        for step in range(4):
            if step == 2 and comm.rank == faulty:
                weight = list(model.parameters())[layer]
                weight.data.view(-1).view(torch.uint8)[byte] ^= flip
            train_step(model, optimizer, step)

    return expect_desync(train, f"check of the weights at step 4: layer {layer} ")


def operation(numbers: Numbers, comm: Transport) -> str:
    """One rank goes to do something else."""
    model = build_model()
    optimizer = build_optimizer(model)
    for step in range(numbers.randrange(3)):
        train_step(model, optimizer, step)
    buffers = nn.BatchNorm1d(3)
    actions: list[Callable[[], object]] = [
        lambda: train_step(model, optimizer, 9),
        lambda: js.checkpoint.save(os.environ["FAULT_FOLDER"], model=model, optimizer=optimizer),
        lambda: js.sync_buffers(buffers),
        optimizer.finish,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: next(optimizer.even_batches([1])),
    ]
    first, second = numbers.sample(actions, 2)
    own = second if numbers.randrange(comm.world_size) == comm.rank else first
    return expect_desync(own, "the ranks are about to do different things")
