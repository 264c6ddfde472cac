"""Whether this MPI may be handed CUDA memory.

It is asked, then tried. A library that says yes and then touches device memory as if it were the host's ends its
process with a signal, so the trial runs in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any, NamedTuple

import torch

ENVIRONMENT_VARIABLE = "JOINTSPAR_USE_CUDA_MPI"
CHILD_SECONDS = 60
# What a launcher tells its ranks. Settings of the user's (OMPI_MCA_..., PMIX_MCA_...) are not among them.
_LAUNCHER_VARIABLE = re.compile(
    r"(OMPI|PMIX|PRTE)_(?!MCA_|ALLOW_)|OMPI_MCA_(orte_|ess|pmix|ras|plm|initial_wdir)|PMI_|HYDRA_|HYDI_|MPI_LOCAL"
)

# Asks by the names that Open MPI (and its relatives) and MPICH give the question, then sums device memory that a side
# stream is still writing when the event is recorded, and compares the numbers.
_PROBE = """
import ctypes, json, re
from mpi4py import MPI
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps if re.search(r"/libmpi[^/]*\\.so", line)}
says = None
for library in map(ctypes.CDLL, paths):
    if hasattr(library, "MPIX_Query_cuda_support"):
        says = bool(library.MPIX_Query_cuda_support())
    elif hasattr(library, "MPIX_GPU_query_support"):
        answer = ctypes.c_int(0)
        library.MPIX_GPU_query_support(0, ctypes.byref(answer))
        says = bool(answer.value)
print(json.dumps({"says": says}), flush=True)
if not says:
    raise SystemExit
import torch
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    torch.cuda._sleep(20_000_000)
    values = torch.arange(65536, dtype=torch.float32, device="cuda")
    total = torch.zeros_like(values)
    written = side.record_event()
written.synchronize()
MPI.COMM_SELF.Allreduce(values, total)
torch.cuda.synchronize()
print(json.dumps({"says": says, "is_right": bool(torch.equal(values, total))}), flush=True)
"""


class Verdict(NamedTuple):
    """Whether to hand CUDA memory to MPI, and why (not)."""

    is_usable: bool
    reason: str


def wanted() -> str:
    """What JOINTSPAR_USE_CUDA_MPI asks for: "0", "1" or "auto". Raises ValueError for anything else."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if text not in ("0", "1", "auto"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0, 1 or auto, not {text!r}")
    return text


@functools.cache
def decide() -> Verdict:
    """This process's verdict: what the variable forces, else what the trial shows (a few seconds, once a process)."""
    forced = wanted()
    if forced != "auto":
        return Verdict(forced == "1", f"{ENVIRONMENT_VARIABLE}={forced}")
    if not torch.cuda.is_available():
        return Verdict(False, "torch sees no CUDA device")
    return probe()


def probe() -> Verdict:
    """Ask this MPI and try it, in a process of its own without the launcher's variables.

    Alone it has nobody to sum with: whether the ranks get right sums, they try when they choose their exchange.
    """
    try:
        child = run_alone(_PROBE)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the trial did not end within {CHILD_SECONDS} s")
    return _judge(child.returncode, child.stdout, child.stderr)


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, which no launcher started. Raises TimeoutExpired."""
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHER_VARIABLE.match(name)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS,
        check=False,
    )  # fmt: skip


def last_json(stdout: str) -> dict[str, Any]:
    """The last JSON object that a process printed in a line; MPI libraries print lines of their own."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            with suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {}


def _judge(returncode: int, stdout: str, stderr: str) -> Verdict:
    found = last_json(stdout)
    if found.get("is_right"):
        return Verdict(True, "it says so, and a trial gave the right sum")
    if "is_right" in found:
        return Verdict(False, "it says it is CUDA-aware, but a trial gave a wrong sum")
    if found.get("says"):
        errors = [line.strip() for line in stderr.splitlines() if line.strip()]
        how = f"signal {-returncode}" if returncode < 0 else (errors[-1] if errors else f"exit code {returncode}")
        return Verdict(False, f"it says it is CUDA-aware, but a trial ended by {how}")
    if "says" in found:
        text = "says it was built without CUDA" if found["says"] is False else "has no way to ask"
        return Verdict(False, f"this MPI {text}")
    return Verdict(False, "MPI does not start in a process of its own")
