"""`make test-gpu`: what it runs, in which order and with which outcome; where something is missing, a message."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bench.gpu
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


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(bench.gpu.__path__)])
def test_every_module_of_the_benchmarks_can_be_imported(name: str) -> None:
    importlib.import_module(f"bench.gpu.{name}")


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


# Stands for pytest: says what it was given, and ends as the environment wants it to.
FAKE_PYTEST = """
import os, sys, time
tool = os.environ.get("TOOL", "alone" if "cuda and alone" in sys.argv else "tests")
print(tool, os.environ["JOINTSPAR_REQUIRE_CUDA"], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "cached"),
      *sys.argv[1:], flush=True)
time.sleep(60 if tool == os.environ.get("HANGS") else 0)
sys.exit(int(os.environ.get(f"CODE_{tool}", 0)))
"""
FAKE_SANITIZER = """#!/bin/sh
TOOL=$2; export TOOL
shift 4
exec "$@"
"""


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/cuda/run.py where all is there: the build, the tests and the sanitizer are stand-ins."""
    spec = importlib.util.spec_from_file_location("rehearsed_run", ROOT / "tests/cuda/run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rehearsed_run", module)  # where dataclass looks
    spec.loader.exec_module(module)
    (tmp_path / "fake_pytest.py").write_text(FAKE_PYTEST)
    (tmp_path / "compute-sanitizer").write_text(FAKE_SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as if there were no pytest-xdist
    monkeypatch.setattr(module, "PYTEST", (sys.executable, str(tmp_path / "fake_pytest.py")))
    monkeypatch.setattr(module.in_place, "prepare", lambda packages, wheels, architectures: None)
    return module


def run_it(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    code: int = module.main()
    return code


def test_the_tests_and_every_tool_are_run(
    rehearsed: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_it(rehearsed, monkeypatch, "--pytest-args", "-x -k lars") == 0
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    assert {log.stem: log.read_text() for log in (tmp_path / "logs").iterdir()} == {
        "tests": "tests 1 cached -m cuda and not alone tests/cuda -x -k lars\n",
        "alone": "alone 1 cached -m cuda and alone tests/cuda -x -k lars\n",
        **{tool: f"{tool} 1 1 tests/cuda/test_sanitized.py\n" for tool in tools},
    }
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[-6:]] == [[name, "passed"] for name in ("tests", *tools, "alone")]


def test_the_tests_run_in_several_processes_where_pytest_can(
    rehearsed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rehearsed, "find_spec", lambda name: name == "xdist")
    assert run_it(rehearsed, monkeypatch, "--tools", "--workers", "5") == 0
    assert (tmp_path / "logs" / "tests.log").read_text() == "tests 1 cached -n 5 -m cuda and not alone tests/cuda\n"


@pytest.mark.parametrize(
    ("of_tests", "of_alone", "expected"), [("0", "5", 0), ("5", "0", 0), ("5", "5", 1), ("1", "5", 1)]
)
def test_a_selection_may_leave_one_kind_of_tests_out_but_not_both(
    rehearsed: ModuleType, monkeypatch: pytest.MonkeyPatch, of_tests: str, of_alone: str, expected: int
) -> None:
    monkeypatch.setenv("CODE_tests", of_tests)
    monkeypatch.setenv("CODE_alone", of_alone)
    assert run_it(rehearsed, monkeypatch, "--tools", "--pytest-args", "-k something") == expected


def test_what_failed_is_told_and_the_rest_is_run(
    rehearsed: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CODE_tests", "1")
    monkeypatch.setenv("CODE_racecheck", "86")
    assert run_it(rehearsed, monkeypatch, "--tools", "memcheck", "racecheck") == 1
    printed = capfd.readouterr().out.splitlines()
    assert "racecheck 1 1 tests/cuda/test_sanitized.py" in printed  # the end of its log
    summary = printed[-4:]
    assert [line.split("(")[0].split(maxsplit=1)[1].strip() for line in summary] == [
        "failed with exit code 1", "passed", "found errors", "passed",
    ]  # fmt: skip


def test_a_tool_that_does_not_end_is_cut_off(
    rehearsed: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HANGS", "synccheck")
    assert run_it(rehearsed, monkeypatch, "--tools", "synccheck", "--minutes", "0.05") == 1
    assert "synccheck  cut off: its time was up" in capfd.readouterr().out
