"""_core.pyi says exactly what the compiled module holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = ROOT / "jointspar_ext" / "_core.pyi"


def stubtest(stubs: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Compare the compiled module with jointspar_ext/_core.pyi below `stubs`."""
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "jointspar_ext._core"],
        cwd=elsewhere,  # the working folder comes first in both search paths
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(stubs)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_stubs_match_the_compiled_module(tmp_path: Path) -> None:
    assert STUB.exists()
    result = stubtest(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_function_that_does_not_exist_is_found(tmp_path: Path) -> None:
    package = tmp_path / "stubs" / "jointspar_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_core.pyi").write_text(STUB.read_text() + "\ndef no_such_function() -> None: ...\n")
    result = stubtest(package.parent, tmp_path)
    assert result.returncode != 0
    assert "no_such_function" in result.stdout
