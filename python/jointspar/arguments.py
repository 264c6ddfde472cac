"""Normalises the scalar and per-tensor arguments of the operations; every error names the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch

from jointspar.device_arrays import Place, empty, place_of, to_device, to_host

Function = TypeVar("Function", bound=Callable[..., Any])
FLOAT_NAMES = ("float32", "float64", "bfloat16", "float16")


def on_plain_tensors(function: Function) -> Function:
    """Call it without torch's function modes and subclasses: these take microseconds for each attribute of a tensor.

    So does `torch.set_default_device`, which is such a mode.
    """

    @wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments, **settings)

    return cast(Function, call)


def sequence(name: str, value: Any) -> list[Any]:
    """A list of arrays; a single array or a string is refused."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of arrays, got {type(value).__name__}")
    return list(value)


def vector(name: str, value: Any, length: int | None = None) -> np.ndarray:
    """float64 [length] on the host, from a torch tensor, NumPy array or sequence of numbers."""
    array = _host_array(name, value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    return _one_dimension(name, array, np.float64, length)


def flags(name: str, value: Any, length: int | None) -> np.ndarray:
    """bool [length]."""
    array = _host_array(name, value)
    if array.dtype != np.bool_ and array.size:
        raise TypeError(f"{name}: expected bool, got {array.dtype}")
    return _one_dimension(name, array, np.bool_, length)


def flag(name: str, value: Any) -> bool:
    """A truth value; numbers and strings are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of these names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return str(value)


def check_kind(name: str, value: object, expected: str, is_right: bool) -> None:
    """Raises TypeError, naming the argument, where it is not what was expected."""
    if not is_right:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def per_tensor(name: str, value: Any, length: int, low: float = 0.0) -> np.ndarray:
    """float64 [length] from one number or one a tensor; finite and at least `low`."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            one = float(value)
        except OverflowError:
            raise ValueError(f"{name}: too large for a float") from None
        fits, array = math.isfinite(one) and one >= low, np.full(length, one)
    else:
        is_one = isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0
        array = np.full(length, vector(name, value.reshape(1))[0]) if is_one else vector(name, value, length)
        fits = np.isfinite(array).all() and not (array < low).any()
    if not fits:
        raise ValueError(f"{name}: must be finite" + (f" and at least {low}" if np.isfinite(low) else ""))
    return array


def number(name: str, value: Any) -> float:
    """One number, finite and at least 0."""
    if type(value) is float and 0.0 <= value < math.inf:  # nearly always
        return value
    return float(per_tensor(name, value, 1)[0])


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high]."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got a bool")
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}") from None
    if not low <= whole <= high:
        raise ValueError(f"{name}: {whole} is outside [{low}, {high}]")
    return whole


def whole_layout(layout: Any, length: int | None) -> np.ndarray:
    """int64 [length] element counts, each at least 0."""
    array = _host_array("layout", layout)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"layout: expected whole numbers, got {array.dtype}")
    sizes = _one_dimension("layout", array, np.int64, length)
    if (sizes < 0).any() or float(sizes.sum(dtype=np.float64)) >= 2.0**62:
        raise ValueError("layout: sizes are at least 0 and their sum below 2**62")
    return sizes


def check_range(name: str, values: np.ndarray, low: float, high: float) -> None:
    """Every value finite and in [low, high]."""
    if values.size == 0:
        return
    smallest, largest = np.minimum.reduce(values), np.maximum.reduce(values)  # NaN where any value is
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"{name}: holds a NaN or infinity")
    if smallest < low or largest > high:
        raise ValueError(f"{name}: values must be in [{low:g}, {high:g}]")


def sizes_of(name: str, arrays: Sequence[Any]) -> np.ndarray:
    """int64 [num_tensors] element counts of arrays."""
    counts = [element_count(f"{name}[{index}]", array) for index, array in enumerate(arrays)]
    return np.array(counts, dtype=np.int64)


def element_count(name: str, array: Any) -> int:
    if isinstance(array, torch.Tensor):
        return array.numel()
    if isinstance(array, np.ndarray):
        return array.size
    if place_of(array) is not None:
        return math.prod(array.shape)
    hint = " (None needs layout=)" if array is None else ""
    raise TypeError(f"{name}: expected a torch tensor, NumPy or CUDA array, got {type(array).__name__}{hint}")


def dtype_name(name: str, dtype: Any) -> str:
    """The name of a torch, NumPy or named float dtype of the wire."""
    text = (
        dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else ""
    )
    if not text:
        try:
            text = np.dtype(dtype).name
        except TypeError:
            raise TypeError(f"{name}: {dtype!r} is not a dtype") from None
    if text not in FLOAT_NAMES:
        raise ValueError(f"{name}: {text} is not one of {', '.join(FLOAT_NAMES)}")
    return text


def new_packed(grads: Sequence[Any], size: int, wire_dtype: Any) -> Any:
    """An uninitialised 1-D buffer in the array library of `grads`."""
    arrays = [grad for grad in grads if grad is not None]
    sizes_of("grads", arrays)  # refuses what is no array
    if wire_dtype is None:
        wide = any(str(array.dtype).endswith("float64") for array in arrays)
        wire = "float64" if wide else "float32"
    else:
        wire = dtype_name("wire_dtype", wire_dtype)
    place = place_of(arrays[0]) if arrays else None
    if place is not None:
        if place.library == "cupy" and wire == "bfloat16":
            raise TypeError("wire_dtype: CuPy has no bfloat16; pass torch tensors")
        return empty(place, size, wire)
    if arrays and isinstance(arrays[0], np.ndarray):
        if wire == "bfloat16":
            raise TypeError("wire_dtype: NumPy has no bfloat16; pass torch tensors")
        return np.empty(size, dtype=wire)
    return torch.empty(size, dtype=getattr(torch, wire), device="cpu")


def check_packed_kind(name: str, packed: Any, wire_dtype: Any) -> None:
    """A 1-D array, of the wire dtype where one is asked for."""
    if not isinstance(packed, (torch.Tensor, np.ndarray)) and place_of(packed) is None:
        raise TypeError(f"{name}: expected a 1-D array, got {type(packed).__name__}")
    num_dims = packed.ndim if hasattr(packed, "ndim") else len(packed.shape)  # a nested tensor has no plain shape
    if num_dims != 1:
        raise ValueError(f"{name}: expected one dimension, got {num_dims}")
    if wire_dtype is not None and str(packed.dtype).removeprefix("torch.") != dtype_name("wire_dtype", wire_dtype):
        raise ValueError(f"{name}: its dtype {packed.dtype} is not wire_dtype")


def like(array: Any, values: Any) -> Any:
    """Host `values` in the array library of `array`; device arrays are of it already."""
    return torch.from_numpy(values) if isinstance(array, torch.Tensor) and isinstance(values, np.ndarray) else values


def device_vector(name: str, value: Any, place: Place) -> Any:
    """A device array as it is (the kernels' own checks follow), or a host vector copied to the device."""
    return value if place_of(value) is not None else to_device(place, vector(name, value))


def device_flags(name: str, value: Any, place: Place) -> Any:
    """As `device_vector`, of bool."""
    return value if place_of(value) is not None else to_device(place, flags(name, value, None))


def device_scalar(name: str, value: Any, place: Place) -> Any:
    """float64 [1] in device memory of its own, from a number or a device array of one element."""
    if place_of(value) is None:
        return to_device(place, per_tensor(name, value, 1))
    if math.prod(value.shape) != 1:
        raise ValueError(f"{name}: expected one number, got an array of shape {tuple(value.shape)}")
    scalar = empty(place, 1, "float64")
    scalar[...] = value.reshape(1)
    return scalar


def copy_to(name: str, out: Any, values: Any) -> Any:
    """Write `values` into the caller's array of the same shape and dtype."""
    if not isinstance(values, np.ndarray):
        return _copy_on_device(name, out, values)
    target = _host_target(name, out)
    if not isinstance(target, np.ndarray) or target.dtype != values.dtype or target.shape != values.shape:
        raise TypeError(f"{name}: expected a writable {values.dtype} array of shape {values.shape}")
    if not target.flags.writeable:
        raise ValueError(f"{name}: is read-only")
    if any(stride == 0 and extent > 1 for stride, extent in zip(target.strides, target.shape, strict=True)):
        raise ValueError(f"{name}: is expanded, its elements share memory")
    target[...] = values
    increment_versions([out])
    return out


def _host_target(name: str, out: Any) -> Any:
    """A tensor's memory as an array; everything else as it is."""
    if not isinstance(out, torch.Tensor) or out.device.type != "cpu":
        return out
    try:
        return out.detach().numpy()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TypeError(f"{name}: cannot be written as an array of numbers ({reason})") from None


def _copy_on_device(name: str, out: Any, values: Any) -> Any:
    if place_of(out) != place_of(values) or out.dtype != values.dtype or tuple(out.shape) != tuple(values.shape):
        raise TypeError(f"{name}: expected a {values.dtype} array of shape {tuple(values.shape)} on the same device")
    target = out.detach() if isinstance(out, torch.Tensor) else out  # of a parameter autograd lets only this be written
    target[...] = values
    return out


def increment_versions(arrays: Iterable[Any]) -> None:
    """Tell autograd that tensors were written, as an in-place torch operation would."""
    written = list(arrays)
    try:
        torch.autograd.graph.increment_version(written)
    except (RuntimeError, TypeError):  # other arrays, and inference tensors, count none; to ask first takes longer
        tensors = [array for array in written if isinstance(array, torch.Tensor) and not array.is_inference()]
        torch.autograd.graph.increment_version(tensors)


def _host_array(name: str, value: Any) -> np.ndarray:
    if value is None or isinstance(value, (str, bytes, dict, set)):
        raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__}")
    try:
        if (place := place_of(value)) is not None:
            return to_host(place, value)
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu").numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError) as error:
        raise TypeError(f"{name}: cannot be read as an array of numbers ({error})") from None


def _one_dimension(name: str, array: np.ndarray, dtype: type[np.generic], length: int | None) -> np.ndarray:
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got {array.ndim}")
    if length is not None and array.size != length:
        raise ValueError(f"{name}: {array.size} values for {length}")
    return np.ascontiguousarray(array, dtype=dtype)
