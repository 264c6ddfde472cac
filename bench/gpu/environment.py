"""What a measurement depends on: device, driver, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str) -> str:
    """The first line that a command prints; "unknown" where it does not run."""
    try:
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
        return lines.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def package_version(*names: str) -> str:
    """Of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def describe(module: str) -> dict[str, str]:
    """For the head of a report of `python -m module`. Needs a GPU."""
    import torch

    from jointspar.training.circumstances import commit

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA of torch": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "CuPy": package_version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "Python": platform.python_version(),
        "commit": commit() or os.environ.get("JOINTSPAR_COMMIT", "unknown"),  # of a tree that came without its history
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
    }
