"""A picture of a record: which fraction of the machine's limit each variant of each operation reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from results import Cell, Record

SHOWN_CASES = ("resnet50", "resnet18", "in_cache")  # the first of them that was measured
COLOURS = {"ours": "#1f3a5f", "peer": "#d1603d", "floor": "#8a8f98"}
LABELS = {"ours": "jointspar", "peer": "peer: the same work in PyTorch", "floor": "floor: less work, in PyTorch"}
WIDTH_PER_THREAD, SMALLEST_WIDTH = 5.5, 9.0
END = 1.3  # of the axis: what is shown above 1 is noise, or a limit that only this small size can beat
OPACITY = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.25}


def draw_fractions(path: Path, record: Record, cells: Sequence[Cell]) -> bool:
    """Draw bars with their 10th to 90th percentile: a row an operation, a column a number of threads.

    Operations without a limit are left out; returns whether anything was left to draw. Overwrites `path` (PNG).
    """
    limited = [cell for cell in cells if any(row["of_limit"] for row in cell["variants"])]
    names = {cell["case"] for cell in limited}
    shown = next((name for name in SHOWN_CASES if name in names), next(iter(sorted(names)), None))
    limited = [cell for cell in limited if cell["case"] == shown]
    operations = list(dict.fromkeys(cell["operation"] for cell in limited))
    threads = sorted({cell["threads"] for cell in limited})
    if not limited:
        return False
    width = max(1 + WIDTH_PER_THREAD * len(threads), SMALLEST_WIDTH)
    figure = Figure(figsize=(width, 1.5 + 2.6 * len(operations)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(operations), len(threads), squeeze=False, sharex=True, sharey="row")
    for operation, row_axes in zip(operations, all_axes, strict=True):
        for num_threads, axes in zip(threads, row_axes, strict=True):
            drawn = [cell for cell in limited if (cell["operation"], cell["threads"]) == (operation, num_threads)]
            _draw_operation(axes, drawn)
            axes.set_title(f"{operation}, {num_threads} thread" + ("s" if num_threads > 1 else ""), loc="left")
    for axes in all_axes[-1]:
        axes.set(xlabel="fraction of the limit", xlim=(0.0, END))
    _explain(figure, record, str(shown))
    figure.savefig(path, dpi=110)
    return True


def _draw_operation(axes: Axes, cells: Sequence[Cell]) -> None:
    """A group of bars a variant, one a dtype: float32 solid, 16-bit ones lighter."""
    names = list(dict.fromkeys(row["variant"] for cell in cells for row in cell["variants"] if row["role"] in COLOURS))
    height = 0.8 / len(cells)
    for place, cell in enumerate(sorted(cells, key=lambda cell: -OPACITY.get(cell["dtype"], 1.0))):
        rows = [row for row in cell["variants"] if row["role"] in COLOURS]
        centres = [names.index(row["variant"]) + (place + 0.5) * height - 0.4 for row in rows]
        medians, low, high = (np.array([row["of_limit"][key] for row in rows]) for key in ("median", "p10", "p90"))
        axes.barh(
            centres, medians, height, color=[COLOURS[row["role"]] for row in rows],
            alpha=OPACITY.get(cell["dtype"], 1.0),
            xerr=[medians - low, high - medians], error_kw={"lw": 0.8},
        )  # fmt: skip
    axes.axvline(1.0, color="black", lw=0.8, ls="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first one on top
    axes.spines[["top", "right"]].set_visible(False)


def _explain(figure: Figure, record: Record, case: str) -> None:
    machine, commit = record["machine"], (record["commit"] or "unknown")[:10]
    quick = "   QUICK RUN: NOT A MEASUREMENT" if record["quick"] else ""
    figure.suptitle(
        f"Fraction of the machine's limit, {case}; solid float32, light bfloat16, lightest float16{quick}\n"
        f"{machine['processor']}, {machine['cores']} cores; torch {record['versions']['torch']}; "
        f"commit {commit}; {record['date'][:10]}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    marks = [figure.axes[0].barh([np.nan], [np.nan], color=colour, label=LABELS[role])
             for role, colour in COLOURS.items()]  # fmt: skip
    figure.legend(handles=marks, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
