"""`make test-gpu` and its build step where something is missing: a message, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import in_place

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_the_tests_say_so_and_build_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "tests/cuda/run.py", "--tools"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("test-gpu: torch")
    assert "building" not in result.stdout


def test_an_unknown_tool_is_refused() -> None:
    command = [sys.executable, "tests/cuda/run.py", "--tools", "valgrind"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "valgrind" in result.stderr


def test_packages_that_are_missing_are_named_together() -> None:
    wanted = {"sys": "sys", "no_such_module_1": "first", "no_such_module_2": "second"}
    with pytest.raises(in_place.CannotRun, match=r"lacks first, second: .*WHEELS"):
        in_place.check_packages(wanted)


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(in_place.CannotRun, match="no wheels"):
        in_place.unpack_wheels(tmp_path)


def test_without_a_cuda_compiler_the_build_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    monkeypatch.setattr(in_place.shutil, "which", lambda name: None)
    with pytest.raises(in_place.CannotRun, match="nvcc"):
        in_place.find_nvcc()


def test_a_step_that_fails_is_named_with_its_exit_code() -> None:
    with pytest.raises(in_place.CannotRun, match="building failed with exit code 3"):
        in_place.run("building", sys.executable, "-c", "raise SystemExit(3)")
