"""The architecture, enforced from the sources: imports go down only, and few files may touch MPI or pickle."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "jointspar"

# From the bottom up: a module imports only what stands before it, or its own package.
ORDER = (
    "errors", "jointspar_ext", "device_arrays", "arguments", "plain_json", "files", "backends", "ops", "telemetry",
    "model_state", "weight_flops", "schedule", "comm", "hyperparameters", "step", "learning", "replicas",
    "gradient_sum", "early_exchange", "gradient_exchange", "pipeline", "survivors", "optimizer_state", "base_optimizer",
    "optimizers", "checkpoint_files", "checkpoint", "training", "cli", "__main__",
)  # fmt: skip

# The reference and the checks of arguments, which hold no arithmetic; numba may import the checks alone.
REFERENCE = (
    "jointspar.backends.reference",
    "jointspar.backends.flat_arrays",
    "jointspar.backends.checked_calls",
    "jointspar.backends.host_calls",
)
NUMBA = "jointspar.backends.numba_"
CUPY = "jointspar.backends.cupy_"
INDEPENDENT_OF_NUMBA = ("jointspar.backends.reference", "jointspar.backends.native")

MPI_FILE = "jointspar.comm.mpi_library"
DISTRIBUTED_FILE = "jointspar.comm.torch_dist"

# mpi4py's lower-case methods pickle what they send and unpickle what a peer sent.
PICKLING_CALLS = {
    "bcast", "send", "ssend", "bsend", "rsend", "recv", "sendrecv", "isend", "issend", "ibsend", "irsend", "irecv",
    "mrecv", "imrecv", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan",
}  # fmt: skip
# torch.distributed's all_gather_object, broadcast_object_list and the like do the same, in any file.
PICKLING_NAME = re.compile(r"_object(_list)?$")
FORBIDDEN_IN_KERNELS = re.compile(r'^\s*#\s*include\s*[<"](Python\.h|pybind11/|torch/|ATen/|c10/|mpi\.h|numpy/)', re.M)


def imported_modules(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Absolute names of everything that `module` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            keep = len(parts) - node.level + is_package
            base = ".".join(parts[:keep] * bool(node.level) + ([node.module] if node.module else []))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def unit_of(module: str) -> str:
    """The entry of ORDER that a module of this project belongs to; "" for the package itself and for others."""
    parts = module.split(".")
    if parts[0] == "jointspar":
        return parts[1] if len(parts) > 1 else ""
    return parts[0] if parts[0] == "jointspar_ext" else ""


def broken_rules(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    problems = []
    for name in imported_modules(source, module, is_package):
        problems += [f"{module} imports {name}: {why}" for why in reasons_against(module, name)]
    return sorted(set(problems))


def reasons_against(module: str, name: str) -> Iterator[str]:
    unit, other = unit_of(module), unit_of(name)
    if unit and other in ORDER and unit != other and ORDER.index(other) > ORDER.index(unit):
        yield "imports go down only"
    if unit == "step":
        if other == "step" and stage_of(name) not in ("", stage_of(module)):
            yield "stages do not import each other"
        if other == "comm" and stage_of(module) != "exchange":
            yield "only step.exchange talks to comm"
    if module.startswith(REFERENCE) and not is_reference_or_outside(name):
        yield "the reference, and the checks that it shares, use no fast code of the project"
    if name.partition(".")[0] == "cupy" and not module.startswith(CUPY):
        yield "CuPy is imported where it serves, and nowhere else"
    if module.startswith(NUMBA) and (other == "jointspar_ext" or name.startswith(INDEPENDENT_OF_NUMBA)):
        yield "numba uses neither the compiled kernels nor the reference's arithmetic"
    if name.split(".")[0] == "numba" and not module.startswith(NUMBA):
        yield "only the numba backend may"
    if name.split(".")[0] == "mpi4py" and module != MPI_FILE:
        yield f"only {MPI_FILE} may"
    if name.startswith("torch.distributed") and module != DISTRIBUTED_FILE:
        yield f"only {DISTRIBUTED_FILE} may"
    if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve") or name == "torch.load":
        yield "nothing is unpickled"


def is_reference_or_outside(name: str) -> bool:
    own = name.startswith(REFERENCE) or name == "jointspar.backends"
    return own or (unit_of(name) == "" and name.split(".")[0] != "numba")


def stage_of(module: str) -> str:
    """The stage that a module under jointspar.step belongs to; "" for jointspar.step itself."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[:2] == ["jointspar", "step"] else ""


def pickling_calls(source: str) -> list[str]:
    """Calls that pickle what they send: torch.distributed's of objects anywhere, and mpi4py's lower-case methods.

    The latter in files that import mpi4py or what loads it; a class's own methods do not count.
    """
    names = list(imported_modules(source, "anything"))
    uses_mpi4py = any(name.split(".")[0] == "mpi4py" or name.startswith(MPI_FILE) for name in names)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if is_pickling(call, uses_mpi4py)]


def is_pickling(call: ast.expr, uses_mpi4py: bool) -> bool:
    name = call.attr if isinstance(call, ast.Attribute) else ast.unparse(call)
    if PICKLING_NAME.search(name) or ast.unparse(call) == "torch.load":
        return True
    is_method = isinstance(call, ast.Attribute) and ast.unparse(call.value) != "self"
    return uses_mpi4py and is_method and name in PICKLING_CALLS


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_there_are_sources_to_check() -> None:
    assert len(python_files("python/jointspar")) > 10
    assert len(list((ROOT / "csrc").rglob("*.h"))) > 5


@pytest.mark.parametrize("path", python_files("python/jointspar"), ids=lambda path: module_name(path))
def test_module_imports_only_what_it_may(path: Path) -> None:
    module, is_package = module_name(path), path.name == "__init__.py"
    assert unit_of(module) in ("", *ORDER), "a new module: give it its place in ORDER"
    assert broken_rules(path.read_text(), module, is_package) == []


def test_an_import_does_not_load_torchs_compiler() -> None:
    """Which takes a second, for a command that only prints its help as well."""
    code = "import sys, jointspar; sys.exit('torch._dynamo' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_no_file_calls_what_pickles_messages() -> None:
    found = {str(path): pickling_calls(path.read_text()) for path in python_files("python", "tests", "bench")}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_kernels_include_neither_python_nor_torch_nor_mpi() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert [str(path) for path in sources if FORBIDDEN_IN_KERNELS.search(path.read_text())] == []


def test_a_plain_chain_downwards_is_fine() -> None:
    assert broken_rules("from jointspar import ops\nfrom .. import errors", "jointspar.step.packing") == []
    assert broken_rules("from ...comm import Transport\nfrom . import ring", "jointspar.step.exchange.choose") == []
    assert broken_rules("from . import choose", "jointspar.step.exchange", is_package=True) == []
    assert broken_rules("import jointspar_ext._core", "jointspar.backends.native") == []
    assert broken_rules("import numba\nfrom .checked_calls import check_draw", "jointspar.backends.numba_cpu") == []
    assert broken_rules("from .checked_calls import check_draw", "jointspar.backends.reference") == []
    assert broken_rules("from mpi4py import MPI", MPI_FILE) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jointspar.ops", "from . import optimizers"),
        ("jointspar.ops", "from .step.packing import pack"),
        ("jointspar.step.packing", "import jointspar.training.loop"),
        ("jointspar.step.packing", "from . import sampling"),
        ("jointspar.step.packing", "from .sampling import draw"),
        ("jointspar.step.packing", "from ..step.exchange import ring"),
        ("jointspar.step.packing", "from ..comm import world"),
        ("jointspar.step.exchange.ring", "from ..packing import Layout"),
        ("jointspar.step.update", "def late():\n    from jointspar.optimizers import JointSparLARS"),
        ("jointspar.backends.native", "from .. import ops"),
        ("jointspar.backends.reference", "from . import native"),
        ("jointspar.backends.reference", "import jointspar_ext"),
        ("jointspar.backends.reference", "import numba"),
        ("jointspar.backends.reference", "from jointspar.backends import numba_cpu"),
        ("jointspar.backends.flat_arrays", "from ..arguments import vector"),
        ("jointspar.backends.checked_calls", "from jointspar.backends.numba_kernels import squared_norm"),
        ("jointspar.backends.numba_cpu", "from jointspar.backends import native"),
        ("jointspar.backends.numba_cpu", "from jointspar_ext._core import lars_update"),
        ("jointspar.backends.numba_probabilities", "from .reference_probabilities import random_bits"),
        ("jointspar.backends", "import numba"),
        ("jointspar.backends.on_device", "import cupy"),
        ("jointspar.device_arrays", "from cupy.cuda import Device"),
        ("jointspar.training.loop", "from ..cli import main"),
        ("jointspar.training.loop", "from mpi4py import MPI"),
        ("jointspar.optimizers", "import torch.distributed as dist"),
        ("jointspar.optimizers", "from torch import distributed"),
        ("jointspar.checkpoint", "import pickle"),
        ("jointspar.checkpoint", "from torch import load"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert broken_rules(source, module)


def test_a_pickling_call_is_found() -> None:
    source = "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"
    assert pickling_calls(source + "comm.Allreduce(a, b)\ncomm.Ibcast(a)") == []
    assert pickling_calls(source + "comm.bcast(a)\nMPI.COMM_WORLD.allreduce(1)") == [
        "comm.bcast", "MPI.COMM_WORLD.allreduce",
    ]  # fmt: skip
    loaded = "from jointspar.comm.mpi_library import load_mpi\nworld = load_mpi().COMM_WORLD\n"
    assert pickling_calls(loaded + "world.bcast(a)") == ["world.bcast"]
    assert pickling_calls("transport.allreduce(buffer)\njs.checkpoint.load(folder)") == []
    assert pickling_calls("import torch\ntorch.load(file)") == ["torch.load"]
    source = "import torch.distributed as dist\nfrom torch.distributed import gather_object\n"
    assert pickling_calls(source + "dist.all_reduce(a)\ndist.isend(a, 1)") == []
    assert pickling_calls(source + "dist.all_gather_object(a, b)\ngather_object(a)\ndist.send_object_list(a)") == [
        "dist.all_gather_object", "gather_object", "dist.send_object_list",
    ]  # fmt: skip


@pytest.mark.parametrize("header", ["<Python.h>", "<torch/extension.h>", '"mpi.h"', "<pybind11/pybind11.h>"])
def test_a_forbidden_include_is_found(header: str) -> None:
    assert FORBIDDEN_IN_KERNELS.search(f"#pragma once\n  # include {header}\n")


def test_no_native_source_uses_streams_of_cpp() -> None:
    """Where a module has a libstdc++ linked in and the process another, their locales mix, and reading crashes."""
    sources = [path for folder in ("csrc", "jointspar_ext") for path in (ROOT / folder).rglob("*.*")]
    assert len(sources) > 50
    header = re.compile(r"#include <(fstream|iostream|sstream|iomanip|locale|regex)>")
    is_native = {".cpp", ".h", ".cu", ".cuh"}
    assert [path.name for path in sources if path.suffix in is_native and header.search(path.read_text())] == []
