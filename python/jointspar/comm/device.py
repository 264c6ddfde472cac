"""Waiting for a device, and for blocking calls that take its memory, with the transport's deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from jointspar.comm.transport import Transport, failing
from jointspar.errors import CollectiveTimeout

_LONGEST_SLEEP = 2e-4


def wait_for_stream(transport: Transport, device: torch.device, *, what: str) -> None:
    """Return once the work on the current stream of `device` is done, so that others may read its memory.

    At once for the CPU. Raises CollectiveTimeout past the transport's deadline, after which it refuses further use.
    """
    if device.type != "cuda":
        return
    event = torch.cuda.current_stream(device).record_event()
    start = time.monotonic()
    while not event.query():
        if time.monotonic() - start > transport.timeout:
            _give_up(transport, f"{what}: the device did not finish within {transport.timeout:.1f} s")
        time.sleep(min(_LONGEST_SLEEP, (time.monotonic() - start) / 50))


def call_with_deadline(transport: Transport, function: Callable[[], None], *, what: str) -> None:
    """Run a blocking call on a helper thread, because it cannot be left when a peer has gone.

    Raises what the function raises; CollectiveTimeout past the transport's deadline: the thread, with the memory that
    the function holds, then stays until the process ends. So it does after an interrupt; either way the transport
    refuses further use.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"jointspar {what}", daemon=True)
    with failing(transport, what):
        thread.start()
        thread.join(min(transport.timeout, threading.TIMEOUT_MAX))
    if thread.is_alive():
        _give_up(transport, f"{what}: no answer from the other ranks for {transport.timeout:.1f} s")
    if errors:
        raise errors[0]


def _give_up(transport: Transport, reason: str) -> None:
    transport.fail(reason)
    raise CollectiveTimeout(f"rank {transport.rank}: {reason}")
