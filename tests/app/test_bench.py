"""The benchmarks: all is right in the quick form, wrong variants are refused, files are compared by their ratios."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import backward
import compare
import networks
import ops as bench_ops
import picture
import steps
from alternate import alternate, spread
from jointspar import cli, ops
from limits import Limit, compiler
from operation import Case, Operation, Traffic, Variant, verify
from picture import draw_fractions
from results import SCHEMA, cell_of, save, table
from shapes import MODELS

SMALL = Case("tiny", [(3,)], "float32", in_cache=True)


class SumProblem:
    """total += values."""

    def __init__(self, case: Case) -> None:
        self.values = torch.ones(case.shapes[0])
        self.total = torch.zeros(case.shapes[0])
        self.inputs = [self.values]
        self.traffic: Traffic | None = None
        self.seen: list[float] = []  # what a call found in total

    def reset(self) -> None:
        self.total.zero_()

    def check(self, call: Callable[[], Any]) -> None:
        call()
        assert self.total.tolist() == [1.0, 1.0, 1.0], "a wrong sum"


def add(problem: SumProblem) -> None:
    problem.seen.append(float(problem.total[0]))
    problem.total += problem.values


def forget(problem: SumProblem) -> None:
    """Writes nothing."""


def spoil(problem: SumProblem) -> None:
    problem.total += problem.values
    problem.values *= 2


def summing(*variants: Variant) -> Operation:
    return Operation("sum", [SMALL], SumProblem, variants)


@pytest.mark.parametrize(("call", "reason"), [(forget, "a wrong sum"), (spoil, "an input was changed")])
def test_wrong_variant_is_refused_by_name(call: Callable[[Any], Any], reason: str) -> None:
    variant = Variant("mine", "peer", call)
    with pytest.raises(AssertionError, match=f"sum, tiny-float32, mine: {reason}"):
        verify(summing(variant), SMALL, variant, SumProblem(SMALL))


def test_floor_may_do_less_but_not_change_its_inputs() -> None:
    idle, harmful = Variant("idle", "floor", forget), Variant("harmful", "floor", spoil)
    verify(summing(idle), SMALL, idle, SumProblem(SMALL))
    with pytest.raises(AssertionError, match="an input was changed"):
        verify(summing(harmful), SMALL, harmful, SumProblem(SMALL))


@pytest.mark.parametrize(
    ("in_cache", "seen"),
    [(True, [0.0, 1.0, 2.0]), (False, [0.0, 1.0])],
    ids=["one call warms the caches, two are timed", "two are timed"],
)
def test_every_sample_starts_from_the_first_state(in_cache: bool, seen: list[float]) -> None:
    problem = SumProblem(SMALL)
    case = Case("tiny", [(3,)], "float32", calls=2, in_cache=in_cache)
    seconds = alternate([Variant("a", "peer", add), Variant("b", "peer", add)], problem, case, rounds=3)
    assert problem.seen == seen * 6
    assert {name: times.shape for name, times in seconds.items()} == {"a": (3,), "b": (3,)}


def test_slow_variant_sits_out_later_rounds_and_ratios_come_from_common_rounds() -> None:
    variants = [Variant("ours", "ours", add), Variant("slow", "ours", add, max_rounds=1), Variant("peer", "peer", add)]
    seconds = alternate(variants, SumProblem(SMALL), SMALL, rounds=3)
    assert np.isnan(seconds["slow"]).tolist() == [False, True, True]
    rows = cell_of("sum", SMALL, 1, None, variants, seconds)["variants"]
    assert [row["ms"]["rounds"] for row in rows] == [3, 1, 3]
    assert rows[1]["speedup"]["median"] == seconds["peer"][0] / seconds["slow"][0]


def test_ratios_are_formed_within_a_round() -> None:
    variants = [Variant(role, role, add) for role in ("ours", "peer", "limit")]
    drifting = np.array([1.0, 10.0, 100.0])  # the machine slows down; the ratios stay
    seconds = {"ours": 2 * drifting, "peer": 6 * drifting, "limit": drifting}
    row = cell_of("sum", SMALL, 1, None, variants, seconds)["variants"][0]
    assert row["speedup"] == {"median": 3.0, "p10": 3.0, "p90": 3.0, "rounds": 3}
    assert row["of_limit"] == {"median": 0.5, "p10": 0.5, "p90": 0.5, "rounds": 3}


def test_spread_is_the_median_and_the_outer_tenths() -> None:
    assert spread(np.arange(11.0)) == (5.0, 1.0, 9.0, 11)


@pytest.mark.parametrize(
    ("model", "num_tensors", "num_elements"),
    [("resnet18", 62, 11_689_512), ("resnet50", 161, 25_557_032), ("transformer24", 292, 92_959_744)],
)
def test_shapes_are_those_of_the_models(model: str, num_tensors: int, num_elements: int) -> None:
    """ResNets: the published sizes. Transformer: 24 * (12 * 512^2 + 13 * 512) + (32768 + 1024 + 2) * 512."""
    shapes = MODELS[model]
    assert len(shapes) == num_tensors
    assert sum(math.prod(shape) for shape in shapes) == num_elements


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so no limits")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("read_bytes", "written_bytes"), [(4, 4), (4, 2), (2, 4)])
def test_copy_limit_writes_every_byte(read_bytes: int, written_bytes: int, streaming: bool) -> None:
    limit = Limit(Traffic("copy", 100_000, read_bytes, written_bytes), streaming=streaming)
    limit.read[:] = 7
    limit()
    expected = 0 if read_bytes > written_bytes else 7  # narrowing folds two equal words by exclusive or
    assert (limit.written == expected).all()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so no limits")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_other_limits_touch_every_element(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    ones_as_word = int.from_bytes(bytes([1] * 8), "little")
    read = Limit(Traffic("read", 100_000, 4), streaming=False)
    assert read() == read.size // 2 * ones_as_word % 2**64
    total = Limit(Traffic("add", 100_000, 2, 2), streaming=False)
    total()
    assert (total.written == 2).all()
    for element_bytes in (2, 4):
        update = Limit(Traffic("update", 100_000, element_bytes, element_bytes), streaming=False)
        update()
        assert (update.momenta.view(-1, 4)[:, :2] == 2).all()
        assert (update.written == 3).all()  # 1 exclusive or 2


def test_bytes_of_an_update_are_five_words_an_element_in_float32() -> None:
    assert Traffic("update", 10, 4, 4).num_bytes == 200
    assert Traffic("update", 10, 2, 2).num_bytes == 140
    assert Traffic("copy", 10, 4, 2).num_bytes == 60
    assert Traffic("add", 10, 4, 4).num_bytes == 120
    assert Traffic("read", 10, 4).num_bytes == 40


def test_every_public_operation_has_a_benchmark() -> None:
    public = {
        name
        for name, value in vars(ops).items()
        if inspect.isfunction(value) and value.__module__.startswith(f"{ops.__name__}.") and not name.startswith("_")
    }
    assert set(bench_ops.OPERATIONS) == public - {"backend", "use_backend"}


@pytest.mark.parametrize("name", bench_ops.OPERATIONS)
def test_every_benchmark_has_all_backends_peers_and_a_pytest_entry(name: str) -> None:
    operation = bench_ops.load(name)
    roles = {variant.name: variant.role for variant in operation.variants}
    assert [roles[backend] for backend in ("native", "numba", "reference")] == ["ours"] * 3
    assert roles["naive"] == "peer"
    assert hasattr(importlib.import_module(f"bench_{name}"), f"bench_{name}")


def test_quick_run_checks_every_operation_and_writes_its_results(tmp_path: Path) -> None:
    assert cli.main(["bench", "ops", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-ops-quick.json")
    record = json.loads(path.read_text())
    assert {cell["operation"] for cell in record["cells"]} == set(bench_ops.OPERATIONS)
    assert {cell["dtype"] for cell in record["cells"]} == {"float32", "bfloat16", "float16", "float64"}
    assert record["command"].startswith("jointspar bench ops --quick")
    assert record["left_out"]["compile"]
    assert {"processor", "cores", "load_average"} <= record["machine"].keys()
    assert {"torch", "numpy", "jointspar", "python"} <= record["versions"].keys()
    with Image.open(path.with_suffix(".png")) as image:
        assert image.format == "PNG"
    assert table(record["cells"][0]).startswith("sample_layers, resnet18, float64, 1 thread")


@pytest.mark.parametrize(
    ("main", "option", "value"),
    [
        (bench_ops.main, "--cases", "resnet50"),
        (bench_ops.main, "--rounds", "3"),
        (steps.main, "--models", "resnet18"),
        (steps.main, "--iterations", "7"),
        (networks.main, "--rates", "0.3"),
    ],
)
def test_what_quick_runs_would_not_heed_is_refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quick", option, value])
    assert ended.value.code == 2
    assert f"{option} does not act with --quick" in capsys.readouterr().err


def test_operation_without_the_case_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main(["sample_layers", "--cases", "small"]) == 2
    assert "none of these operations has such a case" in capsys.readouterr().err


def made_up(speedup: float = 3.0, of_limit: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    """A result file of one operation."""
    rows = [
        {"variant": "native", "role": "ours", "ms": {"median": 1.0}, "speedup": {"median": speedup},
         "of_limit": None if of_limit is None else {"median": of_limit}},
        {"variant": "foreach", "role": "peer", "ms": {"median": speedup}, "speedup": {"median": 1.0}, "of_limit": None},
    ]  # fmt: skip
    cell = {"operation": "sum", "case": "tiny", "dtype": "float32", "threads": 1, "variants": rows}
    cell["best_peer"] = "foreach"
    machine = {"processor": "P", "cores": 2}
    record = {"schema": SCHEMA, "quick": False, "rounds": 9, "machine": machine, "versions": {"torch": "2.13"}}
    return {**record, "cells": [cell], **changes}


def compared(tmp_path: Path, old: Any, new: Any) -> int:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, record in zip(paths, (old, new), strict=True):
        path.write_text(record if isinstance(record, str) else json.dumps(record))
    return compare.main([str(path) for path in paths])


@pytest.mark.parametrize(("speedup", "of_limit"), [(2.71, 0.82), (3.0, 0.9), (9.0, 1.0)])
def test_ratios_within_a_tenth_pass(tmp_path: Path, speedup: float, of_limit: float) -> None:
    assert compared(tmp_path, made_up(3.0, 0.9), made_up(speedup, of_limit)) == 0


@pytest.mark.parametrize(
    ("speedup", "of_limit", "line"),
    [(2.69, 0.9, "3 -> 2.69 over the best peer (-10%)"), (3.0, 0.45, "0.9 -> 0.45 of the limit (-50%)")],
)
def test_ratio_that_fell_by_more_than_a_tenth_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], speedup: float, of_limit: float, line: str
) -> None:
    assert compared(tmp_path, made_up(3.0, 0.9), made_up(speedup, of_limit)) == 1
    assert f"WORSE  sum, tiny, float32, threads 1, native: {line}" in capsys.readouterr().out


def test_slower_peer_is_not_our_fault(tmp_path: Path) -> None:
    new = copy.deepcopy(made_up())
    new["cells"][0]["variants"][1]["speedup"]["median"] = 0.1
    assert compared(tmp_path, made_up(), new) == 0


def test_ratio_that_is_no_longer_measured_and_another_machine_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, made_up(), made_up(of_limit=None, machine={"processor": "Q", "cores": 2})) == 0
    output = capsys.readouterr().out
    assert "no longer measured: sum, tiny, float32, threads 1, native, of_limit" in output
    assert "another processor: P -> Q" in output
    assert "0 of 1 ratios are worse by more than 10%; 1 are no longer measured" in output


def with_peer(record: dict[str, Any], name: str, ms: float) -> dict[str, Any]:
    """The record with one peer more, which is its best."""
    (cell,) = record["cells"]
    ours = cell["variants"][0]
    ours["speedup"] = {"median": ms / ours["ms"]["median"]}
    peer = {"variant": name, "role": "peer", "ms": {"median": ms}, "speedup": {"median": 1.0}, "of_limit": None}
    return {**record, "cells": [{**cell, "best_peer": name, "variants": [*cell["variants"], peer]}]}


def test_both_files_are_compared_over_the_same_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """foreach takes 3 ms, compile 2, ours 1, later 1.4. Over each file's best peer it would seem to be faster."""
    old, new = with_peer(made_up(of_limit=None), "compile", 2.0), made_up(of_limit=None)
    new["cells"][0]["variants"][0] |= {"ms": {"median": 1.4}, "speedup": {"median": 3.0 / 1.4}}
    assert compared(tmp_path, old, new) == 1
    assert "native: 3 -> 2.14 over the best peer (-29%)" in capsys.readouterr().out
    # A new and faster peer is no fault of ours.
    assert compared(tmp_path, made_up(), with_peer(made_up(), "compile", 2.0)) == 0


def test_a_peer_that_the_new_file_lacks_altogether_leaves_no_ratio_over_it(tmp_path: Path) -> None:
    new = made_up()
    del new["cells"][0]["variants"][1]
    new["cells"][0]["best_peer"] = None
    new["cells"][0]["variants"][0]["speedup"] = None
    assert compared(tmp_path, made_up(), new) == 0


def test_another_peer_rounds_and_torch_are_noted_and_what_is_not_a_number_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(), made_up(of_limit=float("nan"), rounds=3, versions={"torch": "3.0"})
    new = with_peer(new, "compiled", 1.0)
    assert compared(tmp_path, old, new) == 1
    output = capsys.readouterr().out
    assert "another torch: 2.13 -> 3.0" in output
    assert "another number of rounds: 9 -> 3" in output
    assert "another best peer of sum, tiny, float32, threads 1: foreach -> compiled" in output


def written(**changes: Any) -> dict[str, Any]:
    """What is known before a run's first measurement."""
    versions = {"torch": "2.13"}
    record = {"date": "2026-01-02T03:04", "command": "bench a", "commit": "abc", "quick": False, "versions": versions}
    return {**record, **changes}


@pytest.mark.parametrize(
    ("record", "later"),
    [
        (written(), {}),  # the same run, a table later
        (written(commit="abc+"), {}),
        (written(commit=None), {}),
        (written(), {"date": "2026-01-02T09:00"}),  # again on the same commit
        (written(quick=True, commit="abc+"), {"date": "2026-01-02T09:00", "commit": "def"}),
    ],
)
def test_results_replace_those_of_the_same_command_and_code(
    tmp_path: Path, record: dict[str, Any], later: dict[str, Any]
) -> None:
    first, second = save(record, [], tmp_path, "step"), save({**record, **later}, [{"a": 1}], tmp_path, "step")
    assert first == second == tmp_path / "2026-01-02-step.json"
    assert json.loads(second.read_text())["cells"] == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [second]


@pytest.mark.parametrize(
    ("record", "later"),
    [
        (written(), {"command": "bench b"}),
        (written(quick=True), {"command": "bench b"}),
        (written(), {"date": "2026-01-02T09:00", "commit": "def"}),  # before and after a change
        (written(commit="abc+"), {"date": "2026-01-02T09:00"}),  # who knows what was changed
        (written(commit=None), {"date": "2026-01-02T09:00"}),
        (written(), {"date": "2026-01-02T09:00", "versions": {"torch": "3.0"}}),
    ],
)
def test_results_of_another_command_or_code_keep_their_file(
    tmp_path: Path, record: dict[str, Any], later: dict[str, Any]
) -> None:
    paths = [save(what, [], tmp_path, "step") for what in (record, {**record, **later}, record, {**record, **later})]
    assert [path.name for path in paths] == ["2026-01-02-step.json", "2026-01-02-step-2.json"] * 2


def test_backward_is_a_ratio_within_a_round() -> None:
    cells = backward.cells_of({1.0: [1.0, 10.0, 100.0], 0.5: [0.8, 8.0, 70.0]}, {1.0: 400.0, 0.5: 300.0})
    assert [cell["of_dense"]["median"] for cell in cells] == pytest.approx([1.0, 0.8])
    assert [cell["saved_of_dense"] for cell in cells] == [1.0, 0.75]
    assert backward.table(cells).splitlines()[2].split()[:5] == ["0.50", "8000.0", "ms", "0.800", "x"]


def test_backward_needs_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        backward.main(["--rounds", "0"])
    assert "invalid positive number value: '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (made_up(schema="jointspar-bench-ops/0"), "has schema 'jointspar-bench-ops/0'"),
        ([], "has schema None"),
        (made_up(quick=True), "--quick, which measures nothing"),
        (made_up(cells=[]), "in common"),
        ("{", "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: Any, message: str
) -> None:
    assert compared(tmp_path, made_up(), new) == 2
    assert message in capsys.readouterr().err


def test_picture_shows_the_first_variant_on_top_for_every_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(picture, "FigureCanvasAgg", lambda figure: drawn.append(figure) or FigureCanvasAgg(figure))
    variants = [Variant(role, role, add) for role in ("ours", "peer", "limit")]
    seconds = {"ours": np.array([2.0]), "peer": np.array([4.0]), "limit": np.array([1.0])}
    traffic = Traffic("add", 3, 4, 4)
    cells = [cell_of("sum", SMALL, num_threads, traffic, variants, seconds) for num_threads in (1, 2)]
    record = made_up(commit=None, date="2022-07-17", versions={"torch": "2"})
    assert draw_fractions(tmp_path / "two.png", record, cells)
    for axes in drawn[0].axes:
        places = {bar.get_width(): bar.get_y() for bar in axes.patches if np.isfinite(bar.get_width())}
        assert places.keys() == {0.5, 0.25}  # ours, peer
        assert places[0.5] < places[0.25] and axes.yaxis_inverted()


def test_picture_needs_a_limit(tmp_path: Path) -> None:
    assert not draw_fractions(tmp_path / "none.png", made_up(), made_up(of_limit=None)["cells"])
    assert not (tmp_path / "none.png").exists()
