"""Stage 5: mean_grad -> weights and momentum. Owns the norms that LARS carries from one step to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jointspar import ops

REMEASURE_EVERY = 100  # steps after which carried norms are measured again
# Carried and measured norms of the same weights differ by less, relatively: their sums may have another order.
_SAME_WEIGHTS = {torch.float64: 1e-12}
_SAME_WEIGHTS_IN_FLOAT = 1e-6


class HyperParameters:
    """The parameter groups' settings as one row of float64 per parameter."""

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
        self._is_vector = np.array([parameter.ndim <= 1 for parameter in parameters], dtype=bool)

    def read(self, positions: np.ndarray) -> dict[str, Any]:
        """Current values for the parameters at `positions` by name: float64 [len(positions)], or one number for all."""
        table = self._table()
        if len(table) == 1:
            return dict(zip(self.names, table[0], strict=True))
        rows = table[self._group_of[positions]]
        return {name: rows[:, column] for column, name in enumerate(self.names)}

    def check(self) -> None:
        """Raises ValueError for a setting that no update could use."""
        check_hyperparameters(self._groups, self.names)

    @property
    def nesterov(self) -> bool:
        """The same in all groups, see `check`."""
        return bool(self._groups[0]["nesterov"])

    def agreed(self) -> list[object]:
        """What ranks must agree on before each exchange: current values, switches, and which group holds what."""
        switches = [[bool(group["nesterov"]), bool(group.get("adapt_vectors", True))] for group in self._groups]
        return [self._table(), np.array(switches), self._group_of]

    def _table(self) -> np.ndarray:
        """Current values, float64 [num_groups, num_names]."""
        return np.array([[float(group[name]) for name in self.names] for group in self._groups])

    def treated_as_vectors(self, positions: np.ndarray) -> np.ndarray:
        """bool [len(positions)]: tensors of one dimension in groups that leave those out of LARS and decay."""
        left_out = np.array([not group.get("adapt_vectors", True) for group in self._groups], dtype=bool)
        return self._is_vector[positions] & left_out[self._group_of[positions]]


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


class LarsUpdate:
    """LARS on slices of a packed buffer; carries ||w|| so that each step reads the weights once.

    Somebody else may write the weights between steps: a changed version counter or storage has the norm measured
    again, and all norms are measured every 100 steps. Writes through `parameter.data` change no counter and are
    noticed only then.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._momenta = momenta
        self._norms = torch.full((len(parameters),), torch.nan, dtype=torch.float64, device=parameters[0].device)
        self._versions = np.full(len(parameters), -1, dtype=np.int64)
        self._pointers = np.zeros(len(parameters), dtype=np.int64)
        self._steps = 0

    def apply(
        self,
        positions: np.ndarray,
        grads: torch.Tensor,
        grad_norms: torch.Tensor | None,
        hyper: HyperParameters,
        *,
        idle: np.ndarray,
        skip_nonfinite: bool,
    ) -> torch.Tensor:
        """Update the parameters at `positions`, in place with their momenta; those at `idle` as with zero gradients.

        Args:
            positions: int64 [num_slices].
            grads: packed mean gradients in that order.
            grad_norms: float64 [num_slices], norms of the slices; None: measured here.
            idle: int64, positions of parameters whose momentum and weight decay go on, not adapted.
            skip_nonfinite: write nothing where any gradient is not finite.

        Returns: float64 [num_slices], the norms that were used.
        """
        everything = np.concatenate([positions, idle])
        if everything.size == 0:  # nobody drew a layer: there is nothing that says which device to use
            return grads.new_zeros(0, dtype=torch.float64)
        parameters = [self._parameters[position] for position in everything.tolist()]
        values = hyper.read(everything)
        left_out = hyper.treated_as_vectors(everything)
        if left_out.any():
            values["weight_decay"] = np.where(left_out, 0.0, values["weight_decay"])
        index = host_index(everything, self._norms.device)
        norms = ops.lars_update(
            parameters,
            [self._momenta[position] for position in everything.tolist()],
            _with_idle(grads, parameters, idle.size),
            nesterov=hyper.nesterov,
            adapt=~left_out & (np.arange(everything.size) < positions.size),
            param_norms=self._carried(everything, parameters, index),
            grad_norms=None if grad_norms is None else torch.cat([grad_norms, grad_norms.new_zeros(idle.size)]),
            skip_nonfinite=skip_nonfinite,
            **values,
        )
        self._norms[index] = norms.param_norms_after
        self._note_places(everything, parameters)
        return norms.grad_norms[: positions.size]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The norms, since measuring them again may give other bits, and how far it is to the next measuring."""
        everything = np.arange(len(self._parameters))
        norms = self._still_valid(everything, list(self._parameters), host_index(everything, self._norms.device))
        return {"norms": norms.cpu(), "steps": torch.tensor(self._steps)}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a state of other parameters. In an empty one nothing is carried."""
        if not state:
            return
        expected = {"norms": (torch.float64, self._norms.shape), "steps": (torch.int64, torch.Size())}
        if {name: _kind_of(value) for name, value in state.items()} != expected or int(state["steps"]) < 0:
            raise ValueError(f"state_dict: its norms are not of {len(self._parameters)} parameters")

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Carry on with saved norms where they are, up to rounding, those of the weights that are there now."""
        if not state:
            return
        saved = state["norms"].to(self._norms)
        measured = torch.sqrt(ops.squared_norms(list(self._parameters)))
        tolerances = [_SAME_WEIGHTS.get(parameter.dtype, _SAME_WEIGHTS_IN_FLOAT) for parameter in self._parameters]
        is_same = (saved - measured).abs() <= torch.tensor(tolerances).to(measured) * measured
        self._norms = torch.where(is_same, saved, torch.nan)
        self._note_places(np.arange(len(self._parameters)), self._parameters)
        self._steps = int(state["steps"])

    def _note_places(self, positions: np.ndarray, parameters: Sequence[torch.Tensor]) -> None:
        """What tells later whether somebody else wrote the parameters whose norms are carried."""
        self._versions[positions] = [parameter._version for parameter in parameters]
        self._pointers[positions] = [parameter.data_ptr() for parameter in parameters]

    def _carried(self, positions: np.ndarray, parameters: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        """float64 [num_parameters]: what the last step measured, NaN where that may be out of date."""
        self._steps += 1
        if self._steps % REMEASURE_EVERY == 0:
            self._norms.fill_(torch.nan)
        return self._still_valid(positions, parameters, index)

    def _still_valid(self, positions: np.ndarray, parameters: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        same = self._versions[positions] == [parameter._version for parameter in parameters]
        same &= self._pointers[positions] == [parameter.data_ptr() for parameter in parameters]
        carried = self._norms[index]
        if not same.all():
            carried[host_index(np.flatnonzero(~same), carried.device)] = torch.nan
        return carried


class SgdUpdate:
    """SGD with momentum on slices of a packed buffer. Carries nothing beside the momenta."""

    def __init__(self, parameters: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._momenta = momenta

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Any state will do."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Changes nothing."""

    def apply(
        self,
        positions: np.ndarray,
        grads: torch.Tensor,
        grad_norms: torch.Tensor | None,
        hyper: HyperParameters,
        *,
        idle: np.ndarray,
        skip_nonfinite: bool,
    ) -> torch.Tensor:
        """As `LarsUpdate.apply`; grad_norms are not needed."""
        everything = np.concatenate([positions, idle])
        if everything.size == 0:  # nobody drew a layer: there is nothing that says which device to use
            return grads.new_zeros(0, dtype=torch.float64)
        parameters = [self._parameters[position] for position in everything.tolist()]
        norms = ops.sgd_update(
            parameters,
            [self._momenta[position] for position in everything.tolist()],
            _with_idle(grads, parameters, idle.size),
            nesterov=hyper.nesterov,
            skip_nonfinite=skip_nonfinite,
            **hyper.read(everything),
        )
        return norms[: positions.size]


def slice_norms(packed: torch.Tensor, sizes: np.ndarray) -> torch.Tensor:
    """Norms of the slices of a packed buffer, float64 [num_slices]; not finite exactly where a slice is not."""
    return torch.sqrt(ops.squared_norms(packed, layout=sizes))


def clip_packed(packed: torch.Tensor, norms: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale a packed gradient, in place, to a total norm of at most `max_norm`; returns the slices' norms after it."""
    factor = (max_norm / (norms.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
    if packed.device.type == "cpu" and not factor.item() < 1.0:  # a device is not asked
        return norms
    packed.mul_(factor)
    return norms * factor


def host_index(positions: np.ndarray, device: torch.device) -> torch.Tensor:
    """Positions as an index on `device`; waits for nothing there."""
    index = torch.from_numpy(positions)
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _kind_of(value: object) -> tuple[torch.dtype, torch.Size] | None:
    """What a dense tensor is; None for anything else."""
    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return (value.dtype, value.shape) if is_dense else None  # type: ignore[attr-defined]


def _with_idle(
    grads: torch.Tensor, parameters: Sequence[torch.Tensor], num_idle: int
) -> torch.Tensor | list[torch.Tensor | None]:
    """The packed buffer as it is, or where parameters without a gradient follow, one slice each and None for those."""
    if num_idle == 0:
        return grads
    slices: list[torch.Tensor | None] = []
    offset = 0
    for parameter in parameters[: len(parameters) - num_idle]:
        slices.append(grads[offset:].as_strided(parameter.shape, parameter.stride()))
        offset += parameter.numel()
    return slices + [None] * num_idle
