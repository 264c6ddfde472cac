"""Pictures of a record: exchanges against the ideal time, and who wins at which bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from network.transfers import SHARE_OF_IDEAL
from results import Cell, Record
from step.summary import noisy

STYLES = {
    "allreduce": ("#8a8f98", "-"), "ring": ("#1f3a5f", "-"), "ring_short": ("#1f3a5f", "--"),
    "two_shot": ("#d1603d", "-"), "two_shot_short": ("#d1603d", "--"),
}  # fmt: skip
ROLE_STYLES = {"ours": "-", "dense": "--", "compressed": ":", "floor": "-."}
MARKERS = "osD^vPX*<>dph8"  # beside ten colours, so that no two methods look alike


def draw_transfers(path: Path, record: Record, cells: Sequence[Cell]) -> Path | None:
    """Time / ideal time against the rate: a row a launcher, a column a number of ranks, for the largest dense buffer.

    Rings mark what "auto" takes. Writes <path>-transfers.png and returns that; None without such cells.
    """
    dense = [cell for cell in cells if cell["kind"] == "transfers" and cell["what"] == "dense"]
    if not dense:
        return None
    largest = max(cell["full_bytes"] for cell in dense)
    dense = [cell for cell in dense if cell["full_bytes"] == largest]
    launchers = list(dict.fromkeys(cell["launcher"] for cell in dense))
    figure, all_axes = _panels(launchers, sorted({cell["ranks"] for cell in dense}))
    for (launcher, num_ranks), axes in all_axes.items():
        shown = [cell for cell in dense if (cell["launcher"], cell["ranks"]) == (launcher, num_ranks)]
        _draw_exchanges(axes, sorted(shown, key=lambda cell: cell["gbits"]))
        axes.set_title(f"{launcher}, {num_ranks} ranks", loc="left", fontsize=9)
    _explain(figure, record, f'{largest / 1e6:g} MB on a link, against the ideal time; circle: what "auto" takes')
    return _save(figure, path.with_name(f"{path.stem}-transfers.png"))


def _draw_exchanges(axes: Axes, cells: Sequence[Cell]) -> None:
    for name, (colour, style) in STYLES.items():
        points = [(cell["gbits"], row) for cell in cells for row in cell["exchanges"] if row["exchange"] == name]
        axes.plot([x for x, _ in points], [row["of_ideal"]["median"] for _, row in points], style, c=colour, label=name)
        chosen = [(x, row["of_ideal"]["median"]) for x, row in points if row["is_chosen"]]
        axes.plot([x for x, _ in chosen], [y for _, y in chosen], "o", mfc="none", c=colour)
    _name_rates(axes, cells)
    axes.axhline(SHARE_OF_IDEAL, color="black", lw=0.8, ls="--")
    axes.set(ylabel="time / ideal", ylim=(0.8, None))


def draw_iterations(path: Path, record: Record, cells: Sequence[Cell]) -> Path | None:
    """Iterations a second of each method against the rate: median, and bars over the inner eight tenths of the rounds.

    A hollow mark is a method whose forward pass, which all share, was unlike the others' there. A row a model, a column
    a number of ranks. Writes <path>-iterations.png and returns that; None without such cells.
    """
    timed = [cell for cell in cells if cell["kind"] == "iterations"]
    if not timed:
        return None
    models = list(dict.fromkeys(cell["case"] for cell in timed))
    figure, all_axes = _panels(models, sorted({cell["ranks"] for cell in timed}))
    for (model, num_ranks), axes in all_axes.items():
        shown = [cell for cell in timed if (cell["case"], cell["ranks"]) == (model, num_ranks)]
        _draw_methods(axes, sorted(shown, key=lambda cell: cell["gbits"]))
        axes.set_title(f"{model}; {num_ranks} ranks", loc="left", fontsize=9)
    _explain(figure, record, "Iterations a second: median, 10th to 90th percentile; hollow: disturbed by others")
    return _save(figure, path.with_name(f"{path.stem}-iterations.png"))


def _draw_methods(axes: Axes, cells: Sequence[Cell]) -> None:
    roles = {row["variant"]: row["role"] for cell in cells for row in cell["variants"]}
    for index, (name, role) in enumerate(roles.items()):
        points = [(cell, row) for cell in cells for row in cell["variants"] if row["variant"] == name]
        x = np.array([cell["gbits"] for cell, _ in points]) * 1.012 ** (index - len(roles) / 2)  # side by side
        low, middle, high = (
            np.array([1e3 / row["ms"][which] for _, row in points]) for which in ("p90", "median", "p10")
        )
        style = dict(color=f"C{index % 10}", marker=MARKERS[index % len(MARKERS)], ms=5.5)
        axes.errorbar(
            x, middle, [middle - low, high - middle], ls=ROLE_STYLES[role], lw=1, elinewidth=1, label=name, **style
        )
        hollow = [i for i, (cell, _) in enumerate(points) if name in dict(noisy(cell))]
        axes.plot(x[hollow], middle[hollow], ls="", mfc="white", zorder=3, **style)
    _name_rates(axes, cells)
    axes.set(yscale="log", ylabel="iterations / s")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")


def _name_rates(axes: Axes, cells: Sequence[Cell]) -> None:
    rates = [cell["gbits"] for cell in cells]
    axes.set(xscale="log", xlabel="Gbit/s")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def _panels(rows: Sequence[str], ranks: Sequence[int]) -> tuple[Figure, dict[tuple[str, int], Axes]]:
    figure = Figure(figsize=(max(1.5 + 4.5 * len(ranks), 9.0), 2.1 + 3.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(ranks), squeeze=False)
    return figure, {(row, n): grid[i][j] for i, row in enumerate(rows) for j, n in enumerate(ranks)}


def _explain(figure: Figure, record: Record, title: str) -> None:
    machine, commit = record["machine"], (record["commit"] or "unknown")[:10]
    quick = "   QUICK RUN: NOT A MEASUREMENT" if record["quick"] else ""
    figure.suptitle(
        f"{title}{quick}\nhosts are namespaces of one machine: {machine['processor']}, {machine['cores']} cores; "
        f"torch {record['versions']['torch']}; commit {commit}; {record['date'][:10]}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
