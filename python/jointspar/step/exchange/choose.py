"""Which way to sum packed buffers: by name, or by a short measurement at the start."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from jointspar.arguments import one_of
from jointspar.comm.transport import Transport
from jointspar.errors import warn_user
from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.interface import CustomExchange, Exchange, Slices
from jointspar.step.exchange.measure import Costs, adds_up, measure
from jointspar.step.exchange.ring import ring
from jointspar.step.exchange.scratch import Scratch
from jointspar.step.exchange.staged import Staged
from jointspar.step.exchange.two_shot import two_shot

NAMES = ("auto", "allreduce", "ring", "two_shot")


def candidates(name: str, transport: Transport, dtype: torch.dtype, *, is_partial: bool = True) -> dict[str, Exchange]:
    """The exchanges that `name` stands for, by name: one, or with "auto" those to choose from.

    name: "allreduce" (the transport's own collective), "ring" (any float dtype), "two_shot" (any float dtype, sends
    only what was computed), or "auto". Where the transport has an eager limit, "auto" also stands for "ring_short" and
    "two_shot_short": the same, in messages within that limit. is_partial: whether ranks compute different slices; where
    all compute the same, "auto" leaves two_shot out, which then sends what the ring does. One rank exchanges nothing.
    Simulated ranks have no link to measure: there "auto" is the transport's own collective.
    Raises ValueError for an unknown name, or for "allreduce" with a dtype that the transport cannot sum.
    """
    one_of("exchange", name, NAMES)
    can_sum = transport.can_allreduce(dtype)
    if name == "allreduce" and not can_sum:
        raise ValueError(f"{transport.name} cannot sum {dtype}: use exchange='ring' or 'two_shot'")
    scratch = Scratch()
    ways: dict[str, Exchange] = {
        "allreduce": allreduce,
        "ring": partial(ring, scratch=scratch),
        "two_shot": partial(two_shot, scratch=scratch),
    }
    if transport.eager_bytes is not None:
        ways["ring_short"] = partial(ring, scratch=scratch, segment_bytes=transport.eager_bytes)
        ways["two_shot_short"] = partial(two_shot, scratch=scratch, segment_bytes=transport.eager_bytes)
    if name != "auto":
        return {name: ways[name]}
    if transport.world_size == 1:
        return {"ring": ways["ring"]}
    if transport.is_simulated:
        return {"allreduce": ways["allreduce"]}
    return {
        way: exchange
        for way, exchange in ways.items()
        if (way != "allreduce" or can_sum) and (is_partial or not way.startswith("two_shot"))
    }


class Chooser:
    """The exchanges of one optimizer's packed buffers, and the choice among them for each buffer.

    All ranks choose alike: by costs that they agreed on, and by slices that they all know. Until `prepare`, or where
    there is nothing to choose, the first candidate is taken. A user's own exchange is taken always.
    """

    def __init__(
        self,
        exchange: str | CustomExchange,
        transport: Transport,
        dtype: torch.dtype,
        *,
        is_partial: bool,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._transport, self._dtype, self._device = transport, dtype, device
        self._custom = None if isinstance(exchange, str) else exchange
        self._candidates: dict[str, Exchange]
        if isinstance(exchange, str):
            self._candidates = candidates(exchange, transport, dtype, is_partial=is_partial)
        else:
            self._candidates = {exchange.name: exchange}
        self._world_size = transport.world_size
        self.costs: Costs | None = None

    def prepare(self, num_bytes: int) -> None:
        """Learn what the candidates cost, where there are several. Collective, once the ranks agreed on settings.

        On a CUDA device they go through pinned host memory, except allreduce where the transport takes device memory
        and these ranks get the right sum of a trial.
        num_bytes: of the largest buffer.
        """
        if self._device.type == "cuda" and self._is_called:
            for name, exchange in self._candidates.items():
                if self._custom is not None or name != "allreduce" or not self._takes_cuda(exchange, num_bytes):
                    self._candidates[name] = Staged(exchange)
        if len(self._candidates) > 1:
            self.costs = measure(self._candidates, self._transport, self._dtype, num_bytes, self._device)

    def _takes_cuda(self, exchange: Exchange, num_bytes: int) -> bool:
        if not self._transport.agree_on_cuda():
            return False
        is_right = adds_up(exchange, self._transport, self._dtype, num_bytes, self._device)
        if not is_right and self._transport.rank == 0:
            warn_user(f"{self._transport.name}: a wrong sum of CUDA memory; staged through the host")
        return is_right

    def choose(self, slices: Slices) -> str:
        """The name of the exchange for a buffer of these slices."""
        if self.costs is not None:
            return self.costs.cheapest(slices, self._dtype.itemsize)
        return next(iter(self._candidates))

    def exchange(self, name: str, packed: torch.Tensor, *, what: str, slices: Slices) -> None:
        """Sum `packed` over the ranks, in place, by the exchange that `choose` named."""
        if self._is_called:
            self._candidates[name](self._transport, packed, what=what, slices=slices)

    @property
    def _is_called(self) -> bool:
        """One rank has nothing to sum, but a custom exchange may change its gradient."""
        return self._world_size > 1 or self._custom is not None

    def sent_bytes(self, name: str, num_bytes: int) -> int:
        """What this rank would send, on average over the ranks, of a buffer that all of them computed.

        For a custom exchange: by a ring.
        """
        if name == "allreduce":
            return num_bytes if self._world_size > 1 else 0
        return round(num_bytes * 2 * (self._world_size - 1) / self._world_size)

    @property
    def is_custom(self) -> bool:
        """Whether the user brought the exchange."""
        return self._custom is not None

    @property
    def is_rank_local(self) -> bool:
        """Whether each rank has its own state."""
        return self._custom is not None and self._custom.is_rank_local

    def agreed(self) -> object:
        """What must be the same on all ranks before they go on."""
        return self.costs if self._custom is None else self._custom.agreed()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The costs, so that a continuation chooses alike and gives the same bits; empty where nothing was measured.

        Of a custom exchange: its own.
        """
        if self._custom is not None:
            return self._custom.state_dict()
        if self.costs is None:
            return {}
        seconds = {
            name: torch.tensor(column, dtype=torch.float64, device="cpu") for name, column in self.costs.seconds.items()
        }
        counts = {"num_bytes": self.costs.num_bytes, "world_size": self._world_size}
        return seconds | {name: torch.tensor(count, device="cpu") for name, count in counts.items()}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a state that a custom exchange cannot take, or for costs that say nothing."""
        if self._custom is not None:
            self._custom.check_state(state)
        elif self._applies(state):
            lengths = np.asarray(state["num_bytes"])
            columns = [np.asarray(state[name], dtype=np.float64) for name in (*self._candidates, "num_bytes")]
            is_whole = lengths.ndim == 1 and lengths.size > 0 and all(c.shape == lengths.shape for c in columns)
            if not is_whole or not all((column >= 0.0).all() for column in columns) or not (lengths > 0).all():
                raise ValueError("state_dict: the costs of its exchanges are malformed")

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over costs of the same candidates and number of ranks; others do not apply here and are passed over."""
        if self._custom is not None:
            self._custom.load_state_dict(state)
            return
        if self._applies(state):
            assert self.costs is not None
            num_bytes = tuple(np.asarray(state["num_bytes"]).tolist())
            self.costs = Costs(
                num_bytes, {name: tuple(np.asarray(state[name]).tolist()) for name in self.costs.seconds}
            )

    def _applies(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether costs are of the same candidates and number of ranks."""
        if self.costs is None or state.keys() != {*self.costs.seconds, "num_bytes", "world_size"}:
            return False
        return int(state["world_size"]) == self._world_size
