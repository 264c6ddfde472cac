"""`checked_calls` for arrays on the CPU, as 1-D tensors of their elements. No arithmetic: backends share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import jointspar.backends.checked_calls as checked_calls
from jointspar.backends.flat_arrays import HostArray, host_array

Array = Any  # torch.Tensor or numpy.ndarray on the CPU


def pack_slices(
    grads: Sequence[Array | None], scales: np.ndarray, sizes: np.ndarray, packed: Array
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """(gradient or None, its slice of `packed`) of each tensor."""
    pairs = checked_calls.pack_slices(host_array, grads, scales, sizes, packed)
    return [(source.values if source else None, part.values) for source, part in pairs]


def unpack_slices(packed: Array, outs: Sequence[Array]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(target, its slice of `packed`) of each tensor."""
    pairs = checked_calls.unpack_slices(host_array, packed, outs)
    return [(target.values, part.values) for target, part in pairs]


def packed_pair(out: Array, packed: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Two packed buffers of one dtype and size; the first is written."""
    target, source = checked_calls.packed_pair(host_array, out, packed)
    return target.values, source.values


def norm_slices(grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> list[torch.Tensor]:
    """Each array of a list, or each slice of a packed buffer."""
    return [flat.values for flat in checked_calls.norm_slices(host_array, grads, sizes)]


def update_tensors(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    hyper: np.ndarray,
    num_columns: int,
    **per_tensor: np.ndarray,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(param, momentum, grad) of each tensor; a None grad becomes zeros. `hyper` is [num_tensors, num_columns]."""
    tensors = checked_calls.update_tensors(host_array, params, momenta, grads, hyper, num_columns, **per_tensor)
    return [(param.values, momentum.values, _values_or_zeros(grad, param.size)) for param, momentum, grad in tensors]


def _values_or_zeros(flat: HostArray | None, size: int) -> torch.Tensor:
    return torch.zeros(size, device="cpu") if flat is None else flat.values
