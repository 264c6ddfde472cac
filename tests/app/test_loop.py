"""Short real runs on digits: what is written, that it learns, and that a resumed run is the same run."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_files import (
    random_bytes,
    resize_table,
    write_cifar100,
    write_class_folders,
    write_mnist,
    write_shards,
    write_svhn,
)
from jointspar import cli
from jointspar.errors import JointSparError
from jointspar.training.config import METHODS, TrainConfig
from jointspar.training.data.batches import evaluation_batches
from jointspar.training.data.readers import DatasetError
from jointspar.training.loop import Run, StoppedError
from jointspar.training.records import Display, read_metrics
from jointspar.training.setup import SetupError
from jointspar.training.start import train

SHORT: dict[str, Any] = {"batch_size": 128, "epochs": 2, "base_lr": 0.5, "log_every": 4, "threads": 1}

EPOCHS = 20  # of the run that learns


def weights(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoint").glob("step-*"))
    return load_file(newest / "shared.safetensors")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these trainings; `learned` has its own."""
    monkeypatch.setattr("jointspar.training.plots.plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run long enough to learn, with the defaults of the command line except its length."""
    folder = tmp_path_factory.mktemp("learned")
    train(TrainConfig(out=folder, epochs=EPOCHS, threads=1))
    return folder


def test_defaults_learn_the_digits(learned: Path) -> None:
    summary = json.loads((learned / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9
    assert summary["train_loss"] < 0.3


def test_summary_has_the_promised_fields(learned: Path) -> None:
    summary = json.loads((learned / "summary.json").read_text())
    assert {
        "test_accuracy", "train_loss", "seconds", "steps", "world_size", "bytes_sent", "bytes_dense", "active_fraction",
        "method", "seed",
    } <= set(summary)  # fmt: skip
    assert (summary["method"], summary["world_size"], summary["seed"]) == ("jointspar-lars", 1, 0)
    assert summary["layers"] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert summary["steps"] == EPOCHS * (1437 // 64)
    assert summary["active_fraction"] == pytest.approx(0.5, abs=0.03)


def test_metrics_have_a_line_per_epoch_and_logged_step(learned: Path) -> None:
    lines = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(10, EPOCHS * 22 + 1, 10))
    assert {"train_loss", "test_accuracy", "lr", "seconds", "bytes_sent", "active_fraction"} <= set(epochs[0])
    assert {"forward", "backward", "pack", "exchange", "update"} <= set(epochs[0]["phase_ms"])
    assert all(len(line["probabilities"]) == 5 for line in lines)


def test_curves_are_a_picture(learned: Path) -> None:
    with Image.open(learned / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    summary = train(TrainConfig(out=tmp_path, method=method, max_steps=6, **SHORT))
    assert summary.steps == 6
    assert summary.active_fraction == pytest.approx(0.5 if METHODS[method].is_sparse else 1.0, abs=0.1)


@pytest.mark.parametrize(
    ("distribution", "interrupted_at"),
    [("norm", 11), ("bandit", 15)],
    ids=["norm, after an epoch", "bandit, within an epoch"],
)
def test_resumed_run_gives_the_same_weights(tmp_path: Path, interrupted_at: int, distribution: str) -> None:
    config = {**SHORT, "distribution": distribution}
    whole = train(TrainConfig(out=tmp_path / "whole", **config))
    train(TrainConfig(out=tmp_path / "parts", max_steps=interrupted_at, **config))
    parts = train(TrainConfig(out=tmp_path / "parts", resume=True, **config))
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)
    assert (parts.steps, parts.test_accuracy) == (whole.steps, whole.test_accuracy)
    assert parts.train_loss == pytest.approx(whole.train_loss)
    assert parts.active_fraction == pytest.approx(whole.active_fraction)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [record["step"] for record in records[1]] == [record["step"] for record in records[0]]


def test_run_stopped_at_the_end_of_an_epoch_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its evaluation was left to do."""
    note_step = Run._note_step
    whole = train(TrainConfig(out=tmp_path / "whole", **SHORT))
    half = whole.steps // 2

    def stopping(run: Run, loss: float) -> None:
        note_step(run, loss)
        if run.progress.step == half - 1:
            run.optimizer.request_stop()

    monkeypatch.setattr(Run, "_note_step", stopping)
    with pytest.raises(StoppedError, match=f"after step {half}"):
        train(TrainConfig(out=tmp_path / "parts", **SHORT))
    monkeypatch.setattr(Run, "_note_step", note_step)
    parts = train(TrainConfig(out=tmp_path / "parts", resume=True, **SHORT))
    assert parts == replace(whole, seconds=parts.seconds)
    epochs = [record for record in read_metrics(tmp_path / "parts" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [record["lr"] for record in epochs] == [
        record["lr"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl") if record["kind"] == "epoch"
    ]


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("num_ranks", [None, 2])
def test_an_epoch_whose_test_data_cannot_be_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int | None, epoch: int
) -> None:
    """On one rank; when the data are mended only the evaluation is made up for."""
    config = {**SHORT, "batch_size": 64, "simulate_workers": num_ranks}
    whole = train(TrainConfig(out=tmp_path / "whole", **config))
    is_last = num_ranks or 1
    calls = itertools.count(1)

    def damaged(*given: Any) -> Any:
        if next(calls) == epoch * is_last:
            raise DatasetError("a picture is damaged")
        return evaluation_batches(*given)

    monkeypatch.setattr("jointspar.training.loop.evaluation_batches", damaged)
    with pytest.raises((DatasetError, JointSparError), match=r"a picture is damaged|the epoch is saved"):
        train(TrainConfig(out=tmp_path / "parts", **config))
    newest = max((tmp_path / "parts" / "checkpoint").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) == epoch * whole.steps // 2
    parts = train(TrainConfig(out=tmp_path / "parts", resume=True, **config))
    assert parts == replace(whole, seconds=parts.seconds)
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(expected[name].equal(resumed[name]) for name in expected)


@pytest.mark.parametrize("method", ["topk", "qsgd-lars", "randomk", "powersgd"])
def test_resumed_baseline_gives_the_same_weights(tmp_path: Path, method: str) -> None:
    config = {**SHORT, "method": method, "base_lr": 0.05}
    train(TrainConfig(out=tmp_path / "whole", **config))
    train(TrainConfig(out=tmp_path / "parts", max_steps=15, **config))
    train(TrainConfig(out=tmp_path / "parts", resume=True, **config))
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(expected[name].equal(resumed[name]) for name in expected)


def test_resume_with_another_ratio_is_refused(tmp_path: Path) -> None:
    train(TrainConfig(out=tmp_path, method="topk", max_steps=2, **SHORT))
    with pytest.raises(SetupError, match=r"compression_ratio was None and is now 0\.1"):
        train(TrainConfig(out=tmp_path, method="topk", compression_ratio=0.1, resume=True, **SHORT))


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(TrainConfig(out=tmp_path, max_steps=2, **SHORT))
    with pytest.raises(SetupError, match=r"momentum was 0\.9 and is now 0\.5"):
        train(TrainConfig(out=tmp_path, resume=True, momentum=0.5, **SHORT))
    assert (tmp_path / "summary.json").is_file()  # of the run as it was


def test_more_epochs_are_refused_only_where_they_move_the_schedule(tmp_path: Path) -> None:
    config = {**SHORT, "max_steps": 2, "milestones": (1.5,)}
    train(TrainConfig(out=tmp_path / "fixed", **config))
    longer = replace(TrainConfig(out=tmp_path / "fixed", **config), resume=True, epochs=3, max_steps=4)
    assert train(longer).steps == 4  # 128 samples a step: there is no warm-up to move
    train(TrainConfig(out=tmp_path / "moving", **(config | {"milestones": None})))
    with pytest.raises(SetupError, match=r"milestones was \[.*\] and is now \[.*\] with --epochs 3"):
        train(replace(longer, out=tmp_path / "moving", milestones=None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="--device cuda: torch finds no CUDA device here"):
        train(TrainConfig(out=tmp_path, device="cuda", **SHORT))


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    """Batches are counted, so that fewer samples could leave none to end the epoch with."""
    flags = {"dataset": "mnist", "data_dir": tmp_path / "data", "batch_size": 4, "epochs": 1, "threads": 1}
    write_mnist(tmp_path / "data")
    train(TrainConfig(out=tmp_path / "run", max_steps=4, **flags))
    write_mnist(tmp_path / "data", num_train=12)
    with pytest.raises(SetupError, match=r"data was '20 \+ 6 images, .*' and is now '12 \+ 6 images, "):
        train(TrainConfig(out=tmp_path / "run", resume=True, **flags))


def test_resume_with_other_pictures_of_the_same_labels_is_refused(tmp_path: Path) -> None:
    flags = {"dataset": "mnist", "data_dir": tmp_path / "data", "batch_size": 4, "epochs": 1, "threads": 1}
    write_mnist(tmp_path / "data")
    train(TrainConfig(out=tmp_path / "run", max_steps=4, **flags))
    images = next((tmp_path / "data").glob("train-images*"))
    written = images.read_bytes()
    images.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(SetupError, match="data was "):
        train(TrainConfig(out=tmp_path / "run", resume=True, **flags))


@pytest.mark.parametrize(("dense_epochs", "num_dense"), [(3 / 11, 3), (0.01, 1)])
def test_the_first_epochs_are_dense_where_that_is_wanted(tmp_path: Path, dense_epochs: float, num_dense: int) -> None:
    train(TrainConfig(out=tmp_path, dense_epochs=dense_epochs, max_steps=5, **(SHORT | {"log_every": 1})))
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["active_fraction"] == 1.0 for record in records] == [step < num_dense for step in range(5)]


def test_one_layer_is_not_continued_as_all_layers(tmp_path: Path) -> None:
    train(TrainConfig(out=tmp_path, max_steps=2, budget=1, **SHORT))
    with pytest.raises(SetupError, match=r"budget was 1 and is now 1\.0"):
        train(TrainConfig(out=tmp_path, resume=True, budget=1.0, **SHORT))


def test_a_run_that_was_killed_while_it_first_saved_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoint/.partial-step-00000001").mkdir(parents=True)
    with pytest.raises(SetupError, match="start without --resume"):
        train(TrainConfig(out=tmp_path, resume=True, **SHORT))
    assert train(TrainConfig(out=tmp_path, max_steps=2, **SHORT)).steps == 2


def test_an_epoch_is_saved_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the lines may be gone, and the line then ends the run."""

    def fail(self: Display, text: str) -> None:
        if text.startswith("epoch"):
            raise BrokenPipeError

    monkeypatch.setattr(Display, "line", fail)
    with pytest.raises(BrokenPipeError):
        train(TrainConfig(out=tmp_path, **SHORT))
    monkeypatch.undo()
    assert train(TrainConfig(out=tmp_path, resume=True, **SHORT)).epochs == 2


@pytest.mark.parametrize("write", [write_class_folders, write_shards])
def test_imagenet_trains_and_resumes_within_an_epoch_from_both_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """As a user does it, with pictures of 65 pixels, for which ResNet-18 has the stem of ImageNet."""
    resize_table(monkeypatch, "imagenet", image_size=65, resize=72, num_classes=12)
    write(tmp_path / "data")
    flags = ["--dataset", "imagenet", "--data-dir", str(tmp_path / "data"), "--model", "resnet18", "--batch-size", "4"]
    flags += ["--epochs", "1", "--threads", "1", "--log-every", "1"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert cli.main(["train", "--out", whole, *flags]) == 0
    assert cli.main(["train", "--out", parts, "--max-steps", "2", *flags]) == 0
    assert cli.main(["train", "--out", parts, "--resume", *flags]) == 0
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(expected[name].equal(resumed[name]) for name in expected)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["step"] == 3
    assert [thread for thread in threading.enumerate() if thread.name == "prefetch"] == []


@pytest.mark.parametrize("name", ["svhn", "cifar100"])
def test_small_pictures_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    resize_table(monkeypatch, name, train_size=16, test_size=8)
    images, labels = random_bytes(16, 3, 32, 32), np.arange(16) % 10
    for k, (split, count) in enumerate((("train", 16), ("test", 8))):
        if name == "svhn":
            write_svhn(tmp_path / "data" / f"{split}_32x32.mat", images[:count], labels[:count])
        else:
            fine = (labels[:count] + 90 * k).astype(np.uint8)
            write_cifar100(tmp_path / "data" / f"{split}.bin", images[:count], fine % 20, fine)
    flags = ["--dataset", name, "--data-dir", str(tmp_path / "data"), "--model", "resnet20", "--batch-size", "8"]
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--epochs", "1", "--threads", "1", *flags]) == 0


def test_several_ranks_stopped_within_an_epoch_keep_statistics_of_their_own(tmp_path: Path) -> None:
    """They are averaged at the end of an epoch, so an average in its midst would change what comes after."""
    config = {**SHORT, "model": "resnet20", "batch_size": 32, "simulate_workers": 2}

    def statistics(folder: Path) -> dict[str, Any]:
        newest = max((folder / "checkpoint").glob("step-*"))
        saved = load_file(newest / "rank-1.safetensors")
        return {name: value for name, value in saved.items() if "running" in name}

    train(TrainConfig(out=tmp_path / "whole", max_steps=3, **config))
    train(TrainConfig(out=tmp_path / "parts", max_steps=1, **config))
    train(TrainConfig(out=tmp_path / "parts", max_steps=3, resume=True, **config))
    expected, resumed = statistics(tmp_path / "whole"), statistics(tmp_path / "parts")
    assert len(expected) > 10
    assert all(expected[name].equal(resumed[name]) for name in expected)


def test_repeating_what_is_done_keeps_its_evaluation_and_fewer_steps_are_refused(tmp_path: Path) -> None:
    first = train(TrainConfig(out=tmp_path, max_steps=2, **SHORT))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["kind"] == "stop"
    again = train(TrainConfig(out=tmp_path, max_steps=2, resume=True, **SHORT))
    assert (again.test_accuracy, again.steps) == (first.test_accuracy, 2)
    assert read_metrics(tmp_path / "metrics.jsonl") == records
    with pytest.raises(SetupError, match="max_steps: 1 is less than the 2 steps made already"):
        train(TrainConfig(out=tmp_path, max_steps=1, resume=True, **SHORT))
    train(TrainConfig(out=tmp_path, max_steps=3, resume=True, **SHORT))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "stop"] == [3]


def test_damaged_training_data_end_the_command_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(config: TrainConfig) -> None:
        raise DatasetError("a.JPEG is damaged")

    monkeypatch.setattr("jointspar.training.start.train", damaged)
    assert cli.main(["train", "--out", str(tmp_path)]) == cli.EXIT_USAGE
    assert capsys.readouterr().err.startswith("jointspar train: a.JPEG is damaged; what was saved can be continued")


def test_batch_norm_model_trains_and_resumes(tmp_path: Path) -> None:
    config = {**SHORT, "model": "resnet20", "batch_size": 32}
    train(TrainConfig(out=tmp_path, max_steps=1, **config))
    assert train(TrainConfig(out=tmp_path, max_steps=2, resume=True, **config)).steps == 2
