"""The benchmark of training iterations: its quick form, its ratios, and how two of its files are compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import compare
import steps
from jobs import environment, find_launcher, run_job
from results import NETWORK_SCHEMA, SCHEMA, STEP_SCHEMA
from step import jobs as step_jobs
from step.methods import METHODS, PHASES, Laps
from step.summary import cell_of, table


def sample(turn: int, method: str, ms: float, sent_bytes: float | None = None) -> dict[str, Any]:
    """What a worker says of a method in one round, all of the time in forward."""
    phases = dict.fromkeys(PHASES, 0.0) | {"forward": ms}
    return {"round": turn, "method": method, "ms": ms, "phases": phases, "sent_bytes": sent_bytes,
            "interface_bytes": 8e6, "exchange": "ring"}  # fmt: skip


def result(*samples: dict[str, Any]) -> dict[str, Any]:
    transports = {"jointspar": "mpi", "peers": "gloo"}
    return {"case": "lenet5, 4 x 1", "world_size": 2, "threads": 1, "iterations": 1, "transports": transports,
            "interface": "lo", "samples": list(samples)}  # fmt: skip


def rows_of(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in cell["variants"]}


@pytest.mark.mpi
def test_quick_run_times_every_method_and_writes_its_results(tmp_path: Path) -> None:
    find_launcher("mpirun")  # skips, or fails under `make test`, where there is no MPI
    command = [sys.executable, "-m", "jointspar", "bench", "step", "--quick", "--out", str(tmp_path)]
    job = run_job(command, timeout=200)
    assert job.code == 0, job.output
    assert job.orphans == 0
    (path,) = tmp_path.glob("*-step-quick.json")
    record = json.loads(path.read_text())
    assert record["schema"] == STEP_SCHEMA and record["quick"]
    assert record["command"].startswith("jointspar bench step --quick")
    assert {"processor", "cores", "load_average"} <= record["machine"].keys()
    assert {"torch", "numpy", "jointspar", "python"} <= record["versions"].keys()
    (cell,) = record["cells"]
    assert (cell["model"], cell["ranks"]) == ("lenet5", 2)
    rows = rows_of(cell)
    assert rows.keys() == METHODS.keys()
    for row in rows.values():
        assert row["ms"]["median"] == pytest.approx(sum(row["phases"].values()), rel=1e-3)
        assert row["wire_bytes"]["median"] > 0
        counted_by = "transport" if row["role"] in ("ours", "floor") else "interface"
        assert row["wire_bytes_counted_by"] == counted_by
    assert rows["ddp"]["wire_bytes"]["median"] > 1.5 * rows["ddp_bf16"]["wire_bytes"]["median"]
    assert table(cell).startswith("lenet5, 4 x 3x32x32; 2 ranks, 1 thread each; mpi")
    with Image.open(path.with_suffix(".png")) as image:
        assert image.format == "PNG"
    assert compare.main([str(path), str(path)]) == 2  # a quick run measures nothing


def test_ratios_are_formed_within_a_round_against_the_fastest_dense_peer_and_plain() -> None:
    rounds = [1.0, 10.0, 100.0]  # the machine slows down; the ratios stay
    times = {"ddp": 8.0, "ddp_bf16": 6.0, "topk": 1.0, "plain": 3.0, "jointspar_1.0": 4.0}
    cell = cell_of("m", result(*(sample(turn, name, ms * slow) for turn, slow in enumerate(rounds)
                                 for name, ms in times.items())))  # fmt: skip
    assert cell["best_dense"] == "ddp_bf16"
    ours = rows_of(cell)["jointspar_1.0"]
    assert ours["speedup"] == {"median": 1.5, "p10": 1.5, "p90": 1.5, "rounds": 3}
    assert ours["of_plain"] == {"median": 0.75, "p10": 0.75, "p90": 0.75, "rounds": 3}
    assert ours["phases"]["forward"] == 40.0


def test_bytes_are_the_transports_where_it_counts_and_else_the_interfaces() -> None:
    cell = cell_of("m", result(sample(0, "ddp", 1.0), sample(0, "stratified_0.5", 1.0, sent_bytes=3e6)))
    rows = rows_of(cell)
    assert (rows["ddp"]["wire_bytes"]["median"], rows["ddp"]["wire_bytes_counted_by"]) == (8e6, "interface")
    ours = rows["stratified_0.5"]
    assert (ours["wire_bytes"]["median"], ours["wire_bytes_counted_by"]) == (3e6, "transport")
    assert ours["of_plain"] is None  # plain took no part
    assert "-" in table(cell)
    between_hosts = result(sample(0, "stratified_0.5", 1.0, sent_bytes=3e6)) | {"interface": "eth0"}
    (row,) = cell_of("m", between_hosts)["variants"]
    assert (row["wire_bytes"]["median"], row["wire_bytes_counted_by"]) == (8e6, "interface")


def test_a_method_whose_forward_pass_is_unlike_the_others_is_marked_as_noise() -> None:
    samples = [sample(0, name, ms) for name, ms in (("ddp", 10.0), ("plain", 11.0), ("stratified_0.5", 13.0))]
    lines = table(cell_of("m", result(*samples))).splitlines()
    assert [line for line in lines if "noise" in line] == [
        "  noise: stratified_0.5 took 1.18 of the median forward pass, which all share"
    ]


def test_phases_add_up_whatever_is_moved() -> None:
    laps = Laps()
    laps.note("forward")
    laps.note("other")
    total = sum(laps.ms.values())
    laps.move("other", "pack", 5.0)
    laps.note("update")
    assert laps.ms["pack"] == 5.0
    assert sum(laps.ms.values()) == pytest.approx(total + laps.ms["update"])


def record_of(speedup: float, of_plain: float, schema: str = STEP_SCHEMA) -> dict[str, Any]:
    rows = [
        {"variant": "stratified_0.5", "role": "ours", "ms": {"median": 1.0}, "speedup": {"median": speedup},
         "of_plain": {"median": of_plain}},
        {"variant": "ddp", "role": "dense", "ms": {"median": speedup}, "speedup": {"median": 1.0}, "of_plain": None},
    ]  # fmt: skip
    cell = {"model": "resnet18", "ranks": 2, "best_dense": "ddp", "variants": rows}
    made_with = {"machine": {"processor": "P", "cores": 2}, "versions": {"torch": "2.13"}}
    return {"schema": schema, "quick": False, "rounds": 3, **made_with, "cells": [cell]}


def compared(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> int:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, record in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(record))
    return compare.main([str(path) for path in paths])


def test_compare_names_ratios_of_steps_that_fell_by_more_than_a_tenth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, record_of(1.2, 0.98), record_of(1.09, 0.9)) == 0
    assert compared(tmp_path, record_of(1.2, 0.98), record_of(0.9, 0.98)) == 1
    assert compared(tmp_path, record_of(1.2, 0.98), record_of(1.2, 0.49)) == 1
    output = capsys.readouterr().out
    assert "WORSE  resnet18, ranks 2, stratified_0.5: 1.2 -> 0.9 over the best peer (-25%)" in output
    assert "WORSE  resnet18, ranks 2, stratified_0.5: 0.98 -> 0.49 of the plain step's speed (-50%)" in output


def test_compare_takes_network_files_by_rate_and_by_what_auto_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(speedup: float, of_ideal: float) -> dict[str, Any]:
        made = record_of(speedup, 1.0, schema=NETWORK_SCHEMA)
        made["cells"][0] |= {"kind": "iterations", "gbits": 0.3}
        exchanges = [
            {"exchange": "ring", "is_chosen": True, "of_ideal": {"median": of_ideal}},
            {"exchange": "allreduce", "is_chosen": False, "of_ideal": {"median": 9 * of_ideal}},
        ]
        transfers = {"kind": "transfers", "launcher": "mpich", "ranks": 2, "gbits": 0.3, "what": "dense"}
        made["cells"] += [{**transfers, "full_bytes": 4e6, "exchanges": exchanges}, {"kind": "time to loss"}]
        return made

    assert compared(tmp_path, record(1.2, 1.0), record(1.1, 1.1)) == 0
    twice = [{**record(speedup, 1.0), "cells": record(speedup, 1.0)["cells"][:1]} for speedup in (2.0, 1.2)]
    both = {**twice[0], "cells": [*twice[0]["cells"], *twice[1]["cells"]]}  # by the parts iterations and loss
    assert compared(tmp_path, both, both) == 0
    assert compared(tmp_path, record(1.2, 1.0), record(0.9, 1.25)) == 1
    output = capsys.readouterr().out
    assert "WORSE  resnet18, ranks 2, 0.3 Gbit/s, stratified_0.5: 1.2 -> 0.9 over the best peer (-25%)" in output
    assert "WORSE  mpich, ranks 2, 0.3 Gbit/s, 4 MB dense, auto: 1 -> 0.8 of the link's speed (-20%)" in output


def test_files_of_two_benchmarks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, record_of(1.2, 0.98), record_of(1.2, 0.98, schema=SCHEMA)) == 2
    assert "the files are of two benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "message"),
    [(None, "no mpirun was found"), ("false", "the job of 2 ranks failed with exit code 1")],
)
def test_job_that_cannot_run_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launcher: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(step_jobs, "find_launcher", lambda: launcher)
    assert steps.main(["--quick", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_job_too(tmp_path: Path, number: int) -> None:
    """The launcher is a stand-in that writes its process number and sleeps."""
    launcher = tmp_path / "mpirun"
    launcher.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/started.part\nmv {tmp_path}/started.part {tmp_path}/started\n"
                        "exec sleep 600\n")  # fmt: skip
    launcher.chmod(0o755)
    program = f"import steps; from step import jobs; jobs.find_launcher = lambda: {str(launcher)!r}; "
    program += f"steps.main(['--quick', '--out', {str(tmp_path)!r}])"
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        job = int((tmp_path / "started").read_text())
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
        with pytest.raises(ProcessLookupError):
            os.kill(job, 0)
    finally:
        process.kill()
        process.wait()


def test_a_method_that_is_named_twice_is_measured_once() -> None:
    options = steps._parse(["--methods", "ddp", "plain", "ddp", "--ranks", "2", "2"])
    assert options.methods == ["ddp", "plain"] and options.ranks == [2]
