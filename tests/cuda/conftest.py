"""The fixtures of tests/conftest.py on a device: arrays in CUDA memory, and the backends that serve them.

Tests marked `cuda` are skipped where there is no GPU; JOINTSPAR_REQUIRE_CUDA=1 makes that a failure.
"""

from __future__ import annotations

import os

import pytest

import device_support
from device_support import CupyArrays
from jointspar import backends
from support import Arrays, TorchArrays


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture; all skips come from one line, so that pytest reports them as one."""
    reason = device_support.why_no_gpu() if item.get_closest_marker("cuda") else None
    if reason is not None and os.environ.get("JOINTSPAR_REQUIRE_CUDA") == "1":
        pytest.fail(f"JOINTSPAR_REQUIRE_CUDA=1, but: {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=backends.DEVICE_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each backend for device arrays; one that was not built or installed is a failure, not a skip."""
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["torch", "cupy"])
def library(request: pytest.FixtureRequest) -> Arrays:
    """Runs the test on the device arrays of each library."""
    return TorchArrays(device_support.DEVICE) if request.param == "torch" else CupyArrays()


@pytest.fixture
def device() -> str:
    """Where a test that is about torch puts its tensors."""
    return device_support.DEVICE
