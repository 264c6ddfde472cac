"""Valid calls of every operation, and values that are wrong in the place of one of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

from support import NumpyArrays, TorchArrays

LIBRARIES = {"torch": TorchArrays(), "numpy": NumpyArrays()}
Arguments = dict[str, Any]


class Case(NamedTuple):
    op: str
    label: str
    argument: str  # what the message has to name
    library: str
    replace: Callable[[Any], Arguments]  # the array library -> replaced arguments


def float_arrays(arrays: Any, *counts: int, dtype: str = "float32") -> list:
    return [arrays.array(np.arange(1.0, count + 1.0), dtype) for count in counts]


def valid_arguments(op: str, arrays: Any) -> Arguments:
    """A call of `op` that works."""
    p = [0.5, 0.25, 0.75, 0.5]
    update = {
        "params": float_arrays(arrays, 4, 6),
        "momenta": float_arrays(arrays, 4, 6),
        "grads": float_arrays(arrays, 4, 6),
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    }
    return {
        "sample_layers": {"probabilities": arrays.array(p, "float64"), "seed": 1, "step": 2, "world_size": 4},
        "project_probabilities": {"log_weights": arrays.array(p, "float64"), "budget": 2.0, "p_min": 0.1},
        "update_probabilities": {
            "probabilities": arrays.array(p, "float64"),
            "squared_norms": arrays.array([1.0, 2.0, 3.0, 4.0], "float64"),
            "active": np.ones(4, bool),
            "gradient_bound": 1.0,
            "budget": 2.0,
            "p_min": 0.1,
            "bandit_lr": 0.05,
        },
        "pack_gradients": {"grads": float_arrays(arrays, 4, 6), "scales": [1.0, 2.0]},
        "unpack_gradients": {"packed": float_arrays(arrays, 10)[0], "outs": float_arrays(arrays, 4, 6)},
        "add_packed": {"out": float_arrays(arrays, 10)[0], "packed": float_arrays(arrays, 10)[0]},
        "squared_norms": {"grads": float_arrays(arrays, 4, 6)},
        "lars_update": {**update, "trust_coefficient": 1e-3, "eps": 1e-8},
        "sgd_update": update,
    }[op]


# Wrong wherever one number is wanted.

NOT_A_NUMBER = {
    "none": None,
    "text": "0.5",
    "complex": 1j,
    "object": object(),
    "dict": {},
    "bool": True,
    "nested": [[1.0]],
}
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "huge": 10**400}
NOT_WHOLE = {"none": None, "text": "1", "fraction": 1.5, "bool": True, "nan": math.nan, "list": [1]}


def fake_tensor() -> torch.Tensor:
    """What torch.compile traces with: a tensor without memory, as all wrapper subclasses are."""
    with FakeTensorMode():
        return torch.ones(4)


# Arrays of 4 elements that no operation on gradients may touch.
BAD_TORCH: dict[str, Callable[[], Any]] = {
    "strided": lambda: torch.arange(8.0)[::2],
    "expanded": lambda: torch.ones(1).expand(4),
    "column": lambda: torch.ones(4, 3)[:, 1],
    "gap": lambda: torch.ones(2, 3)[:, :2],
    "int64": lambda: torch.arange(4),
    "int8": lambda: torch.arange(4, dtype=torch.int8),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "complex64": lambda: torch.ones(4, dtype=torch.complex64),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(4, device="meta"),
    "sparse_coo": lambda: torch.ones(4).to_sparse(),
    "sparse_csr": lambda: torch.ones(2, 2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "mkldnn": lambda: torch.ones(4).to_mkldnn(),
    "negated": lambda: torch._neg_view(torch.ones(4)),
    "fake": fake_tensor,
    "zeros_without_memory": lambda: torch._efficientzerotensor((4,)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(3)]),
}
BAD_NUMPY: dict[str, Callable[[], Any]] = {
    "strided": lambda: np.arange(8, dtype=np.float32)[::2],
    "reversed": lambda: np.arange(4, dtype=np.float32)[::-1],
    "broadcast": lambda: np.broadcast_to(np.float32(1.0), 4),
    "gap": lambda: np.ones((2, 3), np.float32)[:, :2],
    "unaligned": lambda: np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32),
    "int64": lambda: np.arange(4),
    "uint8": lambda: np.arange(4, dtype=np.uint8),
    "bool": lambda: np.ones(4, bool),
    "complex128": lambda: np.ones(4, complex),
    "longdouble": lambda: np.ones(4, np.longdouble),
    "big_endian": lambda: np.ones(4, ">f4"),
    "objects": lambda: np.ones(4, object),
    "structured": lambda: np.zeros(4, [("a", "f4")]),
    "text": lambda: np.array(["1"] * 4),
    "dates": lambda: np.zeros(4, "datetime64[s]"),
}
BAD_ANY: dict[str, Callable[[], Any]] = {
    "text": lambda: "gradient",
    "number": lambda: 1.0,
    "list": lambda: [1.0, 2.0, 3.0, 4.0],
    "bytes": lambda: b"\0" * 16,
    "object": object,
    "dtype": lambda: torch.float32,
}


def read_only(count: int) -> np.ndarray:
    array = np.ones(count, np.float32)
    array.setflags(write=False)
    return array
