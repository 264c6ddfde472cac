"""What a benchmark of one operation is made of: cases, arrays, and variants that do the same work on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jointspar import ops
from shapes import MODELS, Shape

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of stored values, relative to the largest one
MOMENTUM_BYTES = 4  # momentum of float32 and bfloat16 parameters is float32
# Calls in one timed sample of a case that fits the caches; larger ones are called once, from cold caches.
CALLS_IN_CACHE = {"in_cache": 10, "small": 20}


@dataclass(frozen=True)
class Case:
    """One size and one dtype of an operation. in_cache: call it repeatedly and leave the caches as they are."""

    name: str
    shapes: Sequence[Shape]
    dtype: str
    calls: int = 1
    in_cache: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operation cannot avoid to move: what a limit kernel moves, and nothing else.

    pattern: "update" (two arrays read and written, one read), "add" (one read and written, one read), "copy" or "read".
    """

    pattern: str
    num_elements: int
    read_bytes: int  # of an element that is only read
    written_bytes: int = 0  # of an element that is written, or read and written

    @property
    def num_bytes(self) -> int:
        touches = 1 if self.pattern == "copy" else 2
        momentum_bytes = touches * MOMENTUM_BYTES if self.pattern == "update" else 0
        return self.num_elements * (self.read_bytes + touches * self.written_bytes + momentum_bytes)


class Problem(Protocol):
    """The arrays of one case, and what is known about a right result."""

    traffic: Traffic | None  # None: the operation is too small for the memory to be its limit
    inputs: Sequence[torch.Tensor]  # what no variant may change

    def reset(self) -> None:
        """Put back, as they were at first, the arrays that variants write."""

    def check(self, call: Callable[[], Any]) -> None:
        """Raise AssertionError unless what `call` returns and writes agrees with float64."""


@dataclass(frozen=True)
class Variant:
    """One way to do an operation.

    role: "ours"; "peer" (does the same work in PyTorch, NumPy or SciPy); "floor" (does less work: no peer, but good to
    know); "limit" (moves the same bytes and does nothing else).
    """

    name: str
    role: str
    call: Callable[[Any], Any]
    backend: str | None = None  # that serves jointspar.ops meanwhile
    dtypes: tuple[str, ...] | None = None  # None: all
    compiles: bool = False  # by torch.compile: needs a C++ compiler, and some seconds before its first call
    max_rounds: int | None = None  # for what would take most of the time and decides nothing

    def serving(self) -> Any:
        """A context in which the variant may be called."""
        return nullcontext() if self.backend is None else ops.use_backend(self.backend)


@dataclass(frozen=True)
class Operation:
    """An operation of jointspar.ops with its cases and variants."""

    name: str
    cases: Sequence[Case]
    make_problem: Callable[[Case], Problem]
    variants: Sequence[Variant]

    def variants_of(self, case: Case) -> list[Variant]:
        return [variant for variant in self.variants if variant.dtypes is None or case.dtype in variant.dtypes]


def backends_of(call: Callable[[Any], Any]) -> list[Variant]:
    """`call`, which uses jointspar.ops, served by each backend."""
    return [
        Variant("native", "ours", call, "native"),
        Variant("numba", "ours", call, "numba"),
        Variant("reference", "ours", call, "reference", max_rounds=3),
    ]


def model_cases(dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[Case]:
    """Every list of shapes in each dtype."""
    return [
        Case(name, shapes, dtype, CALLS_IN_CACHE.get(name, 1), name in CALLS_IN_CACHE)
        for name, shapes in MODELS.items()
        for dtype in dtypes
    ]


def compile_for_any_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for sizes, dtypes and thread counts that are not known yet: a few versions, each made when needed.

    The default limit of 8 versions would make torch run the function without compiling it, and say so only in a log.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


def verify(operation: Operation, case: Case, variant: Variant, problem: Problem) -> None:
    """Raise AssertionError, naming the variant, where its result is wrong or its inputs were changed.

    A floor's result is that of another operation: only its inputs are looked at.
    """
    problem.reset()
    before = _fingerprint(problem.inputs)
    try:
        with variant.serving():
            if variant.role == "floor":
                variant.call(problem)
            else:
                problem.check(lambda: variant.call(problem))
        assert _fingerprint(problem.inputs) == before, "an input was changed"
    except AssertionError as error:
        raise AssertionError(f"{operation.name}, {case}, {variant.name}: {error}") from error


def assert_close(what: str, actual: Sequence[Any], expected: Sequence[torch.Tensor], tolerance: float) -> None:
    """Each array within `tolerance` of its float64 values, relative to the largest of them."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} arrays, expected {len(expected)}"
    for index, (values, right) in enumerate(zip(actual, expected, strict=True)):
        difference = torch.as_tensor(values).to(torch.float64).reshape(right.shape).sub_(right).abs_().max()
        allowed = tolerance * right.abs().max()
        assert difference <= allowed, f"{what}[{index}] is off by {float(difference):.3g}, allowed {float(allowed):.3g}"


def _fingerprint(tensors: Sequence[torch.Tensor]) -> list[float]:
    return [float(tensor.sum(dtype=torch.float64)) for tensor in tensors]


def pytest_cases(operation: Operation) -> list[tuple[Case, Variant]]:
    """What a pytest-benchmark function is parametrized with."""
    return [(case, variant) for case in operation.cases for variant in operation.variants_of(case)]


def pytest_id(value: Any) -> str:
    return value.name if isinstance(value, Variant) else str(value)


def run_in_pytest(benchmark: Any, operation: Operation, case: Case, variant: Variant) -> None:
    """Check one variant, then hand it to pytest-benchmark, with the arrays put back before each round."""
    problem = operation.make_problem(case)
    verify(operation, case, variant, problem)
    rounds = min(10, variant.max_rounds or 10)
    with variant.serving():
        benchmark.pedantic(variant.call, args=(problem,), setup=problem.reset, rounds=rounds)
