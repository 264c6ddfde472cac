"""The stubs say exactly what the compiled modules hold."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "jointspar_ext"


def stubtest(modules: list[str], stubs: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Compare compiled modules with their stubs below `stubs`."""
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *modules],
        cwd=elsewhere,  # the working folder comes first in both search paths
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(stubs)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_stubs_match_the_compiled_modules(tmp_path: Path) -> None:
    """_cuda is there where a CUDA compiler was found when the modules were built."""
    names = ["_core"] + ["_cuda"] * (find_spec("jointspar_ext._cuda") is not None)
    assert all((STUBS / f"{name}.pyi").exists() for name in names)
    result = stubtest([f"jointspar_ext.{name}" for name in names], ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_function_that_does_not_exist_is_found(tmp_path: Path) -> None:
    package = tmp_path / "stubs" / "jointspar_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_core.pyi").write_text((STUBS / "_core.pyi").read_text() + "\ndef no_such_function() -> None: ...\n")
    result = stubtest(["jointspar_ext._core"], package.parent, tmp_path)
    assert result.returncode != 0
    assert "no_such_function" in result.stdout
