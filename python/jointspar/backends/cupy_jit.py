"""The functions of jointspar_ext._cuda, from the same CUDA sources, for where the extension was built without nvcc.

The kernels are compiled at their first use (NVRTC, a second each) and kept on disk; see cupy_kernels. Everything runs
on the given stream, results are written into arrays of the caller, and nothing waits for the device. The launchers of
csrc/cuda are the other form of what is here; the contracts are in csrc/include/jointspar.

device: CUDA device number; stream: cudaStream_t as an integer. Raises JointSparError where a kernel cannot be compiled
or launched, or a stream is being captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import cupy  # noqa: F401
except ImportError as error:
    reason = str(error).strip().partition("\n")[0]
    raise ImportError(f"CuPy cannot be imported ({reason}): pip install 'jointspar[cuda]'") from error

from jointspar.backends.checked_calls import norm_slices, pack_slices, packed_pair, unpack_slices, update_tensors
from jointspar.backends.cupy_arrays import DeviceReader
from jointspar.backends.cupy_kernels import THREADS_PER_BLOCK, Kernel, Queue, launch, num_multiprocessors, queue_on
from jointspar.backends.cupy_memory import Workspace, workspace
from jointspar.backends.cupy_probabilities import project_probabilities, sample_layers, update_probabilities
from jointspar.backends.cupy_tables import (
    CPP_TYPES,
    DTYPE_CODES,
    LARS_RATE,
    MAX_BLOCKS,
    ChunkTable,
    grid_of,
    lars_table,
    norm_table,
    num_chunks_of,
    pack_table,
    sgd_table,
    unpack_table,
)

__all__ = [
    "add_packed",
    "lars_update",
    "pack_gradients",
    "project_probabilities",
    "sample_layers",
    "sgd_update",
    "squared_norms",
    "unpack_gradients",
    "update_probabilities",
]

Array = Any  # torch.Tensor, cupy.ndarray or another array in CUDA memory

_BLOCKS_PER_MULTIPROCESSOR = 16  # of a launch that steps over most slices at once, as in lars_update_cuda.cu
_NORMS = Kernel("squared_norms_kernel<jointspar::NormRecord>", ("squared_norms_kernel.cuh",))
_NORMS_OF_SGD = Kernel(
    "squared_norms_kernel<jointspar::SgdRecord>", ("squared_norms_kernel.cuh", "sgd_update_kernel.cuh")
)
_NULL = np.uint64(0)


def pack_gradients(
    grads: Sequence[Array | None],
    scales: np.ndarray,
    sizes: np.ndarray,
    packed: Array,
    squared_norms: Array,
    device: int,
    stream: int,
) -> None:
    """packed slice k = cast(grads[k] * scales[k]), zeros for None; float64 squared_norms [num_grads] is written."""
    read = DeviceReader(device, stream)
    pairs = pack_slices(read, grads, scales, sizes, packed)
    norms = read.vector("squared_norms", squared_norms, len(pairs), writable=True)
    read.check_disjoint()
    if not pairs:
        return
    table = pack_table(pairs, scales)
    buffer = pairs[0][1].address  # packed begins where its first slice does
    with queue_on(device, stream) as queue, workspace(queue, table.content(), len(pairs), table.num_chunks) as work:
        for group in table.groups:
            grid = table.grid(group)
            kernel = Kernel(f"pack_gradients_kernel<{group.left}, {group.right}>", ("pack_kernel.cuh",))
            launch(
                kernel, grid.num_blocks, THREADS_PER_BLOCK, queue, *table.arguments(work.table, group, grid),
                np.uint64(buffer), np.uint64(norms.address), *_sums(work),
            )  # fmt: skip


def unpack_gradients(packed: Array, outs: Sequence[Array], add: bool, device: int, stream: int) -> None:
    """outs[k] = packed slice k, or outs[k] += it; mutates `outs`."""
    read = DeviceReader(device, stream)
    pairs = unpack_slices(read, packed, outs)
    read.check_disjoint()
    if not pairs:
        return
    table = unpack_table(pairs)
    buffer = pairs[0][1].address
    with queue_on(device, stream) as queue, workspace(queue, table.content()) as work:
        for group in table.groups:
            grid = table.grid(group)
            types = f"{group.left}, {group.right}, {'true' if add else 'false'}"
            launch(
                Kernel(f"unpack_gradients_kernel<{types}>", ("unpack_kernel.cuh",)), grid.num_blocks, THREADS_PER_BLOCK,
                queue, *table.arguments(work.table, group, grid), np.uint64(buffer),
            )  # fmt: skip


def add_packed(out: Array, packed: Array, device: int, stream: int) -> None:
    """out += packed, of one dtype and size; mutates `out`."""
    total, source = packed_pair(DeviceReader(device, stream), out, packed)
    if total.size == 0:
        return
    grid = grid_of(num_chunks_of(total.size))
    kernel = Kernel(f"add_packed_kernel<{CPP_TYPES[DTYPE_CODES[total.dtype]]}>", ("unpack_kernel.cuh",))
    with queue_on(device, stream) as queue:
        launch(
            kernel, grid.num_blocks, THREADS_PER_BLOCK, queue, np.uint64(total.address), np.uint64(source.address),
            np.int64(total.size), np.int64(grid.chunks_per_block),
        )  # fmt: skip


def squared_norms(grads: Any, sizes: np.ndarray | None, squared_norms: Array, device: int, stream: int) -> None:
    """float64 squared_norms [num_grads] is written."""
    read = DeviceReader(device, stream)
    arrays = norm_slices(read, grads, sizes)
    norms = read.vector("squared_norms", squared_norms, len(arrays), writable=True)
    read.check_disjoint()
    if not arrays:
        return
    table = norm_table(arrays)
    with queue_on(device, stream) as queue, workspace(queue, table.content(), len(arrays), table.num_chunks) as work:
        _launch_norms(_NORMS, table, work, queue, norms.address, is_root=False, skip=_NULL)


def lars_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Any,
    *,
    hyper: np.ndarray,
    adapt: np.ndarray,
    nesterov: bool,
    skip_nonfinite: bool,
    param_norms: Array | None,
    grad_norms: Array | None,
    used_grad_norms: Array,
    param_norms_after: Array,
    device: int,
    stream: int,
) -> None:
    """LARS in place on `params` and `momenta`; the two last arrays, float64 [num_tensors], are written."""
    read = DeviceReader(device, stream)
    tensors = update_tensors(read, params, momenta, grads, hyper, 5, adapt=adapt)
    count = len(tensors)
    known_params = _known_norms(read, "param_norms", param_norms, count)
    known_grads = _known_norms(read, "grad_norms", grad_norms, count)
    used = read.vector("used_grad_norms", used_grad_norms, count, writable=True)
    after = read.vector("param_norms_after", param_norms_after, count, writable=True)
    read.check_disjoint()
    if not tensors:
        return
    table = lars_table(tensors, hyper, adapt)
    # [rates][chunk sums, two per chunk]
    num_rate_doubles = count * LARS_RATE.itemsize // 8
    with (
        queue_on(device, stream) as queue,
        workspace(queue, table.content(), count, num_rate_doubles + 2 * table.num_chunks) as work,
    ):
        skip = np.uint64(work.skip) if skip_nonfinite else _NULL
        sums = np.uint64(work.doubles + 8 * num_rate_doubles), np.uint64(work.num_finished)
        # Where both norms are passed, most are known: few blocks, which step over a known slice at once.
        may_be_known = param_norms is not None and grad_norms is not None
        grid = table.grid(
            table.all(), _BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors(device) if may_be_known else MAX_BLOCKS
        )
        launch(
            Kernel("lars_rates_kernel", ("lars_update_kernel.cuh",)), grid.num_blocks, THREADS_PER_BLOCK, queue,
            *table.arguments(work.table, table.all(), grid), known_params, known_grads, np.uint64(used.address),
            np.uint64(work.doubles), skip, *sums,
        )  # fmt: skip
        for group in table.groups:
            grid = table.grid(group)
            rates = np.uint64(work.doubles + group.begin * LARS_RATE.itemsize)
            launch(
                Kernel(f"lars_update_kernel<{group.left}, {group.right}>", ("lars_update_kernel.cuh",)),
                grid.num_blocks, THREADS_PER_BLOCK, queue, *table.arguments(work.table, group, grid),
                np.int32(nesterov), rates, skip, np.uint64(after.address), *sums,
            )  # fmt: skip


def sgd_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Any,
    *,
    hyper: np.ndarray,
    nesterov: bool,
    skip_nonfinite: bool,
    grad_norms: Array,
    device: int,
    stream: int,
) -> None:
    """SGD with momentum in place on `params` and `momenta`; float64 grad_norms [num_tensors] is written."""
    read = DeviceReader(device, stream)
    tensors = update_tensors(read, params, momenta, grads, hyper, 3)
    norms = read.vector("grad_norms", grad_norms, len(tensors), writable=True)
    read.check_disjoint()
    if not tensors:
        return
    table = sgd_table(tensors, hyper)
    with queue_on(device, stream) as queue, workspace(queue, table.content(), len(tensors), table.num_chunks) as work:
        skip = np.uint64(work.skip) if skip_nonfinite else _NULL
        if skip_nonfinite:
            _launch_norms(_NORMS_OF_SGD, table, work, queue, norms.address, is_root=True, skip=skip)
        for group in table.groups:
            grid = table.grid(group)
            launch(
                Kernel(f"sgd_update_kernel<{group.left}, {group.right}>", ("sgd_update_kernel.cuh",)),
                grid.num_blocks, THREADS_PER_BLOCK, queue, *table.arguments(work.table, group, grid),
                np.int32(nesterov), skip, _NULL if skip_nonfinite else np.uint64(norms.address), *_sums(work),
            )  # fmt: skip


def _launch_norms(
    kernel: Kernel, table: ChunkTable, work: Workspace, queue: Queue, norms: int, *, is_root: bool, skip: np.uint64
) -> None:
    group = table.all()
    grid = table.grid(group)
    launch(
        kernel, grid.num_blocks, THREADS_PER_BLOCK, queue, *table.arguments(work.table, group, grid),
        np.int32(is_root), np.uint64(norms), skip, *_sums(work),
    )  # fmt: skip


def _known_norms(read: DeviceReader, name: str, norms: Array | None, count: int) -> np.uint64:
    return _NULL if norms is None else np.uint64(read.vector(name, norms, count).address)


def _sums(work: Workspace) -> tuple[np.uint64, np.uint64]:
    """The last two arguments of a kernel that adds up norms."""
    return np.uint64(work.doubles), np.uint64(work.num_finished)
