"""What the links carry, by plain sockets alone: each host sends to the next and receives from the one before.

Run on every host as `python raw.py NUMBER ADDRESS,ADDRESS,... NUM_BYTES`; prints the rate in Gbit/s at which this host
received. With --one-way host 0 sends to host 1, and nobody else sends.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the ranks start sooner without
    from network.hosts import Hosts

_PORT = 29400
_CHUNK_BYTES = 1 << 18
_SECONDS = 60.0  # that connecting, or one chunk, may take


def measure(hosts: Hosts, num_hosts: int, *, seconds: float = 1.0, one_way: bool = False) -> float:
    """Gbit/s of payload that the slowest receiver among the first hosts gets.

    seconds: how long it takes at the links' rate; long against what a link's bucket lets pass at once.
    """
    num_bytes = str(round(hosts.gbits * 1e9 / 8 * seconds))
    addresses = ",".join(hosts.addresses[:num_hosts])
    flags = ["--one-way"] if one_way else []
    commands = [[sys.executable, __file__, str(host), addresses, num_bytes, *flags] for host in range(num_hosts)]
    printed = hosts.run_commands(commands, timeout=_SECONDS + 60 * seconds)
    return min(float(line) for line in printed.split())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("addresses")
    parser.add_argument("num_bytes", type=int)
    parser.add_argument("--one-way", action="store_true")
    options = parser.parse_args(arguments)
    addresses = options.addresses.split(",")
    following = addresses[(options.number + 1) % len(addresses)]
    with socket.create_server(("", _PORT)) as server, _connect(following) as outgoing:
        server.settimeout(_SECONDS)
        incoming, _ = server.accept()
        with incoming:
            _meet(outgoing, incoming, len(addresses))
            sends = not options.one_way or options.number == 0
            receives = not options.one_way or options.number == 1
            sender = threading.Thread(target=_send, args=(outgoing, options.num_bytes if sends else 0))
            sender.start()
            if receives:
                gbits = options.num_bytes * 8 / 1e9 / _receive(incoming, options.num_bytes)
                print(f"{gbits}\n", end="", flush=True)  # in one piece, beside those of other hosts
            sender.join()


def _connect(address: str) -> socket.socket:
    """Its server may not be up yet."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return socket.create_connection((address, _PORT), timeout=_SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _meet(outgoing: socket.socket, incoming: socket.socket, num_hosts: int) -> None:
    """One byte around the ring for each host: then all have started."""
    for _ in range(num_hosts):
        outgoing.sendall(b".")
        incoming.recv(1)


def _send(outgoing: socket.socket, num_bytes: int) -> None:
    chunk = memoryview(bytes(_CHUNK_BYTES))
    while num_bytes > 0:
        outgoing.sendall(chunk[: min(num_bytes, len(chunk))])
        num_bytes -= len(chunk)


def _receive(incoming: socket.socket, num_bytes: int) -> float:
    """Seconds that all bytes took."""
    buffer = bytearray(_CHUNK_BYTES)
    began = time.perf_counter()
    while num_bytes > 0:
        count = incoming.recv_into(buffer)
        if count == 0:
            raise ConnectionError("the other end was closed")
        num_bytes -= count
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
