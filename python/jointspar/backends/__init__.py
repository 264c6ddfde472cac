"""Makers of the fused operations behind `jointspar.ops`, tried in the order of BACKENDS.

Every backend exports the same functions on arrays and NumPy vectors. `native` was compiled when jointspar was
installed, `numba` compiles itself at its first use, `reference` is the readable truth.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from jointspar.backends.on_device import OnDevice
from jointspar.device_arrays import Place
from jointspar.errors import JointSparError, warn_user

# Modules by backend: of this package for arrays on the CPU; for CUDA arrays, what OnDevice calls.
_MODULES = {name: f"{__name__}.{module}" for name, module in (
    ("native", "native"), ("numba", "numba_cpu"), ("reference", "reference"),
)}  # fmt: skip
_DEVICE_MODULES = {"native": "jointspar_ext._cuda", "cupy": f"{__name__}.cupy_jit"}
BACKENDS = tuple(_MODULES)
DEVICE_BACKENDS = tuple(_DEVICE_MODULES)
ENVIRONMENT_VARIABLE = "JOINTSPAR_BACKEND"

# Modules that may be missing without a word: not compiled, or not installed.
_MAY_BE_MISSING = ("jointspar_ext", "jointspar_ext._core", "jointspar_ext._cuda", "numba")

_loaded: dict[str, ModuleType] = {}
_warned: set[str] = set()


def load(name: str) -> ModuleType:
    """Import one backend. Raises ValueError for an unknown name, ImportError where it is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)} (set by {ENVIRONMENT_VARIABLE})")
    return _import(_MODULES[name])


def choose() -> ModuleType:
    """The backend that JOINTSPAR_BACKEND forces, else the first that imports; "cupy" is about CUDA arrays only."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and (forced in BACKENDS or forced not in DEVICE_BACKENDS):
        return load(forced)
    for name in BACKENDS[:-1]:
        try:
            return load(name)
        except ImportError as error:
            _warn_if_broken(name, error)
    return load(BACKENDS[-1])


def device_backend(place: Place, array: Any) -> OnDevice:
    """What serves operations on arrays like this one. Raises JointSparError where there are no CUDA kernels."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in DEVICE_BACKENDS:
        raise JointSparError(
            f"{ENVIRONMENT_VARIABLE}={forced} serves arrays on the CPU only, not on cuda:{place.device}"
        )
    reasons = []
    names = [forced] if forced else list(DEVICE_BACKENDS)
    for name in names:
        try:
            return OnDevice(_import(_DEVICE_MODULES[name]), place, array)
        except ImportError as error:
            if name != names[-1]:
                _warn_if_broken(name, error)
            reasons.append(f"{name}: {error}")
    raise JointSparError(
        "no CUDA kernels for arrays on a device: build jointspar where nvcc is found (JOINTSPAR_CUDA_EXT=1), or "
        f"install CuPy ({'; '.join(reasons)})"
    )


def has_device_backend(name: str) -> bool:
    """Whether one of DEVICE_BACKENDS can be loaded here."""
    try:
        _import(_DEVICE_MODULES[name])
    except ImportError:
        return False
    return True


def _warn_if_broken(name: str, error: ImportError) -> None:
    """Once, where a backend is there and does not load: what takes its place is slower."""
    is_missing = isinstance(error, ModuleNotFoundError) and error.name in _MAY_BE_MISSING
    is_misplaced = is_missing and str(error.name).startswith("jointspar_ext") and not _has_own_package()
    if (is_misplaced or not is_missing) and name not in _warned:
        _warned.add(name)
        advice = "; install jointspar again, whose compiled modules have moved" if is_misplaced else ""
        warn_user(f"the backend {name!r} does not load, another is used: {error}{advice}", RuntimeWarning)


def _has_own_package() -> bool:
    """False in an editable installation of before that package moved: it finds a folder of sources, or nothing."""
    found = importlib.util.find_spec("jointspar_ext")
    return found is not None and found.origin is not None


def _import(module: str) -> ModuleType:
    if module not in _loaded:
        _loaded[module] = importlib.import_module(module)
    return _loaded[module]


def name_of(backend: ModuleType) -> str:
    """The name that `load` gives this backend for."""
    return next(name for name, module in _MODULES.items() if backend.__name__ == module)
