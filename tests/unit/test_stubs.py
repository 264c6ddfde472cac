"""The stubs say exactly what the compiled modules hold."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "python" / "jointspar_ext"


def stubtest(modules: list[str], folder: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """Compare compiled modules with their stubs, to which `more` is added."""
    package = folder / "stubs" / "jointspar_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # the real one imports torch, which would be analysed for half a minute
    for name in modules:
        (package / f"{name}.pyi").write_text((STUBS / f"{name}.pyi").read_text(encoding="utf-8") + more)
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *(f"jointspar_ext.{name}" for name in modules)],
        cwd=folder,  # the working folder comes first in both search paths
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "MYPYPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_stubs_match_the_compiled_modules_but_for_a_function_that_does_not_exist(tmp_path: Path) -> None:
    """_cuda is there where a CUDA compiler was found when the modules were built."""
    names = ["_core"] + ["_cuda"] * (find_spec("jointspar_ext._cuda") is not None)
    result = stubtest(names, tmp_path, "\ndef no_such_function() -> None: ...\n")
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    expected = [f"jointspar_ext.{name}.no_such_function" for name in names]
    assert [error.split()[1] for error in errors] == expected, result.stdout + result.stderr
