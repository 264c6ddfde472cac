"""Which arrays and calls the run-time compiled backend takes, and which it refuses before anything is launched."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_cupy import STREAM, FakeCupy, memory, ndarray, serving
from jointspar import backends
from jointspar.device_arrays import Place

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCupy]:
    """Notes launches and does not run them."""
    cupy = FakeCupy(None)
    with serving(cupy, monkeypatch, tmp_path):
        yield cupy


def on_device() -> Any:
    return backends.device_backend(Place(0, "cupy"), None)


class Interface:
    """An array that has __cuda_array_interface__ alone."""

    def __init__(self, tensor: torch.Tensor, **changes: Any) -> None:
        self.tensor = tensor
        data = (tensor.data_ptr(), False)
        given = {"shape": tuple(tensor.shape), "typestr": "<f4", "data": data, "strides": None, "version": 3}
        self.__cuda_array_interface__ = {**given, **changes}


class WithDLPack:
    def __init__(self, array: ndarray | Exception, kind: int = 2, device: int = 0) -> None:
        self._array, self._place = array, (kind, device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._place

    def __dlpack__(self, *, stream: int) -> ndarray:
        assert stream == STREAM  # the call's
        if isinstance(self._array, Exception):
            raise self._array
        return self._array


class OnCuda(torch.Tensor):
    """Says that it is on a CUDA device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnCuda)


VALUES = torch.arange(4.0)
READABLE = {
    "cupy": lambda: ndarray(VALUES),
    "cupy_bfloat16": lambda: ndarray(VALUES.to(torch.bfloat16)),
    "interface": lambda: Interface(VALUES),
    "interface_with_strides": lambda: Interface(VALUES.reshape(2, 2), strides=(4, 8)),
    "dlpack": lambda: WithDLPack(ndarray(VALUES)),
    "torch": lambda: on_cuda(VALUES),
    "torch_transposed": lambda: on_cuda(VALUES.reshape(2, 2).t()),
    "torch_with_grad": lambda: on_cuda(VALUES.clone().requires_grad_()),
}
REFUSED = {
    "numpy": lambda: np.ones(4, np.float32),
    "torch_cpu": lambda: VALUES,
    "torch_meta": lambda: torch.ones(4, device="meta"),
    "torch_sparse": lambda: VALUES.to_sparse(),
    "torch_strided": lambda: on_cuda(torch.arange(8.0)[::2]),
    "torch_expanded": lambda: on_cuda(torch.ones(1).expand(4)),
    "torch_negated": lambda: on_cuda(torch._neg_view(VALUES)),
    "torch_int": lambda: on_cuda(torch.arange(4)),
    "cupy_int": lambda: ndarray(torch.arange(4)),
    "cupy_bool": lambda: ndarray(torch.ones(4, dtype=torch.bool)),
    "cupy_strided": lambda: ndarray(torch.arange(8.0)[::2]),
    "cupy_other_device": lambda: ndarray(VALUES, device=1),
    "interface_unaligned": lambda: Interface(VALUES, data=(VALUES.data_ptr() + 2, False)),
    "interface_big_endian": lambda: Interface(VALUES, typestr=">f4"),
    "interface_int": lambda: Interface(VALUES, typestr="<i4"),
    "interface_gap": lambda: Interface(VALUES, strides=(8,)),
    "interface_reversed": lambda: Interface(VALUES, strides=(-4,)),
    "interface_odd_strides": lambda: Interface(VALUES, strides=(5,)),
    "interface_strides_of_two_dimensions": lambda: Interface(VALUES, strides=(4, 4)),
    "interface_without_data": lambda: Interface(VALUES, data=None),
    "dlpack_cpu": lambda: WithDLPack(ndarray(VALUES), kind=1),
    "dlpack_other_device": lambda: WithDLPack(ndarray(VALUES), device=1),
    "dlpack_refusing": lambda: WithDLPack(BufferError("not now")),
    "none": lambda: None,
    "list": lambda: [1.0, 2.0, 3.0, 4.0],
    "text": lambda: "gradient",
}


@pytest.mark.parametrize("kind", READABLE)
def test_arrays_of_every_library_are_read(cupy: FakeCupy, kind: str) -> None:
    from jointspar.backends import cupy_tables as tables

    array = READABLE[kind]()
    on_device().squared_norms([array], None)
    cupy.synchronize()  # the upload
    (launch,) = cupy.launches
    (record,) = memory(launch.arguments[0], tables.NORM_RECORD, 1)
    assert record["size"] == 4
    assert tables.DTYPE_CODES[torch.bfloat16 if "bfloat16" in kind else torch.float32] == record["source_dtype"]
    if "bfloat16" not in kind and "grad" not in kind:
        assert record["source"] == VALUES.data_ptr()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dense_float_array_of_the_device_is_refused_by_name(cupy: FakeCupy, kind: str) -> None:
    arrays = [cupy.array(np.ones(4)), REFUSED[kind]()]
    with pytest.raises((TypeError, ValueError), match=r"^grads\[1\]:"):
        on_device().squared_norms(arrays, None)
    assert not cupy.launches and not cupy.num_copies


def test_malformed_calls_are_refused_before_anything_is_launched(cupy: FakeCupy) -> None:
    def floats(*sizes: int, dtype: str = "float32") -> list:
        return [cupy.array(np.ones(size), dtype) for size in sizes]

    from jointspar.backends import cupy_jit

    at = {"device": 0, "stream": 7}
    two, sizes, ones, norms = floats(4, 6), np.array([4, 6]), np.ones(2), cupy.empty(2, "float64")
    (packed,) = floats(10)
    hyper3, hyper5, adapt = np.ones((2, 3)), np.ones((2, 5)), np.ones(2, bool)
    shared = torch.ones(20)
    read_only = Interface(shared[:10], data=(shared.data_ptr(), True))
    draw = {"seed": 0, "step": 0, "rank": 0, "world_size": 1, "strategy": "shared", "draw": "bernoulli"}
    p, active = cupy.array(np.full(4, 0.5), "float64"), ndarray(torch.ones(4, dtype=torch.bool))
    bound = cupy.array([1.0], "float64")
    bandit = {"budget": 2.0, "p_min": 0.1, "bandit_lr": 0.1, "shift": False}
    lars = {"hyper": hyper5, "adapt": adapt, "nesterov": False, "skip_nonfinite": False, "param_norms": None,
            "grad_norms": None, "used_grad_norms": norms, "param_norms_after": cupy.empty(2, "float64")}  # fmt: skip
    sgd = {"hyper": hyper3, "nesterov": False, "skip_nonfinite": False, "grad_norms": norms}
    q = cupy.empty(4, "float64")
    cases: list[tuple[str, Any]] = [
        ("grads", lambda: cupy_jit.pack_gradients(packed, ones, sizes, packed, norms, **at)),
        ("scales", lambda: cupy_jit.pack_gradients(two, np.ones(3), sizes, packed, norms, **at)),
        ("sizes", lambda: cupy_jit.pack_gradients(two, ones, np.array([4, 7]), packed, norms, **at)),
        ("sizes", lambda: cupy_jit.pack_gradients(two, ones, np.array([-4, 14]), packed, norms, **at)),
        (r"grads\[0\]", lambda: cupy_jit.pack_gradients(two, ones, np.array([6, 4]), packed, norms, **at)),
        ("out", lambda: cupy_jit.pack_gradients(two, ones, sizes, read_only, norms, **at)),
        ("squared_norms", lambda: cupy_jit.pack_gradients(two, ones, sizes, packed, floats(2)[0], **at)),
        ("squared_norms", lambda: cupy_jit.pack_gradients(two, ones, sizes, packed, cupy.empty(3, "float64"), **at)),
        ("overlaps", lambda: cupy_jit.pack_gradients([ndarray(shared[:4]), two[1]], ones, sizes, ndarray(shared[3:13]),
                                                     norms, **at)),
        ("overlaps", lambda: cupy_jit.squared_norms([norms, norms], None, norms, **at)),
        ("sizes", lambda: cupy_jit.squared_norms(packed, None, norms, **at)),
        ("sizes", lambda: cupy_jit.squared_norms(two, sizes, norms, **at)),
        ("outs", lambda: cupy_jit.unpack_gradients(packed, floats(4, 7), False, **at)),
        ("overlaps", lambda: cupy_jit.unpack_gradients(ndarray(shared[:8]), [ndarray(shared[4:12])], False, **at)),
        ("overlaps", lambda: cupy_jit.unpack_gradients(packed, [ndarray(shared[:4]), ndarray(shared[2:8])], False,
                                                       **at)),
        ("packed", lambda: cupy_jit.add_packed(packed, floats(10, dtype="float64")[0], **at)),
        ("packed", lambda: cupy_jit.add_packed(packed, floats(9)[0], **at)),
        ("overlaps", lambda: cupy_jit.add_packed(packed, packed, **at)),
        ("momenta", lambda: cupy_jit.sgd_update(two, floats(4), two, **sgd, **at)),
        (r"momenta\[0\]", lambda: cupy_jit.sgd_update(two, floats(4, 6, dtype="float64"), floats(4, 6), **sgd, **at)),
        ("overlaps", lambda: cupy_jit.sgd_update(two, floats(4, 6), two, **sgd, **at)),
        ("hyper", lambda: cupy_jit.sgd_update(two, floats(4, 6), floats(4, 6), **{**sgd, "hyper": hyper5}, **at)),
        (r"grads\[1\]", lambda: cupy_jit.sgd_update(two, floats(4, 6), floats(4, 5), **sgd, **at)),
        ("adapt", lambda: cupy_jit.lars_update(two, floats(4, 6), floats(4, 6), **{**lars, "adapt": np.ones(3, bool)},
                                               **at)),
        ("param_norms", lambda: cupy_jit.lars_update(two, floats(4, 6), floats(4, 6),
                                                     **{**lars, "param_norms": floats(2)[0]}, **at)),
        ("overlaps", lambda: cupy_jit.lars_update(two, floats(4, 6), floats(4, 6),
                                                  **{**lars, "param_norms_after": norms}, **at)),
        ("probabilities", lambda: cupy_jit.sample_layers(floats(4)[0], active, **at, **draw)),
        ("active", lambda: cupy_jit.sample_layers(p, q, **at, **draw)),
        ("rank", lambda: cupy_jit.sample_layers(p, active, **at, **{**draw, "rank": 1})),
        ("world_size", lambda: cupy_jit.sample_layers(p, active, **at, **{**draw, "world_size": 2**24 + 1})),
        ("strategy", lambda: cupy_jit.sample_layers(p, active, **at, **{**draw, "strategy": "best"})),
        ("run_length", lambda: cupy_jit.sample_layers(p, active, **at, **draw, run_length=2)),
        ("run_length", lambda: cupy_jit.sample_layers(p, active, **at, **{**draw, "draw": "systematic"}, run_length=0)),
        ("budget", lambda: cupy_jit.project_probabilities(p, q, **at, budget=4.5, p_min=0.1)),
        ("p_min", lambda: cupy_jit.project_probabilities(p, q, **at, budget=2.0, p_min=0.0)),
        ("overlaps", lambda: cupy_jit.project_probabilities(p, p, **at, budget=2.0, p_min=0.1)),
        ("bandit_lr", lambda: cupy_jit.update_probabilities(p, p, active, p, bound, q, **at,
                                                            **{**bandit, "bandit_lr": -1.0})),
        ("gradient_bound", lambda: cupy_jit.update_probabilities(p, p, active, p, p, q, **at, **bandit)),
        ("squared_norms", lambda: cupy_jit.update_probabilities(p, norms, active, p, bound, q, **at, **bandit)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert not cupy.launches and not cupy.num_copies


def test_it_has_the_functions_and_argument_names_of_the_stub(cupy: FakeCupy) -> None:
    from jointspar.backends import cupy_jit

    stub = ast.parse((ROOT / "python" / "jointspar_ext" / "_cuda.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert sorted(functions) == cupy_jit.__all__
    for name, arguments in functions.items():
        parameters = inspect.signature(getattr(cupy_jit, name)).parameters.values()
        named = {kind: [p.name for p in parameters if p.kind == kind] for kind in {p.kind for p in parameters}}
        assert named.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, []) == [argument.arg for argument in arguments.args]
        assert named.get(inspect.Parameter.KEYWORD_ONLY, []) == [argument.arg for argument in arguments.kwonlyargs]
