"""Which backend serves: what is missing is passed over in silence, what is broken is not."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from jointspar import backends
from jointspar.device_arrays import Place

SYMBOL = ImportError("undefined symbol: __cxa_call_terminate")


def cannot_import(monkeypatch: pytest.MonkeyPatch, failures: dict[str, ImportError]) -> None:
    """As if these modules raised that when they are imported, for the first time in this process."""
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name in failures:
            raise failures[name]
        return real(name)

    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends.importlib, "import_module", import_module)


def missing(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_a_compiled_module_that_does_not_load_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_import(monkeypatch, {"jointspar.backends.native": SYMBOL})
    with pytest.warns(RuntimeWarning, match=r"'native' does not load.*undefined symbol"):
        chosen = backends.choose()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose() is chosen
    assert backends.name_of(chosen) == "numba"


def test_a_module_that_misses_one_of_its_own_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"jointspar.backends.native": missing("jointspar_ext._core")}
    cannot_import(monkeypatch, {**failures, "jointspar.backends.numba_cpu": missing("llvmlite")})
    with pytest.warns(RuntimeWarning, match=r"'numba' does not load.*llvmlite") as caught:
        assert backends.name_of(backends.choose()) == "reference"
    assert len(caught) == 1


@pytest.mark.parametrize("package", ["jointspar_ext", "jointspar_ext._core"])
def test_what_was_not_compiled_or_installed_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    failures = {"jointspar.backends.native": missing(package), "jointspar.backends.numba_cpu": missing("numba")}
    cannot_import(monkeypatch, failures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.name_of(backends.choose()) == "reference"


@pytest.mark.parametrize("found", [None, ModuleSpec("jointspar_ext", None)], ids=["nothing", "a folder of sources"])
def test_an_installation_that_looks_for_compiled_modules_where_they_were_is_told_of(
    monkeypatch: pytest.MonkeyPatch, found: ModuleSpec | None
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    failures = {"jointspar.backends.native": missing("jointspar_ext._core")}
    cannot_import(monkeypatch, {**failures, "jointspar.backends.numba_cpu": missing("numba")})
    with pytest.warns(RuntimeWarning, match="'native' does not load.*install jointspar again") as caught:
        assert backends.name_of(backends.choose()) == "reference"
    assert len(caught) == 1


def test_cuda_kernels_that_do_not_load_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_import(monkeypatch, {"jointspar_ext._cuda": SYMBOL, "jointspar.backends.cupy_jit": missing("cupy")})
    with (
        pytest.warns(RuntimeWarning, match="'native' does not load"),
        pytest.raises(RuntimeError, match="no CUDA kernels"),
    ):
        backends.device_backend(Place(0, "torch"), None)
