"""`python -m bench.gpu.exchange` on simulated ranks and the CPU: each way is timed, and a wrong sum is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jointspar as js
from bench.gpu import exchange
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError

WAYS = ["allreduce, staged", "ring, staged", "two_shot, staged"]


def staged_ways(comm: Transport) -> dict[str, Any]:
    names = ("allreduce", "ring", "two_shot")
    every = {name: exchange.candidates(name, comm, torch.float32)[name] for name in names}
    return {f"{name}, staged": exchange.Staged(way) for name, way in every.items()}


def test_every_way_is_timed_in_every_round() -> None:
    def on_rank(comm: Transport) -> dict[str, list[float]]:
        return exchange.measure(comm, staged_ways(comm), 1000, 3, device="cpu")

    for times in js.comm.run_simulated(2, on_rank):
        assert list(times) == WAYS
        assert all(len(samples) == 3 and min(samples) > 0 for samples in times.values())


def test_a_way_that_sums_wrongly_is_named() -> None:
    def double(comm: Transport, packed: torch.Tensor, *, what: str, slices: object) -> None:
        packed.mul_(2)

    with pytest.raises((AssertionError, JointSparError), match="of my own"):
        js.comm.run_simulated(2, lambda comm: exchange.measure(comm, {"of my own": double}, 1000, 1, device="cpu"))
