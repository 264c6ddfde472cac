"""What all baselines share: the tensors that they carry from step to step, and the slices that they expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from jointspar.errors import JointSparError
from jointspar.step.exchange import Slices


class Carried:
    """The part of a `CustomExchange` that saves, loads and compares; subclasses exchange.

    sizes: elements of every parameter, in order. settings: what `agreed` says of the exchange, in words.
    state: tensors by name, changed in place, all float32.
    """

    is_rank_local = False

    def __init__(self, name: str, settings: str, sizes: Sequence[int], **state: torch.Tensor) -> None:
        self.name = name
        self._settings = settings
        self._sizes = list(sizes)
        self._round = torch.zeros((), dtype=torch.int64)  # exchanges so far: what random numbers depend on
        self._state = {"round": self._round, **state}

    def agreed(self) -> str:
        return f"{self.name} ({self._settings}) after {int(self._round)} exchanges"

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in self._state.items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} != expected:
            raise ValueError(f"state_dict: is not of {self.name} with these parameters")

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._state.items():
            tensor.copy_(state[name])

    def _check_slices(self, slices: Slices | None) -> None:
        """Every slice has its place in what is remembered, so all parameters must come in every step."""
        if slices is not None and (slices.sizes.tolist() != self._sizes or not slices.computed.all()):
            raise JointSparError(f"{self.name} needs the gradients of all parameters in every step")

    def _random(self, seed: int, *more: int) -> np.random.Generator:
        """Random numbers of this exchange alone; the same on all ranks unless `more` says which rank this is."""
        return np.random.default_rng([seed, int(self._round), *more])
