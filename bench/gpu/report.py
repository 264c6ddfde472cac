"""Measurements -> JSON and a Markdown page. Uses no GPU, and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

Results = dict[str, Any]  # see `empty`
Record = dict[str, Any]
Milliseconds = dict[str, float]  # see `summary`
PARTS = ("operations", "steps", "training", "compiled", "exchange")


class Failure(NamedTuple):
    """Of one variant, beside which others were measured."""

    what: str
    reason: str


class Measurement(NamedTuple):
    name: str
    make: Callable[[], Iterable[Record | Failure]]


def empty(environment: dict[str, str]) -> Results:
    """What the parts of a run fill."""
    return {"environment": environment, "copy": None, **{part: [] for part in PARTS}, "failed": {}}


def summary(samples: list[float]) -> Milliseconds:
    """Median, spread (10th and 90th percentile) and number of samples."""
    tenths = quantiles(samples, n=10) if len(samples) > 1 else [samples[0]] * 9
    return {"median": median(samples), "p10": tenths[0], "p90": tenths[8], "samples": len(samples)}


def resume(folder: Path, stem: str, environment: dict[str, str]) -> tuple[Results, str]:
    """Results to add parts to, and the stem of their files.

    Those of the folder where they were measured in the same environment; else new ones, which no file has the name of.
    """
    found, number = stem, 1
    while (path := folder / f"{found}.json").exists():
        results = json.loads(path.read_text())
        before, command = dict(results["environment"]), environment["command"]
        commands = before.pop("command").split("; ")
        if before == {name: value for name, value in environment.items() if name != "command"}:
            results["environment"]["command"] = "; ".join([*(each for each in commands if each != command), command])
            return empty({}) | results, found
        number += 1
        found = f"{stem}-{number}"
    return empty(environment), found


def begin(results: Results, part: str) -> None:
    """Forget what was measured of a part before."""
    results[part] = []
    results["failed"] = {name: why for name, why in results["failed"].items() if not name.startswith(f"{part}: ")}


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
    for part, title in (("operations", "Operations"), ("compiled", "Operations beside torch.compile")):
        if results[part]:
            parts += [f"## {title}", operations_table(results[part], results["copy"])]
            parts += [f"### Torch's times over ours ({part})", ratios_table(results[part])]
    if results["steps"]:
        parts += ["## Optimizer steps", steps_table(results["steps"])]
    if results["training"]:
        parts += ["## Training iterations", training_table(results["training"])]
    if results["exchange"]:
        parts += ["## Sums of device memory over ranks", exchange_table(results["exchange"])]
    if results["failed"]:
        parts += ["## Failed", "\n".join(f"- {part}: {reason}" for part, reason in results["failed"].items())]
    return "\n\n".join(parts) + "\n"


def operations_table(records: Sequence[Record], copy: dict[str, float] | None) -> str:
    """Times with the share of the copy bandwidth."""
    rows = []
    for record in records:
        milliseconds = record["milliseconds"]
        per_second = record["bytes"] / milliseconds["median"] / 1e6
        copies = [milliseconds_of(other) for other in alike(records, record) if other["variant"].startswith("copy")]
        rows.append([
            record["operation"], record["shapes"], record["variant"], with_spread(milliseconds), f"{per_second:.0f}",
            f"{per_second / copy['median']:.2f}" if copy else "",
            f"{min(copies) / milliseconds['median']:.2f}" if copies else "",
            f"{record['launches']}{', in a graph' * record.get('is_captured', False)}",
            *(with_spread(record[key]) if key in record else "" for key in ("wall_milliseconds", "graph_milliseconds")),
        ])  # fmt: skip
    head = ["operation", "tensors", "variant", "device ms (p10 to p90)", "GB/s", "of copy", "of a copy alike",
            "launches", "wall ms (p10 to p90)", "captured, wall ms (p10 to p90)"]  # fmt: skip
    return table(head, rows)


def ratios_table(records: Sequence[Record]) -> str:
    """How often each of ours fits into torch's fastest, its `_foreach_` functions and its loop over tensors.

    By time on the device, and by the wall where that was taken, as it was where launches count.
    """
    rows = []
    for record in records:
        if record["is_floor"] or record["variant"].startswith("torch"):
            continue
        row = [record["operation"], record["shapes"], record["variant"]]
        for key in ("milliseconds", "wall_milliseconds"):
            for beginning in ("torch", "torch _foreach_", "torch loop"):
                peers = [other for other in alike(records, record) if other["variant"].startswith(beginning)]
                times = [milliseconds_of(other, key) for other in peers if not other["is_floor"] and key in other]
                row.append(f"{min(times) / milliseconds_of(record, key):.2f}" if times and key in record else "")
        rows.append(row)
    peers = ("best", "_foreach_", "loop")
    return table(["operation", "tensors", "variant", *peers, *(f"{peer}, wall" for peer in peers)], rows)


def alike(records: Sequence[Record], record: Record) -> list[Record]:
    """The variants of the same operation on the same tensors."""
    return [other for other in records if all(other[key] == record[key] for key in ("operation", "shapes"))]


def milliseconds_of(record: Record, key: str = "milliseconds") -> float:
    return float(record[key]["median"])


def steps_table(records: Sequence[Record]) -> str:
    rows = [
        [
            *(record["optimizer"], record["shapes"], with_spread(record["wall_milliseconds"])),
            *(str(record["launches"]), counts(record["waits"])),
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
            f"{record['loss']:.3f}", str(record["skipped_steps"]), counts(record["waits"]),
        ])  # fmt: skip
    head = ["network", "batch", "optimizer", "ms (p10 to p90)", "of dense", "peak GiB", "of dense", "last loss",
            "skipped steps", "waits in 3 iterations"]  # fmt: skip
    return table(head, rows)


def exchange_table(records: Sequence[Record]) -> str:
    rows = [
        [record["way"], f"{record['megabytes']:.1f}", with_spread(record["milliseconds"]), str(record["right_sums"])]
        for record in records
    ]
    return table(["way", "MB", "ms of the slowest rank (p10 to p90)", "sums, all right"], rows)


def counts(waits: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(waits.items())) or "none"


def with_spread(milliseconds: dict[str, float]) -> str:
    return "{median:.4f} ({p10:.4f} to {p90:.4f})".format(**milliseconds)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; numbers are not aligned, since what renders it does that."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
