"""Which way to sum packed buffers."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.ring import Scratch, ring


class Exchange(Protocol):
    """Sums a packed buffer over the ranks of a transport, in place; the same bits on all ranks."""

    def __call__(self, transport: Transport, packed: torch.Tensor, *, what: str) -> None: ...


def choose(name: str, transport: Transport, dtype: torch.dtype) -> Exchange:
    """The exchange called `name`, for packed buffers of `dtype`; call it for the same transport each step.

    name: "allreduce" (the transport's own collective), "ring" (any float dtype, polls against deadlines), or "auto":
    allreduce where the transport sums the dtype, else ring. One rank exchanges nothing.
    Raises ValueError for an unknown name, or for "allreduce" with a dtype that the transport cannot sum.
    """
    if name not in ("auto", "allreduce", "ring"):
        raise ValueError(f"exchange must be 'auto', 'allreduce' or 'ring', not {name!r}")
    can_allreduce = transport.can_allreduce(dtype)
    if name == "allreduce" and not can_allreduce:
        raise ValueError(f"{transport.name} cannot sum {dtype}: use exchange='ring'")
    if name == "ring" or not can_allreduce:
        return partial(ring, scratch=Scratch())
    return allreduce
