"""Pictures of runs, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jointspar.training.records import Summary, readable_bytes

_INK, _FAINT = "#1f3a5f", "#b8c6d9"
_COLOURS = ("#1f3a5f", "#d1603d", "#3c8d5a", "#8a5a9e")
PHASE_ORDER = ("data", "forward", "backward", "plan", "pack", "go", "exchange", "measure", "update",
                "probabilities", "sample")  # fmt: skip

Record = Mapping[str, Any]


def plot_run(path: Path, records: Sequence[Record], summary: Summary) -> None:
    """Draw one run: loss, accuracy and rate over epochs, time of a step by phase, probability of each layer over time.

    records: the lines of metrics.jsonl. Overwrites `path` (PNG).
    """
    steps = _of_kind(records, "step")
    epochs = _of_kind(records, "epoch", "stop")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.2), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
        figure.suptitle(_title(summary), x=0.01, ha="left", fontsize=13, fontweight="bold")
        _draw_loss(figure.add_subplot(grid[0, 0]), steps, epochs)
        _draw_accuracy(figure.add_subplot(grid[0, 1]), {"": epochs})
        _draw_rate(figure.add_subplot(grid[0, 2]), records)
        _draw_phases(figure.add_subplot(grid[1, 0]), epochs)
        _draw_probabilities(figure, figure.add_subplot(grid[1, 1:]), records, summary.layers)
        figure.savefig(path, dpi=120)


def plot_comparison(path: Path, runs: Mapping[str, Sequence[Record]], title: str) -> None:
    """Draw loss and accuracy of several runs over epochs, and accuracy over bytes sent. Overwrites `path` (PNG)."""
    epochs = {label: _of_kind(records, "epoch", "stop") for label, records in runs.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        loss, accuracy, traffic = figure.subplots(1, 3)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for colour, (label, lines) in zip(_COLOURS, epochs.items(), strict=False):
            loss.plot(column(lines, "epoch"), column(lines, "train_loss"), color=colour, label=label, **markers(lines))
            sent_mb = column(lines, "bytes_sent") / 1e6
            traffic.plot(sent_mb, 100 * column(lines, "test_accuracy"), color=colour, **markers(lines))
        loss.set(title="Training loss", ylim=(0, None))
        epochs_below(loss)
        _draw_accuracy(accuracy, epochs)
        traffic.set(title="Test accuracy against traffic", xlabel="MB sent by a rank", ylabel="%")
        loss.legend(frameon=False)
        figure.savefig(path, dpi=120)


STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": "#e6e9ee",
    "lines.linewidth": 1.8,
    "font.size": 9.5,
}


def _title(summary: Summary) -> str:
    budget = "" if summary.budget is None else f" at budget {summary.budget} ({summary.strategy})"
    ranks = f"{summary.world_size} {'simulated ' * summary.simulated}rank" + ("s" if summary.world_size > 1 else "")
    sent = f", {readable_bytes(summary.bytes_sent)} sent per rank" if summary.world_size > 1 else ""
    return (
        f"{summary.method}{budget} · {summary.model} on {summary.dataset} · {ranks}\n"
        f"{100 * summary.test_accuracy:.2f} % after {summary.steps} steps, {summary.seconds:.1f} s{sent}"
    )


def _draw_loss(axes: Axes, steps: Sequence[Record], epochs: Sequence[Record]) -> None:
    if steps:
        axes.plot(column(steps, "epoch"), column(steps, "train_loss"), color=_FAINT, lw=1, label="step")
    axes.plot(column(epochs, "epoch"), column(epochs, "train_loss"), color=_INK, label="epoch mean", **markers(epochs))
    axes.set(title="Training loss", ylim=(0, None))
    epochs_below(axes)
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, runs: Mapping[str, Sequence[Record]]) -> None:
    for colour, (label, epochs) in zip(_COLOURS, runs.items(), strict=False):
        percent = 100 * column(epochs, "test_accuracy")
        axes.plot(column(epochs, "epoch"), percent, color=colour, label=label, **markers(epochs))
    axes.set(title="Test accuracy", ylabel="%")
    epochs_below(axes)


def _draw_rate(axes: Axes, records: Sequence[Record]) -> None:
    axes.plot(column(records, "epoch"), column(records, "lr"), color=_INK)
    axes.set(title="Learning rate", yscale="log")
    epochs_below(axes)


def _draw_phases(axes: Axes, epochs: Sequence[Record]) -> None:
    """Mean time of one step by phase, in the order of the pipeline from top to bottom."""
    timed = [record["phase_ms"] for record in epochs if record["phase_ms"]]  # none: a run continued at an epoch's end
    totals: dict[str, float] = {}
    for phase_ms in timed:
        for name, ms in phase_ms.items():
            totals[name] = totals.get(name, 0.0) + ms / len(timed)
    names = sorted(totals, key=lambda name: PHASE_ORDER.index(name) if name in PHASE_ORDER else len(PHASE_ORDER))
    bars = axes.barh(names, [totals[name] for name in names], color=_INK, height=0.65)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.14)
    axes.set(title="Time of a step by phase", xlabel="ms, rank 0")


def _draw_probabilities(figure: Figure, axes: Axes, records: Sequence[Record], layer_names: Sequence[str]) -> None:
    axes.set_title("Probability of each layer, as drawn on rank 0")
    axes.grid(visible=False)
    if records:
        values = np.array([record["probabilities"] for record in records])
        mesh = heat_map(axes, column(records, "epoch"), values, layer_names)
        figure.colorbar(mesh, ax=axes, pad=0.01)


def heat_map(axes: Axes, ends: np.ndarray, values: np.ndarray, layer_names: Sequence[str]) -> QuadMesh:
    """One row a layer, input at the top; time to the right. ends: epochs; values: [len(ends), num_layers]."""
    keep = np.diff(ends, prepend=0.0) > 0  # an epoch's line repeats the step line of its last step
    edges = np.concatenate([[0.0], ends[keep]])
    rows = np.arange(len(layer_names) + 1)
    mesh = axes.pcolormesh(edges, rows, values[keep].T, vmin=0, vmax=1, cmap="viridis", rasterized=True)
    epochs_below(axes)
    every = max(1, len(layer_names) // 24)
    axes.set_yticks(rows[:-1:every] + 0.5, list(layer_names)[::every], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False)
    return mesh


def epochs_below(axes: Axes) -> None:
    """Call it after drawing: the right end is fixed by what is there."""
    axes.set(xlabel="epoch", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _of_kind(records: Sequence[Record], *kinds: str) -> list[Record]:
    return [record for record in records if record["kind"] in kinds]


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """float64; null (a loss that was not finite) becomes NaN, which is not drawn."""
    return np.array([np.nan if record[name] is None else record[name] for record in records], dtype=np.float64)


def markers(epochs: Sequence[Record]) -> dict[str, Any]:
    """Points are shown while there are few of them: a line through one point would be invisible."""
    return {"marker": "o", "markersize": 3.5} if len(epochs) <= 40 else {}
