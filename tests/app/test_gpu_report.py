"""The report of measurements on a GPU, from made-up numbers: no GPU is needed to write one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu import __main__ as bench_gpu
from bench.gpu import environment, report

ROOT = Path(__file__).parents[2]


def milliseconds(median: float) -> dict[str, float]:
    return {"median": median, "p10": 0.9 * median, "p90": 1.2 * median, "samples": 50}


def operation(variant: str, median: float, is_floor: bool = False, operation: str = "sgd_update") -> report.Record:
    record = {"operation": operation, "shapes": "resnet50", "variant": variant, "bytes": 500_000_000, "launches": 2}
    return record | {"milliseconds": milliseconds(median), "is_floor": is_floor}


def made_up() -> report.Results:
    results = report.empty({"device": "Some GPU 80GB", "driver": "1.2", "commit": "abc+", "command": "bench"})
    results["copy"] = {"median": 2500.0, "p10": 2400.0, "p90": 2600.0, "samples": 50}
    results["operations"] = [
        operation("torch loop", 4.0), operation("torch _foreach_", 1.0), operation("native", 0.25),
        operation("torch SGD fused (floor)", 0.1, True), operation("torch loop", 0.1, operation="lars_update"),
        operation("copy of as many bytes", 0.2, True),
    ]  # fmt: skip
    step = {
        "optimizer": "torch SGD",
        "shapes": "161 x 64",
        "wall_milliseconds": milliseconds(0.5),
        "launches": 4,
        "waits": {},
    }
    results["steps"] = [step]
    results["training"] = [
        {
            "network": "resnet50",
            "batch": 8,
            "optimizer": name,
            "milliseconds": milliseconds(time),
            "peak_bytes": peak,
            "loss": 0.25,
            "skipped_steps": 1,
            "waits": {"cudaEventSynchronize": 2},
        }
        for name, time, peak in (("dense", 100.0, 8 * 2**30), ("budget 0.5", 80.0, 6 * 2**30))
    ]
    results["exchange"] = [
        {"way": "ring, staged", "megabytes": 0.4, "milliseconds": milliseconds(2.0), "right_sums": 9}
    ]
    return results


def row_of(text: str, *cells: str) -> list[str]:
    """The cells of the one table row that begins with these."""
    (row,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_an_operation_is_told_by_its_share_of_copy() -> None:
    text = report.markdown(made_up())
    row = row_of(text, "sgd_update", "resnet50", "native", "0.2500 (0.2250 to 0.3000)")
    assert row[4:] == ["2000", "0.80", "0.80", "2", "", ""]  # .5 GB in .25 ms; .2 / .25
    results = made_up()
    results["operations"][2] |= {"launches": 1000, "is_captured": True}
    row = row_of(report.markdown(results), "sgd_update", "resnet50", "native", "0.2500 (0.2250 to 0.3000)")
    assert row[7] == "1000, in a graph"


def test_ours_is_told_by_torchs_times_over_its_own_on_the_device_and_by_the_wall() -> None:
    results = made_up()
    assert row_of(report.markdown(results), "sgd_update", "resnet50", "native", "4.00")[4:] == [
        "4.00",
        "16.00",
        *3 * [""],
    ]
    for record, wall in zip(results["operations"], (9.0, 3.0, 1.5), strict=False):
        record["wall_milliseconds"] = milliseconds(wall)
    row = row_of(report.markdown(results), "sgd_update", "resnet50", "native", "4.00")
    assert row[4:] == ["4.00", "16.00", "2.00", "2.00", "6.00"]


def test_training_is_told_in_proportion_to_the_dense_step_of_its_network() -> None:
    row = row_of(report.markdown(made_up()), "resnet50", "8", "budget 0.5")
    assert row[3:7] == ["80.0000 (72.0000 to 96.0000)", "0.80", "6.00", "0.75"]
    assert row[7:] == ["0.250", "1", "cudaEventSynchronize 2"]


def test_the_head_tells_device_driver_commit_and_command_and_the_copy_bandwidth() -> None:
    text = report.markdown(made_up())
    for line in ("# Some GPU 80GB", "- driver: 1.2", "- commit: abc+", "- command: bench"):
        assert line in text.splitlines()
    assert "2500 GB/s (2400 to 2600)" in text


def test_a_run_that_was_cut_off_or_failed_still_makes_a_report() -> None:
    results = report.empty({"device": "Some GPU"})
    results["failed"]["operations 3"] = "AssertionError: off by 1"
    text = report.markdown(results)
    assert "- operations 3: AssertionError: off by 1" in text
    assert "Training" not in text


def test_files_are_named_after_device_and_date_and_json_holds_every_number(tmp_path: Path) -> None:
    stem = report.file_stem("Some GPU 80GB", "2026-01-31")
    json_path, markdown_path = report.write(made_up(), tmp_path / "new", stem)
    assert (json_path.name, markdown_path.name) == ("some-gpu-80gb-2026-01-31.json", "some-gpu-80gb-2026-01-31.md")
    assert json.loads(json_path.read_text()) == made_up()
    assert markdown_path.read_text() == report.markdown(made_up())


def test_a_measurement_that_fails_is_noted_and_the_others_go_on() -> None:
    def failing() -> list[report.Record]:
        raise RuntimeError("out of memory")

    def some() -> list[report.Record | report.Failure]:
        return [report.Failure("one way", "wrong"), {"launches": 1}]

    results, saved = report.empty({"device": "Some GPU"}), []
    results["failed"] = {"steps: of a run before": "", "training: of another part": ""}
    measurements = [report.Measurement("first", failing), report.Measurement("second", some)]
    bench_gpu.fill(results, "steps", measurements, lambda: saved.append(len(results["steps"])))
    assert saved == [0, 1]
    assert results["steps"] == [{"launches": 1}]
    assert results["failed"] == {
        "training: of another part": "",
        "steps: first": "RuntimeError: out of memory",
        "steps: second, one way": "wrong",
    }


def test_a_run_adds_its_parts_to_those_of_the_same_environment_and_overwrites_no_other(tmp_path: Path) -> None:
    environment = {"device": "Some GPU", "commit": "abc", "command": "bench --parts steps"}
    results, stem = report.resume(tmp_path, "some-gpu", environment)
    assert (results, stem) == (report.empty(environment), "some-gpu")
    results["steps"] = made_up()["steps"]
    report.write(results, tmp_path, stem)

    resumed, stem = report.resume(tmp_path, "some-gpu", environment | {"command": "bench --parts training"})
    assert (resumed["steps"], stem) == (results["steps"], "some-gpu")
    assert resumed["environment"]["command"] == "bench --parts steps; bench --parts training"
    again, _ = report.resume(tmp_path, "some-gpu", environment)
    assert again["environment"]["command"] == "bench --parts steps"

    other, stem = report.resume(tmp_path, "some-gpu", environment | {"commit": "def"})
    assert (other["steps"], stem) == ([], "some-gpu-2")


def test_spread_is_the_10th_and_90th_percentile() -> None:
    assert report.summary([float(value) for value in range(1, 20)]) == {
        "median": 10.0, "p10": 2.0, "p90": 18.0, "samples": 19,
    }  # fmt: skip
    assert report.summary([3.0])["p90"] == 3.0


def test_a_command_that_does_not_run_is_unknown() -> None:
    assert environment.output_of("no-such-program-anywhere") == "unknown"
    assert environment.output_of(sys.executable, "-c", "print('550.1\\nmore')") == "550.1"


def test_without_a_gpu_nothing_is_written_and_the_exit_code_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "no GPU" in result.stderr
    assert list(tmp_path.iterdir()) == []
