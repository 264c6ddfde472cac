"""The arguments of each operation, checked before anything is written. No arithmetic: backends share it.

read: where the arrays are; see flat_arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jointspar.backends.flat_arrays import (
    Flat,
    FlatArray,
    Read,
    check_disjoint,
    check_lengths,
    check_same_layout,
    check_size,
    flat_arrays,
    flat_buffer,
    optional_flat_arrays,
    slices,
)

Array = Any  # torch.Tensor, numpy.ndarray or another array that `read` knows

MAX_WORLD_SIZE = 2**24


def pack_slices(
    read: Read[Flat], grads: Sequence[Array | None], scales: np.ndarray, sizes: np.ndarray, packed: Array
) -> list[tuple[Flat | None, Flat]]:
    """(gradient or None, its slice of `packed`) of each tensor."""
    target = flat_buffer(read, "out", packed, writable=True)
    sources = optional_flat_arrays(read, "grads", grads)
    check_lengths(len(sources), scales=scales, sizes=sizes)
    parts = slices("sizes", target, sizes)
    for source, part in zip(sources, parts, strict=True):
        if source is not None:
            check_size(source, part.size)
    check_disjoint([target], sources)
    return list(zip(sources, parts, strict=True))


def unpack_slices(read: Read[Flat], packed: Array, outs: Sequence[Array]) -> list[tuple[Flat, Flat]]:
    """(target, its slice of `packed`) of each tensor."""
    source = flat_buffer(read, "packed", packed)
    targets = flat_arrays(read, "outs", outs, writable=True)
    parts = slices("outs", source, _sizes_of(targets))
    check_disjoint(targets, [source])
    return list(zip(targets, parts, strict=True))


def packed_pair(read: Read[Flat], out: Array, packed: Array) -> tuple[Flat, Flat]:
    """Two packed buffers of one dtype and size; the first is written."""
    target, source = flat_buffer(read, "out", out, writable=True), flat_buffer(read, "packed", packed)
    if target.dtype != source.dtype:
        raise TypeError(f"packed: {source.dtype}, but out is {target.dtype}")
    check_size(source, target.size)
    check_disjoint([target], [source])
    return target, source


def norm_slices(read: Read[Flat], grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> list[Flat]:
    """Each array of a list, or each slice of a packed buffer."""
    if isinstance(grads, (list, tuple)):
        if sizes is not None:
            raise TypeError("sizes: only a packed buffer takes them, grads is a list")
        return flat_arrays(read, "grads", grads)
    if sizes is None:
        raise TypeError("sizes: a packed buffer needs the sizes of its slices")
    return slices("sizes", flat_buffer(read, "grads", grads), sizes)


def update_tensors(
    read: Read[Flat],
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    hyper: np.ndarray,
    num_columns: int,
    **per_tensor: np.ndarray,
) -> list[tuple[Flat, Flat, Flat | None]]:
    """(param, momentum, grad or None: zeros) of each tensor. `hyper` is [num_tensors, num_columns]."""
    weights = flat_arrays(read, "params", params, writable=True)
    velocities = flat_arrays(read, "momenta", momenta, writable=True)
    check_lengths(len(weights), momenta=velocities)
    for weight, velocity in zip(weights, velocities, strict=True):
        check_same_layout(velocity, weight)
        expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if velocity.dtype != expected:
            raise TypeError(f"{velocity.name}: is {velocity.dtype}, expected {expected}")
    gradients = _update_grads(read, weights, grads)
    check_disjoint([*weights, *velocities], gradients)
    check_lengths(len(weights), **per_tensor)
    if hyper.shape != (len(weights), num_columns):
        raise ValueError(f"hyper: has shape {hyper.shape}, expected {(len(weights), num_columns)}")
    return list(zip(weights, velocities, gradients, strict=True))


def _update_grads(
    read: Read[Flat], weights: list[Flat], grads: Sequence[Array | None] | Array
) -> Sequence[Flat | None]:
    """One gradient a tensor."""
    if not isinstance(grads, (list, tuple)):
        return slices("params", flat_buffer(read, "grads", grads), _sizes_of(weights))
    sources = optional_flat_arrays(read, "grads", grads)
    check_lengths(len(weights), grads=sources)
    for source, weight in zip(sources, weights, strict=True):
        if source is not None:
            check_same_layout(source, weight)
    return sources


def _sizes_of(arrays: Sequence[FlatArray]) -> np.ndarray:
    return np.array([array.size for array in arrays], dtype=np.int64)


def check_draw(
    probabilities: np.ndarray,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None,
) -> None:
    _check_vectors(None, probabilities=probabilities)
    if not ((probabilities >= 0.0) & (probabilities <= 1.0)).all():
        raise ValueError("probabilities: values must be in [0, 1]")
    check_draw_settings(seed, step, rank, world_size, strategy, draw, run_length)


def check_draw_settings(
    seed: int, step: int, rank: int, world_size: int, strategy: str, draw: str, run_length: int | None
) -> None:
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size: must be in [1, {MAX_WORLD_SIZE}]")
    for name, value, end in (("seed", seed, 2**64), ("step", step, 2**32), ("rank", rank, world_size)):
        if not 0 <= value < end:
            raise ValueError(f"{name}: must be in [0, {end})")
    if strategy not in ("independent", "stratified", "shared") or draw not in ("bernoulli", "systematic"):
        raise ValueError(f"strategy {strategy!r} or draw {draw!r} is unknown")
    if run_length is not None and not 1 <= run_length < 2**32:
        raise ValueError("run_length: must be in [1, 2**32)")
    if run_length is not None and draw == "bernoulli":
        raise ValueError("run_length: does not act with draw='bernoulli'; leave it out")


def check_projection(log_weights: np.ndarray, budget: float, p_min: float) -> None:
    _check_vectors(None, log_weights=log_weights)
    check_budget(len(log_weights), budget, p_min)
    if not np.isfinite(log_weights).all():
        raise ValueError("log_weights: holds a NaN or infinity")


def check_budget(num_layers: int, budget: float, p_min: float) -> None:
    """0 < p_min <= budget / num_layers <= 1 within 1e-9 * max(1, budget)."""
    tolerance = 1e-9 * max(1.0, budget)
    if not 0.0 < p_min <= 1.0:
        raise ValueError("p_min: must be in (0, 1]")
    if not (math.isfinite(budget) and p_min * num_layers - tolerance <= budget <= num_layers + tolerance):
        raise ValueError(f"budget: {budget} is outside [p_min * num_layers, num_layers]")


def check_bandit_step(
    probabilities: np.ndarray,
    squared_norms: np.ndarray,
    active: np.ndarray,
    drawn_probabilities: np.ndarray,
    gradient_bound: float,
    bandit_lr: float,
) -> None:
    _check_vectors(
        len(probabilities),
        probabilities=probabilities,
        squared_norms=squared_norms,
        active=active,
        drawn_probabilities=drawn_probabilities,
    )
    for name, values in (("probabilities", probabilities), ("drawn_probabilities", drawn_probabilities)):
        if not ((values > 0.0) & (values <= 1.0)).all():
            raise ValueError(f"{name}: values must be in (0, 1]")
    active_n2 = squared_norms[active]
    if not (np.isfinite(active_n2) & (active_n2 >= 0.0)).all():
        raise ValueError("squared_norms: values of active layers must be finite and not negative")
    check_not_negative(gradient_bound=gradient_bound, bandit_lr=bandit_lr)


def check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0.0):
            raise ValueError(f"{name}: must be finite and not negative")


def _check_vectors(length: int | None, **vectors: np.ndarray) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 1 or (length is not None and vector.size != length):
            raise ValueError(f"{name}: has shape {vector.shape}, expected one dimension, as long as all others")
