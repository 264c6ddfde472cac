"""The files of a run and the lines on the screen."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from jointspar.training import circumstances
from jointspar.training.demo import table
from jointspar.training.records import (
    Display,
    MetricsFile,
    epoch_line,
    json_safe,
    read_metrics,
    readable_bytes,
    remove_run,
)


def write_steps(path: Path, steps: range) -> None:
    path.write_text("".join(json.dumps({"kind": "step", "step": step}) + "\n" for step in steps))


def test_continued_metrics_keep_only_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    metrics = MetricsFile(path, keep_up_to_step=5)
    metrics.write({"kind": "step", "step": 6, "train_loss": float("nan")})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["train_loss"] is None


def test_continued_metrics_forget_where_the_run_had_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 4}\n{"kind": "stop", "step": 5}\n')
    MetricsFile(path, keep_up_to_step=5).close()
    assert [record["kind"] for record in read_metrics(path)] == ["step"]


def test_new_metrics_replace_old_ones(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", range(1, 8))
    MetricsFile(tmp_path / "metrics.jsonl", keep_up_to_step=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "trai')
    assert read_metrics(path) == [{"step": 1}]


def test_numbers_that_json_lacks_become_null() -> None:
    assert json_safe({"a": [float("inf"), 1.5], "b": (float("nan"),)}) == {"a": [None, 1.5], "b": [None]}


def test_remove_run_deletes_nothing_else(tmp_path: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "mine.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoint").mkdir()
    remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_only_rank_0_shows_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        display = Display(rank=rank, first_step=0, num_steps=2)
        display.advance(1.0)
        display.line(f"rank {rank}")
        display.close()
    assert capsys.readouterr().out == "rank 0\n"


def test_epoch_line_tells_the_essentials() -> None:
    record = {
        "epoch": 3, "train_loss": 0.5, "test_accuracy": 0.9, "lr": 0.1, "active_fraction": 0.5, "bytes_sent": 1.5e6,
        "seconds": 2.0,
    }  # fmt: skip
    line = epoch_line(record, 10)
    assert "3/10" in line
    assert "90.00 %" in line
    assert "1.5 MB" in line


@pytest.mark.parametrize(("count", "text"), [(0, "0 kB"), (12_300, "12.3 kB"), (2.5e6, "2.5 MB")])
def test_readable_bytes(count: float, text: str) -> None:
    assert readable_bytes(count) == text


def test_demo_table_has_a_row_per_run() -> None:
    summary = {"test_accuracy": 0.98, "train_loss": 0.02, "seconds": 3.0, "bytes_sent": 5e6, "active_fraction": 0.5}
    rows = table({"lars": summary, "jointspar-lars": summary}).splitlines()
    assert len(rows) == 3
    assert len({len(row) for row in rows}) == 1
    assert rows[2].split() == ["jointspar-lars", "98.00", "%", "0.0200", "3.0", "5.00", "50", "%"]


def test_the_commit_tells_changed_code_from_changed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        name: tmp_path / name for name in ("csrc/kernel.cpp", "bench/peers.py", "bench/results/x.json", "README.md")
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    if shutil.which("git") is None:
        pytest.skip("no git")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(circumstances, "__file__", str(tmp_path / "python/jointspar/training/circumstances.py"))
    head = circumstances.commit()
    assert head is not None and len(head) == 40
    for name, mark in (
        ("README.md", ""),
        ("bench/results/x.json", ""),
        ("bench/peers.py", "+"),
        ("csrc/kernel.cpp", "+"),
    ):
        files[name].write_text("after\n")
        assert circumstances.commit() == head + mark, name
