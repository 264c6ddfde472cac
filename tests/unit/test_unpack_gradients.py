"""unpack_gradients and add_packed: round trips, properties, and sums against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointspar import ops
from support import DTYPES, SIZES, TOLERANCE, Arrays, TorchArrays, at_odd_offset, bits, relative_error

sizes_strategy = st.lists(st.integers(0, 70), max_size=6)
offset_strategy = st.integers(0, 3)
dtype_strategy = st.sampled_from(DTYPES)


def random_tensors(device: str, sizes: list[int], dtype: str, seed: int, offset: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [at_odd_offset(TorchArrays(device), rng.standard_normal(size), dtype, offset) for size in sizes]


@settings(max_examples=60)
@given(sizes=sizes_strategy, dtype=dtype_strategy, offset=offset_strategy, seed=st.integers(0, 2**32 - 1))
def test_pack_then_unpack_gives_back_every_bit(
    backend: str, device: str, sizes: list[int], dtype: str, offset: int, seed: int
) -> None:
    grads = random_tensors(device, sizes, dtype, seed)
    outs = random_tensors(device, sizes, dtype, seed + 1, offset)
    packed, _ = ops.pack_gradients(grads, 1.0, wire_dtype=dtype)
    ops.unpack_gradients(packed, outs)
    assert [bits(out) for out in outs] == [bits(grad) for grad in grads]


@settings(max_examples=60)
@given(sizes=sizes_strategy, wire=dtype_strategy, target=dtype_strategy, seed=st.integers(0, 2**32 - 1))
def test_unpack_with_add_adds_what_unpack_writes(
    backend: str, device: str, sizes: list[int], wire: str, target: str, seed: int
) -> None:
    nothing = torch.zeros(0, dtype=getattr(torch, wire), device=device)
    packed = torch.cat([*random_tensors(device, sizes, wire, seed), nothing])
    before = random_tensors(device, sizes, target, seed + 1)
    outs = [tensor.clone() for tensor in before]
    ops.unpack_gradients(packed, outs, add=True)
    for out, old, received in zip(outs, before, packed.double().split(sizes), strict=True):
        largest = (old.double().abs() + received.abs()).max().item() if out.numel() else 1.0
        error = (out.double() - (old.double() + received)).abs().max().item() if out.numel() else 0.0
        assert error <= max(TOLERANCE[target], 1e-6 if "float64" not in (wire, target) else 0.0) * largest


@settings(max_examples=60)
@given(size=st.integers(0, 200), dtype=dtype_strategy, offset=offset_strategy, seed=st.integers(0, 2**32 - 1))
def test_add_packed_gives_the_bits_of_torch_in_float32(
    backend: str, device: str, size: int, dtype: str, offset: int, seed: int
) -> None:
    (total,), (packed,) = (
        random_tensors(device, [size], dtype, seed, offset),
        random_tensors(device, [size], dtype, seed + 1),
    )
    wide = torch.float64 if dtype == "float64" else torch.float32
    expected = (total.to(wide) + packed.to(wide)).to(total.dtype)
    ops.add_packed(total, packed)
    assert bits(total) == bits(expected)


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_size_is_cast_into_the_targets(
    backend: str, library: Arrays, rng: np.random.Generator, wire: str, target: str
) -> None:
    packed = library.array(rng.standard_normal(sum(SIZES)), wire)
    outs = [at_odd_offset(library, np.full(size, 9.0), target, 1) for size in SIZES]
    ops.unpack_gradients(packed, outs)
    received = np.concatenate([library.float64(out) for out in outs])
    exact = TOLERANCE[target] <= TOLERANCE[wire] and {wire, target} != {"bfloat16", "float16"}
    assert relative_error(received, library.float64(packed)) <= (0.0 if exact else TOLERANCE[target])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_widened_to_the_bits_of_torch(backend: str, device: str, dtype: str) -> None:
    packed = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    packed = packed[~packed.isnan()]
    out = torch.empty(packed.numel(), device=device)
    ops.unpack_gradients(packed.to(device), [out])
    assert bits(out) == bits(packed.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_packed_matches_float64_at_every_size(
    backend: str, library: Arrays, rng: np.random.Generator, dtype: str
) -> None:
    for size in SIZES:
        total, packed = (library.array(rng.standard_normal(size), dtype) for _ in range(2))
        expected = library.float64(total) + library.float64(packed)
        ops.add_packed(total, packed)
        assert relative_error(library.float64(total), expected) <= TOLERANCE[dtype]


def test_unpack_writes_nothing_but_its_targets(backend: str, library: Arrays) -> None:
    memory = library.array(np.full(100, 7.0))
    ops.unpack_gradients(library.array(np.arange(40.0)), [memory[1:34], memory[35:42]])
    expected = np.full(100, 7.0)
    expected[1:34], expected[35:42] = np.arange(33.0), np.arange(33.0, 40.0)
    np.testing.assert_array_equal(library.float64(memory), expected)


def test_infinities_of_opposite_sign_add_to_nan(backend: str, library: Arrays) -> None:
    total = library.array([np.inf, 1.0, np.nan])
    ops.add_packed(total, library.array([-np.inf, np.inf, 1.0]))
    np.testing.assert_array_equal(library.float64(total), [np.nan, np.inf, np.nan])


def test_channels_last_targets_are_filled_in_memory_order(backend: str, device: str) -> None:
    image = torch.arange(120.0, device=device).reshape(2, 3, 4, 5)
    out = torch.zeros(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    packed, _ = ops.pack_gradients([image.to(memory_format=torch.channels_last)], 1.0)
    ops.unpack_gradients(packed, [out])
    assert torch.equal(out, image)


def test_packed_is_left_as_it_was_and_versions_of_targets_go_up(backend: str, device: str) -> None:
    packed, out = torch.arange(5.0, device=device), torch.zeros(5, device=device)
    before, version = bits(packed), out._version
    ops.unpack_gradients(packed, [out])
    ops.add_packed(out, packed)
    assert bits(packed) == before
    assert out._version >= version + 2


def test_nothing_unpacks_to_nothing(backend: str, device: str) -> None:
    ops.unpack_gradients(torch.zeros(0, device=device), [])
    ops.add_packed(torch.zeros(0, device=device), torch.zeros(0, device=device))


def every_half() -> np.ndarray:
    """All bit patterns of float16, and one more, so that no vector's length divides their number."""
    return np.append(np.arange(2**16, dtype=np.uint16), np.uint16(0x3C01)).view(np.float16)


def test_every_float16_is_read_and_written_as_numpy_does(backend: str) -> None:
    """NumPy's conversions are its own code: in software, to nearest even."""
    halves = every_half()
    wide = np.zeros(halves.size, dtype=np.float32)
    ops.unpack_gradients(halves, [wide])
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (halves.astype(np.float32) + np.roll(halves, 1).astype(np.float32)).astype(np.float16)
    total = halves.copy()
    ops.add_packed(total, np.roll(halves, 1).copy())
    np.testing.assert_array_equal(total, expected)


def test_halfway_between_two_float16_goes_to_the_even_one(backend: str) -> None:
    finite = np.sort(every_half()[np.isfinite(every_half())].astype(np.float32))
    between = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate(
        [between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf), [1e-30, 7e4, 65519.9]]
    )
    values = values.astype(np.float32)
    packed, _ = ops.pack_gradients([values], 1.0, wire_dtype="float16")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.asarray(packed), values.astype(np.float16))
