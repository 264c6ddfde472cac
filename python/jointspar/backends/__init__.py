"""Makers of the fused operations behind `jointspar.ops`, tried in the order of BACKENDS.

Every backend exports the same functions on arrays and NumPy vectors. `native` was compiled when jointspar was
installed, `numba` compiles itself at its first use, `reference` is the readable truth.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_MODULES = {"native": "native", "numba": "numba_cpu", "reference": "reference"}  # of this package, by backend
BACKENDS = tuple(_MODULES)
ENVIRONMENT_VARIABLE = "JOINTSPAR_BACKEND"

_loaded: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """Import one backend. Raises ValueError for an unknown name, ImportError where it is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)} (set by {ENVIRONMENT_VARIABLE})")
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return _loaded[name]


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


def name_of(backend: ModuleType) -> str:
    """The name that `load` gives this backend for."""
    return next(name for name, module in _MODULES.items() if backend.__name__ == f"{__name__}.{module}")
