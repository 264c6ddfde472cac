"""How a job of several ranks is started on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

# On these a rank asks all to stop in order. mpirun passes the second on, but lets ranks only a second after the first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Open MPI refuses root, and more ranks than cores, unless told otherwise; MPICH knows none of these variables.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def find_launcher() -> str | None:
    """The mpirun beside this Python, as the wheels install it, else the first on PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def job_environment() -> dict[str, str]:
    """This process's environment, in which mpirun also starts jobs of root, and of more ranks than cores."""
    return _OPEN_MPI | os.environ


def train_command() -> list[str]:
    """What runs `jointspar train` with this interpreter; flags follow."""
    return [sys.executable, "-m", "jointspar", "train"]
