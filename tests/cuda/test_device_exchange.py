"""A buffer in CUDA memory that goes through pinned host memory: what late work wrote is what the ranks sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from device_support import DEVICE, keep_busy
from jointspar.comm.local import local
from jointspar.comm.transport import Transport
from jointspar.errors import CollectiveTimeout
from jointspar.step.exchange import staged

pytestmark = pytest.mark.cuda

SIZE = 1000


def double(transport: Transport, packed: torch.Tensor, *, what: str, slices: Any = None) -> None:
    """An exchange with a peer that sent the same."""
    assert packed.device.type == "cpu" and packed.is_pinned()
    packed.mul_(2)


def num_right_of_1000() -> int:
    """Exchanges on a side stream, each of values that a kernel writes late and another reads right after."""
    exchange, transport, stream = staged.Staged(double), local(), torch.cuda.Stream()
    num_right = torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        packed = torch.zeros(SIZE, device=DEVICE)
        for index in range(1, 1001):
            keep_busy(0.5)
            packed.fill_(float(index))
            exchange(transport, packed, what="a step")
            num_right += (packed == 2.0 * index).all()
    stream.synchronize()
    return int(num_right)


def test_1000_exchanges_of_values_that_come_late_are_right() -> None:
    assert num_right_of_1000() == 1000


def test_without_waiting_for_the_stream_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(staged, "wait_for_stream", lambda *arguments, **settings: None)
    assert num_right_of_1000() < 1000


def test_a_device_that_does_not_finish_in_time_is_an_error() -> None:
    transport = local()
    transport.timeout = 0.1
    packed = torch.zeros(SIZE, device=DEVICE)
    exchange = staged.Staged(double)
    exchange(transport, packed, what="a step")  # allocates, which may wait
    torch.cuda.synchronize()
    keep_busy(1000)
    with pytest.raises(CollectiveTimeout, match="the device did not finish"):
        exchange(transport, packed, what="a step")
    torch.cuda.synchronize()
