"""Where memory runs out an operation raises MemoryError, and the process and its arrays are whole."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The results fit into what is left; what the kernels need beside them does not.
PROGRAM = """
import resource, sys
import numpy as np
from jointspar import ops
name, megabytes = sys.argv[1], int(sys.argv[2])
size = 20_000_000
probabilities = np.full(size, 0.5)
call = {
    "sample_layers": lambda: ops.sample_layers(probabilities, seed=0, step=0),
    "project_probabilities": lambda: ops.project_probabilities(probabilities, budget=size / 2, p_min=0.1),
}[name]
ops.project_probabilities(np.zeros(10), budget=5.0, p_min=0.1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 10**6, before[1]))
try:
    call()
except MemoryError as error:
    print("refused:", type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert (probabilities == 0.5).all() and len(call()) == size
print("whole")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to know what is in use")
@pytest.mark.parametrize(("name", "megabytes"), [("sample_layers", 60), ("project_probabilities", 250)])
def test_a_kernel_that_gets_no_memory_raises_and_harms_nothing(name: str, megabytes: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JOINTSPAR_BACKEND": "native"}
    command = [sys.executable, "-c", PROGRAM, name, str(megabytes)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "whole"
    assert "refused: MemoryError std::bad_alloc" in ended.stdout  # the kernel's own, not NumPy's
