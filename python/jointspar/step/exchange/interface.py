"""The one interface behind which all ways to sum a packed buffer stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from jointspar.comm.transport import Transport


@dataclass(frozen=True)
class Slices:
    """What a packed buffer holds: slices one after another, and who computed each; the other ranks packed zeros."""

    sizes: np.ndarray  # int64 [num_slices], elements
    computed: np.ndarray  # bool [world_size, num_slices], the same on all ranks

    def sent_by_two_shot(self) -> float:
        """Elements that all ranks together send at least in `two_shot`, over those in `ring`, times the length."""
        world_size = len(self.computed)
        if world_size == 1:
            return 0.0
        times = self.computed.sum(axis=0) + world_size - 2
        return float((self.sizes * times).sum() / (2 * (world_size - 1)))


class Exchange(Protocol):
    """Sums a packed buffer over the ranks of a transport, in place; the same bits on all ranks.

    slices: what the buffer holds, for exchanges that send only what was computed; None: all ranks computed all of it.
    """

    def __call__(
        self, transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None
    ) -> None: ...


class CustomExchange(Exchange, Protocol):
    """An exchange that a user brings in place of a name, such as lossy compression with what it carries along.

    The buffer holds this rank's part of the mean gradient in host memory, and takes the sum; called with one rank too.
    """

    name: str  # what `stats.exchange` says
    is_rank_local: bool  # whether ranks carry different state, so that as many must continue

    def agreed(self) -> str:
        """Settings and counters that must be the same on all ranks, in words; compared at construction and at load."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What this rank carries from step to step."""

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a state that `load_state_dict` cannot take."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state that `check_state` has passed."""
