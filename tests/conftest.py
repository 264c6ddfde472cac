"""Fixtures shared by all tests: every backend, every array library, one torch thread."""

from __future__ import annotations

import ast
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No tests of what does not exist: NumPy and CuPy have no bfloat16. Jobs of several ranks come first."""

    def exists(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("library") not in (NumpyArrays, "cupy") or "bfloat16" not in params.values()

    def place(item: pytest.Item) -> int:
        is_job = item.get_closest_marker("mpi") is not None
        return (0 if "/mpi/" in item.nodeid else 1) if is_job else 2

    items[:] = sorted(filter(exists, items), key=place)


_TOGETHER = ("app/test_loop.py", "cuda/test_build.py", "unit/test_cupy_jit.py")  # for their fixtures


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One folder's tests that start jobs of several ranks go to one worker, since such a job fills the machine.

    So do the cases of a test, and files whose fixtures take long.
    """
    if config.getoption("dist") != "load":  # what -n stands for
        return None
    from xdist.scheduler import LoadScopeScheduling

    class JobsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            function, names = test.partition("[")[0], _tests_with_jobs(config.rootpath / path)
            if names is None or function in names:
                return path.rpartition("/")[0]
            return path if path.endswith(_TOGETHER) else f"{path}::{function}"

    config.option.loadscopereorder = False  # the order of `pytest_collection_modifyitems` holds
    return JobsTogether(config, log)


@functools.cache
def _tests_with_jobs(path: Path) -> set[str] | None:
    """Names of a file's tests with the mark "mpi"; None: all of them. Only a worker knows the marks themselves."""

    def is_marked(node: ast.AST) -> bool:
        return "pytest.mark.mpi" in ast.unparse(node)

    statements = ast.parse(path.read_text(encoding="utf-8")).body
    values = [
        each.value
        for each in statements
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"
    ]
    if any(map(is_marked, values)):
        return None
    functions = [each for each in statements if isinstance(each, ast.FunctionDef)]
    return {each.name for each in functions if any(map(is_marked, each.decorator_list))}


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """One thread each, since ranks share the machine; whatever a test sets is put back."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT and SIGHUP act, here and in processes that the test starts; pytest's workers and nohup ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


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
