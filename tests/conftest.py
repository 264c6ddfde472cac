"""Fixtures shared by all tests: every backend, every array library, one torch thread."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from jointspar import backends, ops
from support import Arrays, NumpyArrays, TorchArrays

# Function-scoped fixtures are fine: what a backend or a library fixture gives does not change between examples.
hypothesis.settings.register_profile(
    "jointspar",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("jointspar")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that start jobs of several ranks all go to one worker, since such a job fills the machine."""
    if config.getoption("dist") != "load":  # what -n stands for
        return None
    from xdist.scheduler import LoadScopeScheduling

    class JobsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "jobs" if _starts_jobs(config.rootpath / nodeid.partition("::")[0]) else nodeid

    return JobsTogether(config, log)


@functools.cache
def _starts_jobs(path: Path) -> bool:
    return "pytest.mark.mpi" in path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """One thread each, since ranks share the machine; whatever a test sets is put back."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, here and in processes that the test starts; pytest's workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fake_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for `jointspar reproduce`, whose runs end at once."""
    from fake_training import install

    install(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend; one that was not built or installed is a failure, not a skip."""
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[TorchArrays, NumpyArrays], ids=["torch", "numpy"])
def library(request: pytest.FixtureRequest) -> Arrays:
    """Runs the test on the arrays of each library."""
    return request.param()


@pytest.fixture
def device() -> str:
    """Where a test that is about torch puts its tensors."""
    return "cpu"


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20220717)
