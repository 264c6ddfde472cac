"""Packing half of ResNet-50's gradients into one buffer, with their norms, in float32 and in bfloat16.

`python bench/bench_pack_gradients.py [--threads 1 2]` alternates the variants and prints ratios;
`pytest bench/bench_pack_gradients.py` records times with pytest-benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pytest
import torch

from alternate import alternate, print_ratios
from jointspar.backends import native
from shapes import resnet50_shapes

SCALE = 2.0  # 1 / p of a layer that is drawn half of the time
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("mul_out", "cat_foreach_mul")


def variants(wire_dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every variant writes the same preallocated buffer and finds the norms; `copy` only copies, within torch."""
    torch.manual_seed(0)
    grads = [torch.randn(shape) for shape in resnet50_shapes()[::2]]
    flat_grads = [grad.flatten() for grad in grads]
    sizes = [grad.numel() for grad in grads]
    packed = torch.zeros(sum(sizes), dtype=wire_dtype)
    slices = list(packed.split(sizes))
    packed_float = torch.zeros(sum(sizes))
    float_slices = list(packed_float.split(sizes))
    scales = np.full(len(grads), SCALE)
    unpacked = [torch.zeros_like(grad) for grad in grads]  # not the gradients: they would double in each round

    def mul_out() -> None:
        torch._foreach_norm(grads)
        for grad, target in zip(flat_grads, slices, strict=True):
            torch.mul(grad, SCALE, out=target)

    def cat_foreach_mul() -> None:
        torch._foreach_norm(grads)
        torch.cat(flat_grads, out=packed_float)
        torch._foreach_mul_(float_slices, SCALE)
        if wire_dtype != torch.float32:
            packed.copy_(packed_float)

    return {
        "mul_out": mul_out,
        "cat_foreach_mul": cat_foreach_mul,
        "copy": lambda: torch._foreach_copy_(slices, flat_grads),
        "native": lambda: native.pack_gradients(grads, scales, np.array(sizes), packed),
        "native_squared_norms": lambda: native.squared_norms(grads),
        "native_unpack": lambda: native.unpack_gradients(packed, unpacked, False),
    }


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("variant", [*PEERS, "copy", "native"])
def bench_pack_gradients(benchmark, wire_dtype: str, variant: str) -> None:
    benchmark(variants(WIRE_DTYPES[wire_dtype])[variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        for name, wire_dtype in WIRE_DTYPES.items():
            medians_ms = alternate(variants(wire_dtype), rounds=options.rounds, cold=True)
            print_ratios(f"pack_gradients to {name}, {num_threads} threads", medians_ms, peers=PEERS)


if __name__ == "__main__":
    main()
