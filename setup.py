"""Builds the modules of jointspar_ext with CMake and adds the CUDA sources; the rest is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class BuildWithCudaSources(build_py):
    """Adds what jointspar.backends.cupy_kernels compiles at run time; in a checkout it finds csrc itself."""

    def run(self) -> None:
        if self.editable_mode:
            if not self.distribution.ext_modules:  # JOINTSPAR_BUILD_NATIVE=0: those of an earlier build would serve
                for module in Path(ROOT, "python", "jointspar_ext").glob("_c*.so"):
                    module.unlink()
            super().run()
            return
        shutil.rmtree(Path(self.build_lib, "jointspar"), ignore_errors=True)  # modules that a checkout has no more
        super().run()
        for path in sorted((ROOT / "csrc").rglob("*")):
            folder = path.relative_to(ROOT / "csrc").parts[0]
            if folder in ("common", "cuda", "include") and path.suffix in (".h", ".cuh"):
                target = Path(self.build_lib, "jointspar", path.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(path), str(target))


class CMakeBuild(build_ext):
    """Configures and builds all modules at once where setuptools expects the first.

    JOINTSPAR_CUDA_EXT is 0, 1 or auto; JOINTSPAR_CUDA_ARCHITECTURES names GPUs as CMAKE_CUDA_ARCHITECTURES does
    ("90-real", "native"); JOINTSPAR_WERROR=1 makes errors of warnings, for developers.
    JOINTSPAR_BUILD_DIR names a folder that outlives this build, so that the next one compiles only what changed.
    Elsewhere CMake forgets what it found before: pip removes the ninja of an isolated build with its environment.
    """

    def copy_extensions_to_source(self) -> None:
        """Editable: what this build has not made would be of an earlier one, of other sources."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            if not Path(self.build_lib, self.get_ext_filename(extension.name)).exists():
                Path(ROOT, "python", self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        if ext is not self.extensions[0]:
            return  # built with the first, where a CUDA compiler was found
        for module in self.extensions:  # of a build with other settings
            Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(os.environ.get("JOINTSPAR_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(min(os.cpu_count() or 1, 8)))
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build_dir),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DJOINTSPAR_CUDA_EXT={os.environ.get('JOINTSPAR_CUDA_EXT', 'auto')}",
            f"-DJOINTSPAR_WERROR={os.environ.get('JOINTSPAR_WERROR', '0')}",
        ]  # fmt: skip
        architectures = os.environ.get("JOINTSPAR_CUDA_ARCHITECTURES")  # without: not those of an earlier build
        name = "JOINTSPAR_CUDA_ARCHITECTURES"
        configure.append(f"-D{name}={architectures}" if architectures else f"-U{name}")
        if not os.environ.get("JOINTSPAR_BUILD_DIR"):
            (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
            for compilers in build_dir.glob("CMakeFiles/[0-9]*"):
                shutil.rmtree(compilers)
        if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ:
            configure += ["-G", "Ninja"]
        run(configure)
        run(["cmake", "--build", str(build_dir), "--target", "extensions", "--parallel", jobs])
        if not target.exists():
            raise CompileError(f"CMake has built no {target}: is CMAKE_GENERATOR one of several configurations?")


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"{error}\nThe kernels could not be compiled. With JOINTSPAR_WERROR=1, as `make test` sets it, warnings "
            "are errors (make WERROR=0 test). JOINTSPAR_CUDA_EXT=0 leaves those for GPUs out; with "
            "JOINTSPAR_BUILD_NATIVE=0 nothing is compiled, and numba or NumPy serve (pip install 'jointspar[numba]')."
        ) from None


def extensions() -> list[Extension]:
    """None with JOINTSPAR_BUILD_NATIVE=0: for the numba backend, where there is no compiler."""
    wanted = os.environ.get("JOINTSPAR_BUILD_NATIVE", "1")
    if wanted not in ("0", "1"):
        raise SystemExit(f"JOINTSPAR_BUILD_NATIVE must be 0 or 1, not {wanted!r}")
    core, cuda = (
        Extension("jointspar_ext._core", sources=[]),
        Extension("jointspar_ext._cuda", sources=[], optional=True),
    )
    return [core, cuda] if wanted == "1" else []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithCudaSources},
)
