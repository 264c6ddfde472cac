"""Arrays in CUDA memory, of whichever library: where they are, which stream they are used on, new ones beside them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from jointspar.errors import JointSparError

Array = Any  # torch.Tensor, cupy.ndarray, or anything with DLPack or __cuda_array_interface__

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_STREAM = 1  # cudaStreamLegacy; 2 is cudaStreamPerThread


class Place(NamedTuple):
    """A CUDA device, and the library whose arrays and streams a call uses there ("torch" or "cupy")."""

    device: int
    library: str


def place_of(array: Array) -> Place | None:
    """Where an array in CUDA memory is; None for everything else (the operations' own checks tell what it is)."""
    if isinstance(array, torch.Tensor):
        return Place(array.device.index, "torch") if array.device.type == "cuda" else None
    if isinstance(array, np.ndarray) or array is None:
        return None
    library = "cupy" if type(array).__module__.partition(".")[0] == "cupy" else "torch"
    if hasattr(array, "__dlpack_device__"):
        kind, index = array.__dlpack_device__()
        return Place(int(index), library) if int(kind) in _DLPACK_CUDA else None
    # This interface does not say which device: the current one, as CUDA itself assumes.
    return Place(torch.cuda.current_device(), library) if hasattr(array, "__cuda_array_interface__") else None


def named_stream(array: Array) -> int | None:
    """The cudaStream_t that an array names in `__cuda_array_interface__`: its library writes it there."""
    if isinstance(array, torch.Tensor):
        return None
    # 1 and 2 are CUDA's own names of the legacy and of the per-thread default stream.
    return getattr(array, "__cuda_array_interface__", {}).get("stream") or None


def stream_of(place: Place, array: Array) -> int:
    """The cudaStream_t on which an operation on `array` belongs: its library's current stream on that device."""
    if place.library == "cupy":
        cupy = importlib.import_module("cupy")
        with cupy.cuda.Device(place.device):  # each device has a current stream of its own
            return int(cupy.cuda.get_current_stream().ptr)
    return int(named_stream(array) or torch.cuda.current_stream(place.device).cuda_stream)


class OrderedWithTorch:
    """Functions that launch on a stream which is not torch's current one, in order with the work on that one.

    So torch may own what they read and write: copies made for a call, and results.
    """

    def __init__(self, functions: Any, device: int, stream: int) -> None:
        self._functions = functions
        self._device = device
        self._stream = _torch_stream(device, stream)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._functions, name)

        def launch(*arguments: Any, **settings: Any) -> Any:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            result = function(*arguments, **settings)
            current.wait_stream(self._stream)
            return result

        return launch


def _torch_stream(device: int, stream: int) -> torch.cuda.Stream:
    """A stream by its handle; torch takes any but that of the legacy default stream."""
    is_legacy = stream == _LEGACY_STREAM
    return torch.cuda.default_stream(device) if is_legacy else torch.cuda.ExternalStream(stream, device=device)


def to_host(place: Place, array: Array) -> np.ndarray:
    """A copy of an array on the host, after the work that its library or `torch` put on its stream."""
    if place.library == "cupy":
        cupy = importlib.import_module("cupy")
        with cupy.cuda.Device(place.device):
            return np.asarray(array.get())
    stream = named_stream(array)
    if stream is not None:
        torch.cuda.current_stream(place.device).wait_stream(_torch_stream(place.device, stream))
    return torch.as_tensor(array, device="cpu").detach().numpy()


def empty(place: Place, size: int, dtype: str) -> Array:
    """An uninitialised 1-D array of the place's library."""
    if place.library == "cupy":
        cupy = importlib.import_module("cupy")
        with cupy.cuda.Device(place.device):
            return cupy.empty(size, dtype=dtype)
    return torch.empty(size, dtype=getattr(torch, dtype), device=f"cuda:{place.device}")


def to_device(place: Place, values: np.ndarray) -> Array:
    """A copy of a host vector; waits for the copy, and so for the work before it on the stream."""
    copy = empty(place, values.size, values.dtype.name)
    if place.library == "cupy":
        copy.set(values)
    else:
        copy.copy_(torch.from_numpy(values))
    return copy


def refuse_capture(device: torch.device) -> None:
    """Raises JointSparError while a CUDA graph is captured: the host decides in each step what the device is to do."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise JointSparError(
            "a step cannot be captured in a CUDA graph: replays would repeat one draw of layers, with its scales and "
            "rates; the operations of jointspar.ops can"
        )


class Reading:
    """A small vector on its way to the host.

    From device memory it is copied into pinned memory, in order with the work on the current stream, and nothing waits
    before `wait` is called.

    Args:
        values: 1-D torch tensor on any device, or NumPy array.
        then: what to make of it on the host.
    """

    def __init__(
        self, values: torch.Tensor | np.ndarray, then: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self._then = then
        self._result: np.ndarray | None = None
        self._event: torch.cuda.Event | None = None
        if isinstance(values, torch.Tensor) and values.device.type == "cuda":
            self._values: Any = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values

    def wait(self) -> np.ndarray:
        """The vector on the host."""
        if self._result is None:
            if self._event is not None and not self._event.query():
                self._event.synchronize()
            host = np.asarray(self._values)
            self._result = host if self._then is None else self._then(host)
        return self._result
