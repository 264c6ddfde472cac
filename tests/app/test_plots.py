"""Pictures hold what the records say; seen through the axes, not through pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from jointspar.training.plots import _draw_probabilities, plot_comparison, plot_run
from jointspar.training.records import Summary

SUMMARY = Summary(
    0.9,
    0.2,
    3.0,
    40,
    2,
    10**6,
    2 * 10**6,
    0.5,
    "jointspar-lars",
    0,
    "digits",
    "lenet5",
    0.5,
    "stratified",
    4,
    0,
    layers=["conv", "head"],
)


def record(kind: str, step: int, epoch: float, **changes: Any) -> dict[str, Any]:
    values = {
        "kind": kind, "step": step, "epoch": epoch, "train_loss": 1 / step, "test_accuracy": 0.9, "lr": 0.1,
        "bytes_sent": 1000 * step, "probabilities": [0.1, 0.9], "phase_ms": {"forward": 2.0, "backward": 3.0},
    }  # fmt: skip
    return values | changes


RECORDS = [record("step" if step % 10 else "epoch", step, step / 10) for step in range(5, 41, 5)]


def test_heat_map_has_a_row_per_layer_and_spans_all_epochs() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    doubled = [*RECORDS, record("epoch", 40, 4.0, probabilities=[0.0, 0.0])]  # an epoch's line after its step line
    _draw_probabilities(figure, axes, doubled, ["conv", "head"])
    mesh = axes.collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(2, -1), [[0.1] * 8, [0.9] * 8])
    assert axes.get_xlim() == (0, 4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "head"]


def test_run_and_comparison_are_written(tmp_path: Path) -> None:
    with_nan = [*RECORDS, record("step", 42, 4.2, train_loss=None)]
    plot_run(tmp_path / "run.png", with_nan, SUMMARY)
    plot_comparison(tmp_path / "both.png", {"lars": RECORDS, "jointspar-lars": RECORDS}, "digits")
    for name in ("run.png", "both.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"


def test_run_stopped_within_its_first_epoch_is_drawn(tmp_path: Path) -> None:
    plot_run(tmp_path / "run.png", [record("stop", 3, 0.3)], SUMMARY)
    assert (tmp_path / "run.png").stat().st_size > 0
