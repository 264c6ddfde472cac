"""js.ops on device arrays, without a device: kernels, launchers and Python module run on the host (cuda_on_host).

The arrays are host memory that says it is on cuda:0. Work on the stream waits until somebody reads a result, so a call
that looked at a value too early would find what was there before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from jointspar import arguments, backends, ops
from jointspar.backends import on_device

BUILT = Path(__file__).parents[2] / "build" / "extension" / "tests" / "cpp" / "on_host"
SIZES = (0, 1, 33, 5000, 4096)


class Stream:
    """The emulated stream that all calls of one test use."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cuda_on_host_new_stream.restype = ctypes.c_void_p
        self.handle: int = library.cuda_on_host_new_stream()
        self.in_use: list[np.ndarray] = []  # as a device's allocator does, until the work that reads it is done

    def synchronize(self) -> None:
        self._library.cuda_on_host_synchronize(ctypes.c_void_p(self.handle))
        self.in_use.clear()

    def num_launches(self) -> int:
        return int(self._library.cuda_on_host_num_launches())


class DeviceArray:
    """Host memory that claims to be on cuda:0."""

    stream: Stream

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def __del__(self) -> None:
        self.stream.in_use.append(self.memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self.memory.__array_interface__)
        return {key: interface[key] for key in ("shape", "typestr", "data", "strides")} | {"version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __len__(self) -> int:
        return len(self.memory)

    def __setitem__(self, key: Any, value: DeviceArray) -> None:
        self.memory[key] = read(value)

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    ndim = property(lambda self: self.memory.ndim)

    def reshape(self, *shape: Any) -> DeviceArray:
        return DeviceArray(self.memory.reshape(*shape))


def on_gpu(values: Any, dtype: str = "float32") -> DeviceArray:
    return DeviceArray(np.array(values, dtype=dtype))


def read(array: DeviceArray) -> np.ndarray:
    DeviceArray.stream.synchronize()
    return array.memory.copy()


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    found = list(BUILT.glob(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"))
    if not found:
        pytest.skip("the kernels on the host are not built: make test-cpp")
    spec = importlib.util.spec_from_file_location("_cuda", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stream = DeviceArray.stream = Stream(ctypes.CDLL(str(found[0])))
    monkeypatch.setitem(backends._loaded, "jointspar_ext._cuda", module)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)

    def empty(place: Any, size: int, dtype: str) -> DeviceArray:
        return DeviceArray(np.full(size, 77, dtype=dtype))

    monkeypatch.setattr(on_device, "stream_of", lambda place, array: stream.handle)
    monkeypatch.setattr(on_device, "empty", empty)
    monkeypatch.setattr(arguments, "empty", empty)
    monkeypatch.setattr(arguments, "to_device", lambda place, values: DeviceArray(values.copy()))
    return stream


class WithDLPack(DeviceArray):
    """Of a library that torch does not know: it gets its work done for the stream that it is told of."""

    told: ClassVar[list[int]] = []

    def __dlpack__(self, *, stream: int) -> Any:
        self.told.append(stream)
        capsule = self.memory.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2  # its device: CUDA, not the CPU
        return capsule


class LikeCupy(WithDLPack):
    __module__ = "cupy.core"


def test_dlpack_orders_the_work_of_other_libraries_with_the_call_and_leaves_cupys_alone(stream):
    for kind, expected in ((WithDLPack, stream.handle), (LikeCupy, -1)):
        WithDLPack.told.clear()
        norms = ops.squared_norms([kind(np.array([3.0], np.float32)), kind(np.array([2.0], np.float32))])
        assert read(norms).tolist() == [9.0, 4.0]
        assert WithDLPack.told == [expected] * 2


def test_dlpack_knows_the_default_stream_by_another_number(monkeypatch):
    WithDLPack.told.clear()
    monkeypatch.setattr(on_device, "stream_of", lambda place, array: 0)  # which the emulation does not have
    with pytest.raises(TypeError, match="not int32"):
        ops.squared_norms([WithDLPack(np.array([3], np.int32))])
    assert WithDLPack.told == [1]


def random_arrays(rng: np.random.Generator, dtype: str = "float32") -> list[np.ndarray]:
    return [rng.standard_normal(size).astype(dtype) for size in SIZES]


@pytest.mark.parametrize("wire", ["float32", "float64", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_pack_has_the_bits_of_the_host_and_the_norms_of_float64(rng, stream, dtype, wire):
    grads = random_arrays(rng, dtype)
    scales = rng.uniform(0.1, 3.0, len(SIZES))
    expected, _ = ops.pack_gradients(grads, scales, wire_dtype=wire)
    before = stream.num_launches()
    packed, norms = ops.pack_gradients([on_gpu(grad, dtype) for grad in grads], scales, wire_dtype=wire)
    assert stream.num_launches() == before + 1
    assert (packed.memory == 77).all()  # nothing has run yet
    assert read(packed).tobytes() == expected.tobytes()
    exact = [float(np.square(grad.astype(np.float64)).sum()) for grad in grads]
    np.testing.assert_allclose(read(norms), exact, rtol=1e-12 if dtype == "float64" else 4e-6)


def test_none_packs_zeros_of_its_layout():
    packed, norms = ops.pack_gradients([None, on_gpu([2.0, 3.0])], 0.5, layout=[3, 2], out=on_gpu([9.0] * 5))
    assert read(packed).tolist() == [0.0, 0.0, 0.0, 1.0, 1.5]
    assert read(norms).tolist() == [0.0, 13.0]


@pytest.mark.parametrize("add", [False, True])
def test_unpack_copies_or_adds(rng, add):
    values = random_arrays(rng)
    packed = on_gpu(np.concatenate(values))
    outs = [on_gpu(np.full(size, 2.0)) for size in SIZES]
    ops.unpack_gradients(packed, outs, add=add)
    for out, value in zip(outs, values, strict=True):
        np.testing.assert_array_equal(read(out), value + np.float32(2.0) if add else value)
    ops.add_packed(packed, on_gpu(np.ones(sum(SIZES))))
    np.testing.assert_array_equal(read(packed), np.concatenate(values) + np.float32(1.0))


def test_squared_norms_of_lists_and_of_packed_buffers(rng):
    arrays = random_arrays(rng, "float64")
    exact = [float(np.square(array).sum()) for array in arrays]
    np.testing.assert_allclose(read(ops.squared_norms([on_gpu(a, "float64") for a in arrays])), exact, rtol=1e-12)
    packed = on_gpu(np.concatenate(arrays), "float64")
    np.testing.assert_allclose(read(ops.squared_norms(packed, layout=SIZES)), exact, rtol=1e-12)


SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
LARS = dict(SETTINGS, trust_coefficient=0.02, eps=1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("known", ["nothing", "params", "all", "host"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_lars_is_that_of_the_host(rng, nesterov, known, is_packed):
    params, momenta, grads = (random_arrays(rng, "float64") for _ in range(3))
    settings = dict(LARS, nesterov=nesterov, adapt=[True, False, True, True, False])
    norms = {"param_norms": None, "grad_norms": None}
    if known != "nothing":
        norms["param_norms"] = np.array([float(np.linalg.norm(param)) for param in params])
    if known == "all":
        norms["grad_norms"] = np.array([float(np.linalg.norm(grad)) for grad in grads])
    device = [[on_gpu(array, "float64") for array in group] for group in (params, momenta, grads)]
    device_grads: Any = on_gpu(np.concatenate(grads), "float64") if is_packed else device[2]
    given = {name: v if v is None or known == "host" else on_gpu(v, "float64") for name, v in norms.items()}
    found = ops.lars_update(device[0], device[1], device_grads, **settings, **given)
    expected = ops.lars_update(params, momenta, grads, **settings, **norms)
    for mine, theirs in zip((*device[0], *device[1], *found), (*params, *momenta, *expected), strict=True):
        np.testing.assert_allclose(read(mine), theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("op", ["lars", "sgd"])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_skip_nonfinite_is_decided_on_the_device(rng, op, value):
    params, momenta, grads = ([on_gpu(array) for array in random_arrays(rng)] for _ in range(3))
    grads[3].memory[7] = value
    before = [array.memory.copy() for array in (*params, *momenta)]
    for _ in range(2):
        if op == "lars":
            ops.lars_update(params, momenta, grads, **LARS, adapt=[True] * len(SIZES), skip_nonfinite=True)
        else:
            ops.sgd_update(params, momenta, grads, **SETTINGS, skip_nonfinite=True)
    same = all(np.array_equal(read(a), b) for a, b in zip((*params, *momenta), before, strict=True))
    assert same == (not np.isfinite(value))


def test_sgd_is_that_of_the_host(rng):
    params, momenta, grads = (random_arrays(rng) for _ in range(3))
    device = [[on_gpu(array) for array in group] for group in (params, momenta, grads)]
    found = ops.sgd_update(*device, **SETTINGS)
    expected = ops.sgd_update(params, momenta, grads, **SETTINGS)
    for mine, theirs in zip((*device[0], *device[1], found), (*params, *momenta, expected), strict=True):
        np.testing.assert_allclose(read(mine), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", ops.STRATEGIES)
@pytest.mark.parametrize(
    ("draw", "run_length"), [("bernoulli", None), ("systematic", None), ("systematic", 2), ("systematic", 300)]
)
def test_draws_have_the_bits_of_the_host(rng, strategy, draw, run_length):
    for num_layers in (1, 60, 300):
        p = rng.uniform(0.0, 1.0, num_layers)
        settings = dict(seed=5, step=3, rank=1, world_size=4, strategy=strategy, draw=draw, run_length=run_length)
        found = ops.sample_layers(on_gpu(p, "float64"), **settings)
        assert read(found).tolist() == ops.sample_layers(p, **settings).tolist()
        into = on_gpu(np.zeros(num_layers), "bool")
        assert ops.sample_layers(on_gpu(p, "float64"), **settings, out=into) is into
        assert into.memory.tolist() == read(found).tolist()


@pytest.mark.parametrize("shift", [False, True])
def test_probabilities_are_those_of_the_host(rng, shift):
    p, drawn = np.full(60, 0.5), rng.uniform(0.3, 0.7, 60)
    n2, active = rng.uniform(0.0, 4.0, 60), rng.random(60) < 0.5
    settings = dict(budget=30.0, p_min=0.05, bandit_lr=0.1, shift=shift)
    expected, bound = ops.update_probabilities(p, n2, active, drawn_probabilities=drawn, gradient_bound=0.5, **settings)
    found, device_bound = ops.update_probabilities(
        on_gpu(p, "float64"), on_gpu(n2, "float64"), on_gpu(active, "bool"),
        drawn_probabilities=on_gpu(drawn, "float64"), gradient_bound=0.5, **settings,
    )  # fmt: skip
    np.testing.assert_allclose(read(found), expected, rtol=1e-11)
    assert device_bound.shape == ()
    np.testing.assert_allclose(read(device_bound), bound, rtol=1e-14)
    log_w = rng.uniform(-50.0, 50.0, 60)
    projected = ops.project_probabilities(on_gpu(log_w, "float64"), budget=20, p_min=0.1)
    np.testing.assert_allclose(read(projected), ops.project_probabilities(log_w, budget=20, p_min=0.1), rtol=1e-11)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: ops.add_packed(on_gpu([1.0]), np.ones(1, np.float32)),
            TypeError,
            "packed is on the CPU, not on cuda:0",
        ),
        (lambda: ops.add_packed(on_gpu([1.0]), on_gpu([1.0], "float64")), TypeError, "dtype of out"),
        (lambda: ops.add_packed(on_gpu([1.0]), on_gpu([1, 2], "int32")), TypeError, "packed must have dtype"),
        (lambda: ops.unpack_gradients(on_gpu([1.0]), [on_gpu([1.0, 2.0])]), ValueError, "packed has 1 elements"),
        (
            lambda: ops.squared_norms([DeviceArray(np.ones((4, 4), np.float32)[:, ::2])]),
            ValueError,
            r"grads\[0\] is not dense",
        ),
        (
            lambda: ops.lars_update(
                [on_gpu([1.0])], [on_gpu([1.0])], [on_gpu([1.0])], **LARS, param_norms=on_gpu([1.0])
            ),
            TypeError,
            "param_norms must have dtype float64",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
