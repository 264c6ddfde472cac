"""NVRTC, which compiles kernels at run time, accepts the device code as it stands. It needs no GPU and no driver."""

from __future__ import annotations

import ctypes
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*_kernel.cuh"))


def libnvrtc() -> ctypes.CDLL:
    """From the nvidia-cuda-nvrtc wheel (torch's CUDA builds bring it), a CUDA toolkit, or the loader's path."""
    folders = [Path(entry) / "nvidia" for entry in sys.path] + [Path("/usr/local")]
    patterns = ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*", "cuda*/lib64/libnvrtc.so")
    found = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    path = str(found[0]) if found else find_library("nvrtc")
    if path is None:
        pytest.skip("no libnvrtc: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(path)


def compile_log(source: Path, architecture: str) -> str:
    """What NVRTC has to say about a source: nothing where it is content."""
    nvrtc, program, size = libnvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    text, name = source.read_bytes(), source.name.encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None) == 0
    options = [f"-arch={architecture}", "-std=c++17", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() or f"status {status}" * bool(status)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_nvrtc_accepts_every_kernel(kernel: Path, architecture: str) -> None:
    assert compile_log(kernel, architecture) == ""


def test_nvrtc_refuses_host_code(tmp_path: Path) -> None:
    source = tmp_path / "host.cuh"
    source.write_text("#include <vector>\n")
    assert "vector" in compile_log(source, "sm_90")
