"""The stubs say exactly what the compiled modules hold."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "jointspar_ext"


def stubtest(module: str, stubs: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Compare a compiled module with its stub below `stubs`."""
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", module],
        cwd=elsewhere,  # the working folder comes first in both search paths
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(stubs)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("name", ["_core", "_cuda"])
def test_stubs_match_the_compiled_module(name: str, tmp_path: Path) -> None:
    if name == "_cuda" and find_spec("jointspar_ext._cuda") is None:
        pytest.skip("no CUDA compiler was found when the modules were built")
    assert (STUBS / f"{name}.pyi").exists()
    result = stubtest(f"jointspar_ext.{name}", ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_function_that_does_not_exist_is_found(tmp_path: Path) -> None:
    package = tmp_path / "stubs" / "jointspar_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_core.pyi").write_text((STUBS / "_core.pyi").read_text() + "\ndef no_such_function() -> None: ...\n")
    result = stubtest("jointspar_ext._core", package.parent, tmp_path)
    assert result.returncode != 0
    assert "no_such_function" in result.stdout
