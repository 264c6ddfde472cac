"""The arguments of each operation, checked before anything is written. No arithmetic: backends share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jointspar.backends.flat_arrays import (
    FlatArray,
    check_disjoint,
    check_lengths,
    check_same_layout,
    check_size,
    flat_arrays,
    flat_buffer,
    optional_flat_arrays,
    slices,
)

Array = Any  # torch.Tensor or numpy.ndarray on the CPU

MAX_WORLD_SIZE = 2**24


def pack_slices(
    grads: Sequence[Array | None], scales: np.ndarray, sizes: np.ndarray, packed: Array
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """(gradient or None, its slice of `packed`) of each tensor."""
    target = flat_buffer("out", packed, writable=True)
    sources = optional_flat_arrays("grads", grads)
    check_lengths(len(sources), scales=scales, sizes=sizes)
    parts = slices("sizes", target, sizes)
    for source, part in zip(sources, parts, strict=True):
        if source is not None:
            check_size(source, part.numel())
    check_disjoint([target], sources)
    return [(source.values if source else None, part) for source, part in zip(sources, parts, strict=True)]


def unpack_slices(packed: Array, outs: Sequence[Array]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(target, its slice of `packed`) of each tensor."""
    source = flat_buffer("packed", packed)
    targets = flat_arrays("outs", outs, writable=True)
    parts = slices("outs", source, _sizes_of(targets))
    check_disjoint(targets, [source])
    return [(target.values, part) for target, part in zip(targets, parts, strict=True)]


def packed_pair(out: Array, packed: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Two packed buffers of one dtype and size; the first is written."""
    target, source = flat_buffer("out", out, writable=True), flat_buffer("packed", packed)
    if target.values.dtype != source.values.dtype:
        raise TypeError(f"packed: {source.values.dtype}, but out is {target.values.dtype}")
    check_size(source, target.values.numel())
    check_disjoint([target], [source])
    return target.values, source.values


def norm_slices(grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> list[torch.Tensor]:
    """Each array of a list, or each slice of a packed buffer."""
    if isinstance(grads, (list, tuple)):
        if sizes is not None:
            raise TypeError("sizes: only a packed buffer takes them, grads is a list")
        return [flat.values for flat in flat_arrays("grads", grads)]
    if sizes is None:
        raise TypeError("sizes: a packed buffer needs the sizes of its slices")
    return slices("sizes", flat_buffer("grads", grads), sizes)


def update_tensors(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    hyper: np.ndarray,
    num_columns: int,
    **per_tensor: np.ndarray,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(param, momentum, grad) of each tensor; a None grad becomes zeros. `hyper` is [num_tensors, num_columns]."""
    weights, velocities = flat_arrays("params", params, writable=True), flat_arrays("momenta", momenta, writable=True)
    check_lengths(len(weights), momenta=velocities)
    for weight, velocity in zip(weights, velocities, strict=True):
        check_same_layout(velocity, weight)
        expected = torch.float64 if weight.values.dtype == torch.float64 else torch.float32
        if velocity.values.dtype != expected:
            raise TypeError(f"{velocity.name}: is {velocity.values.dtype}, expected {expected}")
    grad_values, grad_arrays = _update_grads(weights, grads)
    check_disjoint([*weights, *velocities], grad_arrays)
    check_lengths(len(weights), **per_tensor)
    if hyper.shape != (len(weights), num_columns):
        raise ValueError(f"hyper: has shape {hyper.shape}, expected {(len(weights), num_columns)}")
    return [
        (weight.values, velocity.values, grad)
        for weight, velocity, grad in zip(weights, velocities, grad_values, strict=True)
    ]


def _update_grads(
    weights: list[FlatArray], grads: Sequence[Array | None] | Array
) -> tuple[list[torch.Tensor], Sequence[FlatArray | None]]:
    """One flat gradient a tensor, and the arrays that they lie in."""
    if not isinstance(grads, (list, tuple)):
        packed = flat_buffer("grads", grads)
        return slices("params", packed, _sizes_of(weights)), [packed]
    sources = optional_flat_arrays("grads", grads)
    check_lengths(len(weights), grads=sources)
    for source, weight in zip(sources, weights, strict=True):
        if source is not None:
            check_same_layout(source, weight)
    values = [
        torch.zeros(weight.values.numel()) if source is None else source.values
        for source, weight in zip(sources, weights, strict=True)
    ]
    return values, sources


def _sizes_of(arrays: Sequence[FlatArray]) -> np.ndarray:
    return np.array([array.values.numel() for array in arrays], dtype=np.int64)


def check_draw(
    probabilities: np.ndarray, seed: int, step: int, rank: int, world_size: int, strategy: str, draw: str
) -> None:
    _check_vectors(None, probabilities=probabilities)
    if not ((probabilities >= 0.0) & (probabilities <= 1.0)).all():
        raise ValueError("probabilities: values must be in [0, 1]")
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size: must be in [1, {MAX_WORLD_SIZE}]")
    for name, value, end in (("seed", seed, 2**64), ("step", step, 2**32), ("rank", rank, world_size)):
        if not 0 <= value < end:
            raise ValueError(f"{name}: must be in [0, {end})")
    if strategy not in ("independent", "stratified", "shared") or draw not in ("bernoulli", "systematic"):
        raise ValueError(f"strategy {strategy!r} or draw {draw!r} is unknown")


def check_projection(log_weights: np.ndarray, budget: float, p_min: float) -> None:
    _check_vectors(None, log_weights=log_weights)
    num_layers = len(log_weights)
    tolerance = 1e-9 * max(1.0, budget)
    if not 0.0 < p_min <= 1.0:
        raise ValueError("p_min: must be in (0, 1]")
    if not (math.isfinite(budget) and p_min * num_layers - tolerance <= budget <= num_layers + tolerance):
        raise ValueError(f"budget: {budget} is outside [p_min * num_layers, num_layers]")
    if not np.isfinite(log_weights).all():
        raise ValueError("log_weights: holds a NaN or infinity")


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
    for name, value in (("gradient_bound", gradient_bound), ("bandit_lr", bandit_lr)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name}: must be finite and not negative")


def _check_vectors(length: int | None, **vectors: np.ndarray) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 1 or (length is not None and vector.size != length):
            raise ValueError(f"{name}: has shape {vector.shape}, expected one dimension, as long as all others")
