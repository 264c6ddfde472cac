"""The sum by the transport's own collective."""

from __future__ import annotations

import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange.interface import Slices


def allreduce(transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
    """Sum `packed` over the ranks, in place, by the transport's allreduce.

    packed: contiguous 1-D CPU tensor of a dtype that the transport sums; the same length on all ranks.
    slices: not needed.
    Raises TypeError for another dtype, CollectiveTimeout.
    """
    try:
        transport.allreduce(packed, what=what)
    except (TypeError, ValueError):  # refused before anything moved
        raise
    except BaseException as error:  # an interrupt before or after the wait also leaves a sum under way
        transport.fail(f"{what} was left by {type(error).__name__}")
        raise
