"""A picture of a record: where the time of an iteration goes, by method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from results import Cell, Record
from step.methods import PHASES

COLOURS = {
    "forward": "#8a8f98", "backward": "#c3c7cd", "pack": "#e8b04a", "exchange": "#d1603d", "update": "#1f3a5f",
    "other": "#7a9cc6",
}  # fmt: skip


def draw_phases(path: Path, record: Record, cells: Sequence[Cell]) -> None:
    """Draw stacked bars: a row a model, a column a number of ranks, a bar a method. Overwrites `path` (PNG)."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    ranks = sorted({cell["ranks"] for cell in cells})
    num_bars = max(len(cell["variants"]) for cell in cells)
    size = max(1.5 + 5.0 * len(ranks), 9.0), 1.5 + (0.6 + 0.2 * num_bars) * len(models)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(models), len(ranks), squeeze=False)
    for model, row_axes in zip(models, all_axes, strict=True):
        for num_ranks, axes in zip(ranks, row_axes, strict=True):
            for cell in cells:
                if (cell["model"], cell["ranks"]) == (model, num_ranks):
                    _draw_cell(axes, cell)
    _explain(figure, record)
    figure.savefig(path, dpi=110)


def _draw_cell(axes: Axes, cell: Cell) -> None:
    names = [row["variant"] for row in cell["variants"]]
    left = [0.0] * len(names)
    for phase in PHASES:
        widths = [row["phases"][phase] for row in cell["variants"]]
        axes.barh(range(len(names)), widths, 0.8, left=left, color=COLOURS[phase], label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first one on top
    axes.set_xlabel("ms an iteration, slowest rank")
    axes.set_title(f"{cell['case']}; {cell['ranks']} rank" + ("s" if cell["ranks"] > 1 else ""), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _explain(figure: Figure, record: Record) -> None:
    machine, commit = record["machine"], (record["commit"] or "unknown")[:10]
    quick = "   QUICK RUN: NOT A MEASUREMENT" if record["quick"] else ""
    figure.suptitle(
        f"Time of a training iteration by phase; DDP packs and exchanges during backward{quick}\n"
        f"{machine['processor']}, {machine['cores']} cores; torch {record['versions']['torch']}; "
        f"commit {commit}; {record['date'][:10]}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(PHASES), frameon=False, fontsize=9)
