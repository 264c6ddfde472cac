"""The CUDA sources, as far as a machine without a GPU can judge them: what nvcc and ptxas make of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import nvrtc

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
INSTALLED = ROOT / "build" / "extension"  # what `make` built the extension in: nothing is compiled twice
STREAMING = re.compile(
    r"(pack_gradients|unpack_gradients|add_packed|squared_norms|lars_rates|lars_update|sgd_update)_kernel"
)


class KernelReport(NamedTuple):
    """What ptxas says of one kernel for one architecture."""

    name: str
    architecture: str
    stack_bytes: int
    spilled_bytes: int
    registers: int


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack_bytes>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def reports_of(log: str) -> list[KernelReport]:
    return [
        KernelReport(
            match["name"],
            match["architecture"],
            int(match["stack_bytes"]),
            int(match["stores"]) + int(match["loads"]),
            int(match["registers"]),
        )
        for match in REPORT.finditer(log)
    ]


def compiles_as_by_default(folder: Path) -> bool:
    rules = folder / "build.ninja"
    return rules.exists() and "code=[compute_90]" in rules.read_text()


@pytest.fixture(scope="module")
def build() -> Path:
    """A build folder in which the CUDA sources are compiled, as they are now."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA sources are not compiled")
    folder = INSTALLED
    if not compiles_as_by_default(INSTALLED):  # JOINTSPAR_CUDA_EXT=0, or other architectures
        folder = ROOT / "build" / "cuda-tests"
        said = run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            "-DJOINTSPAR_BUILD_EXTENSION=OFF", "-DJOINTSPAR_CUDA_EXT=auto", "-DJOINTSPAR_WERROR=ON")  # fmt: skip
        if re.search("CUDA 12 or later: built|cannot compile with this host|No CUDA toolkit 12", said):
            pytest.skip("this nvcc cannot be used")
        assert compiles_as_by_default(folder), said
    run("cmake", "--build", folder, "--target", "jointspar_cuda")
    return folder


@pytest.fixture(scope="module")
def logs(build: Path) -> dict[str, str]:
    """What the compiler printed, by source file."""
    return {path.name.removesuffix(".o.log"): path.read_text() for path in build.rglob("*.cu.o.log")}


def run(*command: str | Path) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_cuda_source_is_compiled_for_each_architecture_without_a_warning(
    build: Path, logs: dict[str, str]
) -> None:
    assert sorted(logs) == sorted(path.name for path in CUDA.glob("*.cu"))
    assert {name: log for name, log in logs.items() if re.search("warning|error", log)} == {}
    commands = (build / "build.ninja").read_text()
    for code in ("sm_80", "sm_90", "compute_90"):
        assert re.search(rf"code=\[?{code}\]?", commands)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_streaming_kernels_keep_everything_in_registers(logs: dict[str, str]) -> None:
    reports = [report for log in logs.values() for report in reports_of(log) if STREAMING.search(report.name)]
    assert {STREAMING.search(report.name)[0] for report in reports} == {
        name for path in CUDA.glob("*_kernel.cuh") for name in nvrtc.kernels_of(path) if STREAMING.fullmatch(name)
    }
    assert {report.architecture for report in reports} == {"sm_80", "sm_90"}
    assert [report for report in reports if report.stack_bytes or report.spilled_bytes] == []
    most = {}
    for report in reports:
        kernel = (STREAMING.search(report.name)[0], report.architecture)
        most[kernel] = max(most.get(kernel, 0), report.registers)
    for (kernel, architecture), registers in sorted(most.items()):
        print(f"{kernel} {architecture}: at most {registers} registers")
    assert max(most.values()) <= 128


def test_reports_are_read_from_what_ptxas_prints() -> None:
    log = """ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90'
ptxas info    : Function properties for _Z3fooPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem
"""
    assert reports_of(log) == [KernelReport("_Z3fooPf", "sm_90", 16, 12, 40)]
