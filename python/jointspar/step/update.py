"""Stage 5: mean_grad -> weights and momentum. Owns the norms that LARS carries from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from jointspar import ops
from jointspar.arguments import on_plain_tensors
from jointspar.hyperparameters import HyperParameters
from jointspar.ops.updates import lars_update_rows, sgd_update_rows

REMEASURE_EVERY = 100  # steps after which carried norms are measured again
# Carried and measured norms of the same weights differ by less, relatively: their sums may have another order.
_SAME_WEIGHTS = {torch.float64: 1e-12}
_SAME_WEIGHTS_IN_FLOAT = 1e-5  # as much as sums of equal float32 values can lose


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
        self._host_norms = self._norms.numpy() if self._norms.device.type == "cpu" else None  # the same memory
        self._versions = np.full(len(parameters), -1, dtype=np.int64)
        self._pointers = np.zeros(len(parameters), dtype=np.int64)
        self._steps = 0

    @on_plain_tensors
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
        chosen = everything.tolist()
        parameters = [self._parameters[position] for position in chosen]
        rows, left_out = hyper.rows(everything), hyper.treated_as_vectors(everything)
        rows[left_out, hyper.names.index("weight_decay")] = 0.0
        adapt = ~left_out
        adapt[positions.size :] = False
        if grad_norms is not None and idle.size:
            grad_norms = torch.cat([grad_norms, grad_norms.new_zeros(idle.size)])
        pointers = [parameter.data_ptr() for parameter in parameters]
        norms = lars_update_rows(
            parameters,
            [self._momenta[position] for position in chosen],
            _with_idle(grads, parameters, idle.size),
            hyper=rows,
            nesterov=hyper.nesterov,
            adapt=adapt,
            param_norms=self._carried(everything, parameters, pointers),
            grad_norms=grad_norms,
            skip_nonfinite=skip_nonfinite,
        )
        self._carry(everything, parameters, pointers, norms.param_norms_after)
        return norms.grad_norms[: positions.size]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The norms, since measuring them again may give other bits, and how far it is to the next measuring."""
        everything, pointers = np.arange(len(self._parameters)), self._all_pointers()
        norms = torch.as_tensor(self._still_valid(everything, self._parameters, pointers), device="cpu")
        return {"norms": norms, "steps": torch.tensor(self._steps, device="cpu")}

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
        is_same = (saved - measured).abs() <= torch.tensor(tolerances, device="cpu").to(measured) * measured
        everything, norms = np.arange(len(self._parameters)), torch.where(is_same, saved, torch.nan)
        self._carry(everything, self._parameters, self._all_pointers(), norms)
        self._steps = int(state["steps"])

    def _all_pointers(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _carry(
        self, positions: np.ndarray, parameters: Sequence[torch.Tensor], pointers: list[int], norms: torch.Tensor
    ) -> None:
        """Keep norms, and what tells later whether somebody else has written their parameters."""
        if self._host_norms is None:
            self._norms[host_index(positions, self._norms.device)] = norms
        else:
            self._host_norms[positions] = norms.numpy()
        self._versions[positions] = [parameter._version for parameter in parameters]
        self._pointers[positions] = pointers

    def _carried(
        self, positions: np.ndarray, parameters: Sequence[torch.Tensor], pointers: list[int]
    ) -> torch.Tensor | np.ndarray:
        """float64 [len(positions)]: what the last step measured, NaN where that may be out of date."""
        self._steps += 1
        if self._steps % REMEASURE_EVERY == 0:
            self._norms.fill_(torch.nan)
        return self._still_valid(positions, parameters, pointers)

    def _still_valid(
        self, positions: np.ndarray, parameters: Sequence[torch.Tensor], pointers: list[int]
    ) -> torch.Tensor | np.ndarray:
        same = self._versions[positions] == [parameter._version for parameter in parameters]
        same &= self._pointers[positions] == pointers
        if self._host_norms is not None:
            return np.where(same, self._host_norms[positions], np.nan)
        carried = self._norms[host_index(positions, self._norms.device)]
        if not same.all():
            # By an assignment torch would copy the number to the device, and wait for that.
            carried.index_fill_(0, host_index(np.flatnonzero(~same), carried.device), torch.nan)
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
        """Raises ValueError for a state that carries something, which is of another update."""
        if state:
            raise ValueError(f"state_dict: has {', '.join(state)}, so it is of another optimizer")

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Changes nothing."""

    @on_plain_tensors
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
        chosen = everything.tolist()
        parameters = [self._parameters[position] for position in chosen]
        norms = sgd_update_rows(
            parameters,
            [self._momenta[position] for position in chosen],
            _with_idle(grads, parameters, idle.size),
            hyper=hyper.rows(everything),
            nesterov=hyper.nesterov,
            skip_nonfinite=skip_nonfinite,
        )
        return norms[: positions.size]


def slice_norms(packed: torch.Tensor, sizes: np.ndarray) -> torch.Tensor:
    """Norms of the slices of a packed buffer, float64 [num_slices]; not finite exactly where a slice is not."""
    return torch.sqrt(ops.squared_norms(packed, layout=sizes))


def clip_packed(packed: torch.Tensor, norms: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale a packed gradient, in place, to a total norm of at most `max_norm`; returns the slices' norms after it."""
    factor = (max_norm / (norms.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
    if packed.device.type == "cpu" and factor.item() >= 1.0:  # a device is not asked; NaN where any norm is
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
