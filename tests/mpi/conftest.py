"""Runs functions of the test files on several ranks, under each launcher."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import Finished, find_launcher, run_on_ranks

_CHECKS = ("test_transports.py:use_transport", "test_exchange.py:sum_everything", "test_header.py:agree_and_differ")


@pytest.fixture(scope="session")
def mpirun() -> str:
    return find_launcher("mpirun")[0]


@pytest.fixture(scope="session", params=["mpirun", "torchrun"])
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """Runs the test under each launcher, hence over each transport; see `find_launcher`."""
    return find_launcher(request.param)


@pytest.fixture
def run_ranks(launcher: list[str]) -> Callable[..., Finished]:
    """run_ranks(n, function, expect_code=0, timeout=60, env=None): run `function` on n ranks of one job.

    The function is looked up by name in its file, in fresh interpreters. expect_code None means any but 0.
    """

    def run(
        n: int,
        function: Callable[[], None],
        *,
        expect_code: int | None = 0,
        timeout: float = 60,
        env: dict[str, str] | None = None,
    ) -> Finished:
        job = run_on_ranks(launcher, n, [f"{inspect.getfile(function)}:{function.__name__}"], timeout, env)
        expected = "any but 0" if expect_code is None else expect_code
        is_expected = job.code != 0 if expect_code is None else job.code == expect_code
        assert is_expected, f"exit code {job.code}, expected {expected}\n{job.output}"
        return job

    return run


@pytest.fixture(scope="session", params=[1, 2, 3], ids=["1 rank", "2 ranks", "3 ranks"])
def checks(request: pytest.FixtureRequest, launcher: list[str]) -> Callable[[str], None]:
    """checks(name) holds that the function of that name went well on every rank.

    All of `_CHECKS` run in one job for each number of ranks, since the start of a job is what takes the time.
    """
    programs = [str(Path(__file__).with_name(program)) for program in _CHECKS]
    job = run_on_ranks(launcher, request.param, programs, 120, None)

    def check(name: str) -> None:
        missing = [rank for rank in range(request.param) if f"{name}: rank {rank} is done" not in job.output]
        assert not missing, f"ranks {missing} did not finish {name}\n{job.output}"
        assert job.code == 0, f"exit code {job.code}\n{job.output}"

    return check
