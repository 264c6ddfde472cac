"""An allgather of compressed gradients, by messages from neighbour to neighbour."""

from __future__ import annotations

import torch

from jointspar.comm.transport import Transport, failing


def all_gather(transport: Transport, own: torch.Tensor, *, what: str) -> torch.Tensor:
    """Every rank's `own`, uint8 [world_size, num_bytes]; num_bytes is the same on all ranks. Collective.

    Each rank hands on what it received last, so it sends (world_size - 1) * num_bytes.
    Raises CollectiveTimeout.
    """
    rank, world_size = transport.rank, transport.world_size
    following, preceding = (rank + 1) % world_size, (rank - 1) % world_size
    rows = own.new_empty(world_size, own.numel())
    rows[rank] = own
    with failing(transport, what):
        for hop in range(world_size - 1):
            receive = transport.start_receive(rows[(preceding - hop) % world_size], preceding, what=what)
            send = transport.start_send(rows[(rank - hop) % world_size], following, what=what)
            receive.wait()
            send.wait()
    return rows
