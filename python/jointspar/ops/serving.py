"""Which backend serves an operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from jointspar import backends
from jointspar.device_arrays import Place, place_of

Array = Any  # torch.Tensor, numpy.ndarray, cupy.ndarray or another array in CUDA memory
PerTensor = float | Sequence[float] | np.ndarray | torch.Tensor  # one number, or one a tensor

_chosen: ModuleType | None = None


def backend() -> ModuleType:
    """The module that serves the operations; chosen at the first call (see JOINTSPAR_BACKEND)."""
    global _chosen
    # OpenMP keeps its number of threads by thread; of torch.set_num_threads a thread hears when it asks torch first.
    torch.get_num_threads()
    if _chosen is None:
        _chosen = backends.choose()
    return _chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the operations on CPU arrays from one backend ("native", "numba", "reference") inside a with block.

    The choice is the process's: other threads see it too, and blocks that overlap in time restore each other's.
    """
    global _chosen
    before = _chosen
    _chosen = backends.load(name)
    try:
        yield
    finally:
        _chosen = before


def serving_of(array: Array | None) -> tuple[Any, Place | None]:
    """What serves operations on arrays like this one, and the CUDA device that they are on (None: the CPU)."""
    place = place_of(array)
    return (backend(), None) if place is None else (backends.device_backend(place, array), place)
