"""What the numba backend shares with the native one beyond the tables of each operation: signatures and bits."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from jointspar.backends import native, numba_cpu
from support import SIZES, bits


def test_it_has_the_functions_and_argument_names_of_the_native_backend() -> None:
    assert numba_cpu.__all__ == native.__all__
    for name in numba_cpu.__all__:
        signature = (getattr(native, name).__doc__ or "").partition("\n")[0]
        arguments = inspect.signature(getattr(numba_cpu, name)).parameters
        assert not [argument for argument in arguments if argument not in signature], f"{name}: {signature}"


def test_draws_of_random_calls_are_the_bits_of_native(rng: np.random.Generator) -> None:
    for _ in range(2_000):
        world_size = int(rng.integers(1, 2 ** rng.integers(1, 12)))
        draw = str(rng.choice(["bernoulli", "systematic"]))
        has_runs = draw == "systematic" and rng.random() < 0.5
        p = rng.uniform(0, 1, rng.integers(0, 200)) ** rng.choice([1, 4])
        arguments = {
            "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
            "step": int(rng.integers(0, 2**32)),
            "rank": int(rng.integers(0, world_size)),
            "world_size": world_size,
            "strategy": str(rng.choice(["independent", "stratified", "shared"])),
            "draw": draw,
            "run_length": int(rng.integers(1, 2 ** rng.integers(1, 33))) if has_runs else None,
        }
        drawn = numba_cpu.sample_layers(p, **arguments)
        np.testing.assert_array_equal(drawn, native.sample_layers(p, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_rounded_and_widened_to_the_bits_of_native(dtype: torch.dtype) -> None:
    words = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F802000, 0x7F812345], dtype=torch.int64)
    nans = torch.cat([words, words | 0x80000000]).to(torch.int32).view(torch.float32)
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isnan()]
    results = []
    for backend in (native, numba_cpu):
        packed, out = torch.empty(nans.numel(), dtype=dtype), torch.empty(patterns.numel())
        backend.pack_gradients([nans], np.ones(1), np.array([nans.numel()]), packed)
        backend.unpack_gradients(patterns, [out], False)
        results.append((bits(packed), bits(out)))
    assert results[0] == results[1]


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_is_the_same_from_every_operation_that_measures_it(rng: np.random.Generator, size: int) -> None:
    grad = rng.standard_normal(size).astype(np.float32)
    norm = numba_cpu.squared_norms([grad], None)[0]
    assert numba_cpu.pack_gradients([grad], np.full(1, 0.3), np.array([size]), np.empty_like(grad))[0] == norm
    param, momentum, hyper = np.zeros_like(grad), np.zeros_like(grad), np.array([[1.0, 0.0, 0.0, 1.0, 0.0]])
    unknown, adapt = np.full(1, np.nan), np.zeros(1, bool)
    used, after = numba_cpu.lars_update(
        [param], [momentum], [grad], hyper=hyper, adapt=adapt, nesterov=False, param_norms=unknown, grad_norms=unknown
    )
    assert used[0] == after[0] == np.sqrt(norm)
