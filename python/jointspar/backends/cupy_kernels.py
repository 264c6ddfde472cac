"""The kernels of csrc/cuda, compiled at run time by NVRTC and launched through CuPy.

CuPy's own RawModule cannot be used: it adds -ftz=true to the options, which makes small float32 values zero, and its
cache of compiled kernels does not look into included files. So NVRTC is called as CuPy exposes it, and the compiled
kernels are kept in CuPy's cache folder (CUPY_CACHE_DIR, else ~/.cupy/kernel_cache) under a hash of all that they are
made from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cupy

from jointspar.errors import JointSparError
from jointspar.files import write_atomically

THREADS_PER_BLOCK = 256  # kThreadsPerBlock of common/device_chunks.h
_FOLDERS = ("common", "cuda", "include")  # of csrc


class Kernel(NamedTuple):
    """One kernel: its name in namespace jointspar, with its types, and the headers of csrc/cuda that define them."""

    name: str
    headers: tuple[str, ...]


class Queue(NamedTuple):
    """Where the work of a call goes."""

    device: int
    stream: Any  # cupy.cuda.Stream


class _Handle(NamedTuple):
    """A cudaStream_t that somebody else owns, by the CUDA stream protocol."""

    stream: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream  # version of the protocol, handle


def _stream_of(device: int, handle: int) -> Any:
    """CuPy's view of a stream. From 14.0 on its ExternalStream is deprecated, before there is nothing else."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Handle(handle))
    return cupy.cuda.ExternalStream(handle, device)


@contextlib.contextmanager
def queue_on(device: int, stream: int) -> Iterator[Queue]:
    """Makes the device, and the stream of this handle, CuPy's current ones for a call.

    Raises JointSparError while the stream is captured: a graph would need memory of its own, which CuPy cannot get
    without disturbing the capture.
    """
    with cupy.cuda.Device(device), _stream_of(device, stream) as current:
        if current.is_capturing():
            raise JointSparError(
                "a stream capture needs the compiled CUDA kernels: build jointspar where nvcc is found "
                "(JOINTSPAR_CUDA_EXT=1)"
            )
        yield Queue(device, current)


def launch(kernel: Kernel, num_blocks: int, num_threads: int, queue: Queue, *arguments: Any) -> None:
    """Put a kernel on the stream. arguments: NumPy scalars of exactly the kernel's types, pointers as uint64."""
    _loaded(kernel, queue.device)((num_blocks,), (num_threads,), arguments, stream=queue.stream)


@functools.cache
def sources() -> Path:
    """The folder with the CUDA sources: of the installed package, or of the checkout."""
    for folder in (Path(__file__).parents[1] / "csrc", Path(__file__).parents[3] / "csrc"):
        if (folder / "cuda" / "chunk_walk.cuh").is_file():
            return folder
    raise FileNotFoundError("the CUDA sources are missing from the jointspar package; install it again")


def source_of(kernel: Kernel) -> str:
    return "".join(f'#include "cuda/{header}"\n' for header in kernel.headers)


def expression_of(kernel: Kernel) -> str:
    """What NVRTC is asked to compile."""
    return f"jointspar::{kernel.name}"


def options_for(compute_capability: str) -> tuple[str, ...]:
    """--fmad=false: a * b + c rounds as on the CPU. compute_capability: "90" for 9.0."""
    return (
        "--std=c++17",
        "--fmad=false",
        f"--gpu-architecture=sm_{compute_capability}",
        f"--include-path={sources()}",
        f"--include-path={sources() / 'include'}",
    )


def compile_kernel(kernel: Kernel, compute_capability: str) -> tuple[str, bytes]:
    """(name in the machine code, machine code). Raises JointSparError with the compiler's log."""
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(source_of(kernel), "kernel.cu", (), ())
    try:
        nvrtc.addNameExpression(program, expression_of(kernel))
        try:
            nvrtc.compileProgram(program, options_for(compute_capability))
        except nvrtc.NVRTCError as error:
            raise JointSparError(f"{kernel.name}: {error}\n{nvrtc.getProgramLog(program)}") from error
        return nvrtc.getLoweredName(program, expression_of(kernel)), nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)


def compiled(kernel: Kernel, compute_capability: str) -> tuple[str, bytes]:
    """As `compile_kernel`, from the cache where it is there."""
    made_from = (_digest_of_sources(), kernel, compute_capability, cupy.cuda.nvrtc.getVersion())
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    cached = folder / f"jointspar-{key}.cubin"
    try:
        name, code = cached.read_bytes().split(b"\n", 1)
        return name.decode(), code
    except (OSError, ValueError):  # not there, or of no use
        pass
    lowered_name, code = compile_kernel(kernel, compute_capability)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lowered_name.encode() + b"\n" + code)
    return lowered_name, code


@functools.cache
def num_multiprocessors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """The kernel on the current device, `device`."""
    name, code = compiled(kernel, cupy.cuda.Device(device).compute_capability)
    module = cupy.cuda.function.Module()
    module.load(code)
    return module.get_function(name)


@functools.cache
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted((sources() / folder).rglob("*")):
            if path.suffix in (".h", ".cuh"):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(sources())} {len(content)}\n".encode() + content)
    return digest.hexdigest()
