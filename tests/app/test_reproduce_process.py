"""`jointspar reproduce` as a process: what its end does to the run that it follows, and to a second one beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import jobs
import warm_python

ROOT = Path(__file__).resolve().parents[2]
LIST = 'title = "T"\n[[experiments]]\nname = "one"\nruns = { dense = { method = "lars", epochs = 2 } }\n'
REPRODUCE = """
import sys
from jointspar import cli
from jointspar.training.reproduce import runs
runs.train_command = lambda: [sys.executable, "job.py"]
sys.exit(cli.main(["reproduce", "--list", "list.toml", "--out", "out", *sys.argv[1:]]))
"""
# Stands for `jointspar train`: is there until SIGUSR1, upon which it saves, or until it is to go on from there.
JOB = """
import os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
def stop(*_):
    if Path("deaf").exists():
        return
    (out / "checkpoint/step-1").mkdir(parents=True)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGUSR1, stop)
Path("pid").write_text(str(os.getpid()))
print("epoch   1/2", flush=True)
while "--resume" not in sys.argv:
    time.sleep(0.01)
(out / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 2, "step": 1, "train_loss": 1, "test_accuracy": 1,'
    '"seconds": 1, "bytes_sent": 0, "active_fraction": 1, "phase_ms": {"forward": 1}}\\n')
(out / "summary.json").write_text('{"test_accuracy": 1, "train_loss": 1, "seconds": 1, "active_fraction": 1,'
    '"skipped_steps": 0, "dataset": "digits"}')
"""


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path, interruptible: None) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts `jointspar reproduce` with JOB in the place of training; whatever is left at the end is killed."""
    for name, text in (("list.toml", LIST), ("job.py", JOB), ("reproduce.py", REPRODUCE)):
        (tmp_path / name).write_text(text)
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    started = []

    def begin() -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                warm_python.command("reproduce.py"), cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    with suppress(OSError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def wait_for_job(folder: Path) -> int:
    """Until the line on its first epoch is in the log; its process."""
    log = folder / "out/one/dense/seed-0/log.txt"
    wait_until(lambda: log.exists() and "epoch   1/2" in log.read_text(), "the job is up")
    return int((folder / "pid").read_text())


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interruption_lets_the_run_save(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]], number: signal.Signals
) -> None:
    first = start()
    wait_for_job(tmp_path)
    os.killpg(first.pid, number)  # as a terminal does
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 128 + number
    assert errors.endswith("jointspar reproduce: interrupted; the same command goes on\n") and "Traceback" not in errors
    folder = tmp_path / "out/one/dense/seed-0"
    assert (folder / "checkpoint/step-1").is_dir()
    assert (folder / "log.txt").read_text().endswith("saved\n")


def test_a_job_that_does_not_end_is_killed_by_the_second_interruption(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    (tmp_path / "deaf").touch()
    first = start()
    job = wait_for_job(tmp_path)
    first.send_signal(signal.SIGTERM)
    assert first.stderr is not None
    assert any("once more kills it" in line for line in first.stderr)
    assert is_there(job)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 143
    assert not is_there(job)


def test_a_run_whose_reproduce_was_killed_keeps_its_folder_until_it_ends_and_then_goes_on(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    first = start()
    job = wait_for_job(tmp_path)
    first.kill()
    first.communicate()
    second = start()
    assert second.stderr is not None
    assert any("waiting for another process that works in out/one/dense/seed-0" in line for line in second.stderr)
    os.kill(job, signal.SIGUSR1)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert "100.00 %" in output


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_have_the_time_that_a_long_step_takes_to_save(tmp_path: Path, interruptible: None) -> None:
    """mpirun itself lets them only a second."""
    jobs.find_launcher("mpirun")  # skips, or fails under `make test`, where there is no MPI
    (tmp_path / "list.toml").write_text(
        LIST.replace(
            "runs = { dense = {", 'ranks = 2\nruns = { dense = { model = "resnet20", batch_size = 256, log_every = 1, '
        )
    )
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    command = warm_python.command("-m", "jointspar", "reproduce", "--list", "list.toml", "--out", "out")
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, text=True, stderr=subprocess.PIPE
    )
    folder = tmp_path / "out/one/dense/seed-0"
    metrics = folder / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and '"step"' in metrics.read_text(), "the first step")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped by a signal after step" in (folder / "log.txt").read_text()
    assert len(list((folder / "checkpoint").glob("step-*"))) == 1
