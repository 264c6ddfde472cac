"""What launchers tell a process of the others, by the variables that they set."""

from __future__ import annotations

import os

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH and relatives
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")  # PMIx alone tells no size
_SRUN_VARIABLE = "SLURM_STEP_NUM_TASKS"


def number(*names: str) -> int:
    """The largest number that these variables hold; 0 without any."""
    return max((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default=0)


def has_launcher() -> bool:
    """Whether an MPI's launcher has said anything, be it that there is one rank."""
    return any(name in os.environ for name in (*SIZE_VARIABLES, *RANK_VARIABLES))


def is_size_unknown() -> bool:
    """Whether the launcher tells a rank, but not how many there are."""
    return "PMIX_RANK" in os.environ and not any(name in os.environ for name in SIZE_VARIABLES)


def num_launched() -> int:
    """The least number of ranks that the launcher's variables speak of; 1 without a launcher."""
    if is_size_unknown():
        return 1 if _is_alone() else max(number(*RANK_VARIABLES) + 1, num_tasks())
    return max(number(*SIZE_VARIABLES), number(*RANK_VARIABLES) + 1, 1)


def num_tasks() -> int:
    """How many tasks srun started; 0 without it, and where each is meant to be alone."""
    return 0 if _is_alone() else number(_SRUN_VARIABLE)


def _is_alone() -> bool:
    """Whether the user says so, to whom srun's count means something else."""
    return os.environ.get("WORLD_SIZE") == "1"
