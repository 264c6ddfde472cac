"""Every kernel once, at awkward sizes, as little as shows an access out of bounds or a race: for compute-sanitizer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from device_calls import CALLS, SIZE
from device_support import DEVICE
from jointspar import ops
from support import DTYPES, TorchArrays, at_odd_offset, momentum_dtype

pytestmark = pytest.mark.cuda

SIZES = (0, 1, 31, 32, 33, 4095, 4097, 9001)
UPDATE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
ON_DEVICE = TorchArrays(DEVICE)


def tensors(rng: np.random.Generator, dtype: str, offset: int) -> list[torch.Tensor]:
    return [at_odd_offset(ON_DEVICE, rng.standard_normal(size), dtype, offset) for size in SIZES]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_operation_runs(call) -> None:
    results = call(torch.linspace(-2.0, 2.0, SIZE, device=DEVICE))
    torch.cuda.synchronize()
    assert all(bool(result.isfinite().all()) for result in results)


@pytest.mark.parametrize(("dtype", "wire"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("offset", [0, 1])
def test_streaming_operations_run_on_every_pair_of_dtypes(
    rng: np.random.Generator, dtype: str, wire: str, offset: int
) -> None:
    params, grads = tensors(rng, dtype, offset), tensors(rng, dtype, offset)
    momenta = tensors(rng, momentum_dtype(dtype), offset)
    packed, norms = ops.pack_gradients(grads, 0.5, wire_dtype=wire)
    ops.add_packed(packed, packed.clone())
    ops.unpack_gradients(packed, grads, add=True)
    lars = ops.lars_update(
        params, momenta, packed, **UPDATE, trust_coefficient=1e-3, eps=1e-8, adapt=[True] * len(SIZES)
    )
    sgd_norms = ops.sgd_update(params, momenta, packed, **UPDATE, skip_nonfinite=True)
    torch.cuda.synchronize()
    for result in (*params, *momenta, *grads, norms, *lars, sgd_norms):
        assert bool(result.isfinite().all())


@pytest.mark.parametrize("num_layers", [1, 33, 1025, 5000])
@pytest.mark.parametrize(("strategy", "draw"), list(itertools.product(ops.STRATEGIES, ops.DRAWS)))
def test_draws_run_at_every_size(num_layers: int, strategy: str, draw: str) -> None:
    p = torch.full((num_layers,), 0.5, dtype=torch.float64, device=DEVICE)
    active = ops.sample_layers(p, seed=1, step=2, rank=1, world_size=5, strategy=strategy, draw=draw)
    if draw == "systematic":
        ops.sample_layers(p, seed=1, step=2, rank=1, world_size=5, strategy=strategy, run_length=3)
    q = ops.project_probabilities(torch.log(p), budget=0.5 * num_layers, p_min=0.1)
    assert active.shape == q.shape
    torch.testing.assert_close(q, p)
