"""Malformed calls of the operations: each raises ValueError or TypeError naming the argument, and writes nothing.

A case is a valid call with one argument replaced. Cases that need one library's features are made with it; all
others run on torch tensors and NumPy arrays alike, on every backend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import ops
from malformed import (
    BAD_ANY,
    BAD_NUMPY,
    BAD_TORCH,
    LIBRARIES,
    NOT_A_NUMBER,
    NOT_FINITE,
    NOT_WHOLE,
    Arguments,
    Case,
    float_arrays,
    read_only,
    valid_arguments,
)
from support import bits

# --- the table --------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns that some kinds of tensors are new or old


def scalar_cases() -> Iterator[Case]:
    """Numbers that are missing, of another type, not finite, or out of range."""

    def wrong(op: str, argument: str, values: Arguments) -> Iterator[Case]:
        for label, value in values.items():
            yield Case(op, label, argument, "numpy", lambda _, a=argument, v=value: {a: v})

    for argument in ("seed", "step", "rank", "world_size"):
        yield from wrong("sample_layers", argument, {**NOT_WHOLE, "negative": -1, "huge": 2**64})
    yield from wrong("sample_layers", "step", {"2**32": 2**32})
    yield from wrong("sample_layers", "rank", {"world_size": 4, "above": 5})
    yield from wrong("sample_layers", "world_size", {"zero": 0, "2**31": 2**31})
    not_a_run_length = {label: value for label, value in NOT_WHOLE.items() if label != "none"}  # the default
    yield from wrong("sample_layers", "run_length", {**not_a_run_length, "zero": 0, "negative": -1, "2**32": 2**32})
    bernoulli = {"draw": "bernoulli", "run_length": 2}
    yield Case("sample_layers", "bernoulli", "run_length", "numpy", lambda _: bernoulli)
    for argument in ("strategy", "draw"):
        values = {"unknown": "best", "none": None, "number": 1, "empty": "", "case": "Shared", "list": ["shared"]}
        yield from wrong("sample_layers", argument, {**values, "array": np.array(["shared", "x"])})
    for op in ("project_probabilities", "update_probabilities"):
        out_of_range = {**NOT_A_NUMBER, **NOT_FINITE, "negative": -1.0, "zero": 0.0}
        yield from wrong(op, "budget", {**out_of_range, "above_num_layers": 4.1, "below_p_min": 0.39})
        yield from wrong(op, "p_min", {**out_of_range, "above_1": 1.5})
    for argument in ("gradient_bound", "bandit_lr"):
        yield from wrong("update_probabilities", argument, {**NOT_A_NUMBER, **NOT_FINITE, "negative": -1.0})
    for op in ("lars_update", "sgd_update"):
        names = ["lr", "momentum", "weight_decay"] + (["trust_coefficient", "eps"] if op == "lars_update" else [])
        for argument in names:
            yield from wrong(op, argument, {**NOT_A_NUMBER, **NOT_FINITE, "negative": -0.1, "too_few": [0.1]})
            yield from wrong(op, argument, {"too_many": [0.1] * 3, "one_nan": [0.1, math.nan], "empty": []})
    bad_scales = {**NOT_A_NUMBER, **NOT_FINITE, "too_few": [1.0], "too_many": [1.0] * 3, "one_inf": [1.0, math.inf]}
    yield from wrong("pack_gradients", "scales", bad_scales)


def vector_cases() -> Iterator[Case]:
    """Per-layer vectors of the wrong length, dimension, kind or range."""
    wrong_vectors: dict[str, Callable[[Any], Any]] = {
        "none": lambda _: None,
        "text": lambda _: "0.5",
        "number": lambda _: 0.5,
        "ragged": lambda _: [[0.5], [0.5, 0.5]],
        "words": lambda _: ["a", "b", "c", "d"],
        "0d": lambda arrays: arrays.array(0.5, "float64"),
        "2d": lambda arrays: arrays.array([[0.5, 0.5], [0.5, 0.5]], "float64"),
        "complex": lambda _: np.full(4, 0.5 + 0j),
        "nan": lambda arrays: arrays.array([0.5, math.nan, 0.5, 0.5], "float64"),
        "inf": lambda arrays: arrays.array([0.5, 0.5, 0.5, math.inf], "float64"),
        "meta": lambda _: torch.full((4,), 0.5, device="meta"),
        "sparse": lambda _: torch.full((4,), 0.5).to_sparse(),
    }
    range_cases = {
        "negative": lambda arrays: arrays.array([0.5, -0.1, 0.5, 0.5], "float64"),
        "above_1": lambda arrays: arrays.array([0.5, 1.1, 0.5, 0.5], "float64"),
    }
    length = {"length": lambda arrays: arrays.array([0.5] * 3, "float64")}
    zero = {"zero": lambda arrays: arrays.array([0.5, 0.0, 0.5, 0.5], "float64")}
    for op, argument, makers in (
        ("sample_layers", "probabilities", {**wrong_vectors, **range_cases}),
        ("project_probabilities", "log_weights", wrong_vectors),
        ("update_probabilities", "probabilities", {**wrong_vectors, **range_cases, **zero}),
        ("update_probabilities", "squared_norms", {**wrong_vectors, **length, "negative": range_cases["negative"]}),
        ("update_probabilities", "drawn_probabilities", {**wrong_vectors, **range_cases, **length, **zero}),
    ):
        for label, make in makers.items():
            if argument == "drawn_probabilities" and label == "none":
                continue  # the default
            for library in LIBRARIES:
                yield Case(op, label, argument, library, lambda arrays, a=argument, m=make: {a: m(arrays)})
    bad_flags = {
        "none": None,
        "ints": [1, 0, 1, 1],
        "floats": [1.0] * 4,
        "length": [True] * 3,
        "number": True,
        "text": "1",
    }
    for label, value in bad_flags.items():
        yield Case("update_probabilities", label, "active", "numpy", lambda _, v=value: {"active": v})
        if label != "none":
            yield Case("lars_update", label, "adapt", "numpy", lambda _, v=value: {"adapt": v})
    bad_norms = {
        "negative": [-1.0, 1.0],
        "length": [1.0],
        "2d": [[1.0, 1.0]],
        "text": "1",
        "number": 1.0,
    }
    for argument in ("param_norms", "grad_norms"):
        for label, value in bad_norms.items():
            yield Case("lars_update", label, argument, "numpy", lambda _, a=argument, v=value: {a: v})


def array_cases() -> Iterator[Case]:
    """Arrays that cannot be read or written as dense floats, in every place that takes an array."""
    for library, makers in (("torch", BAD_TORCH | BAD_ANY), ("numpy", BAD_NUMPY | BAD_ANY)):
        for label, make in makers.items():
            for op, argument in (
                ("pack_gradients", "grads"), ("unpack_gradients", "outs"), ("squared_norms", "grads"),
                ("lars_update", "params"), ("lars_update", "momenta"), ("lars_update", "grads"),
                ("sgd_update", "params"), ("sgd_update", "momenta"), ("sgd_update", "grads"),
            ):  # fmt: skip

                def in_second_place(arrays: Any, op: str = op, argument: str = argument, make: Any = make) -> Arguments:
                    names = [
                        name for name in ("params", "momenta", "grads", "outs") if name in valid_arguments(op, arrays)
                    ]
                    fours = {name: float_arrays(arrays, 4, 4) for name in names}
                    packed = {"packed": float_arrays(arrays, 8)[0]} if op == "unpack_gradients" else {}
                    return {**fours, **packed, argument: [*float_arrays(arrays, 4), make()]}

                yield Case(op, f"second_{label}", argument, library, in_second_place)
            for op, argument in (
                ("add_packed", "out"), ("add_packed", "packed"),
                ("unpack_gradients", "packed"), ("pack_gradients", "out"),
            ):  # fmt: skip

                def among_fours(arrays: Any, op: str = op, argument: str = argument, make: Any = make) -> Arguments:
                    fours = {
                        "add_packed": {name: float_arrays(arrays, 4)[0] for name in ("out", "packed")},
                        "unpack_gradients": {"outs": float_arrays(arrays, 1, 3)},
                        "pack_gradients": {"grads": float_arrays(arrays, 1, 3)},
                    }
                    return {**fours[op], argument: make()}

                yield Case(op, label, argument, library, among_fours)
    for op, argument in (
        ("unpack_gradients", "outs"), ("squared_norms", "grads"), ("lars_update", "params"),
        ("lars_update", "momenta"), ("sgd_update", "params"), ("sgd_update", "momenta"),
    ):  # fmt: skip
        yield Case(op, "none_inside", argument, "torch", lambda a, name=argument: {name: [*float_arrays(a, 4), None]})
    yield Case(
        "pack_gradients", "none_without_layout", "layout", "torch", lambda a: {"grads": [*float_arrays(a, 4), None]}
    )


def list_cases() -> Iterator[Case]:
    """Lists that are no lists, or lists of another length."""
    wrong_lists = {"none": None, "text": "grads", "number": 3, "dict": {}, "iterator": iter(())}
    for op, argument in (
        ("pack_gradients", "grads"), ("unpack_gradients", "outs"), ("lars_update", "params"),
        ("lars_update", "momenta"), ("sgd_update", "params"), ("sgd_update", "momenta"),
    ):  # fmt: skip
        for label, value in wrong_lists.items():
            yield Case(op, label, argument, "torch", lambda _, a=argument, v=value: {a: v})
        yield Case(op, "bare_array", argument, "torch", lambda arrays, a=argument: {a: float_arrays(arrays, 4)[0]})
    for op in ("lars_update", "sgd_update", "squared_norms"):
        for label, value in wrong_lists.items():
            yield Case(op, label, "grads", "torch", lambda _, v=value: {"grads": v})
    for op in ("lars_update", "sgd_update"):
        for argument in ("momenta", "grads"):
            for library in LIBRARIES:
                for counts in ((), (4,), (4, 6, 1), (6, 4), (4, 7), (4, 0)):
                    label = f"sizes{counts}"
                    yield Case(op, label, argument, library, lambda a, n=argument, c=counts: {n: float_arrays(a, *c)})
        for size in (0, 9, 11):
            yield Case(op, f"packed_{size}", "grads", "torch", lambda a, n=size: {"grads": a.array(np.ones(n))})
        yield Case(op, "packed_2d", "grads", "torch", lambda a: {"grads": a.array(np.ones((2, 5)))})
        yield Case(op, "packed_0d", "grads", "torch", lambda a: {"grads": a.array(1.0)})
        yield Case(op, "packed_strided", "grads", "torch", lambda a: {"grads": a.array(np.ones(20))[::2]})
        yield Case(op, "packed_int", "grads", "torch", lambda _: {"grads": torch.arange(10)})


def layout_cases() -> Iterator[Case]:
    """Layouts that do not describe the buffer."""
    wrong = {
        "negative": [12, -2], "short_sum": [4, 5], "long_sum": [4, 7], "huge": [2**62, 2**62],
        "beyond_int64": [2**64, 1],
        "too_few": [10], "too_many": [4, 5, 1], "fractions": [4.0, 6.0], "2d": [[4, 6]], "text": "46", "number": 10,
    }  # fmt: skip
    for label, value in wrong.items():
        for op in ("lars_update", "sgd_update"):
            yield Case(op, label, "layout", "torch", lambda a, v=value: {"grads": a.array(np.ones(10)), "layout": v})
        yield Case("pack_gradients", label, "layout|grads", "torch", lambda _, v=value: {"layout": v})
        if label not in ("too_few", "too_many"):
            yield Case(
                "squared_norms",
                label,
                "layout|grads",
                "torch",
                lambda a, v=value: {"grads": a.array(np.ones(10)), "layout": v},
            )
    for op in ("lars_update", "sgd_update", "squared_norms"):
        yield Case(op, "with_a_list", "layout", "torch", lambda _: {"layout": [4, 6]})
    yield Case("squared_norms", "missing", "layout", "torch", lambda a: {"grads": a.array(np.ones(10))})
    none = {"grads": [None, None], "layout": [2**40, 2**40], "wire_dtype": "float32"}
    yield Case(
        "pack_gradients", "out_too_small_for_huge_layout", "out", "torch", lambda a: {**none, "out": a.array([0.0])}
    )


def overlap_cases() -> Iterator[Case]:
    """Outputs that share memory with each other or with inputs."""

    def shifted(arrays: Any) -> list:
        memory = arrays.array(np.ones(10))
        return [memory[0:4], memory[3:9]]

    def twice(arrays: Any) -> list:
        return [arrays.array(np.ones(4))] * 2

    for library in LIBRARIES:
        yield Case("unpack_gradients", "overlap", "outs", library, lambda a: {"outs": shifted(a)})
        yield Case(
            "unpack_gradients", "twice", "outs", library, lambda a: {"outs": twice(a), "packed": a.array(np.ones(8))}
        )
        for op in ("lars_update", "sgd_update"):
            for argument in ("params", "momenta"):
                yield Case(op, "overlap", argument, library, lambda a, n=argument: {n: shifted(a)})
            yield Case(op, "params_as_momenta", "params|momenta", library, lambda a: share(a, "params", "momenta"))
            yield Case(op, "params_as_grads", "params|grads", library, lambda a: share(a, "params", "grads"))
            yield Case(op, "momenta_as_grads", "momenta|grads", library, lambda a: share(a, "momenta", "grads"))

        def packed_into_itself(arrays: Any) -> Arguments:
            memory = arrays.array(np.ones(20))
            return {"packed": memory[:10], "outs": [memory[9:13], memory[13:19]]}

        def out_over_grads(arrays: Any) -> Arguments:
            memory = arrays.array(np.ones(14))
            return {"grads": [memory[:4], memory[4:10]], "out": memory[3:13]}

        def out_over_packed(arrays: Any) -> Arguments:
            memory = arrays.array(np.ones(12))
            return {"out": memory[:10], "packed": memory[1:11]}

        yield Case("unpack_gradients", "into_itself", "packed|outs", library, packed_into_itself)
        yield Case("pack_gradients", "out_over_grads", "out|grads", library, out_over_grads)
        yield Case("add_packed", "shifted", "out|packed", library, out_over_packed)


def share(arrays: Any, first: str, second: str) -> Arguments:
    shared = float_arrays(arrays, 4, 6)
    return {first: shared, second: shared}


def output_cases() -> Iterator[Case]:
    """Outputs of another size, dtype or kind, or read-only."""
    yield Case(
        "unpack_gradients", "read_only", "outs", "numpy", lambda _: {"outs": [np.ones(4, np.float32), read_only(6)]}
    )
    yield Case("add_packed", "read_only", "out", "numpy", lambda _: {"out": read_only(10)})
    yield Case("pack_gradients", "read_only", "out", "numpy", lambda _: {"out": read_only(10)})
    for op in ("lars_update", "sgd_update"):
        for argument in ("params", "momenta"):
            yield Case(
                op, "read_only", argument, "numpy", lambda _, a=argument: {a: [np.ones(4, np.float32), read_only(6)]}
            )
    for library in LIBRARIES:
        for size in (0, 9, 11):
            yield Case("pack_gradients", f"size_{size}", "out", library, lambda a, n=size: {"out": a.array(np.ones(n))})
            yield Case(
                "unpack_gradients",
                f"size_{size}",
                "packed|outs",
                library,
                lambda a, n=size: {"packed": a.array(np.ones(n))},
            )
            yield Case(
                "add_packed", f"size_{size}", "out|packed", library, lambda a, n=size: {"packed": a.array(np.ones(n))}
            )
        for op, argument in (
            ("pack_gradients", "out"),
            ("add_packed", "out"),
            ("add_packed", "packed"),
            ("unpack_gradients", "packed"),
        ):
            yield Case(op, "2d", argument, library, lambda a, n=argument: {n: a.array(np.ones((2, 5)))})
            yield Case(op, "0d", argument, library, lambda a, n=argument: {n: a.array(1.0)})
        yield Case("add_packed", "dtypes", "out|packed", library, lambda a: {"packed": a.array(np.ones(10), "float16")})
        yield Case(
            "pack_gradients", "not_wire_dtype", "out", library,
            lambda a: {"out": a.array(np.ones(10)), "wire_dtype": "float16"},
        )  # fmt: skip
        for dtype, wrong in (("float64", "float32"), ("float32", "float64"), ("float16", "float16")):
            for op in ("lars_update", "sgd_update"):

                def with_dtypes(arrays: Any, dtype: str = dtype, wrong: str = wrong) -> Arguments:
                    kinds = {"params": dtype, "momenta": wrong}
                    return {name: float_arrays(arrays, 4, 6, dtype=kind) for name, kind in kinds.items()}

                yield Case(op, f"{wrong}_for_{dtype}", "momenta", library, with_dtypes)
        for op, shape in (("sample_layers", 3), ("project_probabilities", 5), ("update_probabilities", 0)):
            yield Case(op, "length", "out", library, lambda a, n=shape: {"out": a.array(np.ones(n), "float64")})
            yield Case(op, "dtype", "out", library, lambda a: {"out": a.array(np.ones(4), "float32")})


def result_cases() -> Iterator[Case]:
    """`out=` of the operations on per-layer vectors, and dtypes of the wire that are none."""
    for op in ("sample_layers", "project_probabilities", "update_probabilities"):
        for label, value in {"text": "out", "list": [0.0] * 4, "number": 1.0}.items():
            yield Case(op, label, "out", "numpy", lambda _, v=value: {"out": v})
        yield Case(op, "meta", "out", "torch", lambda _: {"out": torch.ones(4, device="meta", dtype=torch.float64)})
        of_torch = {
            "negated": lambda: torch._neg_view(torch.ones(4, dtype=torch.float64)),
            "nested": BAD_TORCH["nested"],
            "fake": BAD_TORCH["fake"],
            "bfloat16": lambda: torch.zeros(4, dtype=torch.bfloat16),
            "sparse": BAD_TORCH["sparse_coo"],
        }
        for label, make in of_torch.items():
            yield Case(op, label, "out", "torch", lambda _, m=make: {"out": m()})
        frozen = np.zeros(4, bool if op == "sample_layers" else np.float64)
        frozen.setflags(write=False)
        yield Case(op, "read_only", "out", "numpy", lambda _, v=frozen: {"out": v})
    bad_dtypes = {
        "unknown": "float99",
        "int": torch.int32,
        "numpy_int": np.int64,
        "complex": "complex64",
        "number": 4,
        "object": object(),
    }
    for label, value in bad_dtypes.items():
        yield Case("pack_gradients", label, "wire_dtype", "torch", lambda _, v=value: {"wire_dtype": v})
    yield Case("pack_gradients", "bfloat16", "wire_dtype", "numpy", lambda _: {"wire_dtype": "bfloat16"})


def shape_cases() -> Iterator[Case]:
    """Arrays that belong together but lie differently in memory."""
    image = torch.ones(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    for op in ("lars_update", "sgd_update"):
        for argument in ("momenta", "grads"):

            def permuted(_: Any, argument: str = argument) -> Arguments:
                together = {name: [image.clone()] for name in ("params", "momenta", "grads")}
                return {**together, argument: [last.clone()]}

            def reshaped(_: Any, argument: str = argument) -> Arguments:
                together = {name: [torch.ones(4, 6)] for name in ("params", "momenta", "grads")}
                return {**together, argument: [torch.ones(6, 4)]}

            yield Case(op, "channels_last", argument, "torch", permuted)
            yield Case(op, "reshaped", argument, "torch", reshaped)


TABLE = [
    case
    for make in (
        scalar_cases, vector_cases, array_cases, list_cases, layout_cases, overlap_cases, output_cases, result_cases,
        shape_cases,
    )
    for case in make()
]  # fmt: skip


def snapshot(value: Any) -> Any:
    """The bytes of every readable array in an argument."""
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tobytes()
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        has_memory = type(value) is torch.Tensor and not (value.is_quantized or value.is_nested)
        if not has_memory or value._is_zerotensor():
            return None
        return bits(value.contiguous())
    return None


def test_the_table_is_large_and_its_valid_calls_work(backend: str) -> None:
    assert len(TABLE) >= 200
    for op in {case.op for case in TABLE}:
        for arrays in LIBRARIES.values():
            getattr(ops, op)(**valid_arguments(op, arrays))


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case.op}-{case.argument}-{case.label}-{case.library}")
def test_malformed_call_names_the_argument_and_writes_nothing(backend: str, case: Case) -> None:
    arrays = LIBRARIES[case.library]
    arguments = {**valid_arguments(case.op, arrays), **case.replace(arrays)}
    before = {name: snapshot(value) for name, value in arguments.items()}
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(ops, case.op)(**arguments)
    message = str(raised.value)
    assert re.search(rf"\b({case.argument})\b", message), message
    assert {name: snapshot(value) for name, value in arguments.items()} == before
