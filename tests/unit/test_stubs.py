"""_core.pyi says exactly what the compiled module holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stubs_match_the_compiled_module() -> None:
    search_path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "jointspar_ext._core", "--mypy-config-file", str(ROOT / "pyproject.toml")],
        env={**os.environ, "PYTHONPATH": search_path, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
