"""Starts jobs of several ranks, under the mpirun and torchrun that belong to the running interpreter."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import warm_python

_ROOT = Path(__file__).resolve().parents[1]
_RUN = """
import runpy, sys
for program in sys.argv[1:]:
    path, _, name = program.partition(":")
    runpy.run_path(path)[name]()
"""
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
    """A job that is over."""

    code: int | None  # None: it had to be ended from here
    output: str
    ended: float  # time.time()
    orphans: int = 0  # processes that were there a second after the launcher had ended

    def seconds_after(self, mark: str) -> float:
        """From the moment when a rank printed "<mark> <time.time()>" to the end of the job."""
        return self.ended - max(float(seconds) for seconds in re.findall(rf"{mark} (\d+\.\d+)", self.output))


def find_mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def end_job(mark: str) -> int:
    """Kill what a job left, known by its environment: launchers put ranks in groups and sessions of their own.

    Returns how many processes that were.
    """
    left = _processes(mark)
    for process in left:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def _processes(mark: str) -> list[int]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            if mark.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def run_job(command: list[str], timeout: float, env: dict[str, str] | None = None) -> Finished:
    """A job that must end by itself: fails the test where it does not."""
    job = try_job(command, timeout, env)
    if job.code is None:
        pytest.fail(f"the job did not end within {timeout} s\n{job.output}")
    return job


def environment(**changes: str) -> dict[str, str]:
    """This process's, for children that are to find the project, installed or not."""
    paths = [str(_ROOT / folder) for folder in ("python", "", "tests", "tests/faults", "bench")]
    paths.append(os.environ.get("PYTHONPATH", ""))
    return {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


def try_job(command: list[str], timeout: float, env: dict[str, str] | None = None) -> Finished:
    """A job with an end, one way or the other."""
    mark = uuid.uuid4().hex
    job = subprocess.Popen(
        command,
        env=environment(**(env or {}), JOINTSPAR_TEST_JOB=mark),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    code, orphans = None, 0
    try:
        output, _ = job.communicate(timeout=timeout)
        code, ended = job.returncode, time.time()
        until = ended + 1.0
        while _processes(mark) and time.time() < until:
            time.sleep(0.02)
    except subprocess.TimeoutExpired:
        ended = time.time()
        end_job(mark)
        output, _ = job.communicate()
    finally:
        orphans = end_job(mark)
    return Finished(code, output, ended, orphans)


def find_launcher(name: str) -> list[str]:
    """The command that starts ranks, up to their number; skips the test where there is none."""
    if name == "torchrun":
        return warm_python.command(*["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"])
    path = find_mpirun()
    if find_spec("mpi4py") is None or path is None:
        # `make test` installs an MPI, so there its absence is a failure
        absent = pytest.fail if os.environ.get("JOINTSPAR_REQUIRE_MPI") else pytest.skip
        absent("mpi4py is not installed, or no mpirun beside the interpreter or on PATH")
    assert path is not None
    return [path, "-n"]


def command_on_ranks(
    launcher: list[str], n: int, programs: list[str], python: Sequence[str] = (sys.executable,)
) -> list[str]:
    """The command that runs each "path:function" on n ranks, one after the other."""
    return [*launcher, str(n), *python, "-c", _RUN, *programs]


def run_on_ranks(
    launcher: list[str], n: int, programs: list[str], timeout: float, env: dict[str, str] | None
) -> Finished:
    """In interpreters that have torch already; see `warm_python`."""
    return run_job(command_on_ranks(launcher, n, programs, warm_python.command()), timeout, env)
