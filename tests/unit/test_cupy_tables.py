"""The tables and launches of the run-time compiled backend against C++'s layouts and cases worked out by hand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fake_cupy import FakeCupy, Launch, memory, ndarray, serving
from jointspar import backends
from jointspar.device_arrays import Place

ROOT = Path(__file__).parents[2]
RECORDS = {
    "UPDATE_TENSOR": "UpdateTensor", "PACK_RECORD": "PackRecord", "UNPACK_RECORD": "UnpackRecord",
    "NORM_RECORD": "NormRecord", "LARS_RECORD": "LarsRecord", "SGD_RECORD": "SgdRecord", "LARS_RATE": "LarsRate",
    "SKIP_STATE": "SkipState",
}  # fmt: skip


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCupy]:
    """Notes launches and does not run them."""
    cupy = FakeCupy(None, num_multiprocessors=2)
    with serving(cupy, monkeypatch, tmp_path):
        yield cupy


@pytest.fixture
def tables(cupy: FakeCupy) -> Any:
    from jointspar.backends import cupy_tables

    return cupy_tables


def on_device() -> Any:
    return backends.device_backend(Place(0, "cupy"), None)


def flat(size: int, dtype: torch.dtype = torch.float32, address: int = 4096) -> Any:
    return SimpleNamespace(size=size, dtype=dtype, address=address)


# --- layouts and constants --------------------------------------------------------------------------------------------


def test_records_constants_and_codes_are_those_of_the_cuda_sources(tables: Any, tmp_path: Path) -> None:
    from jointspar.backends import cupy_kernels, cupy_probabilities

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    claims = [
        f"kDeviceChunkSize == {tables.CHUNK_SIZE}",
        f"kThreadsPerBlock == {cupy_kernels.THREADS_PER_BLOCK}",
        f"kDrawThreads == {cupy_probabilities._DRAW_THREADS}",
        f"kDrawLayersPerBlock == {cupy_probabilities._LAYERS_PER_BLOCK['systematic']}",
        f"kAllRanks == {cupy_probabilities._ALL_RANKS}u",
        *(f"projection_threads({n}) == {cupy_probabilities.projection_threads(n)}"
          for n in (0, 1, 32, 33, 64, 65, 1000, 1024, 1025, 10**6)),
        *(f"static_cast<int>(DType::{name}) == {tables.DTYPE_CODES[dtype]}" for name, dtype in (
            ("kFloat32", torch.float32), ("kFloat64", torch.float64), ("kBFloat16", torch.bfloat16),
            ("kFloat16", torch.float16))),
    ]  # fmt: skip
    for name, cpp in RECORDS.items():
        dtype = getattr(tables, name)
        claims.append(f"sizeof({cpp}) == {dtype.itemsize}")
        for field, (kind, offset) in dtype.fields.items():
            claims.append(f"offsetof({cpp}, {field}) == {offset}")
            claims.append(f"sizeof({cpp}::{field}) == {kind.itemsize}")
        assert sum(kind.itemsize for kind, _ in dtype.fields.values()) == dtype.itemsize  # no field is missing
    headers = "".join(f'#include "cuda/{path.name}"\n' for path in sorted((ROOT / "csrc/cuda").glob("*_kernel.cuh")))
    checks = "".join(f'static_assert({claim}, "{claim}");\n' for claim in claims)
    source = tmp_path / "layouts.cpp"
    source.write_text(f'#include <cstddef>\n#include "cuda_runtime.h"\n{headers}namespace jointspar {{\n{checks}}}\n')
    includes = [f"-I{ROOT / folder}" for folder in ("tests/cpp/cuda_on_host", "csrc", "csrc/include")]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-w", *includes, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_launchers_of_lars_use_as_many_blocks(cupy: FakeCupy) -> None:
    from jointspar.backends import cupy_jit

    source = (ROOT / "csrc" / "cuda" / "lars_update_cuda.cu").read_text()
    assert f"kBlocksPerMultiprocessor = {cupy_jit._BLOCKS_PER_MULTIPROCESSOR};" in source


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_by_hand(tables: Any) -> None:
    """Sizes around a chunk of 4,096, two types, and an array that is missing: it joins the first type there is."""
    arrays = [flat(4096, torch.float64), None, flat(4097), flat(0), flat(12289, torch.float64)]
    parts = [flat(size) for size in (4096, 5000, 4097, 0, 12289)]
    table = tables.pack_table([*zip(arrays, parts, strict=True)], np.arange(5.0))
    # float32 first (slice 2), then float64 with what has no type: slices 0, 1, 3, 4 in their order
    assert table.records["index"].tolist() == [2, 0, 1, 3, 4]
    assert table.records["offset"].tolist() == [9096, 0, 4096, 13193, 13193]
    assert table.records["source"].tolist() == [4096, 4096, 0, 0, 4096]
    assert table.records["scale"].tolist() == [2.0, 0.0, 1.0, 3.0, 4.0]
    assert table.first_chunk.tolist() == [0, 2, 3, 5, 6, 10]
    assert table.groups == [("float", "float", 0, 1), ("double", "float", 1, 5)]
    assert [table.grid(group) for group in table.groups] == [(2, 1), (8, 1)]
    assert table.grid(table.all(), 4) == (4, 3)  # 10 chunks by threes
    assert table.content() == table.records.tobytes() + table.first_chunk.tobytes()
    arguments = table.arguments(1000, table.groups[1], table.grid(table.groups[1]))
    assert arguments == (1000 + 40, 1000 + 5 * 40 + 8, 4, 1)
    assert [type(argument) for argument in arguments] == [np.uint64, np.uint64, np.int64, np.int64]


@pytest.mark.parametrize("seed", range(30))
def test_random_tables_cover_every_chunk_of_every_slice_once(tables: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    count = int(rng.integers(1, 40))
    sizes = rng.choice([0, 1, 4095, 4096, 4097, 9000, 50000], count).tolist()
    params = [flat(size, dtypes[rng.integers(4)]) for size in sizes]
    grads = [None if rng.random() < 0.3 else flat(size, dtypes[rng.integers(4)]) for size in sizes]
    hyper = rng.standard_normal((count, 3))
    table = tables.sgd_table([*zip(params, params, grads, strict=True)], hyper)
    assert sorted(table.records["index"].tolist()) == list(range(count))
    covered: dict[int, list[int]] = {k: [] for k in range(count)}
    for group in table.groups:
        grid = table.grid(group, int(rng.integers(1, 200)))
        begin, end = int(table.first_chunk[group.begin]), int(table.first_chunk[group.end])
        for block in range(grid.num_blocks):
            first = begin + block * grid.chunks_per_block
            assert first < end
            for chunk in range(first, min(first + grid.chunks_per_block, end)):
                at = max(k for k in range(count) if table.first_chunk[k] <= chunk)
                assert group.begin <= at < group.end
                covered[int(table.records["index"][at])].append(chunk - int(table.first_chunk[at]))
        for record in table.records[group.begin : group.end]:
            assert tables.CPP_TYPES[record["update"]["param_dtype"]] == group.left
            if record["update"]["grad"]:
                assert tables.CPP_TYPES[record["update"]["grad_dtype"]] == group.right
    for k, chunks in covered.items():
        assert sorted(chunks) == list(range(max(1, (sizes[k] + 4095) // 4096)))
    for record in table.records:
        assert record["update"][["lr", "momentum", "weight_decay"]].tolist() == tuple(hyper[record["index"]])
        assert record["update"]["size"] == sizes[record["index"]]


def test_a_grid_with_more_chunks_than_blocks_gives_each_block_several(tables: Any) -> None:
    assert tables.grid_of(1) == (1, 1)
    assert tables.grid_of(2**31 - 1) == (2**31 - 1, 1)
    assert tables.grid_of(2**31) == (2**30, 2)


# --- launches ---------------------------------------------------------------------------------------------------------


def launches_of(cupy: FakeCupy) -> list[Launch]:
    cupy.synchronize()  # the upload
    return cupy.launches


def test_the_arguments_of_a_packing_launch(cupy: FakeCupy, tables: Any) -> None:
    grads = [cupy.array(np.ones(5000)), cupy.array(np.ones(3))]
    packed = cupy.empty(5003, "bfloat16")
    norms = on_device().pack_gradients(grads, np.array([0.5, 2.0]), np.array([5000, 3]), packed)
    (launch,) = launches_of(cupy)
    assert launch.expression == "jointspar::pack_gradients_kernel<float, jointspar::BFloat16>"
    assert (launch.num_blocks, launch.num_threads) == (3, 256)
    slices, first_chunk, num_slices, per_block, out, squared_norms, chunk_sums, num_finished = launch.arguments
    assert (num_slices, per_block, out, squared_norms) == (2, 1, packed.data.ptr, norms.data.ptr)
    records = memory(slices, tables.PACK_RECORD, 2)
    assert records.tolist() == [(grads[0].data.ptr, 0, 5000, 0, 0.5), (grads[1].data.ptr, 5000, 3, 1, 2.0)]
    assert memory(first_chunk, "i8", 3).tolist() == [0, 2, 3]
    assert memory(num_finished, "u4", 2).tolist() == [0, 0]
    assert chunk_sums % 16 == 0 and slices % 16 == 0


def test_the_arguments_of_the_two_lars_launches(cupy: FakeCupy, tables: Any) -> None:
    sizes = (5000, 3)
    params, momenta, grads = ([cupy.array(np.ones(size)) for size in sizes] for _ in range(3))
    hyper = np.arange(10.0).reshape(2, 5)
    known = cupy.array([1.0, 2.0], "float64")
    used, after = on_device().lars_update(
        params, momenta, grads, hyper=hyper, adapt=np.array([True, False]), nesterov=True, skip_nonfinite=True,
        param_norms=known, grad_norms=None,
    )  # fmt: skip
    rates, update = launches_of(cupy)
    assert (rates.expression, rates.num_blocks) == ("jointspar::lars_rates_kernel", 3)
    assert update.expression == "jointspar::lars_update_kernel<float, float>"
    table, first_chunk, _, _, param_norms, grad_norms, used_norms, rate, skip, sums, finished = rates.arguments
    assert (param_norms, grad_norms, used_norms) == (known.data.ptr, 0, used.data.ptr)
    assert (sums - rate, finished - skip) == (2 * 16, 16)
    record = memory(table, tables.LARS_RECORD, 2)[1]
    expected = (params[1].data.ptr, momenta[1].data.ptr, grads[1].data.ptr, 3, 0, 0, 5.0, 6.0, 7.0)
    assert record.tolist() == (expected, 1, 8.0, 9.0, 0)
    assert update.arguments[:4] == (table, first_chunk, 2, 1)
    assert update.arguments[4:] == (1, rate, skip, after.data.ptr, sums, finished)
    assert isinstance(update.arguments[4], np.int32)


def test_lars_takes_few_blocks_to_measure_where_norms_may_be_known(cupy: FakeCupy) -> None:
    size = 100 * 4096
    params, momenta, grads = ([cupy.array(np.ones(size))] for _ in range(3))
    norms = cupy.array([1.0], "float64")
    on_device().lars_update(
        params, momenta, grads, hyper=np.ones((1, 5)), adapt=np.ones(1, bool), nesterov=False, skip_nonfinite=False,
        param_norms=norms, grad_norms=norms,
    )  # fmt: skip
    rates, update = launches_of(cupy)
    assert (rates.num_blocks, rates.arguments[3]) == (25, 4)  # 2 multiprocessors of 16 blocks: 100 chunks by fours
    assert (update.num_blocks, update.arguments[3]) == (100, 1)
    assert rates.arguments[8] == update.arguments[6] == 0  # nothing is skipped


def test_scratch_has_room_for_the_sums_of_every_chunk_and_a_counter_of_every_slice(cupy: FakeCupy) -> None:
    num_chunks, num_small = 2000, 5000
    sizes = [num_chunks * 4096] + num_small * [0]
    params, momenta, grads = ([ndarray(torch.empty(size)) for size in sizes] for _ in range(3))
    count = len(sizes)
    on_device().lars_update(
        params, momenta, grads, hyper=np.ones((count, 5)), adapt=np.ones(count, bool), nesterov=False,
        skip_nonfinite=True, param_norms=None, grad_norms=None,
    )  # fmt: skip
    on_device().squared_norms(grads, None)
    rates, _, norms = launches_of(cupy)
    assert cupy.bytes_allocated_from(rates.arguments[9]) >= 2 * 8 * (num_chunks + num_small)
    assert cupy.bytes_allocated_from(norms.arguments[7]) >= 8 * (num_chunks + num_small)
    for launch in (rates, norms):
        assert cupy.bytes_allocated_from(launch.arguments[-1]) >= 4 * count


def test_a_group_reads_its_own_rates(cupy: FakeCupy) -> None:
    dtypes = ("float64", "float32", "float32")
    params, momenta, grads = ([cupy.array(np.ones(4), dtype) for dtype in dtypes] for _ in range(3))
    on_device().lars_update(
        params, momenta, grads, hyper=np.ones((3, 5)), adapt=np.ones(3, bool), nesterov=False, skip_nonfinite=False,
        param_norms=None, grad_norms=None,
    )  # fmt: skip
    rates, first, second = launches_of(cupy)
    assert [first.arguments[5] - rates.arguments[7], second.arguments[5] - rates.arguments[7]] == [0, 2 * 16]


@pytest.mark.parametrize(
    ("draw", "run_length", "num_blocks"),
    [("systematic", None, 10), ("systematic", 2**32 - 1, 10), ("bernoulli", None, 2)],
)
@pytest.mark.parametrize(("strategy", "random_rank"), [("independent", 3), ("stratified", 2**32 - 1)])
def test_the_arguments_of_a_draw(
    cupy: FakeCupy, draw: str, run_length: int | None, num_blocks: int, strategy: str, random_rank: int
) -> None:
    p = cupy.array(np.full(300, 0.5), "float64")
    active = on_device().sample_layers(
        p, seed=2**64 - 1, step=2**32 - 1, rank=3, world_size=8, strategy=strategy, draw=draw, run_length=run_length
    )
    (launch,) = cupy.launches
    assert launch[:3] == (f"jointspar::sample_{draw}_kernel", num_blocks, 256)
    random_bits = (2**64 - 1, 2**32 - 1, random_rank, run_length or 0)
    assert launch.arguments == (p.data.ptr, 300, *random_bits, strategy == "stratified", 3, 8, active.data.ptr)
