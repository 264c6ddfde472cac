"""Arrays in the memory of one CUDA device, of whichever library: where they are, as the checks of calls want it."""

from __future__ import annotations

import re
from typing import Any

import cupy
import torch

from jointspar.backends.flat_arrays import (
    FLOAT_DTYPES,
    FlatArray,
    check_dense,
    check_disjoint,
    check_size,
    check_tensor,
    element_strides,
    flat_buffer,
)

Array = Any  # torch.Tensor, cupy.ndarray, or anything with DLPack or __cuda_array_interface__

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16", "bool")}
_TYPE_CODES = {"f4": torch.float32, "f8": torch.float64, "f2": torch.float16, "b1": torch.bool}
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_STREAM = 1  # DLPack's name of the default stream, whose handle is 0


class DeviceReader:
    """The `Read` of one call on a cudaStream_t. It remembers what it read, for `check_disjoint`."""

    def __init__(self, device: int, stream: int) -> None:
        self._device = device
        self._stream = stream
        self._written: list[FlatArray] = []
        self._only_read: list[FlatArray] = []
        self._owners: list[Array] = []

    def __call__(self, name: str, array: Array, writable: bool = False) -> FlatArray:
        return self._checked(self._read(name, array, writable), FLOAT_DTYPES, writable)

    def vector(
        self, name: str, array: Array, size: int | None = None, dtype: str = "float64", writable: bool = False
    ) -> FlatArray:
        """A 1-D array of this dtype ("float64" or "bool") and size."""

        def read(name: str, array: Array, writable: bool = False) -> FlatArray:
            return self._checked(self._read(name, array, writable), (_DTYPES[dtype],), writable)

        flat = flat_buffer(read, name, array, writable)
        if size is not None:
            check_size(flat, size)
        return flat

    def check_disjoint(self) -> None:
        """No array that is written shares memory with any other of the call."""
        check_disjoint(self._written, self._only_read)

    def _checked(self, flat: FlatArray, dtypes: tuple[torch.dtype, ...], writable: bool) -> FlatArray:
        if flat.dtype not in dtypes:
            raise TypeError(f"{flat.name}: {flat.dtype} is not one of {', '.join(str(dtype) for dtype in dtypes)}")
        check_dense(flat.name, flat.shape, flat.strides)
        if flat.address % flat.dtype.itemsize != 0:
            raise ValueError(f"{flat.name}: is not aligned")
        (self._written if writable else self._only_read).append(flat)
        return flat

    def _read(self, name: str, array: Array, writable: bool) -> FlatArray:
        if isinstance(array, torch.Tensor):
            check_tensor(name, array)
            self._check_place(name, array.device.type == "cuda", array.device.index, str(array.device))
            return FlatArray(name, array.dtype, array.numel(), tuple(array.shape), array.stride(), array.data_ptr())
        if isinstance(array, cupy.ndarray):
            return self._read_cupy(name, array)
        if hasattr(array, "__dlpack_device__"):
            kind, device = (int(number) for number in array.__dlpack_device__())
            self._check_place(name, kind in _DLPACK_CUDA, device, f"device {device} of DLPack type {kind}")
            return self._read_dlpack(name, array)
        if hasattr(array, "__cuda_array_interface__"):
            return _read_interface(name, array, writable)
        raise TypeError(f"{name}: expected an array in CUDA memory, got {type(array).__name__}")

    def _read_cupy(self, name: str, array: Any) -> FlatArray:
        self._check_place(name, True, array.device.id, f"cuda:{array.device.id}")
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"{name}: {array.dtype.name} is not one of {', '.join(_DTYPES)}")
        dtype, strides = _DTYPES[array.dtype.name], element_strides(array.strides, array.dtype.itemsize)
        return FlatArray(name, dtype, array.size, tuple(array.shape), strides, array.data.ptr)

    def _read_dlpack(self, name: str, array: Any) -> FlatArray:
        try:
            imported = cupy.from_dlpack(_ReadyFor(self._stream, array))
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name}: {type(array).__name__} cannot be read as a dense array: {error}") from error
        self._owners.append(imported)
        return self._read_cupy(name, imported)

    def _check_place(self, name: str, is_cuda: bool, device: int | None, found: str) -> None:
        if not is_cuda or device != self._device:
            raise TypeError(f"{name}: is on {found}, not on cuda:{self._device} as this call needs")


class _ReadyFor:
    """An array that DLPack hands over for use on the stream of a call, which CuPy's from_dlpack would not ask for."""

    def __init__(self, stream: int, array: Any) -> None:
        self._stream = stream
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__(stream=self._stream or _LEGACY_STREAM)


def _read_interface(name: str, array: Any, writable: bool) -> FlatArray:
    """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, versions 2 and 3."""
    try:
        interface = array.__cuda_array_interface__
        address, is_read_only = interface["data"]
        shape = tuple(int(count) for count in interface["shape"])
        typestr, byte_strides = str(interface["typestr"]), interface.get("strides")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: has a __cuda_array_interface__ that cannot be read: {error}") from error
    if writable and is_read_only:
        raise ValueError(f"{name}: is read-only")
    code = re.sub("^[<|=]", "", typestr)  # little-endian, as every CUDA device is
    if code not in _TYPE_CODES:
        raise TypeError(f"{name}: '{typestr}' is not one of {', '.join(_TYPE_CODES)}")
    dtype, size = _TYPE_CODES[code], 1
    c_strides: list[int] = []
    for count in reversed(shape):
        c_strides.insert(0, size)
        size *= count
    if byte_strides is not None and len(byte_strides) != len(shape):
        raise ValueError(f"{name}: has strides of another number of dimensions")
    strides = tuple(c_strides) if byte_strides is None else element_strides(byte_strides, dtype.itemsize)
    return FlatArray(name, dtype, size, shape, strides, int(address))
