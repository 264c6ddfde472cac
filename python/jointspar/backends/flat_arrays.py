"""Arrays as flat tensors of their elements in memory order, with every check. No arithmetic: backends share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = Any  # torch.Tensor or numpy.ndarray on the CPU

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TORCH_DTYPES = {np.dtype(name): getattr(torch, name) for name in ("float32", "float64", "float16")}


@dataclass(frozen=True)
class FlatArray:
    """A dense array as a 1-D tensor of its elements in memory order."""

    name: str
    values: torch.Tensor  # shares memory, unless the array is a read-only NumPy one
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    address: int  # of the first byte

    @property
    def end_address(self) -> int:
        return self.address + self.values.numel() * self.values.element_size()


def flat_array(name: str, array: Array, writable: bool = False) -> FlatArray:
    if isinstance(array, torch.Tensor):
        return _flat_tensor(name, array)
    if isinstance(array, np.ndarray):
        return _flat_ndarray(name, array, writable)
    raise TypeError(f"{name}: expected a torch tensor or NumPy array, got {type(array).__name__}")


def _flat_tensor(name: str, array: torch.Tensor) -> FlatArray:
    if array.layout != torch.strided or array.is_nested:
        raise TypeError(f"{name}: is sparse, nested or of a special layout, expected a plain tensor")
    if array.device.type != "cpu":
        raise ValueError(f"{name}: is on {array.device}, expected the CPU")
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {array.dtype} is not one of float32, float64, bfloat16, float16")
    shape, strides = tuple(array.shape), array.stride()
    _check_dense(name, shape, strides)
    if array.is_neg():
        raise ValueError(f"{name}: is a lazily negated view")
    values = array.detach().as_strided((array.numel(),), (1,))
    return FlatArray(name, values, shape, strides, array.data_ptr())


def _flat_ndarray(name: str, array: np.ndarray, writable: bool) -> FlatArray:
    if array.dtype not in TORCH_DTYPES:
        raise TypeError(f"{name}: {array.dtype} is not one of float32, float64, float16 in native byte order")
    if not array.flags.aligned:
        raise ValueError(f"{name}: is not aligned")
    if writable and not array.flags.writeable:
        raise ValueError(f"{name}: is read-only")
    itemsize = array.itemsize
    # Strides that are no multiple of the element are mapped to 0, which no dense array has.
    strides = tuple(stride // itemsize if stride % itemsize == 0 else 0 for stride in array.strides)
    _check_dense(name, array.shape, strides)
    flat = np.lib.stride_tricks.as_strided(array, (array.size,), (itemsize,))
    values = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
    return FlatArray(name, values, array.shape, strides, array.ctypes.data)


def _check_dense(name: str, shape: Sequence[int], strides: Sequence[int]) -> None:
    if 0 in shape:
        return
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            raise ValueError(f"{name}: is not dense (shape {tuple(shape)}, strides {tuple(strides)})")
        expected *= size


def flat_arrays(name: str, arrays: Sequence[Array], writable: bool = False) -> list[FlatArray]:
    """Each array of a list, checked; errors name it as name[index]."""
    _check_is_list(name, arrays)
    return [flat_array(f"{name}[{k}]", array, writable) for k, array in enumerate(arrays)]


def optional_flat_arrays(name: str, arrays: Sequence[Array | None]) -> list[FlatArray | None]:
    """As `flat_arrays`, where None stands for zeros."""
    _check_is_list(name, arrays)
    return [None if array is None else flat_array(f"{name}[{k}]", array) for k, array in enumerate(arrays)]


def flat_buffer(name: str, array: Array, writable: bool = False) -> FlatArray:
    """A packed buffer: one dimension."""
    flat = flat_array(name, array, writable)
    if len(flat.shape) != 1:
        raise ValueError(f"{name}: expected one dimension, got {len(flat.shape)}")
    return flat


def slices(name: str, packed: FlatArray, sizes: np.ndarray) -> list[torch.Tensor]:
    """Views of a packed buffer, one a size; `name` is the argument that the sizes come from."""
    counts = sizes.tolist()
    if any(count < 0 for count in counts) or sum(counts) != packed.values.numel():
        raise ValueError(f"{name}: sum to {sum(counts)} elements, {packed.name} has {packed.values.numel()}")
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [packed.values[end - count : end] for count, end in zip(counts, ends, strict=True)]


def check_size(flat: FlatArray, size: int) -> None:
    if flat.values.numel() != size:
        raise ValueError(f"{flat.name}: has {flat.values.numel()} elements, expected {size}")


def check_lengths(length: int, **arguments: Sized) -> None:
    """Every argument has one entry a tensor."""
    for name, argument in arguments.items():
        if len(argument) != length:
            raise ValueError(f"{name}: {len(argument)} entries for {length} tensors")


def check_same_layout(flat: FlatArray, other: FlatArray) -> None:
    """Same shape and, where they matter, same strides: element i of both is the same place."""
    if flat.shape != other.shape:
        raise ValueError(f"{flat.name}: has shape {flat.shape}, {other.name} has {other.shape}")
    if 0 not in flat.shape and _long_strides(flat) != _long_strides(other):
        raise ValueError(f"{flat.name}: has strides {flat.strides}, {other.name} has {other.strides}")


def check_disjoint(written: Iterable[FlatArray], read: Iterable[FlatArray | None]) -> None:
    """No written array shares memory with any other; arrays that are only read may share theirs."""
    spans = [(flat.address, flat.end_address, flat.name, True) for flat in written]
    spans += [(flat.address, flat.end_address, flat.name, False) for flat in read if flat is not None]
    spans = sorted(span for span in spans if span[0] < span[1])
    last_end, last_name = 0, ""  # of all so far, and of the written ones
    last_written_end, last_written_name = 0, ""
    for begin, end, name, is_written in spans:
        if begin < (last_end if is_written else last_written_end):
            raise ValueError(f"{name}: overlaps {last_name if is_written else last_written_name}")
        if end > last_end:
            last_end, last_name = end, name
        if is_written and end > last_written_end:
            last_written_end, last_written_name = end, name


def _check_is_list(name: str, arrays: Any) -> None:
    if not isinstance(arrays, (list, tuple)):
        raise TypeError(f"{name}: expected a list of arrays, got {type(arrays).__name__}")


def _long_strides(flat: FlatArray) -> list[int]:
    return [stride for stride, size in zip(flat.strides, flat.shape, strict=True) if size != 1]
