"""sgd_update against plain float64 NumPy and against torch.optim.SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import backends, ops
from support import (
    DTYPES,
    NORM_TOLERANCE,
    SIZES,
    TOLERANCE,
    Arrays,
    at_odd_offset,
    bits,
    exact_squared_norm,
    momentum_dtype,
    relative_error,
    same_bits_on_1_and_2_threads,
)

pytestmark = pytest.mark.usefixtures("backend")

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def sgd_in_float64(
    w: np.ndarray, u: np.ndarray, grad: np.ndarray, *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> tuple[np.ndarray, np.ndarray]:
    d = grad + weight_decay * w
    u = momentum * u + d
    return w - lr * (d + momentum * u if nesterov else u), u


def random_state(arrays: Arrays, rng: np.random.Generator, dtype: str, offset: int = 0) -> tuple[list, list, list]:
    """Params, momenta and grads of every size."""
    kinds = (dtype, momentum_dtype(dtype), dtype)
    return tuple([at_odd_offset(arrays, rng.standard_normal(n), kind, offset) for n in SIZES] for kind in kinds)


def assert_updated(arrays: Arrays, actual: list, expected: list[np.ndarray], tolerance: float) -> None:
    for array, values, size in zip(actual, expected, SIZES, strict=True):
        assert relative_error(arrays.float64(array), values) <= tolerance, f"size {size}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_size_matches_float64(
    library: Arrays, rng: np.random.Generator, dtype: str, nesterov: bool, offset: int
) -> None:
    params, momenta, grads = random_state(library, rng, dtype, offset)
    plain = [[library.float64(array) for array in group] for group in (params, momenta, grads)]
    norms = ops.sgd_update(params, momenta, grads, **SGD, nesterov=nesterov)
    expected = [sgd_in_float64(*state, **SGD, nesterov=nesterov) for state in zip(*plain, strict=True)]
    assert_updated(library, params, [w for w, _ in expected], TOLERANCE[dtype])
    assert_updated(library, momenta, [u for _, u in expected], TOLERANCE[momentum_dtype(dtype)])
    true_norms = [math.sqrt(exact_squared_norm(grad)) for grad in plain[2]]
    np.testing.assert_allclose(library.float64(norms), true_norms, rtol=NORM_TOLERANCE[dtype])


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_and_parameter_dtypes_mix(
    library: Arrays, rng: np.random.Generator, dtype: str, grad_dtype: str
) -> None:
    params, momenta, _ = random_state(library, rng, dtype)
    grads = [library.array(rng.standard_normal(n), grad_dtype) for n in SIZES]
    plain = [[library.float64(array) for array in group] for group in (params, momenta, grads)]
    ops.sgd_update(params, momenta, grads, **SGD)
    expected = [sgd_in_float64(*state, **SGD, nesterov=False) for state in zip(*plain, strict=True)]
    assert_updated(library, params, [w for w, _ in expected], TOLERANCE[dtype])
    assert_updated(library, momenta, [u for _, u in expected], TOLERANCE[momentum_dtype(dtype)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_50_steps_follow_torch(
    device: str, rng: np.random.Generator, dtype: str, nesterov: bool, momentum: float, weight_decay: float
) -> None:
    start = [
        torch.tensor(rng.standard_normal(shape), dtype=getattr(torch, dtype), device=device)
        for shape in ((7, 5), (300,), (2, 3, 4))
    ]
    theirs, ours = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    momenta = [torch.zeros_like(tensor) for tensor in start]
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    optimizer = torch.optim.SGD(theirs, **settings)
    for _ in range(50):
        grads = [torch.tensor(rng.standard_normal(tensor.shape)).to(tensor) for tensor in start]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        ops.sgd_update(ours, momenta, grads, **settings)
    for our, their in zip(ours, theirs, strict=True):
        assert relative_error(our.detach().cpu(), their.detach().cpu()) <= (1e-12 if dtype == "float64" else 5e-6)


def test_hand_computed_step(library: Arrays) -> None:
    params, momenta = [library.array([1.0, -2.0], "float64")], [library.array([0.5, 0.0], "float64")]
    norms = ops.sgd_update(
        params, momenta, [library.array([3.0, 4.0], "float64")], lr=0.1, momentum=0.5, weight_decay=0.25
    )
    assert library.float64(momenta[0]).tolist() == pytest.approx([3.5, 3.5])  # .25 + 3 + .25;  0 + 4 - .5
    assert library.float64(params[0]).tolist() == pytest.approx([0.65, -2.35])
    assert norms.tolist() == [5.0]


def test_each_tensor_has_its_own_settings(library: Arrays, rng: np.random.Generator) -> None:
    params, momenta, grads = random_state(library, rng, "float64")
    plain = [[library.float64(array) for array in group] for group in (params, momenta, grads)]
    lr, momentum, weight_decay = (rng.uniform(0.0, 1.0, len(SIZES)) for _ in range(3))
    ops.sgd_update(params, momenta, grads, lr=lr, momentum=list(momentum), weight_decay=torch.tensor(weight_decay))
    expected = [
        sgd_in_float64(*state, lr=lr[k], momentum=momentum[k], weight_decay=weight_decay[k], nesterov=False)
        for k, state in enumerate(zip(*plain, strict=True))
    ]
    assert_updated(library, params, [w for w, _ in expected], 1e-12)


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_buffer_gives_the_bits_of_separate_gradients(
    library: Arrays, rng: np.random.Generator, dtype: str, wire: str
) -> None:
    packed = library.array(rng.standard_normal(sum(SIZES)), wire)
    offsets = np.cumsum((0, *SIZES))
    slices = [packed[start : start + size] for start, size in zip(offsets, SIZES, strict=False)]
    results = []
    for grads in (packed, slices):
        params, momenta, _ = random_state(library, np.random.default_rng(1), dtype)
        norms = ops.sgd_update(params, momenta, grads, **SGD)
        results.append([bits(array) for array in (*params, *momenta, norms)])
    assert results[0] == results[1]


def test_a_missing_gradient_is_one_of_zeros(library: Arrays) -> None:
    params, momenta = [library.array([1.0, 2.0])], [library.array([0.5, 0.5])]
    norms = ops.sgd_update(params, momenta, [None], lr=1.0, momentum=0.5, weight_decay=0.25)
    assert library.float64(momenta[0]).tolist() == [0.5, 0.75]
    assert library.float64(params[0]).tolist() == [0.5, 1.25]
    assert norms.tolist() == [0.0]


def test_channels_last_params_update_like_contiguous_ones(device: str, rng: np.random.Generator) -> None:
    w, u, grad = (torch.tensor(rng.standard_normal((4, 3, 5, 5)), dtype=torch.float32, device=device) for _ in range(3))
    permuted = [tensor.clone(memory_format=torch.channels_last) for tensor in (w, u, grad)]
    ops.sgd_update([w], [u], [grad], **SGD)
    ops.sgd_update(*([tensor] for tensor in permuted), **SGD)
    assert torch.equal(permuted[0], w)
    assert torch.equal(permuted[1], u)
    assert permuted[0].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_left_as_they_were_and_autograd_sees_the_write(device: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(9, device=device))
    momentum, grad = torch.zeros_like(parameter), torch.full_like(parameter, 2.0)
    before, version = bits(grad), parameter._version
    ops.sgd_update([parameter], [momentum], [grad], **SGD)
    assert bits(grad) == before
    assert parameter._version > version
    assert parameter.grad is None
    assert parameter.requires_grad


def test_non_finite_gradients_reach_only_their_own_elements(library: Arrays) -> None:
    params, momenta = ([library.array(np.ones(n)) for n in (40, 3)] for _ in range(2))
    grad = np.ones(40)
    grad[33] = np.nan
    norms = ops.sgd_update(params, momenta, [library.array(grad), library.array(np.ones(3))], **SGD)
    assert np.flatnonzero(~np.isfinite(library.float64(params[0]))).tolist() == [33]
    assert np.isfinite(library.float64(params[1])).all()
    assert math.isnan(norms[0])
    assert math.isfinite(norms[1])


@pytest.mark.host
@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (1, 3), (6,)])
def test_the_backends_themselves_refuse_hyper_of_another_shape(
    backend: str, library: Arrays, shape: tuple[int, ...]
) -> None:
    params, momenta, grads = ([library.array([1.0, 2.0]), library.array([3.0])] for _ in range(3))
    with pytest.raises(ValueError, match="hyper"):
        backends.load(backend).sgd_update(params, momenta, grads, hyper=np.ones(shape), nesterov=False)
    assert [library.float64(param).tolist() for param in params] == [[1.0, 2.0], [3.0]]


def test_nothing_updates_nothing() -> None:
    assert tuple(ops.sgd_update([], [], [], **SGD).shape) == (0,)


def test_same_bits_for_1_and_2_threads(library: Arrays) -> None:
    def run() -> list:
        params, momenta, grads = random_state(library, np.random.default_rng(5), "float32")
        return [ops.sgd_update(params, momenta, grads, **SGD), *params, *momenta]

    assert same_bits_on_1_and_2_threads(run)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_nonfinite_writes_nothing_where_a_gradient_is_not_finite(library: Arrays, value: float) -> None:
    results = []
    for poisoned in (1.0, value):
        params, momenta, grads = ([library.array(np.full(n, 2.0)) for n in (20000, 9)] for _ in range(3))
        grads[1][7] = poisoned
        before = [bits(array) for array in (*params, *momenta)]
        norms = ops.sgd_update(params, momenta, [*grads], **SGD, skip_nonfinite=True)
        results.append([bits(array) for array in (*params, *momenta)] == before)
    assert results == [False, True]
    assert [math.isfinite(norm) for norm in norms] == [True, False]


@pytest.mark.parametrize("make", [np.array, torch.tensor, np.float64])
def test_numbers_may_be_arrays_without_a_dimension(make: Callable[[float], Any]) -> None:
    param, momentum_buffer = torch.ones(2), torch.zeros(2)
    settings = {"lr": make(0.25), "momentum": make(0.0), "weight_decay": make(0.0)}
    ops.sgd_update([param], [momentum_buffer], [torch.ones(2)], **settings)
    assert param.tolist() == [0.75, 0.75]
    packed, _ = ops.pack_gradients([torch.ones(2)], make(0.5))
    assert packed.tolist() == [0.5, 0.5]
