"""All that tests/unit says of the operations, on device arrays and by each backend for them.

A test holds on a device when it takes its arrays from the fixture `library` or puts its tensors on `device`, unless it
is marked `host`. Others look at values before the call, count threads or call a host backend by its name; what a device
does instead is in test_device_values.py.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

OPERATIONS = (
    "pack_gradients", "unpack_gradients", "squared_norms", "lars_update", "sgd_update", "sample_layers",
    "project_probabilities", "update_probabilities",
)  # fmt: skip

pytest.register_assert_rewrite(*(f"unit.test_{operation}" for operation in OPERATIONS))


def holds_on_a_device(test: Callable[..., Any]) -> bool:
    parameters = inspect.signature(test).parameters
    is_marked = any(mark.name == "host" for mark in getattr(test, "pytestmark", ()))
    return not is_marked and ("library" in parameters or "device" in parameters)


def tests_of(operation: str) -> type:
    """A class of the tests of one operation that hold on a device."""
    module = importlib.import_module(f"unit.test_{operation}")
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_") and holds_on_a_device(test)}
    return type(f"Test_{operation}", (), {name: staticmethod(test) for name, test in tests.items()})


for _operation in OPERATIONS:
    globals()[f"Test_{_operation}"] = tests_of(_operation)
