"""The compressors of the baselines against slow float64 versions that read the messages byte by byte."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from jointspar.training.baselines import Compressor, Qsgd, ScaledSign, TernGrad, TopK
from jointspar.training.baselines.bits import pack_bits, unpack_bits

CODES = [TopK(), TopK(0.3), ScaledSign(), Qsgd(), Qsgd(1), Qsgd(127), Qsgd(levels=5, bucket=7), TernGrad()]
SIZES = (1, 2, 9, 512, 513, 1300)


def gradient(size: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed, with zeros among it."""
    random = np.random.default_rng([size, seed])
    values = random.standard_normal(size) ** 3
    return np.where(random.random(size) < 0.1, 0.0, values).astype(np.float32)


def message_of(code: Compressor, values: np.ndarray, seed: int = 0) -> np.ndarray:
    message = code.encode(torch.from_numpy(values), np.random.default_rng(seed))
    assert message.dtype == torch.uint8 and message.numel() == code.num_bytes(values.size)
    return message.numpy()


def decoded(code: Compressor, values: np.ndarray, seed: int = 0) -> np.ndarray:
    return code.decode(torch.from_numpy(message_of(code, values, seed)), values.size).double().numpy()


def floats(message: np.ndarray) -> list[float]:
    return np.frombuffer(message.tobytes(), dtype="<f4").astype(np.float64).tolist()


def codes(message: np.ndarray, width: int, size: int) -> list[int]:
    """The message as one long number, `width` bits at a time from its lowest."""
    number = int.from_bytes(message.tobytes(), "little")
    return [number >> (width * k) & (2**width - 1) for k in range(size)]


def slow_top_k(values: np.ndarray, num_kept: int) -> np.ndarray:
    kept = sorted(range(values.size), key=lambda k: -abs(float(values[k])))[:num_kept]
    return np.array([float(value) if k in kept else 0.0 for k, value in enumerate(values)])


def slow_levels(values: np.ndarray, scales: list[float], levels: int, seed: int) -> list[int]:
    """Signed levels by the same random numbers, one element after the other."""
    uniform = np.random.default_rng(seed).random(values.size, dtype=np.float32).astype(np.float64)
    return [
        int(math.copysign(math.floor(abs(float(value)) / scale * levels + u), value)) if scale else 0
        for value, scale, u in zip(values, scales, uniform, strict=True)
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("ratio", "expected"), [(0.01, (1, 1, 1, 5, 5, 13)), (1.0, SIZES)])
def test_top_k_sends_the_largest_as_int32_and_float32(size: int, ratio: float, expected: tuple[int, ...]) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    num_kept = expected[SIZES.index(size)]
    message = message_of(TopK(ratio), values)
    assert message.size == 8 * num_kept
    indices = np.frombuffer(message[: 4 * num_kept].tobytes(), dtype="<i4")
    slow = slow_top_k(values, num_kept)
    assert sorted(indices) == np.flatnonzero(slow).tolist()
    assert floats(message[4 * num_kept :]) == [float(values[k]) for k in indices]
    assert (decoded(TopK(ratio), values) == slow).all()


@pytest.mark.parametrize("size", SIZES)
def test_scaled_sign_sends_a_mean_and_a_bit_each(size: int) -> None:
    values = gradient(size)
    message = message_of(ScaledSign(), values)
    assert message.size == 4 + -(-size // 8)
    scale = sum(abs(float(value)) for value in values) / size
    assert floats(message[:4]) == pytest.approx([scale], rel=1e-6)
    assert codes(message[4:], 1, size) == [int(value >= 0) for value in values]
    slow = [scale if value >= 0 else -scale for value in values]
    np.testing.assert_allclose(decoded(ScaledSign(), values), slow, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("levels", "bucket", "width"), [(7, 512, 4), (1, 512, 2), (127, 512, 8), (5, 7, 4)])
def test_qsgd_sends_a_scale_a_bucket_and_few_bits_an_element(size: int, levels: int, bucket: int, width: int) -> None:
    values = gradient(size)
    code = Qsgd(levels=levels, bucket=bucket)
    message = message_of(code, values, seed=3)
    num_buckets = -(-size // bucket)
    assert message.size == 4 * num_buckets + -(-size * width // 8)
    largest = [max(abs(float(value)) for value in values[k * bucket :][:bucket]) for k in range(num_buckets)]
    assert floats(message[: 4 * num_buckets]) == largest
    scales = [largest[k // bucket] for k in range(size)]
    found = codes(message[4 * num_buckets :], width, size)
    assert found == [levels + level for level in slow_levels(values, scales, levels, seed=3)]
    slow = [scale * (code - levels) / levels for scale, code in zip(scales, found, strict=True)]
    np.testing.assert_allclose(decoded(code, values, seed=3), slow, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_terngrad_clips_and_sends_two_bits_an_element(size: int) -> None:
    values = gradient(size)
    message = message_of(TernGrad(), values, seed=5)
    assert message.size == 4 + -(-size * 2 // 8)
    bound = 2.5 * math.sqrt(sum(float(value) ** 2 for value in values) / size)
    clipped = np.array([max(-bound, min(bound, float(value))) for value in values])
    scale = max(abs(clipped))
    assert floats(message[:4]) == pytest.approx([scale], rel=1e-6)
    found = codes(message[4:], 2, size)
    assert found == [1 + level for level in slow_levels(clipped, [scale] * size, 1, seed=5)]
    np.testing.assert_allclose(decoded(TernGrad(), values, seed=5), [scale * (c - 1) for c in found], rtol=1e-6)


@pytest.mark.parametrize("code", [Qsgd(), Qsgd(1), Qsgd(levels=3, bucket=10), TernGrad()], ids=str)
def test_random_rounding_is_unbiased(code: Compressor) -> None:
    num_draws = 4000
    values = np.random.default_rng(8).uniform(-1, 1, 40).astype(np.float32)  # nothing for TernGrad to clip
    random = np.random.default_rng(9)
    draws = np.stack(
        [code.decode(code.encode(torch.from_numpy(values), random), 40).double().numpy() for _ in range(num_draws)]
    )
    standard_errors = draws.std(axis=0) / math.sqrt(num_draws)
    assert (standard_errors > 0).sum() >= 35
    assert (abs(draws.mean(axis=0) - values) <= 4 * standard_errors + 1e-6).all()


class Largest:
    """Draws the largest float32 below 1 every time."""

    def random(self, size: int, dtype: type) -> np.ndarray:
        return np.full(size, np.nextafter(np.float32(1), np.float32(0)), dtype=dtype)


@pytest.mark.parametrize("code", [Qsgd(), Qsgd(127), TernGrad()], ids=str)
def test_the_largest_magnitude_is_never_rounded_up(code: Any) -> None:
    message = code.encode(torch.tensor([3.0, -3.0, 3.0]), Largest())
    assert code.decode(message, 3).tolist() == [3.0, -3.0, 3.0]


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_packed_bits_come_back_and_have_no_gaps(width: int, size: int) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, size).astype(np.uint8)
    packed = pack_bits(torch.from_numpy(values), width)
    assert packed.numel() == math.ceil(size * width / 8)
    assert codes(packed.numpy(), width, size) == values.tolist()
    assert unpack_bits(packed, width, size).tolist() == values.tolist()


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_zeros_come_out_as_zeros(code: Compressor, size: int) -> None:
    assert not decoded(code, np.zeros(size, dtype=np.float32)).any()


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_what_is_decoded(code: Compressor, value: float) -> None:
    values = gradient(1300)
    values[700] = value
    assert not np.isfinite(decoded(code, values)).all()


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_extreme_gradients_stay_within_their_largest(code: Compressor, scale: float) -> None:
    values = (gradient(1300) / abs(gradient(1300)).max() * scale).astype(np.float32)
    assert abs(decoded(code, values)).max() <= abs(values).max() * (1 + 1e-6)
