"""The run-time compiled CUDA backend, kernels and all, on a host that stands in for the device (fake_cupy)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kernels_on_host
from fake_cupy import STREAM, FakeCupy, ndarray, serving
from jointspar import backends, ops
from jointspar.device_arrays import Place
from support import DTYPES, NORM_TOLERANCE, TOLERANCE, relative_error

CPP_TYPES = ("float", "double", "jointspar::BFloat16", "jointspar::Float16")
PAIRS = tuple(itertools.product(CPP_TYPES, repeat=2))
KERNELS = [
    *(f"{name}<{a}, {b}>" for a, b in PAIRS for name in ("pack_gradients_kernel", "lars_update_kernel",
                                                         "sgd_update_kernel")),
    *(f"unpack_gradients_kernel<{a}, {b}, {add}>" for a, b in PAIRS for add in ("true", "false")),
    *(f"add_packed_kernel<{a}>" for a in CPP_TYPES),
    *(f"squared_norms_kernel<jointspar::{record}>" for record in ("NormRecord", "SgdRecord")),
    "lars_rates_kernel", "sample_systematic_kernel", "sample_bernoulli_kernel", "project_probabilities_kernel",
    "update_probabilities_kernel",
]  # fmt: skip
SIZES = (0, 1, 7, 4095, 4096, 4097, 0, 3 * 4096 + 77, 31)  # around the device's chunk
HYPER = np.array([0.1, 0.9, 1e-2, 1e-3, 1e-8])  # lr, momentum, weight_decay, trust_coefficient, eps
PLACE = Place(0, "cupy")


@pytest.fixture(scope="module")
def kernels() -> kernels_on_host.KernelsOnHost:
    return kernels_on_host.KernelsOnHost([f"jointspar::{name}" for name in KERNELS])


@pytest.fixture
def cupy(kernels: kernels_on_host.KernelsOnHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCupy]:
    cupy = FakeCupy(kernels)
    with serving(cupy, monkeypatch, tmp_path):
        yield cupy


def on_device() -> Any:
    return backends.device_backend(PLACE, None)


def random_arrays(cupy: FakeCupy, rng: np.random.Generator, dtype: str, sizes: tuple[int, ...] = SIZES) -> list:
    return [cupy.array(rng.standard_normal(size), dtype) for size in sizes]


def float64(array: ndarray) -> np.ndarray:
    return array.tensor.to(torch.float64).numpy().copy()


def norms_of(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([np.sqrt(np.square(array).sum()) for array in arrays])


def momentum_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def hyper_for(count: int, columns: int) -> np.ndarray:
    return np.tile(HYPER[:columns], (count, 1))


@pytest.mark.parametrize(("dtype", "packed_dtype"), tuple(itertools.product(DTYPES, DTYPES)))
def test_packing_scales_casts_and_measures(cupy, rng, dtype, packed_dtype):
    grads = random_arrays(cupy, rng, dtype)
    grads[3] = grads[4] = None
    sizes, scales = np.array(SIZES), rng.uniform(0.5, 2.0, len(SIZES))
    packed = cupy.empty(int(sizes.sum()), packed_dtype)
    norms = on_device().pack_gradients(grads, scales, sizes, packed)
    cupy.synchronize()
    plain = [np.zeros(size) if grad is None else float64(grad) for grad, size in zip(grads, SIZES, strict=True)]
    expected = np.concatenate([values * scale for values, scale in zip(plain, scales, strict=True)])
    assert relative_error(float64(packed), expected) <= max(TOLERANCE[packed_dtype], 2e-7 * (dtype != "float64"))
    assert relative_error(float64(norms), norms_of(plain) ** 2) <= NORM_TOLERANCE[dtype]
    assert len(cupy.launches) == 1  # None joins the others


def test_gradients_of_several_types_are_packed_by_one_launch_a_type(cupy, rng):
    grads = [cupy.array(rng.standard_normal(5000), dtype) for dtype in (*DTYPES, *DTYPES)]
    packed = cupy.empty(40000, "float64")
    norms = on_device().pack_gradients(grads, np.ones(8), np.full(8, 5000), packed)
    cupy.synchronize()
    assert [launch.expression.partition("<")[2].partition(",")[0] for launch in cupy.launches] == list(CPP_TYPES)
    np.testing.assert_array_equal(float64(packed), np.concatenate([float64(grad) for grad in grads]))
    assert relative_error(float64(norms), norms_of([float64(grad) for grad in grads]) ** 2) <= 4e-6


@pytest.mark.parametrize(("packed_dtype", "dtype"), tuple(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("add", [False, True])
def test_unpacking_copies_or_adds(cupy, rng, packed_dtype, dtype, add):
    outs = random_arrays(cupy, rng, dtype)
    packed = cupy.array(rng.standard_normal(sum(SIZES)), packed_dtype)
    before = [float64(out) for out in outs]
    on_device().unpack_gradients(packed, outs, add)
    cupy.synchronize()
    parts = np.split(float64(packed), np.cumsum(SIZES)[:-1])
    for out, old, part in zip(outs, before, parts, strict=True):
        assert relative_error(float64(out), old + part if add else part) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 4097, 20000])
def test_adding_packed_buffers(cupy, rng, dtype, size):
    out, packed = random_arrays(cupy, rng, dtype, (size, size))
    expected = float64(out) + float64(packed)
    on_device().add_packed(out, packed)
    cupy.synchronize()
    assert relative_error(float64(out), expected) <= TOLERANCE[dtype]
    assert [launch.num_blocks for launch in cupy.launches] == ([-(-size // 4096)] if size else [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_arrays_and_of_the_slices_of_a_buffer(cupy, rng, dtype):
    grads = random_arrays(cupy, rng, dtype)
    packed = cupy.array(np.concatenate([float64(grad) for grad in grads]), dtype)
    by_list, by_slice = on_device().squared_norms(grads, None), on_device().squared_norms(packed, np.array(SIZES))
    cupy.synchronize()
    expected = norms_of([float64(grad) for grad in grads]) ** 2
    for norms in (by_list, by_slice):
        assert relative_error(float64(norms), expected) <= NORM_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["list", "with_none", "packed"])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_sgd_matches_float64(cupy, rng, dtype, nesterov, form, skip_nonfinite):
    params, momenta, grads, plain = update_arrays(cupy, rng, dtype, form)
    lr, momentum, weight_decay = HYPER[:3]
    norms = on_device().sgd_update(
        params, momenta, grads, hyper=hyper_for(len(SIZES), 3), nesterov=nesterov, skip_nonfinite=skip_nonfinite
    )
    cupy.synchronize()
    for param, buffer, (w, u, g) in zip(params, momenta, plain, strict=True):
        d = g + weight_decay * w
        u = momentum * u + d
        assert relative_error(float64(buffer), u) <= TOLERANCE[momentum_dtype(dtype)]
        assert relative_error(float64(param), w - lr * (d + momentum * u if nesterov else u)) <= TOLERANCE[dtype]
    assert relative_error(float64(norms), norms_of([g for _, _, g in plain])) <= NORM_TOLERANCE[dtype]
    assert len(cupy.launches) == 1 + skip_nonfinite


def update_arrays(cupy: FakeCupy, rng: np.random.Generator, dtype: str, form: str) -> tuple[list, list, Any, list]:
    """(params, momenta, grads, (w, u, g) in float64 of each); form "with_none" leaves out one gradient."""
    params, grads = random_arrays(cupy, rng, dtype), random_arrays(cupy, rng, dtype)
    momenta = random_arrays(cupy, rng, momentum_dtype(dtype))
    plain = [[float64(array) for array in arrays] for arrays in (params, momenta, grads)]
    if form == "with_none":
        grads[5], plain[2][5] = None, np.zeros(SIZES[5])
    given = cupy.array(np.concatenate(plain[2]), dtype) if form == "packed" else grads
    return params, momenta, given, list(zip(*plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["list", "with_none", "packed"])
@pytest.mark.parametrize("known", ["nothing", "params", "both", "some"])
def test_lars_matches_float64(cupy, rng, dtype, form, known):
    nesterov = known in ("params", "some")
    params, momenta, grads, plain = update_arrays(cupy, rng, dtype, form)
    adapt = np.arange(len(SIZES)) != 2
    w_norms, g_norms = norms_of([w for w, _, _ in plain]), norms_of([g for _, _, g in plain])
    partly = np.where(np.arange(len(SIZES)) % 2 == 0, np.nan, g_norms)
    param_norms = None if known == "nothing" else cupy.array(w_norms, "float64")
    grad_norms = {"both": cupy.array(g_norms, "float64"), "some": cupy.array(partly, "float64")}.get(known)
    used, after = on_device().lars_update(
        params, momenta, grads, hyper=hyper_for(len(SIZES), 5), adapt=adapt, nesterov=nesterov, skip_nonfinite=True,
        param_norms=param_norms, grad_norms=grad_norms,
    )  # fmt: skip
    cupy.synchronize()
    lr, momentum, weight_decay, trust, eps = HYPER
    for k, (w, u, g) in enumerate(plain):
        local = 1.0
        if adapt[k] and w_norms[k] > 0 and g_norms[k] > 0:
            local = trust * w_norms[k] / (g_norms[k] + weight_decay * w_norms[k] + eps)
        d = local * (g + weight_decay * w)
        u = momentum * u + d
        assert relative_error(float64(momenta[k]), u) <= 2 * TOLERANCE[momentum_dtype(dtype)]
        assert relative_error(float64(params[k]), w - lr * (d + momentum * u if nesterov else u)) <= TOLERANCE[dtype]
    assert relative_error(float64(used), g_norms) <= NORM_TOLERANCE[dtype]
    assert relative_error(float64(after), norms_of([float64(param) for param in params])) <= NORM_TOLERANCE[dtype]
    assert len(cupy.launches) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("op", ["lars_update", "sgd_update"])
def test_a_gradient_that_is_not_finite_skips_the_update_and_the_next_one_is_made(cupy, rng, op, value):
    params, momenta, grads, plain = update_arrays(cupy, rng, "float32", "list")
    grads[7].tensor[5000] = value
    settings: dict[str, Any] = {"hyper": hyper_for(len(SIZES), 3), "nesterov": False, "skip_nonfinite": True}
    if op == "lars_update":
        settings |= {"hyper": hyper_for(len(SIZES), 5), "adapt": np.ones(len(SIZES), bool)}
        settings |= {"param_norms": None, "grad_norms": None}
    getattr(on_device(), op)(params, momenta, grads, **settings)
    cupy.synchronize()
    for param, buffer, (w, u, _) in zip(params, momenta, plain, strict=True):
        np.testing.assert_array_equal(float64(param), w)
        np.testing.assert_array_equal(float64(buffer), u)
    grads[7].tensor[5000] = 0.0
    getattr(on_device(), op)(params, momenta, grads, **settings)
    cupy.synchronize()
    assert not np.array_equal(float64(params[7]), plain[7][0])


@pytest.mark.parametrize("strategy", ops.STRATEGIES)
@pytest.mark.parametrize(
    ("draw", "run_length"),
    [("bernoulli", None), ("systematic", None), ("systematic", 1), ("systematic", 3), ("systematic", 2**32 - 1)],
)
@pytest.mark.parametrize("num_layers", [0, 1, 33, 300])
def test_draws_are_those_of_the_cpu(cupy, rng, strategy, draw, run_length, num_layers):
    p = rng.uniform(0.0, 1.0, num_layers)
    settings: dict[str, Any] = {"seed": 2**63 + 5, "step": 2**31 + 1, "world_size": 4, "strategy": strategy}
    settings |= {"draw": draw, "run_length": run_length}
    for rank in range(4):
        active = on_device().sample_layers(cupy.array(p, "float64"), rank=rank, **settings)
        cupy.synchronize()
        expected = backends.load("reference").sample_layers(p, rank=rank, **settings)
        np.testing.assert_array_equal(active.tensor.numpy(), expected)


@pytest.mark.parametrize("num_layers", [1, 32, 33, 700])
def test_projections_meet_the_budget_and_are_proportional_where_nothing_is_clipped(cupy, rng, num_layers):
    log_w, p_min, budget = rng.normal(0.0, 2.0, num_layers), 0.05, 0.4 * num_layers
    q = float64(projected(cupy, log_w, budget, p_min))
    assert q.sum() == pytest.approx(budget, rel=1e-12)
    assert ((q >= p_min) & (q <= 1.0)).all()
    free = (q > p_min) & (q < 1.0)
    ratios = np.log(q[free]) - log_w[free]
    np.testing.assert_allclose(ratios, ratios[:1].repeat(free.sum()), rtol=0, atol=1e-9)


def projected(cupy: FakeCupy, log_weights: np.ndarray, budget: float, p_min: float) -> ndarray:
    q = on_device().project_probabilities(cupy.array(log_weights, "float64"), budget=budget, p_min=p_min)
    cupy.synchronize()
    return q


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("num_layers", [2, 33, 300])
def test_algorithm_1_gives_what_the_reference_gives(cupy, rng, num_layers, shift):
    p, drawn = rng.uniform(0.1, 1.0, num_layers), rng.uniform(0.1, 1.0, num_layers)
    n2, active = rng.uniform(0.0, 9.0, num_layers), np.arange(num_layers) % 2 == 0
    settings: dict[str, Any] = {"budget": 0.4 * num_layers, "p_min": 0.1, "bandit_lr": 0.1, "shift": shift}
    updated, bound = on_device().update_probabilities(
        cupy.array(p, "float64"), cupy.array(n2, "float64"), ndarray(torch.from_numpy(active)),
        drawn_probabilities=cupy.array(drawn, "float64"), gradient_bound=cupy.array([1.0], "float64"), **settings,
    )  # fmt: skip
    cupy.synchronize()
    expected, expected_bound = backends.load("reference").update_probabilities(
        p, n2, active, drawn_probabilities=drawn, gradient_bound=1.0, **settings
    )
    assert float64(bound) == pytest.approx([expected_bound], rel=1e-12)
    np.testing.assert_allclose(float64(updated), expected, rtol=1e-9)


def test_many_calls_ahead_of_the_device_keep_their_tables(cupy, rng):
    """More calls than the ring of pinned buffers has room for, of growing sizes, before the device runs the first."""
    calls = []
    for number in range(80):
        grads = random_arrays(cupy, rng, "float32", tuple(rng.integers(0, 600, 3 + 15 * number % 40).tolist()))
        norms = on_device().squared_norms(grads, None)
        calls.append((grads, norms))
    assert cupy.num_waits == 80 - 64  # only where 64 copies were waiting
    cupy.synchronize()
    for grads, norms in calls:
        assert relative_error(float64(norms), norms_of([float64(grad) for grad in grads]) ** 2) <= 1e-6


def test_a_call_like_the_last_one_uploads_once_and_neither_allocates_nor_compiles_nor_waits(cupy, rng):
    params, momenta, grads, _ = update_arrays(cupy, rng, "float32", "list")

    def step() -> tuple[int, ...]:
        on_device().sgd_update(
            params, momenta, grads, hyper=hyper_for(len(SIZES), 3), nesterov=False, skip_nonfinite=False
        )
        cupy.synchronize()
        return cupy.num_copies, cupy.num_allocations, cupy.num_compiled, cupy.num_waits

    first, second = step(), step()
    assert np.subtract(second, first).tolist() == [1, 0, 0, 0]


def test_everything_runs_on_the_stream_of_the_arrays(cupy, rng):
    on_device().squared_norms(random_arrays(cupy, rng, "float32"), None)
    assert {launch.stream for launch in cupy.launches} == set(cupy.pending) == {STREAM}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", [13, 14])
def test_calls_go_to_the_given_stream_without_a_warning(kernels, monkeypatch, tmp_path, version):
    cupy = FakeCupy(kernels, version=version)
    with serving(cupy, monkeypatch, tmp_path):
        on_device().squared_norms([cupy.array([3.0])], None)
    assert [launch.stream for launch in cupy.launches] == [STREAM]


def test_a_stream_capture_is_refused_with_advice(cupy, rng):
    arrays = random_arrays(cupy, rng, "float32", (10, 10))
    cupy.capturing = True
    for call in (lambda: on_device().squared_norms(arrays, None), lambda: on_device().add_packed(*arrays)):
        with pytest.raises(RuntimeError, match="JOINTSPAR_CUDA_EXT"):
            call()
    assert not cupy.launches


def test_after_a_clearing_that_failed_the_next_call_clears_anew(cupy, rng, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    arrays = random_arrays(cupy, rng, "float32")
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda.runtime, "memsetAsync", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            on_device().squared_norms(arrays, None)
    squared = on_device().squared_norms(arrays, None)
    cupy.synchronize()
    np.testing.assert_allclose(float64(squared), [np.square(float64(array)).sum() for array in arrays], rtol=1e-6)


def test_calls_without_arrays_do_nothing(cupy):
    serving = on_device()
    empty = cupy.empty(0, "float32")
    serving.pack_gradients([], np.empty(0), np.empty(0, np.int64), empty)
    serving.unpack_gradients(empty, [], False)
    serving.squared_norms([], None)
    serving.sgd_update([], [], [], hyper=np.empty((0, 3)), nesterov=False, skip_nonfinite=True)
    assert not cupy.launches
