"""Malformed arguments of the optimizers, and malformed states: each is refused by name and changes nothing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js

KINDS = {"lars": js.JointSparLARS, "sgd": js.JointSparSGD}
NO_NUMBER = {
    "none": None, "text": "0.1", "bytes": b"0.1", "complex": 1j, "list": [0.1], "dict": {}, "bool": True,
    "object": object(), "array": np.array([0.1, 0.1]), "tensor": torch.ones(2), "flags": torch.tensor(True),
}  # fmt: skip
OUT_OF_RANGE = {
    "nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "negative": -0.1, "huge": 10**400,
    "nan_in_a_tensor": torch.tensor(math.nan), "negative_in_a_tensor": torch.tensor(-1.0),
}  # fmt: skip
NO_NAME = {"none": None, "number": 1, "empty": "", "unknown": "best", "list": ["x"], "array": np.array(["x", "y"])}
NO_FLAG = {"none": None, "number": 1, "text": "yes", "list": [True], "tensor": torch.tensor(True)}
NO_COUNT = {"none": None, "text": "2", "fraction": 1.5, "bool": True, "negative": -1, "nan": math.nan, "list": [1]}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def pairs() -> list[tuple[str, torch.Tensor]]:
    return list(make_model().named_parameters())


class Case(NamedTuple):
    argument: str  # what the message has to name
    label: str
    kinds: tuple[str, ...]
    build: Callable[[Any], Any]  # the optimizer's class -> an optimizer


def settings_cases() -> Iterator[Case]:
    both = ("lars", "sgd")
    for argument in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        kinds = both if argument in ("lr", "momentum", "weight_decay") else ("lars",)
        for label, value in (NO_NUMBER | OUT_OF_RANGE).items():
            yield Case(argument, label, kinds, lambda kind, a=argument, v=value: kind(pairs(), **{a: v}))
    tables = {
        "nesterov": NO_FLAG, "overlap": NO_FLAG, "inactive": NO_NAME, "check_every": NO_COUNT,
        "exchange": NO_NAME, "sampling": {"text": "shared", "number": 0.5, "dict": {}, "class": js.Sampling},
        "comm": {"text": "mpi", "number": 2, "dict": {}}, "wire_dtype": {"text": "int8", "number": 4, "list": []},
    }  # fmt: skip
    for argument, values in tables.items():
        for label, value in values.items():
            yield Case(argument, label, both, lambda kind, a=argument, v=value: kind(pairs(), **{a: v}))
    for label, value in NO_FLAG.items():
        yield Case("adapt_vectors", label, ("lars",), lambda kind, v=value: kind(pairs(), adapt_vectors=v))
    yield Case("nesterov", "without_momentum", both, lambda kind: kind(pairs(), nesterov=True, momentum=0.0))


def sampling_cases() -> Iterator[Case]:
    numbers = NO_NUMBER | OUT_OF_RANGE
    seeds = NO_COUNT | {"huge": 2**64}
    tables: dict[str, dict[str, Any]] = {
        "budget": {**numbers, "zero": 0, "zero_share": 0.0, "above_1": 1.5, "above_layers": 3},
        "p_min": {name: value for name, value in numbers.items() if name != "none"} | {"zero": 0.0, "above_1": 1.1},
        "bandit_lr": {name: value for name, value in numbers.items() if name != "none"},
        "strategy": NO_NAME, "draw": NO_NAME, "distribution": NO_NAME, "grouping": NO_NAME,
        "shift": NO_FLAG, "lag": NO_COUNT | {"two": 2}, "dense_steps": NO_COUNT, "seed": seeds,
    }  # fmt: skip
    for argument, values in tables.items():
        for label, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim == 0 and argument == "budget":
                continue
            given = {argument: value} | ({"distribution": "bandit"} if argument == "bandit_lr" else {})
            yield Case(argument, label, ("lars",), lambda kind, g=given: kind(pairs(), sampling=js.Sampling(**g)))


def params_cases() -> Iterator[Case]:
    weight = nn.Parameter(torch.ones(2, 2))
    wrong: dict[str, Callable[[], Any]] = {
        "none": lambda: None, "number": lambda: 3, "text": lambda: "weights", "tensor": lambda: weight,
        "dict": lambda: {"params": [weight]}, "empty": list, "names": lambda: ["a", "b"], "set": lambda: {weight},
        "triple": lambda: [("a", weight, 1)], "nameless": lambda: [(None, weight)], "swapped": lambda: [(weight, "a")],
        "array": lambda: [np.ones((2, 2))], "whole_numbers": lambda: [torch.ones(2, 2, dtype=torch.int64)],
        "complex": lambda: [torch.ones(2, 2, dtype=torch.complex64)], "sparse": lambda: [torch.eye(2).to_sparse()],
        "gap": lambda: [torch.ones(2, 3)[:, :2]], "expanded": lambda: [torch.ones(1, 2).expand(2, 2)],
        "meta": lambda: [torch.ones(2, 2, device="meta")], "two_devices": lambda: [weight, weight.to("meta")],
        "vectors": lambda: [("norm.weight", torch.ones(2))], "group_without_params": lambda: [{"lr": 0.1}],
        "group_of_none": lambda: [{"params": None}], "group_of_a_set": lambda: [{"params": {weight}}],
        "group_and_tensor": lambda: [{"params": [weight]}, weight], "frozen": lambda: [torch.ones(2, 2)],
    }  # fmt: skip
    for label, make in wrong.items():
        yield Case("params", label, ("lars", "sgd"), lambda kind, m=make: kind(m()))


TABLE = [case for make in (settings_cases, sampling_cases, params_cases) for case in make()]
CALLS = [(case, kind) for case in TABLE for kind in case.kinds]


def test_the_table_is_large() -> None:
    assert len(TABLE) >= 200
    assert len({(case.argument, case.label) for case in TABLE}) == len(TABLE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("case", "kind"), CALLS, ids=lambda it: f"{it.argument}-{it.label}" if it in TABLE else it)
def test_a_malformed_argument_is_named(case: Case, kind: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        case.build(KINDS[kind])
    assert re.search(rf"\b{case.argument}\b", str(raised.value)), raised.value


def trained() -> tuple[nn.Module, js.JointSparLARS]:
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(lag=1, distribution="bandit"))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


CALLS_AFTERWARDS: dict[str, Callable[[js.JointSparLARS], object]] = {
    "closure": lambda optimizer: optimizer.step(3),
    "max_norm": lambda optimizer: optimizer.step(max_norm="1"),
    "max_norm ": lambda optimizer: optimizer.step(max_norm=-1.0),
    "max_norm  ": lambda optimizer: optimizer.synchronize(max_norm=math.nan),
    "parameters": lambda optimizer: optimizer.set_trainable(3, True),
    "parameters ": lambda optimizer: optimizer.set_trainable([torch.ones(2)], True),
    "trainable": lambda optimizer: optimizer.set_trainable([], "yes"),
    "batches": lambda optimizer: next(optimizer.even_batches(5)),
    "state_dict": lambda optimizer: optimizer.load_state_dict(None),
    "state_dict ": lambda optimizer: optimizer.load_state_dict([]),
    "state_dict  ": lambda optimizer: optimizer.load_state_dict({"jointspar": 3}),
}


@pytest.mark.parametrize("argument", CALLS_AFTERWARDS)
def test_a_malformed_call_is_named_and_the_run_goes_on(argument: str) -> None:
    model, optimizer = trained()
    before = str(optimizer.state_dict()), [weight.clone() for weight in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=argument.strip()):
        CALLS_AFTERWARDS[argument](optimizer)
    assert str(optimizer.state_dict()) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def paths(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*place, key)
        yield from paths(entry, (*place, key))


SPOILS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "text": lambda _: "text",
    "empty": lambda _: torch.zeros(0),
    "longer": lambda value: torch.ones(7) if isinstance(value, torch.Tensor) else [value, value],
    "negative": lambda value: -1 - abs(value) if _is_number(value) else -1,
    "nan": lambda value: torch.full_like(value, math.nan) if _is_float(value) else math.nan,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dtype != torch.bool)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_state_with_any_entry_spoilt_is_loaded_and_trains_or_is_refused_and_changes_nothing(spoil: str) -> None:
    """Entries that any value may take (a momentum of NaN, say) load; none crashes later or leaves half of itself."""
    refused = 0
    for path in list(paths(trained()[1].state_dict())):
        model, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        entry = state
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = SPOILS[spoil](entry[path[-1]])
        before = str(optimizer.state_dict())
        try:
            optimizer.load_state_dict(state)
        except ValueError:
            refused += 1
            assert str(optimizer.state_dict()) == before, path
            continue
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    assert refused >= 20
