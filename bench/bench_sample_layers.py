"""Drawing the active layers: systematic, stratified over four ranks.

The draws of the peers come from other random numbers, so what is checked is what every right draw has: its size, and
how often each layer is in it. NumPy's `numpy` keeps a generator, which a resumed run would have to store; `numpy_keyed`
makes one from the seed and the step in each call, as ours does. No peer coordinates the ranks: each draws for itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import ops
from layer_problem import layer_cases, random_probabilities
from operation import Case, Operation, Traffic, Variant, backends_of, pytest_cases, pytest_id, run_in_pytest

SEED, RANK, WORLD_SIZE = 0, 1, 4
CHECKED_DRAWS = 100
STANDARD_DEVIATIONS = 6.0


class DrawProblem:
    """Probabilities, and the step that is drawn for."""

    def __init__(self, case: Case) -> None:
        self.probabilities, self.budget = random_probabilities(len(case.shapes))
        self.step = 0
        self.generator = np.random.default_rng(SEED)
        self.python_generator = random.Random(SEED)
        self.inputs = [torch.from_numpy(self.probabilities)]
        self.traffic: Traffic | None = None

    def reset(self) -> None:
        self.step = 0

    def check(self, call: Callable[[], Any]) -> None:
        counts = np.zeros(self.probabilities.size)
        for self.step in range(CHECKED_DRAWS):
            active = np.asarray(call(), dtype=bool)
            assert abs(active.sum() - self.budget) < 1.0, f"{active.sum()} layers for a budget of {self.budget}"
            counts += active
        deviation = np.sqrt(CHECKED_DRAWS * self.probabilities * (1.0 - self.probabilities))
        error = np.abs(counts - CHECKED_DRAWS * self.probabilities)
        assert (error <= STANDARD_DEVIATIONS * deviation + 1e-6).all(), "a layer is drawn too often or too rarely"


def ours(problem: DrawProblem) -> Any:
    return ops.sample_layers(
        problem.probabilities, seed=SEED, step=problem.step, rank=RANK, world_size=WORLD_SIZE, strategy="stratified"
    )


def naive(problem: DrawProblem) -> list[bool]:
    """What one writes first: a walk over the layers in random order with one random offset."""
    layers = list(range(problem.probabilities.size))
    problem.python_generator.shuffle(layers)
    active = [False] * len(layers)
    position = problem.python_generator.random()
    for layer in layers:
        before = position
        position += float(problem.probabilities[layer])
        active[layer] = int(position) > int(before)
    return active


def numpy(problem: DrawProblem) -> np.ndarray:
    return systematic_draw(problem.probabilities, problem.generator)


def numpy_keyed(problem: DrawProblem) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=SEED, counter=problem.step << 64))
    return systematic_draw(problem.probabilities, generator)


def systematic_draw(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Layers laid end to end in random order; drawn are those in which one of the points u, u + 1, ... lies."""
    order = generator.permutation(probabilities.size)
    ends = np.floor(np.cumsum(probabilities[order]) + generator.random())
    active = np.empty(probabilities.size, dtype=bool)
    active[order] = np.diff(ends, prepend=0.0) > 0.0
    return active


OPERATION = Operation(
    "sample_layers",
    layer_cases(),
    DrawProblem,
    [
        *backends_of(ours),
        Variant("naive", "peer", naive),
        Variant("numpy", "peer", numpy),
        Variant("numpy_keyed", "peer", numpy_keyed),
    ],
)


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_sample_layers(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
