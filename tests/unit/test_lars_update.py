"""lars_update against plain float64 NumPy and hand-computed cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import ops
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

LARS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02, "eps": 1e-8}
SGD = {name: LARS[name] for name in ("lr", "momentum", "weight_decay")}


def lars_in_float64(
    w: np.ndarray,
    u: np.ndarray,
    grad: np.ndarray,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    nesterov: bool = False,
    adapt: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    param_norm, grad_norm = norms_of([w, grad])
    local = 1.0
    if adapt and param_norm > 0 and grad_norm > 0:
        local = trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
    d = local * (grad + weight_decay * w)
    u = momentum * u + d
    return w - lr * (d + momentum * u if nesterov else u), u


def random_state(
    arrays: Arrays, rng: np.random.Generator, dtype: str, offset: int = 0, grad_dtype: str | None = None
) -> tuple[list, list, list]:
    """Params, momenta and grads of every size; the gradients' scale differs from tensor to tensor."""
    kinds = (dtype, momentum_dtype(dtype), grad_dtype or dtype)
    groups = [[rng.standard_normal(n) for n in SIZES] for _ in kinds]
    groups[2] = [grad * 10.0 ** (k % 4 - 2) for k, grad in enumerate(groups[2])]
    return tuple(
        [at_odd_offset(arrays, values, kind, offset) for values in group]
        for kind, group in zip(kinds, groups, strict=True)
    )


def copies(arrays: Arrays, *groups: list) -> list[list[np.ndarray]]:
    return [[arrays.float64(array) for array in group] for group in groups]


def norms_of(values: list[np.ndarray]) -> list[float]:
    return [math.sqrt(exact_squared_norm(value)) for value in values]


def all_adapted() -> list[bool]:
    return [True] * len(SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_size_matches_float64(
    library: Arrays, rng: np.random.Generator, dtype: str, nesterov: bool, offset: int
) -> None:
    params, momenta, grads = random_state(library, rng, dtype, offset)
    plain = copies(library, params, momenta, grads)
    norms = ops.lars_update(params, momenta, grads, **LARS, nesterov=nesterov, adapt=all_adapted())
    expected = [lars_in_float64(*state, **LARS, nesterov=nesterov) for state in zip(*plain, strict=True)]
    for k, size in enumerate(SIZES):
        w, u = expected[k]
        assert relative_error(library.float64(params[k]), w) <= TOLERANCE[dtype], f"weights, size {size}"
        assert relative_error(library.float64(momenta[k]), u) <= TOLERANCE[momentum_dtype(dtype)], f"momentum, {size}"
    tolerance = NORM_TOLERANCE[dtype]
    np.testing.assert_allclose(library.float64(norms.grad_norms), norms_of(plain[2]), rtol=tolerance)
    np.testing.assert_allclose(
        library.float64(norms.param_norms_after), norms_of(copies(library, params)[0]), rtol=tolerance
    )


@pytest.mark.parametrize(("dtype", "smallest"), [("float32", 1e-45), ("float64", 5e-324)])
def test_a_rate_that_overflows_is_the_largest_there_is(library: Arrays, dtype: str, smallest: float) -> None:
    """||w|| / ||g|| is infinite in the accumulator, and times a zero gradient it would be NaN."""
    w, u, grad = (library.array(values, dtype) for values in ([1.0, 0.0], [0.0, 0.0], [smallest, 0.0]))
    settings = dict(lr=1.0, momentum=0.0, weight_decay=0.0, trust_coefficient=1.0, eps=0.0)
    ops.lars_update([w], [u], [grad], **settings, adapt=[True])
    step = float(np.finfo(dtype).max) * float(library.float64(grad)[0])  # which is tiny
    np.testing.assert_allclose(library.float64(w), [1.0 - step, 0.0], rtol=2e-7 if dtype == "float32" else 1e-15)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_and_parameter_dtypes_mix(
    library: Arrays, rng: np.random.Generator, dtype: str, grad_dtype: str
) -> None:
    params, momenta, grads = random_state(library, rng, dtype, grad_dtype=grad_dtype)
    plain = copies(library, params, momenta, grads)
    ops.lars_update(params, momenta, grads, **LARS, adapt=all_adapted())
    for param, velocity, *state in zip(params, momenta, *plain, strict=True):
        tolerance = max(TOLERANCE[dtype], 0.0 if grad_dtype == "float64" else 1e-6 if dtype != "float64" else 1e-7)
        expected = lars_in_float64(*state, **LARS)
        assert relative_error(library.float64(param), expected[0]) <= tolerance
        assert relative_error(library.float64(velocity), expected[1]) <= max(TOLERANCE[momentum_dtype(dtype)], 1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_carried_norms_equal_measured_ones_over_50_steps(library: Arrays, rng: np.random.Generator, dtype: str) -> None:
    params, momenta, _ = random_state(library, rng, dtype)
    plain_params, plain_momenta = copies(library, params, momenta)
    carried = None
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    for _ in range(50):
        grads = [library.array(rng.standard_normal(n), dtype) for n in SIZES]
        result = ops.lars_update(params, momenta, grads, **LARS, adapt=all_adapted(), param_norms=carried)
        carried = result.param_norms_after
        measured = np.sqrt(library.float64(ops.squared_norms(params)))
        np.testing.assert_allclose(library.float64(carried), measured, rtol=tolerance)
        for k, grad in enumerate(grads):
            state = plain_params[k], plain_momenta[k], library.float64(grad)
            plain_params[k], plain_momenta[k] = lars_in_float64(*state, **LARS)
    for param, plain in zip(params, plain_params, strict=True):
        assert relative_error(library.float64(param), plain) <= 10 * tolerance


def test_given_norms_are_used_and_nan_means_measure(library: Arrays) -> None:
    def run(**norms: Any) -> list[float]:
        params, momenta = [library.array([3.0, 4.0], "float64")], [library.array([0.0, 0.0], "float64")]
        settings = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 0.1, "eps": 0.0}
        result = ops.lars_update(
            params, momenta, [library.array([0.0, 2.0], "float64")], **settings, adapt=[True], **norms
        )
        return [*library.float64(params[0]).tolist(), *result.grad_norms.tolist()]

    assert run() == pytest.approx([3.0, 3.5, 2.0])  # local = .1 * 5 / 2
    assert run(param_norms=[math.nan], grad_norms=[math.nan]) == run()
    assert run(param_norms=[10.0]) == pytest.approx([3.0, 3.0, 2.0])
    assert run(grad_norms=[1.0]) == pytest.approx([3.0, 3.0, 1.0])
    assert run(param_norms=[10.0], grad_norms=[4.0]) == pytest.approx([3.0, 3.5, 4.0])


def test_hand_computed_step(library: Arrays) -> None:
    params, momenta = [library.array([3.0, 4.0], "float64")], [library.array([0.5, -0.5], "float64")]
    grads = [library.array([0.6, 0.8], "float64")]
    norms = ops.lars_update(
        params, momenta, grads, lr=0.5, momentum=0.5, weight_decay=0.1, trust_coefficient=0.3, eps=0.5, adapt=[True]
    )
    # local = .3 * 5 / (1 + .1 * 5 + .5) = .75;  d = .75 * (.9, 1.2) = (.675, .9);  u = (.25, -.25) + d
    assert library.float64(momenta[0]).tolist() == pytest.approx([0.925, 0.65], rel=1e-12)
    assert library.float64(params[0]).tolist() == pytest.approx([2.5375, 3.675], rel=1e-12)
    assert norms.grad_norms.tolist() == pytest.approx([1.0])
    assert norms.param_norms_after.tolist() == pytest.approx([math.hypot(2.5375, 3.675)])


def assert_follows_sgd(library: Arrays, weights: list[float], grad: list[float], adapt: bool) -> None:
    states = [([library.array(weights)], [library.array([0.5] * len(weights))], [library.array(grad)]) for _ in "ab"]
    ops.lars_update(*states[0], **LARS, adapt=[adapt])
    ops.sgd_update(*states[1], **SGD)
    for ours, theirs in zip(states[0][:2], states[1][:2], strict=True):
        np.testing.assert_allclose(library.float64(ours[0]), library.float64(theirs[0]), rtol=1e-6)


def test_zero_weights_are_not_adapted(library: Arrays) -> None:
    assert_follows_sgd(library, [0.0, 0.0], [1.0, 2.0], adapt=True)


def test_zero_gradients_are_not_adapted(library: Arrays) -> None:
    assert_follows_sgd(library, [1.0, 2.0], [0.0, 0.0], adapt=True)


def test_zero_weights_and_gradients_divide_nothing_by_zero(library: Arrays) -> None:
    params, momenta = [library.array([0.0, 0.0])], [library.array([0.0, 0.0])]
    settings = {**LARS, "eps": 0.0, "weight_decay": 0.0}
    norms = ops.lars_update(params, momenta, [library.array([0.0, 0.0])], **settings, adapt=[True])
    assert library.float64(params[0]).tolist() == [0.0, 0.0]
    assert norms.grad_norms.tolist() == norms.param_norms_after.tolist() == [0.0]


def test_tensors_that_are_not_adapted_follow_sgd(library: Arrays) -> None:
    assert_follows_sgd(library, [1.0, 2.0], [3.0, 4.0], adapt=False)


def test_by_default_tensors_of_two_dimensions_are_adapted_and_others_not(library: Arrays) -> None:
    matrix, vector = np.full((2, 2), 2.0), np.full(4, 2.0)
    params, momenta, grads = ([library.array(values) for values in (matrix, vector)] for _ in range(3))
    ops.lars_update(params, momenta, grads, **LARS)
    for param, values, adapt in zip(params, (matrix, vector), (True, False), strict=True):
        expected, _ = lars_in_float64(values, values, values, **LARS, adapt=adapt)
        assert relative_error(library.float64(param), expected) <= 1e-6


def test_a_missing_gradient_is_one_of_zeros_and_not_adapted(library: Arrays) -> None:
    params, momenta = [library.array([1.0, 2.0])], [library.array([0.5, 0.5])]
    settings = {**LARS, "lr": 1.0, "momentum": 0.5, "weight_decay": 0.25}
    norms = ops.lars_update(params, momenta, [None], **settings, adapt=[True])
    assert library.float64(momenta[0]).tolist() == [0.5, 0.75]
    assert library.float64(params[0]).tolist() == [0.5, 1.25]
    assert norms.grad_norms.tolist() == [0.0]


def test_each_tensor_has_its_own_settings(library: Arrays, rng: np.random.Generator) -> None:
    params, momenta, grads = random_state(library, rng, "float64")
    plain = copies(library, params, momenta, grads)
    settings = {name: rng.uniform(0.01, 1.0, len(SIZES)) for name in LARS}
    adapt = rng.random(len(SIZES)) < 0.5
    ops.lars_update(params, momenta, grads, **settings, adapt=adapt)
    for k, state in enumerate(zip(*plain, strict=True)):
        own = {name: float(values[k]) for name, values in settings.items()}
        assert relative_error(library.float64(params[k]), lars_in_float64(*state, **own, adapt=adapt[k])[0]) <= 1e-12


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_buffer_gives_the_bits_of_separate_gradients(
    library: Arrays, rng: np.random.Generator, dtype: str, wire: str
) -> None:
    packed = library.array(rng.standard_normal(sum(SIZES)), wire)
    offsets = np.cumsum((0, *SIZES))
    slices = [packed[start : start + size] for start, size in zip(offsets, SIZES, strict=False)]
    results = []
    for grads, layout in ((packed, None), (packed, SIZES), (slices, None)):
        params, momenta, _ = random_state(library, np.random.default_rng(1), dtype)
        norms = ops.lars_update(params, momenta, grads, **LARS, adapt=all_adapted(), layout=layout)
        results.append([bits(array) for array in (*params, *momenta, *norms)])
    assert results[0] == results[1] == results[2]


@pytest.mark.host
def test_a_packed_buffer_may_start_at_an_odd_address(library: Arrays, rng: np.random.Generator) -> None:
    values = rng.standard_normal(sum(SIZES))
    results = []
    for offset in (0, 1, 3):
        params, momenta, _ = random_state(library, np.random.default_rng(1), "float32")
        ops.lars_update(params, momenta, at_odd_offset(library, values, "float32", offset), **LARS, adapt=all_adapted())
        results.append([bits(array) for array in (*params, *momenta)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("weight", [1e-25, 3e-21, 1e19, 1e25])
@pytest.mark.parametrize("grad", [1e-25, 3e-21, 1e19, 1e25])
def test_measured_norms_near_the_limits_of_float32_are_right(library: Arrays, weight: float, grad: float) -> None:
    params, momenta, grads = ([library.array(np.full(20000, value))] for value in (weight, 0.0, grad))
    settings = {**LARS, "lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}
    norms = ops.lars_update(params, momenta, grads, **settings, adapt=[False])
    np.testing.assert_allclose(library.float64(norms.grad_norms), norms_of(copies(library, grads)[0]), rtol=1e-6)
    np.testing.assert_allclose(
        library.float64(norms.param_norms_after), norms_of(copies(library, params)[0]), rtol=1e-6
    )


@pytest.mark.parametrize(("weight", "grad"), [(1e25, 1e25), (1e-25, 1e-25), (1e19, 3e-21), (3e-21, 1e15)])
def test_trust_ratios_near_the_limits_of_float32_are_right(library: Arrays, weight: float, grad: float) -> None:
    params, momenta, grads = ([library.array(np.full(20000, value))] for value in (weight, 0.0, grad))
    plain = copies(library, params, momenta, grads)
    settings = {**LARS, "eps": 0.0, "weight_decay": 0.0}
    ops.lars_update(params, momenta, grads, **settings, adapt=[True])
    expected, _ = lars_in_float64(*(group[0] for group in plain), **settings)
    assert relative_error(library.float64(params[0]), expected) <= 2e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_shows_in_its_own_norm_only(library: Arrays, value: float) -> None:
    params, momenta, grads = ([library.array(np.ones(n)) for n in (20000, 20000)] for _ in range(3))
    grads[1][12345] = value
    norms = ops.lars_update(params, momenta, grads, **LARS, adapt=[True, True])
    assert [math.isfinite(norm) for norm in norms.grad_norms] == [True, False]
    assert np.isfinite(library.float64(params[0])).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_packed", [False, True])
def test_skip_nonfinite_leaves_everything_as_it_was(library: Arrays, value: float, is_packed: bool) -> None:
    params, momenta, grads = ([library.array(np.full(n, 2.0)) for n in (20000, 0, 9)] for _ in range(3))
    grads[2][7] = value
    before = [bits(array) for array in (*params, *momenta)]
    packed = library.array(np.concatenate([library.float64(grad) for grad in grads]))
    norms = ops.lars_update(
        params,
        momenta,
        packed if is_packed else grads,
        **LARS,
        adapt=[True] * 3,
        skip_nonfinite=True,
    )
    assert [bits(array) for array in (*params, *momenta)] == before
    assert [math.isfinite(norm) for norm in norms.grad_norms] == [True, True, False]
    np.testing.assert_allclose(library.float64(norms.param_norms_after), [2.0 * math.sqrt(20000), 0.0, 6.0], rtol=1e-6)


def test_skip_nonfinite_changes_nothing_where_all_is_finite(library: Arrays, rng: np.random.Generator) -> None:
    results = []
    for skip in (False, True):
        params, momenta, grads = random_state(library, np.random.default_rng(3), "float32")
        norms = ops.lars_update(params, momenta, grads, **LARS, adapt=all_adapted(), skip_nonfinite=skip)
        results.append([bits(array) for array in (*params, *momenta, *norms)])
    assert results[0] == results[1]


def test_channels_last_params_update_like_contiguous_ones(device: str, rng: np.random.Generator) -> None:
    w, u, grad = (torch.tensor(rng.standard_normal((4, 3, 5, 5)), device=device) for _ in range(3))
    permuted = [tensor.clone(memory_format=torch.channels_last) for tensor in (w, u, grad)]
    ops.lars_update([w], [u], [grad], **LARS)
    ops.lars_update(*([tensor] for tensor in permuted), **LARS)
    torch.testing.assert_close(permuted[0], w, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(permuted[1], u, rtol=1e-13, atol=1e-16)
    assert permuted[0].is_contiguous(memory_format=torch.channels_last)


def test_a_common_factor_of_the_gradient_cancels(library: Arrays, rng: np.random.Generator) -> None:
    weights, values = rng.standard_normal(300), rng.standard_normal(300)
    settings = {**LARS, "eps": 0.0, "weight_decay": 0.0}
    results = []
    for factor in (1.0, 128.0):
        params, momenta = [library.array(weights)], [library.array(np.zeros(300))]
        ops.lars_update(params, momenta, [library.array(values * factor)], **settings, adapt=[True])
        results.append(library.float64(params[0]))
    assert relative_error(results[1], results[0]) <= 1e-6


def test_gradients_are_left_as_they_were_and_autograd_sees_the_write(device: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3, device=device))
    momentum, grad = torch.zeros_like(parameter), torch.full_like(parameter, 2.0)
    before, version = bits(grad), parameter._version
    ops.lars_update([parameter], [momentum], [grad], **LARS)
    assert bits(grad) == before
    assert parameter._version > version
    assert parameter.grad is None


def test_nothing_updates_nothing() -> None:
    norms = ops.lars_update([], [], [], **LARS)
    assert tuple(norms.grad_norms.shape) == tuple(norms.param_norms_after.shape) == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_1_and_2_threads(library: Arrays, dtype: str) -> None:
    def run() -> list:
        params, momenta, grads = random_state(library, np.random.default_rng(5), dtype)
        norms = ops.lars_update(params, momenta, grads, **LARS, adapt=all_adapted())
        return [*norms, *params, *momenta]

    assert same_bits_on_1_and_2_threads(run)
