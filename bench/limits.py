"""The machine's limit for an operation: a kernel that moves the same bytes and does nothing else, from limits.cpp."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from operation import MOMENTUM_BYTES, Traffic

SOURCE = Path(__file__).with_name("limits.cpp")
ALIGNMENT = 32  # elements of all arrays come in multiples of this: whole blocks of limits.cpp in every dtype


def compiler() -> str | None:
    """The C++ compiler at hand, or None: then there are no limits and no torch.compile."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


@functools.cache
def library() -> ctypes.CDLL:
    """limits.cpp, compiled for this machine. Its OpenMP runtime is the one that torch has loaded."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "limits.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        if platform.machine() == "x86_64":
            flags.append("-mprefer-vector-width=256")  # wider registers move less on Zen 4 (NOTES.md)
        subprocess.run([compiler() or "c++", *flags, str(SOURCE), "-o", str(built)], check=True)
        loaded = ctypes.CDLL(str(built))
    loaded.limit_read.restype = ctypes.c_uint64
    return loaded


class Limit:
    """A call that moves the bytes of `traffic` between flat arrays of its own; streaming copies go around the cache."""

    def __init__(self, traffic: Traffic, *, streaming: bool) -> None:
        self.size = -(-traffic.num_elements // ALIGNMENT) * ALIGNMENT
        self.read = self._filled(traffic.read_bytes)
        self.written = self._filled(traffic.written_bytes)
        self.momenta = self._filled(MOMENTUM_BYTES if traffic.pattern == "update" else 0)
        read, written, momenta = (ctypes.c_void_p(part.data_ptr()) for part in (self.read, self.written, self.momenta))
        read_bytes, written_bytes = ctypes.c_int64(self.read.nbytes), ctypes.c_int64(self.written.nbytes)
        size, num_words = ctypes.c_int64(self.size), ctypes.c_int64(self.read.nbytes // 8)
        kernels = library()
        self._kernel, self._arguments = {
            "copy": (kernels.limit_copy, (read, written, read_bytes, written_bytes, ctypes.c_int(streaming))),
            "update": (kernels.limit_update, (written, momenta, read, size, ctypes.c_int64(traffic.written_bytes))),
            "add": (kernels.limit_add, (written, read, ctypes.c_int64(self.read.nbytes // 2))),
            "read": (kernels.limit_read, (read, num_words)),
        }[traffic.pattern]

    def _filled(self, element_bytes: int) -> torch.Tensor:
        """Written once, so that no page is touched first while the time is taken."""
        return torch.ones(self.size * element_bytes, dtype=torch.uint8)

    def __call__(self) -> object:
        return self._kernel(*self._arguments)
