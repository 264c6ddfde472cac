"""Loops over flat float32 and float64 arrays, and the 16-bit types as uint16 bit patterns, compiled by Numba.

Everything runs in the calling thread, without the GIL: norms are the same bits whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

CHUNK_SIZE = 16384  # elements; small enough that the second loop over a chunk finds it in the cache

_SIGN = 0x8000  # of a 16-bit pattern
_BFLOAT16_NAN = 0xFFFF  # what torch's vector code on x86 writes
_INFINITY, _QUIET_BIT = 0x7F800000, 0x00400000  # of float32
_FLOAT16_INFINITY, _FLOAT16_QUIET_NAN = 0x7C00, 0x7E00
_FLOAT16_SMALLEST_NORMAL = 0x0400
_SMALLEST_NORMAL_IN_FLOAT32 = 0x38800000  # 2^-14, float16's smallest normal number, as float32
_BIAS_DIFFERENCE = 0x38000000  # of the two exponents, in float32's place
_SUBNORMAL_UNIT = np.float32(2.0**-24)


def compiled(function: Callable, **options: Any) -> Callable:
    """`function`, compiled at its first call for each type; kept on disk where some folder can be written.

    fastmath is set either way: what is not set, a function takes over from the first one that calls it.
    """
    options = {"nogil": True, "fastmath": False, **options}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder for the cache: the one of the sources and the user's are read-only
        return numba.njit(function, **options)


# "reassoc" lets the compiler sum in vector lanes: an order that depends on type and size alone.
@partial(compiled, fastmath={"reassoc"})
def _squared_norm_of_chunk(values: np.ndarray) -> float:
    total = 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value * value
    return total


@compiled
def squared_norm(values: np.ndarray) -> float:
    """Sum of squares in float64, chunk by chunk."""
    total = 0.0
    for begin in range(0, values.size, CHUNK_SIZE):
        total += _squared_norm_of_chunk(values[begin : min(begin + CHUNK_SIZE, values.size)])
    return total


@compiled
def scale(source: np.ndarray, factor: np.floating, out: np.ndarray) -> float:
    """out[i] = source[i] * factor, in the wider of their types; returns the sum of squares of `source`."""
    total = 0.0
    for begin in range(0, source.size, CHUNK_SIZE):
        end = min(begin + CHUNK_SIZE, source.size)
        for i in range(begin, end):
            out[i] = source[i] * factor
        total += _squared_norm_of_chunk(source[begin:end])
    return total


@compiled
def add(target: np.ndarray, values: np.ndarray) -> None:
    """target[i] += values[i], in the wider of their types."""
    for i in range(target.size):
        target[i] = target[i] + values[i]


@compiled
def _momentum_step_of_chunk(
    param: np.ndarray, velocity: np.ndarray, grad: np.ndarray, factors: np.ndarray, nesterov: bool
) -> None:
    lr, momentum, weight_decay, local = factors[0], factors[1], factors[2], factors[3]
    for i in range(param.size):
        w = param[i]
        direction = local * (grad[i] + weight_decay * w)
        u = momentum * velocity[i] + direction
        velocity[i] = u
        param[i] = w - lr * (direction + momentum * u if nesterov else u)


@compiled
def momentum_step(
    param: np.ndarray, velocity: np.ndarray, grad: np.ndarray, factors: np.ndarray, nesterov: bool
) -> float:
    """d = local * (g + weight_decay * w); u = momentum * u + d; w -= lr * (d + momentum * u if nesterov else u).

    All arrays are of one dtype; factors: lr, momentum, weight_decay, local. Returns the sum of squares of the new w.
    """
    total = 0.0
    for begin in range(0, param.size, CHUNK_SIZE):
        end = min(begin + CHUNK_SIZE, param.size)
        w = param[begin:end]
        _momentum_step_of_chunk(w, velocity[begin:end], grad[begin:end], factors, nesterov)
        total += _squared_norm_of_chunk(w)
    return total


# --- the 16-bit types: bits are uint16, values are float32 ------------------------------------------------------------


@compiled
def widen_bfloat16(bits: np.ndarray, values: np.ndarray) -> None:
    words = values.view(np.uint32)
    for i in range(bits.size):
        words[i] = np.int64(bits[i]) << 16


@compiled
def widen_float16(bits: np.ndarray, values: np.ndarray) -> None:
    words = values.view(np.uint32)
    for i in range(bits.size):
        pattern = np.int64(bits[i])
        magnitude = pattern & (_SIGN - 1)
        if magnitude >= _FLOAT16_INFINITY:
            quiet = _QUIET_BIT if magnitude > _FLOAT16_INFINITY else 0
            word = _INFINITY | quiet | (magnitude - _FLOAT16_INFINITY) << 13
        elif magnitude >= _FLOAT16_SMALLEST_NORMAL:
            word = (magnitude << 13) + _BIAS_DIFFERENCE
        else:
            values[i] = np.float32(magnitude) * _SUBNORMAL_UNIT
            word = np.int64(words[i])
        words[i] = word | (pattern & _SIGN) << 16


@compiled
def _shift_to_even(value: int, shift: int) -> int:
    """value / 2^shift, to the nearest whole number, and to the even one from the middle."""
    return (value + (1 << (shift - 1)) - 1 + (value >> shift & 1)) >> shift


@compiled
def narrow_bfloat16(values: np.ndarray, bits: np.ndarray) -> None:
    """To nearest even; NaN becomes 0xFFFF, as in torch's vector code on x86."""
    words = values.view(np.uint32)
    for i in range(bits.size):
        word = np.int64(words[i])
        bits[i] = _BFLOAT16_NAN if word & 0x7FFFFFFF > _INFINITY else _shift_to_even(word, 16)


@compiled
def narrow_float16(values: np.ndarray, bits: np.ndarray) -> None:
    """To nearest even, too large to infinity; NaN stays a NaN with its sign, quiet, as the F16C instructions do."""
    words = values.view(np.uint32)
    for i in range(bits.size):
        word = np.int64(words[i])
        magnitude = word & 0x7FFFFFFF
        if magnitude > _INFINITY:
            pattern = _FLOAT16_QUIET_NAN | magnitude >> 13 & 0x03FF
        elif magnitude >= _SMALLEST_NORMAL_IN_FLOAT32:
            pattern = min(_shift_to_even(magnitude - _BIAS_DIFFERENCE, 13), _FLOAT16_INFINITY)
        else:  # a whole number of 2^-24; 25 places take every mantissa to 0
            mantissa = magnitude & 0x007FFFFF | 0x00800000
            pattern = _shift_to_even(mantissa, min(126 - (magnitude >> 23), 25))
        bits[i] = word >> 16 & _SIGN | pattern
