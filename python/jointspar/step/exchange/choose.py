"""Which way to sum packed buffers."""

from __future__ import annotations

from functools import partial

import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.interface import Exchange, Slices
from jointspar.step.exchange.ring import ring
from jointspar.step.exchange.scratch import Scratch
from jointspar.step.exchange.two_shot import two_shot

# Below this the library's collective has less latency; above it the ring is faster on loopback and on slow links.
RING_FROM_BYTES = 1 << 20
NAMES = ("auto", "allreduce", "ring", "two_shot")


def choose(name: str, transport: Transport, dtype: torch.dtype) -> Exchange:
    """The exchange called `name`, for packed buffers of `dtype`; call it for the same transport each step.

    name: "allreduce" (the transport's own collective), "ring" (any float dtype), "two_shot" (any float dtype, sends
    only what was computed), or "auto": the ring from 1 MiB on and for dtypes that the transport cannot sum, else
    allreduce. One rank exchanges nothing.
    Raises ValueError for an unknown name, or for "allreduce" with a dtype that the transport cannot sum.
    """
    if name not in NAMES:
        raise ValueError(f"exchange: {name!r} is not one of {', '.join(NAMES)}")
    can_allreduce = transport.can_allreduce(dtype)
    if name == "allreduce" and not can_allreduce:
        raise ValueError(f"{transport.name} cannot sum {dtype}: use exchange='ring' or 'two_shot'")
    if name == "allreduce":
        return allreduce
    if name == "two_shot":
        return partial(two_shot, scratch=Scratch())
    own_ring = partial(ring, scratch=Scratch())
    if name == "ring" or not can_allreduce:
        return own_ring

    def by_size(transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
        exchange = own_ring if packed.numel() * packed.element_size() >= RING_FROM_BYTES else allreduce
        exchange(transport, packed, what=what)

    return by_size
