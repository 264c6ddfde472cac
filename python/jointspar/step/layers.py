"""Stage 0: parameters -> layers, the units that are sampled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import torch

from jointspar.arguments import one_of

GROUPINGS = ("module", "tensor")
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)(?=\.)")
_PARAMETRIZED = re.compile(r"\.?parametrizations\.[^.]+$")


@dataclass(frozen=True)
class Layer:
    """The tensors of one module: drawn, computed and sent together."""

    name: str
    parameters: tuple[int, ...]  # positions in Layers.parameters
    numel: int


@dataclass(frozen=True)
class Layers:
    """All parameters of an optimizer, and how they form layers.

    `layer_of` maps each parameter to its sampled layer; always-active parameters (normalisation) have -1.
    """

    parameters: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    sampled: tuple[Layer, ...]
    always_active: tuple[Layer, ...]
    layer_of: np.ndarray  # int64 [num_parameters]

    @property
    def num_layers(self) -> int:
        return len(self.sampled)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [num_layers], elements."""
        return np.array([layer.numel for layer in self.sampled])

    def wanted_parameters(self, active: np.ndarray) -> np.ndarray:
        """bool [..., num_parameters]: those of active layers (bool [..., num_layers]) and the always-active ones."""
        flags = np.ones((*active.shape[:-1], self.num_layers + 1), dtype=bool)  # the always-active ones have -1
        flags[..., :-1] = active
        return flags[..., self.layer_of]

    def with_any(self, flags: np.ndarray) -> np.ndarray:
        """bool [num_layers]: layers of which any parameter is flagged (bool [num_parameters])."""
        found = np.zeros(self.num_layers + 1, dtype=bool)
        found[self.layer_of[flags]] = True  # the always-active ones fall on the last
        return found[:-1]

    def sum_by_layer(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Add float64 values of the parameters at `positions` up to their layers; float64 [num_layers]."""
        return np.bincount(self.layer_of[positions] + 1, weights=values, minlength=self.num_layers + 1)[1:]

    def describe(self) -> list[tuple[object, ...]]:
        """What ranks must agree on: for every layer its name, and each tensor's name, shape, strides and dtype."""
        return [
            (layer.name, layer in self.always_active, *(self._describe_tensor(index) for index in layer.parameters))
            for layer in (*self.sampled, *self.always_active)
        ]

    def _describe_tensor(self, index: int) -> tuple[object, ...]:
        tensor = self.parameters[index]
        return (self.names[index], tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype))


def named_groups(params: Iterable[Any]) -> tuple[list[dict[str, Any]], list[tuple[str, torch.Tensor]]]:
    """Read what an optimizer is given: (parameter groups for torch.optim, every parameter with its name, in order).

    `params` holds (name, tensor) pairs, tensors, or groups of either; a tensor that comes again (tied) is dropped.
    Unnamed parameters are layers of their own.

    Raises TypeError for anything else, ValueError for a tensor in two groups, whose settings could not both act.
    """
    if isinstance(params, (torch.Tensor, dict)):
        raise TypeError(f"params: expected named_parameters() or parameter groups, got {type(params).__name__}")
    given = _ordered(params)
    groups: list[dict[str, Any]] = [{"params": given}]
    if given and isinstance(given[0], dict):
        if not all(isinstance(item, dict) and "params" in item for item in given):
            raise TypeError('params: where one item is a parameter group, all must be, each with its "params"')
        groups = [dict(item) for item in given]
    named: list[tuple[str, torch.Tensor]] = []
    group_of: dict[int, int] = {}
    for group_index, group in enumerate(groups):
        members = group["params"]
        own: list[tuple[str, torch.Tensor]] = []
        for item in [members] if isinstance(members, torch.Tensor) else _ordered(members):
            name, tensor = _pair(item, len(named) + len(own))
            if id(tensor) not in group_of:
                group_of[id(tensor)] = group_index
                own.append((name, tensor))
            elif group_of[id(tensor)] != group_index:
                raise ValueError(f"params: {name!r} is in parameter groups {group_of[id(tensor)]} and {group_index}")
        named += own
        group["params"] = [tensor for _, tensor in own]
    return groups, named


def _ordered(params: Any) -> list[Any]:
    """The items, in an order that is the same on all ranks."""
    if isinstance(params, (str, bytes, set, frozenset)) or not isinstance(params, Iterable):
        raise TypeError(f"params: expected parameters in order, got {type(params).__name__}")
    return list(params)


def _pair(item: Any, number: int) -> tuple[str, torch.Tensor]:
    """Name and tensor; a tensor alone is a layer of its own."""
    if not isinstance(item, tuple):
        return f"parameter{number}.tensor", item
    if len(item) != 2 or not isinstance(item[0], str):
        raise TypeError(f"params: item {number} is not a tensor, nor a pair of a name and a tensor")
    return item


def group_layers(named_parameters: Iterable[tuple[str, torch.Tensor]], grouping: str = "module") -> Layers:
    """Form layers from the parameters that share a module.

    A module that owns only tensors of one dimension (batch, layer or group normalisation) is always active: skipping
    it saves nothing. `grouping="tensor"` makes each tensor a layer (the paper's literal reading). A tied tensor
    belongs to its first name. Wrapper prefixes (`module.`, `_orig_mod.`) and weight_norm's parametrization are
    looked through.

    Raises ValueError for an unknown grouping, no parameters, or a parameter that is not dense floating point.
    """
    one_of("grouping", grouping, GROUPINGS)
    names, parameters = _clean_names(named_parameters)
    if not parameters:
        raise ValueError("params: no parameters to optimize")
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name if grouping == "tensor" else _module_of(name), []).append(index)
    sampled: list[Layer] = []
    always: list[Layer] = []
    layer_of = np.full(len(parameters), -1, dtype=np.int64)
    for key, indices in members.items():
        layer = Layer(key or "(root)", tuple(indices), sum(parameters[index].numel() for index in indices))
        if grouping == "tensor" or any(parameters[index].ndim >= 2 for index in indices):
            layer_of[indices] = len(sampled)
            sampled.append(layer)
        else:
            always.append(layer)
    if not sampled:
        raise ValueError('params: every layer is one-dimensional, nothing to sample (use grouping="tensor")')
    return Layers(tuple(parameters), tuple(names), tuple(sampled), tuple(always), layer_of)


def _clean_names(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[str], list[torch.Tensor]]:
    """Look through wrappers' prefixes; tell apart different tensors of one name (of two models, say)."""
    names: list[str] = []
    parameters: list[torch.Tensor] = []
    taken: set[str] = set()
    for name, parameter in named_parameters:
        _check_parameter(name, parameter)
        clean = _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")
        candidates = chain([clean], (f"model{number}.{clean}" for number in count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in taken))
        taken.add(names[-1])
        parameters.append(parameter)
        if parameter.device != parameters[0].device:
            raise ValueError(f"params: {name!r} is on {parameter.device}, but {names[0]!r} on {parameters[0].device}")
    _check_that_none_overlap(names, parameters)
    return names, parameters


def _check_that_none_overlap(names: Sequence[str], parameters: Sequence[torch.Tensor]) -> None:
    """Two tensors in the same memory would be two layers, and be updated twice."""
    starts = [parameter.data_ptr() for parameter in parameters]
    ends = [start + tensor.numel() * tensor.element_size() for start, tensor in zip(starts, parameters, strict=True)]
    order = [index for index in np.argsort(starts, kind="stable").tolist() if ends[index] > starts[index]]
    for before, after in pairwise(order):
        if ends[before] > starts[after]:
            raise ValueError(
                f"params: {names[before]!r} and {names[after]!r} share memory: tie them as one and the same parameter"
            )


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"params: {name!r} is not a tensor but {type(parameter).__name__}")
    if not parameter.is_floating_point() or parameter.layout is not torch.strided:
        raise ValueError(f"params: {name!r} must be a dense floating-point tensor, not {parameter.dtype}")
    if torch.empty_like(parameter).stride() != parameter.stride():
        raise ValueError(f"params: {name!r} is a view with gaps or overlaps; use parameter.contiguous()")
    if parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(f"params: {name!r} is on {parameter.device}; the kernels run on the CPU and on CUDA devices")


def _module_of(name: str) -> str:
    return _PARAMETRIZED.sub("", name.rpartition(".")[0])
