"""Samples of the workers as cells of a record: milliseconds, bytes, and ratios that are formed within a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alternate import spread
from interface_counters import SHARED_INTERFACE
from results import Cell
from step.methods import METHODS, PHASES

FLOOR = "plain"
LARGEST_NOISE = 0.15


def cell_of(model: str, result: Mapping[str, Any]) -> Cell:
    """The methods of one model on one number of ranks. result: what a worker wrote.

    speedup: the time of the fastest dense peer (by its median) / own time. of_plain: the time of "plain" / own time, so
    that 1 / of_plain - 1 is what the library adds to a dense step. None where that method took no part. Bytes are the
    interface's, headers included, but on one machine those that our transport counts, since the interface does not see
    them.
    """
    names = list(dict.fromkeys(sample["method"] for sample in result["samples"]))
    names.sort(key=list(METHODS).index)
    samples = {name: [sample for sample in result["samples"] if sample["method"] == name] for name in names}
    ms = {name: np.array([sample["ms"] for sample in samples[name]]) for name in names}
    dense = [name for name in names if METHODS[name].role == "dense"]
    best_dense = min(dense, key=lambda name: float(np.median(ms[name])), default=None)
    return {
        "model": model,
        "case": result["case"],
        "ranks": result["world_size"],
        "threads": result["threads"],
        "iterations": result["iterations"],
        "transports": result["transports"],
        "best_dense": best_dense,
        "variants": [_row(name, samples[name], ms, best_dense, result["interface"]) for name in names],
    }


def _row(
    name: str, samples: list[dict[str, Any]], ms: Mapping[str, np.ndarray], best_dense: str | None, interface: str
) -> Cell:
    def times(other: str | None) -> dict[str, float] | None:
        return spread(ms[other] / ms[name])._asdict() if other in ms else None

    is_counted = samples[0]["sent_bytes"] is not None and interface == SHARED_INTERFACE
    wire_bytes = [sample["sent_bytes" if is_counted else "interface_bytes"] for sample in samples]
    return {
        "variant": name,
        "role": METHODS[name].role,
        "ms": spread(ms[name])._asdict(),
        "phases": {phase: float(np.median([sample["phases"][phase] for sample in samples])) for phase in PHASES},
        "wire_bytes": spread(np.array(wire_bytes))._asdict(),
        "wire_bytes_counted_by": "transport" if is_counted else "interface",
        "interface_bytes": spread(np.array([sample["interface_bytes"] for sample in samples]))._asdict(),
        "exchanges": sorted({sample["exchange"] for sample in samples}),
        "speedup": times(best_dense),
        "of_plain": times(FLOOR),
    }


def table(cell: Cell) -> str:
    """A line a method: milliseconds with 10th and 90th percentile, both ratios, megabytes, then the phases."""
    ranks = f"{cell['ranks']} rank" + ("s" if cell["ranks"] > 1 else "")
    threads = f"{cell['threads']} thread" + ("s" if cell["threads"] > 1 else "")
    lines = [f"{cell['case']}; {ranks}, {threads} each; {cell['transports']['jointspar']}"]
    best = f"x {cell['best_dense']}" if cell["best_dense"] else "x -"
    phases = "".join(f"{phase:>10}" for phase in PHASES)
    lines.append(f"  {'':20}{'ms':>24}{best:>12}{'x ' + FLOOR:>9}{'MB sent':>10}{phases}")
    for row in cell["variants"]:
        ms = row["ms"]
        ratios = [f"{row[ratio]['median']:.3f}" if row[ratio] else "-" for ratio in ("speedup", "of_plain")]
        phases = "".join(f"{row['phases'][phase]:10.1f}" for phase in PHASES)
        time = f"{ms['median']:.1f} [{ms['p10']:.1f}, {ms['p90']:.1f}]"
        sent = f"{row['wire_bytes']['median'] / 1e6:.3f}"
        lines.append(f"  {row['variant']:20}{time:>24}{ratios[0]:>12}{ratios[1]:>9}{sent:>10}{phases}")
    lines += [
        f"  noise: {name} took {share:.2f} of the median forward pass, which all share" for name, share in noisy(cell)
    ]
    return "\n".join(lines) + "\n"


def noisy(cell: Cell) -> list[tuple[str, float]]:
    """Methods whose forward pass differs from the median one by more than 15 %, as no method makes it; by how much."""
    forward = {row["variant"]: row["phases"]["forward"] for row in cell["variants"]}
    usual = float(np.median(list(forward.values())))
    shares = [(name, ms / usual) for name, ms in forward.items() if usual > 0.0]
    return [(name, share) for name, share in shares if abs(share - 1.0) > LARGEST_NOISE]
