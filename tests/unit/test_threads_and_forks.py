"""Threads of the program and children that it forks: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# How many OpenMP threads an operation starts in a thread of the program that never used torch.
THREADS = """
import os, threading
import numpy as np, torch
from jointspar import ops

def measure():
    before = len(os.listdir("/proc/self/task"))
    ops.squared_norms([values])
    print(len(os.listdir("/proc/self/task")) - before)

torch.set_num_threads(1)
values = np.ones(1_000_000, np.float32)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""
FORK = """
import os, time
from jointspar_ext import _core

first = _core.start_watch(100.0, "the parent's watch\\n")
if os.fork() == 0:
    {child}
    time.sleep(20)
    os._exit(3)
print(os.waitstatus_to_exitcode(os.wait()[1]))
_core.end_watch(first)
"""


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "JOINTSPAR_BACKEND": "native", **variables}
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_torchs_number_of_threads_holds_on_other_threads_of_the_program() -> None:
    assert run(THREADS, OMP_NUM_THREADS="2").stdout == "0\n"


@pytest.mark.parametrize(
    "child",
    [
        '_core.start_watch(0.2, "the child\'s watch\\n")',
        # The end of the parent's watch is none of the child's own.
        '_core.start_watch(0.5, "the child\'s watch\\n"); _core.end_watch(first)',
    ],
)
def test_the_watchdog_watches_a_forked_child(child: str) -> None:
    result = run(FORK.format(child=child))
    assert result.stdout == "1\n"
    assert result.stderr == "the child's watch\n"
