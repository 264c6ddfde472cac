"""Builds the extension modules into this tree, for an interpreter that jointspar is not installed in. No network.

`make test-gpu` and `make bench-gpu` run from the tree this way, with the packages that an interpreter has, or that a
folder of wheels brings, so that neither a virtual environment nor an index is needed where the GPU is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu-site"  # wheels unpacked for this interpreter alone
PACKAGES = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "pybind11": "pybind11"}
TEST_PACKAGES = {"pytest": "pytest", "hypothesis": "hypothesis", "pytest_timeout": "pytest-timeout"}


class CannotRun(Exception):
    """Something that the machine lacks, in words for its user."""


def search_path() -> str:
    """PYTHONPATH of a run from the tree; wheels come first."""
    entries = [str(SITE), str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(entry for entry in entries if entry)


def unpack_wheels(folder: Path) -> None:
    """Install the wheels of a folder beside the build, and nothing that they ask for."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise CannotRun(f"WHEELS={folder}: there are no wheels")
    options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
    run("unpacking the wheels", sys.executable, "-m", "pip", "install", "-q", *options, *map(str, wheels))


def check_packages(packages: dict[str, str]) -> None:
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise CannotRun(
            f"{sys.executable} lacks {', '.join(missing)}: install them, choose another interpreter (PYTHON=...), or "
            "put their wheels into a folder (WHEELS=...)"
        )


def check_gpu() -> str:
    """The name of the GPU."""
    import torch

    if torch.version.cuda is None:
        raise CannotRun(f"torch {torch.__version__} of {sys.executable} is built without CUDA (PYTHON=... chooses)")
    if not torch.cuda.is_available():
        raise CannotRun(f"torch {torch.__version__} finds no GPU on this machine")
    return torch.cuda.get_device_name()


def find_nvcc() -> str:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    raise CannotRun("no CUDA compiler: put nvcc on the PATH, or name it in CUDACXX")


def build(architectures: str) -> None:
    """jointspar_ext/_core and _cuda, by CMake; what is built already is not built again.

    architectures: as CMake takes them, "native" for the GPU at hand.
    """
    cmake = [sys.executable, "-m", "cmake"] if find_spec("cmake") else ["cmake"]
    if not find_spec("cmake") and shutil.which("cmake") is None:
        raise CannotRun("no CMake: pip install cmake, or WHEELS=...")
    folder = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python' / 'jointspar_ext'}",
        f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
        f"-DJOINTSPAR_CUDA_ARCHITECTURES={architectures}",
        "-DJOINTSPAR_CUDA_EXT=1",
        "-DJOINTSPAR_WERROR=ON",
    ]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    run("configuring", *cmake, "-S", str(ROOT), "-B", str(folder), *options)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    run("building", *cmake, "--build", str(folder), "--parallel", jobs)
    code = "import jointspar_ext._core, jointspar_ext._cuda as cuda; print(cuda.build_info)"
    run("importing what was built", sys.executable, "-c", code)


def run(what: str, *command: str) -> None:
    print(f"== {what}", flush=True)
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": search_path()}).returncode
    if code != 0:
        raise CannotRun(f"{what} failed with exit code {code}")


def prepare(packages: dict[str, str], *, wheels: str, architectures: str) -> None:
    """Wheels, packages, GPU, build: the cheap checks first. Raises CannotRun."""
    if wheels:
        unpack_wheels(Path(wheels).resolve())
    if SITE.is_dir():
        sys.path.insert(0, str(SITE))
    check_packages(packages)
    print(f"== on {check_gpu()}", flush=True)
    build(architectures)
