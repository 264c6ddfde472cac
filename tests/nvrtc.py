"""NVRTC, NVIDIA's run-time compiler, through ctypes: it needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

import pytest


@functools.cache
def library() -> ctypes.CDLL:
    """The wheel's library, else the system's; skips the test where there is none."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:  # the library opens this one by its plain name, which finds it once it is loaded
        if re.fullmatch(r"libnvrtc-builtins\.so\.[\d.]+", file.name):
            ctypes.CDLL(str(file.locate()))
    found = [str(file.locate()) for file in files if re.fullmatch(r"libnvrtc\.so\.\d+", file.name)]
    name = found[0] if found else ctypes.util.find_library("nvrtc")
    if name is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")
    loaded = ctypes.CDLL(name)
    loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
    return loaded


def compile_to_cubin(source: str, name: str, expressions: Sequence[str], options: Sequence[str]) -> tuple[bytes, str]:
    """The machine code of `source` with the templates that `expressions` name, and the compiler's log.

    Raises RuntimeError with the log where the compiler refuses.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        for expression in expressions:
            check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        log = read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
        check(status, log)
        return read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def read(program: ctypes.c_void_p, get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer) -> bytes:
    size = ctypes.c_size_t()
    check(get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(get(program, buffer))
    return buffer.raw


def check(status: int, log: str = "") -> None:
    if status != 0:
        raise RuntimeError(f"NVRTC: {library().nvrtcGetErrorString(status).decode()}\n{log}")


def kernels_of(path: Path) -> set[str]:
    """Names of the kernels that a source file defines."""
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", path.read_text()))
