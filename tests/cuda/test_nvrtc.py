"""NVRTC, which compiles kernels at run time, accepts the device code as it stands. It needs no GPU and no driver."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import nvrtc

CSRC = Path(__file__).parents[2] / "csrc"
TYPES = ("float", "double", "jointspar::BFloat16", "jointspar::Float16")
PAIRS = tuple(itertools.product(TYPES, repeat=2))
# Kernels that are templates, as a caller of NVRTC names them.
EXPRESSIONS = {
    "pack_kernel.cuh": [f"pack_gradients_kernel<{a}, {b}>" for a, b in PAIRS],
    "unpack_kernel.cuh": [f"unpack_gradients_kernel<{a}, {b}, true>" for a, b in PAIRS]
    + [f"add_packed_kernel<{a}>" for a in TYPES],
    "squared_norms_kernel.cuh": ["squared_norms_kernel<jointspar::NormRecord>"],
    "lars_update_kernel.cuh": [f"lars_update_kernel<{a}, {b}>" for a, b in PAIRS],
    "sgd_update_kernel.cuh": [f"sgd_update_kernel<{a}, {b}>" for a, b in PAIRS],
}
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    f"--include-path={CSRC}",
    f"--include-path={CSRC / 'include'}",
)


def compiled(source: str, expressions: list[str], architecture: str) -> bytes:
    options = (*OPTIONS, f"--gpu-architecture={architecture}")
    cubin, log = nvrtc.compile_to_cubin(source, "kernels.cu", expressions, options)
    assert log.strip() == ""
    return cubin


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").glob("*_kernel.cuh")), ids=lambda path: path.stem)
def test_nvrtc_compiles_every_kernel(path: Path) -> None:
    expressions = [f"jointspar::{name}" for name in EXPRESSIONS.get(path.name, ())]
    cubin = compiled(f'#include "cuda/{path.name}"\n', expressions, "sm_90")
    kernels = nvrtc.kernels_of(path)
    assert kernels, "no kernel found in the file"
    for kernel in kernels:
        assert kernel.encode() in cubin, f"{kernel} is a template without an entry in EXPRESSIONS"


def test_nvrtc_refuses_host_code() -> None:
    with pytest.raises(RuntimeError, match="vector"):
        compiled("#include <vector>\n", [], "sm_90")
