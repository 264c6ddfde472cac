"""Settings as JSON and back: what scheduler states and parameter groups are made of, without pickle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

_PAIRS, _COUNTER = "__pairs__", "__counter__"  # JSON objects have string keys only


def to_json(value: Any) -> Any:
    """Plain data for json.dumps; tensors and NumPy scalars of one element become numbers, tuples lists.

    Raises TypeError for anything that would not come back equal.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return value.item()
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
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if _PAIRS in value or _COUNTER in value:
            kind = Counter if _COUNTER in value else dict
            (pairs,) = value.values()
            return kind({from_json(key): from_json(item) for key, item in pairs})
        return {key: from_json(item) for key, item in value.items()}
    return value
