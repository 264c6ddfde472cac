"""Learning rates, momenta and the like: what the user's parameter groups hold, checked, and as every rank has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class HyperParameters:
    """The parameter groups' settings as one row of float64 per parameter, as they were at the last `refresh`."""

    def __init__(
        self, param_groups: Sequence[dict[str, Any]], parameters: Sequence[torch.Tensor], names: Sequence[str]
    ) -> None:
        self._groups = param_groups
        self.names = tuple(names)
        position_of = {id(parameter): position for position, parameter in enumerate(parameters)}
        self._group_of = np.zeros(len(parameters), dtype=np.int64)
        for group_index, group in enumerate(param_groups):
            for parameter in group["params"]:
                self._group_of[position_of[id(parameter)]] = group_index
        self._members = _members(param_groups)
        self._is_vector = np.array([parameter.ndim <= 1 for parameter in parameters], dtype=bool)
        self.refresh()

    def follow(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Read these groups from now on, where somebody replaced the list. Raises ValueError for other members."""
        if param_groups is not self._groups:
            if _members(param_groups) != self._members:
                raise ValueError("param_groups: were replaced by groups of other parameters: build a new optimizer")
            self._groups = param_groups

    def refresh(self) -> None:
        """Take over what the groups hold now. Raises ValueError for a setting that no update could use."""
        check_hyperparameters(self._groups, self.names)
        switches = (("nesterov", False), ("adapt_vectors", True))
        self._table = np.array(
            [
                [float(group[name]) for name in self.names] + [float(group.get(name, no)) for name, no in switches]
                for group in self._groups
            ]
        )

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """float64 [len(positions), num_names]: the settings of the parameters at `positions`, in the order of names."""
        return self._table[self._group_of[positions], : len(self.names)]

    @property
    def nesterov(self) -> bool:
        """The same in all groups, see `refresh`."""
        return bool(self._table[0, -2])

    def agreed(self) -> list[object]:
        """What ranks must agree on before each exchange: settings, switches, and which group holds what."""
        return [self._table, self._group_of]

    def treated_as_vectors(self, positions: np.ndarray) -> np.ndarray:
        """bool [len(positions)]: tensors of one dimension in groups that leave those out of LARS and decay."""
        return self._is_vector[positions] & (self._table[self._group_of[positions], -1] == 0.0)


def _members(param_groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in param_groups]


def check_hyperparameters(param_groups: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raises ValueError or TypeError for a setting that is missing, or that no update could use."""
    for group in param_groups:
        missing = [name for name in (*names, "nesterov") if name not in group]
        if missing:
            raise ValueError(f"{missing[0]}: a parameter group does not have it, so it is of another optimizer")
        for name in names:
            _check_number(name, group[name])
        for name in ("nesterov", "adapt_vectors"):
            if not isinstance(group.get(name, False), (bool, np.bool_)):
                raise TypeError(f"{name}: expected True or False, got {type(group[name]).__name__}")
        if group["nesterov"] and group["momentum"] <= 0.0:
            raise ValueError("nesterov: needs a momentum above 0")
    if len({bool(group["nesterov"]) for group in param_groups}) > 1:
        raise ValueError("nesterov: must be the same in all parameter groups")


def _check_number(name: str, value: Any) -> None:
    """A number, or a tensor of one, finite and at least 0."""
    if type(value) is float and 0.0 <= value < math.inf:  # nearly always
        return
    is_tensor = isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype.is_floating_point
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (is_tensor or is_number):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name}: {number} is not finite and at least 0")
