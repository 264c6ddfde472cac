"""Threads that share a stream or have each their own, other threads' captures, and streams of CuPy's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from device_calls import CALLS, SIZE
from device_support import DEVICE, keep_busy
from jointspar import ops
from support import bits

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

NUM_THREADS = 4
native_only = pytest.mark.parametrize("backend", ["native"], indirect=True)


def random_vector(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def in_slices(x: torch.Tensor, num_slices: int) -> list[torch.Tensor]:
    """Norms of x in so many slices: tables of different sizes."""
    return [ops.squared_norms(list(x.tensor_split(num_slices)))]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one stream", "a stream each"])
def test_threads_that_call_at_the_same_time_get_their_own_results(is_shared: bool) -> None:
    vectors = [random_vector(seed) for seed in range(NUM_THREADS)]
    calls = [*CALLS.values(), *(lambda x, k=k: in_slices(x, k) for k in (1, 100, 1000))]
    expected = [[[bits(result) for result in call(x)] for call in calls] for x in vectors]
    common = torch.cuda.Stream()
    start = threading.Barrier(NUM_THREADS)

    def work(thread: int) -> int:
        """How many of this thread's calls were right."""
        stream = common if is_shared else torch.cuda.Stream()
        num_right = 0
        start.wait()
        with torch.cuda.stream(stream):
            for turn in range(20):
                index = (turn + thread) % len(calls)
                results = calls[index](vectors[thread])
                num_right += [bits(result) for result in results] == expected[thread][index]
        return num_right

    torch.cuda.synchronize()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        assert list(threads.map(work, range(NUM_THREADS))) == [20] * NUM_THREADS


def test_a_call_beside_another_threads_capture_is_right_and_leaves_the_graph_right(backend: str) -> None:
    """CuPy asks for memory and for events, which only a capture that its own thread alone is bound to allows."""
    x, other = random_vector(0), random_vector(1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # torch's own allocations would break a capture, so it has memory there beforehand
        first = ops.squared_norms([other])
    torch.cuda.synchronize()
    is_capturing, is_done = threading.Event(), threading.Event()

    def call() -> list[torch.Tensor]:
        assert is_capturing.wait(60)
        try:
            with torch.cuda.stream(side):
                return [ops.squared_norms([other]) for _ in range(100)]
        finally:
            is_done.set()

    graph = torch.cuda.CUDAGraph()
    mode = "global" if backend == "native" else "thread_local"
    with ThreadPoolExecutor(1) as threads:
        results = threads.submit(call)
        with torch.cuda.graph(graph, capture_error_mode=mode):
            doubled = 2 * x
            is_capturing.set()
            assert is_done.wait(60)
            tripled = 3 * x
        norms = results.result()
    torch.cuda.synchronize()
    graph.replay()
    assert {bits(norm) for norm in norms} == {bits(first)}
    assert [bits(doubled), bits(tripled)] == [bits(2 * x), bits(3 * x)]


def packed(x: Any) -> list[Any]:
    return list(ops.pack_gradients([x[:10], x[10:]], [2.0, 0.5]))


def added(x: Any) -> list[Any]:
    total = x * 2
    ops.add_packed(total, x)
    return [total]


def norms(x: Any) -> list[Any]:
    return [ops.squared_norms([x[:1000], x[1000:]])]


@native_only
@pytest.mark.parametrize("call", [packed, added, norms])
def test_a_graph_captured_on_a_stream_of_cupy_gives_right_results_for_new_input(
    call: Callable[[Any], list[Any]],
) -> None:
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.zeros(SIZE, dtype="float32")
    cupy.cuda.Device().synchronize()
    with stream:
        call(x)  # compiles and allocates what is made once
        stream.synchronize()
        stream.begin_capture()
        results = call(x)
        graph = stream.end_capture()
        for turn in range(30):
            values = cupy.arange(SIZE, dtype="float32") + turn
            x[...] = values
            graph.launch(stream)
            replayed = [result.get().tobytes() for result in results]
            assert replayed == [result.get().tobytes() for result in call(values)], f"replay {turn}"


@pytest.mark.parametrize("backend", ["cupy"], indirect=True)
def test_memory_that_was_outgrown_goes_back_to_cupys_pool_behind_its_last_use() -> None:
    """The stream is late; what it gets from the pool may be such memory, and is overwritten in its turn alone."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.arange(50_000, dtype="float32") % 7
    expected = [[float((x[k::count] ** 2).sum()) for k in range(count)] for count in (1, 10, 100, 1000, 10_000)]
    cupy.cuda.Device().synchronize()
    results, overwritten = [], []
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        for num_slices in map(len, expected):
            keep_busy(20)
            results.append(ops.squared_norms([x[k::num_slices].copy() for k in range(num_slices)]))
            for num_bytes in (1 << 14, 1 << 16, 1 << 18, 1 << 20):
                overwritten.append(cupy.full(num_bytes, 0xA5, dtype="uint8"))
    stream.synchronize()
    assert [result.tolist() for result in results] == expected
