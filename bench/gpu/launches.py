"""Which kernels a call launches, and how it waits for the device, by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

_NOT_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
_WAITS = (
    *("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost"),  # which may wait for what is under way
)
_CALL = "the call"


def _events(call: Callable[[], object]) -> list[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(_CALL):
            call()
        torch.cuda.synchronize()
    return list(profile.events())


def kernel_names(call: Callable[[], object]) -> list[str]:
    """Names of the CUDA kernels of one call, in no order; copies and fills by the driver do not count."""
    ignored = (*_NOT_KERNELS, _CALL)
    on_device = [event for event in _events(call) if event.device_type == torch.autograd.DeviceType.CUDA]
    named = [event.name for event in on_device if not getattr(event, "is_user_annotation", False)]
    return [name for name in named if not name.startswith(ignored)]


def waits(call: Callable[[], object]) -> dict[str, int]:
    """Calls of the CUDA runtime, in one call, that return only when the device has done something; how many of each."""
    events = [event for event in _events(call) if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = (event.time_range for event in events if event.name == _CALL)
    within = [event.name for event in events
              if span.start <= event.time_range.start and event.time_range.end <= span.end]  # fmt: skip
    return dict(Counter(name for name in within if name in _WAITS))
