"""What setup.py and CMake make of the settings of a build. Nothing is compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import jointspar

ROOT = Path(__file__).parents[2]


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build_ext(folder: Path, exit_status: int = 0, **variables: str) -> tuple[list[str], subprocess.CompletedProcess]:
    """The arguments that CMake gets to configure, and the result, where a stand-in ends with this status."""
    calls = folder / "calls"
    module = "_core" + sysconfig.get_config_var("EXT_SUFFIX")
    made = f'-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) mkdir -p "${{word#*=}}"; : > "${{word#*=}}/{module}"'
    loop = f'for word; do case "$word" in {made};; esac; done'
    script(folder / "cmake", f'printf "%s\\n" "$@" -- >> "{calls}"\n{loop}\nexit {exit_status}')
    names = ("JOINTSPAR_BUILD_DIR", "JOINTSPAR_BUILD_NATIVE", "JOINTSPAR_CUDA_ARCHITECTURES", "JOINTSPAR_WERROR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    folders = ["--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return calls.read_text().partition("\n--\n")[0].splitlines(), result


def test_a_failed_build_says_how_to_do_without(tmp_path: Path) -> None:
    _, result = build_ext(tmp_path, exit_status=1)
    assert result.returncode != 0
    assert "JOINTSPAR_BUILD_NATIVE=0" in result.stderr and "JOINTSPAR_CUDA_EXT=0" in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_of_the_environment_reach_cmake(tmp_path: Path) -> None:
    arguments, result = build_ext(tmp_path, JOINTSPAR_CUDA_ARCHITECTURES="80-real;90", JOINTSPAR_WERROR="1")
    assert result.returncode == 0, result.stderr
    assert {"-DJOINTSPAR_CUDA_ARCHITECTURES=80-real;90", "-DJOINTSPAR_WERROR=1"} <= set(arguments)


def test_without_settings_an_earlier_builds_architectures_are_forgotten(tmp_path: Path) -> None:
    arguments, _ = build_ext(tmp_path)
    assert {"-UJOINTSPAR_CUDA_ARCHITECTURES", "-DJOINTSPAR_WERROR=0"} <= set(arguments)


def configure(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no cmake and ninja")
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DJOINTSPAR_BUILD_EXTENSION=OFF", *options]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("options", "is_error"), [((), False), (("-DJOINTSPAR_WERROR=ON",), True)])
def test_warnings_are_errors_for_developers_only(tmp_path: Path, options: tuple[str, ...], is_error: bool) -> None:
    result = configure(tmp_path, "-DJOINTSPAR_CUDA_EXT=0", *options)
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert "-Wconversion" in rules
    assert ("-Werror" in rules) == is_error


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_an_nvcc_before_12_is_left_alone_unless_cuda_was_asked_for(tmp_path: Path, wanted: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to stand in for an older one")
    says = 'case "$*" in --version) echo "Cuda compilation tools, release 11.8, V11.8.89";; *) exec'
    old = script(tmp_path / "nvcc", f'{says} "{nvcc}" "$@";; esac')
    result = configure(tmp_path / "build", f"-DJOINTSPAR_CUDA_EXT={wanted}", CUDACXX=str(old))
    assert "is of release 11.8" in " ".join((result.stdout + result.stderr).split())
    assert (result.returncode == 0) == (wanted == "auto")
    assert ("built without CUDA kernels" in result.stdout) == (wanted == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["ON", "OFF"])
def test_spills_are_errors_for_developers(tmp_path: Path, wanted: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    result = configure(tmp_path, "-DJOINTSPAR_CUDA_EXT=1", f"-DJOINTSPAR_WERROR={wanted}")
    assert result.returncode == 0, result.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert "-warn-spills" in rules and ("-Werror=all-warnings" in rules) == (wanted == "ON")


def test_flags_that_drop_nan_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O2 -ffast-math")
    result = configure(tmp_path, "-DJOINTSPAR_CUDA_EXT=0")
    assert result.returncode != 0 and "CXXFLAGS has -ffast-math" in result.stderr


def test_the_version_has_one_value() -> None:
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None and project[1] == jointspar.__version__
    assert pytest.importorskip("jointspar_ext._core").build_info["version"] == jointspar.__version__


def test_a_wheel_holds_no_sources_but_those_that_are_compiled_at_run_time(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "-d", tmp_path / "lib"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    files = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    others = {file for file in files if not file.endswith(".py")}
    sources = {file for file in others if file.startswith("jointspar/csrc/")}
    assert {"jointspar/csrc/cuda/pack_kernel.cuh", "jointspar/csrc/include/jointspar/types.h"} <= sources
    assert others - sources == {
        "jointspar/py.typed",
        "jointspar/training/reproduce/paper.toml",
        "jointspar/training/reproduce/quick.toml",
        "jointspar/training/reproduce/reduced.toml",
        "jointspar/training/reproduce/report.html.jinja",
        "jointspar_ext/_core.pyi",
        "jointspar_ext/_cuda.pyi",
        "jointspar_ext/py.typed",
    }
