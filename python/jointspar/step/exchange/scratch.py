"""Memory for messages on their way in."""

from __future__ import annotations

import torch


class Scratch:
    """Memory that an exchange keeps between its calls."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def slots(self, num_slots: int, num_elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Uninitialised buffers [num_elements], which do not overlap."""
        stride = -(-num_elements * dtype.itemsize // 64) * 64
        if self._memory.numel() < num_slots * stride:
            self._memory = torch.empty(num_slots * stride, dtype=torch.uint8, device="cpu")
        return [self._memory[k * stride :][: num_elements * dtype.itemsize].view(dtype) for k in range(num_slots)]
