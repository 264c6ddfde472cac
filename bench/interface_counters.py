"""What a network interface of this process's network namespace has carried since it was made, in bytes.

Headers of all protocols are included, but once for each piece of up to 64 KiB that the kernel hands to a virtual
interface; on a real wire they come with every packet of 1,448 bytes of payload, and 66 bytes each.
"""

from __future__ import annotations

from pathlib import Path

SHARED_INTERFACE = "lo"  # of all ranks on a machine, between which MPI takes shared memory


def sent_bytes(interface: str) -> int:
    """Raises ValueError for an interface that is not there."""
    return _counter(interface, 8)


def received_bytes(interface: str) -> int:
    """Raises ValueError for an interface that is not there."""
    return _counter(interface, 0)


def _counter(interface: str, column: int) -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[column])
    raise ValueError(f"there is no interface {interface!r} in /proc/net/dev")
