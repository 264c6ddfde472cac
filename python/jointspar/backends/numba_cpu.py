"""The backend for where nothing was compiled: Numba compiles its loops at their first use. One thread.

Arithmetic happens in float32, or float64 where an array is float64; 16-bit arrays are widened before and rounded after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jointspar.backends import numba_kernels as kernels
from jointspar.backends.host_calls import norm_slices, pack_slices, packed_pair, unpack_slices, update_tensors
from jointspar.backends.numba_probabilities import project_probabilities, sample_layers, update_probabilities

__all__ = [
    "add_packed",
    "lars_update",
    "pack_gradients",
    "project_probabilities",
    "sample_layers",
    "sgd_update",
    "squared_norms",
    "unpack_gradients",
    "update_probabilities",
]

Array = Any  # torch.Tensor or numpy.ndarray on the CPU


def pack_gradients(grads: Sequence[Array | None], scales: np.ndarray, sizes: np.ndarray, packed: Array) -> np.ndarray:
    """packed slice k = cast(grads[k] * scales[k]), zeros for None; mutates `packed`.

    The product is formed in float32 (float64 where source or packed is float64), then rounded to the packed dtype.
    Returns float64 [num_tensors]: squared norms before scaling.
    """
    tensors = pack_slices(grads, scales, sizes, packed)
    norms = np.zeros(len(tensors))
    for k, (source, part) in enumerate(tensors):
        if source is None:
            _memory(part).fill(0)
            continue
        values = _widened(source)
        product = np.empty(part.numel(), np.float32) if _is_16_bit(part) else _memory(part)
        norms[k] = kernels.scale(values, _cast(scales[k], np.result_type(values, product))[()], product)
        if _is_16_bit(part):
            _store(part, product)
    return norms


def unpack_gradients(packed: Array, outs: Sequence[Array], add: bool) -> None:
    """outs[k] = packed slice k, or outs[k] += it; mutates `outs`. Sums round as in `pack_gradients`."""
    for target, part in unpack_slices(packed, outs):
        if add:
            _add(target, part)
        elif target.dtype == part.dtype:
            _memory(target)[...] = _memory(part)
        else:
            _store(target, _widened(part))


def add_packed(out: Array, packed: Array) -> None:
    """out += packed, of one dtype and size; mutates `out`. 16-bit types are added in float32."""
    _add(*packed_pair(out, packed))


def squared_norms(grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> np.ndarray:
    """float64 [num_tensors]: sum of squares of each array, or of each slice of a 1-D packed buffer."""
    return np.array([kernels.squared_norm(_widened(part)) for part in norm_slices(grads, sizes)], dtype=np.float64)


def lars_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    *,
    hyper: np.ndarray,
    adapt: np.ndarray,
    nesterov: bool,
    param_norms: np.ndarray,
    grad_norms: np.ndarray,
    skip_nonfinite: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """LARS with momentum, in place on `params` and `momenta`.

    local = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps); 1 where a norm is 0 or without adapt.

    Args:
        grads: arrays (None: zeros), or one packed 1-D buffer.
        hyper: float64 [num_tensors, 5]: lr, momentum, weight_decay, trust_coefficient, eps.
        adapt: bool [num_tensors].
        param_norms, grad_norms: float64 [num_tensors], known norms; NaN: measured here.
        skip_nonfinite: where any ||g|| is not finite, nothing is written.

    Returns: float64 [num_tensors] each: ||g|| that was used, ||w|| after the update as stored.
    Source: You, Gitman & Ginsburg 2017, with the learning rate outside the velocity as in torch.optim.
    """
    known = {"adapt": adapt, "param_norms": param_norms, "grad_norms": grad_norms}
    tensors = update_tensors(params, momenta, grads, hyper, 5, **known)
    norms_before = _known_or_measured(param_norms, [param for param, _, _ in tensors])
    used_norms = _known_or_measured(grad_norms, [grad for _, _, grad in tensors])
    if skip_nonfinite and not np.isfinite(used_norms).all():
        return used_norms, norms_before
    norms_after = np.empty(len(tensors))
    for k, (param, velocity, grad) in enumerate(tensors):
        _, _, weight_decay, trust_coefficient, eps = hyper[k].tolist()
        param_norm, grad_norm = float(norms_before[k]), float(used_norms[k])
        local = 1.0
        if adapt[k] and param_norm != 0.0 and grad_norm != 0.0:
            local = trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
        norms_after[k] = math.sqrt(_momentum_step(param, velocity, grad, hyper[k], local, nesterov))
    return used_norms, norms_after


def sgd_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    *,
    hyper: np.ndarray,
    nesterov: bool,
    skip_nonfinite: bool = False,
) -> np.ndarray:
    """SGD with momentum as torch.optim.SGD (dampening 0), in place on `params` and `momenta`.

    hyper: float64 [num_tensors, 3]: lr, momentum, weight_decay. skip_nonfinite as in `lars_update`.
    Returns float64 [num_tensors]: ||g||.
    """
    tensors = update_tensors(params, momenta, grads, hyper, 3)
    grad_norms = np.array([_norm(grad) for _, _, grad in tensors], dtype=np.float64)
    if skip_nonfinite and not np.isfinite(grad_norms).all():
        return grad_norms
    for k, (param, velocity, grad) in enumerate(tensors):
        _momentum_step(param, velocity, grad, hyper[k], 1.0, nesterov)
    return grad_norms


def _momentum_step(
    param: torch.Tensor, velocity: torch.Tensor, grad: torch.Tensor, hyper: np.ndarray, local: float, nesterov: bool
) -> float:
    """In place; returns the sum of squares of the parameters as stored. hyper: lr, momentum, weight_decay, ..."""
    weights, momentum_buffer = _widened(param), _memory(velocity)
    accumulator = weights.dtype
    factors = _cast([*hyper[:3], min(local, float(np.finfo(accumulator).max))], accumulator)
    grad_values = _cast(_widened(grad), accumulator)
    squared_norm = kernels.momentum_step(weights, momentum_buffer, grad_values, factors, bool(nesterov))
    if not _is_16_bit(param):
        return squared_norm
    _store(param, weights)
    return kernels.squared_norm(_widened(param))


def _add(target: torch.Tensor, values: torch.Tensor) -> None:
    total = _widened(target)
    kernels.add(total, _widened(values))
    if _is_16_bit(target):
        _store(target, total)


def _norm(values: torch.Tensor) -> float:
    return math.sqrt(kernels.squared_norm(_widened(values)))


def _known_or_measured(known: np.ndarray, arrays: Sequence[torch.Tensor]) -> np.ndarray:
    norms = [_norm(array) if math.isnan(norm) else norm for norm, array in zip(known.tolist(), arrays, strict=True)]
    return np.array(norms, dtype=np.float64)


def _is_16_bit(values: torch.Tensor) -> bool:
    return values.dtype.itemsize == 2


def _memory(values: torch.Tensor) -> np.ndarray:
    """The elements as float32 or float64; the bits of the 16-bit types as uint16."""
    return values.view(torch.int16).numpy().view(np.uint16) if _is_16_bit(values) else values.numpy()


def _widened(values: torch.Tensor) -> np.ndarray:
    """The memory of a float32 or float64 tensor; a float32 copy of a 16-bit one."""
    if not _is_16_bit(values):
        return _memory(values)
    wide = np.empty(values.numel(), np.float32)
    widen = kernels.widen_bfloat16 if values.dtype == torch.bfloat16 else kernels.widen_float16
    widen(_memory(values), wide)
    return wide


def _store(target: torch.Tensor, values: np.ndarray) -> None:
    """Round to nearest even; float64 reaches the 16-bit types through float32, as in torch."""
    if not _is_16_bit(target):
        _memory(target)[...] = _cast(values, _memory(target).dtype)
        return
    narrow = kernels.narrow_bfloat16 if target.dtype == torch.bfloat16 else kernels.narrow_float16
    narrow(_cast(values, np.dtype(np.float32)), _memory(target))


def _cast(values: Any, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`, themselves where they have it; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype, copy=False)
