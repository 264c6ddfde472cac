"""What an optimizer saves and how it goes on from that: torch.optim's state, with JointSpar's own beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jointspar.arguments import check_kind
from jointspar.errors import JointSparError
from jointspar.gradient_exchange import Exchanged
from jointspar.hyperparameters import HyperParameters, check_hyperparameters
from jointspar.pipeline import Pipeline
from jointspar.step.update import LarsUpdate, SgdUpdate


class SavedOptimizer(torch.optim.Optimizer):
    """The part of `JointSparOptimizer` that deals with states; that one's constructor makes what is named here."""

    _hyper_names: tuple[str, ...]
    _update_type: type[LarsUpdate] | type[SgdUpdate]
    _is_built: bool
    _parameters: tuple[torch.Tensor, ...]
    _momenta: list[torch.Tensor]
    _hyper: HyperParameters
    _update: LarsUpdate | SgdUpdate
    _pipeline: Pipeline
    _exchanged: Exchanged | None  # between synchronize() and step()
    _run: str | None  # by which `jointspar.checkpoint` knows this optimizer's checkpoints; None: none made nor loaded

    def __getstate__(self) -> dict[str, Any]:
        """Refuses copy.deepcopy and pickle: a copy would meet no other rank's."""
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: use state_dict() or js.checkpoint.save")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameter groups are fixed at construction: the ranks agreed on the layers then."""
        if self._is_built:
            raise JointSparError("parameters cannot be added later: build a new optimizer")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's, with what JointSpar adds under "jointspar".

        Rank-local: with strategy="independent" every rank has its own probabilities.
        """
        for parameter, momentum in zip(self._parameters, self._momenta, strict=True):  # whatever `state` was made since
            self.state.setdefault(parameter, {})["momentum_buffer"] = momentum
        own = self._pipeline.state_dict() | {"update": self._update.state_dict()}
        state, names = super().state_dict(), self._pipeline.layers.names
        groups = [group | {"param_names": [names[k] for k in group["params"]]} for group in state["param_groups"]]
        return state | {"param_groups": groups, "jointspar": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, exactly, once the weights are loaded. Collective: every rank loads its own.

        Freezes and thaws parameters as they were then; `set_trainable` afterwards changes that.
        Raises ValueError for a state of other parameters, of another order of them, or of other layers; nothing was
        changed then. Parameters may have other names than those of the state.
        """
        self._pipeline.backward.check_owner()
        self.check_state_dict(state_dict)
        loaded = [state_dict["state"][index]["momentum_buffer"] for index in range(len(self._momenta))]
        groups = [_without_names(group) for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})
        for parameter, momentum, value in zip(self._parameters, self._momenta, loaded, strict=True):
            momentum.copy_(value)  # torch would have cast it to the parameter's dtype
            self.state[parameter]["momentum_buffer"] = momentum
        self._hyper = HyperParameters(self.param_groups, self._parameters, self._hyper_names)
        self._update = self._update_type(self._parameters, self._momenta)
        self._exchanged = None
        own = _on_host(state_dict["jointspar"])
        self._update.load_state_dict(own.get("update", {}))
        self._pipeline.load_state_dict(own, also_agreed=list(self._update.state_dict().values()))

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state that is not of this optimizer, its parameters, groups or layers."""
        check_kind("state_dict", state_dict, "a dict", isinstance(state_dict, dict))
        try:
            self._check_state_dict(state_dict)
        except (KeyError, IndexError, AttributeError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"state_dict: is malformed ({type(error).__name__}: {error})") from error

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict.get("jointspar")
        if own is None:
            raise ValueError("state_dict: has no 'jointspar' entry, so it is not of this optimizer")
        own = _on_host(own)
        self._pipeline.check_state(own)
        self._update.check_state(own.get("update", {}))
        groups, state = state_dict["param_groups"], state_dict["state"]
        members = [group["params"] for group in groups]
        are_plain = all(isinstance(number, int) for group in members for number in group)  # a tensor may equal a number
        if members != self._numbers_by_group() or not are_plain:
            raise ValueError("state_dict: its parameter groups are of other sizes")
        self._check_order([name for group in groups for name in group.get("param_names", [])])
        for index, parameter in enumerate(self._parameters):
            momentum = state.get(index, {}).get("momentum_buffer")
            if momentum is None or momentum.shape != parameter.shape:
                raise ValueError(f"state_dict: has no momentum_buffer of the shape of parameter {index}")
        check_hyperparameters(groups, self._hyper_names)

    def _check_order(self, saved: list[str]) -> None:
        """Raises ValueError where a parameter stood at another place. Older states have no names."""
        names = self._pipeline.layers.names
        place_of = {name: place for place, name in enumerate(names)}
        for place, name in enumerate(saved):
            if place_of.get(name, place) != place:
                raise ValueError(
                    f"state_dict: parameter {place} was {name!r}, which is parameter {place_of[name]} here: build the "
                    "optimizer with its parameters in the same order"
                )

    def _numbers_by_group(self) -> list[list[int]]:
        """What stands for the parameters in a state."""
        return [group["params"] for group in super().state_dict()["param_groups"]]


def _without_names(group: dict[str, Any]) -> dict[str, Any]:
    """Torch would keep the names in the group."""
    return {name: value for name, value in group.items() if name != "param_names"}


def _on_host(value: Any) -> Any:
    """A state with its tensors in host memory, wherever torch.load's map_location has put them."""
    if isinstance(value, Mapping):
        return {name: _on_host(entry) for name, entry in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value
