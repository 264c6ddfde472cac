"""Exchanges of buffers in CUDA memory, through pinned host memory, for transports that take host memory only."""

from __future__ import annotations

import torch

from jointspar.comm.device import wait_for_stream
from jointspar.comm.transport import Transport
from jointspar.step.exchange.interface import Exchange, Slices


class Staged:
    """An exchange of device buffers by an exchange of host buffers; see `Exchange`.

    The copies are in order with the work on the current stream: the transport sees what was packed, and later launches
    see the sum. The host waits for the first copy, with the transport's deadline.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._read_back: torch.cuda.Event | None = None

    def __call__(self, transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
        """Sum `packed` (1-D, contiguous) over the ranks, in place. Raises what the exchange raises."""
        if self._read_back is not None:  # the last call's, perhaps on another stream
            self._read_back.wait(torch.cuda.current_stream(packed.device))
        host = self._host_memory(packed)
        host.copy_(packed, non_blocking=True)
        wait_for_stream(transport, packed.device, what=what)
        self._exchange(transport, host, what=what, slices=slices)
        packed.copy_(host, non_blocking=True)
        if packed.device.type == "cuda":
            self._read_back = torch.cuda.current_stream(packed.device).record_event()

    def _host_memory(self, packed: torch.Tensor) -> torch.Tensor:
        num_bytes = packed.numel() * packed.element_size()
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(
                num_bytes, dtype=torch.uint8, device="cpu", pin_memory=packed.device.type == "cuda"
            )
        return self._memory[:num_bytes].view(packed.dtype)
