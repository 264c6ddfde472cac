"""What a run was made with: the processor, the versions and the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import jointspar
from jointspar import backends
from jointspar.training.launch import usable_cores

_CPU_INFO = Path("/proc/cpuinfo")
_NO_CODE = (":(exclude)bench/results", ":(exclude)*.md")


def circumstances() -> dict[str, Any]:
    """Of this process; no names of hosts. JSON values."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "jointspar": jointspar.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": backends.name_of(jointspar.ops.backend()),  # of arrays on the CPU
        "commit": commit(),
    }


def _processor() -> str:
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file is in, with "+" where code was changed since; None elsewhere."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *_NO_CODE],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout else "")
