"""Keeps the ranks' copies of a model equal: weights at the start, batch-norm buffers when asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jointspar import comm as comm_module
from jointspar.comm.hashing import stable_hash
from jointspar.comm.header import current_agreement
from jointspar.comm.heads import Op
from jointspar.comm.transport import Transport
from jointspar.model_state import each_once, why_not_plain


@torch.no_grad()
def broadcast_parameters(comm: Transport, parameters: Sequence[torch.Tensor]) -> None:
    """Copy rank 0's weights to all ranks, in place, in one message per dtype. Collective."""
    if comm.world_size == 1:
        return
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        flat = torch.cat([parameter.reshape(-1) for parameter in same]).cpu()
        comm.broadcast(flat, 0, what=f"weights of rank 0 ({dtype})")
        _copy_back(flat, same)


@torch.no_grad()
def sync_buffers(model: torch.nn.Module, comm: Transport | None = None) -> None:
    """Average a model's floating-point buffers (batch-norm statistics) over the ranks, in place. Collective.

    Call it before evaluating or saving: in training every rank's statistics are of its own shard. Whole-number buffers
    (num_batches_tracked) are left alone.

    comm: None is `jointspar.comm.world()`. Where the optimizer has a transport of its own, as with on_failure="shrink",
    give comm=optimizer.comm, which is that of the ranks that are left.
    Raises: DesyncError where the ranks' buffers differ in number, shape, dtype or layout, or another rank does
    something else, TypeError for a buffer that is sparse or nested; no buffer was changed then.
    """
    comm = comm if comm is not None else comm_module.world()
    if comm.world_size == 1:
        return
    named = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    faults = {name: fault for name, buffer in named.items() if (fault := why_not_plain(buffer)) is not None}
    buffers = [each_once(buffer) for name, buffer in named.items() if name not in faults]
    shapes = stable_hash([[[list(buffer.shape), str(buffer.dtype)] for buffer in buffers], *faults.values()])
    flat = torch.cat(
        [torch.empty(0, dtype=torch.float64, device="cpu"), *(buffer.reshape(-1).double().cpu() for buffer in buffers)]
    )
    mean = average(flat, comm, what="averaging buffers", detail=shapes)
    if faults:  # on all ranks, which have met
        raise TypeError("; ".join(f"model: its buffer {name!r} {fault}" for name, fault in faults.items()))
    _copy_back(mean, buffers)


def average(values: torch.Tensor, comm: Transport, *, what: str, detail: int = 0) -> torch.Tensor:
    """The mean over the ranks of a 1-D float64 tensor, in new memory. Collective.

    detail: a hash that must be the same on all ranks. Raises DesyncError where it, or the length, or the step is not.
    """
    mean = values.clone()
    if comm.world_size > 1:
        agreement = current_agreement(comm)
        agreement.go(Op.AVERAGE, step=agreement.step, count=mean.numel(), dtype=mean.dtype, agreed=detail)
        comm.allreduce(mean, what=what)
        mean /= comm.world_size
    return mean


def _copy_back(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    for chunk, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(chunk.view(tensor.shape))
