"""Makers of the fused operations behind `jointspar.ops`, tried in the order of BACKENDS.

Every backend exports the same functions on arrays and NumPy vectors. `reference` is the readable truth.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from jointspar.backends.on_device import OnDevice
from jointspar.device_arrays import Place

BACKENDS = ("native", "reference")
DEVICE_BACKENDS = {"native": "jointspar_ext._cuda", "cupy": f"{__name__}.cupy_jit"}
ENVIRONMENT_VARIABLE = "JOINTSPAR_BACKEND"

_loaded: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """Import one backend. Raises ValueError for an unknown name, ImportError where it was not built."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)} (set by {ENVIRONMENT_VARIABLE})")
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f"{__name__}.{name}")
    return _loaded[name]


def on_device(place: Place, array: Any) -> OnDevice:
    """What serves operations on arrays like this one. Raises RuntimeError where there are no CUDA kernels."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in DEVICE_BACKENDS:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced} serves arrays on the CPU only, not on cuda:{place.device}")
    reasons = []
    for name in [forced] if forced else DEVICE_BACKENDS:
        try:
            return OnDevice(_load_kernels(name), place, array)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError(
        "no CUDA kernels for arrays on a device: build jointspar where nvcc is found (JOINTSPAR_CUDA_EXT=1), or "
        f"install CuPy ({'; '.join(reasons)})"
    )


def _load_kernels(name: str) -> ModuleType:
    module = DEVICE_BACKENDS[name]
    if module not in _loaded:
        _loaded[module] = importlib.import_module(module)
    return _loaded[module]


def choose() -> ModuleType:
    """The backend that JOINTSPAR_BACKEND forces, else the first that imports."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        return load(forced)
    for name in BACKENDS[:-1]:
        try:
            return load(name)
        except ImportError:
            continue
    return load(BACKENDS[-1])
