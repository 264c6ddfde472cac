"""Figures of one experiment, drawn from its part of results.json."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jointspar.training.plots import PHASE_ORDER, STYLE, column, epochs_below, heat_map, markers
from jointspar.training.reproduce.results import kept_seeds

_COLOURS = (
    "#1f3a5f",
    "#d1603d",
    "#3c8d5a",
    "#8a5a9e",
    "#c9a227",
    "#2a9db0",
    "#b03a6b",
    "#6b7280",
    "#7a4b2a",
    "#94b447",
)
_DASHES = ("-", "--", ":")  # a further round of the colours
_PHASE_COLOURS = ("#d9dee6", "#b8c6d9", "#5b7ba6", "#f0c9a0", "#e39a5a", "#f6dfc4", "#d1603d", "#cfe0c8", "#3c8d5a",
                  "#8a5a9e", "#c3a6cf")  # fmt: skip
_WIDTH = 12.5
_WIDE = 8  # times

Experiment = Mapping[str, Any]


class Picture(NamedTuple):
    """A figure as a file: its name and its bytes (PNG)."""

    name: str
    caption: str
    content: bytes


def draw(experiment: Experiment) -> Iterator[Picture]:
    """The pictures of an experiment, in the order to be read."""
    for name, caption, figure in _figures(experiment):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        yield Picture(f"{experiment['name']}-{name}.png", caption, file.getvalue())


def _figures(experiment: Experiment) -> Iterator[tuple[str, str, Figure]]:
    with matplotlib.rc_context(STYLE):
        yield "learning", _learning_caption(experiment), _draw_learning(experiment)
        yield (
            "accuracy",
            "Accuracy after the last epoch: a dot for each seed, a bar for their mean; at the left edge a cross for a "
            "seed that is lost, unless all are.",
            _draw_end(experiment),
        )
        if not experiment["simulated"]:
            caption = (
                "Mean time of one step by phase, on rank 0, over all seeds; a compressor's exchange with its coding."
            )
            yield "phases", caption, _draw_phases(experiment)
        sampled = [run for run in experiment["runs"] if _has_probabilities(run)]
        if sampled:
            caption = "Probability of each layer over time, on rank 0, first seed; the input is at the top."
            yield "probabilities", caption, _draw_probabilities(sampled)


def _learning_caption(experiment: Experiment) -> str:
    several = any(len(run["seeds"]) > 1 for run in experiment["runs"])
    over = " and over ".join(label for _, label, _ in _horizontal(experiment))
    return f"Accuracy and loss over {over}." + " Bands: from the lowest to the highest seed that is not lost." * several


def _horizontal(experiment: Experiment) -> list[tuple[str, str, float]]:
    """What is drawn over: entry of an epoch, label, factor. Seconds of a simulation and traffic of one rank are not."""
    found = [("epoch", "epoch", 1.0)]
    if not experiment["simulated"]:
        found.append(("seconds", "seconds of training", 1.0))
    if experiment["ranks"] > 1:
        found.append(("bytes_sent", "MB sent by a rank", 1e-6))
    return found


def _new_figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_learning(experiment: Experiment) -> Figure:
    """Two rows: accuracy and loss."""
    horizontal = _horizontal(experiment)
    figure = _new_figure(6.4)
    axes = figure.subplots(2, len(horizontal), squeeze=False)
    vertical = (("test_accuracy", "Test accuracy, %", 100.0), ("train_loss", "Training loss", 1.0))
    for row, (what, title, factor) in zip(axes, vertical, strict=True):
        for panel, (over, label, scale) in zip(row, horizontal, strict=True):
            for run, style in zip(experiment["runs"], _line_styles(), strict=False):
                _draw_seeds(panel, kept_seeds(run), (over, scale), (what, factor), style)
            panel.set(title=title, xlabel=label)
            if over == "epoch":
                epochs_below(panel)
            elif over == "bytes_sent" and _is_wide(experiment):
                panel.set_xscale("log")
            else:
                panel.set_xlim(0, None)
    handles = [Line2D([], [], label=run["label"], **style)
               for run, style in zip(experiment["runs"], _line_styles(), strict=False)]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _is_wide(experiment: Experiment) -> bool:
    """Whether runs send so differently much that the frugal ones would all stand at the left edge."""
    sent = [seed["summary"]["bytes_sent"] for run in experiment["runs"] for seed in run["seeds"]]
    return min(sent) > 0 and max(sent) > _WIDE * min(sent)


def _draw_seeds(
    axes: Axes,
    seeds: Sequence[Mapping[str, Any]],
    over: tuple[str, float],
    what: tuple[str, float],
    style: dict[str, Any],
) -> None:
    """The mean line, and a band where there are several seeds, up to the last epoch that all of them have."""
    length = min(len(seed["epochs"]) for seed in seeds)
    x = np.array([over[1] * column(seed["epochs"][:length], over[0]) for seed in seeds])
    y = np.array([what[1] * column(seed["epochs"][:length], what[0]) for seed in seeds])
    axes.plot(x.mean(axis=0), y.mean(axis=0), **style, **markers(seeds[0]["epochs"]))
    if len(seeds) > 1:
        axes.fill_between(x.mean(axis=0), y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.15, lw=0)


def _line_styles() -> Iterator[dict[str, Any]]:
    return itertools.cycle({"color": colour, "linestyle": dash} for dash in _DASHES for colour in _COLOURS)


def _draw_end(experiment: Experiment) -> Figure:
    runs = experiment["runs"]
    figure = _new_figure(1.2 + 0.34 * len(runs))
    axes = figure.subplots()
    for row, (run, style) in enumerate(zip(runs, _line_styles(), strict=False)):
        accuracy = [100 * seed["summary"]["test_accuracy"] for seed in kept_seeds(run)]
        num_lost = len(run["seeds"]) - len(accuracy)
        axes.plot([0.01 + 0.015 * number for number in range(num_lost)], [row] * num_lost, "x", color=style["color"],
                  transform=axes.get_yaxis_transform())  # fmt: skip
        axes.plot(accuracy, [row] * len(accuracy), "o", color=style["color"], alpha=0.6)
        axes.plot(np.mean(accuracy), row, "|", color=style["color"], markersize=18, markeredgewidth=2.5)
        if run["label"] == experiment["reference"]:
            axes.axvline(float(np.mean(accuracy)), color=style["color"], lw=1, ls=":")
    axes.set_yticks(range(len(runs)), [run["label"] for run in runs])
    axes.set(title="Test accuracy at the end, %", ylim=(len(runs) - 0.4, -0.6))
    return figure


def _draw_phases(experiment: Experiment) -> Figure:
    runs = experiment["runs"]
    times = [_phase_ms(run) for run in runs]
    names = sorted({name for each in times for name in each}, key=_place)
    figure = _new_figure(1.6 + 0.42 * len(runs))
    axes = figure.subplots()
    ends = np.zeros(len(runs))
    for name in names:
        widths = np.array([each.get(name, 0.0) for each in times])
        bars = axes.barh([run["label"] for run in runs], widths, left=ends, height=0.7, label=name,
                  color=_PHASE_COLOURS[_place(name) % len(_PHASE_COLOURS)])  # fmt: skip
        ends += widths
    axes.bar_label(bars, labels=[f"{end:.3g}" for end in ends], padding=4)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08, y=0.02)
    axes.set(title="Time of a step", xlabel="ms")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _phase_ms(run: Mapping[str, Any]) -> dict[str, float]:
    """Mean over all epochs of all seeds, but for those of which only the end was left to a continued run."""
    epochs = [epoch["phase_ms"] for seed in run["seeds"] for epoch in seed["epochs"] if epoch["phase_ms"]]
    names = {name for epoch in epochs for name in epoch}
    return {name: float(np.mean([epoch.get(name, 0.0) for epoch in epochs])) for name in names}


def _place(name: str) -> int:
    return PHASE_ORDER.index(name) if name in PHASE_ORDER else len(PHASE_ORDER)


def _has_probabilities(run: Mapping[str, Any]) -> bool:
    """Whether layers were sampled, and by probabilities that changed."""
    if run["seeds"][0]["probabilities"] is None:
        return False
    values = np.array(run["seeds"][0]["probabilities"]["values"])
    return bool(values.size) and bool((values != values[0]).any())


def _draw_probabilities(runs: Sequence[Mapping[str, Any]]) -> Figure:
    num_columns = min(3, len(runs))
    num_rows = -(-len(runs) // num_columns)
    figure = _new_figure(0.8 + 2.6 * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in panels.flat[len(runs) :]:
        panel.set_axis_off()
    for panel, run in zip(panels.flat, runs, strict=False):
        drawn = run["seeds"][0]["probabilities"]
        names = run["seeds"][0]["summary"]["layers"]
        mesh = heat_map(panel, np.array(drawn["epoch"], dtype=float), np.array(drawn["values"]), names)
        panel.set(title=run["label"])
    figure.colorbar(mesh, ax=panels, pad=0.01, label="probability")
    return figure
