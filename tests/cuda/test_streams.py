"""Operations belong on the current stream, repeat their bits, and hold inside captured graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from device_calls import CALLS, SIZE
from device_support import DEVICE, keep_busy
from jointspar import backends, ops
from jointspar.backends import on_device
from support import bits

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

Call = Callable[[torch.Tensor], list[torch.Tensor]]
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def random_vector(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def on_side_stream(call: Call, stream: torch.cuda.Stream, seed: int) -> list[bytes]:
    """The results of `call` on a vector that work on the same stream writes late."""
    x, values = torch.zeros(SIZE, device=DEVICE), random_vector(seed)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        keep_busy(50)
        x.copy_(values)
        results = call(x)
    torch.cuda.synchronize()
    return [bits(result) for result in results]


@every_call
def test_work_on_another_stream_waits_for_what_was_put_there_before(call: Call) -> None:
    expected = [bits(result) for result in call(random_vector(0))]
    stream = torch.cuda.Stream()
    on_side_stream(call, stream, seed=9)  # a stream's first call may allocate, which waits
    assert on_side_stream(call, stream, seed=0) == expected


@every_call
def test_work_on_a_stream_that_is_not_the_current_one_would_be_wrong(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    expected = [bits(result) for result in call(random_vector(0))]
    stream, wrong = torch.cuda.Stream(), torch.cuda.Stream()
    monkeypatch.setattr(on_device, "stream_of", lambda place, array: wrong.cuda_stream)
    on_side_stream(call, stream, seed=9)  # other values, as memory that is used again holds what was there before
    assert on_side_stream(call, stream, seed=0) != expected


@every_call
def test_every_run_gives_the_same_bits(call: Call) -> None:
    x = random_vector(1)
    first = [bits(result) for result in call(x)]
    busy = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(busy):  # blocks are then scheduled otherwise
            torch.randn(1 << 20, device=DEVICE).sort()
        assert [bits(result) for result in call(x)] == first


@every_call
def test_every_call_has_the_same_bits_on_both_backends(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_vector(3)
    x[:100] *= 1e-40  # subnormals
    results = []
    for name in backends.DEVICE_BACKENDS:
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
        results.append([bits(result) for result in call(x)])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_norms_of_millions_of_elements_have_the_same_bits_in_every_run(dtype: str) -> None:
    sizes = (5_000_001, 3, 1_000_000, 77)
    packed = random_vector(2, sum(sizes)).to(getattr(torch, dtype))
    runs = {bits(ops.squared_norms(packed, layout=sizes)) for _ in range(20)}
    runs_of_pack = {bits(ops.pack_gradients(list(packed.split(sizes)), 1.0)[1]) for _ in range(20)}
    assert len(runs) == len(runs_of_pack) == 1


def captured(call: Call, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of call(x), and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(x)  # compiles and allocates what is made once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(x)
    return graph, results


native_only = pytest.mark.parametrize("backend", ["native"], indirect=True)


@native_only
@every_call
def test_a_captured_graph_gives_right_results_for_new_input(call: Call) -> None:
    x = random_vector(0)
    graph, results = captured(call, x)
    for seed in range(30):
        values = random_vector(seed)
        x.copy_(values)
        graph.replay()
        replayed = [bits(result) for result in results]
        assert replayed == [bits(result) for result in call(values)], f"replay {seed}"


@pytest.mark.parametrize("backend", ["cupy"], indirect=True)
@every_call
def test_cupy_kernels_refuse_a_capture_and_go_on_after_it(call: Call) -> None:
    x = random_vector(0)
    expected = [bits(result) for result in call(x)]
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x + 1.0  # torch warns of an empty graph
            call(x)

    with pytest.raises(RuntimeError, match="needs the compiled CUDA kernels"):
        capture()
    assert [bits(result) for result in call(x)] == expected


def pack_in(num_slices: int) -> Call:
    """Packs SIZE elements in so many slices, each with a scale of its own."""
    sizes = [SIZE // num_slices] * num_slices
    return lambda x: list(ops.pack_gradients(list(x[: sum(sizes)].split(sizes)), [1.0 + k for k in range(num_slices)]))


@native_only
def test_two_graphs_keep_their_tables_while_other_calls_come_between() -> None:
    calls = [pack_in(3), pack_in(100)]
    inputs = [random_vector(seed) for seed in (0, 1)]
    graphs = [captured(call, x) for call, x in zip(calls, inputs, strict=True)]
    for seed in range(30):
        values = random_vector(seed)
        for call, x, (graph, results) in zip(calls, inputs, graphs, strict=True):
            x.copy_(values)
            pack_in(7 + 50 * seed)(values)  # another table, which grows
            graph.replay()
            CALLS["lars"](values)
            assert [bits(result) for result in results] == [bits(result) for result in call(values)]


@native_only
def test_a_captured_update_advances_the_weights_at_each_replay() -> None:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02, "eps": 1e-8}

    def start() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w = random_vector(5)
        return w, torch.zeros_like(w), w.double().norm().reshape(1)

    def step(state: tuple[torch.Tensor, torch.Tensor, torch.Tensor], grad: torch.Tensor) -> None:
        w, u, norm = state
        measured = ops.lars_update([w], [u], [grad], **settings, adapt=[True], param_norms=norm, skip_nonfinite=True)
        norm.copy_(measured.param_norms_after)

    grad, replayed, stepped = random_vector(0), start(), start()
    step(start(), grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(replayed, grad)
    for seed in range(30):
        grad.copy_(random_vector(seed))
        if seed == 7:
            grad[5] = float("nan")
        graph.replay()
        step(stepped, grad.clone())
        assert [bits(tensor) for tensor in replayed] == [bits(tensor) for tensor in stepped], f"replay {seed}"
    assert bool(replayed[0].isfinite().all())


def test_cupy_work_is_put_on_the_current_stream_of_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    torch_view = torch.cuda.ExternalStream(stream.ptr)
    for _ in range(2):  # the first may allocate, which waits
        x = cupy.zeros(SIZE, dtype="float32")
        cupy.cuda.Device().synchronize()
        with stream:
            with torch.cuda.stream(torch_view):
                keep_busy(50)
            x.fill(2.0)
            norms = ops.squared_norms([x])
        stream.synchronize()
    assert norms.tolist() == [4.0 * SIZE]


class NamesItsStream:
    """An array of a library that torch does not know, with work on a stream of that library's."""

    def __init__(self, values: torch.Tensor, stream: int) -> None:
        interface = dict(values.__cuda_array_interface__)
        self.__cuda_array_interface__ = interface | {"version": 3, "stream": stream}
        self.shape, self.ndim, self.dtype = tuple(values.shape), values.ndim, values.dtype


def test_work_on_an_array_that_names_its_stream_is_in_order_there_and_on_the_current_one() -> None:
    stream = torch.cuda.Stream()
    for _ in range(2):  # the first may allocate, which waits
        x = torch.zeros(SIZE, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            keep_busy(50)
            x.fill_(2.0)
        norms = ops.squared_norms([NamesItsStream(x, stream.cuda_stream)])
        doubled = 2 * norms  # on the current stream
    assert doubled.tolist() == [8.0 * SIZE]


@pytest.mark.parametrize("stream", [1, 2], ids=["legacy default", "per-thread default"])
def test_an_array_may_name_one_of_cudas_default_streams(stream: int) -> None:
    x = torch.full((SIZE,), 2.0, device=DEVICE)
    torch.cuda.synchronize()
    assert ops.squared_norms([NamesItsStream(x, stream)]).tolist() == [4.0 * SIZE]
