"""Measurements -> JSON and a Markdown page. Uses no GPU, and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]  # see `empty`
Record = dict[str, Any]


def empty(environment: dict[str, str]) -> Results:
    """What the parts of a run fill."""
    return {"environment": environment, "copy": None, "operations": [], "steps": [], "training": [], "failed": {}}


def file_stem(device: str, date: str) -> str:
    """nvidia-h100-80gb-hbm3-2026-01-31"""
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {date}".lower()).strip("-")


def write(results: Results, folder: Path, stem: str) -> tuple[Path, Path]:
    """The JSON and the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(markdown(results))
    return paths


def markdown(results: Results) -> str:
    """A table per part, and what failed."""
    environment = results["environment"]
    parts = [f"# {environment['device']}", "\n".join(f"- {key}: {value}" for key, value in environment.items())]
    if results["copy"]:
        copy = results["copy"]
        parts.append(
            f"Device-to-device copy, bytes read plus written: {copy['median']:.0f} GB/s "
            f"({copy['p10']:.0f} to {copy['p90']:.0f})."
        )
    if results["operations"]:
        parts += ["## Operations", operations_table(results["operations"], results["copy"])]
    if results["steps"]:
        parts += ["## Optimizer steps", steps_table(results["steps"])]
    if results["training"]:
        parts += ["## Training iterations", training_table(results["training"])]
    if results["failed"]:
        parts += ["## Failed", "\n".join(f"- {part}: {reason}" for part, reason in results["failed"].items())]
    return "\n\n".join(parts) + "\n"


def operations_table(records: Sequence[Record], copy: dict[str, float] | None) -> str:
    """Times with the share of the copy bandwidth, and how often each fits into the fastest of torch's ways."""
    rows = []
    for record in records:
        milliseconds = record["milliseconds"]
        per_second = record["bytes"] / milliseconds["median"] / 1e6
        alike = [other for other in records if all(other[key] == record[key] for key in ("operation", "shapes"))]
        peers = [other["milliseconds"]["median"] for other in alike if is_peer(other)]
        copies = [other["milliseconds"]["median"] for other in alike if other["variant"].startswith("copy")]
        rows.append([
            record["operation"], record["shapes"], record["variant"], with_spread(milliseconds), f"{per_second:.0f}",
            f"{per_second / copy['median']:.2f}" if copy else "",
            f"{min(copies) / milliseconds['median']:.2f}" if copies else "",
            f"{min(peers) / milliseconds['median']:.2f}" if peers else "",
            f"{record['launches']}{', in a graph' * record.get('is_captured', False)}",
            *(with_spread(record[key]) if key in record else "" for key in ("wall_milliseconds", "graph_milliseconds")),
        ])  # fmt: skip
    head = ["operation", "tensors", "variant", "device ms (p10 to p90)", "GB/s", "of copy", "of a copy alike",
            "x best torch", "launches", "wall ms (p10 to p90)", "captured, wall ms (p10 to p90)"]  # fmt: skip
    return table(head, rows)


def is_peer(record: Record) -> bool:
    return record["variant"].startswith("torch") and not record["is_floor"]


def steps_table(records: Sequence[Record]) -> str:
    rows = [
        [
            *(record["optimizer"], record["shapes"], with_spread(record["wall_milliseconds"])),
            *(str(record["launches"]), str(record["waits"])),
        ]
        for record in records
    ]
    return table(["optimizer", "tensors", "wall ms per step (p10 to p90)", "launches", "waits"], rows)


def training_table(records: Sequence[Record]) -> str:
    """Times and peak memory, also in proportion to the dense step of the same network."""
    dense = {record["network"]: record for record in records if record["optimizer"] == "dense"}
    rows = []
    for record in records:
        base = dense.get(record["network"])
        time, peak = record["milliseconds"]["median"], record["peak_bytes"]
        rows.append([
            record["network"], str(record["batch"]), record["optimizer"], with_spread(record["milliseconds"]),
            f"{time / base['milliseconds']['median']:.2f}" if base else "",
            f"{peak / 2**30:.2f}", f"{peak / base['peak_bytes']:.2f}" if base else "",
        ])  # fmt: skip
    head = ["network", "batch", "optimizer", "ms (p10 to p90)", "of dense", "peak GiB", "of dense"]
    return table(head, rows)


def with_spread(milliseconds: dict[str, float]) -> str:
    return "{median:.4f} ({p10:.4f} to {p90:.4f})".format(**milliseconds)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; numbers are not aligned, since what renders it does that."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
