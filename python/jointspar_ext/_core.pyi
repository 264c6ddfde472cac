"""Signatures of the compiled kernels. Arrays: torch tensors or NumPy arrays on the CPU; see jointspar.ops."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    openmp: int
    simd: str

build_info: _BuildInfo

def sample_layers(
    probabilities: NDArray[np.float64],
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None = None,
) -> NDArray[np.bool_]: ...
def project_probabilities(log_weights: NDArray[np.float64], *, budget: float, p_min: float) -> NDArray[np.float64]: ...
def update_probabilities(
    probabilities: NDArray[np.float64],
    squared_norms: NDArray[np.float64],
    active: NDArray[np.bool_],
    *,
    drawn_probabilities: NDArray[np.float64],
    gradient_bound: float,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool,
) -> tuple[NDArray[np.float64], float]: ...
def pack_gradients(
    grads: Sequence[Any], scales: NDArray[np.float64], sizes: NDArray[np.int64], packed: Any
) -> NDArray[np.float64]: ...
def unpack_gradients(packed: Any, outs: Sequence[Any], add: bool) -> None: ...
def add_packed(out: Any, packed: Any) -> None: ...
def squared_norms(grads: Any, sizes: NDArray[np.int64] | None = None) -> NDArray[np.float64]: ...
def lars_update(
    params: Sequence[Any],
    momenta: Sequence[Any],
    grads: Any,
    *,
    hyper: NDArray[np.float64],
    adapt: NDArray[np.bool_],
    nesterov: bool,
    param_norms: NDArray[np.float64],
    grad_norms: NDArray[np.float64],
    skip_nonfinite: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def sgd_update(
    params: Sequence[Any],
    momenta: Sequence[Any],
    grads: Any,
    *,
    hyper: NDArray[np.float64],
    nesterov: bool,
    skip_nonfinite: bool = False,
) -> NDArray[np.float64]: ...
def start_watch(seconds: float, message: str) -> int: ...
def end_watch(watch: int) -> None: ...
