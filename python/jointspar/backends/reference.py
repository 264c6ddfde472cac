"""The readable truth: every operation in plain float64, slow. Oracle of the tests and the fallback that always works.

It imports no fast code, so that an error there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jointspar.backends.host_calls import norm_slices, pack_slices, packed_pair, unpack_slices, update_tensors
from jointspar.backends.reference_probabilities import project_probabilities, sample_layers, update_probabilities

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
            part.zero_()
            continue
        compute = _compute_dtype(source, part)
        _store(part, source.to(compute) * torch.tensor(scales[k], dtype=compute, device="cpu"))
        norms[k] = _squared_norm(source)
    return norms


def unpack_gradients(packed: Array, outs: Sequence[Array], add: bool) -> None:
    """outs[k] = packed slice k, or outs[k] += it; mutates `outs`. Sums round as in `pack_gradients`."""
    for target, part in unpack_slices(packed, outs):
        if add:
            _add(target, part)
        else:
            _store(target, part)


def add_packed(out: Array, packed: Array) -> None:
    """out += packed, of one dtype and size; mutates `out`. 16-bit types are added in float32."""
    _add(*packed_pair(out, packed))


def squared_norms(grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> np.ndarray:
    """float64 [num_tensors]: sum of squares of each array, or of each slice of a 1-D packed buffer."""
    return np.array([_squared_norm(part) for part in norm_slices(grads, sizes)], dtype=np.float64)


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
    norms_before = _fill_in(param_norms, [param for param, _, _ in tensors])
    used_norms = _fill_in(grad_norms, [grad for _, _, grad in tensors])
    if skip_nonfinite and not np.isfinite(used_norms).all():
        return used_norms, norms_before
    norms_after = np.empty(len(tensors))
    for k, (param, velocity, grad) in enumerate(tensors):
        lr, momentum, weight_decay, trust_coefficient, eps = hyper[k].tolist()
        param_norm, grad_norm = float(norms_before[k]), float(used_norms[k])
        local = 1.0
        if adapt[k] and param_norm != 0.0 and grad_norm != 0.0:
            local = trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
            local = min(local, torch.finfo(velocity.dtype).max)  # of one that overflowed 0 * rate would be NaN
        _momentum_step(param, velocity, grad, lr, momentum, weight_decay, local, nesterov)
        norms_after[k] = _norm(param)
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
    grad_norms = np.array([_norm(grad) for _, _, grad in tensors])
    if skip_nonfinite and not np.isfinite(grad_norms).all():
        return grad_norms
    for k, (param, velocity, grad) in enumerate(tensors):
        lr, momentum, weight_decay = hyper[k].tolist()
        _momentum_step(param, velocity, grad, lr, momentum, weight_decay, 1.0, nesterov)
    return grad_norms


def _momentum_step(
    param: torch.Tensor,
    velocity: torch.Tensor,
    grad: torch.Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    local: float,
    nesterov: bool,
) -> None:
    """d = local * (g + weight_decay * w); u = momentum * u + d; w -= lr * (d + momentum * u if nesterov else u)."""
    w = param.to(torch.float64)
    d = local * (grad.to(torch.float64) + weight_decay * w)
    u = momentum * velocity.to(torch.float64) + d
    _store(velocity, u)
    _store(param, w - lr * (d + momentum * u if nesterov else u))


def _fill_in(known: np.ndarray, arrays: Sequence[torch.Tensor]) -> np.ndarray:
    """Known norms, with the NaN ones measured."""
    norms = [_norm(array) if np.isnan(norm) else norm for norm, array in zip(known.tolist(), arrays, strict=True)]
    return np.array(norms, dtype=np.float64)


def _add(target: torch.Tensor, values: torch.Tensor) -> None:
    compute = _compute_dtype(target, values)
    _store(target, target.to(compute) + values.to(compute))


def _compute_dtype(*arrays: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(array.dtype == torch.float64 for array in arrays) else torch.float32


def _store(target: torch.Tensor, values: torch.Tensor) -> None:
    """Round to nearest even; float64 reaches the 16-bit types through float32, as in torch."""
    target.copy_(values.to(torch.float32) if target.dtype.itemsize == 2 else values)


def _squared_norm(values: torch.Tensor) -> float:
    # NumPy sums in one thread: the same bits whatever the number of torch threads.
    with np.errstate(over="ignore"):
        return float(np.square(values.to(torch.float64).numpy()).sum())


def _norm(values: torch.Tensor) -> float:
    return float(np.sqrt(_squared_norm(values)))
