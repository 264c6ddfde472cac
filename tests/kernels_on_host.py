"""The kernels of csrc/cuda as a library for the host, called by name with the arguments of a launch.

tests/cpp/cuda_on_host runs a kernel on the CPU, one fiber per thread. What a caller passes as the address of device
memory is here one of host memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
CSRC, ON_HOST, BUILD = ROOT / "csrc", ROOT / "tests" / "cpp" / "cuda_on_host", ROOT / "build" / "kernels-on-host"


class KernelsOnHost:
    """A library of the kernels that these expressions name, as NVRTC takes them."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self._library = ctypes.CDLL(str(_built(_source_of(expressions))))

    def run(self, expression: str, num_blocks: int, num_threads: int, arguments: Sequence[np.generic]) -> None:
        """Raises KeyError for a kernel that is not in the library, TypeError for arguments of other sizes."""
        memory = [np.array([argument]) for argument in arguments]
        addresses = (ctypes.c_void_p * len(memory))(*(array.ctypes.data for array in memory))
        sizes = (ctypes.c_size_t * len(memory))(*(array.itemsize for array in memory))
        status = self._library.run_kernel(expression.encode(), num_blocks, num_threads, addresses, sizes, len(memory))
        if status == 1:
            raise KeyError(expression)
        if status == 2:
            raise TypeError(f"{expression}: the arguments have other sizes than the kernel's parameters")


def _source_of(expressions: Sequence[str]) -> str:
    headers = "".join(f'#include "cuda/{path.name}"\n' for path in sorted((CSRC / "cuda").glob("*_kernel.cuh")))
    entries = "".join(f'    {{"{name}", named<&{name}>()}},\n' for name in expressions)
    return (
        f'#include "call_by_name.h"\n{headers}'
        f"const std::unordered_map<std::string, NamedKernel> kKernels = {{\n{entries}}};\n"
    )


def _built(source: str) -> Path:
    """The library, compiled again only after a change of what it is made from."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the kernels are not compiled for the host")
    headers = sorted(path for folder in (CSRC, ON_HOST) for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256(source.encode() + b"".join(path.read_bytes() for path in headers)).hexdigest()[:16]
    library = BUILD / f"{digest}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        path = BUILD / f"{digest}.{os.getpid()}.cpp"
        path.write_text(source)
        partial = BUILD / f"{digest}.{os.getpid()}.partial.so"
        command = [
            compiler, "-std=c++17", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-I{ON_HOST}", f"-I{CSRC}",
            f"-I{CSRC / 'include'}", str(path), str(ON_HOST / "cuda_on_host.cpp"), "-o", str(partial),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        partial.replace(library)
        path.unlink()
    return library
