"""Which kernels a call launches, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

_NOT_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")


def kernel_names(call: Callable[[], object]) -> list[str]:
    """Names of the CUDA kernels of one call, in no order; copies and fills by the driver do not count."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in on_device if not event.name.startswith(_NOT_KERNELS)]
