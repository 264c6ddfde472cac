"""The draw, the projection and Algorithm 1 on a CUDA device, as cupy_jit passes them on."""

from __future__ import annotations

from typing import Any

import numpy as np

from jointspar.backends.checked_calls import check_budget, check_draw_settings, check_not_negative
from jointspar.backends.cupy_arrays import DeviceReader
from jointspar.backends.cupy_kernels import Kernel, launch, queue_on

Array = Any  # torch.Tensor, cupy.ndarray or another array in CUDA memory

# As in sample_cuda.cu, common/draw_block.h and cuda/projection_threads.cuh.
_DRAW_THREADS = 256
_LAYERS_PER_BLOCK = {"systematic": 32, "bernoulli": _DRAW_THREADS}
_ALL_RANKS = 0xFFFFFFFF
_WARP_SIZE = 32
_MAX_PROJECTION_THREADS = 1024


def sample_layers(
    probabilities: Array,
    active: Array,
    device: int,
    stream: int,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None = None,
) -> None:
    """bool active [num_layers] is written; probabilities: float64 [num_layers]."""
    read = DeviceReader(device, stream)
    p = read.vector("probabilities", probabilities)
    is_active = read.vector("active", active, p.size, "bool", writable=True)
    read.check_disjoint()
    check_draw_settings(seed, step, rank, world_size, strategy, draw, run_length)
    if p.size == 0:
        return
    random_rank = rank if strategy == "independent" else _ALL_RANKS
    num_blocks = -(-p.size // _LAYERS_PER_BLOCK[draw])
    with queue_on(device, stream) as queue:
        launch(
            Kernel(f"sample_{draw}_kernel", ("sample_kernel.cuh",)), num_blocks, _DRAW_THREADS, queue,
            np.uint64(p.address), np.int64(p.size), np.uint64(seed), np.uint32(step), np.uint32(random_rank),
            np.uint64(run_length or 0), np.bool_(strategy == "stratified"), np.uint32(rank), np.uint32(world_size),
            np.uint64(is_active.address),
        )  # fmt: skip


def project_probabilities(
    log_weights: Array, probabilities: Array, device: int, stream: int, *, budget: float, p_min: float
) -> None:
    """float64 probabilities [num_layers] is written; log_weights: float64 [num_layers]."""
    read = DeviceReader(device, stream)
    log_w = read.vector("log_weights", log_weights)
    q = read.vector("probabilities", probabilities, log_w.size, writable=True)
    read.check_disjoint()
    check_budget(log_w.size, budget, p_min)
    if log_w.size == 0:
        return
    with queue_on(device, stream) as queue:
        launch(
            Kernel("project_probabilities_kernel", ("project_kernel.cuh",)), 1, projection_threads(log_w.size), queue,
            np.uint64(log_w.address), np.int64(log_w.size), np.float64(budget), np.float64(p_min),
            np.uint64(q.address),
        )  # fmt: skip


def update_probabilities(
    probabilities: Array,
    squared_norms: Array,
    active: Array,
    drawn_probabilities: Array,
    gradient_bound: Array,
    updated: Array,
    device: int,
    stream: int,
    *,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool,
) -> None:
    """float64 gradient_bound [1] and updated [num_layers] are written; bool active [num_layers], else float64."""
    read = DeviceReader(device, stream)
    p = read.vector("probabilities", probabilities)
    n2 = read.vector("squared_norms", squared_norms, p.size)
    is_active = read.vector("active", active, p.size, "bool")
    drawn = read.vector("drawn_probabilities", drawn_probabilities, p.size)
    bound = read.vector("gradient_bound", gradient_bound, 1, writable=True)
    q = read.vector("updated", updated, p.size, writable=True)
    read.check_disjoint()
    check_not_negative(bandit_lr=bandit_lr)
    check_budget(p.size, budget, p_min)
    with queue_on(device, stream) as queue:
        launch(
            Kernel("update_probabilities_kernel", ("update_probabilities_kernel.cuh",)), 1, projection_threads(p.size),
            queue, np.uint64(p.address), np.uint64(drawn.address), np.uint64(n2.address), np.uint64(is_active.address),
            np.int64(p.size), np.uint64(bound.address), np.float64(budget), np.float64(p_min), np.float64(bandit_lr),
            np.bool_(shift), np.uint64(q.address),
        )  # fmt: skip


def projection_threads(num_layers: int) -> int:
    """Of the one block: as many as there are layers, in a power of two of warps."""
    num_threads = _WARP_SIZE
    while num_threads < min(num_layers, _MAX_PROJECTION_THREADS):
        num_threads *= 2
    return num_threads
