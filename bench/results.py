"""Results of a benchmark: what is kept of the timed rounds, on which machine, as a table and as a JSON file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from alternate import spread
from jointspar import __version__
from jointspar.training.circumstances import commit
from limits import compiler
from operation import Case, Traffic, Variant

SCHEMA = "jointspar-bench-ops/1"
STEP_SCHEMA = "jointspar-bench-step/1"
PACKAGES = ("torch", "numpy", "scipy", "numba")

Cell = dict[str, Any]  # one operation, case and number of threads, with its variants
Record = dict[str, Any]


def cell_of(
    operation: str,
    case: Case,
    num_threads: int,
    traffic: Traffic | None,
    variants: Sequence[Variant],
    seconds: Mapping[str, np.ndarray],
) -> Cell:
    """Milliseconds of each variant, and its ratios to the best peer and to the limit, each formed within a round.

    speedup: the best peer's time / own time, where the best peer is the one of the smallest median. of_limit: the
    limit's time / own time; None without a limit.
    """
    peers = [variant.name for variant in variants if variant.role == "peer"]
    best_peer = min(peers, key=lambda name: float(np.nanmedian(seconds[name])))
    limit = seconds.get("limit")
    rows = [
        {
            "variant": variant.name,
            "role": variant.role,
            "ms": spread(1e3 * seconds[variant.name])._asdict(),
            "speedup": spread(seconds[best_peer] / seconds[variant.name])._asdict(),
            "of_limit": None if limit is None else spread(limit / seconds[variant.name])._asdict(),
        }
        for variant in variants
    ]
    return {
        "operation": operation,
        "case": case.name,
        "dtype": case.dtype,
        "threads": num_threads,
        "caches": "warm" if case.in_cache else "cold",
        "num_bytes": None if traffic is None else traffic.num_bytes,
        "best_peer": best_peer,
        "variants": rows,
    }


def table(cell: Cell) -> str:
    """A line a variant: milliseconds, and the two ratios, each as the median [10th, 90th percentile]."""
    threads = f"{cell['threads']} thread" + ("s" if cell["threads"] > 1 else "")
    lines = [f"{cell['operation']}, {cell['case']}, {cell['dtype']}, {threads}, {cell['caches']} caches"]
    lines.append(f"  {'':22}{'ms':>30}{'x ' + cell['best_peer']:>26}{'of the limit':>26}")
    for row in cell["variants"]:
        of_limit = _bracketed(row["of_limit"], ".2f") if row["of_limit"] else "-"
        speedup = _bracketed(row["speedup"], ".2f")
        lines.append(f"  {row['variant']:22}{_bracketed(row['ms'], '.4g'):>30}{speedup:>26}{of_limit:>26}")
    return "\n".join(lines) + "\n"


def _bracketed(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} [{values['p10']:{form}}, {values['p90']:{form}}]"


def new_record(
    what: str, arguments: Sequence[str], options: argparse.Namespace, left_out: dict[str, str], schema: str = SCHEMA
) -> Record:
    """All that is known before the first measurement."""
    return {
        "schema": schema,
        "command": " ".join(["jointspar bench", what, *arguments]),
        "quick": options.quick,
        "rounds": options.rounds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": _versions(),
        "left_out": left_out,
    }


def refuse_beside_quick(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Where --quick is given, which has sizes of its own, end with an error for an option that would not act."""
    given = [name for name in names if getattr(options, name) != parser.get_default(name)]
    if options.quick and given:
        parser.error(f"--{given[0].replace('_', '-')} does not act with --quick: leave one of them out")


def save(record: Record, cells: Sequence[Cell], folder: Path, name: str) -> Path:
    """Write <date>-<name>.json into `folder`, made if needed; returns its path.

    It replaces what the same command wrote on the same day; what another command wrote keeps its name, and this gets a
    number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:10]}-{name}"
    paths = (folder / f"{name}{'' if number == 1 else f'-{number}'}.json" for number in count(1))
    path = next(path for path in paths if _command_of(path) in (None, record["command"]))
    path.write_text(json.dumps({**record, "cells": cells}, indent=1) + "\n")
    return path


def _command_of(path: Path) -> str | None:
    """What wrote a result file; None where there is none, "" where it does not say."""
    try:
        return str(json.loads(path.read_text())["command"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def machine() -> dict[str, Any]:
    """The processor and how busy it is; no names of hosts."""
    cpu_information = Path("/proc/cpuinfo")
    lines = cpu_information.read_text().splitlines() if cpu_information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache": cache.read_text().strip() if cache.exists() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],  # of 1, 5 and 15 minutes, before the first round
    }


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"jointspar": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    versions["native"] = dict(importlib.import_module("jointspar_ext._core").build_info)
    found = compiler()
    if found:
        output = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        versions["compiler of the limits"] = output.partition("\n")[0]
    return versions
