"""Arrays as their elements in memory order, with every check. No arithmetic: backends share it.

The checks know an array by its place, type and shape alone, so that they serve arrays in device memory too: a `Read`
says where an array is, `host_array` for the CPU and cupy_arrays.DeviceReader for a CUDA device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

Array = Any  # torch.Tensor, numpy.ndarray or another array that the Read at hand knows

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TORCH_DTYPES = {np.dtype(name): getattr(torch, name) for name in ("float32", "float64", "float16")}


@dataclass(frozen=True)
class FlatArray:
    """Where a dense array is: `size` elements in memory order from `address` on."""

    name: str
    dtype: torch.dtype
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    address: int  # of the first byte

    @property
    def end_address(self) -> int:
        return self.address + self.size * self.dtype.itemsize

    def _part_of(self, begin: int, end: int) -> dict[str, Any]:
        address = self.address + begin * self.dtype.itemsize
        return {"size": end - begin, "shape": (end - begin,), "strides": (1,), "address": address}

    def part(self: Flat, begin: int, end: int) -> Flat:
        """Elements [begin, end), in memory order."""
        return replace(self, **self._part_of(begin, end))


@dataclass(frozen=True)
class HostArray(FlatArray):
    """On the CPU, with its elements as a 1-D tensor."""

    values: torch.Tensor  # a plain one; shares memory, unless the array is a read-only NumPy one

    def _part_of(self, begin: int, end: int) -> dict[str, Any]:
        return {**super()._part_of(begin, end), "values": self.values[begin:end]}


Flat = TypeVar("Flat", bound=FlatArray)
FlatOut = TypeVar("FlatOut", bound=FlatArray, covariant=True)


class Read(Protocol[FlatOut]):
    """Checks one array, which errors call `name`, and says where it is."""

    def __call__(self, name: str, array: Array, writable: bool = False) -> FlatOut: ...


def host_array(name: str, array: Array, writable: bool = False) -> HostArray:
    """The `Read` of torch tensors and NumPy arrays on the CPU."""
    if isinstance(array, torch.Tensor):
        return _flat_tensor(name, array)
    if isinstance(array, np.ndarray):
        return _flat_ndarray(name, array, writable)
    raise TypeError(f"{name}: expected a torch tensor or NumPy array, got {type(array).__name__}")


def check_tensor(name: str, array: torch.Tensor) -> None:
    """A plain tensor, whose memory holds its elements as they are."""
    if array.layout != torch.strided or array.is_nested:
        raise TypeError(f"{name}: is sparse, nested or of a special layout, expected a plain tensor")
    if array.is_neg():
        raise ValueError(f"{name}: is a lazily negated view")


def _flat_tensor(name: str, array: torch.Tensor) -> HostArray:
    check_tensor(name, array)
    if array.device.type != "cpu":
        raise ValueError(f"{name}: is on {array.device}, expected the CPU")
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {array.dtype} is not one of float32, float64, bfloat16, float16")
    shape, strides = tuple(array.shape), array.stride()
    check_dense(name, shape, strides)
    values = _elements(name, array)
    address = values.data_ptr()
    if address % values.element_size():
        raise ValueError(f"{name}: is not aligned in memory")
    return HostArray(name, values.dtype, values.numel(), shape, strides, address, values)


def _elements(name: str, array: torch.Tensor) -> torch.Tensor:
    """Its elements in one dimension, in memory that NumPy agrees to be there."""
    if array.numel() == 0:
        return torch.empty(0, dtype=array.dtype, device="cpu")
    try:
        flat = array.detach().as_strided((array.numel(),), (1,))
        numbers = flat.view(torch.int16) if array.dtype == torch.bfloat16 else flat  # NumPy has no bfloat16
        memory = torch.from_numpy(numbers.numpy()).view(array.dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TypeError(f"{name}: {type(array).__name__} has no memory of its own ({reason})") from None
    # Outside of their mode torch writes no tensors made in inference mode, but memory that it did not make.
    return memory if array.is_inference() else flat


def _flat_ndarray(name: str, array: np.ndarray, writable: bool) -> HostArray:
    if array.dtype not in TORCH_DTYPES:
        raise TypeError(f"{name}: {array.dtype} is not one of float32, float64, float16 in native byte order")
    if not array.flags.aligned:
        raise ValueError(f"{name}: is not aligned")
    if writable and not array.flags.writeable:
        raise ValueError(f"{name}: is read-only")
    strides = element_strides(array.strides, array.itemsize)
    check_dense(name, array.shape, strides)
    flat = np.lib.stride_tricks.as_strided(array, (array.size,), (array.itemsize,))
    values = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
    return HostArray(name, values.dtype, array.size, array.shape, strides, array.ctypes.data, values)


def element_strides(strides: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """From bytes to elements. What is no multiple of the element becomes 0, which no dense array has."""
    return tuple(stride // itemsize if stride % itemsize == 0 else 0 for stride in strides)


def check_dense(name: str, shape: Sequence[int], strides: Sequence[int]) -> None:
    """Contiguous after some permutation of the dimensions; strides in elements."""
    if 0 in shape:
        return
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            raise ValueError(f"{name}: is not dense (shape {tuple(shape)}, strides {tuple(strides)})")
        expected *= size


def flat_arrays(read: Read[Flat], name: str, arrays: Sequence[Array], writable: bool = False) -> list[Flat]:
    """Each array of a list, checked; errors name it as name[index]."""
    _check_is_list(name, arrays)
    return [read(f"{name}[{k}]", array, writable) for k, array in enumerate(arrays)]


def optional_flat_arrays(read: Read[Flat], name: str, arrays: Sequence[Array | None]) -> list[Flat | None]:
    """As `flat_arrays`, where None stands for zeros."""
    _check_is_list(name, arrays)
    return [None if array is None else read(f"{name}[{k}]", array) for k, array in enumerate(arrays)]


def flat_buffer(read: Read[Flat], name: str, array: Array, writable: bool = False) -> Flat:
    """A packed buffer: one dimension."""
    flat = read(name, array, writable)
    if len(flat.shape) != 1:
        raise ValueError(f"{name}: expected one dimension, got {len(flat.shape)}")
    return flat


def slices(name: str, packed: Flat, sizes: np.ndarray) -> list[Flat]:
    """Parts of a packed buffer, one a size; `name` is the argument that the sizes come from."""
    counts = sizes.tolist()
    if any(count < 0 for count in counts) or sum(counts) != packed.size:
        raise ValueError(f"{name}: sum to {sum(counts)} elements, {packed.name} has {packed.size}")
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [packed.part(end - count, end) for count, end in zip(counts, ends, strict=True)]


def check_size(flat: FlatArray, size: int) -> None:
    if flat.size != size:
        raise ValueError(f"{flat.name}: has {flat.size} elements, expected {size}")


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
