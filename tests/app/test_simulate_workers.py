"""`jointspar train --simulate-workers`: the files of a run, its continuation, its end by SIGTERM, and MPI's answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import jobs
import warm_python
from jointspar import cli
from jointspar.training import start
from jointspar.training.config import TrainConfig
from jointspar.training.records import read_metrics
from jointspar.training.start import train

ROOT = Path(__file__).resolve().parents[2]
SHORT: dict[str, Any] = {"batch_size": 32, "epochs": 2, "log_every": 1, "threads": 1}
FLAGS = ["--batch-size", "32", "--epochs", "2", "--log-every", "1", "--threads", "1"]
TRAIN = ("-m", "jointspar", "train")


def checkpoint(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Everything that a rank would continue from."""
    newest = max((folder / "checkpoint").glob("step-*"))
    return load_file(newest / "shared.safetensors") | load_file(newest / f"rank-{rank}.safetensors")


def assert_same_checkpoints(one: Path, other: Path, num_ranks: int, *, without: tuple[str, ...] = ()) -> None:
    for rank in range(num_ranks):
        expected, found = checkpoint(one, rank), checkpoint(other, rank)
        assert expected.keys() == found.keys()
        assert {name for name in expected if not torch.equal(expected[name], found[name])} <= set(without)


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these trainings; the first of them draws its own."""
    if request.node.originalname != "test_four_workers_train_and_resume_bit_for_bit":
        monkeypatch.setattr("jointspar.training.plots.plot_run", lambda *_: None)


def test_four_workers_train_and_resume_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**SHORT, "simulate_workers": 4, "strategy": "independent"}
    whole = train(TrainConfig(out=tmp_path / "whole", **config))
    assert "; 4 simulated workers x 32 samples" in capsys.readouterr().out
    train(TrainConfig(out=tmp_path / "parts", max_steps=15, **config))
    parts = train(TrainConfig(out=tmp_path / "parts", resume=True, **config))
    assert (parts.test_accuracy, parts.bytes_sent) == (whole.test_accuracy, whole.bytes_sent)
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "parts", 4)
    own = [checkpoint(tmp_path / "whole", rank)["distribution.probabilities"] for rank in range(4)]
    assert not torch.equal(own[0], own[3])  # each rank's file is its own
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["world_size"], summary["simulated"], summary["steps"]) == (4, True, 2 * (1437 // 128))
    epochs = [record for record in read_metrics(tmp_path / "whole" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [(record["world_size"], record["simulated"]) for record in epochs] == [(4, True)] * 2
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 0


def test_a_run_without_the_flag_is_not_simulated(tmp_path: Path) -> None:
    assert not train(TrainConfig(out=tmp_path, max_steps=1, **SHORT)).simulated


def test_the_data_are_read_once_for_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = start.load_dataset
    monkeypatch.setattr(start, "load_dataset", lambda *given: read.append(given) or original(*given))
    train(TrainConfig(out=tmp_path, max_steps=1, simulate_workers=3, **SHORT))
    assert len(read) == 1


def test_sixty_four_workers_take_some_steps(tmp_path: Path) -> None:
    config = {**SHORT, "batch_size": 8, "max_steps": 3}
    for exchange in ("auto", "two_shot"):
        summary = train(TrainConfig(out=tmp_path / exchange, simulate_workers=64, exchange=exchange, **config))
        assert (summary.world_size, summary.steps) == (64, 3)
    assert train(TrainConfig(out=tmp_path / "norm", simulate_workers=3, model="resnet20", **config)).steps == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--simulate-workers", "0"), "--simulate-workers must be at least 1"),
        (("--simulate-workers", "3", "--budget", "6"), "--budget: 6 layers of 5"),
        (("--simulate-workers", "64"), "--batch-size 64 on 64 ranks needs 4096 samples"),
        (("--simulate-workers", "2", "--resume"), "no checkpoint"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    assert cli.main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_another_number_of_workers_cannot_continue_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(out=tmp_path, max_steps=1, simulate_workers=2, **SHORT))
    assert cli.main(["train", "--out", str(tmp_path), *FLAGS, "--resume", "--simulate-workers", "3"]) == 2
    assert "world_size was 2 and is now 3" in capsys.readouterr().err


def test_sigterm_ends_the_run_in_order_and_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = [*FLAGS, "--simulate-workers", "3", "--epochs", "3"]
    stopped = subprocess.Popen(
        warm_python.command(*TRAIN, *flags, "--out", str(tmp_path / "stopped")),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if line.startswith("epoch"):
            stopped.send_signal(signal.SIGTERM)
            break
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM, output + errors
    assert errors.count("jointspar train: stopped by a signal after step ") == 1
    assert not (tmp_path / "stopped" / "summary.json").exists()
    for name, more in (("stopped", ["--resume"]), ("whole", [])):
        assert cli.main(["train", *flags, *more, "--out", str(tmp_path / name)]) == 0
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "stopped", 3)


@pytest.mark.mpi
def test_under_mpirun_the_flag_is_refused(tmp_path: Path) -> None:
    train = [*jobs.find_launcher("mpirun"), "2", *warm_python.command(*TRAIN)]
    command = [*train, "--simulate-workers", "4", "--out", str(tmp_path / "run")]
    job = jobs.run_job(command, 100)
    assert job.code == 2, job.output
    assert job.output.count("--simulate-workers does not act under a launcher, which started 2 ranks") == 1
    assert "Traceback" not in job.output


@pytest.mark.mpi
def test_a_run_is_that_of_ranks_under_mpirun(tmp_path: Path) -> None:
    flags = [*FLAGS, "--exchange", "ring", "--max-steps", "24"]
    train = [*jobs.find_launcher("mpirun"), "2", *warm_python.command(*TRAIN)]
    command = [*train, *flags, "--out", str(tmp_path / "mpi")]
    job = jobs.run_job(command, 100)
    assert job.code == 0, job.output
    assert cli.main(["train", *flags, "--simulate-workers", "2", "--out", str(tmp_path / "simulated")]) == 0
    assert_same_checkpoints(tmp_path / "mpi", tmp_path / "simulated", 2, without=("random_state",))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("mpi", "simulated")]
    for key in ("train_loss", "test_accuracy", "steps", "world_size", "bytes_sent", "bytes_dense", "active_fraction"):
        assert summaries[0][key] == summaries[1][key], key
    assert [summary["simulated"] for summary in summaries] == [False, True]
