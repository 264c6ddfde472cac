"""Draws on a device are those of the host, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from device_support import DEVICE
from jointspar import backends, ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]


@pytest.mark.parametrize("strategy", ops.STRATEGIES)
@pytest.mark.parametrize(
    ("draw", "run_length"), [("bernoulli", None), ("systematic", None), ("systematic", 1), ("systematic", 50)]
)
@pytest.mark.parametrize(
    ("num_layers", "num_cases"),
    [(0, 1), (1, 20), (2, 20), (7, 20), (31, 20), (32, 20), (33, 20), (161, 100), (1023, 20), (1024, 20), (1025, 20),
     (10_000, 10), (100_000, 3)],
)  # fmt: skip
def test_a_device_draws_the_bits_of_the_host(
    rng: np.random.Generator, strategy: str, draw: str, run_length: int | None, num_layers: int, num_cases: int
) -> None:
    for _ in range(num_cases):
        p = rng.choice([0.0, 1.0, 0.5, 1 / 3, 2.0**-41, *rng.uniform(0, 1, 50)], num_layers)
        world_size = int(rng.choice([1, 2, 3, 8, 100, 10_000]))
        arguments = {
            "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
            "step": int(rng.integers(0, 2**32)),
            "rank": int(rng.integers(0, world_size)),
            "world_size": world_size,
            "strategy": strategy,
            "draw": draw,
            "run_length": run_length,
        }
        expected = backends.load("native").sample_layers(p, **arguments)
        active = ops.sample_layers(torch.tensor(p, device=DEVICE), **arguments)
        np.testing.assert_array_equal(active.cpu(), expected)
