"""Signatures of the compiled CUDA kernels, for the arrays of one device; see jointspar.backends.on_device.

device: CUDA device number; stream: cudaStream_t as an integer. Results are written into arrays of the caller.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    architectures: str

build_info: _BuildInfo

def sample_layers(
    probabilities: Any,
    active: Any,
    device: int,
    stream: int,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None = None,
) -> None: ...
def project_probabilities(
    log_weights: Any, probabilities: Any, device: int, stream: int, *, budget: float, p_min: float
) -> None: ...
def update_probabilities(
    probabilities: Any,
    squared_norms: Any,
    active: Any,
    drawn_probabilities: Any,
    gradient_bound: Any,
    updated: Any,
    device: int,
    stream: int,
    *,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool,
) -> None: ...
def pack_gradients(
    grads: Sequence[Any],
    scales: NDArray[np.float64],
    sizes: NDArray[np.int64],
    packed: Any,
    squared_norms: Any,
    device: int,
    stream: int,
) -> None: ...
def unpack_gradients(packed: Any, outs: Sequence[Any], add: bool, device: int, stream: int) -> None: ...
def add_packed(out: Any, packed: Any, device: int, stream: int) -> None: ...
def squared_norms(
    grads: Any, sizes: NDArray[np.int64] | None, squared_norms: Any, device: int, stream: int
) -> None: ...
def lars_update(
    params: Sequence[Any],
    momenta: Sequence[Any],
    grads: Any,
    *,
    hyper: NDArray[np.float64],
    adapt: NDArray[np.bool_],
    nesterov: bool,
    skip_nonfinite: bool,
    param_norms: Any | None,
    grad_norms: Any | None,
    used_grad_norms: Any,
    param_norms_after: Any,
    device: int,
    stream: int,
) -> None: ...
def sgd_update(
    params: Sequence[Any],
    momenta: Sequence[Any],
    grads: Any,
    *,
    hyper: NDArray[np.float64],
    nesterov: bool,
    skip_nonfinite: bool,
    grad_norms: Any,
    device: int,
    stream: int,
) -> None: ...
