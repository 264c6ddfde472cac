"""What the streaming kernels read: one record per slice, and the numbers of their chunks.

As cuda/chunk_table.h, of which this is the other form; the records are those of the headers in csrc, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from jointspar.backends.flat_arrays import FlatArray

CHUNK_SIZE = 4096  # kDeviceChunkSize of common/device_chunks.h
MAX_BLOCKS = 2**31 - 1  # of a grid's first dimension
POINTER, INT64, INT32, FLOAT64 = "u8", "i8", "i4", "f8"

UPDATE_TENSOR = np.dtype([
    ("param", POINTER), ("momentum_buffer", POINTER), ("grad", POINTER), ("size", INT64), ("param_dtype", INT32),
    ("grad_dtype", INT32), ("lr", FLOAT64), ("momentum", FLOAT64), ("weight_decay", FLOAT64),
])  # fmt: skip
PACK_RECORD = np.dtype([
    ("source", POINTER), ("offset", INT64), ("size", INT64), ("index", INT64), ("scale", FLOAT64),
])  # fmt: skip
UNPACK_RECORD = np.dtype([("target", POINTER), ("offset", INT64), ("size", INT64)])
NORM_RECORD = np.dtype([
    ("source", POINTER), ("size", INT64), ("index", INT64), ("source_dtype", INT32), ("unused", INT32),
])  # fmt: skip
LARS_RECORD = np.dtype([
    ("update", UPDATE_TENSOR), ("index", INT64), ("trust_coefficient", FLOAT64), ("eps", FLOAT64), ("adapt", INT64),
])  # fmt: skip
SGD_RECORD = np.dtype([("update", UPDATE_TENSOR), ("index", INT64)])
LARS_RATE = np.dtype([("local_rate", FLOAT64), ("param_norm", FLOAT64)])
SKIP_STATE = np.dtype([(name, "u4") for name in ("num_finished", "num_nonfinite", "is_skipped", "unused")])

# DType of jointspar/types.h, and the type in C++ that it stands for.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CPP_TYPES = ("float", "double", "jointspar::BFloat16", "jointspar::Float16")


class Grid(NamedTuple):
    num_blocks: int
    chunks_per_block: int


class SliceGroup(NamedTuple):
    """Slices [begin, end) of a table, all of the same two dtypes."""

    left: str  # in C++
    right: str
    begin: int
    end: int


class ChunkTable:
    """The records of a call, those of equal dtypes next to each other so that one launch serves them.

    Args:
        records: [num_slices], structured, in the order of the call.
        sizes: elements of each slice.
        left, right: dtype of each slice's two arrays. None where an array is missing: such a slice joins those of the
            first dtype there is, so that it costs no launch of its own.
    """

    def __init__(
        self,
        records: np.ndarray,
        sizes: Sequence[int],
        left: Sequence[torch.dtype | None],
        right: Sequence[torch.dtype | None],
    ) -> None:
        left_codes, right_codes = _codes(left), _codes(right)
        order = np.lexsort((right_codes, left_codes))  # stable
        self.records = records[order]
        num_chunks = [num_chunks_of(sizes[k]) for k in order.tolist()]
        self.first_chunk = np.concatenate([[0], np.cumsum(num_chunks, dtype=np.int64)]).astype(np.int64)
        keys = np.stack([left_codes, right_codes])[:, order]
        begins = [0, *(np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1).tolist()]
        self.groups = [
            SliceGroup(CPP_TYPES[keys[0, begin]], CPP_TYPES[keys[1, begin]], begin, end)
            for begin, end in zip(begins, [*begins[1:], len(records)], strict=True)
        ]

    @property
    def num_slices(self) -> int:
        return len(self.records)

    @property
    def num_chunks(self) -> int:
        return int(self.first_chunk[-1])

    def all(self) -> SliceGroup:
        """For kernels that take any dtype."""
        return SliceGroup("", "", 0, self.num_slices)

    def grid(self, group: SliceGroup, max_blocks: int = MAX_BLOCKS) -> Grid:
        return grid_of(int(self.first_chunk[group.end] - self.first_chunk[group.begin]), max_blocks)

    def content(self) -> bytes:
        """[records][first_chunk]."""
        return self.records.tobytes() + self.first_chunk.tobytes()

    def arguments(self, address: int, group: SliceGroup, grid: Grid) -> tuple[Any, ...]:
        """The first four arguments of a kernel over slices; `content` is at `address`."""
        records = address + group.begin * self.records.itemsize
        first_chunk = address + self.records.nbytes + group.begin * self.first_chunk.itemsize
        count = group.end - group.begin
        return np.uint64(records), np.uint64(first_chunk), np.int64(count), np.int64(grid.chunks_per_block)


Pair = tuple[FlatArray, FlatArray]
Tensor = tuple[FlatArray, FlatArray, FlatArray | None]  # parameter, momentum, gradient


def pack_table(pairs: Sequence[tuple[FlatArray | None, FlatArray]], scales: np.ndarray) -> ChunkTable:
    """pairs: gradient or None, its slice of the packed buffer."""
    records = np.zeros(len(pairs), PACK_RECORD)
    sizes = [part.size for _, part in pairs]
    offsets = np.cumsum(sizes) - sizes
    for k, (source, part) in enumerate(pairs):
        records[k] = (_address(source), offsets[k], part.size, k, scales[k])
    return ChunkTable(records, sizes, [_dtype(source) for source, _ in pairs], [part.dtype for _, part in pairs])


def unpack_table(pairs: Sequence[Pair]) -> ChunkTable:
    """pairs: target, its slice of the packed buffer."""
    records = np.zeros(len(pairs), UNPACK_RECORD)
    sizes = [part.size for _, part in pairs]
    records["target"] = [_address(target) for target, _ in pairs]
    records["offset"], records["size"] = np.cumsum(sizes) - sizes, sizes
    return ChunkTable(records, sizes, [part.dtype for _, part in pairs], [target.dtype for target, _ in pairs])


def norm_table(arrays: Sequence[FlatArray]) -> ChunkTable:
    records = np.zeros(len(arrays), NORM_RECORD)
    for k, array in enumerate(arrays):
        records[k] = (_address(array), array.size, k, DTYPE_CODES[array.dtype], 0)
    dtypes = [array.dtype for array in arrays]
    return ChunkTable(records, [array.size for array in arrays], dtypes, [None] * len(arrays))


def sgd_table(tensors: Sequence[Tensor], hyper: np.ndarray) -> ChunkTable:
    """hyper [num_tensors, 3]: lr, momentum, weight_decay."""
    return _update_table(np.zeros(len(tensors), SGD_RECORD), tensors, hyper)


def lars_table(tensors: Sequence[Tensor], hyper: np.ndarray, adapt: np.ndarray) -> ChunkTable:
    """hyper [num_tensors, 5]: lr, momentum, weight_decay, trust_coefficient, eps."""
    records = np.zeros(len(tensors), LARS_RECORD)
    records["trust_coefficient"], records["eps"], records["adapt"] = hyper[:, 3], hyper[:, 4], adapt
    return _update_table(records, tensors, hyper)


def _update_table(records: np.ndarray, tensors: Sequence[Tensor], hyper: np.ndarray) -> ChunkTable:
    """With the fields that all updates have."""
    records["index"] = np.arange(len(tensors))
    for k, (param, momentum, grad) in enumerate(tensors):
        addresses = (_address(param), _address(momentum), _address(grad))
        dtypes = (DTYPE_CODES[param.dtype], 0 if grad is None else DTYPE_CODES[grad.dtype])
        records["update"][k] = (*addresses, param.size, *dtypes, *hyper[k, :3])
    params, grads = [param for param, _, _ in tensors], [grad for _, _, grad in tensors]
    sizes = [param.size for param in params]
    return ChunkTable(records, sizes, [param.dtype for param in params], [_dtype(grad) for grad in grads])


def grid_of(num_chunks: int, max_blocks: int = MAX_BLOCKS) -> Grid:
    """One block a chunk, or more chunks a block where that would be too many."""
    chunks_per_block = -(-num_chunks // max_blocks)
    return Grid(-(-num_chunks // chunks_per_block), chunks_per_block)


def num_chunks_of(size: int) -> int:
    """Every slice owns a chunk, an empty one too: some block has to write its norms."""
    return max(1, -(-size // CHUNK_SIZE))


def _codes(dtypes: Sequence[torch.dtype | None]) -> np.ndarray:
    first = next((dtype for dtype in dtypes if dtype is not None), torch.float32)
    return np.array([DTYPE_CODES[first if dtype is None else dtype] for dtype in dtypes], dtype=np.int64)


def _address(array: FlatArray | None) -> int:
    """0 where there are no elements: kernels take it for zeros."""
    return 0 if array is None or array.size == 0 else array.address


def _dtype(array: FlatArray | None) -> torch.dtype | None:
    return None if array is None or array.size == 0 else array.dtype
