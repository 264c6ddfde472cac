"""As much of CuPy as jointspar.backends.cupy_* uses, on host memory and without a GPU.

Work on a stream waits until somebody synchronizes, as on a busy device, so that whatever is used again or overwritten
too early shows. A launch is noted and run on the host (kernels_on_host); NVRTC is a stand-in whose machine code is the
name of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from jointspar import backends
from kernels_on_host import KernelsOnHost

STREAM = 7  # the current one's handle


class Launch(NamedTuple):
    expression: str
    num_blocks: int
    num_threads: int
    arguments: tuple[np.generic, ...]
    stream: int


class ndarray:  # noqa: N801 (CuPy's name)
    """A torch tensor on the CPU that says it is on CUDA device 0."""

    def __init__(self, tensor: torch.Tensor, device: int = 0) -> None:
        self.tensor = tensor
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = SimpleNamespace(name=name, itemsize=tensor.element_size())
        self.shape, self.ndim, self.size = tuple(tensor.shape), tensor.ndim, tensor.numel()
        self.strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
        self.data = SimpleNamespace(ptr=tensor.data_ptr())
        self.device = SimpleNamespace(id=device)

    def __len__(self) -> int:
        return len(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id


ndarray.__module__ = "cupy"


class Event:
    def __init__(self, cupy: FakeCupy, disable_timing: bool) -> None:
        assert disable_timing
        self._cupy, self._stream, self.done = cupy, 0, True

    def record(self, stream: Any) -> None:
        self.done, self._stream = False, stream.ptr
        self._cupy.put(stream.ptr, self._finish)

    def synchronize(self) -> None:
        self._cupy.num_waits += 1
        while not self.done:
            self._cupy.pending[self._stream].popleft()()

    def _finish(self) -> None:
        self.done = True


class Memory(bytearray):
    """Filled with what no zero or pointer is."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(b"\xa5" * (num_bytes + 512))
        self.num_bytes = num_bytes
        self._view = np.frombuffer(self, np.uint8)
        self.ptr = -(-self._view.ctypes.data // 512) * 512


class FakeCupy(ModuleType):
    """Stands in for the module `cupy`, of a major version: streams of others are made otherwise since 14."""

    def __init__(self, kernels: KernelsOnHost | None, num_multiprocessors: int = 1, version: int = 14) -> None:
        super().__init__("cupy")
        self.kernels = kernels
        self.launches: list[Launch] = []
        self.pending: dict[int, deque[Callable[[], None]]] = {}
        self.num_copies = self.num_waits = self.num_allocations = self.num_compiled = 0
        self.capturing = False
        self._allocated: list[Any] = []  # a pool in stream order: what the stream still uses stays valid
        self._current: list[tuple[int, Any]] = []
        self.ndarray = ndarray
        self.version = version
        runtime = {"memcpyAsync": self._memcpy_async, "memsetAsync": self._memset_async, "memcpyHostToDevice": 1}
        self.cuda = SimpleNamespace(
            Device=lambda device: _Device(device, num_multiprocessors),
            ExternalStream=self._external_stream,
            Stream=SimpleNamespace(**({"from_external": self._from_external} if version >= 14 else {})),
            Event=lambda disable_timing: Event(self, disable_timing),
            alloc=self._alloc,
            alloc_pinned_memory=self._alloc_pinned,
            get_current_stream=lambda: SimpleNamespace(ptr=STREAM),
            runtime=SimpleNamespace(**runtime),
            nvrtc=_NvrtcByName(self),
            function=SimpleNamespace(Module=lambda: _Module(self)),
        )

    def array(self, values: Any, dtype: str = "float32") -> ndarray:
        return ndarray(torch.as_tensor(np.asarray(values, dtype=np.float64)).to(getattr(torch, dtype)))

    def empty(self, size: int, dtype: str) -> ndarray:
        self._allocated.append(ndarray(torch.full((size,), 1, dtype=getattr(torch, dtype))))
        return self._allocated[-1]

    def from_dlpack(self, array: Any) -> ndarray:
        return array.__dlpack__()

    def _external_stream(self, ptr: int, device: int) -> _Stream:
        if self.version >= 14:
            warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
        return _Stream(self, ptr, device)

    def _from_external(self, stream: Any) -> _Stream:
        protocol, ptr = stream.__cuda_stream__()
        assert protocol == 0
        return _Stream(self, ptr, -1)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        self.pending.setdefault(stream, deque()).append(work)

    def bytes_allocated_from(self, address: int) -> int:
        """Up to the end of the block of device memory that the address is in."""
        blocks = [block for block in self._allocated if isinstance(block, Memory)]
        ends = [block.ptr + block.num_bytes for block in blocks if block.ptr <= address < block.ptr + block.num_bytes]
        return max(end - int(address) for end in ends)

    def synchronize(self) -> None:
        for work in self.pending.values():
            while work:
                work.popleft()()

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)
        if self.kernels is not None:
            arguments = (launch.expression, launch.num_blocks, launch.num_threads, launch.arguments)
            self.put(launch.stream, lambda: self.kernels.run(*arguments))

    def _alloc(self, num_bytes: int) -> Memory:
        assert self._current, "memory of no stream"
        self.num_allocations += 1
        self._allocated.append(Memory(num_bytes))
        return self._allocated[-1]

    def _alloc_pinned(self, num_bytes: int) -> Any:
        self.num_allocations += 1
        memory = np.full(num_bytes, 0xA5, np.uint8)
        return _Pinned(memory)

    def _memcpy_async(self, to: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        assert kind == 1
        self.num_copies += 1
        self.put(stream, lambda: bytes_at(to, num_bytes).__setitem__(slice(None), bytes_at(source, num_bytes)))

    def _memset_async(self, to: int, value: int, num_bytes: int, stream: int) -> None:
        self.put(stream, lambda: bytes_at(to, num_bytes).fill(value))


def bytes_at(address: int, num_bytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), np.uint8)


class _Pinned(np.ndarray):
    def __new__(cls, memory: np.ndarray) -> _Pinned:
        return memory.view(cls)

    @property
    def ptr(self) -> int:
        return self.ctypes.data


class _Device:
    def __init__(self, device: int, num_multiprocessors: int) -> None:
        self.id, self.compute_capability = device, "90"
        self.attributes = {"MultiProcessorCount": num_multiprocessors}

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Stream:
    def __init__(self, cupy: FakeCupy, ptr: int, device: int) -> None:
        self._cupy, self.ptr, self._device = cupy, ptr, device

    def __enter__(self) -> _Stream:
        self._cupy._current.append((self._device, self.ptr))
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy._current.pop()

    def is_capturing(self) -> bool:
        return self._cupy.capturing


class NVRTCError(RuntimeError):
    pass


class _NvrtcByName:
    """Machine code that is its own name."""

    NVRTCError = NVRTCError

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self._programs: list[list[str]] = []

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 13, 0

    def createProgram(self, source: str, name: str, headers: Any, include_names: Any) -> int:  # noqa: N802
        assert not headers and not include_names
        self._programs.append([])
        return len(self._programs) - 1

    def addNameExpression(self, program: int, expression: str) -> None:  # noqa: N802
        self._programs[program].append(expression)

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:  # noqa: N802
        self._cupy.num_compiled += 1

    def getProgramLog(self, program: int) -> str:  # noqa: N802
        return ""

    def getLoweredName(self, program: int, expression: str) -> str:  # noqa: N802
        assert expression in self._programs[program]
        return expression

    def getCUBIN(self, program: int) -> bytes:  # noqa: N802
        return b"\x7fELF\n" + self._programs[program][0].encode()

    def destroyProgram(self, program: int) -> None:  # noqa: N802
        self._programs[program] = []


class _Module:
    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def load(self, code: bytes) -> None:
        self._name = code.removeprefix(b"\x7fELF\n").decode()

    def get_function(self, name: str) -> Callable[..., None]:
        assert name == self._name

        def function(grid: tuple[int], block: tuple[int], arguments: tuple[np.generic, ...], *, stream: Any) -> None:
            assert all(isinstance(argument, np.generic) for argument in arguments)
            self._cupy.launch(Launch(name, grid[0], block[0], arguments, stream.ptr))

        return function


@contextlib.contextmanager
def installed(cupy: FakeCupy) -> Iterator[None]:
    """`import cupy` finds this one; the modules that use it are loaded anew, and forgotten afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("jointspar.backends.cupy_")]:
            del sys.modules[name]
            backends.__dict__.pop(name.rpartition(".")[2], None)
        backends._loaded.pop("jointspar.backends.cupy_jit", None)

    before = sys.modules.get("cupy")
    forget()
    sys.modules["cupy"] = cupy
    try:
        yield
    finally:
        forget()
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before


@contextlib.contextmanager
def serving(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """`installed`, forced by the environment, with a cache of its own."""
    monkeypatch.setenv("JOINTSPAR_BACKEND", "cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(cache))
    with installed(cupy):
        yield


def memory(address: int, dtype: Any, count: int) -> np.ndarray:
    """`count` elements at an address."""
    return bytes_at(int(address), np.dtype(dtype).itemsize * count).view(dtype)
