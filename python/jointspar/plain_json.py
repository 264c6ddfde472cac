"""Settings as JSON and back: what scheduler states and parameter groups are made of, without pickle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

_PAIRS, _COUNTER = "__pairs__", "__counter__"  # JSON objects have string keys only
_NUMBER = "__number__"  # beside an empty _PAIRS, which has no second key otherwise: no dict of the user's looks like it
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHORT_FLOATS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_TENSORS = {f"torch.{name}": getattr(torch, name) for name in ("bool", *_INTEGERS, *_FLOATS, *_SHORT_FLOATS)}
_SCALARS: dict[str, Any] = {"numpy.float32": np.float32, "numpy.float16": np.float16}  # that round as no float does


def to_json(value: Any) -> Any:
    """Plain data for json.dumps. Tuples become lists, NumPy's scalars numbers, but for short floats.

    Those and tensors of one element keep their kind, by which what is computed from them is rounded; a tensor comes
    back in host memory. Raises TypeError for anything that would not come back equal.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and str(value.dtype) in _TENSORS:
        return {_PAIRS: [], _NUMBER: [str(value.dtype), value.tolist()]}  # nested as deep as it has dimensions
    if isinstance(value, np.generic):
        kind = f"numpy.{value.dtype.name}"
        return {_PAIRS: [], _NUMBER: [kind, value.item()]} if kind in _SCALARS else value.item()
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        is_plain = type(value) is dict and all(isinstance(key, str) for key in value)
        if is_plain and value.keys().isdisjoint((_PAIRS, _COUNTER)):
            return {key: to_json(item) for key, item in value.items()}
        kind = _COUNTER if isinstance(value, Counter) else _PAIRS
        return {kind: [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be saved: use numbers, strings, lists and dicts")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`. Raises ValueError, TypeError or RuntimeError for what that does not make."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_PAIRS, _NUMBER}:
            return _number(*value[_NUMBER])
        if _PAIRS in value or _COUNTER in value:
            kind = Counter if _COUNTER in value else dict
            (pairs,) = value.values()
            return kind({from_json(key): from_json(item) for key, item in pairs})
        return {key: from_json(item) for key, item in value.items()}
    return value


def _number(kind: Any, value: Any) -> Any:
    """A tensor of one element, from lists nested as deep as it has dimensions, or a NumPy scalar."""
    if kind in _SCALARS and isinstance(value, float):
        return _SCALARS[kind](value)
    if kind not in _TENSORS:
        raise ValueError("a number is of an unknown kind")
    try:
        tensor = torch.tensor(value, dtype=_TENSORS[kind], device="cpu")
    except OverflowError as error:
        raise ValueError(f"a number of {kind}: {error}") from error
    if tensor.numel() != 1:
        raise ValueError(f"a number of {kind} has {tensor.numel()} elements")
    return tensor
