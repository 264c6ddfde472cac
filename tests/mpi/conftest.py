"""Runs functions of the test files on several ranks, under the mpirun that belongs to the running interpreter."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import runpy, sys
for program in sys.argv[1:]:
    path, _, name = program.partition(":")
    runpy.run_path(path)[name]()
"""
_CHECKS = ("test_mpi.py:use_transport", "test_exchange.py:sum_everything", "test_header.py:agree_and_differ")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "",  # else one print is several writes, and lines of ranks mix
    # Open MPI refuses root and more ranks than cores unless told; MPICH rejects the matching options, so variables.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass
class Finished:
    """A job that ended by itself."""

    code: int
    output: str
    ended: float  # time.time()

    def seconds_after(self, mark: str) -> float:
        """From the moment when a rank printed "<mark> <time.time()>" to the end of the job."""
        return self.ended - max(float(seconds) for seconds in re.findall(rf"{mark} (\d+\.\d+)", self.output))


def find_mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def end_session(session: int) -> None:
    """Kill what a job left: Open MPI's ranks are in process groups of their own, but stay in the session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            os.kill(int(stat.parent.name), signal.SIGKILL)


def run_job(command: list[str], timeout: float, env: dict[str, str] | None) -> Finished:
    paths = [str(_ROOT / "python"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
    job = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = job.communicate(timeout=timeout)
        ended = time.time()
    except subprocess.TimeoutExpired:
        end_session(job.pid)
        output, _ = job.communicate()
        pytest.fail(f"the job did not end within {timeout} s\n{output}")
    finally:
        end_session(job.pid)
    return Finished(job.returncode, output, ended)


@pytest.fixture(scope="session")
def mpirun() -> str:
    path = find_mpirun()
    if find_spec("mpi4py") is None or path is None:
        # `make test` installs an MPI, so there its absence is a failure
        absent = pytest.fail if os.environ.get("JOINTSPAR_REQUIRE_MPI") else pytest.skip
        absent("mpi4py is not installed, or no mpirun beside the interpreter or on PATH")
    return path


def run_on_ranks(mpirun: str, n: int, programs: list[str], timeout: float, env: dict[str, str] | None) -> Finished:
    return run_job([mpirun, "-n", str(n), sys.executable, "-c", _RUN, *programs], timeout, env)


@pytest.fixture
def run_ranks(mpirun: str) -> Callable[..., Finished]:
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
        job = run_on_ranks(mpirun, n, [f"{inspect.getfile(function)}:{function.__name__}"], timeout, env)
        expected = "any but 0" if expect_code is None else expect_code
        is_expected = job.code != 0 if expect_code is None else job.code == expect_code
        assert is_expected, f"exit code {job.code}, expected {expected}\n{job.output}"
        return job

    return run


@pytest.fixture(scope="session", params=[1, 2, 3], ids=["1 rank", "2 ranks", "3 ranks"])
def checks(request: pytest.FixtureRequest, mpirun: str) -> Callable[[str], None]:
    """checks(name) holds that the function of that name went well on every rank.

    All of `_CHECKS` run in one job for each number of ranks, since the start of a job is what takes the time.
    """
    programs = [str(Path(__file__).with_name(program)) for program in _CHECKS]
    job = run_on_ranks(mpirun, request.param, programs, 120, None)

    def check(name: str) -> None:
        missing = [rank for rank in range(request.param) if f"{name}: rank {rank} is done" not in job.output]
        assert not missing, f"ranks {missing} did not finish {name}\n{job.output}"
        assert job.code == 0, f"exit code {job.code}\n{job.output}"

    return check
