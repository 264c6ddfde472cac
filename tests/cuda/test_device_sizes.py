"""Sizes and alignments around a block's work, and slices of more than 2^31 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from device_support import DEVICE
from jointspar import ops
from support import DTYPES, NORM_TOLERANCE, TOLERANCE, TorchArrays, at_odd_offset, bits, momentum_dtype, relative_error

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

# Around a warp, a block's chunk of 4,096 elements, and 2^20.
SIZES = (0, 1, 31, 32, 33, 4095, 4096, 4097, 2**20 - 1, 2**20, 2**20 + 1)
LARS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02, "eps": 1e-8}
HOST, ON_DEVICE = TorchArrays(), TorchArrays(DEVICE)
every_dtype_and_offset = pytest.mark.parametrize(
    ("dtype", "offset"), [(dtype, offset) for dtype in DTYPES for offset in (0, 1, 2, 3, 7)]
)


def on_both(rng: np.random.Generator, dtype: str, offset: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same values of every size on the host, and on the device that many elements into their memory."""
    values = [rng.standard_normal(size) for size in SIZES]
    host = [HOST.array(value, dtype) for value in values]
    return host, [at_odd_offset(ON_DEVICE, value, dtype, offset) for value in values]


def assert_close(on_device: list[torch.Tensor], on_host: list[torch.Tensor], tolerance: float) -> None:
    for actual, expected in zip(on_device, on_host, strict=True):
        error = relative_error(ON_DEVICE.float64(actual), HOST.float64(expected))
        assert error <= tolerance, f"size {expected.numel()}"


@every_dtype_and_offset
def test_pack_and_norms_agree_with_the_reference(rng: np.random.Generator, dtype: str, offset: int) -> None:
    host, on_device = on_both(rng, dtype, offset)
    scales = rng.uniform(0.5, 2.0, len(SIZES))
    memory = torch.full((sum(SIZES) + 2 * offset,), 7.0, device=DEVICE, dtype=getattr(torch, dtype))
    packed, norms = ops.pack_gradients(on_device, scales, out=memory[offset : offset + sum(SIZES)])
    with ops.use_backend("reference"):
        expected, expected_norms = ops.pack_gradients(host, scales, wire_dtype=dtype)
    assert bits(packed) == bits(expected)
    assert bool((memory[:offset] == 7.0).all()) and bool((memory[offset + sum(SIZES) :] == 7.0).all())
    for measured in (norms, ops.squared_norms(on_device)):
        np.testing.assert_allclose(measured.cpu(), expected_norms, rtol=NORM_TOLERANCE[dtype])


@every_dtype_and_offset
def test_unpack_and_add_agree_with_the_reference(rng: np.random.Generator, dtype: str, offset: int) -> None:
    host, on_device = on_both(rng, dtype, offset)
    values = rng.standard_normal(sum(SIZES))
    packed_on_host = HOST.array(values, dtype)
    packed = at_odd_offset(ON_DEVICE, values, dtype, 7 - offset)
    ops.unpack_gradients(packed, on_device, add=True)
    total = torch.cat(on_device)
    ops.add_packed(total, packed)
    with ops.use_backend("reference"):
        ops.unpack_gradients(packed_on_host, host, add=True)
        expected = torch.cat(host)
        ops.add_packed(expected, packed_on_host)
    assert [bits(tensor) for tensor in on_device] == [bits(tensor) for tensor in host]
    assert bits(total) == bits(expected)


@every_dtype_and_offset
@pytest.mark.parametrize("rule", ["lars", "sgd"])
def test_updates_agree_with_the_reference(rng: np.random.Generator, dtype: str, offset: int, rule: str) -> None:
    states: list[Any] = [on_both(rng, kind, offset) for kind in (dtype, momentum_dtype(dtype), dtype)]

    def run(arrays: list[list[torch.Tensor]]) -> Any:
        if rule == "lars":
            return ops.lars_update(*arrays, **LARS, adapt=[True] * len(SIZES)).grad_norms
        return ops.sgd_update(*arrays, **{name: LARS[name] for name in ("lr", "momentum", "weight_decay")})

    norms = run([on_device for _, on_device in states])
    with ops.use_backend("reference"):
        expected_norms = run([host for host, _ in states])
    for (host, on_device), kind in zip(states[:2], (dtype, momentum_dtype(dtype)), strict=True):
        assert_close(on_device, host, 2 * TOLERANCE[kind])  # both were rounded
    np.testing.assert_allclose(norms.cpu(), expected_norms, rtol=NORM_TOLERANCE[dtype])


def test_norms_of_which_some_are_known_among_more_chunks_than_blocks(rng: np.random.Generator) -> None:
    """As in every 100th step of an optimizer: a block takes several chunks, of slices to measure and of others."""
    shapes = [(size, 3) for size in rng.integers(100_000, 300_000, 20).tolist()]
    params, grads = ([rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(2))
    norms = np.array([[np.linalg.norm(array.astype(np.float64)) for array in arrays] for arrays in (params, grads)])
    expected = [
        weights - 0.5 * 0.02 * w / (g + 1e-2 * w + 1e-8) * (grad + 1e-2 * weights)
        for weights, grad, w, g in zip(params, grads, *norms, strict=True)
    ]
    on_device = [[torch.from_numpy(array.copy()).to(DEVICE) for array in arrays] for arrays in (params, grads)]
    momenta = [torch.zeros_like(param) for param in on_device[0]]
    given = norms.copy()
    given[0, ::2] = given[1, ::3] = np.nan
    param_norms, grad_norms = torch.from_numpy(given).to(DEVICE)
    found = ops.lars_update(on_device[0], momenta, on_device[1], **LARS, param_norms=param_norms, grad_norms=grad_norms)
    np.testing.assert_allclose(found.grad_norms.cpu(), norms[1], rtol=1e-6)
    for actual, values in zip(on_device[0], expected, strict=True):
        np.testing.assert_allclose(actual.cpu(), values, rtol=1e-5, atol=1e-6)


def test_more_than_2_to_the_31_elements_in_one_slice() -> None:
    size = 2**31 + 5
    needed = 10 * size + 2**30  # two of 2 bytes, one of 4, and what torch keeps besides
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
    torch.cuda.empty_cache()
    grad, ends = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE), [0, 2**31 - 1, 2**31, size - 1]
    grad[ends] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device=DEVICE)
    packed, norms = ops.pack_gradients([grad], 2.0, wire_dtype="bfloat16")
    assert norms.tolist() == [30.0]
    assert packed[ends].tolist() == [2.0, 4.0, 6.0, 8.0]
    ops.unpack_gradients(packed, [grad], add=True)
    assert grad[ends].tolist() == [3.0, 6.0, 9.0, 12.0]
    momentum = torch.zeros(size, device=DEVICE)
    ops.sgd_update([packed], [momentum], [grad], lr=1.0, momentum=0.0, weight_decay=0.0)
    assert packed[ends].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert momentum[ends].tolist() == [3.0, 6.0, 9.0, 12.0]
