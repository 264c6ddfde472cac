"""How a job of several ranks is started on this machine, and what a process is told of its place in one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jointspar.comm import launched

# On these a rank asks all to stop in order. mpirun passes the second on, but lets ranks only a second after the first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# On these what starts jobs ends them and itself; SIGHUP: its terminal is gone.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# What torchrun, Open MPI and MPICH tell the processes that they start; torchrun first, since srun may have started it.
RANK_VARIABLES = ("RANK", *launched.RANK_VARIABLES)
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

# Open MPI refuses root, and more ranks than cores, unless told otherwise; MPICH knows none of these variables.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@contextmanager
def ending_signals_raise(error_of: Callable[[int], BaseException]) -> Iterator[None]:
    """ENDING_SIGNALS, unless they are ignored (nohup), raise error_of(number) in whatever the main thread does."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise error_of(number)

    with ExitStack() as undo:
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                undo.callback(signal.signal, number, signal.signal(number, leave))
        yield


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


def threads_per_rank() -> int:
    """Torch threads of this rank when --threads is not given: OMP_NUM_THREADS, else its share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return max(1, usable_cores() // ranks_on_these_cores())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_on_these_cores() -> int:
    """Ranks on this host that may run on the same cores: a launcher may bind each to some of its own.

    All of them where the launcher's other children cannot be seen.
    """
    num_ranks = local_ranks()
    try:
        cores = [os.sched_getaffinity(child) for child in _children_of(os.getppid())]
        is_shared = [bool(each & os.sched_getaffinity(0)) for each in cores]
    except (OSError, AttributeError):  # one has gone, or is another user's; no Linux
        return num_ranks
    return num_ranks if len(cores) < num_ranks else min(num_ranks, max(1, sum(is_shared)))


def _children_of(process: int) -> list[int]:
    by_thread = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in by_thread for child in path.read_text().split()]


def local_ranks() -> int:
    """Ranks that the launcher started on this host; 1 without a launcher."""
    return _launcher_number(LOCAL_SIZE_VARIABLES, 1)


def local_rank() -> int:
    """This process's place among the ranks on this host; 0 without a launcher."""
    return _launcher_number(LOCAL_RANK_VARIABLES, 0)


def launcher_rank() -> int:
    """This process's rank by the launcher's variables, before any communication; 0 without a launcher."""
    return _launcher_number(RANK_VARIABLES, 0)


def _launcher_number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
