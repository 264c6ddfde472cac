"""The measurements of `make bench-gpu` on the CPU: all are made, with torch.cuda, graphs and profiles as stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import jointspar as js
from bench.gpu import __main__ as bench_gpu
from bench.gpu import cases, environment, exchange, operations, report, steps, timing, training
from jointspar import ops

SHAPES = {"resnet50": [(7, 3), (5,)], "161 x 64": [(8,)] * 3}
DESCRIBED = {"device": "Some GPU", "commit": "abc", "command": "bench"}


class OnTheHost(TorchFunctionMode):
    """device="cuda" is the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        settings = dict(settings or {})
        if settings.get("device") == "cuda":
            settings["device"] = "cpu"
        return function(
            *("cpu" if isinstance(value, str) and value == "cuda" else value for value in arguments), **settings
        )


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other._seconds - self._seconds)


class Graph:
    def replay(self) -> None:
        time.sleep(1e-6)


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    properties = SimpleNamespace(L2_cache_size=1 << 10)
    stand_ins = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "Event": Event,
        "_sleep": lambda cycles: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 1,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for module in (operations, steps):
        monkeypatch.setattr(module, "kernel_names", lambda call: [call(), "kernel"][1:])
    for module in (steps, training):
        monkeypatch.setattr(module, "waits", lambda call: [call(), {"cudaEventSynchronize": 1}][1])
    monkeypatch.setattr(timing, "ColdCache", lambda: SimpleNamespace(evict=lambda: None))
    monkeypatch.setattr(timing, "LONGEST_ROUND", 1e-3)
    for name in cases.SHAPES.keys() - SHAPES.keys():
        monkeypatch.delitem(cases.SHAPES, name)
    for name, shapes in SHAPES.items():
        monkeypatch.setitem(cases.SHAPES, name, shapes)
    monkeypatch.setattr(environment, "describe", lambda module: DESCRIBED)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda rounds: {"median": 1.0, "p10": 1.0, "p90": 1.0})
    monkeypatch.setenv("JOINTSPAR_BACKEND", "native")
    with OnTheHost():
        yield


def measured(part: str, folder: Path, *arguments: str) -> tuple[report.Results, int]:
    """What a part leaves in the folder, and its exit code."""
    code = bench_gpu.main(["--quick", "--out", str(folder), "--parts", part, *arguments])
    return results_in(folder), code


def results_in(folder: Path) -> report.Results:
    (path,) = folder.glob("*.json")
    results: report.Results = json.loads(path.read_text())
    return results


def variants(results: report.Results, part: str, operation: str) -> set[str]:
    return {record["variant"] for record in results[part] if record["operation"] == operation}


def test_every_variant_of_every_operation_is_right_and_timed(tmp_path: Path) -> None:
    results, code = measured("operations", tmp_path)
    assert (code, results["failed"]) == (0, {})
    assert {(record["operation"], record["shapes"]) for record in results["operations"]} == {
        (operation, shapes) for shapes in SHAPES for operation in (
            "pack_gradients to float32", "pack_gradients to bfloat16", "unpack_gradients, add", "lars_update",
            "sgd_update",
        )
    }  # fmt: skip
    ours = {"native (norms carried)", "native (gradient norms measured)", "native (all norms measured)"}
    peers = {
        *("torch loop", "torch _foreach_ (rates on the host)", "torch _foreach_ (rates on the device)"),
        *("torch fused, adapted (rates on the host)", "torch fused, adapted (rates on the device)"),
    }
    floors = {"torch SGD fused (floor)", operations.COPY}
    assert variants(results, "operations", "lars_update") == ours | peers | floors
    assert all("wall_milliseconds" in each for each in results["operations"] if each["shapes"] == "161 x 64")


def test_a_variant_that_fails_is_noted_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ops.sgd_update

    def without_cupy(*arguments: Any, **settings: Any) -> torch.Tensor:
        if os.environ["JOINTSPAR_BACKEND"] == "cupy":
            raise ImportError("no CuPy")
        return update(*arguments, **settings)

    monkeypatch.setattr(ops, "sgd_update", without_cupy)
    results, code = measured("operations", tmp_path, "--backends", "native", "cupy")
    assert code == 1
    assert results["failed"] == {f"operations: sgd_update, {name}, cupy": "ImportError: no CuPy" for name in SHAPES}
    peers = {"torch loop", "torch _foreach_", "torch fused, and norms", "torch SGD fused (floor)"}
    assert variants(results, "operations", "sgd_update") == {*peers, "native", operations.COPY}


def test_a_variant_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "unpack_gradients", lambda packed, outs, add: outs[0].add_(1.0))
    results, code = measured("operations", tmp_path)
    assert code == 1
    assert set(results["failed"]) == {f"operations: unpack_gradients, add, {name}, native" for name in SHAPES}
    assert "off by" in next(iter(results["failed"].values()))
    assert "native" not in variants(results, "operations", "unpack_gradients, add")


def test_ours_is_timed_beside_the_compiled_loop(tmp_path: Path) -> None:
    results, code = measured("compiled", tmp_path)
    assert code == 0
    assert variants(results, "compiled", "sgd_update") == {"torch.compile", "native", operations.COPY}


def test_steps_are_timed_and_so_is_a_graph_of_what_they_launch(tmp_path: Path) -> None:
    results, code = measured("steps", tmp_path)
    assert (code, results["failed"]) == (0, {})
    assert len(results["steps"]) == 2 * len(steps.OPTIMIZERS)
    assert "pack_gradients and lars_update, in a graph" in {record["optimizer"] for record in results["steps"]}


def test_training_says_time_memory_loss_skipped_steps_and_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_layers": 1, "width": 64, "vocabulary": 16, "length": 4}
    workload = training.WORKLOADS["transformer"]
    monkeypatch.setattr(training, "WORKLOADS", {"transformer": lambda device, batch: workload(device, 2, **sizes)})
    results, code = measured("training", tmp_path)
    assert (code, results["failed"]) == (0, {})
    names = ["dense", "budget 1.0", "budget 0.5", "budget 0.25", "dense again"]
    assert [record["optimizer"] for record in results["training"]] == names
    for record in results["training"]:
        assert record["loss"] > 0
        assert record["skipped_steps"] == 0
        assert record["milliseconds"]["samples"] == 20


def test_sums_over_ranks_are_counted_and_why_only_staged_ones_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ROUNDS", {100: 5, 1000: 3})
    codes = js.comm.run_simulated(2, lambda comm: exchange.measure_sums(comm, tmp_path, device="cpu"))
    results = results_in(tmp_path)
    assert codes == [1, 0]
    assert [name.rpartition(", ")[2] for name in results["failed"]] == [exchange.ON_DEVICE]
    assert {record["right_sums"] for record in results["exchange"]} == {5, 3}


def test_a_part_whose_process_dies_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = SimpleNamespace(returncode=-6)
    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda command: died)
    assert bench_gpu.main(["--out", str(tmp_path), "--parts", "operations", "steps"]) == 1
    assert results_in(tmp_path)["failed"] == {
        f"{part}: its process": "ended with -6" for part in ("operations", "steps")
    }


def test_parts_are_run_one_after_another_and_the_worst_exit_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    codes = {"operations": 1, "steps": 0, "training": 2}
    monkeypatch.setattr(bench_gpu, "run_part", lambda part, options: begun.append(part) or codes[part])
    assert bench_gpu.main([]) == 2
    assert begun == list(codes)
