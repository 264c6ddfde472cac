"""What others do: LARS by PyTorch's operations, top-k with error feedback, DistributedDataParallel with its hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

POWERSGD_RANK = 2
POWERSGD_START = 2  # iterations that are summed without compression; torch's smallest
TOPK_FRACTION = 0.01
_ONE_BUCKET_MB = 1 << 20

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]


class TorchLars(torch.optim.Optimizer):
    """LARS with momentum by PyTorch's operations, the formula of `jointspar.ops.lars_update`.

    Norms by `torch._foreach_norm`, then three passes a tensor without a temporary, which is `preallocated` of
    bench_lars_update and faster than the `_foreach_` form. Tensors of one dimension are neither adapted nor decayed.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
        eps: float,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps
        )
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            adapted = [param for param in params if param.ndim >= 2]
            rates = iter(self._local_rates(adapted, group))
            for param in params:
                rate, weight_decay = (next(rates), group["weight_decay"]) if param.ndim >= 2 else (1.0, 0.0)
                momentum_buffer = self.state[param]["momentum_buffer"].mul_(group["momentum"])
                momentum_buffer.add_(param.grad, alpha=rate)
                if weight_decay:
                    momentum_buffer.add_(param, alpha=rate * weight_decay)
                param.add_(momentum_buffer, alpha=-group["lr"])

    def _local_rates(self, params: list[torch.Tensor], group: dict[str, Any]) -> list[float]:
        if not params:
            return []
        param_norms = torch.stack(torch._foreach_norm(params))
        grad_norms = torch.stack(torch._foreach_norm([param.grad for param in params]))
        local = param_norms / (grad_norms + group["weight_decay"] * param_norms + group["eps"])
        return torch.where((param_norms > 0) & (grad_norms > 0), group["trust_coefficient"] * local, 1.0).tolist()


class TopK:
    """Top-k with error feedback over a torch.distributed group.

    Each rank sends, of each tensor, the `fraction` of entries that are largest in gradient plus residual, as values and
    positions; what it does not send stays in the residual. params: contiguous float32.
    Source: Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory".
    """

    def __init__(self, params: Iterable[torch.Tensor], group: dist.ProcessGroup, fraction: float) -> None:
        self._params, self._group = list(params), group
        self._world_size = dist.get_world_size(group)
        sizes = [param.numel() for param in self._params]
        num_kept = [max(1, round(fraction * size)) for size in sizes]
        self.residual = torch.zeros(sum(sizes))
        self._residuals = self.residual.split(sizes)
        self._offsets = [sum(sizes[:position]) for position in range(len(sizes))]
        self._magnitudes = torch.zeros(max(sizes))
        self._values, self._positions = torch.zeros(sum(num_kept)), torch.zeros(sum(num_kept), dtype=torch.int32)
        self._kept = list(zip(self._values.split(num_kept), self._positions.split(num_kept), strict=True))
        self._all_values = [torch.zeros_like(self._values) for _ in range(self._world_size)]
        self._all_positions = [torch.zeros_like(self._positions) for _ in range(self._world_size)]
        self._mean_grad = torch.zeros(sum(sizes))
        self._mean_grads = [
            part.view(param.shape) for part, param in zip(self._mean_grad.split(sizes), self._params, strict=True)
        ]

    @torch.no_grad()
    def select(self) -> None:
        """Move the largest entries of gradients plus residuals into the buffers that are sent."""
        for param, residual, offset, (values, positions) in zip(
            self._params, self._residuals, self._offsets, self._kept, strict=True
        ):
            assert param.grad is not None
            residual.add_(param.grad.view(-1))
            magnitudes = torch.abs(residual, out=self._magnitudes[: residual.numel()])
            chosen = torch.topk(magnitudes, values.numel(), sorted=False).indices
            torch.index_select(residual, 0, chosen, out=values)
            residual[chosen] = 0.0
            positions.copy_(chosen.add_(offset))

    def exchange(self) -> None:
        """Gather what all ranks selected."""
        dist.all_gather(self._all_values, self._values, group=self._group)
        dist.all_gather(self._all_positions, self._positions, group=self._group)

    @torch.no_grad()
    def scatter(self) -> None:
        """Make the mean of what was gathered the parameters' gradients."""
        self._mean_grad.zero_()
        for values, positions in zip(self._all_values, self._all_positions, strict=True):
            self._mean_grad.index_add_(0, positions, values, alpha=1.0 / self._world_size)
        for param, mean_grad in zip(self._params, self._mean_grads, strict=True):
            param.grad = mean_grad


def data_parallel(
    model: nn.Module, group: dist.ProcessGroup, hook: str | None, bucket_mb: int | None = None
) -> DistributedDataParallel:
    """DDP with gradients as views of its buckets; buffers stay each rank's own, as with our methods.

    bucket_mb: None is torch's default, a first bucket of 1 MiB and then 25; else all of this size, and a static graph.
    PowerSGD gets one bucket: each of its buckets is summed in two rounds, the second of which gloo starts whenever the
    first has ended, so that with several buckets ranks come to different sums ("op.preamble.length <= op.nbytes").
    """
    with warnings.catch_warnings():  # a later name of broadcast_buffers is not known to all versions of torch
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, broadcast_buffers=False,
            bucket_cap_mb=_ONE_BUCKET_MB if hook == "powersgd" else bucket_mb, static_graph=bucket_mb is not None,
        )  # fmt: skip


def hook_of(name: str, group: dist.ProcessGroup) -> tuple[Any, Hook]:
    """The state and the communication hook "bf16", "fp16" or "powersgd", for `register_comm_hook`."""
    if name == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START
        )
        return state, powerSGD_hook.powerSGD_hook
    return group, {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}[name]
