"""Device memory that a call needs besides its arguments: the uploaded table of slices, sums of chunks, counters.

Kept per device and stream, and only grows, as in cuda/workspace.h: in the steady state a call neither allocates nor
waits. What is outgrown goes back to CuPy's memory pool, which gives it out again only on the same stream, behind the
kernels that use it now.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from jointspar.backends.cupy_kernels import Queue
from jointspar.backends.cupy_tables import SKIP_STATE

_MAX_SLOTS = 64
_SMALLEST_CAPACITY = 16384


class Workspace(NamedTuple):
    """Addresses in device memory."""

    table: int
    skip: int  # SkipState, zero counts
    num_finished: int  # uint32 [num_slices], zeros
    doubles: int  # float64 [num_doubles], anything


@contextlib.contextmanager
def workspace(queue: Queue, table: bytes, num_slices: int = 0, num_doubles: int = 0) -> Iterator[Workspace]:
    """Upload the table and hold the stream's workspace until the last launch: those of other threads wait."""
    memory = _memory_of(queue)
    with memory.lock:
        yield memory.prepare(queue.stream, table, num_slices, num_doubles)


class DeviceMemory:
    """Grows by at least half; allocated for the current stream."""

    def __init__(self) -> None:
        self._memory: Any = None
        self.capacity = 0

    @property
    def address(self) -> int:
        return 0 if self._memory is None else int(self._memory.ptr)

    def reserve(self, num_bytes: int) -> bool:
        """True when the memory is new: its content is undefined."""
        if num_bytes <= self.capacity:
            return False
        capacity = max(num_bytes, self.capacity + self.capacity // 2, _SMALLEST_CAPACITY)
        self._memory = cupy.cuda.alloc(capacity)
        self.capacity = capacity
        return True


class PinnedSlot:
    def __init__(self) -> None:
        self.copied = cupy.cuda.Event(disable_timing=True)
        self._memory: Any = None
        self._capacity = 0

    def fill(self, content: bytes) -> int:
        """The address of the content in pinned memory."""
        if len(content) > self._capacity:
            capacity = max(_SMALLEST_CAPACITY, len(content) + len(content) // 2)
            self._memory = cupy.cuda.alloc_pinned_memory(capacity)
            self._capacity = capacity
        np.frombuffer(self._memory, np.uint8, len(content))[:] = np.frombuffer(content, np.uint8)
        return int(self._memory.ptr)


class PinnedRing:
    """Copies to the device that do not wait: the bytes go into a pinned buffer first, which the copy reads later.

    For one stream, whose copies finish in order. A buffer whose copy is still waiting is not touched: the ring grows
    instead, and when it has grown enough, the call waits for the oldest copy.
    """

    def __init__(self) -> None:
        self._slots: list[PinnedSlot] = []
        self._next = 0  # the slot used longest ago

    def copy(self, to: int, content: bytes, stream: Any) -> None:
        slot = self._free_slot()
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(to, slot.fill(content), len(content), runtime.memcpyHostToDevice, stream.ptr)
        slot.copied.record(stream)

    def _free_slot(self) -> PinnedSlot:
        is_ready = bool(self._slots) and self._slots[self._next].copied.done
        if not is_ready and len(self._slots) < _MAX_SLOTS:
            self._slots.insert(self._next, PinnedSlot())
        elif not is_ready:
            self._slots[self._next].copied.synchronize()
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot


class StreamMemory:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._ring = PinnedRing()
        self._table = DeviceMemory()
        self._counters = DeviceMemory()
        self._doubles = DeviceMemory()

    def prepare(self, stream: Any, table: bytes, num_slices: int, num_doubles: int) -> Workspace:
        if self._counters.reserve(SKIP_STATE.itemsize + 4 * num_slices):
            try:
                cupy.cuda.runtime.memsetAsync(self._counters.address, 0, self._counters.capacity, stream.ptr)
            except BaseException:
                self._counters = DeviceMemory()  # the next call begins anew
                raise
        self._doubles.reserve(8 * num_doubles)
        self._table.reserve(len(table))
        self._ring.copy(self._table.address, table, stream)
        counters = self._counters.address
        return Workspace(self._table.address, counters, counters + SKIP_STATE.itemsize, self._doubles.address)


_PER_THREAD_STREAM = 2  # cudaStreamPerThread: the same handle is another stream in each thread

_memories: dict[tuple[int, int, int], StreamMemory] = {}
_memories_lock = threading.Lock()


def _memory_of(queue: Queue) -> StreamMemory:
    """By the stream's handle, as CuPy's own memory pool tells streams apart."""
    handle = queue.stream.ptr
    thread = threading.get_ident() if handle == _PER_THREAD_STREAM else 0
    with _memories_lock:
        return _memories.setdefault((queue.device, handle, thread), StreamMemory())
