"""pack_gradients against plain NumPy in float64 and, bit for bit, against torch's `(grad * scale).to(dtype)`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jointspar import ops
from support import (
    DTYPES,
    NORM_TOLERANCE,
    SIZES,
    TOLERANCE,
    Arrays,
    at_odd_offset,
    bits,
    exact_squared_norm,
    relative_error,
    same_bits_on_1_and_2_threads,
)

pytestmark = pytest.mark.usefixtures("backend")

WIRES = ("float32", "float64", "bfloat16", "float16")


def random_grads(arrays: Arrays, rng: np.random.Generator, dtype: str, sizes: tuple[int, ...] = SIZES) -> list:
    return [arrays.array(rng.standard_normal(size), dtype) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_every_size_matches_float64(library: Arrays, rng: np.random.Generator, dtype: str, wire: str) -> None:
    grads = random_grads(library, rng, dtype)
    scales = rng.uniform(0.1, 10.0, len(SIZES))
    packed, norms = ops.pack_gradients(grads, scales, wire_dtype=wire)
    plain = [library.float64(grad) for grad in grads]
    expected = np.concatenate([grad * scale for grad, scale in zip(plain, scales, strict=True)])
    assert library.dtype_name(packed) == wire
    exact = dtype == wire == "float64"
    assert relative_error(library.float64(packed), expected) <= max(TOLERANCE[wire], 0.0 if exact else 1e-6)
    np.testing.assert_allclose(
        library.float64(norms), [exact_squared_norm(grad) for grad in plain], rtol=NORM_TOLERANCE[dtype]
    )


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.1, -7.25, 1e-30, 1e30])
def test_float32_gradients_give_the_bits_of_torch(
    device: str, rng: np.random.Generator, wire: str, scale: float
) -> None:
    grads = [torch.tensor(rng.standard_normal(size) * 10.0 ** rng.uniform(-6, 6, size)).float() for size in SIZES]
    dtype = getattr(torch, wire)
    packed, _ = ops.pack_gradients([grad.to(device) for grad in grads], scale, wire_dtype=dtype)
    if wire == "float64":
        expected = torch.cat([grad.double() * scale for grad in grads])
    else:
        expected = torch.cat([(grad * scale).to(dtype) for grad in grads])
    assert bits(packed) == bits(expected)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gradients_are_scaled_in_float32_and_rounded_once(
    device: str, rng: np.random.Generator, dtype: str, wire: str
) -> None:
    grads = [torch.tensor(rng.standard_normal(size)).to(getattr(torch, dtype)) for size in SIZES]
    packed, _ = ops.pack_gradients([grad.to(device) for grad in grads], 0.3, wire_dtype=wire)
    expected = torch.cat([(grad.float() * 0.3).to(getattr(torch, wire)) for grad in grads])
    assert bits(packed) == bits(expected)


def test_every_16_bit_rounding_case_gives_the_bits_of_torch(device: str) -> None:
    patterns = torch.arange(0, 2**32, 65_521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = (torch.arange(2**16, dtype=torch.int64) * 65536 + 32768).to(torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        for values in (patterns, ties):
            values = values[~values.isnan()]
            packed, _ = ops.pack_gradients([values.to(device)], 1.0, wire_dtype=dtype)
            assert bits(packed) == bits(values.to(dtype))


@pytest.mark.parametrize("wire", WIRES)
def test_nan_infinity_and_signed_zero_survive_the_wire(library: Arrays, wire: str) -> None:
    values = np.array([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0])
    packed, norms = ops.pack_gradients([library.array(values)], 2.0, wire_dtype=wire)
    received = library.float64(packed)
    np.testing.assert_array_equal(received, values * 2.0)
    np.testing.assert_array_equal(np.signbit(received[1:]), np.signbit(values[1:]))
    assert math.isnan(norms[0])


def test_overflow_of_a_16_bit_wire_is_infinite_and_the_norm_stays_finite(library: Arrays) -> None:
    packed, norms = ops.pack_gradients([library.array([60000.0, -60000.0])], 10.0, wire_dtype="float16")
    np.testing.assert_array_equal(library.float64(packed), [math.inf, -math.inf])
    assert float(norms[0]) == pytest.approx(2 * 60000.0**2)


def test_norms_are_those_before_scaling(library: Arrays) -> None:
    _, norms = ops.pack_gradients([library.array([3.0, 4.0]), library.array([1.0])], [100.0, 0.0])
    assert norms.tolist() == [25.0, 1.0]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-25, 3e-21, 1e19, 1e25, 3e38], ids=lambda value: f"{value:g}")
def test_norms_are_right_near_the_limits_of_float32(library: Arrays, magnitude: float) -> None:
    grad = library.array(np.full(20000, magnitude))
    _, norms = ops.pack_gradients([grad], 1.0)
    assert float(norms[0]) == pytest.approx(math.fsum(library.float64(grad) ** 2), rel=1e-6)


def test_none_packs_zeros_of_its_layout(library: Arrays) -> None:
    grads = [None, library.array([1.0, 2.0]), None]
    out = library.array(np.full(6, 9.0))
    packed, norms = ops.pack_gradients(grads, 2.0, layout=[3, 2, 1], out=out)
    assert packed is out
    assert library.float64(out).tolist() == [0.0, 0.0, 0.0, 2.0, 4.0, 0.0]
    assert norms.tolist() == [0.0, 5.0, 0.0]


def test_all_none_packs_zeros(library: Arrays) -> None:
    out = library.array(np.full(5, 9.0))
    _, norms = ops.pack_gradients([None, None], 1.0, layout=[2, 3], out=out)
    assert library.float64(out).tolist() == [0.0] * 5
    assert norms.tolist() == [0.0, 0.0]
    assert type(norms) is type(out)


@pytest.mark.host
def test_all_none_gives_tensors_where_no_array_says_otherwise() -> None:
    packed, norms = ops.pack_gradients([None, None], 1.0, layout=[2, 3])
    assert isinstance(packed, torch.Tensor) and isinstance(norms, torch.Tensor)
    assert packed.tolist() == [0.0] * 5 and norms.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wire", DTYPES)
def test_none_of_every_size_writes_its_slice_and_no_more(library: Arrays, wire: str) -> None:
    ones = library.array(np.ones(1))
    grads = [grad for _ in SIZES for grad in (None, ones)]
    layout = [size for each in SIZES for size in (each, 1)]
    out = library.array(np.full(sum(layout), math.nan), wire)
    _, norms = ops.pack_gradients(grads, 1.0, layout=layout, out=out)
    expected = np.concatenate([np.append(np.zeros(size), 1.0) for size in SIZES])
    np.testing.assert_array_equal(library.float64(out), expected)
    assert norms.tolist() == [0.0, 1.0] * len(SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_odd_alignments_write_nothing_but_their_slices(
    library: Arrays, rng: np.random.Generator, dtype: str, offset: int
) -> None:
    grads = [at_odd_offset(library, rng.standard_normal(size), dtype, offset) for size in SIZES]
    total = sum(SIZES)
    memory = library.array(np.full(total + 2 * offset, 7.0), dtype)
    ops.pack_gradients(grads, 1.0, out=memory[offset : offset + total])
    written = library.float64(memory)
    np.testing.assert_array_equal(written[:offset], 7.0)
    np.testing.assert_array_equal(written[offset + total :], 7.0)
    expected = np.concatenate([library.float64(grad) for grad in grads])
    np.testing.assert_array_equal(written[offset : offset + total], expected)


def test_default_wire_is_float32_and_float64_for_a_float64_gradient(library: Arrays) -> None:
    half, single, double = (library.array([1.0], dtype) for dtype in ("float16", "float32", "float64"))
    assert library.dtype_name(ops.pack_gradients([half, half], 1.0)[0]) == "float32"
    assert library.dtype_name(ops.pack_gradients([half, single], 1.0)[0]) == "float32"
    assert library.dtype_name(ops.pack_gradients([half, double], 1.0)[0]) == "float64"


def test_gradients_of_different_dtypes_share_a_buffer(library: Arrays, rng: np.random.Generator) -> None:
    grads = [library.array(rng.standard_normal(40), dtype) for dtype in ("float32", "float16", "float64")]
    packed, norms = ops.pack_gradients(grads, [1.0, 2.0, 3.0], wire_dtype="float64")
    expected = [library.float64(grad) * scale for grad, scale in zip(grads, (1.0, 2.0, 3.0), strict=True)]
    assert relative_error(library.float64(packed), np.concatenate(expected)) <= 1e-6
    np.testing.assert_allclose(
        library.float64(norms), [exact_squared_norm(library.float64(grad)) for grad in grads], rtol=1e-6
    )


def test_channels_last_gradients_are_packed_in_memory_order(device: str, rng: np.random.Generator) -> None:
    image = torch.tensor(rng.standard_normal((2, 3, 4, 5)), dtype=torch.float32)
    packed, _ = ops.pack_gradients([image.to(device, memory_format=torch.channels_last)], 1.0)
    assert torch.equal(packed.cpu(), image.permute(0, 2, 3, 1).reshape(-1))


def test_gradients_are_left_as_they_were(library: Arrays, rng: np.random.Generator) -> None:
    grads = random_grads(library, rng, "float32")
    before = [bits(grad) for grad in grads]
    ops.pack_gradients(grads, 3.0, wire_dtype="float16")
    assert [bits(grad) for grad in grads] == before


def test_scales_as_numbers_lists_and_arrays_mean_the_same(library: Arrays) -> None:
    grads = [library.array([1.0]), library.array([2.0])]
    for scales in (3, 3.0, [3.0, 3.0], np.float32(3.0), np.array([3, 3]), torch.tensor([3.0, 3.0])):
        assert library.float64(ops.pack_gradients(grads, scales)[0]).tolist() == [3.0, 6.0]


def test_nothing_packs_to_nothing() -> None:
    packed, norms = ops.pack_gradients([], [])
    assert tuple(packed.shape) == (0,)
    assert tuple(norms.shape) == (0,)


def test_a_scalar_tensor_is_one_element(library: Arrays) -> None:
    packed, norms = ops.pack_gradients([library.array(3.0)], 2.0)
    assert packed.tolist() == [6.0]
    assert norms.tolist() == [9.0]


def test_autograd_sees_that_out_was_written(device: str) -> None:
    out = torch.zeros(3, device=device)
    version = out._version
    ops.pack_gradients([torch.ones(3, device=device)], 1.0, out=out)
    assert out._version > version


@pytest.mark.parametrize("wire", WIRES)
def test_same_bits_for_1_and_2_threads(library: Arrays, rng: np.random.Generator, wire: str) -> None:
    grads = random_grads(library, rng, "float32", (*SIZES, 400_000))
    assert same_bits_on_1_and_2_threads(lambda: ops.pack_gradients(grads, 0.3, wire_dtype=wire))
