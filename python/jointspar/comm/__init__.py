"""Transports: `world()` finds the one that this process was launched under."""

from __future__ import annotations

import os
import sys

from jointspar.comm.launched import has_launcher, is_size_unknown, num_launched, num_tasks, number
from jointspar.comm.local import LocalTransport, local
from jointspar.comm.mpi import mpi
from jointspar.comm.mpi_library import check_running, is_running, load_mpi, size_of_world
from jointspar.comm.simulated import current_rank, run_simulated
from jointspar.comm.torch_dist import is_running as is_torch_dist_running
from jointspar.comm.torch_dist import torch_dist
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError

__all__ = ["local", "mpi", "run_simulated", "torch_dist", "world"]

_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # RANK and WORLD_SIZE may also be set by hand, under mpirun too

_world: Transport | None = None


def world() -> Transport:
    """The transport of the launcher at hand: MPI under mpirun or srun, gloo under torchrun, else a single process.

    The same object on every call until it is closed, so that it may stand as a default argument; inside `run_simulated`
    that of the simulated rank. A single process that has been given others since (torch.distributed initialised, or a
    fork whose child sets RANK and WORLD_SIZE) gets their transport at the next call. A torchrun that was itself started
    by mpirun or srun, one a node, counts. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand, or
    torch.distributed initialised by the program, do as torchrun does, unless an MPI launcher is there. A plain single
    process, or a launcher that says 1 rank, imports no MPI and starts no group. Raises JointSparError when the launcher
    started several ranks but mpi4py is missing, its MPI does not run or is another than the launcher's, or WORLD_SIZE
    speaks of several ranks without the rest, or srun started several tasks that it tells nothing of each other (each
    rank would then train alone).
    """
    global _world
    rank = current_rank()
    if rank is not None and not rank.is_closed:
        return rank
    if _world is None or _world.is_closed:
        _world = _make_world()
    elif isinstance(_world, LocalTransport):
        now = _make_world()
        _world = _world if isinstance(now, LocalTransport) else now  # one that failed stays so
    return _world


def _make_world() -> Transport:
    num_torch = number("WORLD_SIZE")
    if num_torch > 1 and _TORCHRUN_VARIABLE in os.environ:
        return torch_dist()
    if num_launched() > 1 or is_size_unknown() or _is_mpi_running():
        return _mpi_world()
    if num_torch > 1 or is_torch_dist_running():
        return torch_dist()
    if num_tasks() > 1 and num_torch == 0 and not has_launcher():
        raise JointSparError(
            f"srun started {num_tasks()} tasks and tells none of the others, so each would train "
            "alone: use srun --mpi=pmix (or pmi2, as the MPI was built), or mpirun. Where the MPI finds its ranks "
            "otherwise, comm=jointspar.comm.mpi(); for tasks that are meant to be alone, WORLD_SIZE=1"
        )
    return local()


def _mpi_world() -> Transport:
    try:
        mpi_module = load_mpi()
        check_running(mpi_module)  # else asking for its world would end the process
    except JointSparError as error:
        if num_launched() == 1:  # a batch system's single task
            return local()
        raise JointSparError(f"the launcher started {num_launched()} or more ranks, but {error}") from error
    return mpi() if size_of_world(mpi_module) > 1 else local()


def _is_mpi_running() -> bool:
    """Whether the program itself has loaded a parallel MPI, whatever its launcher sets."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and is_running(module) and module.COMM_WORLD.Get_size() > 1
